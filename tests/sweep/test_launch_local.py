"""Trials that share GPUs: real drivers, pretended GPUs, stand-ins for the trials."""

import os
import re
import time
from collections import Counter
from pathlib import Path

import pytest

from madformer.errors import ConfigError
from madformer.sweep.launch_local import lock_gpus, release_gpus
from madformer.sweep.spec import core_count
from tests.sweep.driver import SECONDS, journal, output, run, start, wait_for


def nvidia_smi(folder, mib):
    """Puts an nvidia-smi on the path that knows two GPUs of so many MiB."""
    script = folder / "nvidia-smi"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *=index*) printf "0\\n1\\n";; *--id=0,1) printf "{mib + 999}\\n{mib}\\n";; esac\n'
    )
    script.chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"


def trained_on():
    return Counter(line.split()[2] for line in journal() if line.startswith("gpus"))


def begun():
    return [line.split()[1] for line in journal() if line.startswith("train ")]


@pytest.fixture
def share(monkeypatch, sweep_file):
    """Starts drivers, whose locks lie in the test's folder and whose trials wait for `release`."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def start_sharing(depths, gpus, *overrides):
        for depth in depths:
            Path(f"hold-d{depth}-s0").touch()
        grid = f"grid.model.diffusion_depth={depths}"
        return start(grid, "trainer.accelerator=auto", "workers=null", *overrides, CUDA_VISIBLE_DEVICES=gpus)

    return start_sharing


def release(*cells):
    for cell in cells:
        Path(f"hold-{cell}").unlink()


def test_trials_share_gpus_and_no_more_than_they_should(share):
    driver = share([1, 2, 3, 4, 5, 6], "a,b", "trials_per_device=2")
    wait_for(lambda: len(begun()) == 4)
    time.sleep(1)
    first = begun()
    assert len(first) == 4
    release(*first)
    wait_for(lambda: len(begun()) == 6)
    wait_for(lambda: trained_on() == {"a": 2, "b": 2})  # the idle GPU comes first
    release(*begun()[4:])
    assert "small: not checked whether 2 trials fit one GPU: nvidia-smi does not tell its memory" in output(driver)
    assert driver.returncode == 0 and trained_on().total() == 6
    threads = {line.split()[2] for line in journal() if line.startswith("trained")}
    assert threads == {str(max(1, core_count() // 4))}


def test_drivers_that_share_and_one_that_does_not_and_an_orphan(share):
    first = share([1], "a", "trials_per_device=2")
    wait_for(lambda: begun() == ["d1-s0"])
    first.kill()
    first.wait()
    alone = share([2], "a")
    shared = share([3, 4], "a", "trials_per_device=2")
    wait_for(lambda: len(begun()) == 2)
    time.sleep(1)
    assert len(begun()) == 2 and begun()[1] in ("d3-s0", "d4-s0"), "the orphan keeps half of the GPU"
    release("d3-s0", "d4-s0")
    assert shared.wait(SECONDS) == 0 and len(begun()) == 3
    release("d1-s0")
    wait_for(lambda: len(begun()) == 4)
    second = share([5], "a", "trials_per_device=2")
    assert "small: waits, there is no room for a trial now\n" in iter(second.stdout.readline, "")
    assert begun()[3:] == ["d2-s0"], "it has the whole GPU"
    release("d2-s0", "d5-s0")
    assert alone.wait(SECONDS) == second.wait(SECONDS) == 0


def test_parts_of_a_gpu_never_exceed_it():
    half = lock_gpus(("a",), 1, 2)
    assert half and lock_gpus(("a",)) is None and lock_gpus(("a",), 1, 3) is None and lock_gpus(("a",), 3, 4) is None
    quarters = [lock_gpus(("a",), part, 4) for part in (0, 1)]
    assert all(quarters) and lock_gpus(("a",), 0, 2) is None and lock_gpus(("b",))
    for locks in (half, *quarters):
        release_gpus(locks)
    thirds = [lock_gpus(("a",), part, 3) for part in range(3)]
    assert all(thirds) and not any(lock_gpus(("a",), part, 9) for part in range(9))
    release_gpus(thirds[1])
    assert lock_gpus(("a",), 4, 9) and lock_gpus(("a",), 1, 3) is None


def test_what_does_not_fit_one_gpu_together_is_refused(sweep_file, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    nvidia_smi(tmp_path, 3000)
    message = "trials_per_device = 4: 2 trials would fit one device (1.1 GiB each of 2.9 GiB, an estimate)"
    for search in ([], ["grid={}", "evaluate={}", "search={space: {model.diffusion_depth: [2, 4]}, nfe: [16], trials: 1}"]):
        with pytest.raises(ConfigError, match=re.escape(message)):
            run(sweep_file, "trainer.accelerator=auto", "trials_per_device=4", *search)
    assert not journal()
    assert run(sweep_file, "trainer.accelerator=auto", "trials_per_device=2")[0] == 0 and trained_on().total() == 2
    with pytest.raises(ConfigError, match="trials_per_device = 2: there are no GPUs here: set workers instead"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        run(sweep_file, "trainer.accelerator=auto", "trials_per_device=2", "seeds=[1]")
