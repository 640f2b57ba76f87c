"""Compare our numbers with those of the authors' code, for both of its branches: `python -m benchmarks.parity`.

The files hold what that code computed for one tiny model of each branch, on the CPU in float64 (tests/data/README.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from madformer.model.generation import generate
from madformer.model.official import from_released

FILES = Path(__file__).parents[1] / "tests" / "data"

BRANCHES = {"main": "released_code_tiny.safetensors", "imagenet": "released_imagenet_tiny.safetensors"}
"""Branch of the authors' repository -> file."""

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "all_diffusion": {"diffusion_depth": 3},
    "mostly_ar": {"diffusion_depth": 1},
    "no_condition": {"use_condition": False},
    "no_clean_blocks": {"use_clean_blocks": False},
    "local_denoising": {"local_denoising": True},
    "local_denoising_no_clean_blocks": {"local_denoising": True, "use_clean_blocks": False},
}
"""Name of a variant in the files -> its switches; all share one state dict."""

SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim5": lambda: DDIMScheduler(clip_sample=False),
    "dpm5": lambda: DPMSolverMultistepScheduler.from_config(DDIMScheduler().config),
}


class Comparison(NamedTuple):
    """One tensor of a file, and ours."""

    branch: str
    variant: str
    tensor: str
    difference: float
    """Largest absolute difference, divided by the largest absolute value."""


def reference(branch: str) -> dict[str, Tensor]:
    """All tensors of a branch's file."""
    return load_file(FILES / BRANCHES[branch])


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a file, by released name."""
    return {name.removeprefix("weights/"): tensor for name, tensor in tensors.items() if name.startswith("weights/")}


def as_blocks(x: Tensor) -> Tensor:
    """Latents as the files have them, [B, L, positions, C], as blocks [B, L, C, 8, 8]."""
    return rearrange(x, "b l (y x) c -> b l c y x", y=8)


@torch.no_grad()
def compare(branch: str, variant: str) -> Iterator[Comparison]:
    """Every tensor that a file has of a variant."""
    tensors = reference(branch)
    model = from_released(weights(tensors), **{"diffusion_depth": 2, "ar_length": 4, **VARIANTS[variant]})
    clean, noisy, noise = (as_blocks(tensors[f"input/{name}"]) for name in ("clean", "noisy", "initial_noise"))
    text = tensors.get("input/text")
    forward = model(clean, noisy, tensors["input/timesteps"], text=text)
    ours = {
        "forward/denoised": forward.denoised_BLCYX,
        "forward/clean_tower": forward.clean_tower_BLCYX,
        "forward/text_logits": forward.text_logits,
    }
    for name, scheduler in SCHEDULERS.items():
        sampled = generate(model, scheduler(), steps=5, text=text, initial_noise_BLCYX=noise)
        ours[f"sample/{name}"] = rearrange(sampled, "b l c y x -> b l (y x) c")
    for name in sorted(key.removeprefix(f"{variant}/") for key in tensors if key.startswith(f"{variant}/")):
        theirs, our = tensors[f"{variant}/{name}"], ours[name]
        assert our is not None and our.shape == theirs.shape, f"{variant}/{name}"
        yield Comparison(branch, variant, name, float((our - theirs).abs().max() / theirs.abs().max()))


def main() -> None:
    """Print the table of docs/explanation/reproducing.md."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    columns = ("forward/denoised", "forward/clean_tower", "forward/text_logits", "sample/ddim5", "sample/dpm5")
    print(f"| branch | variant | {' | '.join(f'`{name}`' for name in columns)} |\n|{' --- |' * 2}{' ---: |' * len(columns)}")
    for branch in BRANCHES:
        for variant in VARIANTS:
            found = {row.tensor: f"{row.difference:.1e}" for row in compare(branch, variant)}
            print(f"| `{branch}` | `{variant}` | {' | '.join(found.get(name, '-') for name in columns)} |")


if __name__ == "__main__":
    main()
