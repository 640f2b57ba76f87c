"""Flips bits of every kind of file, one at a time. SLOW=1 runs it; each kind prints its tries and how many were survived.

A flip is survived if `madformer verify` finds it and whatever reads the file refuses it in one line, or if it changes nothing.
"""

import copy
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from madformer.config import load_run
from madformer.data.latents import ShardReader, read_manifest
from madformer.errors import InputError
from madformer.evaluation.feature_cache import INDICES, read_parts, write_part
from madformer.evaluation.record import read_means, read_points
from madformer.evaluation.reference import load_reference
from madformer.report.verify import verify
from madformer.runs.checkpoints import find_flaw, load_checkpoint
from tests.data.test_latents import fill
from tests.tiny_runs import command, differences, perform, train_command

pytestmark = pytest.mark.slow

TRIES = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    references = f"evaluation.references={folder / 'references'}"
    perform(train_command(folder, references, "trainer.max_steps=6"))
    perform(command("evaluate", folder / "digits", references, "--nfe", "5"))
    fill(folder / "latents")
    write_part(folder / "features", {INDICES: torch.arange(4), "features": torch.randn(4, 3)})
    return folder


def read_latents(path):
    reader = ShardReader(path.parent, read_manifest(path.parent))
    return reader.read("mean", np.arange(len(reader))), reader.values("label", np.arange(len(reader)))


def read_checkpoint(path):
    if flaw := find_flaw(path):
        raise InputError(flaw)
    return load_checkpoint(path)


def read_part(path):
    if not (parts := list(read_parts(path.parent))):
        raise InputError("removed")
    return parts


KINDS = {
    "checkpoint": ("digits/checkpoints/*.ckpt", read_checkpoint),
    "shard": ("latents/*0.arrow", read_latents),
    "manifest": ("latents/manifest.json", read_latents),
    "reference": ("references/*.safetensors", lambda path: load_reference(path).features_MD),
    "features": ("features/part-*", read_part),
    "configuration": ("digits/config.yaml", lambda path: load_run(path.parent)),
    "record": ("digits/evaluations.jsonl", lambda path: [read_points(path.parent), read_means(path.parent)]),
}
UNCHECKED = {"configuration", "record"}
"""Kinds in which a flip may pass: fields that change no weights, and numbers."""


@pytest.mark.parametrize("kind", KINDS)
def test_flips(kind, world, tmp_path, capsys):
    pattern, read = KINDS[kind]
    shutil.copytree(world, tmp_path / "copy")
    path: Path = sorted((tmp_path / "copy").glob(pattern))[0]
    content, whole = path.read_bytes(), copy.deepcopy(read(path))  # not mapped from the file that is about to change
    chosen, results = random.Random(kind), {"found": 0, "harmless": 0, "silent": 0}
    for _ in range(TRIES):
        # Half of them in the first and last kilobyte: headers and directories.
        places = [range(len(content)), range(min(1024, len(content))), range(max(0, len(content) - 1024), len(content))]
        byte, bit = chosen.choice(places[chosen.choice((0, 0, 1, 2))]), chosen.randrange(8)
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :])
        found = not verify([path])
        try:
            same = np.array_equal(whole, read(path)) if isinstance(whole, np.ndarray) else not differ(whole, read(path))
        except InputError as error:
            assert "\n" not in str(error)
            results["found"] += 1
        else:
            results["harmless" if same or found else "silent"] += 1
    path.write_bytes(content)
    survived = TRIES - (0 if kind in UNCHECKED else results["silent"])
    with capsys.disabled():
        print(f"\n{kind}: {TRIES} tries, {survived} survived {results}")
    assert survived == TRIES


def differ(first, second):
    if isinstance(first, (list, tuple)) and not isinstance(second, str) and any(isinstance(x, np.ndarray) for x in first):
        return any(not np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    return differences(first, second)
