"""Write docs/reference/configuration.md: fields of experiments and sweeps, from the dataclasses and the texts under them.

python scripts/write_configuration.py        (or `make docs`)
"""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from textwrap import fill
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from madformer.config import ExperimentConfig
from madformer.config.validation import choice_name
from madformer.runs.files import write_text
from madformer.sweep.spec import Sweep

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "configuration.md"

INTRODUCTION = """\
# Configuration

Every field of an experiment and of a sweep, with its default. `make docs` writes this page from the
dataclasses in `madformer/config/` and `madformer/sweep/spec.py`.

An experiment's YAML file holds only what differs from the defaults, the paper's FFHQ-1024 run:

```yaml
name: small
model: {depth: 12, diffusion_depth: 6, width: 384, num_heads: 6}
data: {source: /data/photos, latents: latents/photos, batch_size: 32}
trainer: {max_steps: 50_000}
```

`base: other.yaml` starts from another experiment instead. The path is relative to the file.

On the command line, set a field by `section.field=value` after the file or the run. Write lists as
`evaluation.nfe=[280,700]` and nothing as `null`. An unknown field is refused with the nearest real
one, an illegal value with the legal ones.

**New run** says whether another value starts another run.

- *yes*: the field changes the trained weights and is part of the config hash. A run with another
  value needs another name. A sweep trains another cell.
- *no*: the field may differ from command to command.

## Experiments
"""

SWEEPS = """\
## Sweeps

`experiment` is required. `grid`, `zip`, `variants` and `search` make several runs of it
([how](../how_to/sweeps.md)). On the command line, set `workers=2`, `slurm.partition=long` or
`grid.model.diffusion_depth=[2,4]`. A field of an experiment, such as `trainer.max_steps=400`, holds
for every cell.
"""

HEADING = "| field | default | values | new run | |\n| --- | --- | --- | --- | --- |"
SWEEP_HEADING = "| key | default | values | |\n| --- | --- | --- | --- |"

NAMES = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Any: "any"}
NEW_RUN = {True: "yes", False: "no", "presence": "if `null` or not"}
PLURALS = {int: "integers", float: "numbers", str: "texts", bool: "`true`, `false`", Any: "mappings"}


def page() -> str:
    """The whole page."""
    experiments = [section(ExperimentConfig, name) for name in ("", *sections(ExperimentConfig))]
    sweeps = [section(Sweep, name) for name in ("", *sections(Sweep))]
    return "\n".join([INTRODUCTION, *experiments, SWEEPS, *sweeps]).rstrip() + "\n"


def sections(kind: type, prefix: str = "") -> Iterator[str]:
    """Names of the sections in a dataclass, as `model.unet`, each before those in it."""
    for name, hint in get_type_hints(kind).items():
        if (inner := dataclass_in(hint)) is not None:
            yield f"{prefix}{name}"
            yield from sections(inner, f"{prefix}{name}.")


def section(root: type, name: str) -> str:
    """A heading, the section's docstring, and the table of its fields.

    Args:
        root: dataclass of the whole.
        name: of the section in it; empty: the fields that are in no section.
    """
    kind, in_hash = root, True
    for part in name.split(".") if name else ():
        [field] = [field for field in fields(kind) if field.name == part]
        in_hash = in_hash and field.metadata.get("new_run", True)
        inner = dataclass_in(get_type_hints(kind)[part])
        assert inner is not None
        kind = inner
    texts, hints = docstrings(kind), get_type_hints(kind)
    lines = [f"### {name}\n"] if name else []
    lines += [
        f"{fill(inspect.cleandoc(kind.__doc__ or '').splitlines()[0], 99)}\n",
        SWEEP_HEADING if root is Sweep else HEADING,
    ]
    for field in fields(kind):
        full = f"{name}.{field.name}" if name else field.name
        values, default = what(hints[field.name]), default_of(field)
        text = texts[field.name]
        if dataclass_in(hints[field.name]):
            values = f"[section](#{full.replace('.', '')})" + (" or `null`" if default is None else "")
        cells: list[str] = [f"`{full}`", written(default), values]
        if root is not Sweep:
            new_run = in_hash and field.metadata.get("new_run", True)
            cells.append("" if is_dataclass(default) else NEW_RUN[new_run])
        lines.append(f"| {' | '.join([*cells, text.replace('|', '&#124;')])} |")
    return "\n".join(lines) + "\n"


def docstrings(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass, in one line."""
    [definition] = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def what(hint: Any) -> str:
    """A type in words, such as `integer or null`, `list of texts`, or the choices of a Literal."""
    options = [option for option in get_args(hint) if option is not NoneType]
    if NoneType in get_args(hint):
        return f"{what(options[0])} or `null`"
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice_name(option)}`" for option in options)
    if get_origin(hint) is tuple:
        return f"list of {PLURALS[options[0]]}" if options[0] in PLURALS else f"list: {what(options[0])}"
    return "mapping" if get_origin(hint) is dict else NAMES.get(hint, "")


def default_of(field: Field[Any]) -> Any:
    """A field's default; what is no plain value is made."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def written(value: Any) -> str:
    """A default as YAML has it; nothing for a section with defaults of its own, or where there is none."""
    if is_dataclass(value) or value == "":
        return ""
    return f"`{plain(value)}`"


def plain(value: Any) -> str:
    """A value in YAML's words."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(plain, value))}]"
    return f"{value:_}" if isinstance(value, int) and value >= 10_000 else str(value)


def dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type is, or is but for null."""
    return next((kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)), None)


if __name__ == "__main__":
    write_text(PAGE, page())
