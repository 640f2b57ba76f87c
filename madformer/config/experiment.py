"""The configuration of an experiment: the model, its diffusion process, its losses, and how it is trained and evaluated."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from madformer.config.data import BUILTIN, BUILTIN_VOCABULARY, DIGITS, PIXELS, WHOLE, DataConfig, names_files
from madformer.config.evaluation import EvaluationConfig, listed_timesteps
from madformer.config.model import ModelConfig
from madformer.config.training import OptimizerConfig, TrainerConfig
from madformer.config.validation import is_folder_name, is_integer, require, require_at_least, require_types, setting
from madformer.errors import ConfigError


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule (DDPM, linear betas) and the noise draws of training."""

    train_timesteps: int = 1000
    """Timesteps t = 0 .. train_timesteps - 1."""
    beta_start: float = 1e-4
    """Noise variance of the first timestep."""
    beta_end: float = 2e-2
    """Noise variance of the last timestep."""
    draws_per_image: int = 1
    """Number of independent (t, noise) draws per image. The clean tower and the AR stage run once for all of them."""

    def __post_init__(self) -> None:
        require_types("diffusion", self)
        require_at_least(1, "diffusion", self, "train_timesteps", "draws_per_image")
        require(0 < self.beta_start < 1, "diffusion.beta_start", self.beta_start, "must be between 0 and 1")
        legal = self.beta_start <= self.beta_end < 1
        require(
            legal, "diffusion.beta_end", self.beta_end, f"must be at least diffusion.beta_start = {self.beta_start} and below 1"
        )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the total loss (Eq. 6). A loss of weight zero is not computed."""

    lambda_text: float = 1.0
    """Weight of the text loss: next-token prediction. It has no effect without text."""
    lambda_image: float = 5.0
    """Weight of the image loss, which compares the denoised block with its target."""
    lambda_hidden: float = 0.1
    """Weight of the hidden loss, which compares the upsampled condition with the block's clean latents."""
    lambda_clean_tower: float = 0.0
    """Weight of the clean-tower loss, which compares the tower's output at a block with the next block's clean latents."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            legal = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
            require(legal, f"loss.{item.name}", value, "must be a finite number of at least 0")
        require_types("loss", self)


@dataclass(frozen=True)
class ExperimentConfig:
    """An experiment: the whole configuration of a run."""

    name: str = setting("madformer", new_run=False)
    """Name of the experiment. Its run's folder is output_dir/name."""
    output_dir: str = setting("runs", new_run=False, path=True)
    """Folder of runs, relative to the working directory."""
    seed: int = 0
    """Seed of initialisation, data order and training noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The noise schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the losses."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training data."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimiser and the learning rate schedule."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Training length, precision, devices, checkpoints and logging."""
    evaluation: EvaluationConfig = setting(EvaluationConfig(), new_run=False)
    """Evaluation and previews."""

    def __post_init__(self) -> None:
        require(is_integer(self.seed) and self.seed >= 0, "seed", self.seed, "must be an integer of at least 0")
        require(is_folder_name(self.name), "name", self.name, "must be the name of a folder")
        check_losses(self.model, self.loss)
        check_elastic(self.model, self.loss)
        check_schedule(self.optimizer, self.trainer.max_steps)
        legal = self.diffusion.draws_per_image == 1 or self.model.clean_timestep == "zero"
        remedy = "several draws share the clean blocks: set diffusion.draws_per_image=1 or model.clean_timestep=zero"
        require(legal, "diffusion.draws_per_image", self.diffusion.draws_per_image, remedy)
        check_data(self.data, self.model)
        check_budgets(self.evaluation, self.model, self.diffusion)
        legal = self.evaluation.guidance == 1 or self.model.text is not None
        remedy = "there is nothing to guide towards: set it to 1, or train a model with text (model.text)"
        require(legal, "evaluation.guidance", self.evaluation.guidance, remedy)

    @property
    def run_dir(self) -> Path:
        """The folder of the experiment's run, output_dir/name."""
        return Path(self.output_dir) / self.name


def held_out_data(config: ExperimentConfig) -> DataConfig:
    """The images of `evaluation.held_out_source` and `evaluation.held_out_split`, to be read as training reads its images.

    Raises:
        ConfigError: no source is named.
    """
    evaluation, data = config.evaluation, config.data
    source = evaluation.held_out_source or data.source
    if source is None:
        remedy = "name images, as in data.source"
        raise ConfigError(f"evaluation.held_out_source = null, and data.source as well: {remedy}")
    return replace(data, source=source, split=evaluation.held_out_split or data.split, latents=None, flip=False)


def has_held_out(config: ExperimentConfig) -> bool:
    """Whether held-out images are named and disjoint from those of training.

    Raises:
        ConfigError: a split is named, but no source.
    """
    if not names_held_out(config.evaluation):
        return False
    data = held_out_data(config)
    one, other = (
        re.sub(rf"\b({'|'.join(WHOLE)})\b", "train", split) if names_files(str(data.source)) else split
        for split in (data.split, config.data.split)
    )
    return data.source != config.data.source or not _share_rows(one, other)


def names_held_out(evaluation: EvaluationConfig) -> bool:
    """Whether the experiment names held-out images. They may still overlap with those of training."""
    return evaluation.held_out_source is not None or evaluation.held_out_split is not None


def _share_rows(one: str, other: str) -> bool:
    """Whether two splits, or slices of splits, have common rows. Sizes are not known here, so percentages are of a million."""
    try:
        rows = [list(map(_rows, split.split("+"))) for split in (one, other)]
    except ValueError:  # a name that only its data set understands
        return one == other
    pairs = [(a, b) for a in rows[0] for b in rows[1] if a[0] == b[0]]
    return any(max(a[1], b[1]) < min(a[2], b[2]) for a, b in pairs)


def _rows(split: str) -> tuple[str, int, int]:
    """Name, first row and end row of a slice in the notation of `datasets`, which itself takes a second to import."""
    match = re.fullmatch(r"\s*([\w.-]+)(?:\[(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\])?\s*", split)
    if match is None:
        raise ValueError(split)
    first, end = _row(match[2], match[3], 0), _row(match[4], match[5], 10**6)
    return match[1], first, end


def _row(number: str | None, percent: str, default: int) -> int:
    """A bound of a slice, as a row out of a million. Negative bounds count from the end."""
    if number is None:
        return default
    row = int(number) * (10**4 if percent else 1)
    return min(row, 10**6) if row >= 0 else max(row + 10**6, 0)


def check_schedule(optimizer: OptimizerConfig, max_steps: int) -> None:
    """Refuse a warm-up, set in steps, that does not end before the decay.

    Raises:
        ConfigError: warm-up and decay together are longer than the run.
    """
    decay = round(optimizer.decay_fraction * max_steps)
    remedy = f"with a decay of {decay} steps it must not exceed trainer.max_steps = {max_steps}"
    require((optimizer.warmup_steps or 0) + decay <= max_steps, "optimizer.warmup_steps", optimizer.warmup_steps, remedy)


def check_data(data: DataConfig, model: ModelConfig) -> None:
    """Refuse data that does not fit the model.

    Raises:
        ConfigError: digits with a codec or a model of other latents, pixels with a model that has not three channels, or the
            builtin tokenizer with a model that has fewer tokens.
    """
    if data.source == DIGITS:
        shape = f"{model.latent_channels} x {model.latent_size} x {model.latent_size}"
        legal = model.latent_channels == 1 and model.latent_size == 8
        require(legal, "data.source", data.source, f"its images are 1 x 8 x 8, the model's latents {shape}")
        require(data.codec == PIXELS, "data.codec", data.codec, f"digits need no codec: set data.codec={PIXELS}")
        require(data.latents is None, "data.latents", data.latents, "digits need none: set data.latents=null")
        require(not data.flip, "data.flip", data.flip, "digits must not be mirrored: set data.flip=false")
    elif data.codec == PIXELS and (data.source or data.latents):
        remedy = f"images have 3 channels, the model {model.latent_channels}: set model.latent_channels=3, or another codec"
        require(model.latent_channels == 3, "data.codec", data.codec, remedy)
    if model.text and data.tokenizer == BUILTIN:
        size, pad = model.text.vocab_size, model.text.pad_token_id
        remedy = f"for data.tokenizer={BUILTIN} set model.text.vocab_size={BUILTIN_VOCABULARY} and model.text.pad_token_id=0"
        require(size >= BUILTIN_VOCABULARY and pad == 0, "model.text", f"vocab_size {size}, pad_token_id {pad}", remedy)


def check_budgets(evaluation: EvaluationConfig, model: ModelConfig, diffusion: DiffusionConfig) -> None:
    """Refuse budgets that allow no denoising step, or more steps than the noise schedule has timesteps.

    A budget of an elastic run must be legal at one of its depths.

    Args:
        evaluation: has the budgets.
        model: has the depths.
        diffusion: has the number of timesteps.

    Raises:
        ConfigError: a budget is not legal. The message says which ones are.
    """
    budgets = {"evaluation.nfe": evaluation.nfe}
    if evaluation.preview_every is not None:
        budgets["evaluation.preview_nfe"] = (evaluation.preview_nfe,)
    depths = [model, *(model.at_depth(depth) for depth in model.elastic_depths)]
    for name, values in budgets.items():
        for budget in values:
            flaws = [budget_flaw(budget, each, diffusion) for each in (depths if name == "evaluation.nfe" else [model])]
            if all(flaws):
                raise ConfigError(f"{name} = {budget}: {flaws[0]}")
            timesteps, steps = listed_timesteps(evaluation.spacing), (budget - model.ar_depth) // model.diffusion_depth
            remedy = f"its timesteps are {len(timesteps)}, {name} = {budget} makes {steps} steps"
            require(len(timesteps) in (0, steps), "evaluation.spacing", evaluation.spacing, remedy)
            noisiest = diffusion.train_timesteps - 1
            remedy = f"must start at full noise, {noisiest} (diffusion.train_timesteps - 1)"
            require(timesteps[:1] in ((), (noisiest,)), "evaluation.spacing", evaluation.spacing, remedy)


def budget_flaw(budget: int, model: ModelConfig, diffusion: DiffusionConfig) -> str | None:
    """The reason why a model cannot have an NFE budget, with the legal range; None: it can.

    Args:
        budget: layer evaluations per block.
        diffusion: has the number of timesteps, the most steps.
    """
    least, most = model.depth, model.ar_depth + model.diffusion_depth * (diffusion.train_timesteps + 1) - 1
    if least <= budget <= most:
        return None
    shape = f"with model.depth = {model.depth} and model.diffusion_depth = {model.diffusion_depth}"
    return f"{shape} a budget must be in {least}..{most}"


def check_losses(model: ModelConfig, loss: LossConfig) -> None:
    """Refuse losses on outputs that the model does not have.

    Raises:
        ConfigError: the hidden loss without the condition, the clean-tower loss without clean blocks or with a single block, or
            no image loss.
    """
    require(loss.lambda_image > 0, "loss.lambda_image", loss.lambda_image, "must be above 0: nothing else trains the denoiser")
    legal = loss.lambda_hidden == 0 or model.use_condition
    remedy = "needs the condition: set loss.lambda_hidden=0 or model.use_condition=true"
    require(legal, "loss.lambda_hidden", loss.lambda_hidden, remedy)
    legal = loss.lambda_clean_tower == 0 or model.use_clean_blocks
    remedy = "needs clean blocks: set loss.lambda_clean_tower=0 or model.use_clean_blocks=true"
    require(legal, "loss.lambda_clean_tower", loss.lambda_clean_tower, remedy)
    legal = loss.lambda_clean_tower == 0 or model.ar_length > 1
    remedy = "a single block has no next one: set loss.lambda_clean_tower=0 or model.ar_length to 4, 16, ..."
    require(legal, "loss.lambda_clean_tower", loss.lambda_clean_tower, remedy)


def check_elastic(model: ModelConfig, loss: LossConfig) -> None:
    """Refuse an elastic run whose depths train different parameters. With several devices, it would wait for gradients.

    Raises:
        ConfigError: another field has this effect on `model.elastic_depths`.
    """
    if not model.elastic_depths:
        return
    name, depths = "model.elastic_depths", list(model.elastic_depths)
    remedy = (
        "without the condition the AR stage does not train the noise tower: set model.use_condition=true, or leave it empty"
    )
    require(model.use_condition, name, depths, remedy)
    is_cut_off = model.local_denoising and model.use_clean_blocks and model.parameter_sets == "separate"
    is_cut_off = is_cut_off and loss.lambda_clean_tower == 0
    remedy = "local denoising does not train the clean tower: set model.local_denoising=false, or leave it empty"
    require(not is_cut_off, name, depths, remedy)


def wanted_outputs(weights: LossConfig) -> frozenset[str]:
    """Auxiliary outputs of the model that the loss reads."""
    needs = {"condition": weights.lambda_hidden, "clean_tower": weights.lambda_clean_tower, "text_logits": weights.lambda_text}
    return frozenset(name for name, weight in needs.items() if weight != 0)
