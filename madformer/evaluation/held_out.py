"""Held-out images for diagnostics; training images if the experiment names no others."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from madformer.config import DataConfig, ExperimentConfig
from madformer.config.data import DIGITS
from madformer.config.experiment import check_data, has_held_out, held_out_data
from madformer.data.codec import build_codec, require_fit
from madformer.data.image_files import to_unit
from madformer.data.loader import Captions, batched, decode_rows, skip_broken
from madformer.data.prompts import DIGIT_NAMES, class_prompts
from madformer.data.sources import ImageSource, Row, load_digits, open_source
from madformer.errors import ConfigError, InputError
from madformer.evaluation.sampling import known_classes
from madformer.randomness import keyed_generator

LEAST_IMAGES = 3
"""Fewest images for statistics."""

UNITS_AT_ONCE = 16
"""Number of a stream's files that are read in turn."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Images as the model sees them: latents and captions."""

    latents_NChw: Tensor
    """Means of the codec's posterior, [N, C, h, w] float32, on the CPU."""
    captions: list[str]
    """The caption of each image; empty for a model without text."""
    source: str
    """Data set and split."""
    is_held_out: bool
    """Whether the images are disjoint from those of training."""


def read_held_out(config: ExperimentConfig, checkpoint: Path, images: int, device: torch.device) -> HeldOut:
    """Read images of `evaluation.held_out_source` and `evaluation.held_out_split`, or of training, with a warning.

    They are drawn from the whole data set by `evaluation.seed`. From a stream, they are the first ones of several files. The
    first images do not depend on the number of images. They are read as in training: same columns, subset, codec and class
    names.

    Args:
        checkpoint: has the names of the classes.
        images: number of images; all, if there are fewer.
        device: where the codec computes.

    Raises:
        ConfigError: no images are named, or they are not available, too few, do not fit the model, or have no captions for a
            model with text.
        InputError: too many images are broken.
    """
    data, description = held_out_data(config), describe_held_out(config)
    if not description["held_out"]:
        remedy = "name others as evaluation.held_out_split=validation, train[90%:] ..., or as evaluation.held_out_source"
        _log.warning("%s: the diagnostics are of images that the run was trained on; %s", config.run_dir, remedy)
    with explain_errors():
        check_data(data, config.model)
        if data.source == DIGITS:
            latents_NChw, captions = _read_digits(config, data, images)
        else:
            latents_NChw, captions = _read_images(config, data, checkpoint, images, device)
    source = description["source"]
    if len(latents_NChw) < LEAST_IMAGES:
        raise ConfigError(f"held-out images: {len(latents_NChw)} of {source}; there must be at least {LEAST_IMAGES}")
    return HeldOut(latents_NChw, captions, source, description["held_out"])


def describe_held_out(config: ExperimentConfig) -> dict[str, Any]:
    """A record of the images: `source`, and whether they are `held_out`, that is disjoint from those of training.

    Raises:
        ConfigError: no images are named.
    """
    data = held_out_data(config)
    return {"source": f"{data.source}, {data.split}", "held_out": has_held_out(config)}


def require_held_out(config: ExperimentConfig) -> None:
    """Check that the images exist before anything costly is done.

    Raises:
        ConfigError: they do not.
    """
    data = held_out_data(config)
    with explain_errors():
        check_data(data, config.model)
        if data.source == DIGITS:
            load_digits(data.split)
        else:
            open_source(data)


@contextmanager
def explain_errors() -> Iterator[None]:
    """Add to the message of an error that it is about held-out images."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"held-out images (evaluation.held_out_source, evaluation.held_out_split): {error}") from error


def _read_digits(config: ExperimentConfig, data: DataConfig, images: int) -> tuple[Tensor, list[str]]:
    images_NCYX, labels_N = load_digits(data.split)
    rows_M = torch.randperm(len(labels_N), generator=_generator(config))[:images]
    prompts = class_prompts(None, DIGIT_NAMES, data.prompts) or ()
    return images_NCYX[rows_M], [prompts[label] for label in labels_N[rows_M].tolist()]


def _read_images(
    config: ExperimentConfig, data: DataConfig, checkpoint: Path, images: int, device: torch.device
) -> tuple[Tensor, list[str]]:
    source, codec = open_source(data), build_codec(data.codec, data.codec_dtype, device)
    require_fit(codec, config.model)
    caption, captions = _captions(config, checkpoint, source), list[str]()
    rows, size = _spread_rows(source, _generator(config)), config.model.latent_size * codec.downsampling
    decoded = decode_rows(rows, size, data.crop, data.workers, queue_size=data.codec_batch_size + data.workers)
    good_images = itertools.islice(skip_broken(decoded, data, []), images)
    latents_BChw = [torch.empty(0, codec.latent_channels, config.model.latent_size, config.model.latent_size)]
    for batch in batched(good_images, data.codec_batch_size):
        images_BCYX = torch.stack([image.pixels_CYX for image in batch]).to(device)
        latents_BChw.append(codec.encode(to_unit(images_BCYX))[0].cpu())
        captions += [caption(image.row.label, image.row.text) for image in batch]
    return torch.cat(latents_BChw), captions


def _generator(config: ExperimentConfig) -> torch.Generator:
    return keyed_generator(config.evaluation.seed, "held out")


def _spread_rows(source: ImageSource, generator: torch.Generator) -> Iterator[Row]:
    """Yield rows from the whole source in random order, as many data sets are sorted by class."""
    if source.num_rows is not None:
        yield from (source.row(int(number)) for number in torch.randperm(source.num_rows, generator=generator))
        return
    units = torch.randperm(source.num_units, generator=generator).tolist()
    for start in range(0, len(units), UNITS_AT_ONCE):
        streams = [source.rows(unit) for unit in units[start : start + UNITS_AT_ONCE]]
        for rows in itertools.zip_longest(*streams):
            yield from (row for row in rows if row is not None)


def _captions(config: ExperimentConfig, checkpoint: Path, source: ImageSource) -> Captions:
    """The captions that training would give these images.

    The data set's own class names are preferred to the run's: a folder that lacks some classes numbers the others differently.
    """
    names = class_prompts(None, source.class_names, config.data.prompts)
    if source.has_labels and config.model.text and (config.data.class_names is not None or names is None):
        names = known_classes(config, checkpoint)
    return Captions.of(config, names, source.has_texts, source.name)
