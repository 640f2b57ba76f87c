"""`madformer sample`: images of a run as files."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from madformer.checkpoints import load_model
from madformer.evaluation.request import SamplingRequest
from madformer.evaluation.sampling import sample, sampling_device
from madformer.files import replacing
from madformer.images import save_png, to_grid, to_pixels


def write_samples(request: SamplingRequest, folder: Path) -> None:
    """Write the latents of all samples and, where latents are pixels (one or three channels), a PNG of each and a grid.

    Sample i depends on (seed, i) alone: more samples leave the first ones as they are.
    """
    config = request.config
    model = load_model(request.checkpoint, config, request.weights).to(sampling_device(config))
    latents_BChw = sample(model, config, request.steps, range(request.num)).cpu()
    with replacing(folder / "latents.safetensors") as temporary:
        temporary.write_bytes(save({"latents": latents_BChw.contiguous()}))
    what = f"{request.num} samples of {request.checkpoint}, {request.steps} steps, seed {config.evaluation.seed}"
    if latents_BChw.shape[1] not in (1, 3):
        print(f"{folder}/latents.safetensors: {what}; no codec turns {latents_BChw.shape[1]} channels into images")
        return
    for index, pixels_YX3 in enumerate(to_pixels(latents_BChw)):
        save_png(pixels_YX3, folder / f"{index:06d}.png")
    save_png(to_grid(latents_BChw), folder / "grid.png")
    print(f"{folder}/grid.png: {what}")
