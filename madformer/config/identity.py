"""A run's config.yaml and the configuration's hash: write, read and compare them."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import textwrap
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, cast

from omegaconf import OmegaConf

from madformer import __version__
from madformer.config.experiment import ExperimentConfig
from madformer.config.loading import HEADER, as_text, load_experiment
from madformer.config.model import ModelConfig
from madformer.config.training import decay_start
from madformer.config.validation import is_folder_name, require_no_secrets, typed_path
from madformer.errors import InputError
from madformer.runs.files import write_text

_HASH = re.compile(r"^  config_hash: ['\"]?([0-9a-f]{16})['\"]?$", re.MULTILINE)
_BRANCH_STEP = re.compile(r"^  branch:\n    step: (\d+)$", re.MULTILINE)
_HEAD_CHARACTERS = 200
"""These stand at the beginning of the file."""

_COMMENT_COLUMN = 48
"""Comments stand in one column, at most this one; a longer line has its own."""

AUXILIARY_REVISION = "auxiliary outputs at timestep -1000"
"""In the hash of a configuration with an auxiliary loss: version 0.1.0 trained other weights."""


def trained_fields(section: object, leave_out_neutral: bool = True, prefix: str = "") -> dict[str, Any]:
    """Everything that changes the trained weights, as `section.field` -> value; no neutral values (see `setting`)."""
    values: dict[str, Any] = {}
    for field in _fields(section):
        name, value = f"{prefix}{field.name}", getattr(section, field.name)
        if isinstance(section, ModelConfig) and section.elastic_depths and field.name == "diffusion_depth":
            continue  # of an elastic run it is a default of sampling
        new_run, neutral = field.metadata.get("new_run", True), field.metadata.get("neutral", MISSING)
        if not new_run or (leave_out_neutral and value == neutral):
            continue
        if field.metadata.get("path") == "as typed" and value is not None and "://" not in value:
            value = str(PurePosixPath(value))  # photos/ and ./photos are photos
        if _fields(value):
            values |= trained_fields(value, leave_out_neutral, f"{name}.")
        else:
            values[name] = value is not None if new_run == "presence" else _plain(value)
    return values


def config_hash(config: ExperimentConfig) -> str:
    """Sixteen hexadecimal digits over `trained_fields`: equal hashes, equal weights."""
    has_auxiliary_loss = config.loss.lambda_hidden > 0 or config.loss.lambda_clean_tower > 0
    revised = has_auxiliary_loss and config.model.clean_timestep == "zero"
    return _hash({**trained_fields(config), **({"revision": AUXILIARY_REVISION} if revised else {})})


def trunk_hash(config: ExperimentConfig) -> str:
    """The hash of all that runs with a shared trunk have in common."""
    return _hash({name: value for name, value in trained_fields(config).items() if name != "trainer.max_steps"})


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def config_path(run: Path) -> Path:
    """Where a run's configuration lies."""
    return run / "config.yaml"


def is_run(folder: Path) -> bool:
    """Whether a run has begun there."""
    return config_path(folder).is_file()


def write_config(
    config: ExperimentConfig, run: Path, branch: Mapping[str, Any] | None = None, imported: Mapping[str, Any] | None = None
) -> None:
    """Write a run's configuration, with the code version and the hash.

    Args:
        branch: `step` and `run`: after which step of which run it begins. None: from the start.
        imported: `source`, `sha256` and `weights` of the file that its weights came from. None: the run was trained here.
    """
    require_no_secrets("", to_container(config))
    origin = {"branch": branch, "imported": imported}
    write_text(config_path(run), to_yaml(config, {name: dict(value) for name, value in origin.items() if value}))


def to_yaml(config: ExperimentConfig, origin: Mapping[str, Any] | None = None) -> str:
    """All fields, with the code version and the hash, and more about the origin; `load_experiment` reads it."""
    header = {HEADER: {"madformer": __version__, "config_hash": config_hash(config), **(origin or {})}}
    return OmegaConf.to_yaml(OmegaConf.create({**header, **to_container(config)}))


def annotated_yaml(config: ExperimentConfig, origins: Mapping[str, str]) -> str:
    """All fields, and behind each one a comment that says where it comes from; `load_experiment` reads it.

    Args:
        origins: as of `field_origins`.
    """
    lines: list[tuple[str, str]] = []
    above: list[str] = []
    for key, value in flat_fields(config).items():
        *sections, name = key.split(".")
        new = [depth for depth in range(len(sections)) if above[: depth + 1] != sections[: depth + 1]]
        lines += [(f"{'  ' * depth}{sections[depth]}:", "") for depth in new]
        lines.append((f"{'  ' * len(sections)}{name}: {as_text(value)}", origins.get(key, "default")))
        above = sections
    width = max(len(text) for text, origin in lines if len(text) <= _COMMENT_COLUMN)
    return "".join(f"{text:{width}}  # {as_text(origin)}\n" if origin else f"{text}\n" for text, origin in lines)


def flat_fields(config: ExperimentConfig) -> dict[str, Any]:
    """All fields, as `section.field` -> value; a section that is null is a field of that value."""

    def flat(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(flat(to_container(config), ""))


def differing_fields(one: ExperimentConfig, other: ExperimentConfig, but: Collection[str] = ()) -> list[tuple[str, str, str]]:
    """The fields that differ, each with both values as the command line has them; `-` where its section is null.

    Args:
        but: fields that may differ.
    """
    pair = flat_fields(one), flat_fields(other)
    names = [name for name in {**pair[0], **pair[1]} if name not in but]
    texts = [(name, *(as_text(each[name]) if name in each else "-" for each in pair)) for name in names]
    return [(name, left, right) for name, left, right in texts if left != right]


def compare(one: str, other: str) -> tuple[list[tuple[str, str, str]], str]:
    """The fields that differ between two runs' folders, or experiments' files, and a line that says if their weights do.

    Raises:
        FileNotFoundError, InputError: as of `load_run` and `load_experiment`.
    """
    are_runs = Path(one).is_dir(), Path(other).is_dir()
    left, right = (
        load_run(path) if is_run else load_experiment(path) for path, is_run in zip((one, other), are_runs, strict=True)
    )
    fields = differing_fields(left, right, but=("name", "output_dir") if any(are_runs) else ())  # a run has its folder's name
    hashes = [run_hash(each) if is_run else config_hash(each) for each, is_run in zip((left, right), are_runs, strict=True)]
    imported = [path for path, is_run in zip((one, other), are_runs, strict=True) if is_run and is_imported(Path(path))]
    if hashes[0] == hashes[1] and imported and len({Path(one).resolve(), Path(other).resolve()}) == 2:
        said = f"the weights of {' and '.join(imported)} are imported, and the hash knows nothing of them"
        return fields, f"both have the configuration hash {hashes[0]}, but {said}"
    if hashes[0] == hashes[1]:
        return fields, f"both have the configuration hash {hashes[0]}: the same weights"
    return fields, f"configuration hashes {hashes[0]} and {hashes[1]}: other weights"


def design_lines(config: ExperimentConfig) -> list[str]:
    """The fields that are not the defaults', as they are typed, in lines of at most a hundred characters."""
    fields = differing_fields(ExperimentConfig(), config, but=("name", "output_dir"))
    words = (shlex.quote(f"{name}={value}") for name, _, value in fields)
    return textwrap.wrap(
        " ".join(words), 96, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def load_run(run: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """A run's configuration under its present path, with overrides that do not change its weights.

    Its images may have moved (`data.source`): the reader of the images compares their fingerprint with the checkpoint's.

    Raises:
        InputError: the folder is no run, its config.yaml was edited, or an override would change the weights.
    """
    folder = named_folder(run)
    path = config_path(folder)
    if not path.is_file():
        within = [each.parent for each in sorted(folder.glob(f"*/{path.name}"))]
        hint = f"; {len(within)} runs are in it, such as {within[0]}" if within else ""
        flaw = ", but a file; name the run's folder" if folder.is_file() else f": it has no {path.name}{hint}"
        raise InputError(f"{run}: not a run{flaw}")
    require_no_move(overrides)
    stored = load_experiment(path)
    config = load_experiment(path, overrides) if overrides else stored
    frozen = read_config_hash(folder)
    if frozen not in (None, config_hash(stored), _hash(trained_fields(stored))):
        remedy = "put the trained value back, or train under another name"
        raise InputError(f"{path}: edited: its config_hash is {frozen}, its fields have {config_hash(stored)}; {remedy}")
    require_same_weights(stored, config, str(run), but="data.source")
    return replace(config, name=folder.name, output_dir=str(folder.parent))


def named_folder(named: str | Path) -> Path:
    """The folder by the name that the user typed, also of a link. `.`, `..` and `~` hold no name and are resolved."""
    folder = typed_path(named)
    return folder if is_folder_name(folder.name) else folder.resolve()


def require_no_move(overrides: Sequence[str]) -> None:
    """Refuse overrides that name another folder for a run.

    Raises:
        InputError: the first such override.
    """
    for override in overrides:
        if override.partition("=")[0] in ("name", "output_dir"):
            raise InputError(f"override {override!r}: a run is the folder that you name; leave it out, or move the folder")


def require_same_weights(existing: ExperimentConfig, requested: ExperimentConfig, run: str, but: str = "") -> None:
    """Refuse to go on with a run under a configuration that would have trained other weights.

    Raises:
        InputError: the first field that differs, with both values.
    """
    if difference := _first_difference(existing, requested, but):
        remedy = "give another name, or delete it"
        if difference.startswith("data.source "):
            moved = f"madformer train --resume {run} data.source={requested.data.source}"
            remedy = f"give another name, or, if these are the same images, {moved}"
        raise InputError(f"{run} is a run of another experiment: {difference}; {remedy}")


def require_same_trunk(trunk: ExperimentConfig, branch: ExperimentConfig, run: str) -> None:
    """Refuse to branch from a run that does not share its steps before the decay.

    Raises:
        InputError: its warm-up depends on `trainer.max_steps`, or the first other trained field that differs, with both values.
    """
    if trunk.optimizer.warmup_steps is None:
        remedy = "name a run that was trained with optimizer.warmup_steps"
        raise InputError(f"{run} has no branches, its warm-up depends on trainer.max_steps: {remedy}")
    if difference := _first_difference(trunk, branch, but="trainer.max_steps"):
        raise InputError(f"{run} is not the trunk of {branch.run_dir}: {difference}; only trainer.max_steps may differ")


def branch_limit(trunk: ExperimentConfig, branch: ExperimentConfig) -> int:
    """The last step of a run after which another one, that differs in `trainer.max_steps` alone, can begin."""
    starts = (decay_start(config.optimizer, config.trainer.max_steps) for config in (trunk, branch))
    return min(*starts, branch.trainer.max_steps - 1)


def _first_difference(existing: ExperimentConfig, requested: ExperimentConfig, but: str = "") -> str | None:
    """The first trained field that differs, with both values."""
    before, after = (trained_fields(config, leave_out_neutral=False) for config in (existing, requested))
    for name in sorted((before.keys() | after.keys()) - {but}):
        pair = before.get(name), after.get(name)
        if pair[0] != pair[1] and not (name == "data.source" and Path(str(pair[0])) == Path(str(pair[1]))):
            return f"{name} = {before.get(name)!r} there, {after.get(name)!r} asked for"
    return None


def is_outdated(run: Path) -> bool:
    """Whether version 0.1.0 trained a run with its auxiliary outputs at timestep 0, where that broke the denoiser."""
    if not config_path(run).is_file():
        return False
    config = load_experiment(config_path(run))
    return read_config_hash(run) == _hash(trained_fields(config)) != config_hash(config)


def run_hash(config: ExperimentConfig) -> str:
    """The hash of the configuration that a run was trained with, also by an earlier version, or on images that have moved."""
    return read_config_hash(config.run_dir) or config_hash(config)


def require_same_run(config: ExperimentConfig, but: str = "") -> None:
    """Refuse to go on with the run in an experiment's folder if this version would have trained other weights.

    Raises:
        InputError: the first field that differs, with both values; or the run is outdated.
    """
    run = config.run_dir
    require_same_weights(load_run(run), config, str(run), but)
    if is_outdated(run):
        change = "version 0.1.0 trained it with auxiliary outputs at timestep 0, which broke the denoiser there"
        raise InputError(f"{run}: {change}; train it anew under another name, or delete it")


def require_no_other_run(config: ExperimentConfig, but: str = "") -> None:
    """Refuse an experiment whose folder holds another experiment's run.

    Args:
        but: a field that may differ.

    Raises:
        InputError: the first field that differs, with both values.
    """
    if is_run(config.run_dir):
        require_same_run(config, but)


def read_config_hash(run: Path) -> str | None:
    """The hash in a run's config.yaml, without reading the rest of the file; None: there is none."""
    match = _HASH.search(_read_head(run))
    return match[1] if match else None


def read_branch_step(run: Path) -> int:
    """After which step of another run a run begins, by its config.yaml; 0: it begins at the start, or there is none."""
    match = _BRANCH_STEP.search(_read_head(run))
    return int(match[1]) if match else 0


def is_imported(run: Path) -> bool:
    """Whether a run's weights came from a file, by its config.yaml."""
    return "\n  imported:\n" in _read_head(run)


def _read_head(run: Path) -> str:
    try:
        with config_path(run).open(encoding="utf-8", errors="replace") as file:
            return file.read(_HEAD_CHARACTERS)
    except FileNotFoundError:
        return ""


def to_container(config: ExperimentConfig) -> dict[str, Any]:
    """All fields, nested by section, as plain values."""
    return {field.name: _plain(getattr(config, field.name)) for field in _fields(config)}


def _plain(value: object) -> Any:
    """A section as a mapping, tuples as lists; unlike `dataclasses.asdict` it copies no number, a sweep has many."""
    if section := _fields(value):
        return {field.name: _plain(getattr(value, field.name)) for field in section}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _fields(value: object) -> tuple[Field[Any], ...]:
    """Fields of a section; none of a plain value."""
    return _fields_of_type(cast(Hashable, type(value)))


@cache
def _fields_of_type(kind: Any) -> tuple[Field[Any], ...]:
    return fields(kind) if is_dataclass(kind) else ()
