"""What the paper reports (arXiv:2506.07999), and which of its models has the design of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from madformer.config import ExperimentConfig, trained_fields

DEPTH, LENGTH = "model.diffusion_depth", "model.ar_length"
AXES = (
    DEPTH,
    LENGTH,
    "model.use_clean_blocks",
    "model.use_condition",
    "model.parameter_sets",
    "model.local_denoising",
    "loss.lambda_hidden",
    "loss.lambda_clean_tower",
)
"""What the paper's tables vary. The paper's default model is that of `ExperimentConfig`."""

Design = Mapping[str, Any]
"""A value for each of `AXES`; of the depth the share of the layers that iterate, a Fraction."""


@dataclass(frozen=True)
class PaperData:
    """Images that the paper's models are trained on."""

    name: str
    title: str
    ar_length: int
    """Blocks of the default model."""
    latent_size: int
    """Rows and columns of an image's latents."""
    samples: int
    """Images behind each FID."""
    steps: int
    """Denoising steps per block."""


@dataclass(frozen=True)
class PaperCell:
    """One of the paper's models."""

    name: str
    change: Mapping[str, Any]
    """Fields that are not as in the default model -> value."""
    distances: Mapping[str, float]
    """Name of the data -> FID."""

    def has(self, design: Design, data: PaperData, any_length: bool) -> bool:
        """Whether the model, on these data, is of a design; `any_length`: the default number of blocks stands for any."""
        config = ExperimentConfig()
        theirs = {**design_of(config), LENGTH: data.ar_length, **self.change}
        if DEPTH in self.change:
            theirs[DEPTH] = Fraction(self.change[DEPTH], config.model.depth)
        skipped = LENGTH if any_length and LENGTH not in self.change else None
        return data.name in self.distances and all(design[axis] == theirs[axis] for axis in AXES if axis != skipped)


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    title: str
    cells: tuple[PaperCell, ...]


@cache
def paper() -> tuple[tuple[PaperData, ...], tuple[PaperTable, ...]]:
    """The paper's data and tables, from the file that ships with the package."""
    content = yaml.safe_load(files(__package__).joinpath("paper.yaml").read_text(encoding="utf-8"))
    data = tuple(PaperData(name, **fields) for name, fields in content["data"].items())
    tables = []
    for entry in content["tables"]:
        cells = [
            PaperCell(cell["model"], cell["change"], {one.name: cell[one.name] for one in data if one.name in cell})
            for cell in entry["cells"]
        ]
        tables.append(PaperTable(entry["title"], tuple(cells)))
    return data, tuple(tables)


def design_of(config: ExperimentConfig) -> dict[str, Any]:
    """The design of a run: a `Design`."""
    trained = trained_fields(config)
    return {**{axis: trained[axis] for axis in AXES}, DEPTH: Fraction(config.model.diffusion_depth, config.model.depth)}


def matches(table: PaperTable, designs: Mapping[str, Design], data: PaperData, any_length: bool) -> dict[str, PaperCell]:
    """Label -> the table's cell of its design on these data."""
    return {label: cell for cell in table.cells for label, design in designs.items() if cell.has(design, data, any_length)}
