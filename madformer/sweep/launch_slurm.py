"""Trials as jobs of Slurm: submitted as arrays, found again by any driver, saved and queued again when their time is over."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from madformer.errors import ConfigError, InputError
from madformer.sweep.cells import Cell
from madformer.sweep.needs import progress
from madformer.sweep.queue import Queue, Trial
from madformer.sweep.spec import Sweep
from madformer.sweep.trial import DONE, INTERRUPTED, Commands, Outcome, TrialProcesses, append_log, read_outcome

try:
    import submitit
except ImportError as missing:
    raise ConfigError("launcher = 'slurm': needs submitit: pip install 'madformer[slurm]'") from missing

_AT_ONCE = 500
"""Jobs of one array; clusters allow 1,000."""
_SEARCHED_AT_ONCE = 10
"""Trials of a search at once, unless `slurm.parallel` says otherwise."""
_SECONDS_AFTER_REFUSAL = 60.0
_SECONDS_TO_PUT_OFF = 300.0
_SECONDS_BETWEEN_LOOKS = 5.0
_LOOKS_BEFORE_GONE = 2
"""A job that is queued again may be out of sight for a moment."""
_MANY = 1_000_000


class SlurmLauncher:
    """Submits trials, and watches the queue of Slurm for their ends. A trial's job is `ARRAY'S NAME/INDEX`.

    Raises:
        ConfigError: there is no Slurm here.
    """

    outlives_driver = True

    def __init__(self, sweep: Sweep, queue: Queue, commands: Commands, say: Callable[[str], None]) -> None:
        if shutil.which("sbatch") is None or shutil.which("squeue") is None:
            raise ConfigError("launcher = 'slurm': there is no sbatch here; start it on a machine that submits jobs")
        self._sweep, self._queue, self._commands, self._say = sweep, queue, commands, say
        self._jobs: dict[str, Trial] = {}
        self._absences: dict[str, int] = {}
        self._cancelled: set[str] = set()
        self._looked = self._refused = float("-inf")
        self._accepted = False
        """Whether Slurm has ever taken jobs of this driver."""

    @property
    def trials(self) -> list[Trial]:
        """Those that were submitted and have not ended."""
        return list(self._jobs.values())

    def room(self) -> int:
        """How many trials can be submitted now: Slurm decides when they run. A search is to learn from the first ones."""
        if time.monotonic() - self._refused < _SECONDS_AFTER_REFUSAL:
            return 0
        most = self._sweep.slurm.parallel or (_SEARCHED_AT_ONCE if self._sweep.search else _MANY)
        return min(_AT_ONCE, max(0, most - len(self._jobs)))

    def start(self, trials: Sequence[Trial]) -> None:
        """Submit trials; those that have a job are only watched.

        Raises:
            InputError: Slurm does not take the first ones; they are put back. Later ones are tried again.
        """
        self._jobs |= {trial.job: trial for trial in trials if trial.job is not None}
        new = [trial for trial in trials if trial.job is None]
        if not new:
            return
        name = f"madformer-{self._sweep.name}-{secrets.token_hex(4)}"
        jobs = {f"{name}/{index}": trial for index, trial in enumerate(new)}
        for job, trial in jobs.items():
            self._queue.remember_job(trial, job)  # first: a driver that dies in between leaves jobs that are found
        try:
            submitted = self._executor(name).map_array(
                _call, [SlurmTrial(trial.cell, job, self._commands, self._threads) for job, trial in jobs.items()]
            )
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            for trial in new:
                self._queue.put_back(trial)
            what = f"slurm: the jobs were not taken: {' '.join(str(error).split())[-500:]}"
            if not self._accepted:
                raise InputError(what) from error
            self._say(f"{self._sweep.name}: {what}; tried again later")
            self._refused = time.monotonic()
            return
        self._accepted = True
        self._say(f"{self._sweep.name}: {len(new)} trials submitted as job {submitted[0].job_id.split('_')[0]} ({name})")
        self._jobs |= jobs

    def ended(self, seconds: float) -> Iterator[tuple[Trial, Outcome]]:
        """Trials whose jobs have ended; waits so long."""
        time.sleep(seconds)
        if not self._jobs or time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        alive = _jobs_in_queue()
        if alive is None:
            return  # no word from Slurm says nothing of its jobs
        for job, trial in list(self._jobs.items()):
            self._absences[job] = 0 if job in alive else self._absences.get(job, 0) + 1
            if self._absences[job] >= _LOOKS_BEFORE_GONE:
                del self._jobs[job], self._absences[job]
                outcome = read_outcome(trial.cell, _begin(job), f"; what Slurm has of it is in {self._sweep.folder}/.slurm")
                yield trial, INTERRUPTED if job in self._cancelled and outcome != DONE else outcome

    def end(self, trial: Trial) -> bool:
        """Have a trial save its state and end; whether it was told."""
        alive = _jobs_in_queue() or {}
        for job, other in self._jobs.items():
            if other == trial and job in alive:
                self._cancelled.add(job)
                return subprocess.run(["scancel", alive[job]], check=False).returncode == 0
        return False

    def stop(self, how: signal.Signals) -> None:
        """Leave them alone: they outlive the driver."""

    def close(self) -> None:
        """Nothing is held."""

    @property
    def _threads(self) -> int | None:
        return self._sweep.threads if self._sweep.accelerator == "cpu" else None

    def _executor(self, name: str) -> submitit.SlurmExecutor:
        settings, folder = self._sweep.slurm, self._sweep.folder.resolve() / ".slurm"
        executor = submitit.SlurmExecutor(folder, max_num_timeout=_MANY)
        parameters: dict[str, Any] = {
            "job_name": name,
            "partition": settings.partition,
            "account": settings.account,
            "qos": settings.qos,
            "time": settings.minutes,
            "signal_delay_s": settings.signal_seconds,
            "nodes": settings.nodes_per_trial,
            "ntasks_per_node": self._sweep.devices_per_trial,
            "cpus_per_task": settings.cpus_per_task,
            "mem": f"{round(settings.mem_gb * 1024)}M" if settings.mem_gb else None,
            "array_parallelism": settings.parallel or _AT_ONCE,
            "setup": list(settings.setup),
            "srun_args": ["--kill-on-bad-exit=1"],  # a rank that has failed is not waited for
            "stderr_to_stdout": True,
            "additional_parameters": {"requeue": True, **settings.options},
        }
        if self._sweep.accelerator != "cpu" and "gres" not in settings.options:
            parameters["gpus_per_node"] = self._sweep.devices_per_trial
        if settings.cpus_per_task:  # srun does not take it over from sbatch any more
            parameters["setup"].append(f"export SRUN_CPUS_PER_TASK={settings.cpus_per_task}")
        executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
        return executor


@dataclass
class SlurmTrial:
    """What a job does: on each of its tasks, the trial's commands, which find the other tasks by Slurm's variables."""

    cell: Cell
    job: str
    """`ARRAY'S NAME/INDEX`."""
    commands: Commands
    threads: int | None
    """CPU threads; None: as many as the libraries like."""
    _processes: TrialProcesses | None = field(default=None, repr=False)
    _before: list[int] = field(default_factory=list, repr=False)

    def run(self) -> None:
        """Run to the end.

        Raises:
            SystemExit: it failed, which ends the other tasks too.
        """
        environment = dict(os.environ)
        if self.threads is not None:
            names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
            environment |= dict.fromkeys(names, str(self.threads))
        rank, alone = int(os.environ.get("SLURM_PROCID", "0")), os.environ.get("SLURM_NTASKS", "1") == "1"
        self._before = progress(self.cell)
        append_log(self.cell, _begin(self.job), rank)
        self._processes = TrialProcesses(self.cell, self.commands, print, environment, None if alone else rank)
        signal.signal(signal.SIGTERM, self._end)
        if rank:  # submitit answers on the first task alone
            signal.signal(signal.SIGUSR2, self._end)
        outcome = self._processes.run()
        while outcome == INTERRUPTED:
            time.sleep(1)  # preempted, cancelled or put off: Slurm ends the job, and knows whether it is to be queued again
        if outcome.kind == "hindered" and rank:
            time.sleep(_SECONDS_TO_PUT_OFF)  # stopped by the first task's child, which is being put off
        if outcome.state == "failed":
            raise SystemExit(1)

    def put_off(self) -> submitit.helpers.DelayedSubmission | None:
        """The time is nearly over: save the state.

        Returns:
            What goes on from it; None: nothing was gained, and the driver sees to it.
        """
        if self._processes is not None:
            self._processes.stop(signal.SIGUSR2)
            self._processes.wait()
        if progress(self.cell) <= self._before:
            append_log(self.cell, "the job's time was over before anything was done; slurm.minutes is too short")
            return None
        append_log(self.cell, "the job's time is over, it is queued again")
        return submitit.helpers.DelayedSubmission(_call, SlurmTrial(self.cell, self.job, self.commands, self.threads))

    def _end(self, *_: object) -> None:
        if self._processes is not None:
            self._processes.stop(signal.SIGUSR2)


class _Call:
    """What submitit calls on every task, and asks on the first one for what is to be queued again."""

    def __call__(self, trial: SlurmTrial) -> None:
        trial.run()

    def checkpoint(self, trial: SlurmTrial) -> submitit.helpers.DelayedSubmission | None:
        return trial.put_off()


_call = _Call()


def _jobs_in_queue() -> dict[str, str] | None:
    """`ARRAY'S NAME/INDEX` of jobs that wait or run -> Slurm's number of each; None: Slurm does not say."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%K|%j"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = (line.strip().split("|", 2) for line in listed.stdout.splitlines())
    return {f"{name}/{index if index.isdigit() else 0}": number for number, index, name in rows}


def _begin(job: str) -> str:
    """What the log says where a job begins; queued again, it says so again."""
    return f"job {job}"
