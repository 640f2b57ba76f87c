"""Parameters, NFE and FLOPs of a model, and the memory of its U-Net, from the configuration alone. Needs no torch.

FLOPs are the multiplications and additions of matrix products, convolutions and attention, as torch's flop counter counts
them. Norms, activations and rotations are left out. All FLOPs are for one image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from statistics import fmean

from madformer.config import ModelConfig, UNetConfig
from madformer.errors import ConfigError
from madformer.model.layer_plan import LayerPlan, embedded_block_count, existing_outputs, layer_plans, text_tokens

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element by the dtype that matrix products run in."""


# ---- parameters


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameter counts by part: the U-Net halves, BOI block, each tower's (or the shared) layers, text embedding and head."""
    towers = ["shared"]
    if config.parameter_sets == "separate":
        towers = ["text"] * (config.text is not None) + ["clean"] * config.use_clean_blocks + ["noise"]
    parts = {"downsampler": downsampler(config).parameters, "upsampler": upsampler(config).parameters}
    parts["boi_block"] = config.block_tokens * config.width
    parts |= {f"{tower}_tower": config.depth * _tower_parameters(config) for tower in towers}
    if config.text is not None:
        parts["text_embedding"] = config.text.vocab_size * config.width
        parts["text_head"] = (config.text.vocab_size + config.text.final_norm) * config.width
    return parts


def _tower_parameters(config: ModelConfig) -> int:
    projected = (config.num_heads + 2 * config.kv_heads) * config.head_width
    norms = 2 * config.width + 2 * config.head_width
    return norms + (config.width + 1) * projected + (config.width + 1) * config.width + 3 * config.width * config.ffn_width


# ---- NFE


def nfe(config: ModelConfig, steps: int) -> int:
    """Layer evaluations per block, (N - D) + D * steps."""
    return config.ar_depth + config.diffusion_depth * steps


def steps_for_nfe(config: ModelConfig, budget: int) -> int:
    """The most denoising steps that a budget of layer evaluations per block allows.

    Raises:
        ConfigError: the budget is too small for one step; the message says the smallest legal one.
    """
    steps = (budget - config.ar_depth) // config.diffusion_depth
    if steps < 1:
        shape = f"model.depth = {config.depth} and model.diffusion_depth = {config.diffusion_depth}"
        raise ConfigError(f"nfe = {budget}: too small for one denoising step; with {shape} the smallest is {config.depth}")
    return steps


# ---- FLOPs


@dataclass(frozen=True)
class SamplingFlops:
    """FLOPs of sampling one image, all its blocks together."""

    text: int
    """The text tower, once."""
    ar_pass: int
    """The AR stage and the clean tower, once per block."""
    ar_unet: int
    """Embedding each finished block as context for the next."""
    step_layers: int
    """One denoising step of every block in the D diffusion layers."""
    step_unet: int
    """One denoising step of every block in the U-Net, both ways. NFE leaves it out."""

    @property
    def step(self) -> int:
        """One denoising step of every block, U-Net included."""
        return self.step_layers + self.step_unet

    def total(self, steps: int) -> int:
        """FLOPs of one image with `steps` denoising steps per block."""
        return self.text + self.ar_pass + self.ar_unet + steps * self.step


def sampling_flops(config: ModelConfig, guidance: bool = False) -> SamplingFlops:
    """FLOPs of `generate` for one image.

    Args:
        guidance: whether every step is guided. Guidance doubles the work of the Transformer and the upsampler.
    """
    plans, rows = layer_plans(config, frozenset()), 2 if guidance else 1
    text, size = text_tokens(config), config.block_tokens
    down, up = downsampler(config).flops, upsampler(config).flops
    ar_pass = step_layers = 0
    for block in range(config.ar_length):
        past = text + block * size
        for layer, plan in enumerate(plans):
            if block and "clean" in plan.keys:
                ar_pass += _layer_flops(config, size, past, "clean" in plan.queries)
            noise = _layer_flops(config, size, (text if plan.local else past) + size)
            if layer >= config.ar_depth:
                step_layers += noise
            elif config.use_condition:
                ar_pass += noise
    return SamplingFlops(
        text=rows * sum(_layer_flops(config, text, text, "text" in plan.queries) for plan in plans if "text" in plan.keys),
        ar_pass=rows * ar_pass,
        ar_unet=embedded_block_count(config, frozenset()) * down,
        step_layers=rows * step_layers,
        step_unet=config.ar_length * (down + rows * up),
    )


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of training on one image."""

    ar_stage: int
    """Forward: the first N - D layers, image towers."""
    diffusion_stage: int
    """Forward: the last D layers, image towers, all noise draws."""
    unet: int
    """Forward: both U-Net halves, for clean and noisy blocks and the auxiliary outputs."""
    text: int
    """Forward: text tower and head."""
    backward: int
    recomputation: int
    """Layers and U-Net blocks that activation checkpointing computes again in the backward pass."""

    @property
    def forward(self) -> int:
        """The whole forward pass: Transformer, U-Net and text."""
        return self.ar_stage + self.diffusion_stage + self.unet + self.text

    @property
    def model_flops(self) -> int:
        """Forward and backward pass without recomputation. The MFU is computed from these."""
        return self.forward + self.backward

    @property
    def total(self) -> int:
        """Forward and backward pass with recomputation."""
        return self.model_flops + self.recomputation


def training_flops(config: ModelConfig, outputs: Iterable[str] | None = None, draws: int = 1) -> TrainingFlops:
    """FLOPs of a training forward and backward pass for one image; for an elastic run, their mean over its depths.

    Args:
        outputs: auxiliary outputs in the loss (`config.wanted_outputs`); None: all that exist.
        draws: noise draws per image.
    """
    if config.elastic_depths:
        by_depth = [training_flops(config.at_depth(depth), outputs, draws) for depth in config.elastic_depths]
        return TrainingFlops(*(round(fmean(parts)) for parts in zip(*map(astuple, by_depth), strict=True)))
    outputs, text = existing_outputs(config, outputs), text_tokens(config)
    image, prompt, not_recomputed = [0, 0], 0, 0
    for layer, plan in enumerate(layer_plans(config, outputs, draws=draws)):
        for tower in plan.keys:
            if tower == "text":
                prompt += _layer_flops(config, text, text, tower in plan.queries)
            else:
                image[layer >= config.ar_depth] += _image_layer_flops(config, plan, tower)
        if plan.queries:
            # Recomputation stops before the last tower's last product, as the backward pass does not read its result.
            not_recomputed += 2 * plan.tokens(plan.queries[-1]) * config.ffn_width * config.width
    head = 2 * text * config.width * config.text.vocab_size if config.text is not None and "text_logits" in outputs else 0
    down, up = unet_passes(config, outputs, draws)
    unet = down * downsampler(config).flops + up * upsampler(config).flops
    # The backward pass of a product is two products. Only the gradient of the latents is not computed.
    backward = 2 * (sum(image) + prompt + head + unet) - down * downsampler(config).first_flops
    again = 0
    if config.activation_checkpointing:
        blocks = ((down, downsampler(config).blocks), (up, upsampler(config).blocks))
        unet_again = sum(passes * (block.flops - block.last_flops) for passes, half in blocks for block in half)
        again = sum(image) + prompt - not_recomputed + unet_again
    return TrainingFlops(image[0], image[1], unet, prompt + head, backward, again)


def unet_passes(config: ModelConfig, outputs: frozenset[str], draws: int) -> tuple[int, int]:
    """Blocks of one image that go through the downsampler and the upsampler in training.

    Args:
        outputs: auxiliary outputs in the loss (`existing_outputs`).
        draws: noise draws per image.
    """
    auxiliary = len(outputs & {"condition", "clean_tower"})
    return embedded_block_count(config, outputs) + config.ar_length * draws, config.ar_length * (draws + auxiliary)


def _layer_flops(config: ModelConfig, tokens: int, keys: int, with_queries: bool = True) -> int:
    """FLOPs of one tower's tokens in a layer, each attending to `keys` keys. Without queries, only keys and values count."""
    kv = 2 * config.width * 2 * config.kv_heads * config.head_width
    if not with_queries:
        return tokens * kv
    projections = 4 * config.width**2 + kv
    return tokens * (projections + 6 * config.width * config.ffn_width + 4 * config.width * keys)


def _image_layer_flops(config: ModelConfig, plan: LayerPlan, tower: str) -> int:
    """FLOPs of all blocks and draws of an image tower in one layer, in training."""
    size = plan.block_tokens
    blocks, draws = (plan.clean_blocks, 1) if tower == "clean" else (plan.noisy_blocks, plan.draws)
    keys_by_block = (plan.text_tokens + size * (1 if plan.local else block + 1) for block in range(blocks))
    return draws * sum(_layer_flops(config, size, keys, tower in plan.queries) for keys in keys_by_block)


# ---- the U-Net halves


@dataclass
class CostCounter:
    """Adds up the cost of U-Net modules for one block of the image."""

    flops: int = 0
    parameters: int = 0
    kept: int = 0
    """Elements kept for the backward pass in the dtype that products run in."""
    kept_float32: int = 0
    """Elements kept in float32 even under autocast: it runs group norms, and all up to the next product, in float32."""
    first_flops: int = 0
    """FLOPs of the first product, which reads the input."""
    last_flops: int = 0
    """FLOPs of the last product. Recomputation stops before it, as the backward pass does not read its result."""

    def add(self, other: CostCounter) -> None:
        """Add the FLOPs, parameters and kept elements of another counter."""
        self.flops += other.flops
        self.parameters += other.parameters
        self.kept += other.kept
        self.kept_float32 += other.kept_float32

    def kept_bytes(self, size: int) -> int:
        """Bytes kept for the backward pass; `size` is the bytes of an element in the products' dtype."""
        return self.kept * size + self.kept_float32 * DTYPE_BYTES["float32"]

    def linear(self, inputs: int, outputs: int, rows: int = 1, bias: bool = True) -> None:
        """Count a linear layer.

        Args:
            inputs: width of an input vector.
            outputs: width of an output vector.
            rows: number of vectors.
        """
        self.kept += rows * inputs
        self._product(2 * rows * inputs * outputs, (inputs + bias) * outputs)

    def conv(self, inputs: int, outputs: int, rows: int, kernel: int = 3, stride: int = 1) -> None:
        """Count a convolution with `rows` x `rows` outputs.

        Args:
            inputs: input channels.
            outputs: output channels.
            rows: rows, and columns, of the output.
            kernel: rows, and columns, of the kernel.
        """
        self.kept += (rows * stride) ** 2 * inputs
        self._product(2 * rows**2 * kernel**2 * inputs * outputs, (kernel**2 * inputs + 1) * outputs)

    def norm(self, channels: int, rows: int) -> None:
        """Count a group norm over `rows` x `rows` positions."""
        self.parameters += 2 * channels
        self.kept_float32 += rows**2 * channels

    def time_embedding(self, config: ModelConfig) -> None:
        """Count the two layers that embed the timestep."""
        dim = config.unet.time_embed_dim
        self.linear(dim if config.timestep_embedding == "sinusoidal" else 1, dim, bias=False)
        self.linear(dim, dim, bias=False)

    def resnet(self, inputs: int, outputs: int, rows: int, time_dim: int) -> None:
        """Count a ResNet layer over `rows` x `rows` positions.

        Args:
            inputs: input channels.
            outputs: output channels.
            rows: rows, and columns, of the features.
            time_dim: width of the timestep embedding.
        """
        for channels in (inputs, outputs):
            self.norm(channels, rows)
            self.kept_float32 += rows**2 * channels  # SiLU's input
            self.conv(channels, outputs, rows)
        self.linear(time_dim, outputs)
        if inputs != outputs:
            self.conv(inputs, outputs, rows, kernel=1)

    def attention(self, channels: int, rows: int) -> None:
        """Count a self-attention layer over `rows` x `rows` positions."""
        self.norm(channels, rows)
        for _ in range(3):
            self.linear(channels, channels, rows=rows**2)
        self.kept += (3 - 2) * rows**2 * channels  # plus queries, keys, values; minus two: the three inputs are one tensor
        self.flops += 4 * rows**4 * channels
        self.linear(channels, channels, rows=rows**2)

    def _product(self, flops: int, parameters: int) -> None:
        self.flops += flops
        self.parameters += parameters
        self.first_flops, self.last_flops = self.first_flops or flops, flops


@dataclass
class HalfCost(CostCounter):
    """The cost of one half of the U-Net, for one block of the image."""

    blocks: list[CostCounter] = field(default_factory=list)
    """Its down or up blocks, which activation checkpointing recomputes one by one."""
    inputs: list[int] = field(default_factory=list)
    """Input elements of each of these blocks, skips included."""

    def add_block(self, block: CostCounter, inputs: int) -> None:
        """Count a down or up block with so many input elements."""
        self.add(block)
        self.blocks.append(block)
        self.inputs.append(inputs)


def downsampler(config: ModelConfig) -> HalfCost:
    """The downsampler's cost for one block."""
    unet, rows, half = config.unet, config.block_size, HalfCost()
    half.conv(config.latent_channels, unet.channels[0], rows)
    half.time_embedding(config)
    for level, channels in enumerate(unet.channels):
        block, first = CostCounter(), unet.channels[max(level - 1, 0)]
        entering = rows**2 * first
        for layer in range(unet.layers[level]):
            block.resnet(channels if layer else first, channels, rows, unet.time_embed_dim)
            if unet.attention[level]:
                block.attention(channels, rows)
        if level < len(unet.channels) - 1:
            rows //= 2
            block.conv(channels, channels, rows, stride=2)
        half.add_block(block, entering)
    half.conv(unet.channels[-1], config.width, rows)
    return half


def upsampler(config: ModelConfig) -> HalfCost:
    """The upsampler's cost for one block."""
    unet, rows, half = config.unet, config.token_rows, HalfCost()
    half.conv(config.width, unet.channels[-1], rows)
    half.time_embedding(config)
    for level in reversed(range(len(unet.channels))):
        block, channels, inputs = CostCounter(), unet.channels[level], _upsampler_inputs(unet, level)
        entering = rows**2 * (sum(inputs) - (len(inputs) - 1) * channels)
        for layer_inputs in inputs:
            block.resnet(layer_inputs, channels, rows, unet.time_embed_dim)
            if unet.attention[level]:
                block.attention(channels, rows)
        if level:
            rows *= 2
            block.conv(channels, channels, rows)
        half.add_block(block, entering)
    half.conv(unet.channels[0], config.latent_channels, rows)
    return half


def _upsampler_inputs(unet: UNetConfig, level: int) -> list[int]:
    """Input channels of the ResNets of an upsampler level: those of the features and of a skip."""
    channels = unet.channels[level]
    hidden = [unet.channels[min(level + 1, len(unet.channels) - 1)]] + [channels] * unet.layers[level]
    skips = [channels] * unet.layers[level] + [unet.channels[max(level - 1, 0)]]
    return [a + b for a, b in zip(hidden, skips, strict=True)]
