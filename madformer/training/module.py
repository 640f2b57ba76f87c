"""The optimiser, the learning rate schedule, sharding, and the LightningModule that uses them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from madformer.config import ExperimentConfig, OptimizerConfig, config_hash, wanted_outputs
from madformer.diffusion.losses import Losses, compute_losses
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.errors import NonFiniteError
from madformer.model import MADFormer
from madformer.model.embedding import drop_text, to_blocks
from madformer.model.layer import DecoderLayer
from madformer.model.layer_plan import existing_outputs, layer_plans
from madformer.randomness import keyed_generator
from madformer.runs.checkpoints import CONFIG_HASH, EMA, TRAINED_BY
from madformer.training.ema import MovingAverage
from madformer.training.logging import Throughput, block_losses, mean_terms


def build_optimizer(model: MADFormer, config: OptimizerConfig, fused: bool = False) -> torch.optim.AdamW:
    """AdamW over the trained parameters, without weight decay for norms, biases and embeddings (BOI block included).

    Args:
        config: learning rate, betas and weight decay.
        fused: one kernel for many tensors, for accelerators. It skips the step if `found_inf` is 1.
    """
    groups = parameter_groups(model)
    settings: list[dict[str, Any]] = [
        {"params": groups["decay"], "weight_decay": config.weight_decay},
        {"params": groups["no_decay"], "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(settings, lr=config.lr, betas=(beta1, beta2), fused=fused or None)


def adopt_state(optimizer: torch.optim.Optimizer) -> None:
    """Adapt an optimiser state from a checkpoint to this device. On another device AdamW may have been fused or not."""
    fused = optimizer.defaults.get("fused")
    for group in optimizer.param_groups:
        group["fused"] = fused
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if parameter.device.type == "cpu":
                state[name] = value.clone()  # a checkpoint's tensors are mapped from its file
            elif name == "step" and fused:
                state[name] = value.to(parameter.device)


def parameter_groups(model: MADFormer) -> dict[str, list[nn.Parameter]]:
    """Trained parameters with (`decay`) and without (`no_decay`) weight decay."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} | {model.boi_SD}
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups["no_decay" if parameter.ndim < 2 or parameter in embeddings else "decay"].append(parameter)
    return groups


def unused_parameters(model: MADFormer, outputs: Iterable[str] | None = None) -> list[nn.Parameter]:
    """Parameters that get no gradient if these auxiliary outputs are in the loss (None: all that exist).

    Examples are the clean tower's last feed-forward layer without its loss, and the noise tower's AR stage without the
    condition. Freeze these parameters, else DistributedDataParallel waits for their gradients.
    """
    outputs = existing_outputs(model.config, outputs)
    used: set[nn.Parameter] = {*model.downsampler.parameters(), *model.upsampler.parameters()}
    for layer, plan in zip(model.layers, layer_plans(model.config, outputs), strict=True):
        for name in plan.keys:
            tower = cast(DecoderLayer, layer).tower(name)
            modules = [tower] if name in plan.queries else [tower.attention_norm, tower.qkv, tower.k_norm]
            used.update(parameter for module in modules for parameter in module.parameters())
    if model.config.use_condition:
        used.add(model.boi_SD)
    if model.text is not None:
        used.update(model.text.parameters() if "text_logits" in outputs else model.text.embedding.parameters())
    return [parameter for parameter in model.parameters() if parameter not in used]


def draw_depth(config: ExperimentConfig, step: int) -> int:
    """Draw an elastic run's diffusion depth for a training step (0-based). All micro-batches and devices draw the same."""
    depths = config.model.elastic_depths
    return depths[int(torch.randint(len(depths), (), generator=keyed_generator(config.seed, "depth", step)))]


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, max_steps: int) -> LambdaLR:
    """The learning rate schedule (`wsd_factor`), updated at every step.

    Args:
        config: warm-up and decay.
        max_steps: training steps of the whole run.
    """
    return LambdaLR(optimizer, lambda step: wsd_factor(step, config, max_steps))


def wsd_factor(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """The factor on the learning rate at a step: linear warm-up, 1, then 0.5 ** (halvings * progress).

    This is the schedule of the released code. transformers' schedule of this name has no exponential decay.

    Args:
        step: number of the step, from 0.
        config: warm-up and decay.
        max_steps: training steps of the whole run.
    """
    warmup = config.warmup_fraction * max_steps if config.warmup_steps is None else config.warmup_steps
    decay = config.decay_fraction * max_steps
    if step + 1 < warmup:
        return (step + 1) / warmup
    if step > max_steps - decay:
        return 0.5 ** (config.decay_halvings * (step - max_steps + decay) / decay)
    return 1.0


def shard(model: MADFormer, mesh: Any, dtype: torch.dtype | None = None) -> None:
    """Shard weights, gradients and optimiser state over the devices of the mesh, layer by layer; None: do nothing.

    Args:
        mesh: Lightning's device mesh.
        dtype: dtype of the layers' gathered weights; None: float32. The U-Net, the BOI block, the text and the residual stream
            keep theirs. Gradients are summed in float32.
    """
    if mesh is None:
        return
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"], mp_policy=policy)
    fully_shard(model, mesh=mesh["data_parallel"])


@contextmanager
def unshard(model: nn.Module) -> Iterator[None]:
    """Gather weights, so that parts of the model can be called outside its forward. Layers gather theirs themselves."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


class LitMADFormer(pl.LightningModule):
    """Trains a MADFormer on batches of `LatentDataModule`, with any Trainer.

    Initialisation, timesteps, noise and dropped prompts are keyed by seed, step and place in the global batch. They depend
    neither on the number of devices nor on restarts. Weights that get no gradient from the configured loss are frozen.
    Override `losses` for a custom loss.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = MADFormer(config.model)
        for parameter in unused_parameters(self.model, wanted_outputs(config.loss)):
            parameter.requires_grad_(False)
        self.schedule = NoiseSchedule(config.diffusion)
        self.throughput = Throughput(config)
        self.last_checkpoint: str | None = None
        """The newest checkpoint, for the message of a run that diverges."""
        self._restored_ema: dict[str, Tensor] | None = None
        self.last_loss: Tensor | None = None
        """The total loss of the newest micro-batch. Reading it waits for the device."""
        self.mean_loss: float | None = None
        """The total loss of the last logged step, averaged over micro-batches and devices."""
        self._window: list[tuple[Losses, Tensor]] = []
        self._unchecked: list[tuple[int, Tensor, list[dict[str, Tensor]]]] = []

    @property
    def runs_ahead(self) -> bool:
        """Whether the host runs ahead of the device, which is then an accelerator. No step may wait for its numbers."""
        return next(self.model.parameters()).device.type != "cpu"

    def configure_model(self) -> None:
        """Shard the model if the strategy has a device mesh."""
        mesh = self.device_mesh
        halved = mesh is not None and mesh.device_type != "cpu" and self.config.trainer.precision == "bf16-mixed"
        shard(self.model, mesh, torch.bfloat16 if halved else None)

    def configure_optimizers(self) -> Any:
        """AdamW and its learning rate schedule, for Lightning."""
        optimizer = build_optimizer(self.model, self.config.optimizer, fused=self.runs_ahead)
        schedule = build_schedule(optimizer, self.config.optimizer, self.config.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Start the moving average, from the checkpoint if there is one. Lightning has restored the weights before."""
        self.ema = MovingAverage(self.model, self.config.optimizer.ema_decay, self._restored_ema)
        self._restored_ema = None
        for optimizer in self.trainer.optimizers:
            adopt_state(optimizer)
        self.throughput.start()

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Draw noise for batches of other loaders. The threads of `LatentDataModule` have drawn already."""
        return self.draw(batch) if "keys" in batch else batch

    def draw(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Draw each image's noise, timesteps, place in its posterior, and whether its prompt is dropped.

        All of it is drawn on the CPU, so it is the same for any device. Threads may call it.
        """
        model = self.config.model
        template_BLCYX = torch.empty(1, model.ar_length, model.latent_channels, model.block_size, model.block_size)
        noises, timesteps, texts, posterior_noises = [], [], [], []
        for row, key in enumerate(batch["keys"].tolist()):
            generator = keyed_generator(self.config.seed, "noise", *key)
            noise, t = self.schedule.draw(template_BLCYX, self.config.diffusion.draws_per_image, generator)
            noises.append(noise)
            timesteps.append(t)
            if model.text is not None and "text" in batch:
                texts.append(drop_text(batch["text"][row : row + 1], model.text, generator))
            if "latents" not in batch:  # the device makes them from moments or images
                shape = (1, model.latent_channels, model.latent_size, model.latent_size)
                posterior_noises.append(torch.randn(shape, generator=keyed_generator(self.config.seed, "posterior", *key)))
        draws = {"noise": noises, "t": timesteps, "text": texts, "posterior_noise": posterior_noises}
        data = {name: value for name, value in batch.items() if name not in ("keys", "text")}
        return {**data, **{name: torch.cat(tensors) for name, tensors in draws.items() if tensors}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The total loss of a micro-batch."""
        losses = self.losses(batch)
        self._window.append((losses.for_log(), batch["t"]))
        self.last_loss = losses.total.detach()
        return losses.total

    def losses(self, batch: dict[str, Tensor]) -> Losses:
        """The losses of a micro-batch, Eq. 6: `total` is minimised, `terms` are logged as `loss/NAME`.

        Args:
            batch: `latents` [B, C, h, w], `noise` [B * k, L, C, Y, X], `t` [B * k, L], and `text` [B, T] of a model with text.
        """
        clean_BLCYX = to_blocks(batch["latents"], self.config.model.ar_length)
        inputs = (clean_BLCYX, batch["noise"], batch["t"], batch.get("text"))
        depth = draw_depth(self.config, self.trainer.global_step) if self.config.model.elastic_depths else None
        return compute_losses(self.model, self.schedule, self.config.loss, *inputs, depth)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the gradient's norm, over all devices and shards, to `optimizer.grad_clip`.

        A norm that is not finite leaves the weights unchanged. If the host runs ahead, `require_finite` finds it later.

        Args:
            optimizer: fused AdamW is told to skip the step if the norm is not finite.
            gradient_clip_val: the Trainer's; not used.
            gradient_clip_algorithm: the Trainer's; not used.

        Raises:
            NonFiniteError: the norm is not finite, and the host does not run ahead.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.grad_clip)
        # Gradients are already summed over the devices. So all devices see the same norm and stop together.
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._unchecked.append((self.trainer.global_step + 1, norm, [losses.terms for losses, _ in self._window]))
        self._gradient_norm = norm
        if not self.runs_ahead:
            self.require_finite()
        elif optimizer.defaults.get("fused"):
            optimizer.found_inf = (~norm.isfinite()).float()

    def require_finite(self) -> None:
        """Check the gradient norms since the last check, with one copy to the host.

        Raises:
            NonFiniteError: a norm is not finite. The message names the step, the loss term and the newest checkpoint.
        """
        unchecked, self._unchecked = self._unchecked, []
        norms = torch.stack([norm for _, norm, _ in unchecked]).tolist() if unchecked else []
        for (step, _, terms), norm in zip(unchecked, norms, strict=True):
            if not math.isfinite(norm):
                raise NonFiniteError(self._describe_divergence(step, terms))

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step the optimiser and the moving average, and log. So a step is logged before its checkpoint is written.

        Args:
            epoch: the Trainer's, as are `batch_idx` and `optimizer`.
            optimizer_closure: computes loss and gradients.
        """
        updates = self.trainer.global_step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.ema.update(updates)
        step = updates + 1
        self.throughput.count_step()
        if step % self.config.trainer.log_every == 0 or step == self.config.trainer.max_steps:
            self.require_finite()
            self._log_step(step)
        self._window.clear()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop at `trainer.max_steps` under any Trainer, as the stream has no end.

        Args:
            outputs: not used, nor are `batch` and `batch_idx`.
        """
        if self.trainer.global_step >= self.config.trainer.max_steps:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Check the gradient norms of the last steps."""
        self.require_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the moving average, the experiment's hash and the training class. No checkpoint is written after a bad step."""
        self.require_finite()
        checkpoint[EMA] = self.ema.state_dict()
        self._number_by_model(checkpoint["optimizer_states"][0])
        checkpoint[CONFIG_HASH] = config_hash(self.config)
        checkpoint[TRAINED_BY] = type(self).__qualname__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the moving average for `on_train_start`, when the weights are on their device."""
        self._restored_ema = checkpoint[EMA]

    @contextmanager
    def sampling_weights(self) -> Iterator[MADFormer]:
        """The model with its averaged weights, to sample from during training."""
        with self.ema.swap_in(), unshard(self.model):
            yield self.model

    def _log_step(self, step: int) -> None:
        values = mean_terms(self._window, self.trainer.strategy.reduce)
        self.mean_loss = values["loss/total"]
        values |= block_losses(self._window, self.config, self.trainer.strategy.reduce)
        if self.config.model.elastic_depths:
            values[f"loss_depth/{draw_depth(self.config, step - 1)}"] = values["loss/image"]
        values |= self.throughput.measure(self.device, self.trainer.world_size)
        values["gradient_norm"] = float(self._gradient_norm)
        # The schedule has not moved yet, so this is the learning rate of the step.
        values["lr"] = float(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step)

    def _number_by_model(self, state: dict[str, Any]) -> None:
        """Number the optimiser's parameters as the model does: FSDP reads them by number, other strategies by position."""
        numbers = {parameter: number for number, parameter in enumerate(self.parameters())}
        numbers_by_position: dict[int, int] = {}
        for entry, group in zip(state.get("param_groups", []), self.optimizers().param_groups, strict=False):  # type: ignore[union-attr]
            group_numbers = [numbers[parameter] for parameter in group["params"]]
            numbers_by_position |= dict(zip(entry["params"], group_numbers, strict=True))
            entry["params"] = group_numbers
        state["state"] = {numbers_by_position[position]: moments for position, moments in state.get("state", {}).items()}

    def _describe_divergence(self, step: int, terms: list[dict[str, Tensor]]) -> str:
        names = [name for losses in terms for name, term in losses.items() if not term.isfinite()]
        cause = f"the {names[0]} loss" if names else "the gradient (every loss on this device is finite)"
        remedy = f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "there is no checkpoint yet"
        return f"step {step}: {cause} is not finite; {remedy}"
