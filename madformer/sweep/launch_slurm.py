"""The Slurm launcher: trials as Slurm jobs. Any driver can take them over. At their time limit they are queued again."""

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
from madformer.sweep.needs import cell_progress
from madformer.sweep.queue import Queue, Trial
from madformer.sweep.spec import Sweep
from madformer.sweep.trial import (
    DONE,
    INTERRUPTED,
    THREAD_VARIABLES,
    Commands,
    Outcome,
    TrialProcesses,
    append_log,
    read_outcome,
)

try:
    import submitit
except ImportError as missing:
    raise ConfigError("launcher = 'slurm': needs submitit: pip install 'madformer[slurm]'") from missing

_ARRAY_SIZE = 500
"""Most jobs in one array; clusters allow 1,000."""
_SEARCH_TRIALS = 10
"""Trials of a search at once, unless `slurm.parallel` is set."""
_SECONDS_AFTER_REFUSAL = 60.0
_SECONDS_UNTIL_REQUEUED = 300.0
_SECONDS_BETWEEN_QUERIES = 5.0
_QUERIES_BEFORE_GONE = 2
"""A job that is being queued again may be missing for a moment."""
_UNLIMITED = 1_000_000


class SlurmLauncher:
    """Submits trials, and watches Slurm's queue for their end. A trial's job has the name `ARRAY'S NAME/INDEX`.

    Raises:
        ConfigError: this machine has no Slurm commands.
    """

    outlives_driver = True

    def __init__(self, sweep: Sweep, queue: Queue, commands: Commands, say: Callable[[str], None]) -> None:
        if shutil.which("sbatch") is None or shutil.which("squeue") is None:
            raise ConfigError("launcher = 'slurm': there is no sbatch here; start it on a machine that submits jobs")
        self._sweep, self._queue, self._commands, self._say = sweep, queue, commands, say
        self._jobs: dict[str, Trial] = {}
        self._absences: dict[str, int] = {}
        self._cancelled_jobs: set[str] = set()
        self._last_query_at = self._last_refusal_at = float("-inf")
        self._has_submitted = False

    @property
    def trials(self) -> list[Trial]:
        """The submitted trials that have not ended."""
        return list(self._jobs.values())

    def free_slots(self) -> int:
        """Number of trials that can be submitted now. It is small in a search, whose later trials depend on earlier ones."""
        if time.monotonic() - self._last_refusal_at < _SECONDS_AFTER_REFUSAL:
            return 0
        limit = self._sweep.slurm.parallel or (_SEARCH_TRIALS if self._sweep.search else _UNLIMITED)
        return min(_ARRAY_SIZE, max(0, limit - len(self._jobs)))

    def start(self, trials: Sequence[Trial]) -> None:
        """Submit trials, and watch those that have a job already.

        If Slurm refuses trials, they go back to the queue and are submitted again later.

        Raises:
            InputError: Slurm refuses the first trials of this driver.
        """
        self._jobs |= {trial.job: trial for trial in trials if trial.job is not None}
        unsubmitted = [trial for trial in trials if trial.job is None]
        if not unsubmitted:
            return
        name = f"madformer-{self._sweep.name}-{secrets.token_hex(4)}"
        jobs = {f"{name}/{index}": trial for index, trial in enumerate(unsubmitted)}
        for job, trial in jobs.items():
            self._queue.save_job(trial, job)  # first: the next driver must find the jobs if this one dies here
        try:
            jobs_of_array = self._executor(name).map_array(
                _call, [SlurmTrial(trial.cell, job, self._commands, self._threads) for job, trial in jobs.items()]
            )
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            for trial in unsubmitted:
                self._queue.put_back(trial)
            message = f"slurm: the jobs were not taken: {' '.join(str(error).split())[-500:]}"
            if not self._has_submitted:
                raise InputError(message) from error
            self._say(f"{self._sweep.name}: {message}; tried again later")
            self._last_refusal_at = time.monotonic()
            return
        self._has_submitted = True
        array_id = jobs_of_array[0].job_id.split("_")[0]
        self._say(f"{self._sweep.name}: {len(unsubmitted)} trials submitted as job {array_id} ({name})")
        self._jobs |= jobs

    def finished_trials(self, seconds: float) -> Iterator[tuple[Trial, Outcome]]:
        """Wait for some seconds, then yield the trials whose jobs have ended."""
        time.sleep(seconds)
        if not self._jobs or time.monotonic() - self._last_query_at < _SECONDS_BETWEEN_QUERIES:
            return
        self._last_query_at = time.monotonic()
        job_numbers = _queued_jobs()
        if job_numbers is None:
            return
        for job, trial in list(self._jobs.items()):
            self._absences[job] = 0 if job in job_numbers else self._absences.get(job, 0) + 1
            if self._absences[job] >= _QUERIES_BEFORE_GONE:
                del self._jobs[job], self._absences[job]
                outcome = read_outcome(trial.cell, _begin(job), f"; what Slurm has of it is in {self._sweep.folder}/.slurm")
                yield trial, INTERRUPTED if job in self._cancelled_jobs and outcome != DONE else outcome

    def interrupt(self, trial: Trial) -> bool:
        """Let a trial save its state and end. Returns whether Slurm accepts the command."""
        job_numbers = _queued_jobs() or {}
        for job, other in self._jobs.items():
            if other == trial and job in job_numbers:
                self._cancelled_jobs.add(job)
                return subprocess.run(["scancel", job_numbers[job]], check=False).returncode == 0
        return False

    def stop(self, signal_number: signal.Signals) -> None:
        """Do nothing, as jobs outlive the driver."""

    def close(self) -> None:
        """Do nothing, as there are no resources to free."""

    @property
    def _threads(self) -> int | None:
        return self._sweep.threads if self._sweep.accelerator == "cpu" else None

    def _executor(self, name: str) -> submitit.SlurmExecutor:
        settings, folder = self._sweep.slurm, self._sweep.folder.resolve() / ".slurm"
        executor = submitit.SlurmExecutor(folder, max_num_timeout=_UNLIMITED)
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
            "array_parallelism": settings.parallel or _ARRAY_SIZE,
            "setup": list(settings.setup),
            "srun_args": ["--kill-on-bad-exit=1"],  # when a rank fails, end the others
            "stderr_to_stdout": True,
            "additional_parameters": {"requeue": True, **settings.options},
        }
        if self._sweep.accelerator != "cpu" and "gres" not in settings.options:
            parameters["gpus_per_node"] = self._sweep.devices_per_trial
        if settings.cpus_per_task:  # srun no longer inherits it from sbatch
            parameters["setup"].append(f"export SRUN_CPUS_PER_TASK={settings.cpus_per_task}")
        executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
        return executor


@dataclass
class SlurmTrial:
    """The work of a job. Each task of the job runs the trial's commands, which find the other tasks by Slurm's variables."""

    cell: Cell
    job: str
    """The job's name, `ARRAY'S NAME/INDEX`."""
    commands: Commands
    threads: int | None
    """CPU threads; None: the libraries' default."""
    _processes: TrialProcesses | None = field(default=None, repr=False)
    _first_progress: list[int] = field(default_factory=list, repr=False)

    def run(self) -> None:
        """Run the trial's commands.

        Raises:
            SystemExit: a command failed. This ends the other tasks too.
        """
        environment = dict(os.environ)
        if self.threads is not None:
            environment |= dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        rank, tasks = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
        self._first_progress = cell_progress(self.cell)
        append_log(self.cell, _begin(self.job), rank)
        self._processes = TrialProcesses(self.cell, self.commands, print, environment, None if tasks == 1 else rank)
        signal.signal(signal.SIGTERM, self._end)
        if rank:  # submitit handles it in the first task only
            signal.signal(signal.SIGUSR2, self._end)
        outcome = self._processes.run()
        while outcome == INTERRUPTED:
            time.sleep(1)  # preempted, cancelled or at the time limit: Slurm ends the job, and may queue it again
        if outcome.kind == "hindered" and rank:
            time.sleep(_SECONDS_UNTIL_REQUEUED)  # the first task's process stopped it: Slurm is queueing the job again
        if outcome.state == "failed":
            raise SystemExit(1)

    def requeue(self) -> submitit.helpers.DelayedSubmission | None:
        """Save the state before the time limit.

        Returns:
            The job that continues; None: this job made no progress, so the driver decides.
        """
        if self._processes is not None:
            self._processes.stop(signal.SIGUSR2)
            self._processes.wait()
        if cell_progress(self.cell) <= self._first_progress:
            append_log(self.cell, "the job's time was over before anything was done; slurm.minutes is too short")
            return None
        append_log(self.cell, "the job's time is over, it is queued again")
        return submitit.helpers.DelayedSubmission(_call, SlurmTrial(self.cell, self.job, self.commands, self.threads))

    def _end(self, *_: object) -> None:
        if self._processes is not None:
            self._processes.stop(signal.SIGUSR2)


class _Call:
    """The function that submitit calls in every task. In the first task it also calls `checkpoint`, for the next job."""

    def __call__(self, trial: SlurmTrial) -> None:
        trial.run()

    def checkpoint(self, trial: SlurmTrial) -> submitit.helpers.DelayedSubmission | None:
        return trial.requeue()


_call = _Call()


def _queued_jobs() -> dict[str, str] | None:
    """`ARRAY'S NAME/INDEX` of waiting and running jobs -> Slurm's job number; None: Slurm does not answer."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%K|%j"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = (line.strip().split("|", 2) for line in result.stdout.splitlines())
    return {f"{name}/{index if index.isdigit() else 0}": number for number, index, name in rows}


def _begin(job: str) -> str:
    """The log's line at which a job begins, for the first time or again."""
    return f"job {job}"
