"""Samplers by name: diffusers' schedulers, set up for latents and for any number of steps.

All of them go from full noise (t = T - 1) to clean latents in 1 .. T steps, with one evaluation of the network in each, and
none clips. Their timesteps are the same integers, T * (n - i) // n - 1 for step i of n, and each step goes to the next of
them: diffusers' own spacings round floats, which adds a timestep of -1 for some numbers of steps (61, 103, ... of 1000) or
repeats one, start below t = T - 1, or step to t - T // n, which drifts away from the spacing.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from madformer.config import DiffusionConfig
from madformer.config.evaluation import SamplerName
from madformer.config.validation import require
from madformer.diffusion.noise_schedule import PredictionType
from madformer.errors import InputError

__all__ = ["Sampler", "TrailingDDIM", "TrailingDDPM", "TrailingDPMSolver", "TrailingUniPC", "build_sampler"]


class TrailingDDIM(DDIMScheduler):  # type: ignore[misc]
    """Deterministic DDIM."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps.

        Raises:
            InputError: fewer than one step, or more than the schedule has.
        """
        timesteps = _trailing(num_inference_steps, self.config.num_train_timesteps)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(timesteps, device=device)
        self._next = dict(zip(timesteps, [*timesteps[1:], -1], strict=True))

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, **_: Any) -> DDIMSchedulerOutput:
        """From a noisy sample at `timestep` to the one at the next timestep, by Eq. 12 of DDIM with eta = 0."""
        next_timestep = self._next[int(timestep)]
        alpha = self.alphas_cumprod[int(timestep)]
        alpha_next = self.alphas_cumprod[next_timestep] if next_timestep >= 0 else self.alphas_cumprod.new_ones(())
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        if self.config.prediction_type == "sample":
            clean, noise = model_output, (sample - signal * model_output) / spread
        elif self.config.prediction_type == "epsilon":
            clean, noise = (sample - spread * model_output) / signal, model_output
        else:
            clean, noise = signal * sample - spread * model_output, signal * model_output + spread * sample
        return DDIMSchedulerOutput(alpha_next.sqrt() * clean + (1 - alpha_next).sqrt() * noise, clean)


class TrailingDDPM(DDPMScheduler):  # type: ignore[misc]
    """Ancestral sampling: the posterior of the next timestep, given the predicted clean latents (Eq. 7 of DDPM)."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps, as `TrailingDDIM.set_timesteps`."""
        timesteps = _trailing(num_inference_steps, self.config.num_train_timesteps)
        super().set_timesteps(timesteps=timesteps, device=device)


class TrailingDPMSolver(DPMSolverMultistepScheduler):  # type: ignore[misc]
    """DPM-Solver++(2M): second order by the prediction of the step before."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps, as `TrailingDDIM.set_timesteps`, and forget the predictions."""
        timesteps = _trailing(num_inference_steps, self.config.num_train_timesteps)
        super().set_timesteps(timesteps=timesteps, device=device)


class TrailingUniPC(UniPCMultistepScheduler):  # type: ignore[misc]
    """UniPC-2: a predictor of second order, corrected by the prediction that the next step makes anyway."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps, as `TrailingDDIM.set_timesteps`, and forget the predictions."""
        timesteps = _trailing(num_inference_steps, self.config.num_train_timesteps)
        super().set_timesteps(num_inference_steps, device=device)
        # It takes no timesteps, so those that it chose make way, with the noise levels that belong to them.
        self.timesteps = torch.tensor(timesteps, device=device)
        alphas = self.alphas_cumprod[timesteps]
        self.sigmas = torch.cat([((1 - alphas) / alphas).sqrt(), alphas.new_zeros(1)])


Sampler = TrailingDDIM | TrailingDDPM | TrailingDPMSolver | TrailingUniPC


def build_sampler(config: DiffusionConfig, prediction_type: PredictionType, name: SamplerName = "ddim") -> Sampler:
    """The sampler of that name for models trained with this noise schedule and prediction type.

    Raises:
        InputError: a name that no sampler has.
    """
    require(name in get_args(SamplerName), "sampler", name, f"must be one of {', '.join(get_args(SamplerName))}")
    schedule: dict[str, Any] = {
        "num_train_timesteps": config.train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "linear",
        "prediction_type": prediction_type,
    }
    if name == "ddim":
        return TrailingDDIM(**schedule, clip_sample=False)  # latents have no bounds
    if name == "ddpm":
        return TrailingDDPM(**schedule, clip_sample=False)
    if name == "dpmsolver++":
        return TrailingDPMSolver(**schedule, algorithm_type="dpmsolver++", solver_order=2)
    return TrailingUniPC(**schedule, solver_order=2)


def _trailing(steps: int, end: int) -> list[int]:
    """Timesteps of `steps` steps through a schedule of `end`, the noisiest first."""
    if not 1 <= steps <= end:
        raise InputError(f"steps = {steps}: must be in 1..{end}, the noise schedule has no more timesteps")
    return [end * (steps - index) // steps - 1 for index in range(steps)]
