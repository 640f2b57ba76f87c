"""The same work on several devices: shares, counts, and every way to end before the end."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock

from madformer.config import TrainerConfig
from madformer.errors import ConfigError, InputError, ProcessKilledError
from madformer.parallel import cluster_rank, find_devices, limit_threads, share_out
from madformer.progress import ProgressDisplay
from tests.conftest import ROOT
from tests.shares import die_in_one, fail_in_one, write_share
from tests.tiny_runs import environment


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


class Counts(ProgressDisplay):
    """Remembers what it was told to show."""

    def __init__(self):
        super().__init__("done", "units", None, silent=True)
        self.counts = []

    def show(self, done, note=str):
        self.counts.append(done)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_share_is_done_and_counts_add_up(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    display = Counts()
    share_out(write_share, (tmp_path,), ["cpu"] * processes, display, before=10)
    lines = sorted(path.read_text() for path in tmp_path.iterdir())
    assert lines == [f"{rank} of {processes} on cpu, {6 // processes} threads" for rank in range(processes)]
    assert display.counts == sorted(display.counts) and display.counts[-1] == 10 + 3 * processes


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_process_has_the_threads_of_the_experiment(processes, tmp_path):
    limit_threads(TrainerConfig(threads=2), ["cuda:0"] * processes)
    assert torch.get_num_threads() == 1, "threads of a GPU's process are left alone"
    limit_threads(TrainerConfig(threads=2), ["cpu"] * processes)
    share_out(write_share, (tmp_path,), ["cpu"] * processes, Counts())
    assert {path.read_text()[-9:] for path in tmp_path.iterdir()} == {"2 threads"}


def test_an_error_arrives_as_it_was_and_stops_the_others(tmp_path):
    error = InputError("data.codec = 'own.py:Own': is broken")
    with pytest.raises(InputError, match="own.py:Own': is broken"):
        share_out(fail_in_one, (tmp_path, error), ["cpu"] * 2, Counts())


def test_a_killed_process_is_a_clear_message():
    with pytest.raises(
        ProcessKilledError, match="a process was killed, perhaps because memory ran out; what was complete is kept"
    ):
        share_out(die_in_one, (), ["cpu"] * 2, Counts())


def start_lingering(folder):
    code = """
import sys
from pathlib import Path
from madformer.parallel import share_out
from madformer.progress import ProgressDisplay
from tests.shares import linger
try:
    print("started", flush=True)
    share_out(linger, (Path(sys.argv[1]),), ["cpu"] * 2, ProgressDisplay("done", "units", None, silent=True))
except KeyboardInterrupt:
    sys.exit(130)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code, folder],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout.readline() == "started\n"
    return parent


def test_no_process_outlives_a_killed_parent(tmp_path):
    parent = start_lingering(tmp_path)
    wait_until(lambda: (tmp_path / "0.lock").exists() and (tmp_path / "1.lock").exists())
    parent.kill()
    for rank in (0, 1):  # the one at work, and the one that is done
        with FileLock(tmp_path / f"{rank}.lock", timeout=20):
            pass
    assert "Traceback" not in parent.communicate(timeout=20)[1]


def test_ctrl_c_ends_all_at_once_and_quietly(tmp_path):
    """While they start, when an interrupt is hardest to bear."""
    parent = start_lingering(tmp_path)
    time.sleep(1)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    _, printed = parent.communicate(timeout=60)
    assert parent.returncode == 130 and printed == ""


def test_under_torchrun_every_process_does_one_share(tmp_path, monkeypatch):
    variables = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2", "GROUP_RANK": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cluster_rank() == 2
    share_out(write_share, (tmp_path,), ["cpu"] * 2, Counts())
    assert [path.name for path in tmp_path.iterdir()] == ["2"] and (tmp_path / "2").read_text().startswith("2 of 3 on cpu")


def test_one_process_alone_is_no_cluster(monkeypatch):
    assert cluster_rank() is None
    for name, value in {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "sample", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    for tasks, rank in (("1", None), ("2", 0)):
        monkeypatch.setenv("SLURM_NTASKS", tasks)
        monkeypatch.setenv("SLURM_NTASKS_PER_NODE", tasks)
        assert cluster_rank() == rank
    monkeypatch.delenv("SLURM_STEP_ID")
    assert cluster_rank() is None, "a batch script, without srun"


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_devices(TrainerConfig()) == ["cpu"] and find_devices(TrainerConfig(devices=3)) == ["cpu"] * 3
    with pytest.raises(ConfigError, match="trainer.accelerator = 'cuda': there is no CUDA device"):
        find_devices(TrainerConfig(accelerator="cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_devices(TrainerConfig()) == [f"cuda:{index}" for index in range(4)]
    assert find_devices(TrainerConfig(devices=2)) == ["cuda:0", "cuda:1"]
    assert find_devices(TrainerConfig(accelerator="cpu")) == ["cpu"]
    with pytest.raises(ConfigError, match="trainer.devices = 5: there are 4 CUDA devices"):
        find_devices(TrainerConfig(devices=5))
