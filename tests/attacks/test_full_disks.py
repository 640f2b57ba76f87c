"""Disks that fill up at every size. SLOW=1 runs it, as root; each attack prints its tries and how many were survived."""

import os
import shutil
import subprocess

import pytest

from madformer.config.identity import to_yaml
from tests.pictures import experiment, write_parquet
from tests.tiny_runs import command, perform, train_command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount the small file system that fills up"),
]

SIZE = 64 * 2**20


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def attack(capsys, disk, what, argv, sizes):
    """Run a command with so many bytes free, then, with room, again."""
    survived = 0
    for free in sizes:
        filling = disk / "filling"
        filling.write_bytes(bytes(shutil.disk_usage(disk).free - free))
        printed = perform(argv, status=1)
        fine = "No space left on device" in printed and "Traceback" not in printed
        survived += fine and not list(disk.rglob("*.tmp"))
        filling.unlink()
    printed = perform(argv)
    with capsys.disabled():
        print(f"\nfull disks, {what}: {len(sizes)} tries, {survived} survived")
    assert survived == len(sizes) and "Traceback" not in printed


def test_train_and_evaluate(disk, tmp_path, capsys):
    attack(capsys, disk, "train", train_command(disk), (0, 20_000, 200_000, 700_000))
    argv = command("evaluate", disk / "digits", f"evaluation.references={disk / 'references'}")
    attack(capsys, disk, "evaluate", argv, (0, 4_000))


def test_encode(disk, tmp_path, capsys):
    write_parquet(tmp_path / "pictures.parquet", rows=21)
    file = tmp_path / "experiment.yaml"
    file.write_text(to_yaml(experiment(tmp_path, latents=disk / "latents")))
    attack(capsys, disk, "encode", command("encode", file), (0, 2_000, 8_000))
