"""Stands in for `madformer train` and `madformer evaluate`: the same arguments, locks and files, and no training.

Every step is a line in `journal`, in the working directory. A file `fail-CELL` there makes the training of a cell fail.
"""

import os
import signal
import sys
import time
from pathlib import Path

from madformer.checkpoints import checkpoint_path
from madformer.config import InputError, config_hash, freeze, load_experiment, load_run
from madformer.evaluation.record import append_point
from madformer.files import append_line
from madformer.run import claim_folder


def train(experiment, *overrides):
    config = load_experiment(experiment, overrides)
    with claim_folder(config.run_dir, "train"):
        checkpoint = checkpoint_path(config.run_dir, config.trainer.max_steps)
        if checkpoint.exists():
            return
        freeze(config, config.run_dir)
        work(config.name, f"train {config.name}")
        if Path(f"fail-{config.name}").exists():
            print("Traceback: [1/2]\nRuntimeError: out of luck")
            sys.exit(1)
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.touch()
        journal(f"trained {config.name} {os.environ['OMP_NUM_THREADS']}")


def evaluate(run, nfe_flag, budgets, *overrides):
    assert nfe_flag == "--nfe"
    config = load_run(run, overrides)
    with claim_folder(Path(run), "evaluate"):
        work(config.name, f"evaluate {config.name} {budgets}")
        for nfe in map(int, budgets.split(",")):
            append_point(Path(run), point(config, nfe))


def point(config, nfe, **changes):
    made_by = {"step": config.trainer.max_steps, "seed": config.evaluation.seed, "config_hash": config_hash(config)}
    manner = {
        "weights": "ema",
        "num_samples": config.evaluation.num_samples,
        "sampler": config.evaluation.sampler,
        "guidance": config.evaluation.guidance,
    }
    networks = {"feature_networks": [{"name": name} for name in config.evaluation.feature_networks]}
    unread = dict.fromkeys(("weights_sha256", "prompts", "precision", "codec", "references", "checkpoint", "time"))
    ignored = {**networks, **unread, "steps": 1, "nfe_actual": nfe}
    return {"kind": "point", "nfe": nfe, "metrics": {"fd_digits": 1000 / nfe}, **made_by, **manner, **ignored, **changes}


def work(cell, line):
    try:
        journal(line)
        time.sleep(float(os.environ.get("TRIAL_SECONDS", 0)))
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
