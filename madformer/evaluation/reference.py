"""Statistics of reference images: features of all images of a data set, computed once and kept in a file.

A file belongs to one data set (by its fingerprint), image size, crop and feature network. It holds the sums for the Fréchet
distance over all images, and the features themselves of at most `KEPT` images for the metrics that need pairs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from madformer import __version__
from madformer.config import ExperimentConfig
from madformer.config.data import DIGITS
from madformer.data.image_files import to_unit
from madformer.data.loader import batched, decode_rows, skip_broken
from madformer.data.sources import digits_sha256, load_digits, open_source
from madformer.errors import ConfigError, InputError
from madformer.evaluation.feature_cache import (
    CHECKSUM,
    FEATURES,
    INDICES,
    read_indices,
    read_parts,
    remove_parts,
    tensors_checksum,
    write_part,
)
from madformer.evaluation.feature_networks import FeatureNetwork
from madformer.evaluation.metrics import Moments
from madformer.evaluation.neighbours import Within, nearest_distances, pairs_within
from madformer.progress import ProgressDisplay
from madformer.randomness import keyed_generator
from madformer.runs.files import atomic_write, hold_lock, remove_stale, require_readable, save_tensors

KEPT = 50_000
"""Images of a reference whose features are kept, chosen by chance but always the same ones: as many as are usually sampled."""

METADATA = "madformer"
"""Key of the description in a file's metadata."""

_UNIT = 2**32
"""More than the rows of any unit of a source."""


@dataclass(frozen=True)
class Reference:
    """Features of a reference set."""

    moments: Moments
    """Of all images."""
    features_MD: Tensor
    """Of the images that are kept, float32, in an order by chance: the first ones are a sample, too."""
    described: dict[str, Any]
    """Source, image size, network, number of images, ...; `sha256` over what makes it this reference."""

    _within: dict[int, Within] = field(default_factory=dict, compare=False)
    _nearest: dict[Tensor, Tensor] = field(default_factory=dict, compare=False)

    @property
    def pedigree(self) -> dict[str, Any]:
        """For records of evaluations."""
        return {key: self.described[key] for key in ("source", "images", "sha256")}

    def within(self, count: int, device: torch.device) -> Within:
        """What the pairs of the first `count` of the images that are kept tell, computed once."""
        if count not in self._within:
            self._within[count] = pairs_within(self.features_MD[:count].to(device))
        return self._within[count]

    def nearest_to(self, training_MD: Tensor, device: torch.device) -> Tensor:
        """The distance of each kept image to its nearest training image, [M] float64, computed once."""
        if training_MD not in self._nearest:
            self._nearest[training_MD] = nearest_distances(self.features_MD.to(device), training_MD)
        return self._nearest[training_MD]


def find_reference(
    network: FeatureNetwork,
    config: ExperimentConfig,
    image_size: int,
    source_sha256: str | None,
    given: Sequence[Path] = (),
) -> Reference:
    """The reference of a run's images: one of the files given, the one that is kept, or one that is computed now and kept.

    Processes that need the same one at the same time wait for the first. It goes on where it was interrupted.

    Args:
        image_size: pixels along a side of the images that the run makes.
        source_sha256: fingerprint of the images that the run was trained on; None: unknown, compute it from the source.
        given: files of references; of each network there is one.

    Raises:
        InputError: a given file is of other images, another size or crop; or the source has changed.
        ConfigError: there are no reference images.
    """
    for path in given:
        reference = load_reference(path)
        if reference.described["network"]["sha256"] == network.sha256:
            _require_same(path, reference, image_size, config.data.crop, source_sha256)
            return reference
    if given:
        files = ", ".join(map(str, given))
        raise InputError(f"--reference {files}: none is of the features of {network.name} (SHA-256 {network.sha256[:12]})")
    images = None
    if source_sha256 is None:
        images = _open(config, image_size, None)
        source_sha256 = images.sha256
    described = _describe(config, image_size, network, source_sha256)
    path = _find(Path(config.evaluation.references), described)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                remove_stale(path.parent, path.name)
                _compute(network, images or _open(config, image_size, source_sha256), described, path)
    return load_reference(path)


def load_reference(path: Path) -> Reference:
    """Read a file of `madformer evaluate`.

    Raises:
        InputError: there is none, or it is torn or something else.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such reference")
    require_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})[METADATA])
            tensors = {name: file.get_tensor(name) for name in ("sum", "outer", FEATURES)}
        if described.pop(CHECKSUM, None) not in (None, tensors_checksum(tensors, json.dumps(described))):
            raise ValueError("it does not match its checksum")
        moments = Moments(described["images"], tensors["sum"], tensors["outer"])
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        remedy = "if it is deleted, it is computed again"
        raise InputError(f"{path}: torn, or no reference that madformer evaluate made: {error}; {remedy}") from error
    return Reference(moments, tensors[FEATURES], described)


@dataclass(frozen=True)
class _Images:
    """Images of a source in units, each unit a sequence of batches [B, C, Y, X] in [-1, 1]."""

    sha256: str
    units: int
    expected: int | None
    read: Callable[[int], Iterator[Tensor]]


def _open(config: ExperimentConfig, image_size: int, expected_sha256: str | None) -> _Images:
    data = config.data
    if data.source is None:
        remedy = "name a file of their statistics (--reference FILE)"
        raise ConfigError(f"data.source = null, and {config.evaluation.references} has no statistics of its images: {remedy}")
    if data.source == DIGITS:
        images_NCYX = load_digits(data.split)[0]
        return _Images(digits_sha256(data.split), 1, len(images_NCYX), lambda _: iter(images_NCYX.split(256)))
    source = open_source(data)
    if expected_sha256 is not None and source.fingerprint != expected_sha256:
        other = f"(SHA-256 {source.fingerprint[:12]}) are not those that the run was trained on ({expected_sha256[:12]})"
        raise InputError(f"data.source = {data.source!r}: the images there {other}: bring them back, or give --reference FILE")

    broken: list[tuple[str, str]] = []

    def read(unit: int) -> Iterator[Tensor]:
        decoded = decode_rows(source.rows(unit), image_size, data.crop, data.workers, queue_size=64 + data.workers)
        for batch in batched(skip_broken(decoded, data, broken), config.evaluation.batch_size):
            yield to_unit(torch.stack([image.pixels_CYX for image in batch]))

    return _Images(source.fingerprint, source.num_units, source.expected_rows, read)


def _compute(network: FeatureNetwork, images: _Images, described: dict[str, Any], path: Path) -> None:
    folder = path.with_name(f".{path.stem}.parts")
    seen = read_indices(folder)
    units, count = {index // _UNIT for index in seen}, len(seen)
    with ProgressDisplay(f"reference for {network.label}", "images", images.expected, count) as display:
        for unit in range(images.units):
            if unit in units:
                continue
            features = []
            for batch_BCYX in images.read(unit):
                features.append(network(batch_BCYX).features_BD.cpu())
                count += len(batch_BCYX)
                display.show(count)
            if features:
                features_ND = torch.cat(features)
                write_part(folder, {INDICES: unit * _UNIT + torch.arange(len(features_ND)), FEATURES: features_ND})
    moments, features_MD = _gather(folder)
    tensors = {"sum": moments.sum_D, "outer": moments.outer_DD, FEATURES: features_MD}
    with atomic_write(path) as temporary:
        described = {**described, "images": moments.count}
        described[CHECKSUM] = tensors_checksum(tensors, json.dumps(described))
        save_tensors(tensors, temporary, {METADATA: json.dumps(described)})
    remove_parts(folder)


def _gather(folder: Path) -> tuple[Moments, Tensor]:
    """Moments of all features, and the features that are kept."""
    total = len(read_indices(folder))
    if total < 2:
        raise InputError(f"{total} reference images that can be read: a distance needs at least 2")
    chosen_M = torch.randperm(total, generator=keyed_generator("reference"))[:KEPT]
    place_N = torch.full((total,), -1)
    place_N[chosen_M] = torch.arange(len(chosen_M))
    moments, kept_MD, done = None, torch.empty(0), 0
    for part in read_parts(folder):
        features_ND, place_P = part[FEATURES], place_N[done : done + len(part[FEATURES])]
        if moments is None:
            kept_MD = features_ND.new_empty(len(chosen_M), features_ND.shape[1])
        more = Moments.of(features_ND)
        moments = more if moments is None else moments + more
        kept_MD[place_P[place_P >= 0]] = features_ND[place_P >= 0]
        done += len(features_ND)
    assert moments is not None
    return moments, kept_MD


def _describe(config: ExperimentConfig, image_size: int, network: FeatureNetwork, source_sha256: str) -> dict[str, Any]:
    """All that makes a reference what it is, but the number of images."""
    decides = [source_sha256, config.data.image_column, image_size, config.data.crop, network.sha256]
    return {
        "source": config.data.source,
        "subset": config.data.subset,
        "split": config.data.split,
        "source_sha256": source_sha256,
        "image_column": config.data.image_column,
        "image_size": image_size,
        "crop": config.data.crop,
        "network": {"name": network.name, "label": network.label, "sha256": network.sha256, "width": network.width},
        "sha256": hashlib.sha256(json.dumps(decides).encode()).hexdigest(),
        "version": __version__,
    }


def _find(folder: Path, described: dict[str, Any]) -> Path:
    """The file of a reference, or the one that it is to have: its name says what it is; another one has another hash there."""
    matching = sorted(folder.glob(f"*-{described['sha256'][:12]}.safetensors"))  # the data may have had another path
    if matching:
        return matching[0]
    source = re.sub(r"[^A-Za-z0-9]+", "-", Path(described["source"] or "images").stem).strip("-")
    name = f"{source}-{described['image_size']}-{described['network']['label']}-{described['sha256'][:12]}.safetensors"
    return folder / name


def _require_same(path: Path, reference: Reference, image_size: int, crop: str, source_sha256: str | None) -> None:
    pairs = [
        ("pixels along a side", reference.described["image_size"], image_size),
        ("crop", reference.described["crop"], crop),
        ("SHA-256 of the images", reference.described["source_sha256"][:12], source_sha256 and source_sha256[:12]),
    ]
    for what, theirs, ours in pairs:
        if ours is not None and theirs != ours:
            made = f"of other images than the run's: {what} {theirs} there, {ours} here"
            raise InputError(
                f"--reference {path}: {made} (it is of {reference.described['source']}): give another file, or none"
            )
