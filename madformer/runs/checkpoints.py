"""Checkpoint files of a run: their names, their order, whether they are intact, their contents.

A checkpoint is Lightning's dictionary (`state_dict`, `optimizer_states`, `global_step`, ...) plus `ema`, the moving average of
the weights: name in the model -> tensor. All of it loads with `torch.load(path, weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import re
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast, get_args

from madformer.config import ExperimentConfig, load_run, read_config_hash
from madformer.config.identity import branch_limit, read_branch_step, require_same_trunk, run_hash
from madformer.errors import InputError
from madformer.runs.files import ChecksumWriter, atomic_write, file_checksum, require_readable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from madformer.model import MADFormer

Weights = Literal["ema", "model"]
"""The moving average, or the weights that the optimiser moved."""

EMA = "ema"
"""Key of the moving average in a checkpoint."""

TRAINED_BY = "trained_by"
"""Key of the name of the LightningModule. The loss of a custom one is in no configuration."""

CONFIG_HASH = "config_hash"
"""Key of the hash of the configuration that made a checkpoint."""

DATA = "LatentDataModule"
"""Key of the data module's state. Lightning takes the name of the class."""

CLASS_PROMPTS = "class_prompts"
"""Key of the names of the classes in the data module's state."""

MODEL_PREFIX = "model."
"""Prefix of the model's parameter names in a checkpoint's `state_dict`."""

_COMMENT = b"madformer xxh3 "
"""Begins the comment of a checkpoint's zip archive. The checksum follows, of the archive before it had a comment."""

_NAME = re.compile(r"step-(\d{8,})\.ckpt")

_log = logging.getLogger(__name__)


def checkpoint_path(run: Path, step: int) -> Path:
    """The checkpoint after `step` optimiser steps."""
    return run / "checkpoints" / f"step-{step:08d}.ckpt"


def checkpoint_step(path: Path) -> int:
    """Optimiser steps before the checkpoint, by its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise InputError(f"{path}: not a checkpoint's name; they are step-00001000.ckpt and the like")
    return int(match[1])


def list_checkpoints(run: Path) -> list[Path]:
    """All checkpoints of a run, the oldest first; torn ones too."""
    paths = [path for path in (run / "checkpoints").glob("*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=checkpoint_step)


def regular_checkpoints(config: ExperimentConfig) -> list[Path]:
    """A run's checkpoints, the oldest first, without those that are there for its branches alone."""
    settings, paths = config.trainer, list_checkpoints(config.run_dir)
    branching = {step for step in settings.checkpoint_steps if not settings.saves_regularly(step)}
    return [path for path in paths if checkpoint_step(path) not in branching]


def newest_intact(run: Path, checksums: bool = True, limit: float = math.inf) -> Path | None:
    """The newest intact checkpoint; None: there is none. Newer ones that are torn are skipped with a warning.

    Args:
        checksums: whether to look at them, which reads the whole file.
        limit: the last step that it may be of.
    """
    for path in reversed([path for path in list_checkpoints(run) if checkpoint_step(path) <= limit]):
        if flaw := find_flaw(path, checksums):
            _log.warning("%s is torn (%s): skipped", path, flaw)
        else:
            return path
    return None


def require_trunk(config: ExperimentConfig, run: Path) -> None:
    """Refuse a run that an experiment cannot branch from. One that has checkpoints of its own goes on with them.

    Raises:
        InputError: it is no run, or the experiment's own, or does not share its steps before the decay.
    """
    if run.resolve() == config.run_dir.resolve():
        raise InputError(f"{run} cannot be its own trunk: give the branch another name")
    if not list_checkpoints(config.run_dir):
        require_same_trunk(load_run(run), config, str(run))


def find_branch_point(config: ExperimentConfig, run: Path) -> Path:
    """The checkpoint of a run that an experiment without checkpoints begins with: the newest one before the decay of both.

    Raises:
        InputError: as `require_trunk`; or there is none that is intact, or it holds imported weights.
    """
    require_trunk(config, run)
    limit = branch_limit(load_run(run), config)
    if (path := newest_intact(run, limit=limit)) is None:
        steps = ", ".join(str(checkpoint_step(path)) for path in list_checkpoints(run)) or "none"
        remedy = "train it from the start, without --branch"
        raise InputError(
            f"{run}: no intact checkpoint at or before step {limit}, where the first decay begins; there are: {steps}; {remedy}"
        )
    return path


def find_flaw(path: Path, checksums: bool = True) -> str | None:
    """The reason why a checkpoint file is torn; None: its checksums hold. Reads the file without keeping it in memory.

    Files of other programs have no checksum of the whole; then those of the zip archive's members count.

    Args:
        checksums: whether to look at them; without them only a file that was cut short is found.

    Raises:
        PermissionError: it is another user's, who keeps it to himself.
    """
    require_readable(path)
    try:
        if checksums and (expected := read_checksum(path)):
            found = file_checksum(path, leave_out=len(_COMMENT) + 32 + 2, ending=b"\0\0")
            return None if found == expected else "it does not match its checksum"
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip() if checksums else None
        return f"{broken} does not match its checksum" if broken else None
    except Exception as error:  # a flipped bit leads zipfile anywhere
        return str(error) or type(error).__name__


def read_checksum(path: Path) -> str | None:
    """The checksum of a checkpoint file, which is the comment of its zip archive; None: it has none."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
        match = re.search(rb"(..)" + re.escape(_COMMENT) + rb"(.{32})\Z", file.read(), re.DOTALL)
    if match is None:
        return None
    length = int.from_bytes(match[1], "little")  # of the comment: the checksum does not cover it
    return match[2].decode("latin-1") if length == len(_COMMENT) + 32 else "of another length"


def save_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint: after a crash or a power failure the whole file is there, or none.

    Raises:
        OSError: the disk is full, or may not be written to.
    """
    import torch

    with atomic_write(path) as temporary, temporary.open("wb") as file:
        writer = ChecksumWriter(file)
        try:
            torch.save(checkpoint, cast(IO[bytes], writer))
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides the error of the file
                raise error.__context__ from None
            raise
        comment = _COMMENT + writer.checksum.encode()
        file.seek(-2, os.SEEK_END)  # the length of the comment, zero so far
        file.write(len(comment).to_bytes(2, "little") + comment)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, tensors on the CPU and mapped from the file.

    Raises:
        InputError: no such file, or it is torn or no checkpoint of a run.
    """
    import torch

    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    require_readable(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a flipped bit leads torch anywhere
        reason = find_flaw(path) or next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path}: corrupt, or no checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or EMA not in checkpoint:
        raise InputError(f"{path}: no checkpoint of a run: it must hold state_dict and {EMA}")
    return checkpoint


def load_weights(path: Path, config: ExperimentConfig, weights: Weights = "ema") -> dict[str, Tensor]:
    """A checkpoint's weights by their names in the model, on the CPU and mapped from the file.

    Raises:
        InputError: no such file, torn, or made by another configuration.
    """
    checkpoint = load_checkpoint(path)
    require_own(checkpoint, path, config)
    if weights == "ema":
        return dict(checkpoint[EMA])
    return {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in checkpoint["state_dict"].items()}


def require_own(checkpoint: Mapping[str, Any], path: Path, config: ExperimentConfig) -> None:
    """Refuse a checkpoint that was made by neither its run's configuration nor that of the run's trunk.

    Raises:
        InputError: names both hashes.
    """
    made_by, own = checkpoint.get(CONFIG_HASH), run_hash(config)
    if made_by in (None, own) or checkpoint_step(path) == read_branch_step(config.run_dir) > 0:
        return
    remedy = "put its own config.yaml back, give another name, or delete checkpoints/"
    raise InputError(f"{path}: made by another configuration (config hash {made_by}, this one has {own}): {remedy}")


def load_model(path: Path, config: ExperimentConfig, weights: Weights = "ema") -> MADFormer:
    """The model of a checkpoint, on the CPU, in evaluation mode.

    Raises:
        InputError: no such file, torn, or made by another configuration.
    """
    import torch

    from madformer.model import MADFormer

    state = load_weights(path, config, weights)
    with torch.device("meta"):
        model = MADFormer(config.model)
    try:
        model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path}: not of this run's model: {str(error).splitlines()[-1].strip()}") from error
    return model.eval()


class KnownRuns:
    """The runs below a folder by their hash, so that runs made by hand or by another sweep are not trained again.

    Of several runs with one hash, the one with the most steps counts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, config_hash: str) -> Path | None:
        """The run of a configuration; None: there is none, or its owner keeps it to himself."""
        run = self._runs.get(config_hash)
        try:
            for path in (*run.iterdir(), *list_checkpoints(run)) if run else ():
                require_readable(path)
        except PermissionError:
            return None
        return run

    @cached_property
    def _runs(self) -> dict[str, Path]:
        runs: dict[str, Path] = {}
        for path in sorted(itertools.chain(self._folder.glob("*/config.yaml"), self._folder.glob("*/*/config.yaml"))):
            try:
                key = read_config_hash(path.parent) if path.is_file() and os.access(path.parent, os.R_OK) else None
            except OSError:
                continue  # a neighbour's, who keeps it to himself
            if key:
                other = runs.setdefault(key, path.parent)
                if other != path.parent and _newest_step(path.parent) > _newest_step(other):
                    runs[key] = path.parent
        return runs


def _newest_step(run: Path) -> int:
    return max(map(checkpoint_step, list_checkpoints(run)), default=-1)


def weights_sha256(network: nn.Module) -> str:
    """Hexadecimal SHA-256 of a network's weights (names, types, shapes and bytes), whatever file or device they are on."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def parse_weights(name: str) -> Weights:
    """Which of a checkpoint's weights.

    Raises:
        InputError: neither `ema` nor `model`.
    """
    if name not in get_args(Weights):
        raise InputError(f"--weights {name}: must be one of {', '.join(get_args(Weights))}")
    return cast(Weights, name)
