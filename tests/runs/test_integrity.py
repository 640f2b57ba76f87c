"""A flipped bit, a cut and a kill are found wherever they strike, and cost no more than is promised."""

import random
import re
import zipfile

import pytest
import torch

from madformer.errors import InputError
from madformer.runs.checkpoints import (
    checkpoint_path,
    find_flaw,
    load_checkpoint,
    newest_intact,
    read_checksum,
    save_checkpoint,
)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "run/checkpoints/step-00000006.ckpt"
    content = {"state_dict": {f"model.w{number}": torch.randn(5, 7) for number in range(3)}, "ema": {"w": torch.randn(3)}}
    save_checkpoint(content, path)
    return path


def test_any_flipped_bit_of_a_checkpoint_is_found(checkpoint):
    """In tensors, headers, padding, the directory at the end, and the checksum itself, but for its name."""
    content = checkpoint.read_bytes()
    name = content.rindex(b"madformer xxh3")
    assert find_flaw(checkpoint) is None and re.fullmatch("[0-9a-f]{32}", read_checksum(checkpoint))
    chosen = random.Random(0).sample(range(len(content) - 600), 300)
    for byte in [*chosen, *range(len(content) - 600, len(content))]:
        if name <= byte < name + 15:
            continue
        checkpoint.write_bytes(content[:byte] + bytes([content[byte] ^ 1 << byte % 8]) + content[byte + 1 :])
        assert find_flaw(checkpoint), byte


def test_a_checkpoint_whose_checksum_lost_its_name_counts_as_an_old_one(checkpoint):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content.replace(b"madformer xxh3", b"madformer xxh2"))
    assert read_checksum(checkpoint) is None and find_flaw(checkpoint) is None
    assert torch.load(checkpoint, weights_only=True, mmap=True).keys() == {"state_dict", "ema"}


def test_a_checkpoint_without_a_checksum_never_ends_in_a_traceback(tmp_path):
    """As older versions wrote them: what zipfile or torch raises of a broken directory is a reason, not an error."""
    run = tmp_path / "run"
    path = checkpoint_path(run, 6)
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {"model.w": torch.randn(9)}, "ema": {"w": torch.randn(3)}}, path)
    content, found = path.read_bytes(), 0
    assert read_checksum(path) is None and find_flaw(path) is None
    for byte in range(content.index(b"PK\1\2"), len(content)):
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 128]) + content[byte + 1 :])
        found += find_flaw(path) is not None
        newest_intact(run, checksums=False)
        try:
            load_checkpoint(path)
        except InputError as error:
            assert "\n" not in str(error)
    assert found > 100


def test_a_checkpoint_is_still_a_zip_archive_that_torch_reads(checkpoint):
    with zipfile.ZipFile(checkpoint) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"madformer xxh3 ")
    assert set(load_checkpoint(checkpoint)) == {"state_dict", "ema"}
