"""Less noise is never harder: after a short training, no timestep's denoising error is above that of a larger one.

The eight configurations hold every pair of values that two switches can have together (seven do not).
"""

import itertools
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from madformer.config import (
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TextConfig,
    UNetConfig,
)
from madformer.data.prompts import DIGIT_NAMES, PromptTokenizer
from madformer.data.sources import load_digits
from madformer.diffusion.losses import compute_losses
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.errors import ConfigError
from madformer.evaluation.diagnostics import denoising_errors, denoising_timesteps, worse_than_larger
from madformer.model import MADFormer
from madformer.model.embedding import to_blocks
from madformer.training.module import build_optimizer, build_schedule

NAMED = {
    name: get_args(get_type_hints(ModelConfig)[name]) for name in ("prediction_type", "timestep_embedding", "parameter_sets")
}
FLAGS = ("use_clean_blocks", "use_condition", "local_denoising", "hidden", "clean_tower", "text")
SWITCHES = NAMED | dict.fromkeys(FLAGS, (False, True))
CASES = [
    {name: name in flags for name in FLAGS} | dict(zip(NAMED, named.split(), strict=True))
    for named, flags in {
        "sample sinusoidal shared": ("use_clean_blocks", "use_condition", "hidden"),
        "sample sinusoidal separate": ("use_condition", "local_denoising", "hidden"),
        "sample raw separate": ("use_clean_blocks", "local_denoising", "clean_tower", "text"),
        "epsilon sinusoidal shared": ("local_denoising",),
        "epsilon raw separate": ("use_clean_blocks", "use_condition", "hidden", "clean_tower", "text"),
        "v_prediction sinusoidal separate": ("use_clean_blocks", "use_condition", "clean_tower", "text"),
        "v_prediction raw shared": ("text",),
        "v_prediction raw  shared": ("use_clean_blocks", "use_condition", "local_denoising", "hidden", "clean_tower"),
    }.items()
]


def experiment(case: dict[str, Any]) -> ExperimentConfig:
    unet = UNetConfig(channels=(16,), layers=(1,), attention=(False,))
    sizes = {"latent_channels": 1, "latent_size": 8, "ar_length": 4, "depth": 2, "diffusion_depth": 1, "width": 32}
    switches = {name: value for name, value in case.items() if name not in ("hidden", "clean_tower", "text")}
    text = TextConfig(vocab_size=2048, length=4, pad_token_id=0) if case["text"] else None
    return ExperimentConfig(
        model=ModelConfig(num_heads=2, ffn_width=64, unet=unet, text=text, **sizes, **switches),
        loss=LossConfig(lambda_hidden=0.1 * case["hidden"], lambda_clean_tower=0.1 * case["clean_tower"]),
        data=DataConfig(source="digits", codec="pixels", tokenizer="builtin"),
        optimizer=OptimizerConfig(lr=3e-3, warmup_fraction=0.03, decay_fraction=0.3),
        evaluation=EvaluationConfig(nfe=(2,)),
    )


def read(config: ExperimentConfig, split: str) -> tuple[Tensor, Tensor | None]:
    """Blocks of digits, and their prompts."""
    images_NCYX, labels_N = load_digits(split)
    text = config.model.text
    prompts_KT = PromptTokenizer("builtin", text)([f"the digit {name}" for name in DIGIT_NAMES]) if text else None
    return to_blocks(images_NCYX, config.model.ar_length), None if prompts_KT is None else prompts_KT[labels_N]


def train(model: MADFormer, config: ExperimentConfig, steps: int) -> None:
    (clean_NLCYX, text_NT), schedule = read(config, "train[:90%]"), NoiseSchedule(config.diffusion)
    optimizer, generator = build_optimizer(model, config.optimizer), torch.Generator().manual_seed(0)
    rate = build_schedule(optimizer, config.optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(clean_NLCYX), (8,), generator=generator)
        noise_BLCYX, t_BL = schedule.draw(clean_NLCYX[rows], generator=generator)
        text_BT = None if text_NT is None else text_NT[rows]
        optimizer.zero_grad()
        compute_losses(model, schedule, config.loss, clean_NLCYX[rows], noise_BLCYX, t_BL, text_BT).total.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()


@torch.no_grad()
def harder_than_larger(model: MADFormer, config: ExperimentConfig) -> dict[int, float]:
    """Timesteps that some larger one is better than, with their denoising errors."""
    clean_NLCYX, text_NT = read(config, "train[95%:]")
    errors_NT = denoising_errors(model, config, clean_NLCYX, range(len(clean_NLCYX)), text_NT)[0].mean(dim=2)
    series = zip(denoising_timesteps(1000), errors_NT.mean(dim=0).tolist(), worse_than_larger(errors_NT), strict=True)
    return {timestep: error for timestep, error, worse in series if worse}


def pairs(case: dict[str, Any]) -> set[Any]:
    return set(itertools.combinations(sorted(case.items()), 2))


def test_the_configurations_hold_every_pair_of_switches():
    possible = set()
    for values in itertools.product(*SWITCHES.values()):
        case = dict(zip(SWITCHES, values, strict=True))
        try:
            experiment(case)
        except ConfigError:
            continue
        possible |= pairs(case)
    assert set().union(*map(pairs, CASES)) == possible and len(CASES) == 8


@pytest.mark.parametrize(
    "case",
    [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])],
    ids=lambda case: case["prediction_type"],
)
def test_no_timestep_is_harder_than_a_larger_one(case, monkeypatch):
    config = experiment(case)
    torch.manual_seed(0)
    model = MADFormer(config.model)
    train(model, config, 200)
    assert harder_than_larger(model, config) == {}
    if case is CASES[0]:  # the hidden loss at the timestep of a noisy block, where it breaks the denoiser
        monkeypatch.setattr("madformer.model.madformer.AUXILIARY_TIMESTEP", 0)
        train(model, config, 40)
        assert {0, 1} <= harder_than_larger(model, config).keys()
