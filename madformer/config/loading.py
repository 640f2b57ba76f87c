"""Load an experiment or a sweep from YAML and overrides. Each mistake is reported in one line.

`where` is the beginning of a message, such as `digits.yaml: `.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from madformer.config.experiment import ExperimentConfig
from madformer.config.validation import expand_path, require, require_no_secrets, type_hints
from madformer.errors import ConfigError, mask_secrets

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.+/-]*")
_RESERVED = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", "inf", "nan"))

HEADER = "frozen"
"""Key of a run's config.yaml that holds the version of the code and the config hash. It is no field of the experiment."""

BASE = "base"
"""Key of an experiment's file that names another one, by a path from its own folder, which it only changes."""

_BASE_8_OR_60 = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Numbers without quotes that YAML 1.1 reads as others: 010 is 8, and 1:30 is 90."""

_ENTRIES = {int: "integers", float: "numbers", str: "names", bool: "booleans", Any: "mappings"}
"""What a list holds, by the type of its entries; the metadata `entries` of a field takes precedence."""

T = TypeVar("T")


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment from YAML.

    Args:
        path: the YAML file; it holds only what differs from the defaults, or from the experiment that it names as its `base`.
        overrides: `section.field=value` strings, applied on top.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: broken YAML, an unknown key (the message names the nearest real one), a value of the wrong type or
            out of its legal range, or fields that contradict each other.
    """
    return build(ExperimentConfig, _read_experiment(Path(path)), overrides, f"{path}: ")


def _read_experiment(path: Path) -> DictConfig:
    """A file's fields on top of those of its bases, and these on top of the defaults."""
    fields = defaults(ExperimentConfig)
    for file, own in reversed(_read_files(path)):
        fields = merge(fields, own, f"{file}: ")
    return fields


def _read_files(path: Path, above: Sequence[Path] = ()) -> list[tuple[Path, DictConfig]]:
    """An experiment's file, its base, the base of that, ..., with their own fields; `above` are the files based on this one."""
    fields = read_yaml(path, "experiment", "sections (model, data, trainer, ...) to fields")
    if "experiment" in fields:
        raise ConfigError(f"{path}: a sweep, no experiment; madformer sweep run {path}")
    if HEADER in fields:
        _keep_references(fields, frozen=True)
    else:
        require_no_secrets_in(fields, f"{path}: ")
    base = _find_base(fields, path, above)
    for key in {BASE, HEADER} & fields.keys():
        del fields[key]
    return [(path, fields), *(_read_files(base, [*above, path.resolve()]) if base else [])]


def field_origins(path: Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Where the fields of a legal experiment come from: `section.field` -> `command line`, or a file's path.

    Fields that are left out have their defaults.
    """
    sources = [(str(file), own) for file, own in reversed(_read_files(path))]
    sources.append(("command line", OmegaConf.from_dotlist([as_typed(override, ExperimentConfig) for override in overrides])))
    return {name: source for source, own in sources for name in _leaves(OmegaConf.to_container(own))}


def _leaves(fields: Any, prefix: str = "") -> Iterator[str]:
    """The keys of nested mappings, as `section.field`."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _find_base(fields: DictConfig, path: Path, above: Sequence[Path]) -> Path | None:
    """The file that a file only changes; None: it changes the defaults."""
    remedy = "must be the path of another experiment's file"
    try:
        with _in_one_line(f"{path}: "):
            base = OmegaConf.select(fields, BASE, throw_on_missing=True)
    except ConfigError as error:
        raise ConfigError(f"{error}; {remedy}") from error
    if base is None:
        return None
    require(isinstance(base, str), f"{path}: {BASE}", base, remedy)
    target = path.parent / expand_path(f"{path}: {BASE}", base)
    legal = target.resolve() not in [*above, path.resolve()]
    require(legal, f"{path}: {BASE}", base, "must not be based on this file itself")
    return target


@cache
def defaults(schema: type) -> DictConfig:
    """All fields of a dataclass with their defaults, typed."""
    return OmegaConf.structured(schema)


def read_yaml(path: Path, kind: str, content: str) -> DictConfig:
    """A YAML file that maps keys to values; the `kind` of file and its `content` are for the messages.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: broken YAML or a broken interpolation, or no mapping.
    """
    if path.is_dir():
        is_run = kind == "experiment" and (path / "config.yaml").is_file()
        raise ConfigError(f"{path}: {f'a run; madformer train --resume {path}' if is_run else f'a folder, no {kind} file'}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {kind} file")
    try:
        with _in_one_line(f"{path}: "):
            loaded: object = OmegaConf.load(path)
        _require_decimal(path.read_text(encoding="utf-8"), f"{path}: ")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        if error.errno is not None:  # the system's; OmegaConf raises one without a number for a bare value
            raise
        loaded = None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must be a mapping of {content}")
    return loaded


def _require_decimal(text: str, where: str) -> None:
    """Refuse numbers in YAML that it reads in base 8 or 60.

    Raises:
        ConfigError: the first one, with its line if there are several.
    """
    if not re.search(r"(?<![\w.])0[0-7_]|\d:[0-5]?\d", text):
        return  # fast: a thousand files of runs have none
    for token in yaml.scan(text):
        if isinstance(token, yaml.ScalarToken) and token.plain and _BASE_8_OR_60.fullmatch(token.value):
            line = f"line {token.start_mark.line + 1}: " if "\n" in text.strip() else ""
            remedy = "write a decimal one, without leading zeros, or a text in quotes"
            raise ConfigError(f"{where}{line}{token.value}: YAML would read another number: {remedy}")


def resolve(fields: DictConfig) -> dict[str, Any]:
    """Plain values, with variables of the environment in place of `${oc.env:NAME}`, unless they hold secrets.

    Raises:
        ConfigError: there is no such variable.
    """
    with _in_one_line():
        _keep_references(fields)
        return cast(dict[str, Any], OmegaConf.to_container(fields, resolve=True))


def require_no_secrets_in(fields: DictConfig, where: str) -> None:
    """Refuse passwords and tokens that are written out in a file.

    Raises:
        ConfigError: the first one, masked.
    """
    try:
        require_no_secrets("", OmegaConf.to_container(fields))
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def _keep_references(fields: Any, frozen: bool = False) -> None:
    """Keep `${oc.env:NAME}` as it is where it stands for a secret, so that no file and no hash contains that.

    Args:
        frozen: of a run's own configuration: whatever the variable holds now.
    """
    for key in list(fields.keys()) if isinstance(fields, DictConfig) else range(len(fields)):
        node = fields._get_node(key)
        raw = node._value() if node is not None else None
        if isinstance(raw, str) and "${oc.env:" in raw and (frozen or _is_secret(fields[key])):
            with read_write(fields):
                fields[key] = raw.replace("${", "\\${")
        elif isinstance(node, (DictConfig, ListConfig)) and not (
            node._is_none() or node._is_missing() or node._is_interpolation()
        ):
            _keep_references(node, frozen)


def _is_secret(value: Any) -> bool:
    return isinstance(value, str) and mask_secrets(value) != value


def merge(below: DictConfig, fields: DictConfig, where: str = "") -> DictConfig:
    """Fields on top of those `below`, which are typed. Merge each file by itself: its mistakes are then reported as its own.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    schema = OmegaConf.get_type(below)
    assert schema is not None
    check_keys(OmegaConf.to_container(fields), schema, where)
    with _in_one_line(where):
        return cast(DictConfig, OmegaConf.merge(below, fields))


def build(schema: type[T], fields: DictConfig, overrides: Sequence[str] = (), where: str = "") -> T:
    """The dataclass of all its fields, with `section.field=value` overrides on top.

    Raises:
        ConfigError: an override or a value that is not legal.
    """
    for override in overrides:
        require("=" in override, "override", override, "must have the form section.field=value")
        require(is_utf8(override), "override", override, "must be UTF-8")
        require_no_secrets("override", override)
    try:
        changes = OmegaConf.from_dotlist([as_typed(override, schema) for override in overrides])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {list(overrides)}: {' '.join(str(error).split())}") from error
    merged = merge(fields, changes, "override: ")
    with _in_one_line(where):
        _keep_references(merged)
        return expand_paths(cast(T, OmegaConf.to_object(merged)))


def expand_paths(config: T, prefix: str = "") -> T:
    """A section, or a plain value, with all fields that are paths expanded (see `setting`)."""
    if not is_dataclass(config):
        return config
    changes: dict[str, Any] = {}
    for field in dataclass_fields(cast(Any, config)):
        value, is_path = getattr(config, field.name), field.metadata.get("path", False)
        if is_dataclass(value):
            changes[field.name] = expand_paths(value, f"{prefix}{field.name}.")
        elif is_path and isinstance(value, str) and "://" not in value and "${oc.env:" not in value:
            expanded = expand_path(f"{prefix}{field.name}", value)
            changes[field.name] = value if is_path == "as typed" else expanded
    changes = {name: value for name, value in changes.items() if value != getattr(config, name)}
    return replace(cast(Any, config), **changes) if changes else config


def as_typed(override: str, schema: type) -> str:
    """An override whose value YAML reads as text if the field is a text field: `name=007` stays 007.

    Quotes, null and `${...}` keep their meaning.

    Raises:
        ConfigError: a number that YAML reads in base 8 or 60.
    """
    key, _, text = override.partition("=")
    if not is_text_field(key, schema):
        with suppress(yaml.YAMLError):  # whoever reads the override says so
            _require_decimal(text, f"override {override!r}: ")
    kept = text.startswith(('"', "'")) or "${" in text or text.strip().lower() in ("", "~", "null")
    return override if kept or not is_text_field(key, schema) else f"{key}={_quoted(text)}"


def is_text_field(key: str, schema: type) -> bool:
    """Whether a field holds free text, not one of several choices."""
    return _hint(key, schema) in (str, str | None)


def is_optional(key: str, schema: type) -> bool:
    """Whether a field may be null."""
    return type(None) in get_args(_hint(key, schema))


def _hint(key: str, schema: type) -> Any:
    """The type of a field; None: there is none of that name."""
    *sections, name = key.split(".")
    for section in sections:
        hint = type_hints(schema).get(section)
        found = [option for option in (hint, *get_args(hint)) if is_dataclass(option)]
        if not found:
            return None
        schema = cast(type, found[0])
    return type_hints(schema).get(name)


@contextmanager
def _in_one_line(where: str = "") -> Iterator[None]:
    """Report what OmegaConf refuses in one line."""
    try:
        yield
    except OmegaConfBaseException as error:
        field = getattr(error, "full_key", None) or "a list's entry"  # the only place that OmegaConf does not name
        reason = str(error).splitlines()[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "the value")
        reason = reason.replace("True, False]", "true, false]")  # choices, as YAML writes them
        raise ConfigError(f"{where}{field}: {reason}") from error


def check_keys(fields: Any, schema: type, where: str = "") -> None:
    """Refuse unknown keys, and values that are no section, mapping or list where one belongs.

    Raises:
        ConfigError: the message names the nearest key, or what belongs there.
    """
    _check_section("", fields, schema, schema, where)


def _check_section(name: str, fields: Any, section: type, schema: type, where: str) -> None:
    hints = type_hints(section)
    require(isinstance(fields, Mapping), f"{where}{name}", fields, f"must be a mapping of its fields ({', '.join(hints)})")
    entries = {field.name: field.metadata.get("entries") for field in dataclass_fields(section)}
    for key, value in fields.items():
        full = f"{name}.{key}" if name else str(key)
        if key not in hints:
            raise ConfigError(f"{where}unknown key {full}; the nearest is {nearest(full, list(all_keys(schema)))}")
        hint = hints[key]
        options = (hint, *get_args(hint))
        if value is None and type(None) in options:
            continue
        for option in filter(is_dataclass, options):
            _check_section(full, value, cast(type, option), schema, where)
        check_text(f"{where}{full}", value, hint in (str, str | None) or (get_origin(hint) is tuple and options[1] is str))
        if get_origin(hint) is dict:
            require(isinstance(value, Mapping), f"{where}{full}", value, "must be a mapping of fields to values")
        elif get_origin(hint) is tuple:
            legal = isinstance(value, list) or str(value).startswith("${")  # of another field, not resolved yet
            require(legal, f"{where}{full}", value, f"must be a list of {entries[key] or _ENTRIES[options[1]]}")


def check_text(name: str, value: Any, is_text: bool = True) -> None:
    """Refuse a number or a boolean, or a list with one, as the value of a text field: 007 and yes would arrive as 7 and True.

    Raises:
        ConfigError: the message says how to write it.
    """
    for entry in value if is_text and isinstance(value, list) else [value]:
        legal = not (is_text and isinstance(entry, (bool, int, float)))
        require(legal, name, entry, "must be a text, and YAML reads another value: put it in quotes")


def nearest(key: str, keys: Sequence[str]) -> str:
    """The key that was probably meant."""
    return difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]


def all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration's dataclass, `section.field` and the sections too."""
    for name, hint in type_hints(schema).items():
        yield f"{prefix}{name}"
        for section in (hint, *get_args(hint)):
            if is_dataclass(section):
                yield from all_keys(cast(type, section), f"{prefix}{name}.")


def as_text(value: Any) -> str:
    """A value as written on the command line; `read_value` reads it back."""
    if isinstance(value, str):
        return value if _reads_back(value) else _quoted(value)
    return repr(value) if isinstance(value, float) else json.dumps(value, separators=(",", ": "))


def require_distinct(name: str, values: Sequence[Any]) -> None:
    """Refuse a list with equal values."""
    texts = [as_text(value) for value in values]
    require(len(set(texts)) == len(texts), name, list(values), "a value occurs twice")


def read_value(text: str) -> Any:
    """A value from the command line.

    Raises:
        yaml.YAMLError, OmegaConfBaseException: it is not a value.
    """
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload, index]


def _quoted(text: str) -> str:
    """A text that YAML reads back unchanged: characters that YAML takes for line ends are escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)


def is_utf8(text: str) -> bool:
    """Whether a word from the command line could be decoded with the environment's encoding."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


@cache
def _reads_back(text: str) -> bool:
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        return True  # fast: a thousand names of cells are plain
    try:
        return len(text.splitlines()) == 1 and read_value(text) == text
    except (yaml.YAMLError, OmegaConfBaseException):
        return False
