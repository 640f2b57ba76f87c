"""Stands in for `madformer train` and `madformer evaluate`: the same arguments, locks and files, and no training.

Every step is a line in `journal`, in the working directory. A file `fail-CELL` there makes the training of a cell fail, a file
`die-CELL` kills it, a file `hold-CELL` holds both commands up until it is deleted.
"""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

from madformer.config import config_hash, load_experiment, load_run, write_config
from madformer.errors import InputError
from madformer.evaluation.record import append_point
from madformer.model import cost
from madformer.runs.checkpoints import checkpoint_path, checkpoint_step, list_checkpoints
from madformer.runs.files import append_line, append_preview, claim_folder
from madformer.sweep.needs import network_sha256

INTACT = b"PK\5\6" + bytes(18)
"""An empty zip archive: a checkpoint whose checksums hold."""


def train(experiment, *overrides):
    config = load_experiment(experiment, overrides)
    with claim_folder(config.run_dir, "train"):
        checkpoint = checkpoint_path(config.run_dir, config.trainer.max_steps)
        if checkpoint.exists():
            return
        write_config(config, config.run_dir)
        if config.evaluation.preview_every:
            append_preview(config.run_dir, 5, {"fd_digits": config.optimizer.lr})
        work(config.name, f"train {config.name}", 60.0 if config.optimizer.lr > 0.5 else 0.0)
        if Path(f"fail-{config.name}").exists():
            print("Traceback: [1/2]\nRuntimeError: out of luck")
            sys.exit(1)
        die = Path(f"die-{config.name}")  # as often as it has lines, having got further if they say so
        checkpoint.parent.mkdir(exist_ok=True)
        if die.exists() and (lines := die.read_text().splitlines()):
            die.write_text("\n".join(lines[1:]))
            if lines[0] == "further":
                checkpoint_path(config.run_dir, config.trainer.max_steps - len(lines)).write_bytes(INTACT)
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.write_bytes(INTACT)
        journal(f"trained {config.name} {os.environ.get('OMP_NUM_THREADS')}")
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            journal(f"gpus {config.name} {os.environ['CUDA_VISIBLE_DEVICES']}")


def evaluate(run, *words):
    overrides = [word for word in words if "=" in word]
    plain = [word for word in words if "=" not in word]
    options = dict(zip(plain[::2], plain[1::2], strict=True))
    config, run = load_run(run, overrides), Path(run)
    with claim_folder(run, "evaluate"):
        work(config.name, f"evaluate {config.name} {options['--nfe']}")
        steps = [config.trainer.max_steps]
        if "--checkpoints" in options:
            steps = map(checkpoint_step, list_checkpoints(run)[-int(options["--checkpoints"].removeprefix("last")) :])
        ways = itertools.product(
            map(int, options["--nfe"].split(",")),
            options.get("--sampler", config.evaluation.sampler).split(","),
            map(float, options.get("--guidance", str(config.evaluation.guidance)).split(",")),
            map(int, options.get("--seeds", str(config.evaluation.seed)).split(",")),
            steps,
        )
        for nfe, sampler, guidance, seed, step in ways:
            append_point(run, point(config, nfe, sampler=sampler, guidance=guidance, seed=seed, step=step))


def point(config, nfe, **changes):
    made_by = {"step": config.trainer.max_steps, "seed": config.evaluation.seed, "config_hash": config_hash(config)}
    sampled = {
        "weights": "ema",
        "num_samples": config.evaluation.num_samples,
        "sampler": config.evaluation.sampler,
        "guidance": config.evaluation.guidance,
        "steps": cost.steps_for_nfe(config.model, nfe),
        "feature_networks": [{"name": name, "sha256": network_sha256(name)} for name in config.evaluation.feature_networks],
        "codec": {"sha256": None, "dtype": "float32"},
        "references": [],
    }
    unread = dict.fromkeys(("weights_sha256", "prompts", "precision", "checkpoint", "time"))
    distance = 1000 / nfe + 100 * abs(config.optimizer.lr - 0.003)  # 0.003: the experiment's
    return {
        "kind": "point",
        "nfe": nfe,
        "metrics": {"fd_digits": distance},
        "tflops_per_image": nfe / 1e6,
        **made_by,
        **sampled,
        **unread,
        "nfe_actual": nfe,
        **changes,
    }


def work(cell, line, seconds=0.0):
    try:
        journal(line)
        time.sleep(seconds + float(os.environ.get("TRIAL_SECONDS", 0)))
        end = time.monotonic() + 100
        while Path(f"hold-{cell}").exists() and time.monotonic() < end:
            time.sleep(0.02)
    except KeyboardInterrupt:
        journal(f"interrupted {cell}")
        sys.exit(130)


def journal(line):
    append_line(Path("journal"), line)


if __name__ == "__main__":
    if "STUBBORN" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        {"train": train, "evaluate": evaluate}[sys.argv[1]](*sys.argv[2:])
    except InputError as error:
        print(f"madformer: {error}", file=sys.stderr)
        sys.exit(2)
