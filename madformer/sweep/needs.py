"""What a cell still needs, and how long that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

from madformer.config import (
    ExperimentConfig,
    ModelConfig,
    load_experiment,
    read_config_hash,
    require_same_weights,
    wanted_outputs,
)
from madformer.config.identity import config_path
from madformer.evaluation.measurement import Measurement, Sampling, network_sha256
from madformer.model import cost
from madformer.progress import read_progress
from madformer.runs.checkpoints import checkpoint_path, checkpoint_step, list_checkpoints
from madformer.runs.folder import progress_path
from madformer.sweep.cells import Cell


@dataclass(frozen=True)
class Needs:
    """The work that is left."""

    training: bool
    """Whether the last checkpoint is missing."""
    budgets: tuple[int, ...]
    """Budgets that were not evaluated in all the ways asked for."""
    points: int
    """Points of the record that are missing."""

    def __bool__(self) -> bool:
        return self.training or bool(self.budgets)

    def __str__(self) -> str:
        if self.training:
            return "to train"
        return f"to evaluate at {', '.join(map(str, self.budgets))}" if self.budgets else "done"


def cell_needs(cell: Cell) -> Needs:
    """What is left to do of a cell.

    Raises:
        InputError: its folder holds a run of another experiment; the message names the first field that differs.
    """
    if not is_trained(cell):
        return Needs(True, cell.budgets, len(cell.samplings) * cell.inference.last)
    points = cell_points(cell)
    missing = Counter(sampling.nfe for step, sampling in _requested(cell) if (step, sampling) not in points)
    return Needs(False, tuple(budget for budget in cell.budgets if missing[budget]), missing.total())


def is_trained(cell: Cell) -> bool:
    """Whether its last checkpoint is there.

    Raises:
        InputError: its folder holds a run of another experiment.
    """
    before = read_config_hash(cell.run)
    if before is None:
        return False
    if before != cell.config_hash:  # also where a version of old lacked a field, with the same weights
        require_same_weights(load_experiment(config_path(cell.run)), cell.config, str(cell.run))
    return checkpoint_path(cell.run, cell.max_steps).is_file()


def cell_points(cell: Cell) -> dict[tuple[int, Sampling], dict[str, Any]]:
    """The evaluations of a trained cell that its sweep requests: checkpoint's step and sampling -> the newest point."""
    from madformer.evaluation.record import read_points

    measurements = {sampling: cell_measurement(cell, sampling) for sampling in cell.samplings}
    requested, found = set(_requested(cell)), {}
    for point in read_points(cell.run):
        measured = Measurement.of_point(point)
        key = point["step"], measured.sampling
        if key in requested and point.get("config_hash") == cell.config_hash and measurements[key[1]].matches(measured):
            found[key] = point
    return found


def cell_measurement(cell: Cell, sampling: Sampling) -> Measurement:
    """What a point of a cell is to be a measurement of, as far as that is known before the evaluation."""
    evaluation = cell.config.evaluation
    networks = tuple((name, network_sha256(name)) for name in evaluation.feature_networks)
    return Measurement(sampling, evaluation.num_samples, networks)


def main_points(cell: Cell) -> dict[int, list[dict[str, Any]]]:
    """Budget -> the points of the first sampler and guidance, over checkpoints and seeds; complete budgets alone."""
    points, main = cell_points(cell), cell.samplings[0].curve_key
    requested: dict[int, list[tuple[int, Sampling]]] = {}
    for step, sampling in _requested(cell):
        if sampling.curve_key == main:
            requested.setdefault(sampling.nfe, []).append((step, sampling))
    return {nfe: [points[key] for key in keys] for nfe, keys in requested.items() if all(key in points for key in keys)}


def main_metrics(cell: Cell) -> dict[int, Mapping[str, float]]:
    """Budget -> the mean metrics of its `main_points`."""
    return {
        nfe: {name: fmean(point["metrics"][name] for point in points) for name in points[0]["metrics"]}
        for nfe, points in main_points(cell).items()
    }


def progress(cell: Cell) -> list[int]:
    """How far a cell is; it rises with all that is not to be done again."""
    checkpoints = list_checkpoints(cell.run)
    parts = sum(1 for _ in (cell.run / "features").glob("*/*"))
    points = len(cell_points(cell)) if checkpoints and is_trained(cell) else 0
    return [checkpoint_step(checkpoints[-1]) if checkpoints else 0, points, parts]


def _requested(cell: Cell) -> list[tuple[int, Sampling]]:
    """All points that a trained cell is to have, by its checkpoint's step and the sampling."""
    steps = [cell.max_steps]
    if cell.inference.checkpoints != "newest":
        steps = [checkpoint_step(path) for path in list_checkpoints(cell.run)[-cell.inference.last :]]
    return [(step, sampling) for sampling in cell.samplings for step in steps]


@dataclass(frozen=True)
class Device:
    """What is assumed of a device where nothing was measured."""

    peak_tflops: float
    """TFLOP/s at best."""
    mfu: float
    """Model FLOPs utilisation: the part of it that training and sampling get."""
    name: str

    @property
    def flops_per_second(self) -> float:
        """What it does."""
        return self.peak_tflops * 1e12 * self.mfu


A100 = Device(312.0, 0.35, "an A100 in bfloat16")
CPU_CORE = Device(0.1, 0.05, "a CPU core")


@dataclass(frozen=True)
class Time:
    """What a cell takes, in seconds of all its devices together."""

    training: float
    evaluation: float
    measured: bool
    """Whether it rests on measured rates alone: the cell's own, or those of others of the sweep."""

    @property
    def total(self) -> float:
        """Both."""
        return self.training + self.evaluation


class Estimates:
    """Times of the cells of one sweep. A cell's own rates come first, then those of the others, then what is assumed."""

    def __init__(self, cells: Sequence[Cell], assumed: Device) -> None:
        self._assumed = assumed
        self._training_rates = {cell.key: rate for cell in cells if (rate := _training_rate(cell))}
        measured = [
            seconds_and_flops for cell in cells if cell.key in self._training_rates for seconds_and_flops in _sampled(cell)
        ]
        seconds, flops = sum(pair[0] for pair in measured), sum(pair[1] for pair in measured)
        self._sampling_rate = flops / seconds if seconds else None
        rates = sorted(self._training_rates.values())
        self._training_rate = rates[len(rates) // 2] if rates else None

    def whole(self, cell: Cell) -> Time:
        """The whole of a cell."""
        return self._time(cell, 1.0, sum(evaluation_flops(cell).values()))

    def left(self, cell: Cell, needs: Needs, step: int = 0) -> Time:
        """What is left of a cell that has made so many training steps."""
        fraction = (1 - step / cell.max_steps) if needs.training else 0.0
        costs = evaluation_flops(cell)
        mean = sum(costs[budget] for budget in needs.budgets) / max(1, len(needs.budgets)) / cell_ways(cell)
        return self._time(cell, fraction, mean * needs.points)

    def _time(self, cell: Cell, trained: float, sampled_flops: float) -> Time:
        training = self._training_rates.get(cell.key) or self._training_rate
        sampling_rate = self._sampling_rate or training
        return Time(
            trained * training_flops(cell.config) / (training or self._assumed.flops_per_second),
            sampled_flops / (sampling_rate or self._assumed.flops_per_second),
            training is not None,
        )


def cell_ways(cell: Cell) -> int:
    """Points of a cell at each budget."""
    return len(cell.samplings) // len(cell.budgets) * cell.inference.last


def device_count(cell: Cell) -> int:
    """Devices of a trial."""
    return (cell.config.trainer.devices or 1) * cell.config.trainer.num_nodes


def training_flops(config: ExperimentConfig) -> float:
    """FLOPs of a whole training."""
    per_image = _training_flops(config.model, wanted_outputs(config.loss), config.diffusion.draws_per_image)
    return float(per_image) * config.data.batch_size * config.trainer.max_steps


def sampling(cell: Cell, guidance: float | None = None) -> dict[int, tuple[float, int]]:
    """Budget -> FLOPs of an image, denoising steps; with the first scale of guidance, or another one."""
    model, guided = cell.config.model, (cell.samplings[0].guidance if guidance is None else guidance) != 1
    steps = {budget: cost.steps_for_nfe(model, budget) for budget in cell.budgets}
    return {budget: (_sampling_flops(model, guided).total(count), count) for budget, count in steps.items()}


def evaluation_flops(cell: Cell) -> dict[int, float]:
    """Budget -> FLOPs of all its points."""
    samples, flops = cell.inference.last * cell.config.evaluation.num_samples, dict.fromkeys(cell.budgets, 0.0)
    costs = {chosen.guidance: sampling(cell, chosen.guidance) for chosen in cell.samplings}
    for chosen in cell.samplings:
        flops[chosen.nfe] += samples * costs[chosen.guidance][chosen.nfe][0]
    return flops


@cache
def parameter_count(model: ModelConfig) -> int:
    """Parameters of a model."""
    return sum(cost.parameters(model).values())


@cache
def _training_flops(model: ModelConfig, wanted: frozenset[str], draws: int) -> int:
    return cost.training_flops(model, wanted, draws).total


@cache
def _sampling_flops(model: ModelConfig, guided: bool) -> cost.SamplingFlops:
    return cost.sampling_flops(model, guided)


def _training_rate(cell: Cell) -> float | None:
    """FLOP/s of one device, as this cell's run has them; None: it has not trained for long."""
    measured = read_progress(progress_path(cell.run)).get("step")
    if not measured or not measured.get("per_second"):
        return None
    return float(measured["per_second"]) * training_flops(cell.config) / cell.max_steps / int(measured.get("devices", 1))


def _sampled(cell: Cell) -> Iterable[tuple[float, float]]:
    """Seconds of devices and FLOPs of each recorded point."""
    for point in cell_points(cell).values():
        if "seconds_spent" in point:
            yield sum(point["seconds_spent"].values()), point["tflops_per_image"] * 1e12 * point["num_samples"]
