"""`madformer sample`: images of a run as files that say how they were made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from madformer import __version__
from madformer.checkpoints import checkpoint_step, load_model
from madformer.config import ExperimentConfig, InputError, config_hash
from madformer.data.codec import build_codec
from madformer.data.prompts import PromptTokenizer
from madformer.evaluation.prompting import choose_prompts
from madformer.evaluation.request import SamplingRequest
from madformer.evaluation.sampling import sample_batches
from madformer.fingerprint import weights_sha256
from madformer.images import read_settings, save_png, to_pixels, to_tiles
from madformer.model import cost
from madformer.parallel import Share, find_devices, share_out
from madformer.progress import ProgressDisplay
from madformer.run import claim_folder

IN_GRID = 64
"""Images of the grid, the first ones."""


def write_samples(request: SamplingRequest, folder: Path) -> None:
    """Write a PNG of each sample and a grid of the first ones, and show the grid in TensorBoard; what is there is left alone.

    Sample i depends on (seed, i) and its prompt alone: more samples leave the first ones as they are.

    Raises:
        InputError: the folder holds samples made in another way, or a prompt that the run cannot have.
    """
    config = request.config
    prompts = choose_prompts(config, request.classes, request.prompt, request.guidance, range(request.num))
    codec = build_codec(config.data.codec, config.data.codec_dtype)
    settings = {
        "run": config.name,
        "checkpoint": request.checkpoint.name,
        "weights": request.weights,
        "weights_sha256": weights_sha256(load_model(request.checkpoint, config, request.weights)),
        "config_hash": config_hash(config),
        "sampler": "ddim",
        "steps": request.steps,
        "nfe": cost.nfe(config.model, request.steps),
        "guidance": request.guidance,
        "seed": config.evaluation.seed,
        "codec": codec.name,
        "codec_sha256": codec.sha256,
    }
    every = [{**settings, "index": index, **prompt.settings} for index, prompt in enumerate(prompts)]
    existed = folder.is_dir()
    with claim_folder(folder, "sample"):
        missing = [one for one in every if not _is_there(folder, one)]
        devices = find_devices(replace(config.trainer, accelerator=_accelerator(config), devices=request.devices))
        with ProgressDisplay("sampled", "images", request.num, request.num - len(missing)) as display:
            share_out(sample_share, (request, folder, missing), devices, display, request.num - len(missing))
        if missing or not existed:
            _show(request, folder, every[:IN_GRID], settings)
    what = f"{request.num} samples of {request.checkpoint}, {request.steps} steps, seed {config.evaluation.seed}"
    print(f"{folder}/grid.png: {what}" + ("" if missing else " (there already)"))


def sample_share(share: Share, request: SamplingRequest, folder: Path, wanted: Sequence[dict[str, Any]]) -> None:
    """Sample every `world_size`-th of the wanted images and write them."""
    config, mine = request.config, wanted[share.rank :: share.world_size]
    model = load_model(request.checkpoint, config, request.weights).to(share.device)
    codec = build_codec(config.data.codec, config.data.codec_dtype, share.device)
    text_BT = None
    if config.model.text is not None and mine:
        text_BT = PromptTokenizer(config.data.tokenizer, config.model.text)([one["prompt"] for one in mine])
    done, indices = 0, [one["index"] for one in mine]
    for latents_BChw in sample_batches(
        model, config, request.steps, indices, config.evaluation.batch_size, text_BT, request.guidance
    ):
        for pixels_YX3, settings in zip(to_pixels(codec.decode(latents_BChw)), mine[done:], strict=False):
            save_png(pixels_YX3, sample_path(folder, settings["index"]), {**settings, "madformer": __version__})
        done += len(latents_BChw)
        share.count(done)


def sample_path(folder: Path, index: int) -> Path:
    """Where a sample lies."""
    return folder / f"{index:06d}.png"


def _accelerator(config: ExperimentConfig) -> Literal["cpu", "auto"]:
    """A run that was trained on a GPU can be sampled without one."""
    return "cpu" if config.trainer.accelerator == "cpu" else "auto"


def _is_there(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the file is there.

    Raises:
        InputError: it was made in another way.
    """
    path = sample_path(folder, wanted["index"])
    if not path.is_file():
        return False
    found = read_settings(path) or {}
    for name, value in wanted.items():
        if name != "run" and found.get(name) != value:
            other = f"{name} = {found.get(name)!r} there, {value!r} asked for"
            raise InputError(f"{path}: made in another way: {other}; name another folder (--out), or delete it")
    return True


def _show(request: SamplingRequest, folder: Path, shown: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    """The grid, as a file and in TensorBoard."""
    pixels_BYX3 = np.stack(list(_read(folder, shown)))
    grid_YX3 = to_tiles(pixels_BYX3)
    save_png(grid_YX3, folder / "grid.png", {**settings, "madformer": __version__})
    guided = f", guidance {request.guidance:g}" if request.guidance != 1 else ""
    with SummaryWriter(str(request.config.run_dir), filename_suffix=".samples") as writer:
        tag = f"samples/{request.weights}, {request.steps} steps{guided}, seed {request.config.evaluation.seed}"
        writer.add_image(tag, grid_YX3, checkpoint_step(request.checkpoint), dataformats="HWC")
        writer.add_text(f"{tag} prompts", ", ".join(dict.fromkeys(str(one.get("prompt", "")) for one in shown)))


def _read(folder: Path, shown: Sequence[dict[str, Any]]) -> Iterator[np.ndarray]:
    for one in shown:
        with Image.open(sample_path(folder, one["index"])) as image:
            yield np.asarray(image.convert("RGB"))
