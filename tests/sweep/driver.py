"""A driver process: `madformer sweep run` with stand-ins for the trials; and what tests of drivers have in common."""

import os
import subprocess
import sys
import time
from pathlib import Path

from madformer.sweep import launch_local
from madformer.sweep.driver import run_sweep
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.trial import trial_commands

SECONDS = 60
STARTED = []


def stand_ins(cell):
    """The real commands, of the module beside this one; with REAL_TRAINING in the environment, those that train are real."""
    real = "train" if "REAL_TRAINING" in os.environ else None
    return [
        command if command[3] == real else [sys.executable, "-m", "tests.sweep.trial", *command[3:]]
        for command in trial_commands(cell)
    ]


def journal():
    return Path("journal").read_text().splitlines() if Path("journal").exists() else []


def start(*overrides, **environment):
    command = [sys.executable, "-m", "tests.sweep.driver", "small.yaml", *overrides]
    environment = {**os.environ, **environment}
    STARTED.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment))
    return STARTED[-1]


def output(driver):
    return driver.communicate(timeout=SECONDS)[0]


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def run(sweep_file, *overrides, retry_failed=False, commands=stand_ins):
    lines = []
    status = run_sweep(load_sweep(sweep_file, overrides), retry_failed, commands, lines.append)
    return status, lines


if __name__ == "__main__":
    launch_local.LOCK_PLACES = (Path.cwd(),)
    arguments = [argument for argument in sys.argv[1:] if argument != "--retry-failed"]
    status = run_sweep(load_sweep(arguments[0], arguments[1:]), "--retry-failed" in sys.argv, stand_ins)
    print("heavy:", *sorted({"optuna", "torch"} & sys.modules.keys()))
    sys.exit(status)
