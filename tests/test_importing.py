"""Custom classes, by module and by file."""

from dataclasses import is_dataclass

import pytest
from torch import nn

from madformer.errors import InputError
from madformer.lookup import build_custom, describe, first_line, modules_of

CODE = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Custom:
    number: int = 3

class Needy:
    def __init__(self, argument):
        pass

number = 3
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "custom_package").mkdir()
    for file in ("custom_file.py", "custom_package/module.py"):
        (tmp_path / file).write_text(CODE)
    (tmp_path / "broken.py").write_text("no code")


@pytest.mark.parametrize("place", ["custom_file.py", "custom_file", "custom_package/module.py", "custom_package.module"])
def test_built_without_arguments(place):
    built = build_custom(place, "Custom")
    assert is_dataclass(built) and built.number == 3


@pytest.mark.parametrize(
    ("place", "kind", "words"),
    [
        ("other.py", "Custom", "no such file: other.py"),
        ("custom_package.other", "Custom", "custom_package.other cannot be imported: ModuleNotFoundError: "),
        ("broken.py", "Custom", "broken.py cannot be imported: SyntaxError: invalid syntax (broken.py, line 1)"),
        ("custom_file.py", "Missing", "custom_file.py has no class Missing"),
        ("custom_file.py", "number", "custom_file.py has no class number"),
        ("custom_file.py", "Needy", "Needy() fails: TypeError: "),
    ],
)
def test_what_cannot_be_built(place, kind, words):
    with pytest.raises(InputError) as error:
        build_custom(place, kind)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_modules_within_an_object():
    class Holder:
        def __init__(self):
            self.layer, self.other = nn.Linear(2, 3), "no module"

    assert {name for name, _ in modules_of(Holder()).named_parameters()} == {"0.weight", "0.bias"}
    layer = nn.Linear(2, 3)
    assert modules_of(layer) is layer and not list(modules_of(3).parameters())


def test_errors_in_a_line():
    assert first_line(ValueError("one:\ntwo")) == "one" and first_line(KeyError()) == "KeyError"
    assert describe(ValueError("one.")) == "ValueError: one"
