"""`madformer sample`: write samples of a run as PNG files that record how they were made."""

from __future__ import annotations

import hashlib
import logging
import os
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from madformer import __version__
from madformer.config import load_run
from madformer.config.identity import run_hash
from madformer.data.codec import build_codec, read_settings, require_fit, save_png, to_pixels, to_tiles
from madformer.errors import InputError, NonFiniteError
from madformer.evaluation.measurement import AXES, DEFAULTS, Sampling
from madformer.evaluation.request import SamplingRequest
from madformer.evaluation.sampling import choose_prompts, inference_devices, load_for_sampling, sample_batches, tokenize
from madformer.model import cost
from madformer.parallel import Share, cluster_rank, share_out
from madformer.progress import ProgressDisplay
from madformer.runs.checkpoints import checkpoint_path, checkpoint_step, load_model, weights_sha256
from madformer.runs.files import claim_folder, remove_stale

IN_GRID = 64
"""Most images of the grid; it has the first ones."""

_log = logging.getLogger(__name__)


def write_samples(request: SamplingRequest, folder: Path) -> None:
    """Write a PNG of each sample and a grid of the first ones, and show the grid in TensorBoard. Existing files stay.

    Sample i depends only on (seed, i) and its prompt, so more samples do not change the first ones.

    Raises:
        ConfigError: a codec or tokenizer is not available, or does not fit the model.
        InputError: the folder holds samples made with other settings, or the run cannot have the prompt.
        NonFiniteError: the run has diverged.
    """
    config, rank = request.config, cluster_rank()
    devices = inference_devices(config, request.devices)
    prompts = choose_prompts(
        config, request.checkpoint, request.classes, request.prompt, range(request.num), request.sampling.guidance
    )
    sampling, settings = request.sampling, _settings(request)
    images = [{**settings, "index": index, **prompt.settings} for index, prompt in enumerate(prompts)]
    tokenize(config, [prompt.text for prompt in prompts], sampling.guidance)  # to find mistakes early
    with claim_folder(folder, "sample", rank or 0):
        missing = frozenset(image["index"] for image in images if not _is_written(folder, image))
        if rank is None:
            remove_stale(folder, "*.png")
        before = request.num - len(missing)
        if missing:
            with ProgressDisplay("sampled", "images", request.num, before, silent=bool(rank)) as display:
                share_out(sample_share, (request, folder, images, missing), devices, display, before)
        if rank is not None and not all(_is_written(folder, image) for image in images):
            print(f"{folder}: this process has done its share; the last one makes the grid", flush=True)
            return
        _show(request, folder, images[:IN_GRID])
    what = f"{request.num} samples of {request.checkpoint}, {sampling.steps} steps, seed {sampling.seed}"
    print(f"{folder}/grid.png: {what}" + ("" if missing else " (there already)"))


def sample_share(
    share: Share, request: SamplingRequest, folder: Path, images: Sequence[dict[str, Any]], missing: Collection[int]
) -> None:
    """Sample and write this process's share of the missing images: of every `world_size`-th image those that are missing.

    Args:
        images: settings of each image, for its metadata.
        missing: indices of images that were missing at the start, the same in all processes.
    """
    config = request.config
    assigned = [image for image in images[share.rank :: share.world_size] if image["index"] in missing]
    model = load_for_sampling(request.checkpoint, config, request.sampling.weights, share.device)
    codec = build_codec(config.data.codec, config.data.codec_dtype, share.device)
    done, indices = 0, [image["index"] for image in assigned]
    text_BT = tokenize(config, [image["prompt"] for image in assigned], request.sampling.guidance)
    for latents_BChw in sample_batches(model, config, request.sampling, indices, text_BT):
        if not bool(latents_BChw.isfinite().all()):
            raise NonFiniteError(f"{request.checkpoint}: its samples are NaN or infinite, the run has diverged")
        for pixels_YX3, image in zip(to_pixels(codec.decode(latents_BChw)), assigned[done:], strict=False):
            save_png(pixels_YX3, sample_path(folder, image["index"]), {**image, "madformer": __version__})
        done += len(latents_BChw)
        share.count(done)


def sample_path(folder: Path, index: int) -> Path:
    """The path of a sample's PNG file."""
    return folder / f"{index:06d}.png"


def _settings(request: SamplingRequest) -> dict[str, Any]:
    """The settings that all samples share. Only prompts differ."""
    config, sampling = request.config, request.sampling
    codec = build_codec(config.data.codec, config.data.codec_dtype)
    require_fit(codec, config.model)
    return {
        "run": config.name,
        "checkpoint": request.checkpoint.name,
        "weights": sampling.weights,
        "weights_sha256": weights_sha256(load_model(request.checkpoint, config, request.sampling.weights)),
        "config_hash": run_hash(config),
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "nfe": cost.nfe(config.model.at_depth(sampling.diffusion_depth), sampling.steps),
        **{name: getattr(sampling, name) for name in AXES if name != "sampler"},
        "codec": codec.name,
        "codec_sha256": codec.sha256,
    }


def _is_written(folder: Path, image: dict[str, Any]) -> bool:
    """Whether the file exists and is intact.

    Raises:
        InputError: it was made with other settings.
    """
    path = sample_path(folder, image["index"])
    found = read_settings(path)
    if found is None:
        return False
    for name, value in image.items():
        if name != "run" and found.get(name, DEFAULTS.get(name)) != value:  # a run may have been moved
            other = f"{name} = {found.get(name)!r} there, {value!r} asked for"
            raise InputError(f"{path}: made in another way: {other}; name another folder (--out), or delete it")
    return True


def _show(request: SamplingRequest, folder: Path, shown: Sequence[dict[str, Any]]) -> None:
    """Write the grid to a file and to TensorBoard, unless there is a grid that begins with these images."""
    path, prompts = folder / "grid.png", [image["prompt"] for image in shown]
    settings = {name: value for name, value in shown[0].items() if name not in ("index", "prompt", "class")}
    found = read_settings(path) or {}
    same = all(found.get(name) == value for name, value in settings.items() if name != "run")
    if same and found.get("prompts", [])[: len(prompts)] == prompts:
        return
    grid_YX3 = to_tiles(np.stack([_read(sample_path(folder, image["index"])) for image in shown]))
    _draw(request, grid_YX3, list(dict.fromkeys(prompts)))
    save_png(grid_YX3, path, {**settings, "prompts": prompts, "madformer": __version__})


def _draw(request: SamplingRequest, grid_YX3: np.ndarray, prompts: Sequence[str]) -> None:
    """Write an event file for this kind of samples. It replaces the earlier one; training's event files stay as they are."""
    run, step, sampling = request.config.run_dir, checkpoint_step(request.checkpoint), request.sampling
    how = sampling.difference(Sampling(sampling.nfe, sampling.steps, weights=sampling.weights))
    content = textwrap.shorten(request.prompt or request.classes or "", 60, placeholder=" ...")
    words = [f"{sampling.steps} steps", how, f"seed {sampling.seed}", content]
    tag = f"samples/{sampling.weights}, {', '.join(filter(None, words))}"
    kind = hashlib.sha256(f"{step} {tag} {request.prompt} {request.classes}".encode()).hexdigest()[:8]
    former = list(run.glob(f"events.out.tfevents.*.{kind}.samples"))
    if not os.access(run, os.W_OK):
        _log.warning("%s may not be written to: TensorBoard does not show the samples", run)
        return
    with SummaryWriter(str(run), filename_suffix=f".{kind}.samples") as writer:
        writer.add_image(tag, grid_YX3, step, dataformats="HWC")
        if any(prompts):
            writer.add_text(f"{tag} prompts", ", ".join(prompts), step)
    for path in former:
        path.unlink(missing_ok=True)


def compared_samples(run: Path, step: int, sampling: Sampling, count: int) -> np.ndarray:
    """Images [B, Y, X, 3] of a run, kept in RUN/samples/compared and made where they are not there yet.

    Raises:
        InputError: a run without the checkpoint of this step, or files there that were made in another way.
    """
    path = checkpoint_path(run, step)
    if not path.is_file():
        raise InputError(f"--samples: {path} was evaluated and is gone; evaluate one that is there: madformer evaluate {run}")
    named = [str(value) for value in sampling.curve_fields.values() if value is not None]
    folder = run / "samples/compared" / "-".join([path.stem, *named, f"{sampling.steps}steps"])
    write_samples(SamplingRequest(load_run(run), path, sampling, count), folder)
    return np.stack([_read(sample_path(folder, index)) for index in range(count)])


def _read(path: Path) -> np.ndarray:
    with Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))
