"""Features of samples on the disk, in parts, so that an interrupted evaluation resumes and several processes can share it."""

from __future__ import annotations

import math
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from madformer.config import ExperimentConfig
from madformer.data.codec import Codec
from madformer.errors import NonFiniteError
from madformer.evaluation.feature_networks import FeatureNetwork
from madformer.evaluation.measurement import Sampling
from madformer.evaluation.sampling import sample_batches, tokenize
from madformer.model import MADFormer
from madformer.model.generation import BlockSampler
from madformer.runs.files import atomic_write, require_readable, save_tensors

INDICES = "indices"
"""Which samples the rows of a part are, [n] int64."""

FEATURES = "features"
"""Their features, [n, d]."""

CHECKSUM = "xxh3"
"""Key of the checksum (`tensors_checksum`) in a file's metadata. Files of older versions have none."""


def write_part(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one part, with `INDICES` among its tensors."""
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    first = int(tensors[INDICES][0])
    with atomic_write(folder / f"part-{first:020d}-{secrets.token_hex(4)}.safetensors") as temporary:
        save_tensors(contiguous, temporary, {CHECKSUM: tensors_checksum(contiguous)})


def read_parts(folder: Path) -> Iterator[dict[str, Tensor]]:
    """The parts' tensors by their names, in the order of their first samples.

    A part that is torn is removed: its samples are missing then.
    """
    for path in sorted(folder.glob("part-*.safetensors")):
        require_readable(path)
        try:
            content = load_part(path)
        except SafetensorError:
            path.unlink(missing_ok=True)
        else:
            yield content


def read_indices(folder: Path) -> set[int]:
    """Samples that are there, in whatever part."""
    return {index for part in read_parts(folder) for index in part[INDICES].tolist()}


def load_part(path: Path) -> dict[str, Tensor]:
    """The tensors of a part.

    Raises:
        SafetensorError: it is torn.
    """
    with safe_open(path, framework="pt") as part:
        checksum = (part.metadata() or {}).get(CHECKSUM)
        tensors = {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118 - not a dictionary
    if INDICES not in tensors or checksum not in (None, tensors_checksum(tensors)):
        raise SafetensorError("it does not match its checksum")
    return tensors


def tensors_checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Hexadecimal XXH3 (128 bits) of tensors with their names, types and shapes, and of a text."""
    digest = xxhash.xxh3_128(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def remove_parts(folder: Path) -> None:
    """Delete the cached features."""
    shutil.rmtree(folder, ignore_errors=True)


SECONDS_BETWEEN_PARTS = 30.0
SAMPLES_IN_PART = 64
"""A part is written when it has so many samples, or is so old: no more is lost when a process dies."""

PHASES = ("sampling", "decoding", "features")
"""What takes time for each batch; a part has a tensor of seconds for each."""

SIZES, BLOCKS, WARM, MEMORY = "batch_sizes", "blocks", "warm", "memory"
"""Of each batch: its samples; seconds of each block; whether it was not its process's first; peak memory in GiB, or NaN."""


def features_name(network: int) -> str:
    """Features of the network of that number, in a part."""
    return f"features.{network}"


def logits_name(network: int) -> str:
    """Its logits, if it has any."""
    return f"logits.{network}"


@dataclass(frozen=True)
class SampleRequest:
    """Which samples of a model are looked at."""

    config: ExperimentConfig
    sampling: Sampling
    prompts: Sequence[str]
    """One for each sample."""
    title: str
    """Names the model and the budget in messages."""


def sample_features(
    folder: Path,
    request: SampleRequest,
    model: MADFormer,
    codec: Codec,
    networks: Sequence[FeatureNetwork],
    indices: Sequence[int],
    show: Callable[[int], None],
    make_sampler: Callable[..., BlockSampler] | None = None,
) -> None:
    """Sample those of `indices` that have no features in the folder yet, and keep their features there.

    Args:
        model: in evaluation mode, on the device where all of it happens.
        show: called with the number of samples that this call has done.
        make_sampler: as in `sample_batches`.

    Raises:
        NonFiniteError: the model has diverged.
    """
    existing, sampling = read_indices(folder), request.sampling
    missing = [index for index in indices if index not in existing]
    text_BT = tokenize(request.config, [request.prompts[index] for index in missing], sampling.guidance)
    part = _Part(folder, model.boi_SD.device)
    batches = sample_batches(model, request.config, sampling, missing, text_BT, part.on_block, make_sampler)
    done = 0
    part.start()
    for latents_BChw in batches:
        part.lap("sampling")
        if not bool(latents_BChw.isfinite().all()):
            raise NonFiniteError(f"{request.title}: its samples are NaN or infinite, the run has diverged")
        images_BCYX = codec.decode(latents_BChw)
        if not bool(images_BCYX.isfinite().all()):
            overflow = f"codec {codec.name} decodes samples to NaN or infinity: set data.codec_dtype=float32"
            raise NonFiniteError(f"{request.title}: {overflow}, or the run has diverged")
        part.lap("decoding")
        features = [network(images_BCYX) for network in networks]
        rows = {features_name(number): each.features_BD for number, each in enumerate(features)}
        rows |= {logits_name(number): each.logits_BK for number, each in enumerate(features) if each.logits_BK is not None}
        part.add(missing[done : done + len(latents_BChw)], rows)
        part.lap("features")
        done += len(latents_BChw)
        part.write_if_due()
        show(done)
        part.start()
    part.write()


class _Part:
    """Rows that are not written yet, and what they cost."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._written = time.monotonic()
        self._is_warm = False
        self._clear()

    def start(self) -> None:
        """A batch begins."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._blocks.append([])
        self._lap = self._now()

    def on_block(self, block: int, _: Tensor) -> None:
        """A block is done."""
        now = self._now()
        self._blocks[-1].append(now - self._lap - sum(self._blocks[-1]))

    def lap(self, phase: str) -> None:
        """What takes the time since the last lap is over."""
        now = self._now()
        self._seconds[phase].append(now - self._lap)
        if phase == "sampling":
            self._memory.append(self._peak_memory())
            self._warm.append(self._is_warm)
            self._is_warm = True
        self._lap = now

    def add(self, indices: Sequence[int], rows: dict[str, Tensor]) -> None:
        """Rows of a batch."""
        self._indices += indices
        self._sizes.append(len(indices))
        for name, row in rows.items():
            self._rows[name].append(row.cpu())

    def write_if_due(self) -> None:
        """Write what there is, if it is much or old."""
        if len(self._indices) >= SAMPLES_IN_PART or time.monotonic() - self._written > SECONDS_BETWEEN_PARTS:
            self.write()

    def write(self) -> None:
        """Write what there is, if there is something."""
        if not self._indices:
            return
        costs = {phase: torch.tensor(self._seconds[phase], dtype=torch.float64) for phase in PHASES}
        costs[BLOCKS] = torch.tensor(self._blocks[: len(self._sizes)], dtype=torch.float64)
        costs |= {SIZES: torch.tensor(self._sizes), WARM: torch.tensor(self._warm), MEMORY: torch.tensor(self._memory)}
        rows = {name: torch.cat(parts) for name, parts in self._rows.items()}
        write_part(self._folder, {INDICES: torch.tensor(self._indices), **rows, **costs})
        self._written = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self._indices: list[int] = []
        self._sizes: list[int] = []
        self._blocks: list[list[float]] = []
        self._memory: list[float] = []
        self._warm: list[bool] = []
        self._rows: dict[str, list[Tensor]] = defaultdict(list)
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _peak_memory(self) -> float:
        """GiB allocated on the GPU at most while the batch was sampled. Nobody counts them on the CPU."""
        return torch.cuda.max_memory_allocated(self._device) / 2**30 if self._device.type == "cuda" else math.nan
