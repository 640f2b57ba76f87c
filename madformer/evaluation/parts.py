"""Features that are kept while there are not all of them yet: files in a folder, each whole or not there.

What is interrupted goes on with what is missing; processes that share the work write side by side.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from madformer.files import replacing

Content = TypeVar("Content")

INDICES = "indices"
"""Which samples the rows of a part are, [n] int64."""

FEATURES = "features"
"""Their features, [n, d]."""


def write_part(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one part, with `INDICES` among its tensors."""
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    first = int(tensors[INDICES][0])
    with replacing(folder / f"part-{first:020d}-{secrets.token_hex(4)}.safetensors") as temporary:
        save_file(contiguous, temporary)


def read_parts(folder: Path) -> Iterator[dict[str, Tensor]]:
    """The parts' tensors by their names, in the order of their first samples.

    A part that a crash of the machine tore is removed: its samples are missing then.
    """
    yield from _read(folder, load_file)


def read_indices(folder: Path) -> set[int]:
    """Samples that are there, in whatever part."""
    return {index for indices_N in _read(folder, _load_indices) for index in indices_N.tolist()}


def remove_parts(folder: Path) -> None:
    """They have served."""
    shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path, load: Callable[[Path], Content]) -> Iterator[Content]:
    for path in sorted(folder.glob("part-*.safetensors")):
        try:
            content = load(path)
        except SafetensorError:
            path.unlink(missing_ok=True)
        else:
            yield content


def _load_indices(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as part:
        indices_N: Tensor = part.get_tensor(INDICES)
    return indices_N
