"""A driver process: `madformer sweep run` with stand-ins for the trials."""

import sys

from madformer.sweep.launch import run_sweep, trial_commands
from madformer.sweep.spec import load_sweep


def stand_ins(cell):
    """The real commands, of the module beside this one."""
    return [[sys.executable, "-m", "tests.sweep.trial", *command[3:]] for command in trial_commands(cell)]


if __name__ == "__main__":
    status = run_sweep(load_sweep(sys.argv[1], sys.argv[2:]), stand_ins)
    print("heavy:", *sorted({"optuna", "torch"} & sys.modules.keys()))
    sys.exit(status)
