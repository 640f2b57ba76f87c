"""The configuration of data: image source, codec, latents, prompts and batch size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from madformer.config.validation import is_integer, require, require_at_least, require_types, setting

DIGITS = "digits"
"""The source that ships with scikit-learn."""

PIXELS = "pixels"
"""The codec that leaves images as they are."""

BUILTIN = "builtin"
"""The tokenizer that ships with the package."""

BUILTIN_VOCABULARY = 2048
"""Tokens of the builtin tokenizer; token 0 is padding."""


MAX_PIXELS = 100_000_000
"""Default of `data.max_pixels`."""

_MOST_PIXELS = 178_956_970
"""Pillow refuses more."""

WHOLE = ("train", "validation", "test")
"""Values of `data.split` that all mean the whole data, for files, which have no splits."""


def names_files(source: str) -> bool:
    """Whether a source is a file or a pattern of files, judged by its text alone."""
    looks_so = bool(set(source) & set("*?[")) or Path(source).suffix.lower() in (".parquet", ".arrow", ".tar")
    return looks_so and not Path(source).expanduser().is_dir()


@dataclass(frozen=True)
class DataConfig:
    """Training data: image source, codec, latents, prompts and batch size."""

    source: str | None = setting(None, path="as typed")
    """Images: `digits`; a data set of the Hugging Face hub; files (Parquet, Arrow, WebDataset tars), a pattern of files, a
    folder of files or images, or their hf://, s3:// or https:// address. null: none; training then reads `data.latents`."""
    subset: str | None = None
    """Configuration of a data set on the hub that has several."""
    split: str = "train"
    """Part of the data set, or a slice of one, such as `train[:90%]`. Files have no splits: `train`, `validation` and `test`
    all mean everything."""
    streaming: bool = False
    """true: read the source in order, without a local copy. false: make a local copy, which can be read in any order."""
    image_column: str | None = None
    """Column of images; null: found by its type and name."""
    label_column: str | None = None
    """Column of class numbers, if any; null: found by its type and name."""
    text_column: str | None = None
    """Column of texts, if any; null: found by its name."""
    max_skipped: int = setting(100, new_run=False)
    """Largest number of broken images that are skipped; more are an error."""
    max_pixels: int = setting(MAX_PIXELS, new_run=False)
    """Largest number of pixels of an image; a larger one is broken. It is refused before it is decoded."""
    allow_paths: bool = setting(False, new_run=False)
    """true: rows of tables, metadata and README files may name images and files anywhere, here and at URLs. false: only below
    the source, so that data from strangers cannot have other files read."""
    codec: str = "vae:stabilityai/sd-vae-ft-mse"
    """Maps images to latents and back: `vae:` with a diffusers autoencoder (hub id or local folder), `pixels` (identity), or a
    class of your own as `module.path:Class` or `file.py:Class`."""
    codec_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Floating-point type in which the codec computes."""
    codec_batch_size: int = setting(16, new_run=False)
    """Images that the codec encodes or decodes at once."""
    latents: str | None = setting(None, new_run="presence", path=True)  # a checkpoint knows its content
    """Folder of latents: `madformer encode` fills it, training reads it. null: images are encoded while training."""
    flip: bool = False
    """Mirror each training image with probability 1/2. `madformer encode` then stores latents of both versions."""
    crop: Literal["centre", "top_left"] = setting("centre", neutral="centre")
    """How an image is cropped to a square. centre: as ADM crops ImageNet; top_left: the largest square at the top left, scaled
    by Lanczos, as in the released code."""
    class_names: str | None = setting(None, path=True)
    """Names of the classes: `imagenet`, or a text file with one name a line; null: the data set's own names."""
    prompts: Literal["names", "numbers"] = setting("names", neutral="names")
    """Prompts of the classes. names: the class names; numbers: the class numbers in digits, as in the released code."""
    tokenizer: str = setting("meta-llama/Meta-Llama-3-8B", path=True)
    """Turns prompts into tokens, if the model takes text: `builtin`, or a hub id or folder of transformers."""
    bos: bool = setting(False, neutral=False)
    """Begin each prompt with the tokenizer's BOS token, as the released code does."""
    padding_side: Literal["right", "left"] = setting("right", neutral="right")
    """Where short prompts are padded. left: as in the released code."""
    workers: int = setting(4, new_run=False)
    """Threads that read ahead for each device. Results do not depend on their number."""
    batch_size: int = 64
    """Images in one optimiser step, over all devices."""
    batch_size_per_device: int | None = setting(None, new_run=False)
    """Largest micro-batch of a device; gradients are accumulated up to `data.batch_size`. null: no limit."""

    def __post_init__(self) -> None:
        require_types("data", self)
        require_at_least(1, "data", self, "batch_size", "codec_batch_size")
        require_at_least(0, "data", self, "workers", "max_skipped")
        legal = is_integer(self.max_pixels) and 1 <= self.max_pixels <= _MOST_PIXELS
        require(legal, "data.max_pixels", self.max_pixels, f"must be an integer in 1..{_MOST_PIXELS}")
        if self.batch_size_per_device is not None:
            require_at_least(1, "data", self, "batch_size_per_device")
        for name in ("source", "split", "codec", "latents", "tokenizer", "class_names"):
            require(getattr(self, name) != "", f"data.{name}", "", "must not be empty")
        require(
            not (self.bos and self.tokenizer == BUILTIN), "data.bos", self.bos, f"data.tokenizer={BUILTIN} has no BOS token"
        )
        legal = re.fullmatch(rf"{PIXELS}|vae:.+|.+:[A-Za-z_]\w*", self.codec) is not None
        require(legal, "data.codec", self.codec, f"must be {PIXELS}, vae:HUB_ID_OR_FOLDER, module.path:Class or file.py:Class")
