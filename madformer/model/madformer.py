"""The hybrid Transformer. `MADFormer.forward` is Eq. 1 to 5 of the paper in order; sampling is `generation.generate`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from madformer.config import ModelConfig
from madformer.model.attention import Towers, TrainingContext, choose_backend, configure_dynamo, training_context
from madformer.model.embedding import (
    Downsampler,
    Skips,
    TextInterface,
    Upsampler,
    conv_layout,
    null_text,
    skip_shapes,
    text_positions,
    token_positions,
)
from madformer.model.layer import DecoderLayer, Rope, Tower, rope
from madformer.model.layer_plan import TOWERS, embedded_block_count, existing_outputs, layer_plans

AUXILIARY_TIMESTEP = -1000
"""The upsampler's timestep for auxiliary outputs. Its embedding must be far from those of noisy blocks, t = 0 .. 999. At t = 0
the upsampler would learn to predict a block from the condition and no longer to denoise it."""


@dataclass
class Outputs:
    """The outputs of a training forward. None: not requested, or not in this configuration."""

    denoised_BLCYX: Tensor
    """The network's raw output for the noisy blocks, in its prediction type; batch B * k."""
    condition_BLCYX: Tensor | None = None
    """The upsampled condition of each block (Eq. 3), a prediction of its clean latents."""
    clean_tower_BLCYX: Tensor | None = None
    """The clean tower's upsampled output at block i, a prediction of block i + 1's clean latents."""
    text_logits: Tensor | None = None
    """Logits of the next text token, [B, T, V]."""


class MADFormer(nn.Module):
    """A Transformer that generates an image block by block: layers 1 .. N - D run once per block, the last D iterate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        exists = {"text": config.text is not None, "clean": config.use_clean_blocks, "noise": True}
        towers = tuple(tower for tower in TOWERS if exists[tower])
        self.boi_SD = nn.Parameter(torch.empty(config.block_tokens, config.width))
        self.downsampler = Downsampler(config)
        self.layers = nn.ModuleList(DecoderLayer(config, towers) for _ in range(config.depth))
        self.upsampler = Upsampler(config)
        self.text = TextInterface(config.text, config.width) if config.text is not None else None
        self.prepared = False  # for sampling
        self._rope_tables: dict[tuple[torch.device, torch.dtype, int], tuple[Rope, Rope]] = {}
        self.reset_parameters()
        self._compile_parts()

    def reset_parameters(self) -> None:
        """Initialise all weights, as the released code does. Call it after building on the meta device.

        Linear layers are Xavier-uniform with zero biases, BOI is N(0, 1), text embeddings are N(0, 0.02) (Table 7), and
        convolutions have torch's defaults.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        nn.init.normal_(self.boi_SD)

    def forward(
        self,
        clean_BLCYX: Tensor,
        noisy_BLCYX: Tensor,
        t_BL: Tensor,
        clean_t_BL: Tensor | None = None,
        text: Tensor | None = None,
        outputs: Iterable[str] | None = None,
        diffusion_depth: int | None = None,
    ) -> Outputs:
        """Denoise every block of an image at once, each with the clean blocks before it as context.

        Args:
            clean_BLCYX: clean latents, [B, L, C, Y, X].
            noisy_BLCYX: noisy latents, [B * k, L, C, Y, X]; k draws share the clean tower and the AR stage.
            t_BL: the noisy blocks' timesteps, [B * k, L].
            clean_t_BL: timesteps that clean blocks are embedded with, [B, L]; None: as `config.clean_timestep` says. If that is
                `released`, auxiliary outputs have these timesteps too, else `AUXILIARY_TIMESTEP`.
            text: token ids [B, T]; None: the null text.
            outputs: names of the auxiliary outputs to compute (`layer_plan.AUXILIARY_OUTPUTS`); None: all that exist.
            diffusion_depth: layers of the diffusion stage (D); None: `config.diffusion_depth`.

        Raises:
            ValueError: shapes that do not fit the configuration or each other, an unknown output, or text for a model without
                text.
        """
        run = _prepare(self, clean_BLCYX, noisy_BLCYX, t_BL, clean_t_BL, text, outputs, diffusion_depth)
        x: Towers = {}  # residual streams by tower, [B, P, D]

        # Eq. 1: h_0 = Embed(z_prev) + PosEnc. The noise tower's input at block i is clean block i - 1, the BOI block at 0;
        # rotations of queries and keys (`run.ropes`) are the position encoding.
        if self.text is not None:
            x["text"] = self.text.embedding(run.text_BT)  # [B, T, D]
        embedded_BPD, clean_skips = self._embed_clean(clean_BLCYX, run)  # [B, J * S, D]
        if run.clean_blocks:
            x["clean"] = embedded_BPD
        if self.config.use_condition:
            x["noise"] = self._shift(embedded_BPD)  # [B, L * S, D]

        # Eq. 2: h_i = DecoderBlock_i(h_{i-1}), i = 1 .. N - D: the AR stage.
        for layer, context in run.ar_stage:
            x = layer(x, run.ropes, context)

        # Eq. 3: z_cond = h_{N-D}.
        condition_BPD = x.pop("noise", None)  # [B, L * S, D]

        # Eq. 4: h_{N-D} = the noisy latents, embedded, + z_cond. The k draws of an image share its condition.
        x["noise"], noisy_skips = self.embed(noisy_BLCYX, t_BL)  # [B * k, L * S, D]
        if condition_BPD is not None:
            x["noise"] = x["noise"] + repeat(condition_BPD, "b p d -> (b k) p d", k=run.draws)

        # Eq. 5: h_{N-D+j} = DecoderBlock_{N-D+j}(h_{N-D+j-1}), j = 1 .. D: the diffusion stage.
        for layer, context in run.diffusion_stage:
            x = layer(x, run.ropes, context)

        # z = Proj(h_N); the auxiliary outputs go through the same upsampler, at a timestep of their own.
        result = Outputs(self.unembed(x["noise"], t_BL, noisy_skips))  # [B * k, L, C, Y, X]
        if "condition" in run.outputs and condition_BPD is not None:
            skips = self._shift_skips(clean_skips, len(clean_BLCYX))
            result.condition_BLCYX = self.unembed(condition_BPD, run.auxiliary_t_BL, skips)  # [B, L, C, Y, X]
        if "clean_tower" in run.outputs:
            result.clean_tower_BLCYX = self.unembed(x["clean"], run.auxiliary_t_BL, clean_skips)  # [B, L, C, Y, X]
        if "text_logits" in run.outputs and self.text is not None:
            result.text_logits = self.text.logits(x["text"])  # [B, T, V]
        return result

    def embed(self, latents_BLCYX: Tensor, t_BL: Tensor) -> tuple[Tensor, Skips]:
        """Map blocks at their timesteps to tokens [B, L * S, D], and return the skips (batch B * L) for `unembed`."""
        latents_UCYX = latents_BLCYX.flatten(0, 1).to(self.stream_dtype)
        features_UDyx, skips = self.downsampler(latents_UCYX, t_BL.flatten())
        tokens_BPD = rearrange(features_UDyx, "(b l) d y x -> b (l y x) d", l=latents_BLCYX.shape[1])
        return tokens_BPD.to(self.stream_dtype), skips

    def unembed(self, tokens_BPD: Tensor, t_BL: Tensor, skips: Skips) -> Tensor:
        """Map tokens [B, L * S, D] of blocks at their timesteps back to latents [B, L, C, Y, X].

        Args:
            t_BL: the timesteps, which may differ from those of `embed`.
            skips: of the same blocks, batch B * L.
        """
        blocks, rows = t_BL.shape[1], self.config.token_rows
        features_UDyx = rearrange(tokens_BPD, "b (l y x) d -> (b l) d y x", l=blocks, y=rows)
        latents_UCYX = self.upsampler(features_UDyx, t_BL.flatten(), skips)
        return latents_UCYX.unflatten(0, t_BL.shape).to(self.stream_dtype)

    def ropes(self, device: torch.device, text_tokens: int, clean_blocks: int | None = None) -> dict[str, Rope]:
        """Rotary angles by tower, for all tokens of the prompt and the image.

        Args:
            text_tokens: tokens of the prompt (T).
            clean_blocks: number of clean blocks, from the first one; None: all.
        """
        key = (device, self.stream_dtype, text_tokens)
        if key not in self._rope_tables:
            # Training must be able to use these tables even if validation, under inference mode, makes them.
            with torch.inference_mode(False):
                text_PA = text_positions(text_tokens, device, self.config.rope)
                positions = (text_PA, token_positions(self.config, device).flatten(0, 1))
                text, image = (rope(positions_PA, self.config, self.stream_dtype) for positions_PA in positions)
            self._rope_tables[key] = text, image
        text, image = self._rope_tables[key]
        clean = image if clean_blocks is None else image.part(0, clean_blocks * self.config.block_tokens)
        return {"text": text, "clean": clean, "noise": image}

    @property
    def stream_dtype(self) -> torch.dtype:
        """The dtype of residual stream and latents: float32 or wider, even with bfloat16 weights or under autocast."""
        return torch.promote_types(self.boi_SD.dtype, torch.float32)

    def _embed_clean(self, clean_BLCYX: Tensor, run: _Run) -> tuple[Tensor, Skips]:
        """Embed the clean blocks whose embedding is read: [B, J * S, D], and their skips."""
        blocks = run.embedded_blocks
        if not blocks:
            return self.boi_SD.new_empty(len(clean_BLCYX), 0, self.config.width), ()
        return self.embed(clean_BLCYX[:, :blocks], run.clean_t_BL[:, :blocks])

    def _shift(self, embedded_BPD: Tensor) -> Tensor:
        """[B, L * S, D]: at block i the embedding of block i - 1, at block 0 the BOI block."""
        previous_BPD = embedded_BPD[:, : (self.config.ar_length - 1) * self.config.block_tokens]
        return torch.cat([self.boi_SD.expand(len(embedded_BPD), -1, -1), previous_BPD], dim=1)

    def _shift_skips(self, skips: Skips, batch: int) -> Skips:
        """At each block the skips of the previous block, zeros at block 0. A block's own skips would leak the target."""
        if not skips:
            shapes = skip_shapes(self.config.unet, self.config.block_size)
            return tuple(self.boi_SD.new_zeros(batch, channels, rows, rows) for channels, rows in shapes)
        previous = self.config.ar_length - 1
        by_block = (skip.unflatten(0, (batch, -1)) for skip in skips)
        shifted = (torch.cat([torch.zeros_like(skip[:, :1]), skip[:, :previous]], dim=1).flatten(0, 1) for skip in by_block)
        return tuple(conv_layout(skip) for skip in shifted)

    def prepare_for_sampling(self, dtype: torch.dtype | None = None) -> None:
        """Join and cast weights once, so that sampling need not at every call. The model can no longer be trained.

        No output changes. The weights of each layer's query and key norms are joined; with `dtype`, so are those of its gate
        and up projections.

        Args:
            dtype: autocast's dtype. Linear layers and convolutions are cast to it, so sample under autocast. Norms, BOI and the
                embeddings of timesteps and text keep their precision. None: nothing is cast.
        """
        self.prepared = True
        self.requires_grad_(False)
        exempt = {module for part in (self.downsampler, self.upsampler) for module in part.time_embedding.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module not in exempt:
                for name, parameter in list(module.named_parameters()):
                    value = parameter.to(dtype)
                    value = conv_layout(value) if value.ndim == 4 else value
                    setattr(module, name, nn.Parameter(value, requires_grad=False))
        for module in self.modules():
            if isinstance(module, Tower):
                module.join_weights(gate_and_up=dtype is not None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Compile again: copies and pickles come without compiled code."""
        super().__setstate__(state)
        self._compile_parts()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Compile again after `to`, `cuda` and `to_empty`: whether to compile depends on the device."""
        super()._apply(fn, recurse)
        self._compile_parts()
        return self

    def _compile_parts(self) -> None:
        """Compile each layer and each half of the U-Net; with activation checkpointing, each block of the halves."""
        if self.config.compile is True or (self.config.compile == "auto" and self.boi_SD.device.type == "cuda"):
            configure_dynamo()
            halves = (self.downsampler, self.upsampler)
            blocks = (*self.downsampler.down_blocks, *self.upsampler.up_blocks)
            for layer in self.layers:
                layer.compile()
            # Every input size is compiled separately, since code for variable sizes is slower.
            for part in blocks if self.config.activation_checkpointing else halves:
                part.compile(dynamic=False)


# ---- before Eq. 1: checks, defaults and the plan


Layer = Callable[[Towers, dict[str, Rope], TrainingContext], Towers]
"""`DecoderLayer.forward`, under activation checkpointing if that is on."""


@dataclass(frozen=True)
class _Run:
    """Checked arguments of a forward other than the latents, with defaults filled in, and its layers."""

    outputs: frozenset[str]
    """The auxiliary outputs to compute."""
    draws: int
    """Noise draws per image (k)."""
    clean_t_BL: Tensor
    auxiliary_t_BL: Tensor
    """The upsampler's timesteps for the auxiliary outputs."""
    text_BT: Tensor | None
    clean_blocks: int
    """Clean blocks in the sequence."""
    embedded_blocks: int
    """Clean blocks whose embedding is read (J)."""
    ropes: dict[str, Rope]
    ar_stage: list[tuple[Layer, TrainingContext]]
    diffusion_stage: list[tuple[Layer, TrainingContext]]


def _prepare(
    model: MADFormer,
    clean_BLCYX: Tensor,
    noisy_BLCYX: Tensor,
    t_BL: Tensor,
    clean_t_BL: Tensor | None,
    text: Tensor | None,
    outputs: Iterable[str] | None,
    diffusion_depth: int | None,
) -> _Run:
    if model.prepared and torch.is_grad_enabled():
        raise RuntimeError("the model is prepared for sampling (prepare_for_sampling): to train it, build it anew")
    config, device = model.config.at_depth(diffusion_depth), clean_BLCYX.device
    draws = _check_latents(config, clean_BLCYX, noisy_BLCYX, t_BL, clean_t_BL)
    text_BT = _prompts(config, text, len(clean_BLCYX), device)
    text_tokens = 0 if text_BT is None else text_BT.shape[1]
    outputs = existing_outputs(config, outputs)
    clean_t_BL = _clean_timesteps(config, t_BL, draws) if clean_t_BL is None else clean_t_BL
    released = config.clean_timestep == "released"
    plans = layer_plans(config, outputs, text_tokens, draws)
    backend = choose_backend(config, model.boi_SD.device, model.boi_SD.dtype)
    checkpointing = config.activation_checkpointing and torch.is_grad_enabled()
    stages: tuple[list[tuple[Layer, TrainingContext]], ...] = ([], [])
    for number, (module, plan) in enumerate(zip(model.layers, plans, strict=True)):
        if plan.keys:
            layer = functools.partial(checkpoint, module, use_reentrant=False, preserve_rng_state=False)
            context = training_context(plan, backend, model.boi_SD.device)
            stages[number >= config.ar_depth].append((layer if checkpointing else module, context))
    return _Run(
        outputs=outputs,
        draws=draws,
        clean_t_BL=clean_t_BL,
        auxiliary_t_BL=clean_t_BL if released else torch.full_like(clean_t_BL, AUXILIARY_TIMESTEP),
        text_BT=text_BT,
        clean_blocks=plans[0].clean_blocks,
        embedded_blocks=embedded_block_count(config, outputs),
        ropes=model.ropes(device, text_tokens, plans[0].clean_blocks),
        ar_stage=stages[0],
        diffusion_stage=stages[1],
    )


def _check_latents(
    config: ModelConfig, clean_BLCYX: Tensor, noisy_BLCYX: Tensor, t_BL: Tensor, clean_t_BL: Tensor | None
) -> int:
    """Check the shapes, and return the number of draws per image (k)."""
    expected = (config.ar_length, config.latent_channels, config.block_size, config.block_size)
    for name, tensor in (("clean_BLCYX", clean_BLCYX), ("noisy_BLCYX", noisy_BLCYX)):
        if tuple(tensor.shape[1:]) != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: the configuration needs [batch, {', '.join(map(str, expected))}]"
            )
    draws, rest = divmod(len(noisy_BLCYX), len(clean_BLCYX))
    if rest or not draws:
        raise ValueError(f"noisy_BLCYX has batch {len(noisy_BLCYX)}: must be a multiple of the clean batch, {len(clean_BLCYX)}")
    if t_BL.shape != noisy_BLCYX.shape[:2]:
        raise ValueError(f"t_BL has shape {tuple(t_BL.shape)}: must be {tuple(noisy_BLCYX.shape[:2])}, as noisy_BLCYX")
    if clean_t_BL is not None and clean_t_BL.shape != clean_BLCYX.shape[:2]:
        raise ValueError(
            f"clean_t_BL has shape {tuple(clean_t_BL.shape)}: must be {tuple(clean_BLCYX.shape[:2])}, as clean_BLCYX"
        )
    return draws


def _clean_timesteps(config: ModelConfig, t_BL: Tensor, draws: int) -> Tensor:
    if config.clean_timestep == "zero":
        return torch.zeros_like(t_BL[::draws])
    if draws > 1:
        reason = "with model.clean_timestep = 'released' clean blocks take the noisy one's timestep"
        raise ValueError(f"{draws} draws per image: {reason}; give clean_t_BL")
    return t_BL


def _prompts(config: ModelConfig, text: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    if config.text is None:
        if text is not None:
            raise ValueError("text given to a model without text: set model.text")
        return None
    if text is None:
        return null_text(config.text, batch, device)
    if text.ndim != 2 or len(text) != batch or not text.shape[1]:
        raise ValueError(f"text has shape {tuple(text.shape)}: must be [{batch}, tokens], one row for each image")
    return text.to(device)
