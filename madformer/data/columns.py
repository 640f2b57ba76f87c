"""Which columns of a data set hold images, class numbers and texts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from madformer.config import ConfigError, DataConfig

if TYPE_CHECKING:
    from datasets import Features

__all__ = ["Columns", "find_columns"]

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "images", "picture", "photo")
LABEL_NAMES = ("label", "labels", "cls", "class", "class_id", "fine_label", "target")
TEXT_NAMES = ("text", "caption", "txt", "prompt", "captions", "description")


@dataclass(frozen=True)
class Columns:
    """Columns of a data set."""

    image: str
    label: str | None
    text: str | None
    class_names: tuple[str, ...] | None
    """Names of the label's classes, if the data set gives them."""


def find_columns(features: Features, data: DataConfig) -> Columns:
    """Columns that `data` names; the rest is found by type, then by name.

    Raises:
        ConfigError: none or several may hold the images, or one that is named is not there or of another type.
    """
    import datasets

    images = _candidates("image_column", features, data, IMAGE_NAMES, datasets.Image, _holds_images)
    if len(images) != 1:
        problem = f"{' and '.join(images)} hold images" if images else "no column holds images"
        raise ConfigError(
            f"data.image_column = None: {problem}; name one of data.source = {data.source!r}: {_listed(features)}"
        )
    labels = _candidates("label_column", features, data, LABEL_NAMES, datasets.ClassLabel, _holds_labels)
    if len(labels) > 1:  # attributes rather than the class
        labels = [name for name in LABEL_NAMES if name in labels]
    if data.label_column is None:  # strings are numbers in WebDataset's column only
        labels = [name for name in labels if name == "cls" or "int" in features[name].dtype]
    texts = _candidates("text_column", features, data, TEXT_NAMES, None, _holds_texts)
    label = next(iter(labels), None)
    classes = features[label] if label else None
    class_names = tuple(classes.names) if isinstance(classes, datasets.ClassLabel) else None
    return Columns(images[0], label, next(iter(texts), None), class_names)


def _candidates(
    field: str,
    features: Features,
    data: DataConfig,
    names: tuple[str, ...],
    special: type | None,
    is_legal: Callable[[Any], bool],
) -> list[str]:
    given = getattr(data, field)
    if given is None:
        typed = [name for name, feature in features.items() if special is not None and isinstance(feature, special)]
        return typed or [name for name in names if name in features and is_legal(features[name])]
    if given not in features or not is_legal(features[given]):
        listed = _listed(features)
        raise ConfigError(
            f"data.{field} = {given!r}: no such column, or of another type; data.source = {data.source!r} has {listed}"
        )
    return [given]


def _listed(features: Features) -> str:
    return ", ".join(f"{name} ({getattr(feature, 'dtype', type(feature).__name__)})" for name, feature in features.items())


def _holds_images(feature: Any) -> bool:
    import datasets

    is_struct = isinstance(feature, dict) and "bytes" in feature
    return isinstance(feature, datasets.Image) or is_struct or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _holds_labels(feature: Any) -> bool:
    return re.fullmatch(r"u?int\d+|string|binary", getattr(feature, "dtype", "")) is not None


def _holds_texts(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string")
