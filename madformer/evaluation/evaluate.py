"""`madformer evaluate`: sample from a run's checkpoints, measure, record."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from madformer import __version__
from madformer.checkpoints import checkpoint_step, load_model
from madformer.config import ExperimentConfig, config_hash, trained_fields
from madformer.data.codec import build_codec
from madformer.data.digits import load_digits
from madformer.evaluation.curves import write_curves
from madformer.evaluation.features import feature_network, metric_name
from madformer.evaluation.metrics import FrechetDistance
from madformer.evaluation.prompting import choose_prompts, tokenize
from madformer.evaluation.record import append_point, find_point, read_means, read_points
from madformer.evaluation.request import Budget, EvaluationRequest
from madformer.evaluation.sampling import sample_batches, sampling_device
from madformer.fingerprint import weights_sha256
from madformer.model import MADFormer, cost
from madformer.run import claim_folder
from madformer.training.errors import NonFiniteError

__all__ = ["evaluate_run"]

Point = dict[str, Any]


def evaluate_run(request: EvaluationRequest) -> list[Point]:
    """Measure every budget of every checkpoint that is asked for; what the record holds already is not computed again.

    Returns:
        The points asked for, in the record's form.

    Raises:
        InputError: a torn checkpoint or one of another model, or another process evaluates the run.
        NonFiniteError: the model's samples are not finite.
    """
    run = request.config.run_dir
    with claim_folder(run, "evaluate"):
        judge = _Judge(request.config)
        points = [point for path in request.checkpoints for point in _evaluate_checkpoint(request, path, judge)]
        if len(request.checkpoints) > 1:
            _record_means(run, points)
        write_curves(run, hparams=_hparams(request.config))
    return points


class _Judge:
    """The metric, its network and its reference, and what the record says of them."""

    def __init__(self, config: ExperimentConfig) -> None:
        name = config.evaluation.feature_network
        assert name is not None  # the request has been checked
        network, (images_NCYX, _) = feature_network(name), load_digits()
        self.metric = metric_name(name)
        self.distance = FrechetDistance(network, images_NCYX.to(sampling_device(config)))
        self.pedigree = {
            "feature_network": {"name": name, "sha256": weights_sha256(network)},
            "reference": {"name": name, "images": len(images_NCYX), "sha256": _sha256(images_NCYX)},
        }


def _evaluate_checkpoint(request: EvaluationRequest, path: Path, judge: _Judge) -> Iterator[Point]:
    config, run = request.config, request.config.run_dir
    model = load_model(path, config, request.weights).to(sampling_device(config))
    described = {
        "checkpoint": path.name,
        "step": checkpoint_step(path),
        "weights": request.weights,
        "weights_sha256": weights_sha256(model),
        "config_hash": config_hash(config),
        "num_samples": config.evaluation.num_samples,
        "seed": config.evaluation.seed,
        "sampler": "ddim",
        "guidance": 1.0,
        "codec": config.data.codec,
        **judge.pedigree,
    }
    prompts = choose_prompts(config, path, None, None, 1.0, range(config.evaluation.num_samples))
    text_BT = tokenize(config, [prompt.text for prompt in prompts])
    for budget in request.budgets:
        wanted = {**described, "nfe": budget.nfe, "steps": budget.steps, "metrics": {judge.metric: None}}
        point, note = find_point(read_points(run), wanted), " (recorded before)"
        if point is None:
            try:
                point, note = {"kind": "point", **wanted, **_measure(model, config, budget, judge, text_BT)}, ""
                append_point(run, point)
            except ValueError as error:
                raise NonFiniteError(f"{path} at NFE {budget.nfe}: {error}") from error
        cost_of_point = f"{point['tflops_per_image'] * 1e3:.3g} GFLOPs, {point['seconds_per_image'] * 1e3:.3g} ms an image"
        print(
            f"{run.name} {path.stem}  NFE {budget.nfe}  steps {budget.steps}  "
            f"{judge.metric} {point['metrics'][judge.metric]:.4g}  {cost_of_point}{note}",
            flush=True,
        )
        yield point


def _measure(model: MADFormer, config: ExperimentConfig, budget: Budget, judge: _Judge, text_BT: Tensor | None) -> Point:
    """Sample and compare; seconds are those of sampling alone."""
    evaluation, seconds = config.evaluation, 0.0
    codec = build_codec(config.data.codec, config.data.codec_dtype, sampling_device(config))
    judge.distance.reset()
    indices = range(evaluation.num_samples)
    batches = sample_batches(model, config, budget.steps, indices, evaluation.batch_size, text_BT)
    before = time.perf_counter()
    for latents_BChw in batches:
        if latents_BChw.is_cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - before
        judge.distance.update(codec.decode(latents_BChw))
        before = time.perf_counter()
    return {
        "nfe_actual": cost.nfe(config.model, budget.steps),
        "metrics": {judge.metric: judge.distance.compute()},
        "tflops_per_image": cost.sampling_flops(config.model).total(budget.steps) / 1e12,
        "seconds_per_image": seconds / evaluation.num_samples,
        "seconds": seconds,
        "batch_size": evaluation.batch_size,
        "device": torch.cuda.get_device_name() if sampling_device(config).type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"madformer": __version__, "torch": torch.__version__},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _record_means(run: Path, points: Sequence[Point]) -> None:
    """The mean over checkpoints at every budget, with the spread."""
    for nfe in dict.fromkeys(point["nfe"] for point in points):
        group = [point for point in points if point["nfe"] == nfe]
        values: Mapping[str, list[float]] = {name: [point["metrics"][name] for point in group] for name in group[0]["metrics"]}
        summary = {
            "kind": "mean",
            "nfe": nfe,
            "steps": group[0]["steps"],
            "checkpoints": [point["checkpoint"] for point in group],
            "weights": group[0]["weights"],
            "metrics": {name: mean(numbers) for name, numbers in values.items()},
            "standard_deviations": {name: stdev(numbers) for name, numbers in values.items()},
        }
        if summary not in read_means(run):
            append_point(run, summary)


def _hparams(config: ExperimentConfig) -> dict[str, bool | int | float | str]:
    """Trained fields in the types that TensorBoard shows; lists as text."""
    scalars = {name: value for name, value in trained_fields(config).items() if value is not None}
    return {name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in scalars.items()}


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
