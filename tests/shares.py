"""Work for several processes. They import this module when they start, so it imports little."""

import os
import signal
import time

import torch
from filelock import FileLock

HELD = []


def hold(folder, share):
    """A lock that the system lets go when the process ends."""
    HELD.append(FileLock(folder / f"{share.rank}.lock", timeout=0))
    HELD[-1].acquire()


def write_share(share, folder):
    content = f"{share.rank} of {share.world_size} on {share.device}, {torch.get_num_threads()} threads"
    (folder / str(share.rank)).write_text(content)
    for done in range(1, 4):
        share.count(done)


def fail_in_one(share, folder, error):
    """The others go on until they are told to stop."""
    (folder / str(share.rank)).touch()
    while not (folder / "0").exists() or not (folder / "1").exists():
        time.sleep(0.01)
    if share.rank == 1:
        raise error
    while True:
        share.count(1)
        time.sleep(0.01)


def die_in_one(share):
    if share.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        share.count(1)
        time.sleep(0.01)


def linger(share, folder):
    """The first one works on, the second one is done at once."""
    hold(folder, share)
    while share.rank == 0:
        share.count(1)
        time.sleep(0.01)
