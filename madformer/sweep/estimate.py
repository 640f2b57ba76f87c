"""What cells cost in time: measured where something was, else by FLOPs and a share of a device's peak that is assumed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from madformer.config import ExperimentConfig, ModelConfig, wanted_outputs
from madformer.model import cost
from madformer.progress import read_progress
from madformer.run import progress_path
from madformer.sweep.cells import Cell
from madformer.sweep.needs import Needs, cell_points


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
    return len(cell.samplers) * len(cell.guidances) * len(cell.sampling_seeds) * cell.inference.last


def device_count(cell: Cell) -> int:
    """Devices of a trial."""
    return (cell.config.trainer.devices or 1) * cell.config.trainer.num_nodes


def training_flops(config: ExperimentConfig) -> float:
    """FLOPs of a whole training."""
    per_image = _training_flops(config.model, wanted_outputs(config.loss), config.diffusion.draws_per_image)
    return float(per_image) * config.data.batch_size * config.trainer.max_steps


def sampling(cell: Cell, guidance: float | None = None) -> dict[int, tuple[float, int]]:
    """Budget -> FLOPs of an image, denoising steps; with the first scale of guidance, or another one."""
    model, guided = cell.config.model, (cell.guidances[0] if guidance is None else guidance) != 1
    steps = {budget: cost.steps_for_nfe(model, budget) for budget in cell.budgets}
    return {budget: (_sampling_flops(model, guided).total(count), count) for budget, count in steps.items()}


def evaluation_flops(cell: Cell) -> dict[int, float]:
    """Budget -> FLOPs of all its points."""
    each = cell_ways(cell) // len(cell.guidances) * cell.config.evaluation.num_samples
    costs = [sampling(cell, guidance) for guidance in cell.guidances]
    return {budget: each * sum(cost[budget][0] for cost in costs) for budget in cell.budgets}


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
