"""A training step: ours against the released formulation, with a dense mask and without masked work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from benchmarks.baseline import Baseline
from benchmarks.harness import header, options, parse, report
from benchmarks.measure import Run, Setup, count_flops, measure
from madformer.config import DiffusionConfig, LossConfig, ModelConfig
from madformer.diffusion.losses import compute_losses
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.errors import ConfigError
from madformer.model.madformer import MADFormer


class Losses:
    """The loss of one fixed batch, by each side, over the same weights."""

    def __init__(self, model: MADFormer, weights: LossConfig, batch: int, clean_tower_backward: bool = True) -> None:
        """`clean_tower_backward`: the baselines' clean-tower loss is in the sum, times its weight of zero (Eq. 6)."""
        c, device = model.config, model.boi_SD.device
        self.clean_tower_backward = clean_tower_backward
        self.model, self.weights, self.baseline = model, weights, Baseline(model)
        self.schedule = NoiseSchedule(DiffusionConfig())
        self.clean_BLCYX = torch.randn(batch, c.ar_length, c.latent_channels, c.block_size, c.block_size, device=device)
        self.noise_BLCYX, self.t_BL = self.schedule.draw(self.clean_BLCYX)

    def ours(self) -> Tensor:
        """As trained: what the weights do not ask for is not computed."""
        return compute_losses(self.model, self.schedule, self.weights, self.clean_BLCYX, self.noise_BLCYX, self.t_BL).total

    def released(self, attention: Literal["dense", "sparse"]) -> Tensor:
        """All three outputs are computed and weights multiply, zero or not."""
        noisy_BLCYX = self.schedule.add_noise(self.clean_BLCYX, self.noise_BLCYX, self.t_BL)
        denoised_BLCYX, condition_BLCYX, clean_tower_BLCYX = self.baseline.forward(
            self.clean_BLCYX, noisy_BLCYX, self.t_BL, attention
        )
        target_BLCYX = self.schedule.target(self.model.config.prediction_type, self.clean_BLCYX, self.noise_BLCYX, self.t_BL)
        total = self.weights.lambda_image * mse_loss(denoised_BLCYX, target_BLCYX)
        total = total + self.weights.lambda_hidden * mse_loss(condition_BLCYX, self.clean_BLCYX)
        if self.clean_tower_backward:
            total = total + 0 * mse_loss(clean_tower_BLCYX[:, :-1], self.clean_BLCYX[:, 1:])
        return total

    def by_side(self) -> dict[str, Callable[[], Tensor]]:
        """Ours and both baselines."""
        return {"ours": self.ours, "dense": lambda: self.released("dense"), "sparse": lambda: self.released("sparse")}


def training_flops(
    config: ModelConfig, weights: LossConfig, batch: int = 1, clean_tower_backward: bool = True
) -> dict[str, int]:
    """FLOPs of forward and backward, by side; the optimiser's few are not counted."""
    with torch.device("meta"):
        model = MADFormer(replace(config, compile=False))

    def forward_backward(loss: Callable[[], Tensor]) -> None:
        loss().backward()

    losses = Losses(model, weights, batch, clean_tower_backward).by_side()
    return {name: count_flops(functools.partial(forward_backward, loss)) for name, loss in losses.items()}


def training_runs(setup: Setup, weights: LossConfig, batch: int, clean_tower_backward: bool = True) -> dict[str, Run]:
    """A whole step by each side: forward, backward, AdamW."""
    model = MADFormer(setup.config).to(setup.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step(loss: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        with setup.autocast():
            total = loss()
        total.backward()
        optimizer.step()

    losses = Losses(model, weights, batch, clean_tower_backward).by_side()
    return {name: functools.partial(step, loss) for name, loss in losses.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = options(__doc__, batch=4)
    parser.add_argument("--lambda-hidden", type=float, default=0.1, help="weight of the hidden loss; ours skips it at 0")
    parser.add_argument(
        "--clean-tower-forward-only",
        action="store_true",
        help="leave the baselines' third upsampler pass out of their loss, and so of the backward pass, as released",
    )
    given, setup = parse(parser, arguments)
    try:
        weights = LossConfig(lambda_hidden=given.lambda_hidden)
    except ConfigError as error:
        parser.error(str(error))
    print(header(setup, f"batch {given.batch}, lambda_hidden {weights.lambda_hidden:g}"), flush=True)
    backward = not given.clean_tower_forward_only
    flops = training_flops(setup.config, weights, given.batch, backward)
    runs = training_runs(setup, weights, given.batch, backward) if setup.runs else {}
    sides = measure(setup, runs, flops, given.repeats)
    print(report(setup, sides, tokens=given.batch * setup.config.ar_length * setup.config.block_tokens, unit="step"))


if __name__ == "__main__":
    main()
