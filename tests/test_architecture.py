"""How the package is laid out: its files, its imports, and a checkout that is not installed."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import madformer
from tests.conftest import ROOT
from tests.tiny_runs import environment

PACKAGE = ROOT / "madformer"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"__main__"},
    {"cli"},
    {"report"},
    {"sweep"},
    {"training"},
    {"evaluation"},
    {"data", "diffusion"},
    {"parallel"},
    {"progress"},
    {"runs"},
    {"model"},
    {"lookup", "randomness"},
    {"config"},
    {"runs.files"},
    {"errors"},
    {""},  # madformer/__init__.py: the version
]
"""Modules and packages; each imports only from itself and from the layers below it. The longest name that fits counts."""
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    """`sweep.spec` for madformer/sweep/spec.py, `sweep` for the package's `__init__.py`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {module_name(path): path for path in FILES}


class Imports(ast.NodeVisitor):
    """Modules of the package that a module imports, at its top or in a function, but not for types alone."""

    def __init__(self, path: Path) -> None:
        self.modules: set[str] = set()
        self.visit(ast.parse(path.read_text()))

    def visit_If(self, node: ast.If) -> None:
        for statement in node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else [node.test, *node.body, *node.orelse]:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert not node.level, "a relative import"
        for alias in node.names:
            self._add(f"{node.module}.{alias.name}")

    def _add(self, name: str) -> None:
        package, _, module = name.partition(".")
        if package == "madformer":
            self.modules.add(module if module in MODULES else module.rpartition(".")[0])


GRAPH = {name: Imports(path).modules - {name} for name, path in MODULES.items()}


def layer(module: str) -> str:
    """The entry of `LAYERS` that a module belongs to."""
    parts = module.split(".")
    return next(name for length in range(len(parts), 0, -1) if (name := ".".join(parts[:length])) in RANKS)


def test_there_are_at_most_a_hundred_files_with_unique_names():
    counts = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []
    assert len(FILES) <= 100


def test_no_file_is_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 420} == {}


def test_there_are_no_import_cycles():
    assert set.union(*GRAPH.values()) <= MODULES.keys()
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the cycle


def test_imports_point_one_way():
    arrows = [(module, layer(module), name, layer(name)) for module, names in GRAPH.items() for name in names]
    assert [
        f"{module} -> {name}" for module, above, name, below in arrows if above != below and RANKS[above] >= RANKS[below]
    ] == []


def test_a_checkout_that_is_not_installed_imports_from_its_parent_folder(tmp_path):
    """Without site-packages: neither the distribution nor torch can be found."""
    checkout = tmp_path / "madformer"
    checkout.mkdir()
    (checkout / "madformer").symlink_to(PACKAGE)
    code = (
        "import importlib.metadata, importlib.util, madformer\n"
        "assert importlib.util.find_spec('torch') is None and not list(importlib.metadata.distributions(name='madformer'))\n"
        "print(madformer.__version__, madformer.__file__)"
    )
    variables = {**environment(), "PYTHONPATH": str(checkout)}
    argv = [sys.executable, "-S", "-c", code]
    for folder in (checkout, tmp_path):
        done = subprocess.run(argv, cwd=folder, env=variables, capture_output=True, text=True, check=False)
        assert done.stdout == f"{madformer.__version__} {checkout}/madformer/__init__.py\n", done.stderr
