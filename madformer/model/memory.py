"""Memory of training and of the cache, from the configuration alone. Bytes throughout; needs no torch.

Weights, gradients, optimiser state and EMA are float32, whatever autocast's dtype. Activations are the tensors that autograd
keeps for the backward pass on CUDA, where attention keeps no scores. For compiled parts they are an upper bound. A codec that
encodes images during training is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from madformer.config import MIN_FLEX_HEAD_WIDTH, ExperimentConfig, ModelConfig, wanted_outputs
from madformer.errors import ConfigError
from madformer.model.cost import DTYPE_BYTES, downsampler, parameters, unet_passes, upsampler
from madformer.model.layer_plan import LayerPlan, embedded_block_count, existing_outputs, layer_plans, text_tokens

GIB = 2**30

_FULL = 4
"""Bytes of an element in the weights' precision."""

_RESERVE = (GIB, 0.05)
"""A guess, not measured: 1 GiB for CUDA's context, NCCL and the workspaces of libraries, and 5 % of the rest for gradients of
activations and fragmentation."""

_COMPILED = 0.5
"""The least share of the activations that compiled parts keep; the backward pass recomputes the rest. For a small model in
bfloat16 on the CPU, torch's partitioner kept half in a layer and two thirds in the U-Net."""

_TIGHT = 0.9
"""Share of a card's memory above which training may not fit, as an estimate may be too low."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device. The steps of AdamW (fused on CUDA) and EMA, clipping and DDP's buckets need no further memory."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    ema: int
    casts: int
    """Autocast's copies of the weights, one for each call, kept until the backward pass is done. FSDP does not shard them."""
    gathered: int
    """FSDP: weights and gradients that are gathered at one time, those outside the layers and those of two layers."""
    activations: int
    """Kept from the forward for the backward pass, the whole batch."""
    recomputed: int
    """With activation checkpointing: activations of the model's largest part while it is recomputed."""

    @property
    def total(self) -> int:
        """All of the above with a reserve. It is an upper bound if parts are compiled."""
        return self._with_reserve(self.activations + self.recomputed)

    @property
    def compiled(self) -> int:
        """The least that is needed if parts are compiled, with a reserve."""
        return self._with_reserve(int(_COMPILED * (self.activations + self.recomputed)))

    def _with_reserve(self, activations: int) -> int:
        state = self.weights + self.gradients + self.optimizer + self.ema
        return int(_RESERVE[0] + (1 + _RESERVE[1]) * (state + self.casts + self.gathered + activations))


def training_memory(
    config: ModelConfig,
    batch: int,
    dtype: str = "bfloat16",
    outputs: Iterable[str] | None = None,
    draws: int = 1,
    shards: int = 1,
) -> TrainingMemory:
    """Memory of a training step.

    Args:
        config: the model. An elastic one counts at the depth that needs most.
        batch: images on the device.
        dtype: autocast's dtype, a key of `cost.DTYPE_BYTES`.
        outputs: auxiliary outputs in the loss (`config.wanted_outputs`); None: all that exist.
        draws: noise draws per image.
        shards: devices over which FSDP shards weights, gradients and optimiser state; 1: no FSDP.
    """
    parts, size, outputs = parameters(config), DTYPE_BYTES[dtype], existing_outputs(config, outputs)
    depths = [config.at_depth(depth) for depth in config.elastic_depths] or [config]
    kept, recomputed = (max(parts) for parts in zip(*(_kept(each, size, outputs, draws) for each in depths), strict=True))
    shard = -(-weight_memory(config) // shards)
    calls = {"boi_block": 0, "text_embedding": 0, "shared_tower": len(layer_plans(config, outputs)[0].keys)}
    calls |= {"downsampler": 1 + bool(embedded_block_count(config, outputs))}
    calls |= {"upsampler": 1 + len(outputs & {"condition", "clean_tower"})}
    copied = sum(count * calls.get(part, 1) for part, count in parts.items())
    layer = sum(count for part, count in parts.items() if part.endswith("_tower")) // config.depth
    outside, copied_again = sum(parts.values()) - config.depth * layer, 0
    if config.activation_checkpointing:  # recomputed parts keep no copies
        copied = parts.get("text_head", 0)
        copied_again = layer * (calls["shared_tower"] if "shared_tower" in parts else 1)
    return TrainingMemory(
        weights=shard,
        gradients=shard,
        optimizer=2 * shard,
        ema=shard,
        casts=copied * size if size != _FULL else 0,
        # Of each of the two layers there are the weights, the gradients and the buffer to send.
        gathered=(2 * outside + 2 * 3 * layer) * _FULL if shards > 1 else 0,
        activations=batch * kept,
        recomputed=batch * recomputed + (copied_again * size if size != _FULL else 0),
    )


def device_memory(config: ExperimentConfig, devices: int) -> TrainingMemory:
    """Memory of a training step on each device, if `devices` of them train together."""
    dtype = "bfloat16" if config.trainer.precision == "bf16-mixed" else "float32"
    shards = devices if config.trainer.strategy == "fsdp" else 1
    batch, draws = micro_batches(config, devices)[0], config.diffusion.draws_per_image
    return training_memory(config.model, batch, dtype, wanted_outputs(config.loss), draws, shards)


def sampling_memory(config: ExperimentConfig, guidance: bool) -> int:
    """Memory to sample `evaluation.batch_size` images on a device: weights, cache, and the largest part's work on one block.

    Neither the codec nor feature networks are counted.
    """
    dtype = "bfloat16" if config.trainer.precision == "bf16-mixed" else "float32"
    model, batch, size = config.model, config.evaluation.batch_size, DTYPE_BYTES[dtype]
    halves = downsampler(model), upsampler(model)
    layers = [_layer(model, size, plan) // model.ar_length for plan in layer_plans(model, frozenset())]
    part = max(*layers, *(block.kept_bytes(size) for half in halves for block in half.blocks))
    row = part + max(sum(half.inputs) for half in halves) * size  # the skips wait meanwhile
    needed = weight_memory(model) + cache_memory(model, batch, dtype, guidance) + (2 if guidance else 1) * batch * row
    return int(_RESERVE[0] + (1 + _RESERVE[1]) * needed)


def micro_batches(config: ExperimentConfig, devices: int) -> list[int]:
    """Possible micro-batches of a device, largest first: divisors of its share, up to `data.batch_size_per_device`."""
    share = max(1, config.data.batch_size // devices)
    limit = config.data.batch_size_per_device or share
    return [images for images in range(min(share, limit), 0, -1) if share % images == 0]


def fitting_settings(config: ExperimentConfig, devices: int, capacity: int) -> tuple[str, int] | None:
    """Settings with which training fits, as overrides, and the bytes that they need; None: there are none.

    It takes the largest micro-batch that fits with the given settings, else with activation checkpointing, else with FSDP too.

    Args:
        devices: number of devices.
        capacity: bytes of a device.
    """
    checkpointing = replace(config, model=replace(config.model, activation_checkpointing=True))
    sharded = replace(checkpointing, trainer=replace(checkpointing.trainer, strategy="fsdp"))
    for candidate in (config, checkpointing, sharded):
        for images in micro_batches(config, devices):
            tried = replace(candidate, data=replace(config.data, batch_size_per_device=images))
            if (needed := device_memory(tried, devices).total) <= _TIGHT * capacity:
                changes = {
                    f"data.batch_size_per_device={images}": images != micro_batches(config, devices)[0],
                    "model.activation_checkpointing=true": tried.model != config.model,
                    "trainer.strategy=fsdp": tried.trainer != config.trainer,
                }
                return " ".join(change for change, is_made in changes.items() if is_made), needed
    return None


def check_memory(config: ExperimentConfig, devices: int, capacity: int, card: str) -> str | None:
    """A warning if training may not fit into its devices; None: it fits.

    Args:
        devices: number of devices.
        capacity: bytes of a device.
        card: the device's name, for the message.

    Raises:
        ConfigError: training does not fit, even if compiled parts keep as little as possible.
    """
    memory = device_memory(config, devices)
    if memory.total <= _TIGHT * capacity:
        return None
    compiled, limit = config.model.compile is not False, config.data.batch_size_per_device
    message = (
        f"data.batch_size_per_device = {limit or 'null'}: {micro_batches(config, devices)[0]} images at once "
        f"need {'up to' if compiled else 'about'} {memory.total / GIB:.0f} GiB on each device (an estimate), "
        f"{card} has {capacity / GIB:.0f} GiB: {_describe_remedy(fitting_settings(config, devices, capacity))}"
    )
    if (memory.compiled if compiled else memory.total) > capacity:
        raise ConfigError(message)
    return message


def _describe_remedy(settings: tuple[str, int] | None) -> str:
    if settings is None:
        return "no setting fits; take more or larger devices, or a smaller model"
    return f"set {settings[0]} ({settings[1] / GIB:.0f} GiB)"


def weight_memory(config: ModelConfig, dtype: str = "float32") -> int:
    """Memory of the weights alone, as sampling needs them."""
    return DTYPE_BYTES[dtype] * sum(parameters(config).values())


def cache_memory(config: ModelConfig, batch: int, dtype: str = "bfloat16", guidance: bool = False) -> int:
    """Memory of the key/value cache of `generate`.

    Args:
        batch: number of images.
        dtype: dtype of keys and values, a key of `cost.DTYPE_BYTES`.
        guidance: whether sampling is guided, which doubles the rows.
    """
    local = config.diffusion_depth if config.local_denoising else 0
    blocks = (config.depth - local) * config.ar_length + local
    tokens = config.depth * text_tokens(config) + blocks * config.block_tokens
    rows = 2 * batch if guidance else batch
    return 2 * rows * tokens * config.kv_heads * config.head_width * DTYPE_BYTES[dtype]


def _kept(config: ModelConfig, size: int, outputs: frozenset[str], draws: int) -> tuple[int, int]:
    """Bytes for one image: those kept from the forward, and those of the largest part that is recomputed.

    `size` is the bytes of an element in autocast's dtype.
    """
    plans = layer_plans(config, outputs, draws=draws)
    layers = [_layer(config, size, plan) for plan in plans]
    halves = list(zip((downsampler(config), upsampler(config)), unet_passes(config, outputs, draws), strict=True))
    kept, recomputed = sum(layers) + sum(passes * half.kept_bytes(size) for half, passes in halves), 0
    if config.activation_checkpointing:
        blocks = [(passes, block.kept_bytes(size)) for half, passes in halves for block in half.blocks]
        inputs = sum(plan.tokens(tower) for plan in plans for tower in plan.keys) * config.width * _FULL
        inputs += sum(passes * sum(half.inputs) * size for half, passes in halves)
        kept += inputs - sum(layers) - sum(passes * block for passes, block in blocks)
        # A call of the U-Net has the noisy blocks, or fewer: the clean ones, or those of an auxiliary output.
        recomputed = max(*layers, *(config.ar_length * draws * block for _, block in blocks))
    if config.text and "text_logits" in outputs:
        kept += text_tokens(config) * config.text.vocab_size * (size + _FULL)  # logits and their log-softmax
    return kept, recomputed


def _layer(config: ModelConfig, size: int, plan: LayerPlan) -> int:
    """Bytes that a layer keeps for one image."""
    flex = config.attention_backend != "sdpa" and config.head_width >= MIN_FLEX_HEAD_WIDTH
    query, key = config.num_heads * config.head_width, config.kv_heads * config.head_width
    cast, kept = size != _FULL, 0
    for tower in plan.keys:
        with_queries = tower in plan.queries
        projected, rotated = 2 * key + with_queries * query, key + with_queries * query
        token = config.width * (_FULL + size) + rotated * _FULL * cast  # inputs of all norms, and the first norm's result
        # Attention's arguments. They are copies if joined for FlexAttention. Else keys and values are, if there is text.
        token += projected * size * (1 if cast else 2) if flex else rotated * size
        if not flex and (not cast or tower == "text" or not plan.text_tokens):
            token += projected * size
        if with_queries:
            token += config.width * (_FULL + size) + 4 * config.ffn_width * size
            token += (1 if tower == "text" and not flex else 2) * query * size + config.num_heads * _FULL
        kept += plan.tokens(tower) * token
    return kept + (0 if flex else 2 * key * size * _copied_tokens(plan))


def _copied_tokens(plan: LayerPlan) -> int:
    """Number of tokens whose keys and values are copied for scaled_dot_product_attention, to join those of several towers."""
    text = plan.text_tokens if "text" in plan.keys else 0
    if plan.local:
        return plan.draws * plan.noisy_blocks * (text + plan.block_tokens) if text else 0
    copied = text + plan.tokens(plan.context_tower) if text else 0
    if "noise" in plan.queries and plan.context_tower == "clean":
        seen = [text + block * plan.block_tokens for block in range(plan.noisy_blocks)]
        copied += plan.draws * sum(past + plan.block_tokens for past in seen if past)
    return copied
