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
"""Suffix of the names of distances to held-out images."""

Point = Mapping[str, Any]
"""A line of a run's record."""

MEMORISATION = "memorisation"
"""Key of the metric that compares samples with training and held-out images."""

DISTANCE = "distance"
"""Stands for the distance of the first feature network."""

CONFIDENCE = 0.95
"""Confidence level of the intervals in records and reports."""

INCEPTION = "inception"
"""Label of Inception with its published weights, the only feature network whose Fréchet distance is called FID."""


@dataclass(frozen=True)
class Metric:
    """A metric over the features of one network. `metrics.computes` marks the function that computes it."""

    title: str
    higher_is_better: bool | None = False
    """None: neither high nor low values are better, so nothing is ranked by it."""
    is_distance: bool = False
    """Whether it is a distance to the reference images, 0 at best. Runs are ranked by distances."""
    needs_pairs: bool = False
    """Whether it compares all pairs of features, with as many reference images as samples (`neighbours.compare_pairs`)."""


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
    """The name of a metric over a network's features in records, curves and tables.

    Args:
        metric: a key of `METRICS`.
        label: the network's label.
        held_out: whether it is a distance to held-out images.

    Returns:
        `fid`, `kid`, `precision` for Inception; `fd_digits`, `kid_dinov2` for other networks; `fid_held_out`.
    """
    end = HELD_OUT if held_out else ""
    if label == INCEPTION:
        return ("fid" if metric == "fd" else metric) + end
    return f"{metric}_{label}{end}"


def metric_key(name: str) -> str | None:
    """The key in `METRICS` of a recorded metric of any network; None: there is no such metric."""
    name = name.removesuffix(HELD_OUT)
    if name == "fid":
        return "fd"
    return next((key for key in METRICS if name.startswith(f"{key}_") or (name == key and key != "fd")), None)


def higher_is_better(name: str) -> bool | None:
    """Whether higher values of a recorded metric are better; None: nothing is ranked by it."""
    key = metric_key(name)
    return key is not None and METRICS[key].higher_is_better


@dataclass(frozen=True)
class Sampling:
    """How images are sampled from a checkpoint: all choices of inference.

    A new inference axis is a new field. Its default must be the behaviour from before the field existed.
    """

    nfe: int
    """The budget in layer evaluations per block, as requested."""
    steps: int
    """Denoising steps per block: as many as the budget allows."""
    sampler: SamplerName = "ddim"
    spacing: str = "uniform"
    """Spacing of the sampler's timesteps."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1: none."""
    guidance_interval: str = ALL_TIMESTEPS
    """Timesteps at which guidance acts; `all` without guidance."""
    weights: Weights = "ema"
    seed: int = 0
    diffusion_depth: int | None = None
    """The depth at which an elastic run is sampled; None: the run's depth is fixed."""

    def __post_init__(self) -> None:
        # Equal samples, equal keys.
        object.__setattr__(self, "guidance", float(self.guidance))
        object.__setattr__(self, "spacing", canonical_spacing(self.spacing))
        if self.guidance == 1:
            object.__setattr__(self, "guidance_interval", ALL_TIMESTEPS)

    @classmethod
    def of_nfe(cls, config: ExperimentConfig, nfe: int, weights: Weights = "ema", depth: int | None = None) -> Sampling:
        """The sampling of `config.evaluation`, with as many steps as a budget allows.

        Args:
            depth: diffusion depth of an elastic run; None: its default.

        Raises:
            ConfigError: no steps, more than the noise schedule has, or a depth that the run was not trained with.
        """
        model = config.model.at_depth(config.model.sampled_depth(depth))
        return cls._of(config, nfe, cost.steps_for_nfe(model, nfe), weights, depth)

    @classmethod
    def of_steps(cls, config: ExperimentConfig, steps: int, weights: Weights = "ema", depth: int | None = None) -> Sampling:
        """The sampling of `config.evaluation` in a number of steps, whose NFE is the budget.

        Args:
            steps: denoising steps per block.
            depth: diffusion depth of an elastic run; None: its default.

        Raises:
            ConfigError: as `of_nfe`.
        """
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
        """The sampling of a line of the record. Fields that the line lacks have their defaults."""
        return cls(**{field.name: point[field.name] for field in fields(cls) if field.name in point})

    @classmethod
    def of_choice(cls, line: Point, which: str = "sampling") -> Sampling:
        """The sampling in a line of `madformer tune`: the choice, or the `default` that it was compared with."""
        return cls(line["nfe"], line["steps"], **line[which])

    @property
    def key(self) -> str:
        """Equal keys mean equal samples from equal weights. Budgets with the same number of steps share a key."""
        return f"{self.curve_key} steps={self.steps} seed={self.seed}"

    @property
    def curve_key(self) -> str:
        """The key without steps and seed. All points of a curve share it."""
        return " ".join(f"{name}={value}" for name, value in self.curve_fields.items())

    @property
    def curve_fields(self) -> dict[str, Any]:
        """All fields but budget, steps and seed, by their names in records."""
        return {name: getattr(self, name) for name in CURVE_FIELDS}

    def difference(self, main: Sampling) -> str:
        """The difference of this curve from another one in words, such as `unipc, guidance 1.5`; empty: none."""
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
        """The configuration with these fields, only this budget and diffusion depth, and no previews.

        Raises:
            ConfigError: the run cannot be sampled like this.
        """
        chosen = {name: getattr(self, name) for name in AXES if name != DEPTH}
        evaluation = replace(config.evaluation, nfe=(self.nfe,), preview_every=None, **chosen)
        return replace(config, model=config.model.at_depth(self.diffusion_depth), evaluation=evaluation)


DEPTH = "diffusion_depth"
"""The only field of `Sampling` whose default comes from the model's configuration, not the evaluation's."""

CURVE_FIELDS = tuple(field.name for field in fields(Sampling) if field.name not in ("nfe", "steps", "seed"))
"""Fields that all points of a curve share, in the order of tables."""

DEFAULTS = {field.name: field.default for field in fields(Sampling) if field.default is not MISSING}
"""Field of `Sampling` -> its default, the behaviour from before the field existed."""


def parse_integers(option: str, text: str) -> tuple[int, ...]:
    """Integers with commas between them, each once.

    Raises:
        InputError: the text is something else. The message names the option.
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
    """An inference axis: a field of `Sampling` that can have several values in an evaluation."""

    option: str
    """Option of `madformer evaluate`."""
    sweep_key: str
    """Key under a sweep's `evaluate`."""
    parse: Callable[[str, str], tuple[Any, ...]]
    """Turns the option and its text into values; raises `InputError`."""


AXES = {
    DEPTH: Axis("--diffusion-depth", "diffusion_depths", parse_integers),
    "sampler": Axis("--sampler", "samplers", _parse_samplers),
    "spacing": Axis("--spacing", "spacings", _parse_words),
    "guidance": Axis("--guidance", "guidance", _parse_numbers),
    "guidance_interval": Axis("--guidance-interval", "guidance_intervals", _parse_words),
    "seed": Axis("--seeds", "seeds", parse_integers),
}
"""Field of `Sampling` -> its axis. The budget varies fastest, then the last of these."""


def default_axes(config: ExperimentConfig) -> dict[str, Any]:
    """The default value of each of `AXES`."""
    named = {name: getattr(config.evaluation, name) for name in AXES if name != DEPTH}
    return {DEPTH: config.model.sampled_depth(), **named}


def all_samplings(budgets: Sequence[Sampling], values: Mapping[str, Sequence[Any]]) -> tuple[Sampling, ...]:
    """All combinations of values of `AXES`; budgets vary fastest.

    Args:
        budgets: a sampling for each diffusion depth and budget, since a budget's steps depend on the depth.
        values: field -> values. An axis without values has those of `budgets`.

    Raises:
        ConfigError: an unknown spacing.
    """
    varied = [name for name in AXES if values.get(name) and name != DEPTH]
    combinations = itertools.product(*(values[name] for name in varied))
    changes = [dict(zip(varied, combination, strict=True)) for combination in combinations]
    return tuple(dict.fromkeys(replace(budget, **change) for change in changes for budget in budgets))


@dataclass(frozen=True)
class Measurement:
    """Everything that determines a point's metrics. Only this class decides which numbers are the same measurement.

    For a recorded point all fields are known. For a cell that is not evaluated yet, None stands for unknown.
    """

    sampling: Sampling
    num_samples: int
    feature_networks: tuple[tuple[str, str | None], ...]
    """Name and SHA-256 of each network."""
    weights_sha256: str | None = None
    """SHA-256 of the checkpoint's weights."""
    prompts: str | None = None
    """SHA-256 of the prompts; empty: no text."""
    precision: str | None = None
    codec: tuple[str | None, str] | None = None
    """SHA-256 and dtype of the codec."""
    references: tuple[str, ...] | None = None
    """SHA-256 of each network's reference statistics, and of its held-out ones."""
    held_out: bool | None = None
    """Whether distances to held-out images are measured too."""

    @classmethod
    def of_point(cls, point: Point) -> Measurement:
        """The measurement of a point, or of a mean over points. A mean has no seed and no weights of its own."""
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
        """Equal keys mean the same measurement. A point with a recorded key is not measured again."""
        return json.dumps([self.sampling.key, self.weights_sha256, self.conditions])

    @property
    def curve_key(self) -> str:
        """The key that all points of a curve share, over its budgets, checkpoints and seeds."""
        return json.dumps([self.sampling.curve_key, self.conditions])

    @property
    def conditions(self) -> dict[str, Any]:
        """Fields that must agree for two curves to be comparable, with any models and samplings. Paths do not count."""
        return {
            "num_samples": self.num_samples,
            "prompts": self.prompts,
            "precision": self.precision,
            "codec": self.codec,
            "references": self.references,
            "feature_networks": [sha256 or name for name, sha256 in self.feature_networks],
        }

    def matches(self, point: Measurement) -> bool:
        """Whether a point is this measurement, at this budget, in all fields that are known here."""
        known = ("weights_sha256", "prompts", "precision", "codec", "references", "held_out")
        values = ((getattr(self, name), getattr(point, name)) for name in known)
        return (
            (self.sampling, self.num_samples) == (point.sampling, point.num_samples)
            and point.has_networks(self.feature_networks)
            and all(value in (None, other) for value, other in values)
        )

    def has_networks(self, networks: Sequence[tuple[str, str | None]]) -> bool:
        """Whether the measurement has these feature networks: by SHA-256, or by name if that is unknown."""
        return len(networks) == len(self.feature_networks) and all(map(_same_network, networks, self.feature_networks))


def differing(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys whose values differ between mappings with the same keys."""
    listed = list(entries)
    return [key for key in listed[0] if len({repr(entry[key]) for entry in listed}) > 1] if listed else []


def half_width(values: Sequence[float]) -> float:
    """Half-width of the 95 % confidence interval of the mean of several values (Student's t)."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # scipy.stats takes a second to import

    return float(stdtrit(len(values) - 1, 0.5 + CONFIDENCE / 2)) * stdev(values) / math.sqrt(len(values))


def _same_network(network: tuple[str, str | None], other: tuple[str, str | None]) -> bool:
    """Compare by hash, which does not depend on the file's name or place; without a hash, by name."""
    return network[1] == other[1] if network[1] is not None else network[0] == other[0]
