"""Several people and processes: locks that are held, sweeps and files of somebody else, clocks that are set."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import datetime, timedelta

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from madformer.cli import app
from madformer.config import write_config
from madformer.evaluation.feature_cache import read_parts
from madformer.evaluation.reference import load_reference
from madformer.runs import files
from madformer.runs.checkpoints import KnownRuns, find_flaw, newest_intact, save_checkpoint
from madformer.runs.files import atomic_write, hold_lock, lock_holders, write_text
from madformer.sweep import launch_local, study
from madformer.sweep.cells import sweep_cells
from madformer.sweep.driver import run_sweep
from madformer.sweep.launch_local import lock_folder, lock_gpus, release_gpus
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.queue import Queue
from madformer.sweep.study import Storage, is_at_work, is_dead, new_owner
from tests.sweep.claimer import finish, open_queue
from tests.sweep.driver import wait_for

NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")


def as_nobody(function, *arguments):
    """The result of a function in a process of another user, as JSON, or what it raises as a text."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            result = function(*arguments)
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(sender, json.dumps(result).encode())
        os._exit(0)
    os.close(sender)
    os.waitpid(child, 0)
    with os.fdopen(receiver) as file:
        return json.loads(file.read())


@contextlib.contextmanager
def holder(code, *arguments):
    """A process that runs a line of Python with a lock in it, and is stopped as soon as it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint(flush=True)\nimport time; time.sleep(99)", *arguments], stdout=subprocess.PIPE
    )
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


FLOCK = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
WRITE = "import sqlite3, sys; base = sqlite3.connect(sys.argv[1], isolation_level=None); base.execute('BEGIN IMMEDIATE')"


def visible(path):
    """The way to a file of a test, opened for all users."""
    for folder in (path.resolve(), *path.resolve().parents):
        if folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)


def test_a_stopped_holder_is_named_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.2)
    said, path = [], tmp_path / "x.lock"
    with holder(FLOCK, path) as process:
        assert lock_holders(path)[0].startswith(f"process {process.pid} (") and lock_holders(path)[0].endswith(
            "), which is stopped"
        )

        def say(line):
            said.append(line)
            process.kill()

        with hold_lock(path, say):
            pass
        assert len(said) == 1 and f"waits for process {process.pid} (" in said[0] and "which is stopped" in said[0]
    assert lock_holders(path) == [] == lock_holders(tmp_path / "none")
    with hold_lock(path, said.append):
        assert len(said) == 1


@pytest.mark.parametrize("what", ["flock", "transaction"])
def test_a_stopped_holder_stops_no_status_and_the_driver_says_whom_it_waits_for(what, sweep_file, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(study, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(study, "_BUSY_SECONDS", 0.2)
    sweep = load_sweep(sweep_file)
    with open_queue(sweep) as queue:
        [trial] = queue.claim().trials
        code, path = {"flock": (FLOCK, ".study.db.lock"), "transaction": (WRITE, "study.db")}[what]
        with holder(code, sweep.folder / path) as process:
            for words in (["sweep", "status"], ["sweep", "status", "--json"], ["sweep", "plan"], ["sweep", "plan", "--json"]):
                start = time.monotonic()
                result = CliRunner().invoke(app, [*words, str(sweep_file)])
                assert result.exit_code == 0, result.output
                assert time.monotonic() - start < 40 and ("running" in result.output or words == ["sweep", "plan"])
            said = []

            def say(line):
                said.append(line)
                process.kill()

            queue.storage.say = say
            assert len(queue.claim(9).trials) == 1
            assert f"waits for process {process.pid} (" in said[0] and "which is stopped" in said[0]
        queue.put_back(trial)


@pytest.mark.parametrize("what", ["flock", "transaction"])
def test_ctrl_c_ends_at_once_while_a_lock_is_held(what, sweep_file):
    sweep = load_sweep(sweep_file)
    Storage(sweep).close()
    code, path = {"flock": (FLOCK, ".study.db.lock"), "transaction": (WRITE, "study.db")}[what]
    with holder(code, sweep.folder / path):
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.sweep.driver", str(sweep_file)], stdout=subprocess.PIPE, text=True
        )
        first = driver.stdout.readline()
        assert "small" in first or "study.db" in first, first
        driver.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert driver.wait(20) == 130 and time.monotonic() - start < 15


@needs_root
@pytest.mark.parametrize(
    "words", [["sweep", "status"], ["sweep", "status", "--json"], ["sweep", "plan"], ["sweep", "plan", "--json"]]
)
@pytest.mark.parametrize("has_driver", [False, True])
def test_anybody_may_look_at_a_sweep_and_leaves_nothing_there(words, has_driver, sweep_file):
    sweep = load_sweep(sweep_file)
    with open_queue(sweep) as queue:
        [trial] = queue.claim().trials
        finish(trial.cell)
        if not has_driver:
            queue.complete(trial)
            queue.storage.close()
        for path in [sweep_file, *sweep_file.parent.rglob("*")]:
            path.chmod(0o755)
        visible(sweep_file.parent)
        before = {path: path.stat().st_mtime_ns for path in sweep_file.parent.rglob("*") if path.suffix != ".db-shm"}

        def look():
            result = CliRunner().invoke(app, [*words, str(sweep_file)])
            return [result.exit_code, result.output + str(result.exception)]

        status, output = as_nobody(look)
        assert status == 0 and "d2-s0" in output, output
        assert {path: path.stat().st_mtime_ns for path in sweep_file.parent.rglob("*") if path.suffix != ".db-shm"} == before


def test_looking_writes_nothing_even_where_one_may(sweep_file, tmp_path):
    sweep = load_sweep(sweep_file)
    for words in (["sweep", "status"], ["sweep", "plan"], ["sweep", "status", "--json"]):
        assert CliRunner().invoke(app, [*words, str(sweep_file)]).exit_code == 0
    assert not sweep.folder.exists(), "no study is made to look at it"
    other = load_sweep(sweep_file, [f"storage=sqlite:///{tmp_path}/other.db", "name=first"])
    Storage(other).close()
    for words in (["sweep", "status"], ["sweep", "plan"]):
        result = CliRunner().invoke(app, [*words, str(sweep_file), f"storage=sqlite:///{tmp_path}/other.db"])
        assert result.exit_code == 0, "a database without this study"
    names = sqlite3.connect(tmp_path / "other.db").execute("select study_name from studies").fetchall()
    assert names == [("first",)] and not list(tmp_path.glob(".*lock*"))[1:]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_files_have_the_mode_that_the_umask_says(mask, tmp_path):
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "a.safetensors") as path:
            save_file({"x": torch.zeros(1)}, path)
        write_text(tmp_path / "b.json", "{}")
        save_checkpoint({"state_dict": {}}, tmp_path / "c.ckpt")
        with hold_lock(tmp_path / "d.lock"):
            pass
        with atomic_write(tmp_path / "e.png") as path:
            path.touch(0o600)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


@needs_root
def test_what_cannot_be_read_is_not_called_broken(tmp_path):
    run = tmp_path / "run"
    paths = [tmp_path / "reference.safetensors", run / "checkpoints/step-00000001.ckpt", tmp_path / "part-0.safetensors"]
    for path in paths:
        with atomic_write(path) as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
    visible(run / "checkpoints")
    tmp_path.chmod(0o777)
    for path in paths:
        path.chmod(0o600)
    reads = (load_reference, find_flaw, lambda _: list(read_parts(tmp_path)))
    for path, read in zip(paths, reads, strict=True):
        assert as_nobody(read, path) == f"PermissionError: [Errno 13] Permission denied: '{path}'"
    assert "Permission denied" in as_nobody(newest_intact, run), "no older one is taken instead"
    assert all(path.exists() for path in paths)


def strange_neighbours(folder):
    """Folders beside a sweep's runs whose config.yaml is strange; the names of the tries."""
    contents = {
        "binary": lambda path: path.write_bytes(os.urandom(999)),
        "utf16": lambda path: path.write_text("frozen:\n  config_hash: 0123456789abcdef\n", encoding="utf-16"),
        "folder": lambda path: path.mkdir(),
        "loop": lambda path: path.symlink_to(path),
        "gone": lambda path: path.symlink_to("/nowhere"),
        "pipe": os.mkfifo,
        "endless": lambda path: path.symlink_to("/dev/zero"),
        "secret": lambda path: (path.write_text("x: 1"), path.chmod(0)),
        "closed": lambda path: (path.write_text("x: 1"), path.parent.chmod(0)),
        "\x1b[2J": lambda path: path.write_text("{{{"),
        "empty": lambda path: path.touch(),
    }
    for name, make in contents.items():
        for place in (folder / name, folder / "small" / name):
            place.mkdir(parents=True)
            make(place / "config.yaml")
    return list(contents)


@needs_root
def test_strange_neighbours_stop_nothing(sweep_file):
    sweep = load_sweep(sweep_file)
    strange_neighbours(sweep.folder.parent)
    for words in (["sweep", "status"], ["sweep", "plan"], ["sweep", "plan", "--json"]):
        result = CliRunner().invoke(app, [*words, str(sweep_file)])
        assert result.exit_code == 0, (words, result.output, result.exception)
    for folder in [sweep_file.parent, *sweep_file.parent.parents]:
        if folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)

    def look():
        return [CliRunner().invoke(app, ["sweep", word, str(sweep_file)]).exit_code for word in ("status", "plan")]

    assert as_nobody(look) == [0, 0]
    lines = []
    assert run_sweep(load_sweep(sweep_file), say=lines.append, commands=lambda cell: finish(cell) or []) == 0, lines


@needs_root
@pytest.mark.parametrize("closed", ["evaluations.jsonl", "checkpoints", "config.yaml", "."])
def test_a_neighbours_run_that_cannot_be_read_is_not_taken_for_a_cells(closed, sweep_file):
    sweep = load_sweep(sweep_file)
    [cell, *_] = sweep_cells(sweep)
    other = sweep.folder.parent / "other/mine"
    write_config(cell.config, other)
    (other / "checkpoints").mkdir()
    (other / "evaluations.jsonl").touch()
    visible(other.resolve())
    assert KnownRuns(sweep.folder.parent).find(cell.key) == other
    (other / closed).chmod(0)

    def find():
        return str(KnownRuns(sweep.folder.parent).find(cell.key))

    assert as_nobody(find) == "None"


@pytest.mark.parametrize("seconds", [-3600, -91, -3, 3, 91, 3600])
def test_a_clock_that_is_set_takes_no_trial_from_a_living_driver(seconds, sweep_file, monkeypatch):
    sweep = load_sweep(sweep_file)
    with open_queue(sweep) as first, Queue(sweep, Storage(sweep), sweep_cells(sweep)) as second:
        [trial] = first.claim().trials
        monkeypatch.setattr("psutil.Process.create_time", lambda self: time.time() + seconds)
        engine = sqlite3.connect(sweep.folder / "study.db")
        [[beat]] = engine.execute("select heartbeat from trial_heartbeats").fetchall()
        moved = datetime.fromisoformat(beat) - timedelta(seconds=seconds)
        engine.execute("update trial_heartbeats set heartbeat = ?", (moved.isoformat(" "),))
        engine.commit()
        engine.close()
        assert [other.cell.name for other in second.claim(9).trials] == ["d4-s0"], "the trial stays its owner's"
        assert not is_dead(first._owner)
        first.put_back(trial)


def test_owners(monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
    owner = json.dumps([json.loads(new_owner())[0], process.pid, study._look_up(process.pid)[1], ""])
    assert is_at_work(owner) and not is_dead(owner)
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: not is_at_work(owner))
    assert not is_dead(owner), "stopped: its trials are given up when its heartbeats are old"
    process.kill()
    wait_for(lambda: is_dead(owner))
    assert not is_at_work(owner), "a zombie"
    process.wait()
    assert is_dead(owner)
    for number, start in ((os.getpid(), "another boot 1"), (os.getpid(), 1234567.89), (2**22 + 1, "x 1")):
        assert is_dead(json.dumps([json.loads(owner)[0], number, start, ""])), "another process of that number"
    assert not is_dead(json.dumps(["elsewhere", os.getpid(), "x 1", ""])), "nothing is known of other machines"


def test_gpu_locks_lie_where_no_environment_moves_them(monkeypatch, tmp_path):
    monkeypatch.setattr(
        launch_local, "LOCK_PLACES", (tmp_path / "none", tmp_path / "private", tmp_path / "shared", tmp_path / "last")
    )
    for name, mode in (("private", 0o755), ("shared", 0o1777), ("last", 0o1777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    for variable in ("TMPDIR", "XDG_RUNTIME_DIR", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert lock_folder() == tmp_path / "shared/madformer-gpus"
    locks = lock_gpus(("7",))
    assert locks and lock_gpus(("7",)) is None
    assert (lock_folder().stat().st_mode & 0o7777, (lock_folder() / "7").stat().st_mode & 0o777) == (0o1777, 0o666)
    release_gpus(locks)


@needs_root
def test_gpus_are_locked_against_other_users(monkeypatch, tmp_path):
    visible(tmp_path)
    tmp_path.chmod(0o1777)
    locks = lock_gpus(("7",))
    assert as_nobody(lambda: lock_gpus(("7",))) is None and as_nobody(lambda: bool(lock_gpus(("8",))))
    release_gpus(locks)
    assert as_nobody(lambda: bool(lock_gpus(("7",)))), "a file of another user is no hindrance"
    assert lock_gpus(("8",)), "nor is it for root"


@pytest.mark.parametrize("planted", ["folder is a file", "link", "closed"])
def test_a_lock_that_another_user_made_his_own_is_one_line(planted, tmp_path):
    folder = tmp_path / "madformer-gpus"
    if planted == "folder is a file":
        folder.touch()
    else:
        folder.mkdir()
        (folder / "7").symlink_to(tmp_path / "target") if planted == "link" else (folder / "7").mkdir()
    with pytest.raises(Exception, match="GPUs are locked there: remove it") as caught:
        lock_gpus(("7",))
    assert type(caught.value).__name__ == "ConfigError" and not (tmp_path / "target").exists()


def test_a_removed_lock_file_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    """A cleaner that removes a file between its opening and its locking; and a folder under a lock of systemd-tmpfiles' kind."""
    locks = lock_gpus(("7",))
    probe = os.open(lock_folder(), os.O_RDONLY)
    import fcntl

    with pytest.raises(BlockingIOError):
        fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    release_gpus(locks)
    fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(probe)
    opened = launch_local._open_for_all

    def open_and_lose(path, flags):
        number = opened(path, flags)
        if path.name == "8":
            path.unlink()
        return number

    monkeypatch.setattr(launch_local, "_open_for_all", open_and_lose)
    assert lock_gpus(("8",)) is None


def test_one_gpu_by_its_number_and_by_its_uuid_is_one(monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *query-gpu=uuid*--id=5*) echo GPU-ab;; *--id=6*) echo GPU-cd;; *) exit 9;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    launch_local._identity.cache_clear()
    locks = lock_gpus(("5",))
    assert lock_gpus(("GPU-ab",)) is None and lock_gpus(("6",)) and lock_gpus(("9",))
    release_gpus(locks)
    launch_local._identity.cache_clear()
