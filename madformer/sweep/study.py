"""The study of a sweep: its database and its lock, and whether the owner of a trial is alive."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import secrets
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, NoSuchModuleError, OperationalError

from madformer.config.validation import expand_variables
from madformer.errors import ConfigError, InputError, mask_secrets
from madformer.runs.files import PATIENCE_SECONDS, hold_lock, lock_holders
from madformer.sweep.spec import Sweep

HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 90
"""A trial without a heartbeat for so long may be claimed by another driver."""

_DRIVERS = {"postgresql": ("postgresql+psycopg", "postgresql"), "mysql": ("mysql+pymysql", "mysql")}
"""Name of a database -> its name in SQLAlchemy with the driver that our extra installs, name of the extra."""

_LOCKS = {
    "postgresql": ("SELECT pg_advisory_lock(hashtext(:name))", "SELECT pg_advisory_unlock(hashtext(:name))"),
    # Shorter than `read_timeout`: a driver that waits asks again.
    "mysql": ("SELECT GET_LOCK(LEFT(:name, 64), 20)", "SELECT RELEASE_LOCK(LEFT(:name, 64))"),
}
_TIMEOUTS = {
    # A machine that is switched off closes no connection: both sides notice it after minutes, not hours.
    "postgresql": {
        "connect_timeout": 10,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
        "options": "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3",
    },
    "mysql": {"connect_timeout": 10, "read_timeout": 60, "write_timeout": 60},
}
_LOCAL_DISKS = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "apfs", "hfs"))
"""File systems on which SQLite's write-ahead log works; it does not on network file systems."""

_BUSY_SECONDS, _BUSY_TIMEOUT_SECONDS = 2, 60
"""How long SQLite waits for another transaction, deaf to Ctrl-C, and how long we do."""

_LONGEST_WAIT_SECONDS = 15.0
_SECONDS_BETWEEN_MESSAGES = 60.0

Result = TypeVar("Result")


def new_owner() -> str:
    """A new owner of trials that lives as long as this process; `is_dead` reads it."""
    return json.dumps([_machine(), os.getpid(), _look_up(os.getpid())[1], secrets.token_hex(4)])


def is_dead(owner: str) -> bool:
    """Whether the owner's process has ended. Of other machines nothing is known, and the answer is no."""
    machine, number, start, _ = _parse(owner)
    return machine == _machine() and _look_up(number)[1] not in (start, _HIDDEN)


def is_at_work(owner: str) -> bool:
    """Whether the owner's process lives on this machine and is not stopped, whatever its heartbeats and the clock say."""
    machine, number, start, _ = _parse(owner)
    state, found = _look_up(number)
    return machine == _machine() and found == start and state not in "Tt"


def _parse(owner: str) -> tuple[str, int, str, str]:
    machine, number, start, token = json.loads(owner)
    return machine, number, start, token


_HIDDEN = "hidden"
"""In place of the start of another user's process, where the system shows nothing of it."""


def _look_up(number: int) -> tuple[str, str]:
    """State of a process, and when it began: in ticks since the machine did, as its clock may be set. Empty: it has ended."""
    try:
        if not Path("/proc/self/stat").exists():
            return "R", str(psutil.Process(number).create_time())
        state, *fields = Path(f"/proc/{number}/stat").read_text(errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return state, "" if state in "ZX" else f"{boot} {fields[18]}"
    except (OSError, psutil.Error):
        return "", _HIDDEN if psutil.pid_exists(number) else ""


@cache
def _machine() -> str:
    """The machine's name and the namespace of this process: processes of another container cannot be seen."""
    namespace = Path("/proc/self/ns/pid")
    return f"{platform.node()} {namespace.readlink() if namespace.exists() else ''}".strip()


class Storage:
    """The open study of a sweep.

    Args:
        sweep: the sweep.
        say: called with a line when the database does not answer, and when it answers again.
        read_only: open an existing study without a lock, and write nothing.

    Raises:
        ConfigError: unknown kind of database, or its driver is not installed.
        InputError: the database does not answer, or the file is no database.
        KeyError: `read_only`, and there is no such study yet.
    """

    def __init__(self, sweep: Sweep, say: Callable[[str], None] = lambda line: None, read_only: bool = False) -> None:
        self.name, self.say, self._path = sweep.name, say, None
        self.waits_for_database = True
        """Whether `retry` waits while the database does not answer."""
        self._read_only = read_only
        url = expand_variables("storage", sweep.storage) if sweep.storage else None
        self._url = make_url(url) if url else make_url(f"sqlite:///{study_path(sweep).resolve()}")
        backend = self._url.get_backend_name()
        if backend == "sqlite" and self._url.database:
            self._path = Path(self._url.database)
            if read_only:
                options = {"uri": "true", **_how_to_read(self._path)}
                self._url = self._url.set(database=f"file:{quote(str(self._path))}", query=options)
            else:
                self._path.parent.mkdir(parents=True, exist_ok=True)
        elif backend not in _LOCKS:
            raise ConfigError(f"storage = {self._display_url}: must be a database of sqlite, {', '.join(_LOCKS)}")
        elif self._url.drivername in _DRIVERS:
            self._url = self._url.set(drivername=_DRIVERS[backend][0])
        self.last_error_at = float("-inf")
        """When the database last did not answer, by the monotonic clock."""
        try:
            timeouts = _TIMEOUTS.get(backend, {})
            self._locks = create_engine(self._url, isolation_level="AUTOCOMMIT", poolclass=NullPool, connect_args=timeouts)
            # Of two drivers that create the tables at once, one would find half of them.
            with contextlib.nullcontext() if read_only else self.lock():
                self.rdb = self._open()
                self.study = self._open_study(sweep)
        except (ImportError, NoSuchModuleError) as error:
            extra = f"pip install 'madformer[{_DRIVERS[backend][1]}]'" if backend in _DRIVERS else "install its driver"
            raise ConfigError(f"storage = {self._display_url}: {first_line(error)}: {extra}") from error
        except (DatabaseError, StorageInternalError, ArgumentError) as error:
            raise self._unusable_error(error) from error

    def close(self) -> None:
        """Close the connections."""
        self.rdb.remove_session()
        self.rdb.engine.dispose()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Exclude the other drivers of the sweep. The database, or the system, frees the lock of a driver that dies."""
        if self._path is not None:
            with hold_lock(self._path.with_name(f".{self._path.name}.lock"), self.say):
                yield
            return
        take, release = _LOCKS[self._url.get_backend_name()]
        name = {"name": f"madformer {self.name}"}
        with self._locks.connect() as connection:
            while (answer := connection.execute(text(take), name).scalar()) == 0:
                pass  # another driver holds it
            assert answer in (1, ""), f"{take} gave {answer!r}"  # PostgreSQL's has no value
            yield
            with contextlib.suppress(DatabaseError, InterfaceError):  # the lock ended with the connection
                connection.execute(text(release), name)

    def retry(self, operation: Callable[[], Result]) -> Result:
        """Repeat an operation until the database answers.

        Raises:
            InputError: it does not answer, and `waits_for_database` is off.
        """
        pause, last_message_at = 1.0, float("-inf")
        while True:
            try:
                result = operation()
            except (OperationalError, InterfaceError, StorageInternalError) as error:
                if not _is_temporary(error):
                    raise
                if not self.waits_for_database:
                    raise self._unusable_error(error) from error
                self.last_error_at = time.monotonic()
                if self.last_error_at - last_message_at >= _SECONDS_BETWEEN_MESSAGES:
                    self.say(f"{self.name}: the storage does not answer, trials go on, waiting ({first_line(error)})")
                    last_message_at = self.last_error_at
                self.rdb.remove_session()
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_WAIT_SECONDS)
            else:
                if last_message_at > 0:
                    self.say(f"{self.name}: the storage answers again")
                return result

    def _open(self) -> RDBStorage:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        options: dict[str, Any] = {"pool_pre_ping": True, "connect_args": _TIMEOUTS.get(self._url.get_backend_name(), {})}
        if self._path is not None:
            options = {"connect_args": {"timeout": _BUSY_SECONDS}}
        with heartbeat_warnings_off():
            rdb = RDBStorage(
                self._url.render_as_string(hide_password=False),
                engine_kwargs=options,
                skip_compatibility_check=self._read_only,
                skip_table_creation=self._read_only,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
            )
        if self._path is not None and not self._read_only:
            _make_transactions_atomic(rdb.engine, self._path, lambda line: self.say(line))
        return rdb

    def _open_study(self, sweep: Sweep) -> optuna.Study:
        directions = [StudyDirection.MINIMIZE] * (len(sweep.search.objectives) if sweep.search else 1)
        if self._read_only and not inspect(self.rdb.engine).has_table("studies"):
            raise KeyError(sweep.name)
        if self._read_only:
            return optuna.load_study(storage=self.rdb, study_name=sweep.name)
        study = optuna.create_study(storage=self.rdb, study_name=sweep.name, load_if_exists=True, directions=directions)
        if len(study.directions) != len(directions):
            what = f"has {len(study.directions)} objectives, not {len(directions)}"
            raise InputError(f"{self._display_url}: the study {sweep.name} {what}; give the sweep another name")
        return study

    @property
    def _display_url(self) -> str:
        """The database, without its password."""
        return str(self._url.render_as_string(hide_password=True))

    def _unusable_error(self, error: Exception) -> InputError | OSError:
        if self._url.get_backend_name() == "sqlite":
            if "full" in (reason := first_line(error)):
                return OSError(errno.ENOSPC, f"No space left on device ({reason})", str(self._path))
            if re.search(r"disk I/O|readonly|unable to open|locked", reason):  # not the file's fault
                remedy = "mend that; what was complete is kept, the same command goes on"
                return InputError(f"{self._path}: the study cannot be opened now ({reason}); {remedy}")
            remedy = "delete it: what is done is read from the runs"
            return InputError(f"{self._path}: no study of a sweep ({first_line(error)}); {remedy}")
        return InputError(f"storage = {self._display_url}: cannot be used ({first_line(error)})")


@contextlib.contextmanager
def heartbeat_warnings_off() -> Iterator[None]:
    """Silence Optuna's warnings that heartbeats are experimental and belong to its own loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        yield


def study_path(sweep: Sweep) -> Path:
    """The study's file, for a sweep that names no storage."""
    return sweep.folder / "study.db"


def study_exists(sweep: Sweep) -> bool:
    """Whether there may be a study; to read its trials, do not create one."""
    return sweep.storage is not None or study_path(sweep).is_file()


def first_line(error: BaseException) -> str:
    """The first line of the database's own message."""
    cause = getattr(error, "orig", None) or error.__cause__
    return first_line(cause) if cause else mask_secrets(next(iter(str(error).strip().splitlines()), type(error).__name__))


def _is_temporary(error: Exception) -> bool:
    """Whether the database may answer later: an error of the connection or the disk, not of the query."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return isinstance(cause, (OperationalError, InterfaceError))


def _is_on_local_disk(path: Path) -> bool:
    parts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    return bool(parts) and max(parts, key=lambda part: len(part.mountpoint)).fstype in _LOCAL_DISKS


def _how_to_read(path: Path) -> dict[str, str]:
    """SQLite's options. In a folder that cannot be written, it must be told that nobody else writes there."""
    is_still = not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-shm").exists()
    return {"immutable": "1"} if is_still else {"mode": "ro"}


def _make_transactions_atomic(engine: Engine, path: Path, say: Callable[[str], None]) -> None:
    """Take the write lock when a transaction begins: two drivers that read first and write later would claim the same trial."""
    wal = _is_on_local_disk(path)

    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = None
        if wal:
            connection.execute("PRAGMA journal_mode=WAL")

    def begin(connection: Connection) -> None:
        start, has_said = time.monotonic(), False
        while True:
            try:
                connection.connection.cursor().execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                waited = time.monotonic() - start
                if "locked" not in str(error) or waited > _BUSY_TIMEOUT_SECONDS:
                    connection.exec_driver_sql("BEGIN IMMEDIATE")  # raises it as SQLAlchemy's
                    return
                if waited > PATIENCE_SECONDS and not has_said:
                    holders = lock_holders(path.with_name(f"{path.name}-shm") if wal else path)  # SQLite's lock is there
                    say(f"{path}: waits for {' and '.join(holders) or 'another process'}")
                    has_said = True

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", begin)
    engine.dispose()  # connections that were opened without these listeners
