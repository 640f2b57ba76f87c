"""Write docs/reference/command_line.md: every command with its arguments and options, from `madformer.cli`.

python scripts/write_command_line.py        (or `make docs`)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

import typer

from madformer.cli import app
from madformer.runs.files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "command_line.md"

INTRODUCTION = """\
# Command line

Every command, with its arguments and options. `make docs` writes this page from `madformer/cli.py`.
`madformer COMMAND --help` prints the same.

`KEY=VALUE` sets a field of the [configuration](configuration.md), such as `trainer.max_steps=400`.
A killed command continues if you run it again ([resume](../how_to/resume.md)).
The exit status is 0 when done, 2 for a mistake of yours, 130 after Ctrl-C, and 1 for anything else.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(section(name, command) for name, command in commands(typer.main.get_command(app)))])


def commands(group: Any, prefix: str = "madformer") -> Iterator[tuple[str, Any]]:
    """Full names and commands, as `madformer sweep run`, in the order of the help."""
    for name, command in group.commands.items():
        full = f"{prefix} {name}"
        yield from commands(command, full) if hasattr(command, "commands") else [(full, command)]


def section(name: str, command: Any) -> str:
    """A heading, the usage, the command's help, and a table of what it takes."""
    rows = list(map(row, command.params))
    usage = " ".join([name, "[OPTIONS]", *(word for word, is_option, _, _ in rows if not is_option)])
    lines = [f"## {name}\n", f"{fill(command.help, 99)}\n", f"```text\n{usage}\n```\n"]
    described = [f"| `{word}` | {default} | {text} |" for word, _, default, text in rows if text]
    return "\n".join([*lines, *(["| | default | |", "| --- | --- | --- |", *described, ""] if described else [])])


def row(parameter: Any) -> tuple[str, bool, str, str]:
    """What a parameter is called, whether it is an option, its default, and its help."""
    is_option = parameter.param_type_name == "option"
    takes = parameter.metavar or parameter.name.upper()
    word = " ".join([parameter.opts[0], *([] if parameter.is_flag else [takes])]) if is_option else takes
    shown = is_option and parameter.default is not None and parameter.default is not False
    return word, is_option, f"`{parameter.default}`" if shown else "", (parameter.help or "").replace("|", "&#124;")


if __name__ == "__main__":
    write_text(PAGE, page())
