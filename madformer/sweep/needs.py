"""What a cell still needs: the training, and the points that its run's record lacks."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from madformer.config import read_config_hash, require_same_run
from madformer.config.evaluation import SHIPPED_NETWORKS
from madformer.config.experiment import has_held_out
from madformer.config.identity import is_run, read_branch_step, run_hash
from madformer.config.validation import expand_path
from madformer.errors import InputError
from madformer.evaluation.measurement import INCEPTION, Measurement, Sampling
from madformer.runs.checkpoints import (
    checkpoint_path,
    checkpoint_step,
    find_flaw,
    list_checkpoints,
    newest_intact,
    regular_checkpoints,
)
from madformer.runs.files import file_checksum
from madformer.sweep.cells import Cell

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Needs:
    """The work that is left."""

    training: bool
    """Whether the last checkpoint is missing."""
    budgets: tuple[int, ...]
    """Budgets that lack a requested point."""
    points: int
    """Points of the record that are missing."""
    tuning: tuple[int, ...] = ()
    """Budgets whose sampling is not tuned, of the first cell of a design."""
    waits: bool = False
    """Whether tuning waits for other seeds of the design, or the training of a branch for its trunk."""
    beginning: str = ""
    """How the training of a branch begins, or what it waits for; empty: it goes on, or begins at the start."""

    def __bool__(self) -> bool:
        """Whether there is work that can start."""
        return not (self.waits or self.is_done)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left, now or later."""
        return not (self.training or self.budgets or self.tuning)

    def __str__(self) -> str:
        if self.training:
            return ", ".join(filter(None, ["to train", self.beginning]))
        if self.budgets:
            return f"to evaluate at {', '.join(map(str, self.budgets))}"
        later = ", when its other seeds are evaluated" if self.waits else ""
        return f"to tune at {', '.join(map(str, self.tuning))}{later}" if self.tuning else "done"


def cell_needs(cell: Cell) -> Needs:
    """What is left to do of a cell.

    Raises:
        InputError: its folder holds a run of another experiment; the message names the first field that differs.
    """
    needs = _run_needs(cell)
    if not needs.is_done or cell.tuned_with is None:
        return needs
    design = [(each, *_tuning_record(each)) for each in (cell, *cell.tuned_with)]
    tuning = tuple(nfe for nfe in cell.budgets if not all(_is_tuned(design, default) for default in cell.defaults(nfe)))
    if tuning and not _has_last_checkpoint(cell):  # what is left needs it
        return _training_needs(cell)
    return replace(needs, tuning=tuning, waits=bool(tuning) and any(map(_is_unfinished, cell.tuned_with)))


def _run_needs(cell: Cell) -> Needs:
    """Training and evaluation that are left."""
    if not is_trained(cell):
        return _training_needs(cell)
    if not _has_last_checkpoint(cell):  # it was deleted to save space
        return Needs(False, (), 0)
    points = cell_points(cell)
    missing = Counter(sampling.nfe for step, sampling in _requested(cell) if (step, sampling) not in points)
    return Needs(False, tuple(budget for budget in cell.budgets if missing[budget]), missing.total())


def _training_needs(cell: Cell) -> Needs:
    first = _first_step(cell)
    return Needs(True, cell.budgets, cell.point_count, waits=first is None, beginning=_beginning(cell, first))


def _first_step(cell: Cell) -> int | None:
    """The step of its trunk's run that a cell's training begins after; 0: it goes on, or begins at the start.

    None: it waits for the trunk to get there. If the trunk has passed it without a checkpoint, an earlier one has to do.
    """
    trunk, limit = cell.trunk, cell.branch_step
    if trunk is None or list_checkpoints(cell.run):
        return 0
    steps = [checkpoint_step(path) for path in list_checkpoints(trunk.run)] if is_run(trunk.run) else []
    if not (is_trained(trunk) or limit in steps or max(steps, default=0) > limit):
        return None
    path = newest_intact(trunk.run, checksums=False, limit=limit)
    return checkpoint_step(path) if path else 0


def _beginning(cell: Cell, step: int | None) -> str:
    if cell.trunk is None or step == 0:
        return ""
    if step is None:
        return f"waits for its trunk, {cell.trunk.name}, to reach step {cell.branch_step}"
    return f"branches from {cell.trunk.name} after step {step}"


def first_step(cell: Cell) -> int:
    """The step of another run that a cell's own training begins, or began, after; 0: at the start."""
    if list_checkpoints(cell.run):
        return read_branch_step(cell.run)
    step = _first_step(cell)
    return cell.branch_step if step is None else step


def own_share(cell: Cell) -> float:
    """The part of a cell's training that is not another run's."""
    return 1 - first_step(cell) / cell.max_steps


def trunk_lines(cells: Sequence[Cell]) -> list[str]:
    """How many steps branches save; no line if there are none."""
    shared = {cell.name: step for cell in cells if (step := first_step(cell))}
    if not shared:
        return []
    trunks = len({cell.trunk.key for cell in cells if cell.trunk is not None and cell.name in shared})
    subject = "1 branch shares" if len(shared) == 1 else f"{len(shared)} branches share"
    total = sum(cell.max_steps for cell in cells)
    own = f"{total - sum(shared.values()):,} of {total:,} steps are trained"
    return [f"{subject} {f'{trunks} trunks' if trunks > 1 else 'a trunk'}: {own}"]


def drop_branch_points(cells: Sequence[Cell], folder: Path) -> None:
    """Remove checkpoints of trunks that are there for branches alone, where all of these are trained.

    Args:
        folder: the sweep's. Checkpoints of runs elsewhere are their owners'.
    """
    points: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        if cell.trunk is not None:
            points.setdefault((cell.trunk.key, cell.branch_step), []).append(cell)
    for (_, step), branches in points.items():
        trunk = branches[0].trunk
        # A branch has the checkpoints that the sweep names itself.
        is_wanted = step in branches[0].config.trainer.checkpoint_steps
        if trunk is None or is_wanted or trunk.run.parent != folder or trunk.config.trainer.saves_regularly(step):
            continue
        path = checkpoint_path(trunk.run, step)
        with contextlib.suppress(InputError, OSError):  # such a cell reports it itself
            if path.is_file() and all(map(is_trained, branches)) and newest_intact(trunk.run, checksums=False) != path:
                path.unlink()


def drop_torn(cell: Cell) -> bool:
    """Remove torn checkpoints that a trained cell's points need, and the later ones, if there are any: whether it did.

    Training goes on from the one before and makes the same ones again.
    """
    paths = (checkpoint_path(cell.run, step) for step in sorted({step for step, _ in _requested(cell)}))
    torn = next((path for path in paths if path.is_file() and find_flaw(path)), None)
    if torn is not None:
        file_checksum(torn)  # raises OSError if it is the disk that fails: then nothing is removed
    for path in list_checkpoints(cell.run):
        if torn is not None and path >= torn:
            _log.warning("%s is removed: %s is torn; it is trained again", path, torn)
            path.unlink()
    return torn is not None


def _is_unfinished(cell: Cell) -> bool:
    try:
        return not _run_needs(cell).is_done
    except (InputError, OSError):  # it is reported as its own cell
        return True


def _tuning_record(cell: Cell) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The choices in the record of a cell's run, and its tuned points."""
    from madformer.evaluation.record import read_choices, read_points

    return read_choices(cell.run), [point for point in read_points(cell.run) if point.get("tuned")]


def _is_tuned(design: Sequence[tuple[Cell, list[dict[str, Any]], list[dict[str, Any]]]], default: Sampling) -> bool:
    """Whether all runs of a design share a choice, and have its points with today's networks and held-out images."""
    from madformer.evaluation.record import known_choice

    shared: Sampling | None = None
    for cell, lines, points in design:
        line = known_choice(lines, cell.config, default, cell.inference.tries, cell.max_steps)
        if line is None or (shared is not None and Sampling.of_choice(line) != shared):
            return False
        shared = Sampling.of_choice(line)
        if None in _points_of_choice(cell, line, points):
            return False
    return True


def _points_of_choice(cell: Cell, line: dict[str, Any], points: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """The tuned points that a choice asks for, one for each of its seeds; None: it is not there."""
    wanted = [cell_measurement(cell, replace(Sampling.of_choice(line), seed=seed)) for seed in line["seeds"]]
    measured = [(Measurement.of_point(point), point) for point in points]
    return [next((point for found, point in measured if each.matches(found)), None) for each in wanted]


def tuned_points(cell: Cell, default: Sampling) -> list[dict[str, Any]] | None:
    """A cell's points as tuned at a budget and depth, over evaluation seeds; None: it is not tuned, or not all are there."""
    from madformer.evaluation.record import known_choice

    lines, points = _tuning_record(cell)
    line = known_choice(lines, cell.config, default, cell.inference.tries, cell.max_steps)
    found = [None] if line is None else _points_of_choice(cell, line, points)
    return [point for point in found if point is not None] if None not in found else None


def is_trained(cell: Cell) -> bool:
    """Whether its last checkpoint exists, or was deleted after all requested points were recorded.

    Raises:
        InputError: its folder holds a run of another experiment.
    """
    before = read_config_hash(cell.run)
    if before is None:
        return False
    if before != cell.config_hash:  # a run of an older version may lack a field and have the same weights
        require_same_run(cell.config)
    return _has_last_checkpoint(cell) or len(cell_points(cell)) == cell.point_count


def _has_last_checkpoint(cell: Cell) -> bool:
    return checkpoint_path(cell.run, cell.max_steps).is_file()


def cell_points(cell: Cell) -> dict[tuple[int, Sampling], dict[str, Any]]:
    """The evaluations of a trained cell that its sweep requests: checkpoint's step and sampling -> the newest point."""
    from madformer.evaluation.record import read_points

    points, found = read_points(cell.run), {}
    if not points:
        return {}
    measurement = cell_measurement(cell, cell.samplings[0])
    measurements = {sampling: replace(measurement, sampling=sampling) for sampling in cell.samplings}
    requested, own_hash = set(_requested(cell)), run_hash(cell.config)  # another one than the cell's of the same weights
    for point in points:
        measured = Measurement.of_point(point)
        key = point["step"], measured.sampling
        if key in requested and point.get("config_hash") == own_hash and measurements[key[1]].matches(measured):
            found[key] = point
    return found


def cell_measurement(cell: Cell, sampling: Sampling) -> Measurement:
    """What a point of a cell is to be a measurement of, as far as that is known before the evaluation."""
    evaluation = cell.config.evaluation
    # A search's study has the numbers of its trials for good: networks count by name, held-out images do not count.
    known = {name: None if cell.is_of_search else network_sha256(name) for name in evaluation.feature_networks}
    held_out = None if cell.is_of_search else has_held_out(cell.config)
    return Measurement(sampling, evaluation.num_samples, tuple(known.items()), held_out=held_out)


def main_points(cell: Cell) -> dict[int, list[dict[str, Any]]]:
    """Budget -> the points of the first sampler and guidance, over checkpoints and seeds; complete budgets alone."""
    points, main = cell_points(cell), cell.samplings[0].curve_key
    requested: dict[int, list[tuple[int, Sampling]]] = {}
    for step, sampling in _requested(cell):
        if sampling.curve_key == main:
            requested.setdefault(sampling.nfe, []).append((step, sampling))
    return {nfe: [points[key] for key in keys] for nfe, keys in requested.items() if all(key in points for key in keys)}


def main_metrics(cell: Cell) -> dict[int, Mapping[str, float]]:
    """Budget -> the mean metrics of its `main_points`: those that all of them have."""
    return {
        nfe: {
            name: fmean(point["metrics"][name] for point in points)
            for name in points[0]["metrics"]
            if all(name in point["metrics"] for point in points)
        }
        for nfe, points in main_points(cell).items()
    }


def cell_progress(cell: Cell) -> list[int]:
    """How far a cell is: newest checkpoint, points, parts of an evaluation, tries of tuning. It rises with all work kept."""
    from madformer.evaluation.record import read_points

    checkpoints = list_checkpoints(cell.run)
    parts = sum(1 for _ in (cell.run / "features").glob("*/*"))
    points = len(cell_points(cell)) if checkpoints and is_trained(cell) else 0
    tried = sum(len(read_points(each.run, "candidate")) for each in (cell, *(cell.tuned_with or ())))
    return [checkpoint_step(checkpoints[-1]) if checkpoints else 0, points, parts, tried]


def _requested(cell: Cell) -> list[tuple[int, Sampling]]:
    """All points that a trained cell must have, by its checkpoint's step and the sampling.

    If its checkpoints were deleted, the last ones that were evaluated count instead.
    """
    from madformer.evaluation.record import read_points

    steps = [cell.max_steps]
    if cell.inference.checkpoints != "newest":
        steps = [checkpoint_step(path) for path in regular_checkpoints(cell.config)]
        if not _has_last_checkpoint(cell):
            own_hash = run_hash(cell.config)
            evaluated = {point["step"] for point in read_points(cell.run) if point.get("config_hash") == own_hash}
            steps = sorted(evaluated) if cell.max_steps in evaluated else []
        steps = steps[-cell.inference.last :]
    return [(step, sampling) for sampling in cell.samplings for step in steps]


def network_sha256(name: str) -> str | None:
    """The SHA-256 of a feature network that lies on this machine; None: it is the hub's, or it cannot be built here.

    It tells before any evaluation whether a network's code or weights have changed.
    """
    if name in SHIPPED_NETWORKS:
        return SHIPPED_NETWORKS[name]
    kind, _, location = name.partition(":")
    published = kind in (INCEPTION, "torchscript", "hf")
    file = location if published else _source_file(name.rpartition(":")[0])
    if not file or not (path := Path(expand_path("evaluation.feature_networks", file))).exists():
        return None
    state = path.stat()
    return _built_sha256(name, (state.st_mtime_ns, state.st_size))


def _source_file(place: str) -> str:
    """The file of a custom network's class: that of a module, or the file itself."""
    if place.endswith(".py"):
        return place
    try:
        spec = find_spec(place)
    except Exception:  # other people's code
        spec = None
    return (spec and spec.origin) or ""


@lru_cache(maxsize=64)
def _built_sha256(name: str, state: tuple[int, int]) -> str | None:
    """Built twice, to see whether its weights repeat, and only once for each state of its file: it takes seconds."""
    from madformer.evaluation.feature_networks import build_feature_network
    from madformer.lookup import first_line

    sys.modules.pop(name.rpartition(":")[0], None)  # a module that has changed is read again
    try:
        hashes = {build_feature_network(name).sha256 for _ in range(2)}
    except Exception as error:  # other people's code
        _log.warning("%s cannot be built here (%s): recorded points are compared by its name", name, first_line(error))
        return None
    return hashes.pop() if len(hashes) == 1 else None  # other weights each time: only its name can be compared
