"""`madformer evaluate`: sample from a run's checkpoints, compute the metrics and record them."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from madformer import __version__
from madformer.config import ExperimentConfig, trained_fields
from madformer.config.evaluation import parse_interval
from madformer.config.experiment import has_held_out, names_held_out
from madformer.config.loading import is_optional
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.diffusion.samplers import spaced_timesteps
from madformer.errors import NonFiniteError, printable
from madformer.evaluation.diagnostics import denoising_warnings, diagnose
from madformer.evaluation.feature_cache import (
    BLOCKS,
    INDICES,
    MEMORY,
    PHASES,
    SIZES,
    WARM,
    SampleRequest,
    features_name,
    logits_name,
    read_indices,
    read_parts,
    remove_parts,
    sample_features,
)
from madformer.evaluation.held_out import describe_held_out, require_held_out
from madformer.evaluation.measurement import AXES, DEFAULTS, DEPTH, Measurement, Sampling
from madformer.evaluation.metrics import measure
from madformer.evaluation.record import SHARED, append_point, find_point, read_diagnostics, read_means, read_points
from madformer.evaluation.request import EvaluationRequest
from madformer.evaluation.sampling import inference_devices, keeping_sampler, load_for_sampling
from madformer.evaluation.tasks import Instruments, Task, complete_tasks, make_tasks
from madformer.evaluation.tensorboard import write_curves
from madformer.model import cost
from madformer.parallel import Share, cluster_rank, device_name, own_device, share_out
from madformer.progress import ProgressDisplay, ProgressFile
from madformer.runs.checkpoints import load_model
from madformer.runs.files import claim_folder, hold_lock, progress_path

__all__ = ["evaluate"]

_log = logging.getLogger(__name__)

Point = dict[str, Any]

IMAGES_LOOKED_AT = 256
"""Most held-out images for the diagnostics."""


def evaluate(request: EvaluationRequest) -> list[Point]:
    """Measure each requested combination of checkpoint, sampler, guidance, seed and budget that is not recorded yet.

    After an interruption, only samples without stored features are made again.

    Returns:
        The requested points as recorded. Some are missing while other processes are still at work.

    Raises:
        ConfigError: a feature network, codec or tokenizer is not available, or there are no reference images.
        InputError: the checkpoint is torn or of another model, the references are of other images, or another process evaluates
            the run.
        NonFiniteError: the model's samples are not finite.
    """
    config, rank = request.config, cluster_rank()
    run, devices = config.run_dir, inference_devices(config, request.devices)
    device = own_device(devices)
    with claim_folder(run, "evaluate", rank or 0):
        instruments: Instruments | None
        instruments, tasks = prepare(request, device, silent=bool(rank) or request.kind == "candidate")
        missing: dict[Path, Task] = {}
        for task in tasks:
            if not _report_recorded(task):
                missing.setdefault(task.folder, task)  # budgets with the same number of steps have the same samples
        if missing:
            alone = len(devices) == 1 or rank is not None
            if not alone:  # each process opens its own
                instruments = None
                torch.cuda.empty_cache()
            before = sum(len(_sampled(task)) for task in missing.values())
            total = sum(task.described["num_samples"] for task in missing.values())
            file = ProgressFile(progress_path(run), {"device": device_name(torch.device(devices[0]))})
            with ProgressDisplay("sampled", "images", total, before, silent=bool(rank), file=file) as display:
                share_out(evaluate_share, (request, list(missing.values()), instruments), devices, display, before)
        with hold_lock(run / ".record.lock"):
            return _conclude(request, tasks, torch.device(device))


def prepare(request: EvaluationRequest, device: str, silent: bool = False) -> tuple[Instruments, list[Task]]:
    """Open and check everything before the first sample. Cheap checks come before the costly references.

    Args:
        device: where this process computes.
        silent: give no warnings.
    """
    config, instruments = request.config, Instruments.open(request, device)
    tasks = make_tasks(request, instruments)
    if names_held_out(config.evaluation) and not has_held_out(config) and not silent:
        shared = "evaluation.held_out_split shares images with data.split: no distances to held-out images"
        remedy = "name others (evaluation.held_out_source=FILE), or train on train[:90%%] and hold out train[90%%:]"
        _log.warning(f"%s: %s; {remedy}", config.run_dir, shared)
    if request.diagnostics or has_held_out(config):
        require_held_out(config)
    instruments = instruments.with_references(request)
    return instruments, complete_tasks(tasks, instruments, silent)


def evaluate_share(
    share: Share, request: EvaluationRequest, tasks: Sequence[Task], instruments: Instruments | None = None
) -> None:
    """Sample every `world_size`-th image of each task; the process that completes a task measures and records it.

    Args:
        tasks: the same list in all processes.
        instruments: this process's instruments; None: open them.
    """
    opened = instruments or Instruments.open(request, share.device).with_references(request)
    done, path, model, make_sampler = 0, None, None, keeping_sampler()
    for task in tasks:
        if task.checkpoint != path or model is None:
            path, model, make_sampler = task.checkpoint, None, keeping_sampler()  # free the old model first
            model = load_for_sampling(path, request.config, task.sampling.weights, share.device)
        earlier, indices = done, range(share.rank, task.described["num_samples"], share.world_size)

        def show(count: int, earlier: int = earlier) -> None:
            nonlocal done
            done = earlier + count
            share.count(done)

        samples = SampleRequest(task.config, task.sampling, task.prompts, task.title)
        sample_features(task.folder, samples, model, opened.codec, opened.networks, indices, show, make_sampler)
        with hold_lock(task.config.run_dir / ".record.lock"):
            _measure_if_complete(task, opened, share)


def _measure_if_complete(task: Task, instruments: Instruments, share: Share) -> None:
    run, count = task.config.run_dir, task.described["num_samples"]
    if find_point(read_points(run, task.described["kind"]), task.measurement) or len(_sampled(task)) < count:
        return
    parts = list(read_parts(task.folder))
    before, metrics = time.perf_counter(), dict[str, float]()
    for number, (network, reference) in enumerate(zip(instruments.networks, instruments.references, strict=True)):
        features_ND = _in_order(parts, features_name(number), count)
        logits_NK = _in_order(parts, logits_name(number), count) if logits_name(number) in parts[0] else None
        held_out = instruments.held_out[number] if instruments.held_out else None
        metrics |= measure(network.label, features_ND.to(share.device), logits_NK, reference, held_out)
    seconds = {phase: float(sum(part[phase].sum() for part in parts)) for phase in PHASES}
    seconds["statistics"] = time.perf_counter() - before
    point = {
        **task.described,
        "nfe_actual": cost.nfe(task.config.model, task.sampling.steps),
        "metrics": metrics,
        **_costs(task, parts),
        "seconds": seconds["sampling"],
        "seconds_spent": seconds,
        "processes": share.world_size,
        "device": device_name(torch.device(share.device)),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "time": _now(),
    }
    try:
        append_point(run, point)
    except ValueError as error:
        raise NonFiniteError(f"{task.title}: {error}") from error
    remove_parts(task.folder)
    if task.described["kind"] == "point":
        _report(task, point)


def _sampled(task: Task) -> set[int]:
    """The task's samples whose features are stored."""
    return {index for index in read_indices(task.folder) if index < task.described["num_samples"]}


def _in_order(parts: Sequence[dict[str, Tensor]], name: str, count: int) -> Tensor:
    """Rows of the first `count` samples, gathered from all parts in order. A sample made by two processes counts once."""
    rows, indices_N = (torch.cat([part[key] for part in parts]) for key in (name, INDICES))
    ordered = rows.new_empty(count, *rows.shape[1:])
    ordered[indices_N[indices_N < count]] = rows[indices_N < count]
    return ordered


def _costs(task: Task, parts: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Costs per image: medians over batches of the largest size. A process's first batch counts only if there is no other."""
    columns = ("sampling", BLOCKS, SIZES, WARM, MEMORY)
    sampling_K, blocks_KL, sizes_K, warm_K, memory_K = (torch.cat([part[name] for part in parts]) for name in columns)
    chosen_K = sizes_K == sizes_K.max()
    if (chosen_K & warm_K).any():
        chosen_K &= warm_K
    # A batch's memory shows at its first call, since CUDA graphs allocate nothing.
    size, memory = int(sizes_K.max()), float(memory_K[sizes_K == sizes_K.max()].max())
    return {
        "tflops_per_image": _flops(task) / 1e12,
        "seconds_per_image": float(sampling_K[chosen_K].median()) / size,
        "seconds_per_block": (blocks_KL[chosen_K].median(dim=0).values / size).tolist(),
        "peak_memory_gib": memory if math.isfinite(memory) else None,
        "batch_size": size,
    }


def _flops(task: Task) -> int:
    """FLOPs of an image. Steps outside the guidance interval run only the prompted half of the batch."""
    sampling, config = task.sampling, task.config
    plain, guided = (cost.sampling_flops(config.model, guidance=guidance) for guidance in (False, sampling.guidance != 1))
    interval, unguided = parse_interval(sampling.guidance_interval), 0
    if interval is not None:
        schedule = NoiseSchedule(config.diffusion).alphas_cumprod
        timesteps = spaced_timesteps(sampling.spacing, sampling.steps, schedule)
        unguided = sum(not interval[0] <= timestep <= interval[1] for timestep in timesteps)
    return guided.total(sampling.steps) - unguided * (guided.step - plain.step)


def _report_recorded(task: Task) -> bool:
    """Whether the task is recorded already, perhaps under another budget with the same steps. If so, print it."""
    point = _find(task)
    if point is not None:
        remove_parts(task.folder)  # the process that recorded it may have died before doing so
        if task.described["kind"] == "point":
            _report(task, point, " (recorded before)")
    return point is not None


def _find(task: Task) -> Point | None:
    points = read_points(task.config.run_dir, task.described["kind"])
    same_budget = [point for point in points if point["nfe"] == task.sampling.nfe]
    return find_point(same_budget, task.measurement) or find_point(points, task.measurement)


def _report(task: Task, point: Point, note: str = "") -> None:
    how = [f"{task.config.run_dir.name} {task.checkpoint.stem}", f"NFE {task.sampling.nfe}", f"steps {point['steps']}"]
    sampling = Sampling.of_point(point)
    texts = {**sampling.texts, "seed": f"seed {sampling.seed}"}
    if unusual := [text for name, text in texts.items() if name in AXES and getattr(sampling, name) != DEFAULTS[name]]:
        how.append(", ".join(unusual))
    how += [f"{name} {value:.4g}" for name, value in point["metrics"].items()]
    costs = f"{point['tflops_per_image'] * 1e3:.3g} GFLOPs, {point['seconds_per_image'] * 1e3:.3g} ms an image"
    print(printable("  ".join([*how, costs]) + note), flush=True)


def _conclude(request: EvaluationRequest, tasks: Sequence[Task], device: torch.device) -> list[Point]:
    """Write means, diagnostics and curves, once all points are recorded."""
    run, points = request.config.run_dir, list[Point]()
    for task in tasks:
        if (point := _find(task)) is None:
            print(f"{run}: this process has done its share; the last one records the rest", flush=True)
            return points
        tags: dict[str, Any] = {key: task.described[key] for key in ("tuned", "tries") if key in task.described}
        if point["nfe"] != task.sampling.nfe or not tags.items() <= point.items():
            # Another budget with the same steps has the same samples. And a point recorded before may be tuned now.
            point = {key: value for key, value in point.items() if key not in ("tuned", "tries")}
            point |= {"nfe": task.sampling.nfe, "command": task.described["command"], **tags}
            append_point(run, point)
        points.append(point)
    if request.kind == "candidate":
        return points
    _record_means(run, points)
    write_run_curves(request.config)
    if request.diagnostics and _record_diagnostics(request, tasks[-1], device):
        write_run_curves(request.config)
    return points


def write_run_curves(config: ExperimentConfig) -> None:
    """Write a run's curves in TensorBoard anew from its record."""
    write_curves(config.run_dir, _hparams(config), config.model.sampled_depth())


def _record_means(run: Path, points: Iterable[Point]) -> None:
    """Record for each curve and budget the mean over checkpoints and seeds, with the standard deviation."""
    groups: dict[tuple[int, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point["nfe"], Measurement.of_point(point).curve_key), []).append(point)
    before = [{key: value for key, value in line.items() if key != "time"} for line in read_means(run)]
    for group in groups.values():
        if len(group) == 1:
            continue
        names = [name for name in group[0]["metrics"] if all(name in point["metrics"] for point in group)]
        values = {name: [point["metrics"][name] for point in group] for name in names}
        summary = {
            "kind": "mean",
            **{key: group[0][key] for key in ("nfe", "steps", *SHARED, "config_hash")},
            **Sampling.of_point(group[0]).curve_fields,
            "checkpoints": list(dict.fromkeys(point["checkpoint"] for point in group)),
            "seeds": list(dict.fromkeys(point["seed"] for point in group)),
            "metrics": {name: mean(numbers) for name, numbers in values.items()},
            "standard_deviations": {name: stdev(numbers) for name, numbers in values.items()},
            "count": len(group),
        }
        if summary not in before:
            append_point(run, {**summary, "time": _now()})


def _record_diagnostics(request: EvaluationRequest, task: Task, device: torch.device) -> bool:
    """Diagnose the newest checkpoint at the first budget, unless recorded. Returns whether the record has a new line."""
    sampling, path = request.samplings[0], request.checkpoints[-1]
    config, count = sampling.apply(request.config), min(IMAGES_LOOKED_AT, request.config.evaluation.num_samples)
    known = {key: task.described[key] for key in ("checkpoint", "step", "weights", "weights_sha256", "config_hash", "codec")}
    wanted = {**known, "nfe": sampling.nfe, "steps": sampling.steps, "sampler": sampling.sampler}
    wanted |= {"seed": sampling.seed, "most_images": count, **describe_held_out(config)}
    later = ("spacing", DEPTH)  # lines of earlier versions lack these fields
    wanted |= {name: getattr(sampling, name) for name in later if getattr(sampling, name) != DEFAULTS[name]}
    # Lines of earlier versions have no denoising error.
    lines = [line for line in read_diagnostics(config.run_dir) if wanted.items() <= line.items() and "denoising_error" in line]
    if is_new := not lines:
        model = load_model(path, config, sampling.weights).to(device)
        with ProgressDisplay("diagnosed", "images", count) as display:
            found = diagnose(model, config, path, sampling.steps, device, count, display.show)
        where = {"device": device_name(device), "versions": _versions(), "time": _now()}
        lines.append({"kind": "diagnostics", **wanted, **found, **where})
        append_point(config.run_dir, lines[-1])
    for warning in denoising_warnings(lines[-1], config.model.prediction_type):
        _log.warning("%s: %s", path, warning)
    return is_new


def _versions() -> dict[str, str]:
    """Versions of the packages that can change the numbers."""
    found = {"madformer": __version__, "torch": torch.__version__}
    for package in ("diffusers", "transformers", "torch-fidelity"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _hparams(config: ExperimentConfig) -> dict[str, bool | int | float | str]:
    """All trained fields, in the same types for all runs. Lists and fields that may be null are text, for TensorBoard."""
    fields = trained_fields(config, leave_out_neutral=False)
    plain = {name: not is_optional(name, ExperimentConfig) and isinstance(fields[name], (bool, int, float)) for name in fields}
    return {name: value if plain[name] else "null" if value is None else str(value) for name, value in fields.items()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
