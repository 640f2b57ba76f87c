"""Metrics, samplings and measurements: their names, fields and keys. Needs no torch."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from statistics import stdev
from typing import Any, get_args

from madformer.config import ExperimentConfig
from madformer.config.evaluation import ALL_TIMESTEPS, SamplerName, canonical_spacing
from madformer.errors import ConfigError, InputError
from madformer.model import cost
from madformer.runs.checkpoints import Weights

HELD_OUT = "_held_out"
"""Ends the name of a distance to held-out images."""

Point = Mapping[str, Any]
"""A line of a run's record."""

MEMORISATION = "memorisation"
"""Key of the metric that compares samples with training and held-out images."""

DISTANCE = "distance"
"""Stands for the distance of the first feature network, whichever that is."""

CONFIDENCE = 0.95
"""Of the intervals in records and reports."""

INCEPTION = "inception"
"""Label of the one feature network whose Fréchet distance is called FID, with its published weights."""


@dataclass(frozen=True)
class Metric:
    """A metric over the features of one network. `metrics.computes` marks the function that computes it."""

    title: str
    higher_is_better: bool | None = False
    """None: neither a high nor a low value is best, so nothing is ranked by it."""
    is_distance: bool = False
    """Whether it is a distance to the reference images, 0 at best: what runs are ranked by."""
    needs_pairs: bool = False
    """Whether it compares all pairs of features, of as many reference images as samples (`neighbours.compare_pairs`)."""


METRICS = {
    "fd": Metric("Fréchet distance", is_distance=True),
    "kid": Metric("kernel distance", is_distance=True, needs_pairs=True),
    "inception_score": Metric("inception score", higher_is_better=True),
    "precision": Metric("precision", higher_is_better=True, needs_pairs=True),
    "recall": Metric("recall", higher_is_better=True, needs_pairs=True),
    "density": Metric("density", higher_is_better=True, needs_pairs=True),
    "coverage": Metric("coverage", higher_is_better=True, needs_pairs=True),
    MEMORISATION: Metric("memorisation", higher_is_better=None),
}
"""All metrics, in the order of records and tables."""


def metric_name(metric: str, label: str, held_out: bool = False) -> str:
    """What a metric over a network's features is called in records, curves and tables.

    Args:
        metric: a key of `METRICS`.
        label: the network's.
        held_out: whether it is a distance to held-out images.

    Returns:
        `fid`, `kid`, `precision` over Inception's features, and over no others: `fd_digits`, `kid_dinov2`; `fid_held_out`.
    """
    end = HELD_OUT if held_out else ""
    if label == INCEPTION:
        return ("fid" if metric == "fd" else metric) + end
    return f"{metric}_{label}{end}"


def metric_key(name: str) -> str | None:
    """The key in `METRICS` of a recorded metric, of whatever network it is; None: there is no such metric."""
    name = name.removesuffix(HELD_OUT)
    if name == "fid":
        return "fd"
    return next((key for key in METRICS if name.startswith(f"{key}_") or (name == key and key != "fd")), None)


def higher_is_better(name: str) -> bool | None:
    """Whether a recorded metric is to be maximised; None: nothing is ranked by it."""
    key = metric_key(name)
    return key is not None and METRICS[key].higher_is_better


@dataclass(frozen=True)
class Sampling:
    """How images are sampled from a checkpoint: everything about inference that one chooses.

    A new inference axis is one more field. Its default is what was done before there was a choice.
    """

    nfe: int
    """The budget in layer evaluations per block, as requested."""
    steps: int
    """Denoising steps per block: as many as the budget allows."""
    sampler: SamplerName = "ddim"
    spacing: str = "uniform"
    """How the sampler's timesteps are spaced."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1: none."""
    guidance_interval: str = ALL_TIMESTEPS
    """Timesteps at which guidance acts; all without guidance."""
    weights: Weights = "ema"
    seed: int = 0
    diffusion_depth: int | None = None
    """Of an elastic run, the depth that it is sampled at; None: the run's depth is fixed."""

    def __post_init__(self) -> None:
        # Equal samples, equal keys.
        object.__setattr__(self, "guidance", float(self.guidance))
        object.__setattr__(self, "spacing", canonical_spacing(self.spacing))
        if self.guidance == 1:
            object.__setattr__(self, "guidance_interval", ALL_TIMESTEPS)

    @classmethod
    def of_nfe(cls, config: ExperimentConfig, nfe: int, weights: Weights = "ema", depth: int | None = None) -> Sampling:
        """As `config.evaluation` says, with as many steps as a budget allows.

        Args:
            depth: of an elastic run, the diffusion depth; None: its default.

        Raises:
            ConfigError: no steps, more than the noise schedule has, or a depth that the run was not trained with.
        """
        model = config.model.at_depth(config.model.sampled_depth(depth))
        return cls._of(config, nfe, cost.steps_for_nfe(model, nfe), weights, depth)

    @classmethod
    def of_steps(cls, config: ExperimentConfig, steps: int, weights: Weights = "ema", depth: int | None = None) -> Sampling:
        """As `config.evaluation` says, in a number of steps; the budget is what they cost. Otherwise as `of_nfe`."""
        model = config.model.at_depth(config.model.sampled_depth(depth))
        return cls._of(config, cost.nfe(model, steps), steps, weights, depth)

    @classmethod
    def _of(cls, config: ExperimentConfig, nfe: int, steps: int, weights: Weights, depth: int | None) -> Sampling:
        most = config.diffusion.train_timesteps
        if not 1 <= steps <= most:
            raise ConfigError(f"steps = {steps}: must be in 1..{most}, the noise schedule's timesteps")
        return cls(nfe, steps, weights=weights, **{**default_axes(config), DEPTH: config.model.sampled_depth(depth)})

    @classmethod
    def of_point(cls, point: Point) -> Sampling:
        """That of a line of the record; a field that the line lacks has its default."""
        return cls(**{field.name: point[field.name] for field in fields(cls) if field.name in point})

    @classmethod
    def of_choice(cls, line: Point, which: str = "sampling") -> Sampling:
        """That of a line of `madformer tune`: its choice, or what the choice was compared with (`default`)."""
        return cls(line["nfe"], line["steps"], **line[which])

    @property
    def key(self) -> str:
        """Names a point: equal keys, equal samples of equal weights. Budgets of as many steps share it."""
        return f"{self.curve_key} steps={self.steps} seed={self.seed}"

    @property
    def curve_key(self) -> str:
        """The key without steps and seed: what all points of a curve have in common."""
        return " ".join(f"{name}={value}" for name, value in self.curve_fields.items())

    @property
    def curve_fields(self) -> dict[str, Any]:
        """Every field but budget and seed, by its name in records."""
        return {name: getattr(self, name) for name in CURVE_FIELDS}

    def difference(self, main: Sampling) -> str:
        """What sets its curve apart from another one, such as `unipc, guidance 1.5`; empty: nothing."""
        return ", ".join(text for name, text in self.texts.items() if text not in ("", main.texts[name]))

    @property
    def texts(self) -> dict[str, str]:
        """The curve's fields in words, by name."""
        weights = "EMA weights" if self.weights == "ema" else "raw weights"
        return {
            DEPTH: "" if self.diffusion_depth is None else f"D = {self.diffusion_depth}",
            "sampler": self.sampler,
            "spacing": self.spacing,
            "guidance": f"guidance {self.guidance:g}",
            "guidance_interval": f"at timesteps {self.guidance_interval}",
            "weights": weights,
        }

    def apply(self, config: ExperimentConfig) -> ExperimentConfig:
        """The configuration with these fields, this budget and this diffusion depth alone, without previews.

        Raises:
            ConfigError: the run cannot be sampled like this.
        """
        chosen = {name: getattr(self, name) for name in AXES if name != DEPTH}
        evaluation = replace(config.evaluation, nfe=(self.nfe,), preview_every=None, **chosen)
        return replace(config, model=config.model.at_depth(self.diffusion_depth), evaluation=evaluation)


DEPTH = "diffusion_depth"
"""The one field of `Sampling` whose default is the model's affair, not the evaluation's."""

CURVE_FIELDS = tuple(field.name for field in fields(Sampling) if field.name not in ("nfe", "steps", "seed"))
"""What the points of one curve were sampled with, in the order of tables."""

DEFAULTS = {field.name: field.default for field in fields(Sampling) if field.default is not MISSING}
"""Field of `Sampling` -> what it was before there was a choice."""


def parse_integers(option: str, text: str) -> tuple[int, ...]:
    """Integers with commas between them, each once.

    Raises:
        InputError: something else; the message names the option.
    """
    if not re.fullmatch(r"\d+(,\d+)*", text.replace(" ", "")):
        raise InputError(f"{option} {text}: must be integers with commas between them")
    return tuple(dict.fromkeys(int(number) for number in text.split(",")))


def _parse_numbers(option: str, text: str) -> tuple[float, ...]:
    numbers = []
    for part in map(str.strip, text.split(",")):
        try:
            numbers.append(float(part))
        except ValueError:
            raise InputError(f"{option} {part}: must be numbers with commas between them, such as 1,1.5") from None
    return tuple(dict.fromkeys(numbers))


def _parse_words(option: str, text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _parse_samplers(option: str, text: str) -> tuple[str, ...]:
    names = _parse_words(option, text)
    for name in names:
        if name not in get_args(SamplerName):
            raise InputError(f"{option} {name}: must be one of {', '.join(get_args(SamplerName))}")
    return names


@dataclass(frozen=True)
class Axis:
    """An inference axis: a field of `Sampling` of which an evaluation takes several values."""

    option: str
    """Option of `madformer evaluate`."""
    sweep_key: str
    """Key under a sweep's `evaluate`."""
    parse: Callable[[str, str], tuple[Any, ...]]
    """From the option and its text to values; raises `InputError`."""


AXES = {
    DEPTH: Axis("--diffusion-depth", "diffusion_depths", parse_integers),
    "sampler": Axis("--sampler", "samplers", _parse_samplers),
    "spacing": Axis("--spacing", "spacings", _parse_words),
    "guidance": Axis("--guidance", "guidance", _parse_numbers),
    "guidance_interval": Axis("--guidance-interval", "guidance_intervals", _parse_words),
    "seed": Axis("--seeds", "seeds", parse_integers),
}
"""Field of `Sampling` -> how it is varied; the last one varies fastest, but for the budget."""


def default_axes(config: ExperimentConfig) -> dict[str, Any]:
    """The value that each of `AXES` has if nothing is asked for."""
    named = {name: getattr(config.evaluation, name) for name in AXES if name != DEPTH}
    return {DEPTH: config.model.sampled_depth(), **named}


def all_samplings(budgets: Sequence[Sampling], values: Mapping[str, Sequence[Any]]) -> tuple[Sampling, ...]:
    """All combinations of values of `AXES`, budgets fastest; an axis without values is as the budgets have it.

    Args:
        budgets: for each diffusion depth its own, since a budget's steps depend on the depth.

    Raises:
        ConfigError: no spacing.
    """
    varied = [name for name in AXES if values.get(name) and name != DEPTH]
    combinations = itertools.product(*(values[name] for name in varied))
    changes = [dict(zip(varied, combination, strict=True)) for combination in combinations]
    return tuple(dict.fromkeys(replace(budget, **change) for change in changes for budget in budgets))


@dataclass(frozen=True)
class Measurement:
    """Everything that decides a point's metrics: the only place that says which two numbers are the same measurement.

    A point of the record is known in full. Of a sweep's cell that is not evaluated yet, what is None is not known.
    """

    sampling: Sampling
    num_samples: int
    feature_networks: tuple[tuple[str, str | None], ...]
    """Name and SHA-256 of each."""
    weights_sha256: str | None = None
    """Of the checkpoint's weights."""
    prompts: str | None = None
    """SHA-256 of the prompts; empty: without text."""
    precision: str | None = None
    codec: tuple[str | None, str] | None = None
    """SHA-256, and the type that it computes in."""
    references: tuple[str, ...] | None = None
    """SHA-256 of each network's reference images, and of its held-out ones."""
    held_out: bool | None = None
    """Whether distances to held-out images are measured too."""

    @classmethod
    def of_point(cls, point: Point) -> Measurement:
        """That of a point, or of a mean over points, which has no seed and no weights of its own."""
        return cls(
            Sampling.of_point(point),
            point["num_samples"],
            tuple((network["name"], network["sha256"]) for network in point["feature_networks"]),
            point.get("weights_sha256"),
            point["prompts"] or "",
            point["precision"],
            (point["codec"]["sha256"], point["codec"]["dtype"]),
            tuple(reference["sha256"] for reference in point["references"]),
            any(reference.get("held_out", False) for reference in point["references"]),
        )

    @property
    def key(self) -> str:
        """Equal keys, the same measurement: a point that is recorded need not be measured again."""
        return json.dumps([self.sampling.key, self.weights_sha256, self.conditions])

    @property
    def curve_key(self) -> str:
        """What all points of a curve have in common, over its budgets, checkpoints and seeds."""
        return json.dumps([self.sampling.curve_key, self.conditions])

    @property
    def conditions(self) -> dict[str, Any]:
        """What must agree for two curves to be compared, whatever their models and their sampling. Places do not count."""
        return {
            "num_samples": self.num_samples,
            "prompts": self.prompts,
            "precision": self.precision,
            "codec": self.codec,
            "references": self.references,
            "feature_networks": [sha256 or name for name, sha256 in self.feature_networks],
        }

    def matches(self, point: Measurement) -> bool:
        """Whether a point is this measurement at this budget, as far as this one is known."""
        known = ("weights_sha256", "prompts", "precision", "codec", "references", "held_out")
        values = ((getattr(self, name), getattr(point, name)) for name in known)
        return (
            (self.sampling, self.num_samples) == (point.sampling, point.num_samples)
            and point.has_networks(self.feature_networks)
            and all(value in (None, other) for value, other in values)
        )

    def has_networks(self, networks: Sequence[tuple[str, str | None]]) -> bool:
        """Whether a point is of these feature networks: names, and SHA-256 as far as they are known."""
        return len(networks) == len(self.feature_networks) and all(map(_same_network, networks, self.feature_networks))


def differing(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys in which mappings of the same keys differ."""
    listed = list(entries)
    return [key for key in listed[0] if len({repr(entry[key]) for entry in listed}) > 1] if listed else []


def half_width(values: Sequence[float]) -> float:
    """Half-width of the 95 % confidence interval of the mean of several values (Student's t)."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # scipy.stats takes a second to import

    return float(stdtrit(len(values) - 1, 0.5 + CONFIDENCE / 2)) * stdev(values) / math.sqrt(len(values))


def _same_network(network: tuple[str, str | None], other: tuple[str, str | None]) -> bool:
    """By hash, which neither a moved file nor a new name changes; by name where the hash is not known."""
    return network[1] == other[1] if network[1] is not None else network[0] == other[0]
