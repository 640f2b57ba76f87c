"""A run's curves in TensorBoard: quality against NFE, FLOPs and seconds, and diagnostics, beside its training scalars.

TensorBoard draws a scalar against an integer step. Here the step is what a point cost, not when it was trained, so the runs of
a sweep overlay as curves of quality against compute. The unit of a step is the same in every run; descriptions name it.
A run's main curve has the bare tag, `fid_vs_nfe`; those of other samplers, guidances or weights beside it say what differs,
`fid_vs_nfe/unipc`. Each is the mean over checkpoints and seeds.
"""

from __future__ import annotations

import logging
import math
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Value
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from madformer.evaluation.measurement import Point, metric_key
from madformer.evaluation.record import RunCurve, curves_by_sampling, mean_known, newest_diagnostics, run_curves
from madformer.runs.files import atomic_write

Scalar = bool | int | float | str

_PREFIX, _SUFFIX = "events.out.tfevents.", ".curves"

_log = logging.getLogger(__name__)


def _scaled(key: str, factor: float) -> Callable[[Point], int | None]:
    return lambda point: None if point.get(key) is None else round(factor * point[key])


AXES: dict[str, tuple[Callable[[Point], int | None], str]] = {
    "nfe": (lambda point: point["nfe"], "layer evaluations per block"),
    "log2_nfe": (lambda point: round(100 * math.log2(point["nfe"])), "100 log2(NFE)"),
    "tflops": (_scaled("tflops_per_image", 1e6), "MFLOPs per image: 1k is a GFLOP, 1M a TFLOP"),
    "seconds": (_scaled("seconds_per_image", 1e6), "microseconds per image: 1k is a millisecond, 1M a second"),
}
"""What follows `_vs_` in a tag -> the step of a point (None: it was not measured), and the step's unit."""

DIAGNOSTICS: dict[str, tuple[Callable[[Point], Sequence[float] | None], str]] = {
    "loss_by_timestep": (lambda entry: entry["loss_by_timestep"], "timestep"),
    "loss_by_block": (lambda entry: entry["loss_by_block"], "block"),
    "exposure_gap_by_block": (lambda entry: entry["exposure"]["gap"], "block"),
    "condition_explains_by_block": (lambda entry: entry["condition_explains"], "block"),
}
"""What follows `diagnostics/` in a tag -> its values (None: the model has no such thing), and the step's unit."""


def write_curves(run: Path, hparams: Mapping[str, Scalar]) -> None:
    """Draw the newest evaluations and diagnostics anew: one event file takes the place of the former one.

    A running TensorBoard shows it at its next reload; one with `--load_fast=false` must be started again.

    Args:
        run: the run's folder; nothing is drawn if its record is empty.
        hparams: what the run was trained with, for the table of hyperparameters; the same names in all runs of a sweep.

    Raises:
        InputError: the record is broken.
    """
    curves, diagnostics = run_curves(run), newest_diagnostics(run)
    former = list(run.glob(f"{_PREFIX}*{_SUFFIX}"))
    events = [*_curves(curves), *_hparams(curves, hparams), *_diagnostics(diagnostics), *_layout(curves, diagnostics)]
    if events:
        # Under a new name, else a running TensorBoard goes on with the file that it has open.
        with _atomic_write(run / f"{_PREFIX}{time.time():017.6f}{_SUFFIX}") as temporary:
            _write_events(temporary, events)
    for path in former:
        path.unlink(missing_ok=True)


def drop_orphans(run: Path, step: int) -> None:
    """Remove what a killed run logged after the checkpoint that it resumes from, so that no point is drawn twice.

    To be called before the resumed run opens its own event file. A last record that was cut short is removed too, and a file
    of which nothing stays.

    Args:
        run: the run's folder; its event files of training are rewritten, its curves are not.
        step: the last step that stays.
    """
    for path in run.glob(f"{_PREFIX}*"):
        if not path.name.endswith(_SUFFIX):
            _keep_steps(path, step)


def _keep_steps(path: Path, step: int) -> None:
    empty = True
    with path.open("rb") as source, _atomic_write(path) as temporary, temporary.open("wb") as target:
        for record, event in _records(source):
            if event.step <= step:
                target.write(record)
                empty &= event.HasField("file_version")
    if empty:
        path.unlink()


@contextmanager
def _atomic_write(path: Path) -> Iterator[Path]:
    """`atomic_write`, by way of names without tfevents: TensorBoard reads whatever has it in its name."""
    whole = path.with_name(f"unread-{os.getpid()}")
    with atomic_write(whole) as temporary:
        yield temporary
    whole.replace(path)


def _records(file: BinaryIO) -> Iterator[tuple[bytes, Event]]:
    """The records of an event file with their frame, and what is in them; up to the first that is not whole.

    A record is its length (uint64), a checksum of that, the data, a checksum of the data (uint32 each, little-endian).
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


def _write_events(path: Path, events: Sequence[Event]) -> None:
    first = Event(wall_time=events[0].wall_time, file_version="brain.Event:2")
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for event in (first, *events):
            writer.write(event.SerializeToString())


def _curves(curves: Sequence[RunCurve]) -> Iterator[Event]:
    """One scalar for each metric, way of sampling, axis and budget; steps rise, else TensorBoard forgets points."""
    for metric in _metrics(curves):
        for curve in curves_by_sampling(curves, metric):
            name = curve.sampling.difference(curves[0].sampling)
            points = _means(curve)
            for axis, (step_of, unit) in AXES.items():
                tag = f"{metric}_vs_{axis}" + (f"/{name}" if name else "")
                steps = {step: point for point in points if (step := step_of(point)) is not None}
                for step in sorted(steps):
                    yield _scalar(tag, steps[step], steps[step]["metrics"][metric], step, f"{metric}; step: {unit}")


def _metrics(curves: Sequence[RunCurve]) -> list[str]:
    """All metrics of a run, those of its main curve first."""
    return list(dict.fromkeys(metric for curve in curves for metric in curve.metrics))


def _means(curve: RunCurve) -> list[Point]:
    """A budget's points as one: the mean of the metrics and of the costs."""
    return [
        {
            **max(points, key=lambda point: point["step"]),
            "metrics": {metric: fmean(point["metrics"][metric] for point in points) for metric in curve.metrics},
            **{cost: mean_known(point.get(cost) for point in points) for cost in ("tflops_per_image", "seconds_per_image")},
        }
        for points in curve.points.values()
    ]


def _diagnostics(entry: Point | None) -> Iterator[Event]:
    """Where the newest diagnosed model errs, by timestep and by block."""
    for name, (values_of, unit) in DIAGNOSTICS.items():
        values = values_of(entry) if entry is not None else None
        if entry is None or values is None:
            continue
        steps = entry["timesteps"] if unit == "timestep" else range(len(values))
        for step, value in sorted(zip(steps, values, strict=True)):
            yield _scalar(f"diagnostics/{name}", entry, value, step, f"step: {unit}, of training step {entry['step']}")


def _scalar(tag: str, entry: Point, value: float, step: int, description: str) -> Event:
    metadata = scalar_metadata.create_summary_metadata(display_name=tag, description=description)
    # A simple value, though the fast loader leaves its description out: scripts that read event files look for nothing else.
    return Event(
        wall_time=_when(entry),
        step=step,
        summary=Summary(value=[Summary.Value(tag=tag, simple_value=value, metadata=metadata)]),
    )


def _hparams(curves: Sequence[RunCurve], hparams: Mapping[str, Scalar]) -> Iterator[Event]:
    """The run's row in the table of hyperparameters: `hparams`, and the main curve's distances at its two ends.

    Of a dozen metrics and all budgets nobody could read the table; the Fréchet distances are what runs are ranked by.
    """
    if not curves:
        return
    points = _means(curves[0])
    ends = {point["nfe"]: point for point in (points[0], points[-1])}
    distances = [metric for metric in curves[0].metrics if metric_key(metric) == "fd"] or curves[0].metrics[:1]
    metrics = {f"{metric}_at_nfe_{nfe}": (metric, point) for metric in distances for nfe, point in ends.items()}
    for tag, (metric, point) in metrics.items():
        description = f"{metric} at NFE {point['nfe']}; step: training step"
        yield _scalar(tag, point, point["metrics"][metric], point["step"], description)
    experiment = api_pb2.Experiment(
        hparam_infos=[api_pb2.HParamInfo(name=name, type=_hparam_type(value)) for name, value in hparams.items()],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics],
    )
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=_when(points[0]))
    for name, value in hparams.items():
        start.hparams[name].CopyFrom(_hparam_value(value))
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=_when(points[-1]))
    for tag, content in (
        (hparams_metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=experiment)),
        (hparams_metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=start)),
        (hparams_metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=end)),
    ):
        metadata = hparams_metadata.create_summary_metadata(content)
        value = Summary.Value(tag=tag, tensor=hparams_metadata.NULL_TENSOR, metadata=metadata)
        yield Event(wall_time=_when(points[0]), summary=Summary(value=[value]))


def _hparam_type(value: Scalar) -> int:
    if isinstance(value, bool):
        return api_pb2.DATA_TYPE_BOOL
    return api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64


def _hparam_value(value: Scalar) -> Any:
    if isinstance(value, bool):
        return Value(bool_value=value)
    return Value(string_value=value) if isinstance(value, str) else Value(number_value=value)


def _layout(curves: Sequence[RunCurve], diagnostics: Point | None) -> Iterator[Event]:
    """The custom-scalars page: one chart for each metric and axis, with a marker for each point."""
    categories = [
        layout_pb2.Category(
            title=f"{metric}: quality against compute",
            chart=[
                _chart(f"{metric}_vs_{name} (axis: {unit})", f"^{re.escape(metric)}_vs_{name}(/.*)?$")
                for name, (_, unit) in AXES.items()
            ],
            closed=not (index == 0 or metric_key(metric) == "fd"),
        )
        for index, metric in enumerate(_metrics(curves))
    ]
    if diagnostics is not None:
        charts = [_chart(f"{name} (axis: {unit})", f"^diagnostics/{name}$") for name, (_, unit) in DIAGNOSTICS.items()]
        categories.append(layout_pb2.Category(title="diagnostics: where the model errs", chart=charts))
    if not categories:
        return
    text = layout_pb2.Layout(category=categories).SerializeToString()
    tensor = TensorProto(dtype=DT_STRING, string_val=[text])
    value = Summary.Value(
        tag=layout_metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=layout_metadata.create_summary_metadata()
    )
    yield Event(wall_time=_when(diagnostics or _means(curves[0])[-1]), summary=Summary(value=[value]))


def _chart(title: str, tag: str) -> layout_pb2.Chart:
    return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[tag]))


def _when(point: Point) -> float:
    """Seconds since 1970 at which the point was measured."""
    return datetime.fromisoformat(point["time"]).timestamp()
