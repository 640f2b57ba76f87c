"""A run's curves in TensorBoard: quality against NFE, FLOPs and seconds, and diagnostics.

`docs/reference/tensorboard.md` lists the tags.

TensorBoard draws a scalar against an integer step. Here the step is what a point cost, not when it was trained, so the runs of
a sweep overlay as curves of quality against compute. A run's main curve has the bare tag, `fid_vs_nfe`; other samplers,
guidances, weights and depths add their differences, `fid_vs_nfe/unipc`. The curve of what `madformer tune` chose is
`fid_vs_nfe_tuned`. Of an elastic run each diffusion depth has its own, `fid_vs_nfe/D = 4`.

`torch.utils.tensorboard` cannot write these files. Its writers create a file under its final name, so a running TensorBoard
reads half of it. Its `scalar` takes no description, its `hparams` turns booleans into numbers and takes no times, and its
`custom_scalars` closes no category.
"""

from __future__ import annotations

import logging
import math
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Value
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import NULL_TENSOR
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from madformer.evaluation.measurement import DEPTH, Point, metric_key
from madformer.evaluation.record import RunCurve, curves_by_sampling, mean_known, newest_diagnostics, run_curves, tuned_curves
from madformer.runs.files import atomic_write

Scalar = bool | int | float | str

_PREFIX, _SUFFIX, _REPORT = "events.out.tfevents.", ".curves", ".report"

_HPARAM_TYPES = {
    bool: ("DATA_TYPE_BOOL", "bool_value"),
    int: ("DATA_TYPE_FLOAT64", "number_value"),
    float: ("DATA_TYPE_FLOAT64", "number_value"),
    str: ("DATA_TYPE_STRING", "string_value"),
}
"""Type of a hyperparameter -> TensorBoard's type, and the field of `Value` that holds it."""

_log = logging.getLogger(__name__)


def _millionths(cost: str) -> Callable[[Point], int | None]:
    return lambda point: None if point.get(cost) is None else round(1e6 * point[cost])


AXES: dict[str, tuple[Callable[[Point], int | None], str]] = {
    "nfe": (lambda point: point["nfe"], "layer evaluations per block"),
    "log2_nfe": (lambda point: round(100 * math.log2(point["nfe"])), "100 log2(NFE)"),
    "tflops": (_millionths("tflops_per_image"), "MFLOPs per image: 1k is a GFLOP, 1M a TFLOP"),
    "seconds": (_millionths("seconds_per_image"), "microseconds per image: 1k is a millisecond, 1M a second"),
}
"""The part of a tag after `_vs_` -> the step of a point (None: not measured), and the step's unit."""

DIAGNOSTICS: dict[str, tuple[Callable[[Point], Sequence[float] | None], str]] = {
    "loss_by_timestep": (lambda entry: entry["loss_by_timestep"], "timestep"),
    "loss_by_block": (lambda entry: entry["loss_by_block"], "block"),
    "exposure_gap_by_block": (lambda entry: entry["exposure"]["gap"], "block"),
    "condition_explains_by_block": (lambda entry: entry["condition_explains"], "block"),
    "denoising_error_by_timestep": (lambda entry: entry.get("denoising_error"), "timestep"),
}
"""The part of a tag after `diagnostics/` -> its values (None: the model has none), and the step's unit."""


def board_address(**filters: str) -> str:
    """Where TensorBoard shows its time series without smoothing, once it runs on this machine.

    Args:
        filters: what else its page reads: regular expressions as `tagFilter` and `runFilter`, and `runColorGroup`.
    """
    return f"http://localhost:6006/?{urlencode({'smoothing': '0', **filters}, quote_via=quote)}#timeseries"


def write_curves(run: Path, hparams: Mapping[str, Scalar], depth: int | None = None) -> None:
    """Write the newest evaluations and diagnostics to one event file, which replaces the former one.

    A running TensorBoard shows it at its next reload; one with `--load_fast=false` must be started again.

    Args:
        run: the run's folder; nothing is written if its record is empty.
        hparams: trained fields for the table of hyperparameters; the same names in all runs of a sweep.
        depth: of an elastic run the diffusion depth whose distances stand in that table; None: the run is not elastic.

    Raises:
        InputError: the record is broken.
    """
    curves, diagnostics = [*run_curves(run), *tuned_curves(run)], newest_diagnostics(run)
    events = [*_curve_events(curves), *_hparam_events(curves, hparams, depth), *_diagnostic_events(diagnostics)]
    events += _layout_events(curves, diagnostics)
    _replace_file(run, _SUFFIX, events)


def write_pictures(folder: Path, pictures: Mapping[str, bytes], measured: str) -> None:
    """Show a report's pictures among TensorBoard's *Images*, in an event file that replaces the former one.

    Args:
        folder: the sweep's. TensorBoard shows it as a run of its own.
        pictures: tag -> contents of a PNG.
        measured: ISO time of the newest point.
    """
    point, events = {"time": measured}, []
    for tag, content in pictures.items():
        width, height = struct.unpack(">II", content[16:24])
        image = {"width": width, "height": height, "colorspace": 4, "encoded_image_string": content}
        events.append(_event(point, tag=tag, image=image, metadata={"plugin_data": {"plugin_name": "images"}}))
    _replace_file(folder, _REPORT, events)


def _replace_file(folder: Path, suffix: str, events: Sequence[Event]) -> None:
    """Write events to a new file in place of those with this suffix; no events: no file."""
    former = list(folder.glob(f"{_PREFIX}*{suffix}"))
    if events:
        start = Event(wall_time=events[0].wall_time, file_version="brain.Event:2")
        # Under a new name, else a running TensorBoard goes on with the file that it has open.
        with _atomic_write(folder / f"{_PREFIX}{time.time():017.6f}{suffix}") as file:
            writer = RecordWriter(file)
            for event in (start, *events):
                writer.write(event.SerializeToString())
    for path in former:
        path.unlink(missing_ok=True)


def drop_orphans(run: Path, step: int) -> None:
    """Remove what a killed run logged after the checkpoint that it resumes from, so that no point is drawn twice.

    Call it before the resumed run opens its own event file. A torn last record is removed too, and so is a file that holds
    no other event.

    Args:
        run: the run's folder; its event files of training are rewritten, its curves are not.
        step: the last step that stays.
    """
    for path in _training_files(run):
        _copy_steps(path, path, step)
    # TensorBoard reads files in the order of the times in their names. If the clock was set back, a new file would come first.
    paths, now = sorted(_training_files(run)), int(time.time())
    if any(_file_time(path) > now for path in paths):
        for number, path in enumerate(paths):
            rest = path.name.removeprefix(_PREFIX).partition(".")[2]
            path.rename(path.with_name(f"{_PREFIX}{now - len(paths) + number:010d}.{rest}"))


def _file_time(path: Path) -> int:
    """Seconds since 1970 in an event file's name."""
    digits = path.name.removeprefix(_PREFIX).partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def copy_events(run: Path, branch: Path, step: int) -> None:
    """Copy what a run logged in training up to a step; it may go on at the same time. The copy replaces what is there."""
    drop_orphans(branch, -1)
    for path in _training_files(run):
        with suppress(FileNotFoundError):  # a run that resumes removes empty files
            _copy_steps(path, branch / path.name, step)


def _training_files(run: Path) -> list[Path]:
    """The event files of a run but for its curves."""
    return [path for path in run.glob(f"{_PREFIX}*") if not path.name.endswith(_SUFFIX)]


def _copy_steps(path: Path, copy: Path, step: int) -> None:
    empty = True
    with path.open("rb") as source, _atomic_write(copy) as target:
        for record, event in _records(source):
            if event.step <= step:
                target.write(record)
                empty &= event.HasField("file_version")
            elif path != copy:
                break  # what follows may be half-written
    if empty:
        copy.unlink()


@contextmanager
def _atomic_write(path: Path) -> Iterator[BinaryIO]:
    """`atomic_write` under names without `tfevents`: TensorBoard reads every file with that in its name."""
    whole = path.with_name(f"unread-{os.getpid()}")
    with atomic_write(whole) as temporary, temporary.open("wb") as file:
        yield file
    whole.replace(path)


def _records(file: BinaryIO) -> Iterator[tuple[bytes, Event]]:
    """The records of an event file with their frames, and their events, up to the first torn record.

    A record is its length (uint64), a checksum of that, the data, a checksum of the data (uint32 each, little-endian).
    TensorBoard's own reader also checks the data's checksum, in Python: 3 MB of previews a second.
    """
    while len(header := file.read(12)) == 12:
        length, checksum = struct.unpack("<QI", header)
        if checksum != masked_crc32c(header[:8]):
            break
        body = file.read(length + 4)
        if len(body) < length + 4:
            break
        try:
            yield header + body, Event.FromString(body[:-4])
        except DecodeError:
            break
    if header:
        _log.warning("%s: its last record is torn, as by a crash: left out", file.name)


def _curve_events(curves: Sequence[RunCurve]) -> Iterator[Event]:
    """One scalar for each metric, way of sampling, axis and budget. Steps rise, else TensorBoard forgets points."""
    main = replace(curves[0].sampling, diffusion_depth=None) if curves else None  # a tag names the depth of an elastic run
    for metric in _metrics(curves):
        for curve in [*curves_by_sampling([each for each in curves if not each.is_tuned], metric), *_tuned(curves, metric)]:
            sampling = curve.sampling
            name = sampling.texts[DEPTH] if curve.is_tuned or main is None else sampling.difference(main)
            ending = ("_tuned" if curve.is_tuned else "") + (f"/{name}" if name else "")
            points = _means(curve)
            for axis, (step_of, unit) in AXES.items():
                tag = f"{metric}_vs_{axis}{ending}"
                steps = {step: point for point in points if (step := step_of(point)) is not None}
                for step, point in sorted(steps.items(), key=lambda pair: pair[0]):
                    yield _scalar(point, tag, point["metrics"][metric], step, f"{metric}; step: {unit}")


def _tuned(curves: Sequence[RunCurve], metric: str) -> list[RunCurve]:
    """The tuned curves that have the metric."""
    return [curve for curve in curves if curve.is_tuned and metric in curve.metrics]


def _metrics(curves: Sequence[RunCurve]) -> list[str]:
    """All metrics of a run, those of its main curve first."""
    return list(dict.fromkeys(metric for curve in curves for metric in curve.metrics))


def _means(curve: RunCurve) -> list[Point]:
    """One point for each budget: the mean of its points' metrics and costs."""
    return [
        {
            **max(points, key=lambda point: point["step"]),
            "metrics": {metric: fmean(point["metrics"][metric] for point in points) for metric in curve.metrics},
            **{cost: mean_known(point.get(cost) for point in points) for cost in ("tflops_per_image", "seconds_per_image")},
        }
        for points in curve.points.values()
    ]


def _diagnostic_events(entry: Point | None) -> Iterator[Event]:
    """The errors of the newest diagnosed model, by timestep and by block."""
    if entry is None:
        return
    for name, (values_of, unit) in DIAGNOSTICS.items():
        if (values := values_of(entry)) is not None:
            timesteps = "denoising_timesteps" if name.startswith("denoising") else "timesteps"
            steps = entry[timesteps] if unit == "timestep" else range(len(values))
            for step, value in sorted(zip(steps, values, strict=True)):
                yield _scalar(entry, f"diagnostics/{name}", value, step, f"step: {unit}, of training step {entry['step']}")


def _hparam_events(curves: Sequence[RunCurve], hparams: Mapping[str, Scalar], depth: int | None) -> Iterator[Event]:
    """The run's row in the table of hyperparameters: `hparams`, and the main curve's Fréchet distances at its two ends.

    The table would be unreadable with all metrics at all budgets; runs are ranked by the Fréchet distances. TensorBoard shows
    the columns of one run for all runs: runs with the same budgets share the NFE columns, runs with the same steps the others.
    """
    if not curves:
        return
    main = next((curve for curve in curves if curve.sampling.diffusion_depth == depth), curves[0])
    points = _means(main)
    first, last = points[0], points[-1]
    distances = [metric for metric in main.metrics if metric_key(metric) == "fd"] or main.metrics[:1]
    ends = [(name.format(**point), point) for name in ("nfe_{nfe}", "{steps}_steps") for point in (first, last)]
    metrics = {f"{metric}_at_{end}": (metric, point) for metric in distances for end, point in ends}
    for tag, (metric, point) in metrics.items():
        description = f"{metric} at NFE {point['nfe']}, {point['steps']} steps; step: training step"
        yield _scalar(point, tag, point["metrics"][metric], point["step"], description)
    infos = [{"name": name, "type": _HPARAM_TYPES[type(value)][0]} for name, value in hparams.items()]
    values = {name: Value(**{_HPARAM_TYPES[type(value)][1]: value}) for name, value in hparams.items()}
    contents = {
        "experiment": {"hparam_infos": infos, "metric_infos": [{"name": {"tag": tag}} for tag in metrics]},
        "session_start_info": {"hparams": values, "start_time_secs": _wall_time(first)},
        "session_end_info": {"status": "STATUS_SUCCESS", "end_time_secs": _wall_time(last)},
    }
    for name, content in contents.items():
        data = HParamsPluginData(**{name: content}).SerializeToString()
        metadata = {"plugin_data": {"plugin_name": "hparams", "content": data}}
        yield _event(first, tag=f"_hparams_/{name}", tensor=NULL_TENSOR, metadata=metadata)


def _layout_events(curves: Sequence[RunCurve], diagnostics: Point | None) -> Iterator[Event]:
    """The custom-scalars page: one chart for each metric and axis, one more if tuned, with a marker for each point."""
    categories = [
        {
            "title": f"{metric}: quality against compute",
            "chart": [
                _chart(f"{metric}_vs_{axis}{ending}", unit, f"^{re.escape(metric)}_vs_{axis}{tags}$")
                for axis, (_, unit) in AXES.items()
                for ending, tags in (("", "(/.*)?"), ("_tuned", "_tuned(/.*)?"))
                if not ending or _tuned(curves, metric)
            ],
            "closed": not (index == 0 or metric_key(metric) == "fd"),
        }
        for index, metric in enumerate(_metrics(curves))
    ]
    if diagnostics is not None:
        charts = [_chart(name, unit, f"^diagnostics/{name}$") for name, (_, unit) in DIAGNOSTICS.items()]
        categories.append({"title": "diagnostics: where the model errs", "chart": charts})
    if categories:
        tensor = {"dtype": "DT_STRING", "string_val": [Layout(category=categories).SerializeToString()]}
        metadata = {"plugin_data": {"plugin_name": "custom_scalars"}}
        point = diagnostics or _means(curves[0])[-1]
        yield _event(point, tag="custom_scalars__config__", tensor=tensor, metadata=metadata)


def _chart(title: str, unit: str, tags: str) -> dict[str, Any]:
    return {"title": f"{title} (axis: {unit})", "multiline": {"tag": [tags]}}


def _scalar(point: Point, tag: str, value: float, step: int, description: str) -> Event:
    metadata = {"display_name": tag, "summary_description": description, "plugin_data": {"plugin_name": "scalars"}}
    # A simple value, though TensorBoard's fast loader leaves its description out: scripts that read event files expect it.
    return _event(point, step, tag=tag, simple_value=value, metadata=metadata)


def _event(point: Point, step: int = 0, **value: Any) -> Event:
    """An event at the point's wall time. Protobuf turns the dictionaries into messages."""
    return Event(wall_time=_wall_time(point), step=step, summary={"value": [value]})


def _wall_time(point: Point) -> float:
    """Seconds since 1970 at which the point was measured."""
    return datetime.fromisoformat(point["time"]).timestamp()
