"""A driver process: `madformer sweep run` with stand-ins for the trials."""

import os
import sys

from madformer.sweep.driver import run_sweep
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.trial import trial_commands


def stand_ins(cell):
    """The real commands, of the module beside this one; with REAL_TRAINING in the environment, those that train are real."""
    real = "train" if "REAL_TRAINING" in os.environ else None
    return [
        command if command[3] == real else [sys.executable, "-m", "tests.sweep.trial", *command[3:]]
        for command in trial_commands(cell)
    ]


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--retry-failed"]
    status = run_sweep(load_sweep(arguments[0], arguments[1:]), "--retry-failed" in sys.argv, stand_ins)
    print("heavy:", *sorted({"optuna", "torch"} & sys.modules.keys()))
    sys.exit(status)
