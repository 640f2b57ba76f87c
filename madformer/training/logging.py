"""Scalars of a training step (losses, as means over micro-batches and devices, and speed), and the loggers that take them."""

from __future__ import annotations

import csv
import math
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torch import Tensor

from madformer.config import ExperimentConfig, trained_fields, wanted_outputs
from madformer.diffusion.losses import Losses
from madformer.errors import ConfigError, InputError
from madformer.evaluation.tensorboard import board_address
from madformer.model import cost
from madformer.parallel import device_name, peak_flops
from madformer.runs.files import atomic_write, write_text

Window = Sequence[tuple[Losses, Tensor]]
"""The micro-batches of a step: losses, and the timesteps of the noisy blocks [B * k, L]."""

Reduce = Callable[..., Any]
"""A strategy's mean or sum over devices."""

QUARTERS = 4
"""Parts of the noise schedule that have a loss of their own in the log."""


def mean_terms(window: Window, reduce: Reduce) -> dict[str, float]:
    """`loss/total` and each unweighted term, as `loss/image`."""
    batches = [{"total": losses.total.detach(), **losses.terms} for losses, _ in window]
    names = list(batches[0])
    values = torch.stack([torch.stack([terms[name].detach().float() for name in names]) for terms in batches]).mean(dim=0)
    return {f"loss/{name}": value for name, value in zip(names, reduce(values, reduce_op="mean").tolist(), strict=True)}


def block_losses(window: Window, config: ExperimentConfig, reduce: Reduce) -> dict[str, float]:
    """The image loss by quarter of the noise schedule (`loss_t/0`: least noise) and by block (`loss_block/0`: the first)."""
    image_BL = torch.cat([losses.image_BL for losses, _ in window]).double()
    t_BL = torch.cat([t for _, t in window])
    quarter_BL = t_BL * QUARTERS // config.diffusion.train_timesteps
    block_BL = torch.arange(t_BL.shape[1], device=t_BL.device).expand_as(t_BL)
    values: dict[str, float] = {}
    for prefix, group_BL, count in (("loss_t", quarter_BL, QUARTERS), ("loss_block", block_BL, t_BL.shape[1])):
        sums = torch.zeros(2, count, dtype=torch.float64, device=t_BL.device)
        sums[0].index_add_(0, group_BL.flatten(), image_BL.flatten())
        sums[1].index_add_(0, group_BL.flatten(), torch.ones_like(image_BL).flatten())
        totals, counts = reduce(sums, reduce_op="sum").tolist()
        values |= {f"{prefix}/{i}": totals[i] / counts[i] for i in range(count) if counts[i]}
    return values


class Throughput:
    """Speed between two logged steps, without the time of previews and checkpoints."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.batch_size = config.data.batch_size
        outputs = wanted_outputs(config.loss)
        self._flops_per_image = cost.training_flops(config.model, outputs, config.diffusion.draws_per_image)
        self._precision = config.trainer.precision
        self.start()

    def start(self) -> None:
        """Start measuring anew."""
        self._start_time, self._steps = time.perf_counter(), 0

    def count_step(self) -> None:
        """Count one step of the optimiser."""
        self._steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time of the block."""
        pause_time = time.perf_counter()
        yield
        self._start_time += time.perf_counter() - pause_time

    def measure(self, device: torch.device, world_size: int) -> dict[str, float]:
        """Images per second, TFLOP/s of one device, and its share of the device's peak where that is known.

        Model FLOPs utilisation (`mfu`, PaLM's) leaves out what activation checkpointing computes again; with it there is
        `hfu` too, which is of all FLOPs.
        """
        rate = self._steps * self.batch_size / max(time.perf_counter() - self._start_time, 1e-9)
        self.start()
        flops, own = self._flops_per_image, rate / world_size
        values = {"speed/images_per_second": rate, "speed/tflops_per_device": own * flops.total / 1e12}
        if peak := peak_flops(device_name(device), self._precision):
            values["speed/mfu"] = own * flops.model_flops / peak
            if flops.recomputation:
                values["speed/hfu"] = own * flops.total / peak
        return values


def build_loggers(config: ExperimentConfig) -> list[Logger]:
    """Lightning's loggers that `trainer.loggers` names.

    Raises:
        ConfigError: one of them is not installed.
    """
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: RunLogger(save_dir=config.run_dir, name="", version=""),
        "csv": lambda: RunCsvLogger(save_dir=config.run_dir.absolute(), name="", version="", flush_logs_every_n_steps=1),
        "wandb": lambda: RunWandbLogger(config),
    }
    return [makers[name]() for name in config.trainer.loggers]


def where_logged(config: ExperimentConfig) -> list[str]:
    """Lines that say where to see what a run has logged."""
    lines = {
        "tensorboard": [
            f"in TensorBoard: tensorboard --logdir {shlex.quote(config.output_dir)}",
            f"                {board_address(runFilter=f'^{re.escape(config.name)}$')}",
        ],
        "csv": [f"as a table:     {config.run_dir / ExperimentWriter.NAME_METRICS_FILE}"],
    }
    return [line for name in config.trainer.loggers for line in lines.get(name, [])]  # wandb prints its own address


class RunLogger(TensorBoardLogger):
    """Event files in the run's folder, without Lightning's hparams.yaml."""

    @property
    def log_dir(self) -> str:
        """The run's folder as it is named. Lightning would expand `~` and `$` in it."""
        return str(self._root_dir)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log finite values only: TensorBoard draws NaN and infinity as if they were numbers."""
        super().log_metrics({name: value for name, value in metrics.items() if math.isfinite(value)}, step)

    def save(self) -> None:
        """Write the log to the disk."""
        self.experiment.flush()


class RunCsvLogger(CSVLogger):
    """`metrics.csv` in the run's folder, a row for each logged step. A resumed run goes on with it; `copy_rows` comes first."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer of the file."""
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir)
        return self._experiment


class _Rows(ExperimentWriter):
    """Lightning's writer, which would delete the rows that are there, and lose them if it is killed as it adds a column."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.metrics_keys = _read_rows(Path(self.metrics_file_path))[0]

    def _check_log_dir_exists(self) -> None:
        pass

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write_rows(path, fieldnames, _read_rows(path)[1])


def copy_rows(run: Path, target: Path, step: int) -> None:
    """Copy the rows of a run's `metrics.csv` up to a step, to its own folder or a branch's. A run without them has none.

    So a run that goes on after this step has each row once. A last row that a crash cut short is left out.
    """
    columns, rows = _read_rows(run / ExperimentWriter.NAME_METRICS_FILE)
    if "step" in columns:
        kept = [row for row in rows if int(row["step"]) <= step]
        _write_rows(target / ExperimentWriter.NAME_METRICS_FILE, columns, kept)


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows; none: there is no such file."""
    if not path.is_file():
        return [], []
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(line for line in file if line.endswith("\n"))
        return list(table.fieldnames or []), list(table)


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


class RunWandbLogger(WandbLogger):
    """A run of Weights & Biases in the project `madformer` (or `WANDB_PROJECT`); a resumed run goes on with it.

    Its id is in the run's folder, `wandb-id.txt`.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        project = os.environ.get("WANDB_PROJECT", "madformer")
        try:
            super().__init__(config.name, config.run_dir, project=project, config=trained_fields(config))
        except ModuleNotFoundError as error:
            remedy = "wandb is not installed: pip install 'madformer[wandb]'"
            raise ConfigError(f"trainer.loggers = {list(config.trainer.loggers)}: {remedy}") from error
        self._id_file = config.run_dir / "wandb-id.txt"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of Weights & Biases.

        Raises:
            InputError: wandb cannot begin, as without a login.
        """
        import wandb

        if self._experiment is None:
            if not self._id_file.is_file():
                write_text(self._id_file, secrets.token_hex(4) + "\n")
            self._wandb_init["id"] = self._id_file.read_text(encoding="utf-8").strip()
        try:
            return super().experiment
        except wandb.Error as error:
            raise InputError(f"{str(error).splitlines()[0]} Without a server: set WANDB_MODE=offline") from error

    def finalize(self, status: str) -> None:
        """End the run, so that the next one of this process is another."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))
            self._experiment = None
