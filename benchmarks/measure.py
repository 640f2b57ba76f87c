"""Clocks and counters: seconds, FLOPs, memory and the machine's matmul rate."""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from madformer.config import ModelConfig

Run = Callable[[], object]


@dataclass(frozen=True)
class Setup:
    """The device, precision and repeats of a measurement."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype

    @property
    def runs(self) -> bool:
        """Whether there is anything to time: on meta FLOPs are counted and nothing is computed."""
        return self.device.type != "meta"

    def autocast(self, cache_enabled: bool = True) -> contextlib.AbstractContextManager[Any]:
        """The precision to run under."""
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32, cache_enabled)


@dataclass
class Side:
    """The cost of one run of a formulation."""

    flops: int
    seconds: list[float]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        """Median of the timed runs."""
        return statistics.median(self.seconds)


def count_flops(run: Run) -> int:
    """FLOPs of a run whose tensors are on meta (on the CPU, torch's counter does not see attention)."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measure(setup: Setup, runs: dict[str, Run], flops: dict[str, int], repeats: int) -> dict[str, Side]:
    """Time the sides in turn, ours, theirs, ours, ..., after one untimed run of each and one that watches memory."""
    if not setup.runs:
        return {name: Side(flops[name], [], None) for name in flops}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    peaks = {name: _peak_bytes(setup, run) for name, run in runs.items()}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, setup.device))
    return {name: Side(flops[name], seconds[name], peaks[name]) for name in runs}


def seconds_of(run: Run, device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of a large square matrix product, the best of several. This rate is 100 % MFU."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    times = [seconds_of(lambda: torch.mm(a, b, out=out), device) for _ in range(repeats)]
    return 2 * side**3 / min(times)


def _peak_bytes(setup: Setup, run: Run) -> int | None:
    """Peak memory that a run adds: by CUDA's allocator, on the CPU by the tensors that are alive."""
    if setup.device.type == "cuda":
        before = torch.cuda.memory_allocated(setup.device)
        torch.cuda.reset_peak_memory_stats(setup.device)
        run()
        return torch.cuda.max_memory_allocated(setup.device) - before
    if setup.config.compile is True:
        return None  # allocations of compiled code do not pass the dispatcher
    with PeakBytes() as watch:
        run()
    return watch.peak


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive at once, without scratch memory of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view, or an in-place result, shares the storage of an argument.
        known = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in known:
                known.add(storage._cdata)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
