"""The paper's numbers, and the comparison of a report's designs with them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from madformer.config import ExperimentConfig, load_run, trained_fields
from madformer.config.identity import config_path
from madformer.evaluation.measurement import higher_is_better
from madformer.report.formatting import arrow, number, show, table
from madformer.report.points import Column, Group, Row, common_columns
from madformer.report.statistics import FEWEST_SEEDS, SIGNIFICANCE, Estimate, difference, holm

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
"""The fields that the paper's tables vary. The paper's default model is that of `ExperimentConfig`."""

Design = Mapping[str, Any]
"""A value for each of `AXES`. For the depth it is the share of the layers that iterate, a Fraction."""


@dataclass(frozen=True)
class PaperData:
    """A data set that the paper's models are trained on."""

    name: str
    title: str
    ar_length: int
    """Number of blocks of the default model."""
    latent_size: int
    """Rows and columns of an image's latents."""
    samples: int
    """Number of samples for each FID."""
    steps: int
    """Denoising steps per block."""


@dataclass(frozen=True)
class PaperCell:
    """One of the paper's models."""

    name: str
    change: Mapping[str, Any]
    """Fields that differ from the default model -> value."""
    distances: Mapping[str, float]
    """Name of the data -> FID."""

    def has(self, design: Design, data: PaperData, any_length: bool) -> bool:
        """Whether the model has this design, and the paper has its FID on these data.

        Args:
            data: determines the default number of blocks.
            any_length: whether the default number of blocks matches any number.
        """
        config = ExperimentConfig()
        values = {**design_of(config), LENGTH: data.ar_length, **self.change}
        if DEPTH in self.change:
            values[DEPTH] = Fraction(self.change[DEPTH], config.model.depth)
        skipped = LENGTH if any_length and LENGTH not in self.change else None
        return data.name in self.distances and all(design[axis] == values[axis] for axis in AXES if axis != skipped)


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables."""

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
    """The `Design` of a run."""
    trained = trained_fields(config)
    return {**{axis: trained[axis] for axis in AXES}, DEPTH: Fraction(config.model.diffusion_depth, config.model.depth)}


def matches(table: PaperTable, designs: Mapping[str, Design], data: PaperData, any_length: bool) -> dict[str, PaperCell]:
    """Label -> the table's cell of the same design on these data. Labels without a cell are left out.

    Args:
        designs: label -> its design.
        any_length: as for `PaperCell.has`.
    """
    return {label: cell for cell in table.cells for label, design in designs.items() if cell.has(design, data, any_length)}


FEW, ALL = Fraction(1, 4), Fraction(1)
"""Shares of the layers that iterate in the two models that Figure 4 compares."""


@dataclass(frozen=True)
class ComparedDesign:
    """A label of the report, and the paper's model of the same design."""

    row: Row
    quality: Estimate
    cell: PaperCell
    data: tuple[PaperData, ...]
    """The data on which the paper's model has this design. Their default numbers of blocks differ."""

    def paper_fid(self, data: PaperData) -> float | None:
        """The paper's FID of this design on these data; None: the paper has none."""
        return self.cell.distances[data.name] if data in self.data else None

    @property
    def label(self) -> str:
        """The label of the report's row."""
        return self.row.label


@dataclass(frozen=True)
class ComparedTable:
    """The models of one of the paper's tables that a report has too."""

    title: str
    column: Column
    """The column that the report's values come from."""
    lines: tuple[ComparedDesign, ...]
    data: tuple[PaperData, ...]
    """The data on which the paper has at least two of the lines."""


@dataclass(frozen=True)
class Comparison:
    """A report compared with the paper."""

    metric: str
    tables: tuple[ComparedTable, ...]
    figure: str | None
    """The result of the paper's Figure 4, and that of these runs; None: the runs lack its depths."""

    def markdown(self) -> str:
        """A table for each of the paper's tables, followed by the agreement of the orders."""
        parts = ["### Beside the paper"]
        if data := {one.name: one for compared in self.tables for one in compared.data}:
            protocols = ", ".join(f"{one.title} {one.samples:,} samples of {one.steps} steps" for one in data.values())
            parts.append(
                f"The paper's FID ({protocols}) of 28 layers, of which the same share iterates, the design otherwise the same. "
                "What can be compared is the order; values only where images, model and feature network are the paper's."
            )
        for compared in self.tables:
            parts += [self._table(compared), "\n".join(f"- {agreement}" for agreement in _agreements(compared, self.metric))]
        return "\n\n".join(filter(None, [*parts, self.figure]))

    def _table(self, compared: ComparedTable) -> str:
        headings = [compared.title, f"{arrow(self.metric)} at {compared.column}", "seeds", "the paper's"]
        lines = [[*headings, *(f"FID, {one.title}" for one in compared.data)]]
        for line in compared.lines:
            paper_fids = map(line.paper_fid, compared.data)
            ours = [line.label, show(line.quality), str(len(line.row.seeds)), line.cell.name]
            lines.append([*ours, *("" if value is None else str(value) for value in paper_fids)])
        return table(lines)

    def rows(self) -> list[list[Any]]:
        """A heading and lines for CSV, in full precision; empty: there are no tables."""
        if not self.tables:
            return []
        data = paper()[0]
        ours = [self.metric, f"{self.metric}_ci_low", f"{self.metric}_ci_high", "interval_over", "seeds"]
        lines: list[list[Any]] = [["table", "label", "at", *ours, "paper_model", *(f"paper_{one.name}" for one in data)]]
        for compared in self.tables:
            for line in compared.lines:
                interval = line.quality.interval or (None, None)
                numbers = [line.quality.mean, *interval, line.quality.over, len(line.row.seeds)]
                paper_fids = map(line.paper_fid, data)
                lines.append([compared.title, line.label, str(compared.column), *numbers, line.cell.name, *paper_fids])
        return lines


def compare(groups: Sequence[Group], rows: Sequence[Row], metric: str) -> Comparison | None:
    """Compare a report's labels with the paper's models of the same design.

    A table is compared if the report has at least two of its models. Values are those at the greatest budget, or the most
    steps, that all of them have. The AR length counts if labels differ in it, or if the latents have the paper's size. Else any
    number of blocks matches the default. Labels with other differences than the paper's models are left out.

    Args:
        groups: labels of the report with their runs.
        rows: rows of the report, whose values are compared.
        metric: the metric to compare by.

    Returns:
        None: there is nothing to compare.
    """
    configs = _configs([group for group in groups if not group.difference])
    designs = {label: design_of(config) for label, config in configs.items()}
    if not designs:
        return None
    sizes = {config.model.latent_size for config in configs.values()}
    data = [one for one in paper()[0] if sizes == {one.latent_size}] or list(paper()[0])
    any_length = len(data) > 1 and len({design[LENGTH] for design in designs.values()}) == 1
    tables = [_compare_table(entry, designs, data, any_length, rows, metric) for entry in paper()[1]]
    found = tuple(compared for compared in tables if compared is not None)
    figure = _figure(designs, rows, metric)
    return Comparison(metric, found, figure) if found or figure else None


def _compare_table(
    entry: PaperTable,
    designs: Mapping[str, Design],
    data: Sequence[PaperData],
    any_length: bool,
    rows: Sequence[Row],
    metric: str,
) -> ComparedTable | None:
    """The comparison with one table; None: the report has fewer than two of its models on any data."""
    by_data = {one: cells for one in data if len(cells := matches(entry, designs, one, any_length)) > 1}
    having = [row for row in rows if any(row.label in cells for cells in by_data.values())]
    if not (columns := common_columns(having)):
        return None
    at = {row.label: row for row in having if columns[-1].holds(row)}
    lines = []
    for cell, (label, row) in itertools.product(entry.cells, at.items()):
        if on := tuple(one for one, cells in by_data.items() if cells.get(label) == cell):
            lines.append(ComparedDesign(row, row.quality[metric], cell, on))
    return ComparedTable(entry.title, columns[-1], tuple(lines), tuple(by_data))


def _configs(groups: Sequence[Group]) -> dict[str, ExperimentConfig]:
    """Label -> its configuration, without labels that share a design and runs that have no configuration file.

    An elastic run at one of its depths counts as a model of this depth.
    """
    configs = {}
    for group in groups:
        if config_path(group.runs[0]).is_file():
            config = load_run(group.runs[0])
            is_elastic = group.sampling.diffusion_depth is not None
            configs[group.label] = group.sampling.apply(config) if is_elastic else config
    keys = {label: tuple(design_of(config).values()) for label, config in configs.items()}
    times = Counter(keys.values())
    return {label: config for label, config in configs.items() if times[keys[label]] == 1}


def _agreements(compared: ComparedTable, metric: str) -> Iterator[str]:
    """A sentence for each of the paper's data on how many pairs of models are in its order, and how many of them clearly."""
    sign = -1 if higher_is_better(metric) else 1
    for one in compared.data:
        lines = sorted((line for line in compared.lines if one in line.data), key=lambda line: line.cell.distances[one.name])
        pairs = [
            (better, worse)
            for better, worse in itertools.combinations(lines, 2)
            if better.cell.distances[one.name] < worse.cell.distances[one.name]
        ]
        if not pairs:
            yield f"{one.title}: a tie in the paper."
            continue
        agreeing = [sign * (worse.quality.mean - better.quality.mean) > 0 for better, worse in pairs]
        tested = [difference(better.row.by_seed(metric), worse.row.by_seed(metric)).p for better, worse in pairs]
        clear = [None if p is None else p < SIGNIFICANCE for p in holm(tested)]
        text = f"{one.title}: {sum(agreeing)} of {len(pairs)} pairs stand in the paper's order"
        if clear.count(None) < len(pairs):
            sure = [agrees for agrees, is_clear in zip(agreeing, clear, strict=True) if is_clear]
            clearly = "differ by more than seeds do (Holm, p < 0.05)"
            text += f"; of those that {clearly}, {sum(sure)} of {len(sure)}" if sure else f"; none {clearly}"
        if single := clear.count(None):
            some = "" if single == len(pairs) else f"{single} "
            text += f"; {some}of fewer than {FEWEST_SEEDS} seeds, which another training may order otherwise"
        ours = min(lines, key=lambda line: sign * line.quality.mean)
        end = "highest" if sign < 0 else "lowest"
        yield f"{text}. The {end} mean is that of {ours.label} here, in the paper that of {lines[0].cell.name}."


def _figure(designs: Mapping[str, Design], rows: Sequence[Row], metric: str) -> str | None:
    """A sentence on Figure 4: models with few and all layers iterating, at the least and the greatest budget of both."""
    default = design_of(ExperimentConfig())
    others = [axis for axis in AXES if axis not in (DEPTH, LENGTH)]
    labels = {
        (design[LENGTH], design[DEPTH]): label
        for label, design in designs.items()
        if all(design[axis] == default[axis] for axis in others)
    }
    lengths = {length for length, share in labels if share == FEW and (length, ALL) in labels}
    if len(lengths) != 1 or higher_is_better(metric):
        return None
    [length] = lengths
    few, full = labels[length, FEW], labels[length, ALL]
    at = {label: {row.nfe: row.quality[metric].mean for row in rows if row.label == label} for label in (few, full)}
    shared = sorted(at[few].keys() & at[full].keys())
    if len(shared) < 2 or min(*at[few].values(), *at[full].values()) <= 0:  # a kernel distance may be below zero
        return None
    ends = []
    for nfe in (shared[0], shared[-1]):
        change = at[few][nfe] / at[full][nfe] - 1
        ends.append(f"{number(100 * abs(change))} % {'below' if change < 0 else 'above'} it at NFE {nfe}")
    return (
        "**Figure 4** of the paper: with few layer evaluations, models in which 7 of 28 layers iterate are up to 60–75 % below "
        f"those in which all do; with many, the latter win. Here {few} is set against {full}: {' and '.join(ends)}."
    )
