"""Samplers by name: diffusers' schedulers, set up for latents and for any number of steps.

All of them go from full noise (t = T - 1) to clean latents in 1 .. T steps. Each step evaluates the network once, and no
prediction is clipped. The timesteps are those of `spaced_timesteps`, and each step goes to the next of them. diffusers' own
spacings are not used. Some round floats, so that for some numbers of steps (61, 103, ... of 1000) they add a timestep of -1 or
repeat one. Some start below t = T - 1. Some step to t - T // n, which drifts away from the spacing.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from madformer.config import DiffusionConfig
from madformer.config.evaluation import SamplerName, canonical_spacing, listed_timesteps
from madformer.config.validation import require
from madformer.diffusion.noise_schedule import PredictionType
from madformer.errors import InputError

__all__ = ["Sampler", "SpacedDDIM", "SpacedDDPM", "SpacedDPMSolver", "SpacedUniPC", "build_sampler", "spaced_timesteps"]


class SpacedDDIM(DDIMScheduler):  # type: ignore[misc]
    """Deterministic DDIM (eta = 0), whose steps go from each listed timestep to the next."""

    spacing = "uniform"

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps.

        Raises:
            InputError: fewer than one step, or more than the schedule has.
        """
        timesteps = spaced_timesteps(self.spacing, num_inference_steps, self.alphas_cumprod)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(timesteps, device=device)
        self._next = dict(zip(timesteps, [*timesteps[1:], -1], strict=True))

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, **_: Any) -> DDIMSchedulerOutput:
        """From a noisy sample to the one at the next timestep, by Eq. 12 of DDIM with eta = 0.

        Args:
            model_output: the network's prediction, of the scheduler's prediction type.
            timestep: one of `timesteps`.
            sample: the noisy sample at `timestep`.
        """
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


class SpacedDDPM(DDPMScheduler):  # type: ignore[misc]
    """Ancestral sampling: the posterior of the next timestep, given the predicted clean latents (Eq. 7 of DDPM)."""

    spacing = "uniform"

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps, as `SpacedDDIM.set_timesteps`."""
        timesteps = spaced_timesteps(self.spacing, num_inference_steps, self.alphas_cumprod)
        super().set_timesteps(timesteps=timesteps, device=device)


class SpacedDPMSolver(DPMSolverMultistepScheduler):  # type: ignore[misc]
    """DPM-Solver++(2M), which is of second order through the prediction of the step before."""

    spacing = "uniform"

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps, as `SpacedDDIM.set_timesteps`, and forget the predictions."""
        timesteps = spaced_timesteps(self.spacing, num_inference_steps, self.alphas_cumprod)
        super().set_timesteps(timesteps=timesteps, device=device)


class SpacedUniPC(UniPCMultistepScheduler):  # type: ignore[misc]
    """UniPC-2, a predictor of second order. The prediction of the next step corrects it, at no cost."""

    spacing = "uniform"

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps, as `SpacedDDIM.set_timesteps`, and forget the predictions."""
        timesteps = spaced_timesteps(self.spacing, num_inference_steps, self.alphas_cumprod)
        super().set_timesteps(num_inference_steps, device=device)
        # UniPC accepts no timesteps: replace those that it chose, and their noise levels.
        self.timesteps = torch.tensor(timesteps, device=device)
        alphas = self.alphas_cumprod[timesteps]
        self.sigmas = torch.cat([((1 - alphas) / alphas).sqrt(), alphas.new_zeros(1)])

    def multistep_uni_p_bh_update(self, model_output: Tensor, *, sample: Tensor, order: int) -> Tensor:
        """The predictor: from the sample at this step's noise level to the next.

        Args:
            model_output: not used; `model_outputs` has it.
            sample: the noisy sample.
            order: 1 or 2.
        """
        return self._update(sample, self.step_index, order)

    def multistep_uni_c_bh_update(
        self, this_model_output: Tensor, *, last_sample: Tensor, this_sample: Tensor, order: int
    ) -> Tensor:
        """The corrector: repeats the previous step, now that there is a prediction at its end.

        Args:
            this_model_output: the prediction at the end of that step.
            last_sample: the noisy sample at its start.
            this_sample: not used.
            order: 1 or 2.
        """
        return self._update(last_sample, self.step_index - 1, order, this_model_output)

    def _update(self, sample: Tensor, index: int, order: int, end: Tensor | None = None) -> Tensor:
        """From step `index` to the next by diffusers' `bh2`. Coefficients are computed on the CPU: a GPU would wait for them.

        Args:
            end: the prediction at the next step, for the corrector.
        """
        alpha_K, sigma_K = self._sigma_to_alpha_sigma_t(self.sigmas[[index + 1, index, index - 1][: order + 1]])
        logsnr_K = alpha_K.log() - sigma_K.log()
        h, start = logsnr_K[0] - logsnr_K[1], self.model_outputs[-1]
        growth, weights, change = torch.expm1(-h), torch.tensor([0.5]), torch.zeros(())
        if order == 2:
            ratio = (logsnr_K[2] - logsnr_K[1]) / h
            if end is not None:
                first = growth / -h - 1
                second = first / -h - 0.5
                one = torch.ones(())
                matrix = torch.stack([one, one, ratio, one]).view(2, 2)
                weights = torch.linalg.solve(matrix, torch.stack([first / growth, second * 2 / growth]))
            change = weights[0] * ((self.model_outputs[-2] - start) / ratio)
        if end is not None:
            change = change + weights[-1] * (end - start)
        moved = sigma_K[0] / sigma_K[1] * sample - alpha_K[0] * growth * start
        return (moved - alpha_K[0] * growth * change).to(sample.dtype)


Sampler = SpacedDDIM | SpacedDDPM | SpacedDPMSolver | SpacedUniPC


def build_sampler(
    config: DiffusionConfig, prediction_type: PredictionType, name: SamplerName = "ddim", spacing: str = "uniform"
) -> Sampler:
    """The sampler of that name for models trained with this noise schedule and prediction type.

    Args:
        config: the noise schedule.
        spacing: as in `evaluation.spacing`.

    Raises:
        InputError: an unknown name or spacing.
    """
    require(name in get_args(SamplerName), "sampler", name, f"must be one of {', '.join(get_args(SamplerName))}")
    schedule: dict[str, Any] = {
        "num_train_timesteps": config.train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "linear",
        "prediction_type": prediction_type,
    }
    sampler: Sampler
    if name == "ddim":
        sampler = SpacedDDIM(**schedule, clip_sample=False)  # latents have no bounds
    elif name == "ddpm":
        sampler = SpacedDDPM(**schedule, clip_sample=False)
    elif name == "dpmsolver++":
        sampler = SpacedDPMSolver(**schedule, algorithm_type="dpmsolver++", solver_order=2)
    else:
        sampler = SpacedUniPC(**schedule, solver_order=2)
    sampler.spacing = canonical_spacing(spacing)
    return sampler


def spaced_timesteps(spacing: str, steps: int, alphas_cumprod: Tensor) -> list[int]:
    """The timesteps of a sampler, noisiest first: `steps` falling integers from T - 1 on.

    - `uniform`: T (n - i) // n - 1 for step i of n.
    - `power:P`: floor(T (1 - i / n)^P) - 1. P = 2 is DDIM's quadratic spacing (Song et al. 2021, appendix D.2).
    - `logsnr`: equal steps of log(alpha / sigma), as in DPM-Solver (Lu et al. 2022, section 3.3), down to t = 0.
    - `karras:RHO`: equal steps of (sigma / alpha)^(1 / RHO), as in EDM (Karras et al. 2022, Eq. 5), down to t = 0.
    - `list:...`: as listed.

    `logsnr` and `karras` take the timestep nearest to each level. A timestep that is taken already moves to the next lower one.

    Args:
        spacing: one of the above.
        alphas_cumprod: products of alphas, of all T timesteps.

    Raises:
        InputError: fewer than one step, more than the schedule has, or not as many as are listed.
    """
    end, kind, argument = len(alphas_cumprod), *spacing.partition(":")[::2]
    if not 1 <= steps <= end:
        raise InputError(f"steps = {steps}: must be in 1..{end}, the noise schedule has no more timesteps")
    if kind == "list":
        listed = list(listed_timesteps(spacing))
        if len(listed) != steps or listed[0] != end - 1:
            raise InputError(f"spacing = {spacing!r}: must list {steps} timesteps, one for each step, from {end - 1} on")
        return listed
    if kind == "uniform":
        return [end * (steps - index) // steps - 1 for index in range(steps)]
    if kind == "power":
        powers = (((steps - index) / steps) ** float(argument) for index in range(steps))
        wanted = [math.floor(end * power + 1e-9) - 1 for power in powers]
    else:
        noise_T = ((1 - alphas_cumprod.double()) / alphas_cumprod.double()).sqrt()  # sigma / alpha, rises with t
        level_T = noise_T.log() if kind == "logsnr" else noise_T ** (1 / float(argument))
        levels = torch.linspace(float(level_T[-1]), float(level_T[0]), steps, dtype=torch.float64)
        wanted = (level_T[None] - levels[:, None]).abs().argmin(dim=1).tolist()
    timesteps: list[int] = []
    for index, timestep in enumerate(wanted):
        timesteps.append(max(min([timestep, *(earlier - 1 for earlier in timesteps[-1:])]), steps - 1 - index))
    return timesteps
