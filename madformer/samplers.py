"""Samplers by name: diffusers' schedulers, set up for latents and for few steps."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from madformer.config import DiffusionConfig
from madformer.diffusion import PredictionType

__all__ = ["TrailingDDIM", "build_sampler"]


class TrailingDDIM(DDIMScheduler):  # type: ignore[misc]
    """Deterministic DDIM from full noise (t = T - 1) to clean latents in any number of steps, 1 .. T, without clipping.

    diffusers' `trailing` spacing rounds floats, which adds a timestep of -1 for some numbers of steps (61, 103, ...), and its
    step goes to t - T // steps, which drifts away from the spacing. Here timesteps are integers, T * (steps - i) // steps - 1,
    and each step goes to the next one of them.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps.

        Raises:
            ValueError: fewer than one step, or more than the schedule has.
        """
        end = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= end:
            raise ValueError(f"steps = {num_inference_steps}: DDIM takes 1..{end} of them, as many as the noise schedule has")
        self.num_inference_steps = num_inference_steps
        spaced = [end * (num_inference_steps - index) // num_inference_steps - 1 for index in range(num_inference_steps)]
        self.timesteps = torch.tensor(spaced, device=device)
        self._next = dict(zip(spaced, [*spaced[1:], -1], strict=True))

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, **_: Any) -> DDIMSchedulerOutput:
        """From a noisy sample at `timestep` to the one at the next timestep, by Eq. 12 of DDIM with eta = 0."""
        following = self._next[int(timestep)]
        alpha = self.alphas_cumprod[int(timestep)]
        alpha_next = self.alphas_cumprod[following] if following >= 0 else self.alphas_cumprod.new_ones(())
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        if self.config.prediction_type == "sample":
            clean, noise = model_output, (sample - signal * model_output) / spread
        elif self.config.prediction_type == "epsilon":
            clean, noise = (sample - spread * model_output) / signal, model_output
        else:
            clean, noise = signal * sample - spread * model_output, signal * model_output + spread * sample
        return DDIMSchedulerOutput(alpha_next.sqrt() * clean + (1 - alpha_next).sqrt() * noise, clean)


def build_sampler(config: DiffusionConfig, prediction_type: PredictionType) -> TrailingDDIM:
    """The sampler for models trained with this noise schedule and prediction type."""
    return TrailingDDIM(
        config.train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="linear",
        prediction_type=prediction_type,
        clip_sample=False,  # latents have no bounds
    )
