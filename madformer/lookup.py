"""Look up names: a user's class, imported and built, or a model of the Hugging Face hub (its cache, or a download).

Also: errors of other libraries in one line.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Literal

from torch import nn

from madformer.config.validation import expand_path
from madformer.errors import ConfigError, InputError

__all__ = [
    "CONFIG",
    "build_custom",
    "describe",
    "explain_source_errors",
    "files_of_card",
    "find_file",
    "find_model",
    "first_line",
    "list_files",
    "modules_of",
    "read_card",
    "silence_datasets",
]

CONFIG = "config.json"
"""File that says what a model is; it is in every folder of one."""

_TIMEOUT = 10.0
"""Seconds until a hub that does not answer is given up."""


def build_custom(location: str, class_name: str) -> Any:
    """An object of a custom class, built without arguments.

    Args:
        location: what to import: a module (`package.module`), or a file (`folder/file.py`).
        class_name: name of the class in it.

    Raises:
        InputError: there is no such module, file or class, or it cannot be imported or built; the reason alone.
    """
    if location.endswith(".py"):
        location = expand_path("class", location)
    if location.endswith(".py") and not Path(location).is_file():
        raise InputError(f"no such file: {location}")
    try:
        module = _import_file(Path(location)) if location.endswith(".py") else importlib.import_module(location)
    except (Exception, SystemExit) as error:  # the user's own code
        raise InputError(f"{location} cannot be imported: {describe(error)}") from error
    custom = getattr(module, class_name, None)
    if not isinstance(custom, type):
        raise InputError(f"{location} has no class {class_name}")
    try:
        return custom()
    except (Exception, SystemExit) as error:  # the user's own code
        raise InputError(f"{class_name}() fails: {describe(error)}") from error


def modules_of(instance: object) -> nn.Module:
    """All modules in an object that need not be one itself."""
    if isinstance(instance, nn.Module):
        return instance
    return nn.ModuleList(part for part in getattr(instance, "__dict__", {}).values() if isinstance(part, nn.Module))


def describe(error: BaseException) -> str:
    """An exception's type and what it says in its first line."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def first_line(error: BaseException) -> str:
    """What an exception says in its first line, or else its type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__


def list_files(repository: str, kind: Literal["model", "dataset"] = "model", revision: str | None = None) -> frozenset[str]:
    """Paths of all files of a repository that may be read.

    Ask this before the hub's libraries: without a network they repeat their requests for half a minute or more.

    Raises:
        InputError: why the hub does not give it, for a name that is no local folder either; the reason alone.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        info: Any = HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=_TIMEOUT)
        if info.gated:
            HfApi().auth_check(repository, repo_type=kind)
    except Exception as error:  # also those of the HTTP library, whose name changes
        if isinstance(error, HFValidationError):
            reason = "no hub id, which is owner/name"
        elif isinstance(error, GatedRepoError):
            reason = "the repository's owner must grant access first (accept the terms on its page, then `hf auth login`)"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "the hub has no such repository, or it is private (`hf auth login`)"
        elif isinstance(error, HfHubHTTPError):
            reason = f"the hub refuses: {first_line(error)}"
        else:
            reason = f"it is not in the cache, and the hub is out of reach: {first_line(error)}"
        raise InputError(f"no such folder, and {reason}") from error
    return frozenset(file.rfilename for file in info.siblings or [])


def read_card(folder: Path) -> Any:
    """What a README.md says, in the hub's notation, about which files belong to which subset and split; None: nothing."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        configs = (metadata_load(folder / "README.md") or {}).get("configs")
        return configs if any(files_of_card(configs)) else None
    except (OSError, ValueError, yaml.YAMLError):
        return None


def files_of_card(card: Any) -> Iterator[str]:
    """The files, patterns and folders that `read_card` found."""
    if isinstance(card, str):
        yield card
    elif isinstance(card, list):
        yield from chain.from_iterable(map(files_of_card, card))
    elif isinstance(card, dict) and "config_name" in card:
        yield from files_of_card([card.get("data_files"), card.get("data_dir")])
    elif isinstance(card, dict):
        yield from files_of_card([value for key, value in card.items() if key != "split"])


def find_model(location: str, *groups: Sequence[str], part: str = "", remedy: str = "name a folder that exists") -> Path:
    """The folder of a model: a local one, else one of the hub's cache, else one that is downloaded.

    Args:
        location: a folder, or `owner/name` or `owner/name/subfolder` of the hub. The hub is not asked for what its cache holds.
        groups: names of files beside `config.json`; one of each group must be there. The last group are the weights, best form
            first: no second form is downloaded.
        part: subfolder that is taken where the folder itself is of no model, such as the `vae` of a pipeline.
        remedy: what to do where the model cannot be had.

    Raises:
        InputError: it cannot be had; the reason alone.
    """
    subfolders = ("", part) if part else ("",)
    folder = Path(expand_path("folder", location))
    if folder.is_dir():
        for subfolder in subfolders:
            if (folder / subfolder / CONFIG).is_file():
                return folder / subfolder
        raise InputError(f"{folder} holds no {CONFIG}" + (f", nor a {part}/ that does" if part else ""))
    names = location.split("/")
    repository, subfolder = "/".join(names[:2]), "/".join(names[2:])
    subfolders = (subfolder,) if subfolder else subfolders
    try:
        return _find_cached(repository, subfolders, groups) or _download(repository, subfolders, groups)
    except InputError as error:
        raise InputError(f"cannot be had: {error}; {remedy}") from error


def find_file(repository: str, name: str) -> Path:
    """A file of a repository on the hub: from its cache, else downloaded.

    Raises:
        InputError: it cannot be had; the reason alone.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    with suppress(ValueError):  # no legal name of a repository: the download says so
        if isinstance(cached := try_to_load_from_cache(repository, name), str):
            return Path(cached)
    if name not in list_files(repository):
        raise InputError(f"{repository} holds no {name}")
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # the network's, the hub's and the disk's
        raise InputError(f"its download failed: {first_line(error)}") from error


def _import_file(path: Path) -> ModuleType:
    name = f"_custom_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _find_cached(repository: str, subfolders: Sequence[str], groups: Sequence[Sequence[str]]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for subfolder in subfolders:
        with suppress(ValueError):  # no legal name of a repository: the download says so
            config = try_to_load_from_cache(repository, _join(subfolder, CONFIG))
            folder = Path(config).parent if isinstance(config, str) else None
            if folder and all(any((folder / name).is_file() for name in group) for group in groups):
                return folder
    return None


def _download(repository: str, subfolders: Sequence[str], groups: Sequence[Sequence[str]]) -> Path:
    from huggingface_hub import snapshot_download

    files = list_files(repository)
    subfolder = next((name for name in subfolders if _join(name, CONFIG) in files), subfolders[-1])
    if _join(subfolder, CONFIG) not in files:
        raise InputError(f"{repository} holds no {_join(subfolder, CONFIG)}")
    *others, weights = groups
    best = next((name for name in weights if _join(subfolder, name) in files), weights[0])
    shards = re.sub(r"(\.\w+)\.index\.json$", r"-*\1", best)
    names = [CONFIG, *chain.from_iterable(others), best, shards]
    try:
        folder = snapshot_download(repository, allow_patterns=[_join(subfolder, name) for name in names])
    except Exception as error:  # the network's, the hub's and the disk's
        raise InputError(f"its download failed: {first_line(error)}") from error
    return Path(folder) / subfolder


def _join(subfolder: str, name: str) -> str:
    return str(PurePosixPath(subfolder) / name)


@contextmanager
def explain_source_errors(source: str, file: str | None = None) -> Iterator[None]:
    """Turn any error of reading a source into a ConfigError of one line that names the source, and the file if known."""
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # file systems and formats raise errors of their own libraries
        cause: BaseException = error
        while isinstance(cause, DatasetGenerationError) and cause.__cause__:
            cause = cause.__cause__
        if isinstance(cause, ConfigError):
            raise cause from error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise cause from error  # the source is not to blame
        if isinstance(cause, OSError) and _is_in_cache(str(cause.filename)):
            remedy = "set HF_HOME to a folder that can be written"
            raise ConfigError(f"{cause.filename}: {cause.strerror}, in the cache of data sets: {remedy}") from error
        reason = describe(cause)
        if isinstance(cause, ImportError):
            missing = cause.name or getattr(cause.__cause__, "name", None)
            reason += f" (pip install {missing})" if missing else ""
        raise ConfigError(f"data.source = {source!r}: {f'{file}: ' if file else ''}cannot be read: {reason}") from error


@contextmanager
def silence_datasets() -> Iterator[None]:
    """Hide the log of datasets, whose errors are raised anyway, and its progress bars where there is no terminal."""
    import datasets

    level = datasets.logging.get_verbosity()
    hides_bars = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if hides_bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if hides_bars:
            datasets.enable_progress_bars()


def _is_in_cache(file: str) -> bool:
    """Whether a file is in the folder where datasets keeps its copies, or is that folder or one above it."""
    from datasets.config import HF_DATASETS_CACHE as CACHE

    return Path(CACHE).is_relative_to(file) or Path(file).is_relative_to(CACHE)
