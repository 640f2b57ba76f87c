"""The hybrid Transformer: the training forward, Eq. 1 to 5 of the paper in order. Sampling is in `generate`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from madformer.config import ModelConfig
from madformer.model.attention import AttentionPattern, Towers, allow_many_shapes, choose_backend, training_context
from madformer.model.embedding import (
    Downsampler,
    Skips,
    TextInterface,
    Upsampler,
    null_text,
    skip_shapes,
    text_positions,
    token_positions,
)
from madformer.model.layer import DecoderLayer, Rope, rope
from madformer.model.layer_plan import TOWERS, LayerPlan, clean_block_count, embedded_block_count, existing_outputs, layer_plans


@dataclass
class Outputs:
    """What a training forward computes; None: not asked for, or not there in this configuration."""

    denoised_BLCYX: Tensor
    """The network's raw output for the noisy blocks, in its prediction type; batch B * k."""
    condition_BLCYX: Tensor | None = None
    """The upsampled condition of each block (Eq. 3), a prediction of its clean latents."""
    clean_tower_BLCYX: Tensor | None = None
    """The upsampled clean tower at block i, a prediction of block i + 1's clean latents."""
    text_logits: Tensor | None = None
    """Logits of the next text token, [B, T, V]."""


class MADFormer(nn.Module):
    """A Transformer that generates an image block by block: layers 1 .. N - D run once per block, the last D iterate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        used = {"text": config.text is not None, "clean": config.use_clean_blocks, "noise": True}
        towers = tuple(tower for tower in TOWERS if used[tower])
        self.boi_SD = nn.Parameter(torch.empty(config.block_tokens, config.width))
        self.downsampler = Downsampler(config)
        self.layers = nn.ModuleList(DecoderLayer(config, towers) for _ in range(config.depth))
        self.upsampler = Upsampler(config)
        self.text = TextInterface(config.text, config.width) if config.text is not None else None
        self.reset_parameters()
        self._compile_layers()

    def reset_parameters(self) -> None:
        """Initialise as released, also after building on the meta device: Xavier-uniform linears with zero biases,
        N(0, 1) for BOI, torch's defaults in the convolutions; text embeddings N(0, 0.02) (Table 7).
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
    ) -> Outputs:
        """Denoise every block of an image at once, each with the clean blocks before it as context.

        Args:
            clean_BLCYX: clean latents, [B, L, C, Y, X].
            noisy_BLCYX: noisy latents, [B * k, L, C, Y, X]; k draws share the clean tower and the AR stage.
            t_BL: the noisy blocks' timesteps, [B * k, L].
            clean_t_BL: timesteps that clean blocks are embedded with, [B, L]; None: as `config.clean_timestep` says.
            text: token ids [B, T]; None: the null text.
            outputs: names of the auxiliary outputs wanted (`plan.AUXILIARY_OUTPUTS`); None: all that exist.

        Raises:
            ValueError: shapes that do not fit the configuration or each other, an unknown output, text for a model without.
        """
        config, draws = self.config, self._check_inputs(clean_BLCYX, noisy_BLCYX, t_BL, clean_t_BL)
        wanted = existing_outputs(config, outputs)
        plans = layer_plans(config, wanted)
        x = self._embed_text(text, len(clean_BLCYX), clean_BLCYX.device)
        ropes = self.ropes(clean_BLCYX.device, x["text"].shape[1] if "text" in x else 0)
        blocks = clean_block_count(config, wanted)
        ropes["clean"] = ropes["clean"].part(0, blocks * config.block_tokens)

        # Eq. 1: h_0 = Embed(z_prev); the noise tower's input is the clean embedding shifted by one block, BOI first.
        if clean_t_BL is None:
            clean_t_BL = self._clean_timesteps(t_BL, draws)
        embedded_BJSD, clean_skips = self._embed_clean(clean_BLCYX, clean_t_BL, embedded_block_count(config, wanted))
        if blocks:
            x["clean"] = _join_blocks(embedded_BJSD)
        if config.use_condition:
            x["noise"] = _join_blocks(self._shift(embedded_BJSD))

        # Eq. 2: the AR stage, h_i = DecoderBlock_i(h_{i-1}).
        for layer, plan in enumerate(plans[: config.ar_depth]):
            x = self._run(layer, x, ropes, plan, blocks, draws=1)

        # Eq. 3: z_cond = h_{N-D}.
        condition_BND = x.pop("noise", None)

        # Eq. 4: the diffusion stage starts from the noisy latents plus the condition.
        noisy_BLSD, noisy_skips = self.embed(noisy_BLCYX, t_BL)
        x["noise"] = _join_blocks(noisy_BLSD)
        if condition_BND is not None:
            x["noise"] = x["noise"] + repeat(condition_BND, "b n d -> (b draws) n d", draws=draws)

        # Eq. 5: the diffusion stage.
        for layer, plan in enumerate(plans[config.ar_depth :], start=config.ar_depth):
            x = self._run(layer, x, ropes, plan, blocks, draws)

        # z = Proj(h_N), and the auxiliary outputs through the same upsampler with the clean blocks' timestep.
        result = Outputs(self.unembed(self._split_blocks(x["noise"]), t_BL, noisy_skips))
        if "condition" in wanted and condition_BND is not None:
            skips = self._shift_skips(clean_skips, len(clean_BLCYX))
            result.condition_BLCYX = self.unembed(self._split_blocks(condition_BND), clean_t_BL, skips)
        if "clean_tower" in wanted:
            result.clean_tower_BLCYX = self.unembed(self._split_blocks(x["clean"]), clean_t_BL, clean_skips)
        if "text_logits" in wanted and self.text is not None:
            result.text_logits = self.text.logits(x["text"])
        return result

    def embed(self, latents_BLCYX: Tensor, t_BL: Tensor) -> tuple[Tensor, Skips]:
        """Blocks at their timesteps to tokens [B, L, S, D], and the skips (batch B * L) for `unembed`."""
        latents_NCYX = latents_BLCYX.flatten(0, 1).to(self.boi_SD.dtype)
        features_NDyx, skips = self.downsampler(latents_NCYX, t_BL.flatten())
        tokens_BLSD = rearrange(features_NDyx, "(b l) d y x -> b l (y x) d", l=latents_BLCYX.shape[1])
        # The residual stream keeps the weights' precision under autocast.
        return tokens_BLSD.to(self.boi_SD.dtype), skips

    def unembed(self, tokens_BLSD: Tensor, t_BL: Tensor, skips: Skips) -> Tensor:
        """Tokens of blocks at their timesteps back to latents [B, L, C, Y, X]."""
        features_NDyx = rearrange(tokens_BLSD, "b l (y x) d -> (b l) d y x", y=self.config.token_rows)
        latents_NCYX = self.upsampler(features_NDyx, t_BL.flatten(), skips)
        return latents_NCYX.unflatten(0, tokens_BLSD.shape[:2]).to(self.boi_SD.dtype)

    def ropes(self, device: torch.device, text_tokens: int) -> dict[str, Rope]:
        """Rotary angles by tower, for all tokens of the image."""
        dtype = torch.promote_types(self.boi_SD.dtype, torch.float32)
        image = rope(token_positions(self.config, device).flatten(0, 1), self.config, dtype)
        return {"text": rope(text_positions(text_tokens, device), self.config, dtype), "clean": image, "noise": image}

    def unused_parameters(self, outputs: Iterable[str] | None = None) -> list[nn.Parameter]:
        """Parameters that get no gradient when these auxiliary outputs are the ones in the loss.

        Such are the clean tower's feed-forward in the last layer without its loss, or the noise tower's AR stage
        without the condition. Freeze them, or DistributedDataParallel waits for their gradients.
        """
        wanted = existing_outputs(self.config, outputs)
        used: set[nn.Parameter] = set()
        for layer, plan in zip(self.layers, layer_plans(self.config, wanted), strict=True):
            for name in plan.keys:
                tower = cast(DecoderLayer, layer).tower(name)
                needed = tower if name in plan.queries else nn.ModuleList([tower.attention_norm, tower.qkv, tower.k_norm])
                used.update(needed.parameters())
        used.update(self.downsampler.parameters(), self.upsampler.parameters())
        if self.config.use_condition:
            used.add(self.boi_SD)
        if self.text is not None:
            used.update(self.text.parameters() if "text_logits" in wanted else self.text.embedding.parameters())
        return [parameter for parameter in self.parameters() if parameter not in used]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles come without compiled code."""
        super().__setstate__(state)
        self._compile_layers()

    def _compile_layers(self) -> None:
        if self.config.compile:
            allow_many_shapes()
            for layer in self.layers:
                layer.compile()

    # ---- the pieces of the forward

    def _check_inputs(self, clean_BLCYX: Tensor, noisy_BLCYX: Tensor, t_BL: Tensor, clean_t_BL: Tensor | None) -> int:
        """The number of draws per image, k."""
        c = self.config
        expected = (c.ar_length, c.latent_channels, c.block_size, c.block_size)
        for name, tensor in (("clean_BLCYX", clean_BLCYX), ("noisy_BLCYX", noisy_BLCYX)):
            if tuple(tensor.shape[1:]) != expected:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}: the configuration needs [batch, {', '.join(map(str, expected))}]"
                )
        draws, rest = divmod(len(noisy_BLCYX), len(clean_BLCYX))
        if rest or not draws:
            raise ValueError(
                f"noisy_BLCYX has batch {len(noisy_BLCYX)}: must be a multiple of the clean batch, {len(clean_BLCYX)}"
            )
        if t_BL.shape != noisy_BLCYX.shape[:2]:
            raise ValueError(f"t_BL has shape {tuple(t_BL.shape)}: must be {tuple(noisy_BLCYX.shape[:2])}, as noisy_BLCYX")
        if clean_t_BL is not None and clean_t_BL.shape != clean_BLCYX.shape[:2]:
            raise ValueError(
                f"clean_t_BL has shape {tuple(clean_t_BL.shape)}: must be {tuple(clean_BLCYX.shape[:2])}, as clean_BLCYX"
            )
        return draws

    def _clean_timesteps(self, t_BL: Tensor, draws: int) -> Tensor:
        if self.config.clean_timestep == "zero":
            return torch.zeros_like(t_BL[::draws])
        if draws > 1:
            reason = "with model.clean_timestep = 'released' clean blocks take the noisy one's timestep"
            raise ValueError(f"{draws} draws per image: {reason}; give clean_t_BL")
        return t_BL

    def _embed_text(self, text: Tensor | None, batch: int, device: torch.device) -> Towers:
        if self.text is None:
            if text is not None:
                raise ValueError("text given to a model without text: set model.text")
            return {}
        if text is None:
            text = null_text(self.text.config, batch, device)
        if text.ndim != 2 or len(text) != batch or not text.shape[1]:
            raise ValueError(f"text has shape {tuple(text.shape)}: must be [{batch}, tokens], one row for each image")
        return {"text": self.text.embedding(text.to(device))}

    def _embed_clean(self, clean_BLCYX: Tensor, clean_t_BL: Tensor, blocks: int) -> tuple[Tensor, Skips]:
        """Embed the first `blocks` clean blocks."""
        if not blocks:
            return self.boi_SD.new_empty(len(clean_BLCYX), 0, *self.boi_SD.shape), ()
        return self.embed(clean_BLCYX[:, :blocks], clean_t_BL[:, :blocks])

    def _shift(self, embedded_BJSD: Tensor) -> Tensor:
        """[B, L, S, D]: at block i the embedding of block i - 1, the BOI block at 0."""
        boi_B1SD = self.boi_SD.expand(len(embedded_BJSD), 1, -1, -1)
        return torch.cat([boi_B1SD, embedded_BJSD[:, : self.config.ar_length - 1]], dim=1)

    def _shift_skips(self, skips: Skips, batch: int) -> Skips:
        """Skips of the block that the position was embedded from, zeros for BOI: the target's own would leak it."""
        if not skips:
            return self._zero_skips(batch)
        kept = self.config.ar_length - 1
        by_block = (skip.unflatten(0, (batch, -1)) for skip in skips)
        return tuple(torch.cat([torch.zeros_like(skip[:, :1]), skip[:, :kept]], dim=1).flatten(0, 1) for skip in by_block)

    def _zero_skips(self, batch: int) -> Skips:
        shapes = skip_shapes(self.config.unet, self.config.block_size)
        return tuple(self.boi_SD.new_zeros(batch, channels, rows, rows) for channels, rows in shapes)

    def _run(self, layer: int, x: Towers, ropes: dict[str, Rope], plan: LayerPlan, blocks: int, draws: int) -> Towers:
        config = self.config
        pattern = AttentionPattern(
            plan.queries,
            plan.keys,
            text_tokens=len(ropes["text"].cos_NK),
            clean_blocks=blocks,
            noisy_blocks=config.ar_length,
            block_tokens=config.block_tokens,
            draws=draws,
            local=config.local_denoising and layer >= config.ar_depth,
        )
        if not plan.keys:
            return {}
        inputs = {tower: x[tower] for tower in plan.keys}
        backend = choose_backend(config, self.boi_SD.device, self.boi_SD.dtype)
        context = training_context(pattern, backend, self.boi_SD.device)
        if config.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.layers[layer], inputs, ropes, context, use_reentrant=False, preserve_rng_state=False)
        return self.layers[layer](inputs, ropes, context)

    def _split_blocks(self, x_BND: Tensor) -> Tensor:
        return rearrange(x_BND, "b (l s) d -> b l s d", s=self.config.block_tokens)


def _join_blocks(x_BLSD: Tensor) -> Tensor:
    return rearrange(x_BLSD, "b l s d -> b (l s) d")
