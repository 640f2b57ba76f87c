"""The training loss, Eq. 6: a weighted sum of four terms, each computed only when its weight is not zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import reduce, repeat
from torch import Tensor
from torch.nn import functional as F

from madformer.config import LossConfig, check_losses, wanted_outputs
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.model.embedding import null_text
from madformer.model.madformer import MADFormer, Outputs


@dataclass
class Losses:
    """The total loss and its terms."""

    total: Tensor
    """The weighted sum, to call `backward` on."""
    terms: dict[str, Tensor]
    """Unweighted terms by name: image, hidden, clean_tower, text; those of weight zero are absent."""
    image_BL: Tensor
    """The image term of every noisy block, [B * k, L]: for logs by timestep and by block, and custom weights."""
    outputs: Outputs | None = None
    """The model's outputs, for custom terms."""

    def for_log(self) -> Losses:
        """A copy for logs, which keeps neither gradients nor outputs in memory."""
        terms = {name: term.detach() for name, term in self.terms.items()}
        return Losses(self.total.detach(), terms, self.image_BL.detach())


def compute_losses(
    model: MADFormer,
    schedule: NoiseSchedule,
    weights: LossConfig,
    clean_BLCYX: Tensor,
    noise_BLCYX: Tensor,
    t_BL: Tensor,
    text: Tensor | None = None,
    diffusion_depth: int | None = None,
) -> Losses:
    """One training forward and its losses.

    The image term compares with the target of the model's prediction type. The hidden and the clean-tower term always compare
    with clean latents. All are means over elements.

    Args:
        clean_BLCYX: clean latents, [B, L, C, Y, X].
        noise_BLCYX: noise draws, [B * k, L, C, Y, X]; image b's at b * k .. b * k + k - 1 (`NoiseSchedule.draw`).
        t_BL: the draws' timesteps, [B * k, L].
        text: token ids [B, T], prompts already dropped (`embedding.drop_text`); None: the null text.
        diffusion_depth: the depth of this step of an elastic run; None: the configuration's.

    Raises:
        ConfigError: a loss on an output that the model does not have.
        ValueError: shapes that do not fit the model's configuration or each other.
    """
    check_losses(model.config, weights)
    draws, rest = divmod(len(noise_BLCYX), len(clean_BLCYX))
    if rest or not draws or noise_BLCYX.shape[1:] != clean_BLCYX.shape[1:]:
        expected = f"must be a multiple of {len(clean_BLCYX)} images of {tuple(clean_BLCYX.shape[1:])}"
        raise ValueError(f"noise_BLCYX has shape {tuple(noise_BLCYX.shape)}: {expected}, as clean_BLCYX")
    if text is None and model.config.text is not None:
        text = null_text(model.config.text, len(clean_BLCYX), clean_BLCYX.device)
    target_BLCYX = repeat(clean_BLCYX, "b ... -> (b k) ...", k=draws)
    noisy_BLCYX = schedule.add_noise(target_BLCYX, noise_BLCYX, t_BL)
    outputs = wanted_outputs(weights)
    out = model(clean_BLCYX, noisy_BLCYX, t_BL, text=text, outputs=outputs, diffusion_depth=diffusion_depth)

    target_BLCYX = schedule.target(model.config.prediction_type, target_BLCYX, noise_BLCYX, t_BL)
    image_BL = reduce(F.mse_loss(out.denoised_BLCYX, target_BLCYX, reduction="none"), "b l c y x -> b l", "mean")
    terms = {"image": image_BL.mean()}
    if out.condition_BLCYX is not None:
        terms["hidden"] = F.mse_loss(out.condition_BLCYX, clean_BLCYX)
    if out.clean_tower_BLCYX is not None:
        terms["clean_tower"] = F.mse_loss(out.clean_tower_BLCYX[:, :-1], clean_BLCYX[:, 1:])
    if out.text_logits is not None and text is not None and model.config.text is not None:
        terms["text"] = next_token_loss(out.text_logits, text.to(out.text_logits.device), model.config.text.pad_token_id)
    total = sum((getattr(weights, f"lambda_{name}") * term for name, term in terms.items()), start=image_BL.new_zeros(()))
    return Losses(total, terms, image_BL, out)


def next_token_loss(logits_BTV: Tensor, text_BT: Tensor, pad_token_id: int) -> Tensor:
    """Mean cross-entropy of each token given those before it, over the targets that are not padding; 0 if there are none.

    Args:
        logits_BTV: at token i the logits of token i + 1.
        text_BT: token ids.
        pad_token_id: id of padding.
    """
    targets_BT = text_BT[:, 1:].long()
    logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), targets_BT.flatten(), ignore_index=pad_token_id, reduction="sum")
    return loss / (targets_BT != pad_token_id).sum().clamp(min=1)
