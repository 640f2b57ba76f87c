"""What an evaluation consists of: a task for each number, with all that makes it."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from madformer.config import ExperimentConfig, config_hash
from madformer.data.codec import Codec, build_codec, require_fit
from madformer.evaluation.feature_networks import FeatureNetwork, metric_name
from madformer.evaluation.metrics import frechet_bias
from madformer.evaluation.record import identity
from madformer.evaluation.reference import Reference, find_reference
from madformer.evaluation.request import Budget, EvaluationRequest
from madformer.evaluation.sampling import choose_prompts, sampling_precision, tokenize
from madformer.runs.checkpoints import DATA, checkpoint_step, load_checkpoint, load_model, weights_sha256

FEW = 10
"""Samples for each feature, below which the bias of the Fréchet distance is worth a warning."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One point of a record: samples to be taken and measured."""

    config: ExperimentConfig
    """The run's; its `evaluation` says how this is sampled."""
    checkpoint: Path
    budget: Budget
    prompts: tuple[str, ...]
    """One for each sample; empty texts for a model without text."""
    references: tuple[Path, ...]
    """Files that were given."""
    described: dict[str, Any]
    """The point as far as it is known before anything is sampled."""

    @property
    def folder(self) -> Path:
        """Where features are kept until all are there; the first samples of many are those of few."""
        made_by = {key: value for key, value in identity(self.described).items() if key != "num_samples"}
        name = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
        return self.config.run_dir / "features" / name


@dataclass(frozen=True)
class Judges:
    """The networks that look at samples, and what each compares them with."""

    networks: tuple[FeatureNetwork, ...]
    references: tuple[Reference, ...]

    @staticmethod
    def of(request: EvaluationRequest, codec: Codec, networks: Sequence[FeatureNetwork]) -> Judges:
        """Find the networks' references, or compute them.

        Raises:
            ConfigError: no reference images.
            InputError: references that are not of the run's images.
        """
        config = request.config
        size, trained_on = config.model.latent_size * codec.downsampling, source_sha256(request.checkpoints[-1])
        references = (find_reference(network, config, size, trained_on, request.references) for network in networks)
        return Judges(tuple(networks), tuple(references))

    def bias(self, count: int) -> dict[str, float]:
        """What the Fréchet distances of so many perfect samples would be."""
        pairs = zip(self.networks, self.references, strict=True)
        return {metric_name("fd", network.label): frechet_bias(reference.moments, count) for network, reference in pairs}


def draft_tasks(request: EvaluationRequest, codec: Codec, networks: Sequence[FeatureNetwork]) -> list[Task]:
    """All points that are asked for, as far as they are known without references: those are costly, mistakes are cheap.

    Raises:
        ConfigError: a codec that is not the model's, or a tokenizer that cannot be had.
        InputError: a torn checkpoint or one of another model, or prompts that the run cannot have.
    """
    require_fit(codec, request.config.model)
    return [task for path in request.checkpoints for task in _tasks_of(request, path, codec, networks)]


def complete_tasks(tasks: Sequence[Task], judges: Judges) -> list[Task]:
    """The same with the references."""
    bias = judges.bias(tasks[0].described["num_samples"])
    known = {"references": [reference.pedigree for reference in judges.references], "bias": bias}
    return [replace(task, described={**task.described, **known}) for task in tasks]


def warn_of_bias(networks: Sequence[FeatureNetwork], task: Task) -> None:
    """Say what to expect of few samples for wide features."""
    count = task.described["num_samples"]
    for network, (name, bias) in zip(networks, task.described["bias"].items(), strict=True):
        if count < FEW * network.width:
            few = f"{count:,} samples for features of width {network.width:,} are few"
            _log.warning("%s: %s of perfect samples would be %.3g, not 0: compare only numbers of as many", few, name, bias)


def source_sha256(checkpoint: Path) -> str | None:
    """Fingerprint of the images that a run was trained on; None: its checkpoint does not say."""
    found: str | None = load_checkpoint(checkpoint).get(DATA, {}).get("fingerprint", {}).get("source")
    return found


def open_codec(config: ExperimentConfig, device: str) -> Codec:
    """The run's codec."""
    return build_codec(config.data.codec, config.data.codec_dtype, device)


def _tasks_of(request: EvaluationRequest, path: Path, codec: Codec, networks: Sequence[FeatureNetwork]) -> Iterator[Task]:
    data = request.config.data
    described = {
        "checkpoint": path.name,
        "step": checkpoint_step(path),
        "weights": request.weights,
        "weights_sha256": weights_sha256(load_model(path, request.config, request.weights)),
        "config_hash": config_hash(request.config),
        "num_samples": request.config.evaluation.num_samples,
        "codec": {"name": data.codec, "sha256": codec.sha256, "dtype": data.codec_dtype},
        "feature_networks": [
            {"name": network.name, "label": network.label, "width": network.width, "sha256": network.sha256}
            for network in networks
        ],
    }
    for config in request.manners():
        evaluation = config.evaluation
        prompts = tuple(prompt.text for prompt in choose_prompts(config, path, None, None, range(evaluation.num_samples)))
        tokenize(config, prompts[:1])  # if there is a mistake, better now
        manner = {
            "sampler": evaluation.sampler,
            "guidance": evaluation.guidance,
            "seed": evaluation.seed,
            "prompts": _sha256_of_texts(prompts) if any(prompts) else None,
            "precision": sampling_precision(config, codec.device),
        }
        for budget in request.budgets:
            point = {**described, **manner, "nfe": budget.nfe, "steps": budget.steps}
            point["command"] = _command(config, point, request.references)
            yield Task(config, path, budget, prompts, request.references, point)


def _command(config: ExperimentConfig, point: dict[str, Any], references: Sequence[Path]) -> str:
    """What gives this point again."""
    options = {
        "--nfe": point["nfe"],
        "--num-samples": point["num_samples"],
        "--checkpoints": point["step"],
        "--weights": point["weights"],
        "--sampler": point["sampler"],
        "--guidance": point["guidance"],
        "--seeds": point["seed"],
    }
    words = [word for option, value in options.items() for word in (option, str(value))]
    words += [word for path in references for word in ("--reference", str(path))]
    networks = json.dumps(config.evaluation.feature_networks, ensure_ascii=False)
    overrides = [f"evaluation.feature_networks={networks}", f"evaluation.batch_size={config.evaluation.batch_size}"]
    return shlex.join(["madformer", "evaluate", str(config.run_dir), *overrides, *words])


def _sha256_of_texts(texts: Sequence[str]) -> str:
    """Of prompts that come in turn: the same for more samples."""
    return hashlib.sha256("\n".join(dict.fromkeys(texts)).encode()).hexdigest()
