"""Prompts: class names, and tokenizers that turn text into token ids.

ImageNet's names are the first lemma of each class in WordNet. Four are changed, so that no two names are equal: crane (bird),
crane (machine), and by their second lemma Cardigan Welsh corgi (a cardigan exists too) and tank suit (a maillot exists too).
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import textwrap
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from madformer.config import TextConfig
from madformer.config.data import BUILTIN, BUILTIN_VOCABULARY, DataConfig
from madformer.config.validation import require
from madformer.errors import ConfigError, InputError
from madformer.lookup import list_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["DIGIT_NAMES", "IMAGENET", "PromptTokenizer", "class_prompts", "imagenet_classes", "parse_classes"]

IMAGENET = "imagenet"
"""The class names that ship with the package."""

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Class names of the digits."""

BUILTIN_FILE = "builtin_tokenizer.json"
"""The builtin tokenizer, in the folder of this module; `scripts/train_tokenizer.py` makes it."""

_log = logging.getLogger(__name__)

_CACHE_SIZE = 10_000
"""Most prompts whose tokens are kept, as those of classes repeat."""


class PromptTokenizer:
    """Maps prompts to token ids. Several threads may call it at once.

    It does not add the tokenizer's own special tokens (beginning or end of a text, separators), except a BOS token if `bos` is
    set. The model learns its embeddings from scratch, so a token that is the same in every prompt tells it nothing. And the
    null text of guidance must be padding only. Special tokens are not parsed from prompts either: `<pad>` or `<|end_of_text|>`
    in a prompt is ordinary text.

    Args:
        name: `builtin`, or a hub id or folder of transformers. Files in the hub's cache are used without asking the hub.
        text: prompt length, vocabulary and padding of the model.
        bos: whether prompts begin with the BOS token.
        padding_side: `right` or `left`.

    Raises:
        ConfigError: the tokenizer is not available, has tokens beyond `text.vocab_size`, uses `text.pad_token_id` in text, or
            lacks a BOS token.
    """

    def __init__(self, name: str, text: TextConfig, bos: bool = False, padding_side: str = "right") -> None:
        # Prompts are few and short, and several threads call the tokenizer already.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._backend = _Builtin() if name == BUILTIN else _Pretrained(name)
        self._text, self._padding_side = text, padding_side
        self._cache: dict[str, Tensor] = {}
        _check_fit(name, self._backend, text)
        require(not bos or self._backend.bos is not None, "data.bos", bos, f"data.tokenizer={name} has no BOS token")
        self._start = [self._backend.bos] if bos else []

    @staticmethod
    def of(data: DataConfig, text: TextConfig) -> PromptTokenizer:
        """The tokenizer that an experiment names."""
        return PromptTokenizer(data.tokenizer, text, data.bos, data.padding_side)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of B prompts, [B, `text.length`] int64, truncated or padded. An empty prompt is the null text."""
        if not prompts:
            return torch.empty((0, self._text.length), dtype=torch.int64)
        misses = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        rows = dict(zip(misses, map(self._pad, self._backend.ids(misses)), strict=True)) if misses else {}
        if len(self._cache) + len(rows) <= _CACHE_SIZE:
            self._cache |= rows
        return torch.stack([rows[prompt] if prompt in rows else self._cache[prompt] for prompt in prompts])

    def warn_if_equal(self, prompts: Sequence[str]) -> None:
        """Warn if different prompts, such as those of classes, are cut to the same tokens."""
        first: dict[tuple[int, ...], str] = {}
        for prompt, row in zip(prompts, self(prompts).tolist(), strict=True):
            if (other := first.setdefault(tuple(row), prompt)) != prompt:
                remedy = "raise it, or the model cannot tell them apart"
                _log.warning("model.text.length = %d cuts %r and %r to the same tokens: %s", len(row), other, prompt, remedy)
                return

    def _pad(self, ids: Sequence[int]) -> Tensor:
        row = [*self._start, *ids][: self._text.length] if ids else []
        padding = [self._text.pad_token_id] * (self._text.length - len(row))
        return torch.tensor(row + padding if self._padding_side == "right" else padding + row)


def class_prompts(
    class_names: str | None, from_source: Sequence[str] | None, kind: Literal["names", "numbers"] = "names"
) -> tuple[str, ...] | None:
    """Prompts of the classes, by label.

    Args:
        class_names: `data.class_names`: `imagenet`, or a UTF-8 text file with one name on each line; None: the source's names.
        from_source: the data set's own class names; None: it has none.
        kind: `data.prompts`: the names, or the labels as numbers.

    Raises:
        ConfigError: the file does not exist, or has a blank or repeated line.
    """
    if class_names is not None:
        from_source = imagenet_classes() if class_names == IMAGENET else _read_names(class_names)
    if from_source is None:
        return None
    return tuple(from_source) if kind == "names" else tuple(map(str, range(len(from_source))))


def parse_classes(text: str, prompts: Sequence[str]) -> list[int]:
    """Labels of `--classes`: numbers or names, separated by commas. Names may contain commas; case does not matter.

    Raises:
        InputError: a number that is not a label, or a name of no class or of several.
    """
    parts, labels = text.split(","), []
    most_parts = 1 + max(prompt.count(",") for prompt in prompts)
    while parts:
        for count in range(min(most_parts, len(parts)), 0, -1):  # the longest first: there are names like "tench, Tinca tinca"
            part = ",".join(parts[:count]).strip()
            if found := _labels_of(part, prompts):
                break
        labels.append(_single_label(part, found, prompts))
        parts = parts[count:]
    return labels


@cache
def imagenet_classes() -> tuple[str, ...]:
    """ImageNet's 1,000 class names in the standard order, from tench to toilet tissue."""
    return tuple((resources.files("madformer.data") / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines())


def _read_names(file: str) -> tuple[str, ...]:
    name = "data.class_names"
    try:
        names = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise ConfigError(f"{name} = {file!r}: no such file; must be {IMAGENET} or a text file, one name a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} = {file!r}: cannot be read as UTF-8 text: {error}") from error
    require(bool(names), name, file, "is empty; must have one name a line")
    for number, line in enumerate(names, 1):
        require(bool(line), name, file, f"line {number} is blank; must have one name a line")
        first = names.index(line) + 1
        require(first == number, name, file, f"line {number} repeats line {first}, {line!r}; names must differ")
    return tuple(names)


def _labels_of(part: str, prompts: Sequence[str]) -> list[int]:
    """Labels of the classes that a part of the option may mean: by number, by exact name, or else by name in any case."""
    if re.fullmatch(r"[+-]?\d+", part):
        return [int(part)]
    labels = [label for label, prompt in enumerate(prompts) if prompt == part]
    return labels or [label for label, prompt in enumerate(prompts) if prompt.casefold() == part.casefold()]


def _single_label(part: str, labels: list[int], prompts: Sequence[str]) -> int:
    """The label of the only class that a part of the option means."""
    legal = f"0..{len(prompts) - 1}"
    if not part:
        raise InputError(f"--classes: an empty entry; must be numbers in {legal} or names, with commas between")
    if not labels:
        names = [prompt.casefold() for prompt in prompts]
        label = names.index(difflib.get_close_matches(part.casefold(), names, n=1, cutoff=0.0)[0])
        raise InputError(f"--classes {part}: no class of that name; the nearest is {prompts[label]} ({label})")
    if len(labels) > 1:
        raise InputError(f"--classes {part}: the name of several classes: {', '.join(map(str, labels))}; give the number")
    if not 0 <= labels[0] < len(prompts):
        raise InputError(f"--classes {part}: must be in {legal}")
    return labels[0]


class _Builtin:
    """The tokenizer that ships with the package. Through transformers it would take seconds to load."""

    size = BUILTIN_VOCABULARY
    special_ids = frozenset({0})
    pad = 0
    bos: int | None = None

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        encodings = _builtin_tokenizer().encode_batch(list(prompts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


@cache
def _builtin_tokenizer() -> Tokenizer:
    """The tokenizer. `_Builtin` has no reference to it, as a pickled tokenizer forgets how it treats special tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str((resources.files("madformer.data") / BUILTIN_FILE).read_text(encoding="utf-8"))
    tokenizer.encode_special_tokens = True  # "<pad>" in a prompt is text
    return tokenizer


class _Pretrained:
    """A tokenizer of transformers."""

    def __init__(self, name: str) -> None:
        try:
            self._tokenizer = _load(name)
        except Exception as error:  # tokenizers raises plain Exceptions on a broken file
            reason = textwrap.shorten(str(error) or type(error).__name__, 240, placeholder=" ...").rstrip(".")
            builtin = f"{BUILTIN} model.text.vocab_size={BUILTIN_VOCABULARY} model.text.pad_token_id=0"
            remedy = f"must be a folder or hub id of transformers, or data.tokenizer={builtin}, which ships with the package"
            raise ConfigError(f"data.tokenizer = {name!r}: cannot be had: {reason}; {remedy}") from error
        self.special_ids = _special_ids(self._tokenizer)
        self.size = 1 + max(self._tokenizer.get_vocab().values())
        pad_id = self._tokenizer.pad_token_id
        self.bos: int | None = self._tokenizer.bos_token_id
        self.pad: int = pad_id if pad_id in self.special_ids else min(self.special_ids, default=self.size)

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids: list[list[int]] = self._tokenizer(list(prompts), **options)["input_ids"]
        return ids


def _load(name: str) -> Any:
    """Load a tokenizer from a folder or the hub's cache, else from the hub."""
    try:
        return _from_pretrained(name, local_files_only=True)
    except Exception:
        if Path(name).is_dir():
            raise
    list_files(name)  # fails at once: transformers would try for a minute to reach a hub that does not answer
    return _from_pretrained(name, local_files_only=False)


def _from_pretrained(name: str, *, local_files_only: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_files_only, trust_remote_code=False)
        if len(tokenizer.get_vocab()) - len(_special_ids(tokenizer)) < 2:
            raise ValueError("its vocabulary is empty")  # transformers makes an empty one from a model's config.json
    except ValueError as error:
        raise ValueError(f"there is no tokenizer that transformers can read ({error})") from error
    return tokenizer


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset((*tokenizer.all_special_ids, *added))


def _check_fit(name: str, backend: _Builtin | _Pretrained, text: TextConfig) -> None:
    """Refuse a model whose vocabulary is too small, or whose padding is a token of ordinary text."""
    remedy = f"set model.text.vocab_size={max(backend.size, backend.pad + 1)} and model.text.pad_token_id={backend.pad}"
    is_large_enough, field = text.vocab_size >= backend.size, "model.text.vocab_size"
    require(is_large_enough, field, text.vocab_size, f"data.tokenizer={name} has ids up to {backend.size - 1}: {remedy}")
    is_no_text, field = text.pad_token_id in backend.special_ids or text.pad_token_id >= backend.size, "model.text.pad_token_id"
    require(is_no_text, field, text.pad_token_id, f"stands for a piece of text in data.tokenizer={name}: {remedy}")
