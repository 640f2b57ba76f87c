"""The tasks of an evaluation, one for each point, and the instruments they share: codec, feature networks, references."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from madformer.config import ExperimentConfig
from madformer.config.experiment import has_held_out, held_out_data
from madformer.config.identity import is_outdated, run_hash
from madformer.data.codec import Codec, build_codec, require_fit
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.diffusion.samplers import spaced_timesteps
from madformer.errors import ConfigError
from madformer.evaluation.feature_networks import FeatureNetwork, build_fitting_networks
from madformer.evaluation.held_out import explain_errors
from madformer.evaluation.measurement import AXES, DEFAULTS, Measurement, Sampling, metric_name
from madformer.evaluation.metrics import frechet_bias
from madformer.evaluation.record import find_tuning
from madformer.evaluation.reference import Reference, find_reference
from madformer.evaluation.request import EvaluationRequest
from madformer.evaluation.sampling import choose_prompts, sampling_precision, tokenize
from madformer.runs.checkpoints import DATA, checkpoint_step, load_checkpoint, load_model, weights_sha256

FEW = 10
"""Samples for each feature, below which the bias of the Fréchet distance is worth a warning."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Instruments:
    """What samples are decoded and measured with, on one device."""

    codec: Codec
    networks: tuple[FeatureNetwork, ...]
    references: tuple[Reference, ...] = ()
    """One for each network; none yet while a plan is checked."""
    held_out: tuple[Reference, ...] = ()
    """The same of held-out images; empty: none are named."""

    @staticmethod
    def open(request: EvaluationRequest, device: str) -> Instruments:
        """The run's codec and the feature networks, without references: those are costly, mistakes are cheap.

        Raises:
            ConfigError: a codec or network that cannot be had, a codec that is not the model's, or a network for other images.
        """
        data = request.config.data
        codec = build_codec(data.codec, data.codec_dtype, device)
        require_fit(codec, request.config.model)
        return Instruments(codec, build_fitting_networks(request.config, codec, device))

    def with_references(self, request: EvaluationRequest) -> Instruments:
        """With the networks' references, found or computed.

        Raises:
            ConfigError: no reference images, or no held-out images where some are named.
            InputError: references that are not of the run's images.
        """
        config, trained_on = request.config, source_sha256(request.checkpoints[-1])
        size = config.model.latent_size * self.codec.downsampling
        found = [find_reference(network, config, size, trained_on, request.references) for network in self.networks]
        held_out = list[Reference]()
        if has_held_out(config):
            with explain_errors():
                others = replace(config, data=held_out_data(config))
                sha256 = None
                for network in self.networks:
                    held_out.append(find_reference(network, others, size, sha256))
                    sha256 = held_out[0].described["source_sha256"]
                if any(reference.described["source_sha256"] == trained_on for reference in held_out):
                    remedy = "name others, as evaluation.held_out_source=FILE"
                    raise ConfigError(f"{others.data.source} holds the images that the run was trained on: {remedy}")
        return replace(self, references=tuple(found), held_out=tuple(held_out))


@dataclass(frozen=True)
class Task:
    """One point of a record: samples to be taken and measured."""

    config: ExperimentConfig
    """The run's, with the sampling and nothing else: other depths have other budgets."""
    checkpoint: Path
    sampling: Sampling
    prompts: tuple[str, ...]
    """One for each sample; empty texts for a model without text."""
    described: dict[str, Any]
    """The point as far as it is known before anything is sampled."""

    @property
    def measurement(self) -> Measurement:
        """What the point will be a measurement of, once its references are known."""
        return Measurement.of_point(self.described)

    @property
    def folder(self) -> Path:
        """Where features are kept until all are there; the first samples of many are those of few.

        Its name must not change: an evaluation that was interrupted goes on there.
        """
        measured, sampling = self.measurement, self.sampling
        sampled = {**sampling.curve_fields, "steps": sampling.steps, "seed": sampling.seed}
        always = ("sampler", "guidance", "weights", "steps", "seed")
        decides = {
            **{name: value for name, value in sampled.items() if name in always or value != DEFAULTS[name]},
            "weights_sha256": measured.weights_sha256,
            "prompts": measured.prompts or None,
            "precision": measured.precision,
            "codec": measured.codec,
            "references": [(sha256, None) for sha256 in measured.references or ()],
            "feature_networks": [(sha256, None) for _, sha256 in measured.feature_networks],
        }
        name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        return self.config.run_dir / "features" / name

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.checkpoint} at NFE {self.sampling.nfe}"


def make_tasks(request: EvaluationRequest, instruments: Instruments) -> list[Task]:
    """All points that are asked for, without references.

    Raises:
        ConfigError: a tokenizer that cannot be had.
        InputError: a torn checkpoint or one of another model, or prompts that the run cannot have.
    """
    return [task for path in request.checkpoints for task in _tasks_of(request, path, instruments)]


def complete_tasks(tasks: Sequence[Task], instruments: Instruments, silent: bool = False) -> list[Task]:
    """The same with the references, and the bias to expect; few samples for wide features are warned of, unless `silent`."""
    count, networks, references = tasks[0].described["num_samples"], instruments.networks, instruments.references
    bias = dict[str, float]()
    for number, (network, reference) in enumerate(zip(networks, references, strict=True)):
        name, value = metric_name("fd", network.label), frechet_bias(reference.moments, count)
        bias[name] = value
        for held_out in instruments.held_out[number : number + 1]:  # as many samples would scatter
            scatter = frechet_bias(reference.moments, held_out.moments.count)
            bias[metric_name("fd", network.label, held_out=True)] = value + scatter
        if count < FEW * network.width and not silent:
            few = f"{count:,} samples for features of width {network.width:,} are few"
            _log.warning("%s: %s of perfect samples would be %.3g, not 0: compare only numbers of as many", few, name, value)
    pedigrees = [reference.pedigree for reference in references]
    pedigrees += [{**reference.pedigree, "held_out": True} for reference in instruments.held_out]
    known = {"references": pedigrees, "bias": bias}
    return [replace(task, described={**task.described, **known}) for task in tasks]


def source_sha256(checkpoint: Path) -> str | None:
    """Fingerprint of the images that a run was trained on; None: its checkpoint does not say."""
    found: str | None = load_checkpoint(checkpoint).get(DATA, {}).get("fingerprint", {}).get("source")
    return found


def _tasks_of(request: EvaluationRequest, path: Path, instruments: Instruments) -> Iterator[Task]:
    config, codec = request.config, instruments.codec
    weights = request.samplings[0].weights
    described = {
        "kind": request.kind,
        "checkpoint": path.name,
        "step": checkpoint_step(path),
        "weights": weights,
        "weights_sha256": weights_sha256(load_model(path, config, weights)),
        "config_hash": run_hash(config),
        "num_samples": config.evaluation.num_samples,
        "codec": {"name": config.data.codec, "sha256": codec.sha256, "dtype": config.data.codec_dtype},
        "feature_networks": [
            {"name": network.name, "label": network.label, "width": network.width, "sha256": network.sha256}
            for network in instruments.networks
        ],
    }
    schedule, prompts_by_guidance = NoiseSchedule(config.diffusion), dict[float, tuple[str, ...]]()
    for sampling in request.samplings:
        if sampling.guidance not in prompts_by_guidance:
            indices = range(config.evaluation.num_samples)
            chosen = tuple(prompt.text for prompt in choose_prompts(config, path, None, None, indices, sampling.guidance))
            tokenize(config, chosen[:1], sampling.guidance)  # if there is a mistake, better now
            prompts_by_guidance[sampling.guidance] = chosen
        prompts = prompts_by_guidance[sampling.guidance]
        point = {
            **described,
            **{name: getattr(sampling, name) for name in AXES},
            "prompts": _sha256_of_texts(prompts) if any(prompts) else None,
            "precision": sampling_precision(config, codec.device),
            "nfe": sampling.nfe,
            "steps": sampling.steps,
            "last_timestep": spaced_timesteps(sampling.spacing, sampling.steps, schedule.alphas_cumprod)[-1],
        }
        if request.tuned and (choice := find_tuning(config.run_dir, sampling.nfe, sampling.diffusion_depth)) is not None:
            point |= {"tuned": True, "tries": choice["tries"]}
        if point["last_timestep"] == 0 and request.kind == "point" and is_outdated(config.run_dir):
            _log.warning("%s: version 0.1.0 trained it and broke it at timestep 0, where this sampling ends", config.run_dir)
        point["command"] = _command(config, point, request.references)
        yield Task(sampling.apply(config), path, sampling, prompts, point)


def _command(config: ExperimentConfig, point: dict[str, Any], references: Sequence[Path]) -> str:
    """What gives this point again."""
    options = {
        "--nfe": point["nfe"],
        "--num-samples": point["num_samples"],
        "--checkpoints": point["step"],
        "--weights": point["weights"],
        **{axis.option: point[name] for name, axis in AXES.items()},
    }
    words = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    words += [word for path in references for word in ("--reference", str(path))]
    networks = json.dumps(config.evaluation.feature_networks, ensure_ascii=False)
    overrides = [f"evaluation.feature_networks={networks}", f"evaluation.batch_size={config.evaluation.batch_size}"]
    named = {name: getattr(config.evaluation, name) for name in ("held_out_source", "held_out_split")}
    overrides += [f"evaluation.{name}={json.dumps(value)}" for name, value in named.items() if value is not None]
    return shlex.join(["madformer", "evaluate", str(config.run_dir), *overrides, *words])


def _sha256_of_texts(texts: Sequence[str]) -> str:
    """Of prompts that come in turn: the same for more samples."""
    return hashlib.sha256("\n".join(dict.fromkeys(texts)).encode()).hexdigest()
