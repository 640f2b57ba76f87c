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
    """Noise levels of the timesteps. No module: a table of noise levels must not follow a model into bfloat16 or onto meta."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        with torch.device("cpu"):
            scheduler = DDPMScheduler(
                config.train_timesteps, beta_start=config.beta_start, beta_end=config.beta_end, beta_schedule="linear"
            )
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod
        """The noise level of every timestep, float32, on the CPU."""
        self._by_device: dict[torch.device, Tensor] = {}

    def draw(self, clean_BLCYX: Tensor, draws: int = 1, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Noise [B * draws, L, C, Y, X] and timesteps [B * draws, L]: every block draws its own.

        Made on the generator's device (the latents' without one), so that the draw is the same on any.
        """
        device = generator.device if generator else clean_BLCYX.device
        batch, blocks, *block_shape = clean_BLCYX.shape
        t_BL = torch.randint(self.config.train_timesteps, (batch * draws, blocks), generator=generator, device=device)
        noise_BLCYX = torch.randn(
            batch * draws, blocks, *block_shape, generator=generator, device=device, dtype=clean_BLCYX.dtype
        )
        return noise_BLCYX.to(clean_BLCYX.device), t_BL.to(clean_BLCYX.device)

    def add_noise(self, clean_BLCYX: Tensor, noise_BLCYX: Tensor, t_BL: Tensor) -> Tensor:
        """The noisy blocks at their timesteps."""
        signal, spread = self._scales(t_BL, clean_BLCYX)
        return signal * clean_BLCYX + spread * noise_BLCYX

    def target(self, prediction_type: PredictionType, clean_BLCYX: Tensor, noise_BLCYX: Tensor, t_BL: Tensor) -> Tensor:
        """What the network should predict: clean latents, noise, or the velocity sqrt(a) * noise - sqrt(1 - a) * clean."""
        if prediction_type == "sample":
            return clean_BLCYX
        if prediction_type == "epsilon":
            return noise_BLCYX
        signal, spread = self._scales(t_BL, clean_BLCYX)
        return signal * noise_BLCYX - spread * clean_BLCYX

    def to_sample(self, prediction_type: PredictionType, prediction_BLCYX: Tensor, noisy_BLCYX: Tensor, t_BL: Tensor) -> Tensor:
        """The clean latents that a prediction stands for; the inverse of `target`."""
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
