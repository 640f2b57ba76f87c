"""The noise schedule (DDPM's, from diffusers) and the three prediction types: training targets and conversion to samples.

With a = alphas_cumprod[t], a noisy block is sqrt(a) * clean + sqrt(1 - a) * noise (section 2.2 of the paper).
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from madformer.config import DiffusionConfig

PredictionType = Literal["sample", "epsilon", "v_prediction"]


class NoiseSchedule:
    """Noise levels of the timesteps. It is not an `nn.Module`: its table must stay out of bfloat16 and off the meta device."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        with torch.device("cpu"):
            scheduler = DDPMScheduler(
                config.train_timesteps, beta_start=config.beta_start, beta_end=config.beta_end, beta_schedule="linear"
            )
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod
        """The product of alphas up to every timestep, [T] float32, on the CPU."""
        self._by_device: dict[torch.device, Tensor] = {}

    def draw(self, clean_BLCYX: Tensor, draws: int = 1, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw noise [B * draws, L, C, Y, X] and timesteps [B * draws, L], for every block its own.

        Args:
            clean_BLCYX: clean latents, for their shape, dtype and device.
            draws: noise draws per image (k).
            generator: draws on its own device, so that the draw is the same for latents on any; None: torch's default.
        """
        device = generator.device if generator else clean_BLCYX.device
        batch, blocks, *block_shape = clean_BLCYX.shape
        t_BL = torch.randint(self.config.train_timesteps, (batch * draws, blocks), generator=generator, device=device)
        noise_BLCYX = torch.randn(
            batch * draws, blocks, *block_shape, generator=generator, device=device, dtype=clean_BLCYX.dtype
        )
        return noise_BLCYX.to(clean_BLCYX.device), t_BL.to(clean_BLCYX.device)

    def add_noise(self, clean_BLCYX: Tensor, noise_BLCYX: Tensor, t_BL: Tensor) -> Tensor:
        """The noisy blocks sqrt(a) * clean + sqrt(1 - a) * noise.

        Args:
            clean_BLCYX: clean latents.
            noise_BLCYX: standard normal noise.
            t_BL: timestep of each block.
        """
        signal, spread = self._scales(t_BL, clean_BLCYX)
        return signal * clean_BLCYX + spread * noise_BLCYX

    def target(self, prediction_type: PredictionType, clean_BLCYX: Tensor, noise_BLCYX: Tensor, t_BL: Tensor) -> Tensor:
        """The network's target: clean latents, noise, or the velocity sqrt(a) * noise - sqrt(1 - a) * clean.

        Args:
            prediction_type: `sample`, `epsilon` and `v_prediction`, in this order.
            clean_BLCYX: clean latents.
            noise_BLCYX: the noise that was added.
            t_BL: timestep of each block.
        """
        if prediction_type == "sample":
            return clean_BLCYX
        if prediction_type == "epsilon":
            return noise_BLCYX
        signal, spread = self._scales(t_BL, clean_BLCYX)
        return signal * noise_BLCYX - spread * clean_BLCYX

    def to_sample(self, prediction_type: PredictionType, prediction_BLCYX: Tensor, noisy_BLCYX: Tensor, t_BL: Tensor) -> Tensor:
        """The clean latents that a prediction stands for; the inverse of `target`.

        Args:
            prediction_type: as for `target`.
            prediction_BLCYX: the network's output.
            noisy_BLCYX: the network's input.
            t_BL: timestep of each block.
        """
        signal, spread = self._scales(t_BL, noisy_BLCYX)
        if prediction_type == "sample":
            return prediction_BLCYX
        if prediction_type == "epsilon":
            return (noisy_BLCYX - spread * prediction_BLCYX) / signal
        return signal * noisy_BLCYX - spread * prediction_BLCYX

    def _scales(self, t_BL: Tensor, like_BLCYX: Tensor) -> tuple[Tensor, Tensor]:
        device = like_BLCYX.device
        if device not in self._by_device:
            with torch.inference_mode(False):
                self._by_device[device] = self.alphas_cumprod.to(device)
        alpha_BL111 = self._by_device[device][t_BL][..., None, None, None]
        return alpha_BL111.sqrt().to(like_BLCYX.dtype), (1 - alpha_BL111).sqrt().to(like_BLCYX.dtype)
