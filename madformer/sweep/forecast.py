"""The FLOPs, memory and time of a sweep's cells, and the lines of `madformer sweep plan`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from madformer.config import ExperimentConfig, ModelConfig, wanted_outputs
from madformer.errors import ConfigError
from madformer.evaluation.measurement import DEPTH, Sampling
from madformer.model import cost, memory
from madformer.parallel import PEAK_TFLOPS
from madformer.progress import TextTable, format_duration, read_progress, with_unit
from madformer.runs.checkpoints import checkpoint_step, list_checkpoints
from madformer.runs.files import progress_path
from madformer.sweep.cells import Cell
from madformer.sweep.launch_local import gpu_memory_gib
from madformer.sweep.needs import Needs, cell_measurement, cell_points, first_step, own_share, trunk_lines
from madformer.sweep.spec import Sweep


@dataclass(frozen=True)
class Device:
    """An assumed device, for times where nothing was measured."""

    peak_tflops: float
    """Peak rate in TFLOP/s."""
    mfu: float
    """Model FLOPs utilisation: the share of the peak rate that training and sampling reach."""
    name: str

    @property
    def flops_per_second(self) -> float:
        """The rate that training and sampling reach."""
        return self.peak_tflops * 1e12 * self.mfu


A100 = Device(PEAK_TFLOPS["A100"][0], 0.35, "an A100 in bfloat16")
CPU_CORE = Device(0.1, 0.05, "a CPU core")

_ASSUMED_GIB = 80.0
"""Memory of an A100."""


@dataclass(frozen=True)
class Time:
    """The time of a cell, in seconds of all its devices together."""

    training: float
    evaluation: float
    is_measured: bool
    """Whether only measured rates were used: the cell's own, or those of the sweep's other cells."""

    @property
    def total(self) -> float:
        """Training and evaluation together, in device seconds."""
        return self.training + self.evaluation


class Estimates:
    """Times of a sweep's cells, by the cell's measured rates, else those of other cells, else those of the assumed device."""

    def __init__(self, cells: Sequence[Cell], device: Device) -> None:
        self._device = device
        self._training_rates = {cell.key: rate for cell in cells if (rate := _training_rate(cell))}
        samplings = [sampling for cell in cells if cell.key in self._training_rates for sampling in _measured_samplings(cell)]
        seconds, flops = sum(sampling[0] for sampling in samplings), sum(sampling[1] for sampling in samplings)
        self._sampling_rate = flops / seconds if seconds else None
        rates = sorted(self._training_rates.values())
        self._median_rate = rates[len(rates) // 2] if rates else None

    def cell_time(self, cell: Cell) -> Time:
        """The whole time of a cell, from its start to its end."""
        return self._time(cell, own_share(cell), sum(evaluation_flops(cell).values()) + sum(tuning_flops(cell).values()))

    def remaining_time(self, cell: Cell, needs: Needs, step: int = 0) -> Time:
        """The time that a cell still needs.

        Args:
            needs: the training, points and tuning that it lacks.
            step: training steps that are done.
        """
        fraction = (1 - max(step, first_step(cell)) / cell.max_steps) if needs.training else 0.0
        costs = evaluation_flops(cell)
        point = sum(costs[budget] for budget in needs.budgets) / max(1, len(needs.budgets)) * len(costs) / cell.point_count
        tuning = tuning_flops(cell)
        budgets = cell.budgets if needs.training or needs.budgets else needs.tuning
        return self._time(cell, fraction, point * needs.points + sum(tuning[budget] for budget in budgets))

    def _time(self, cell: Cell, training_fraction: float, sampling_flops: float) -> Time:
        training_rate = self._training_rates.get(cell.key) or self._median_rate
        sampling_rate = self._sampling_rate or training_rate
        return Time(
            training_fraction * training_flops(cell.config) / (training_rate or self._device.flops_per_second),
            sampling_flops / (sampling_rate or self._device.flops_per_second),
            training_rate is not None,
        )


def _training_rate(cell: Cell) -> float | None:
    """Measured FLOP/s of one device in training; None: the cell has not trained for long."""
    measured = read_progress(progress_path(cell.run)).get("step")
    if not measured or not measured.get("per_second"):
        return None
    return float(measured["per_second"]) * training_flops(cell.config) / cell.max_steps / int(measured.get("devices", 1))


def _measured_samplings(cell: Cell) -> Iterator[tuple[float, float]]:
    """Device seconds and FLOPs of each recorded point."""
    for point in cell_points(cell).values():
        if "seconds_spent" in point:
            yield sum(point["seconds_spent"].values()), point["tflops_per_image"] * 1e12 * point["num_samples"]


@cache
def parameter_count(model: ModelConfig) -> int:
    """Number of parameters of a model, cached."""
    return sum(cost.parameters(model).values())


def training_flops(config: ExperimentConfig) -> float:
    """FLOPs of a whole training, from the first step to the last."""
    per_image = _training_flops(config.model, wanted_outputs(config.loss), config.diffusion.draws_per_image)
    return float(per_image) * config.data.batch_size * config.trainer.max_steps


def image_flops(cell: Cell, sampling: Sampling) -> float:
    """FLOPs of one sampled image."""
    return _sampling_flops(cell.config.model.at_depth(sampling.diffusion_depth), sampling.guidance != 1).total(sampling.steps)


def evaluation_flops(cell: Cell) -> dict[int, float]:
    """Budget -> FLOPs of all its points."""
    images, flops = cell.inference.last * cell.config.evaluation.num_samples, dict.fromkeys(cell.budgets, 0.0)
    for sampling in cell.samplings:
        flops[sampling.nfe] += images * image_flops(cell, sampling)
    return flops


def tuning_flops(cell: Cell) -> dict[int, float]:
    """Budget -> the most FLOPs that tuning the cell's design takes; zero for all but the first cell of a design."""
    from madformer.evaluation.record import confirmation_seeds, search_samples

    runs, count = 0 if cell.tuned_with is None else 1 + len(cell.tuned_with), cell.config.evaluation.num_samples
    images = runs * (cell.inference.tries * search_samples(count) + 2 * len(confirmation_seeds(runs)) * count)
    return {nfe: images * sum(image_flops(cell, default) for default in cell.defaults(nfe)) for nfe in cell.budgets}


@cache
def _training_flops(model: ModelConfig, outputs: frozenset[str], draws: int) -> int:
    return cost.training_flops(model, outputs, draws).total


@cache
def _sampling_flops(model: ModelConfig, guided: bool) -> cost.SamplingFlops:
    return cost.sampling_flops(model, guided)


def assumed_device(sweep: Sweep, tflops: float | None, mfu: float | None) -> Device:
    """The device to assume where nothing was measured.

    Args:
        tflops: the user's peak rate in TFLOP/s; None: that of an A100 or a CPU core.
        mfu: the user's model FLOPs utilisation; None: the default.
    """
    device = CPU_CORE if sweep.accelerator == "cpu" else A100
    if tflops is None and mfu is None:
        return device
    return Device(tflops or device.peak_tflops, mfu or device.mfu, device.name if tflops is None else "the device named")


def plan_table(sweep: Sweep, cells: Sequence[Cell], needs: Sequence[Needs], estimates: Estimates) -> TextTable:
    """A table with a row for each cell: its size, a GPU's memory in training, FLOPs of training and per image, time, state.

    Args:
        needs: for each cell the work that it lacks.
        estimates: times of these cells.
    """
    budgets = sorted({nfe for cell in cells for nfe in cell.budgets})
    on_gpus = sweep.accelerator != "cpu"
    headings = ["cell", "parameters", *(["memory"] if on_gpus else []), "training FLOPs"]
    headings += [*(f"NFE {nfe}" for nfe in budgets), hours_unit(sweep), "state"]
    table = TextTable(f"{sweep.name}: {sweep.experiment}", headings, frozenset(("cell", "state")))
    for cell, need in zip(cells, needs, strict=True):
        by_depth: dict[str, dict[int, str]] = {}
        for sampling in cell.main_samplings:
            text = f"{with_unit(image_flops(cell, sampling))} ({sampling.steps} steps)"
            by_depth.setdefault(sampling.texts[DEPTH], {})[sampling.nfe] = text
        row = [cell.name, with_unit(parameter_count(cell.config.model))]
        row += [
            *([f"{_needed_gib(cell):.0f} GiB"] if on_gpus else []),
            with_unit(own_share(cell) * training_flops(cell.config)),
        ]
        ends = [f"{estimates.cell_time(cell).total / 3600:.3g}", _state(need)]
        for depth, costs in by_depth.items():
            row[0] = f"{cell.name} {depth}" if depth else cell.name
            table.rows.append([*row, *(costs.get(nfe, "skipped" if nfe in cell.skipped else "") for nfe in budgets), *ends])
            row, ends = [""] * len(row), ["", ""]  # rows of further depths leave these columns empty
    return table


def skipped_budgets(cells: Sequence[Cell]) -> list[str]:
    """A line for each reason why budgets are skipped, with the cells that skip them."""
    names: dict[str, list[str]] = {}
    for cell in cells:
        for budget, reason in cell.skipped.items():
            names.setdefault(f"NFE {budget}: {reason}", []).append(cell.name)
    return [f"skipped, {reason}: {_first_names(cells_of_reason)}" for reason, cells_of_reason in names.items()]


def memory_lines(cells: dict[str, Cell], accelerator: str, memory_gib: float | None) -> list[str]:
    """Lines on the cells that do not fit or may not fit a device, by the check that `madformer train` makes.

    Args:
        cells: cells by name.
        accelerator: `trainer.accelerator`.
        memory_gib: memory of a device; None: no line.
    """
    if memory_gib is None:
        return []
    if accelerator == "cpu":
        return ["The cells run on the CPU: --memory is for GPUs."]
    names: dict[str, list[str]] = {}
    for name, cell in cells.items():
        capacity = int(memory_gib * memory.GIB)
        try:
            problem = memory.check_memory(cell.config, cell.device_count, capacity, "a device")
            verdict = "may not fit"
        except ConfigError as error:
            problem, verdict = str(error), "refused"
        if problem:
            names.setdefault(f"{verdict}: {problem}", []).append(name)
    lines = [f"{_first_names(cells_of_problem)}: {problem}" for problem, cells_of_problem in names.items()]
    return lines or [f"All cells fit into {memory_gib:g} GiB, by an estimate."]


def _needed_gib(cell: Cell, also_sampling: bool = False) -> float:
    """Estimated memory of each device in training, or the larger of training and sampling."""
    needed = memory.device_memory(cell.config, cell.device_count).total
    if also_sampling:
        guided = any(sampling.guidance != 1 for sampling in cell.samplings)
        needed = max(needed, memory.sampling_memory(cell.config, guided))
    return needed / memory.GIB


def fitting_trials(cells: Sequence[Cell], gib: float) -> tuple[int, str]:
    """The number of trials that fit one device of `gib` GiB, each with a CUDA context of its own, and a sentence about it."""
    needed = max(_needed_gib(cell, also_sampling=True) for cell in cells)
    count = int(gib / needed)
    trials = f"{count} {'trial' if count == 1 else 'trials'}"
    return count, f"{trials} would fit one device ({needed:.1f} GiB each of {gib:.1f} GiB, an estimate)"


def sharing_line(sweep: Sweep, cells: Sequence[Cell], memory_gib: float | None) -> list[str]:
    """A line on the number of trials that could share a GPU; no line on the CPU, on Slurm or with several GPUs for a trial.

    Args:
        memory_gib: memory of the GPU; None: that of this machine's, else of an A100.
    """
    if sweep.accelerator == "cpu" or sweep.launcher != "local" or sweep.devices_per_trial > 1:
        return []
    gib, wanted = memory_gib or gpu_memory_gib(), sweep.trials_per_device
    count, text = fitting_trials(cells, gib or _ASSUMED_GIB)
    source = "" if gib else "; such a GPU is assumed, set --memory"
    if wanted > max(1, count):
        return [f"trials_per_device = {wanted} is refused: {text}{source}"]
    return [f"{text}{f': trials_per_device: {count} at most' if count > 1 else ''}{source}"]


def hours_line(sweep: Sweep, hours: float) -> list[str]:
    """A line that converts trial-hours to GPU-hours if trials share GPUs, else no line."""
    if (count := sweep.trials_per_device) == 1:
        return []
    return [f"{count} trials share a GPU: {hours:.3g} trial-hours take {hours / count:.3g} GPU-hours or more."]


def total_lines(sweep: Sweep, cells: Sequence[Cell], needs: Sequence[Needs], estimates: Estimates, device: Device) -> list[str]:
    """Lines with the cells by state, all FLOPs and hours, and the remaining hours.

    Args:
        needs: for each cell the work that it lacks.
        estimates: times of these cells.
        device: the one assumed where nothing was measured.
    """
    training = sum(own_share(cell) * training_flops(cell.config) for cell in cells)
    evaluation = sum(sum(evaluation_flops(cell).values()) for cell in cells)
    tuning = sum(sum(tuning_flops(cell).values()) for cell in cells)
    times = [estimates.cell_time(cell) for cell in cells]
    remaining = sum(
        estimates.remaining_time(cell, need, _newest_step(cell)).total for cell, need in zip(cells, needs, strict=True)
    )
    longest = max(time.total / cell.device_count for time, cell in zip(times, cells, strict=True))
    counts = {"to train": 0, "to evaluate": 0, **({"to tune": 0} if sweep.evaluate.tune else {}), "done": 0}
    for need in needs:
        counts[_state(need)] += 1
    hours, unit = sum(time.total for time in times) / 3600, hours_unit(sweep)
    return [
        f"{len(cells)} cells: {', '.join(f'{count} {state}' for state, count in counts.items())}. "
        f"Training {with_unit(training)}FLOPs, evaluation {with_unit(evaluation)}FLOPs"
        f"{f', tuning {with_unit(tuning)}FLOPs' if tuning else ''}. Under NFE: FLOPs per image.",
        f"{hours:.3g} {unit}, of which {remaining / 3600:.3g} are left; the longest trial takes {format_duration(longest)} "
        f"on {cells[0].device_count} {'process' if sweep.accelerator == 'cpu' else 'GPU'}(s).",
        *hours_line(sweep, hours),
        *trunk_lines(cells),
        basis(all(time.is_measured for time in times), device),
    ]


def _state(needs: Needs) -> str:
    return "to train" if needs.training else "to evaluate" if needs.budgets else "to tune" if needs.tuning else "done"


def _newest_step(cell: Cell) -> int:
    return max(map(checkpoint_step, list_checkpoints(cell.run)), default=0)


def basis(is_measured: bool, device: Device) -> str:
    """A sentence on whether the times are measured or assumed."""
    if is_measured:
        return "Times by measured rates: each run's own, or those of the others."
    return f"Times assume {device.peak_tflops:g} TFLOP/s ({device.name}) at an MFU of {device.mfu:.0%}: --tflops, --mfu."


def hours_unit(sweep: Sweep) -> str:
    """The unit of the sweep's times."""
    return "CPU-hours" if sweep.accelerator == "cpu" else "trial-hours" if sweep.trials_per_device > 1 else "GPU-hours"


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Suite:
    """Adds up the costs of several sweeps. A model or point that sweeps share counts once."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._models: dict[str, Cell] = {}
        self._points: set[tuple[object, ...]] = set()
        self._cells, self._training, self._evaluation, self._hours = 0, 0.0, 0.0, 0.0
        self.is_measured = True
        """Whether all times so far come from measured rates."""

    def add(self, cells: Sequence[Cell]) -> list[str]:
        """Count a sweep, and return the columns of its row."""
        estimates, new_models = Estimates(cells, self._device), []
        training = evaluation = seconds = 0.0
        for cell in cells:
            time, costs = estimates.cell_time(cell), _point_costs(cell)
            costs |= {(cell.key, "tuning", nfe): flops for nfe, flops in tuning_flops(cell).items()}
            self.is_measured &= time.is_measured
            new_flops = sum(flops for point, flops in costs.items() if point not in self._points)
            self._points |= costs.keys()
            evaluation += new_flops
            seconds += time.evaluation * new_flops / (sum(costs.values()) or 1.0)
            if cell.config_hash not in self._models:
                self._models[cell.config_hash] = cell
                new_models.append(cell)
                training += own_share(cell) * training_flops(cell.config)
                seconds += time.training
        self._cells, self._hours = self._cells + len(cells), self._hours + seconds / 3600
        self._training, self._evaluation = self._training + training, self._evaluation + evaluation
        return _columns(len(cells), new_models, training, evaluation, seconds / 3600)

    def total(self) -> list[str]:
        """The columns of the sum."""
        return _columns(self._cells, list(self._models.values()), self._training, self._evaluation, self._hours)


def _point_costs(cell: Cell) -> dict[tuple[object, ...], float]:
    """FLOPs of each point of a cell, by a key that equal measurements share.

    Checkpoints are numbered from the newest, as their steps are not known before there is a run.
    """
    images = cell.config.evaluation.num_samples
    return {
        (cell.config_hash, checkpoint, sampling.nfe, cell_measurement(cell, sampling).key): images * image_flops(cell, sampling)
        for sampling in cell.samplings
        for checkpoint in range(cell.inference.last)
    }


def _columns(cells: int, models: Sequence[Cell], training: float, evaluation: float, hours: float) -> list[str]:
    sizes = sorted({parameter_count(cell.config.model) for cell in models})
    size_range = " – ".join(dict.fromkeys(with_unit(size) for size in (sizes[0], sizes[-1]))) if sizes else ""
    time = f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
    return [str(cells), str(len(models)), size_range, with_unit(training), with_unit(evaluation), time]
