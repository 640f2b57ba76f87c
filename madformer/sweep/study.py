"""The study's database, and which process has which trial."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import optuna
import psutil
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, NoSuchModuleError, OperationalError

from madformer.errors import ConfigError, InputError
from madformer.sweep.spec import Sweep

_CLOCK_SECONDS = 2.0
"""The time a process started at is told a little differently when the machine's clock is set."""


def new_owner() -> str:
    """An owner that lives as long as this process, in a form that `is_gone` reads; another one each time."""
    return json.dumps([_machine(), os.getpid(), round(psutil.Process().create_time(), 2), secrets.token_hex(4)])


def is_gone(owner: str) -> bool:
    """Whether a process of this machine has ended; of other machines nothing is known, and the answer is no."""
    machine, number, started, _ = json.loads(owner)
    if machine != _machine():
        return False
    try:
        process = psutil.Process(number)
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - started) > _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True


@cache
def _machine() -> str:
    """The machine's name, and which of its containers sees this process."""
    namespace = Path("/proc/self/ns/pid")
    return f"{platform.node()} {namespace.readlink() if namespace.exists() else ''}".strip()


HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 90
"""A trial whose driver has not given a sign for so long is another's."""

_DRIVERS = {"postgresql": ("postgresql+psycopg", "postgresql"), "mysql": ("mysql+pymysql", "mysql")}
"""A database by its plain name -> SQLAlchemy's name with the driver that our extra installs, that extra."""

_LOCKS = {
    "postgresql": ("SELECT pg_advisory_lock(hashtext(:name))", "SELECT pg_advisory_unlock(hashtext(:name))"),
    # Shorter than the timeout of reading: whoever waits asks again.
    "mysql": ("SELECT GET_LOCK(LEFT(:name, 64), 20)", "SELECT RELEASE_LOCK(LEFT(:name, 64))"),
}
_TIMEOUTS = {
    # A machine that is switched off says no good-bye: minutes, not hours, until it is noticed, on both sides.
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
"""File systems where SQLite's write-ahead log works; on those of a network it does not."""

_BUSY_TIMEOUT_SECONDS = 60
_LONGEST_WAIT_SECONDS = 15.0
_SECONDS_BETWEEN_WORDS = 60.0

Result = TypeVar("Result")


class Storage:
    """The study of a sweep, open.

    Args:
        sweep: whose study it is.
        say: told when the database does not answer, and when it does again.
        only_look: whether a file that is there is taken as it is, unchecked: for whoever only reads, and has no time.

    Raises:
        ConfigError: no such kind of database, or its driver is not installed.
        InputError: the database does not answer, or the file is none.
    """

    def __init__(self, sweep: Sweep, say: Callable[[str], None] = lambda line: None, only_look: bool = False) -> None:
        self.name, self.say, self._path = sweep.name, say, None
        self.patient = True
        """Whether `retry` waits for a database that does not answer."""
        self._is_made = False
        self._url = make_url(sweep.storage) if sweep.storage else make_url(f"sqlite:///{study_path(sweep).resolve()}")
        backend = self._url.get_backend_name()
        if backend == "sqlite" and self._url.database:
            self._path = Path(self._url.database)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._is_made = only_look and self._path.is_file()
        elif backend not in _LOCKS:
            raise ConfigError(f"storage = {self._shown}: must be a database of sqlite, {', '.join(_LOCKS)}")
        elif self._url.drivername in _DRIVERS:
            self._url = self._url.set(drivername=_DRIVERS[backend][0])
        self.last_error_at = float("-inf")
        """When the database was last found gone, by the monotonic clock."""
        try:
            timeouts = _TIMEOUTS.get(backend, {})
            self._locks = create_engine(self._url, isolation_level="AUTOCOMMIT", poolclass=NullPool, connect_args=timeouts)
            with self.lock():  # two that make the tables at once meet half of them
                self.rdb = self._open()
                self.study = self._open_study(sweep)
        except (ImportError, NoSuchModuleError) as error:
            extra = f"pip install 'madformer[{_DRIVERS[backend][1]}]'" if backend in _DRIVERS else "install its driver"
            raise ConfigError(f"storage = {self._shown}: {first_line(error)}: {extra}") from error
        except (DatabaseError, StorageInternalError, ArgumentError) as error:
            raise self._unusable(error) from error

    def close(self) -> None:
        """Leave the database."""
        self.rdb.remove_session()
        self.rdb.engine.dispose()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold what no two drivers of the sweep may do at once; the database, or the system, lets go of it for a dead one."""
        if self._path is not None:
            with FileLock(self._path.with_name(f".{self._path.name}.lock")):
                yield
            return
        take, release = _LOCKS[self._url.get_backend_name()]
        name = {"name": f"madformer {self.name}"}
        with self._locks.connect() as connection:
            while (got := connection.execute(text(take), name).scalar()) == 0:
                pass  # another one holds it
            assert got in (1, ""), f"{take} gave {got!r}"  # PostgreSQL's has no value
            yield
            with contextlib.suppress(DatabaseError, InterfaceError):  # it is gone with the connection
                connection.execute(text(release), name)

    def retry(self, operation: Callable[[], Result]) -> Result:
        """Do something that may be done again, for as long as the database does not answer.

        Raises:
            InputError: it does not, and nobody is to wait for it.
        """
        pause, said = 1.0, float("-inf")
        while True:
            try:
                result = operation()
            except (OperationalError, InterfaceError, StorageInternalError) as error:
                if not _is_gone(error):
                    raise
                if not self.patient:
                    raise self._unusable(error) from error
                self.last_error_at = time.monotonic()
                if self.last_error_at - said >= _SECONDS_BETWEEN_WORDS:
                    self.say(f"{self.name}: the storage does not answer, trials go on, waiting ({first_line(error)})")
                    said = self.last_error_at
                self.rdb.remove_session()
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_WAIT_SECONDS)
            else:
                if said > 0:
                    self.say(f"{self.name}: the storage answers again")
                return result

    def _open(self) -> RDBStorage:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        options: dict[str, Any] = {"pool_pre_ping": True, "connect_args": _TIMEOUTS.get(self._url.get_backend_name(), {})}
        if self._path is not None:
            options = {"connect_args": {"timeout": _BUSY_TIMEOUT_SECONDS}}
        with quiet():
            rdb = RDBStorage(
                self._url.render_as_string(hide_password=False),
                engine_kwargs=options,
                skip_compatibility_check=self._is_made,
                skip_table_creation=self._is_made,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
            )
        if self._path is not None:
            _make_transactions_atomic(rdb.engine, wal=_is_on_local_disk(self._path))
        return rdb

    def _open_study(self, sweep: Sweep) -> optuna.Study:
        directions = [StudyDirection.MINIMIZE] * (len(sweep.search.objectives) if sweep.search else 1)
        study = optuna.create_study(storage=self.rdb, study_name=sweep.name, load_if_exists=True, directions=directions)
        if len(study.directions) != len(directions):
            what = f"has {len(study.directions)} objectives, not {len(directions)}"
            raise InputError(f"{self._shown}: the study {sweep.name} {what}; give the sweep another name")
        return study

    @property
    def _shown(self) -> str:
        """The database, without its password."""
        return str(self._url.render_as_string(hide_password=True))

    def _unusable(self, error: Exception) -> InputError:
        if self._url.get_backend_name() == "sqlite":
            remedy = "delete it: what is done is read from the runs"
            return InputError(f"{self._path}: no study of a sweep ({first_line(error)}); {remedy}")
        return InputError(f"storage = {self._shown}: cannot be used ({first_line(error)})")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that heartbeats are an experiment, and that they beat in Optuna's own loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        yield


def study_path(sweep: Sweep) -> Path:
    """Where the study of a sweep lies that names no storage."""
    return sweep.folder / "study.db"


def exists(sweep: Sweep) -> bool:
    """Whether there may be a study; without one nothing is made to look."""
    return sweep.storage is not None or study_path(sweep).is_file()


def first_line(error: BaseException) -> str:
    """What the database itself said."""
    cause = getattr(error, "orig", None) or error.__cause__
    return first_line(cause) if cause is not None else next(iter(str(error).strip().splitlines()), type(error).__name__)


def _is_gone(error: Exception) -> bool:
    """Whether it may be back in a while: an error of the connection or the disk, not of what was asked."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return isinstance(cause, (OperationalError, InterfaceError))


def _is_on_local_disk(path: Path) -> bool:
    parts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    return bool(parts) and max(parts, key=lambda part: len(part.mountpoint)).fstype in _LOCAL_DISKS


def _make_transactions_atomic(engine: Engine, wal: bool) -> None:
    """Take the write lock when a transaction begins: two that read first and write later would both claim a trial."""

    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = None
        if wal:
            connection.execute("PRAGMA journal_mode=WAL")

    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", begin)
    engine.dispose()  # connections from before
