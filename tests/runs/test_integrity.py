"""A flipped bit, a cut and a kill are found wherever they strike, and cost no more than is promised."""

import json
import os
import random
import re
import shutil
import sqlite3
import time
import zipfile

import numpy as np
import pytest
import torch

from madformer.config import read_config_hash, write_config
from madformer.data.latents import ShardReader, read_manifest, read_shards
from madformer.errors import DataError, InputError
from madformer.evaluation.feature_cache import INDICES, read_indices, write_part
from madformer.report.verify import verify
from madformer.runs.checkpoints import (
    KnownRuns,
    checkpoint_path,
    find_flaw,
    load_checkpoint,
    newest_intact,
    read_checksum,
    save_checkpoint,
)
from madformer.runs.files import atomic_write, claim_folder, link_or_copy, read_previews, remove_stale
from tests.data.test_latents import fill
from tests.tiny_runs import command, perform, tiny_run, train_command


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


# Latents


@pytest.mark.parametrize("column", ["mean", "deviation_flipped"])
def test_a_flipped_bit_of_a_shard_is_found_before_its_rows_are_used(column, tmp_path):
    expected = fill(tmp_path)
    manifest, path = read_manifest(tmp_path), tmp_path / "shard-000002-000000.arrow"
    content, messages = path.read_bytes(), set()
    for bit in random.Random(1).sample(range(8 * len(content)), 60):
        flip(path, bit)
        with pytest.raises(DataError, match=re.escape(str(path))) as caught:
            reader = ShardReader(tmp_path, manifest)
            assert np.array_equal(reader.read(column, np.arange(5)), expected[column][:5]), "other shards are whole"
            reader.read(column, np.array([3, 7]))
        messages.add(str(caught.value).removeprefix(f"{path}: ").partition(":")[0])
        path.write_bytes(content)
    assert messages <= {"torn", "not a shard"} and "torn" in messages
    reader = ShardReader(tmp_path, manifest)
    assert np.array_equal(reader.read(column, np.array([11])), expected[column][11:])
    flip(path, 8 * len(content) // 2)
    reader.read(column, np.array([11]))  # once in a process


@pytest.mark.parametrize("name", ["manifest.json", "encoding.json", "shard-000000-000000.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("5", "7", 1),
        lambda text: text.replace('"', "\xff", 1),
        lambda text: "[" * 100_000,
        lambda text: text[:-20],
        lambda text: json.dumps({**json.loads(text), "rows_per_shard": "8", "rows": [5], "name": None, "checksum": None}),
        lambda text: json.dumps({key: value for key, value in list(json.loads(text).items())[2:] if key != "checksum"}),
        lambda text: json.dumps([text]),
        lambda text: "",
    ],
    ids=["digit", "no UTF-8", "depth", "cut", "types", "keys", "list", "empty"],
)
def test_a_broken_description_of_latents_is_one_line(damage, name, tmp_path, caplog, capsys):
    fill(tmp_path)
    damaged = damage((tmp_path / name).read_text())
    (tmp_path / name).write_bytes(damaged.encode("latin-1"))
    if name == "manifest.json":
        with pytest.raises(InputError) as caught:
            read_manifest(tmp_path)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    elif name != "encoding.json":
        assert "shard-000000-000000" not in read_shards(tmp_path) and len(caplog.records) == 1
    assert not verify([tmp_path]) and f"{tmp_path / name}: broken: " in capsys.readouterr().out


def test_latents_without_checksums_are_read(tmp_path, capsys):
    expected = fill(tmp_path)
    for path in tmp_path.glob("*.json"):
        content = json.loads(path.read_text())
        for key in ("checksum", "checksums", "xxh3"):
            content.pop(key, None)
        path.write_text(json.dumps(content))
    reader = ShardReader(tmp_path, read_manifest(tmp_path))
    assert np.array_equal(reader.read("mean", np.arange(12)), expected["mean"])
    assert verify([tmp_path]) and "no checksum: 2 shards" in capsys.readouterr().out
    flip(tmp_path / "shard-000000-000000.arrow", 9000)
    assert not verify([tmp_path]), "their SHA-256 is older"


# Features


def test_a_flipped_bit_of_a_part_of_features_costs_its_samples(tmp_path):
    for first in (0, 4, 8):
        write_part(tmp_path, {INDICES: torch.arange(first, first + 4), "features": torch.randn(4, 3)})
    parts = sorted(tmp_path.glob("part-*"))
    for part, byte in zip(parts[:2], (-3, 60), strict=True):
        flip(part, 8 * (part.stat().st_size + byte) if byte < 0 else 8 * byte)
    assert not verify([tmp_path]) and len(list(tmp_path.glob("part-*"))) == 3, "it only looks"
    assert read_indices(tmp_path) == {8, 9, 10, 11} and len(list(tmp_path.glob("part-*"))) == 1


# Killed processes


def test_stale_files_are_removed_and_those_of_others_are_not(tmp_path):
    names = [".step-00000006.ckpt.0a1b2c3d.tmp", ".step-00000012.ckpt.ffffffff.tmp", ".config.yaml.00000000.tmp", "notes.tmp"]
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / names[1], (time.time() - 7200,) * 2)
    remove_stale(tmp_path, seconds=3600)
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {names[1]}
    remove_stale(tmp_path, "step-*")
    assert {path.name for path in tmp_path.iterdir()} == {names[2], names[3]}


# Runs, references, studies


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    perform(train_command(folder, f"evaluation.references={folder / 'references'}"))
    perform(command("evaluate", folder / "digits", f"evaluation.references={folder / 'references'}"))
    return folder


def state_of(folder):
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_verify_finds_what_is_broken_and_writes_nothing(evaluated, tmp_path):
    folder = shutil.copytree(evaluated, tmp_path / "all")
    run, [reference] = folder / "digits", folder.glob("references/*.safetensors")
    before = state_of(folder)
    printed = perform(command("verify", folder, run, reference))
    assert "whole: 1 configurations, 4 checkpoints, 1 references" in printed and "no checksum: 1 records, 2 logs" in printed
    assert state_of(folder) == before and "broken" not in printed
    (run / "checkpoints/.step-00000030.ckpt.00000000.tmp").touch()  # no flaw
    damages = {
        checkpoint_path(run, 12): lambda content: content[: len(content) // 2],
        checkpoint_path(run, 24): lambda content: content[:-30] + bytes([content[-30] ^ 4]) + content[-29:],
        run / "config.yaml": lambda content: content.replace(b"seed: 0", b"seed: 8", 1),
        run / "evaluations.jsonl": lambda content: content.replace(b'"nfe"', b'"nfa"', 1),
        run / "progress.json": lambda content: content[:-1] + b"\xff",
        reference: lambda content: content[:-9] + bytes([content[-9] ^ 64]) + content[-8:],
    }
    for path, damage in damages.items():
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        printed = perform(command("verify", folder), status=1)
        assert printed.count("broken") == 2 and f"  {path}: broken: " in printed, path
        assert path in (run / "config.yaml", run / "progress.json") or perform(command("verify", path), status=1)
        path.write_bytes(whole)
    assert perform(command("verify", tmp_path / "gone"), status=2).endswith("no such file or folder\n")
    (tmp_path / "empty").mkdir()
    assert "nothing to verify" in perform(command("verify", tmp_path / "empty"), status=2)


def test_a_torn_reference_is_refused(evaluated, tmp_path):
    from madformer.evaluation.reference import load_reference

    [path] = evaluated.glob("references/*.safetensors")
    copy = tmp_path / path.name
    for bit in (8 * 30, 8 * 200 + 1, -8 * 3):
        shutil.copyfile(path, copy)
        flip(copy, bit % (8 * copy.stat().st_size))
        with pytest.raises(InputError, match="if it is deleted, it is computed again") as caught:
            load_reference(copy)
        assert "\n" not in str(caught.value)


def test_verify_checks_the_structure_of_a_study(tmp_path, capsys):
    path = tmp_path / "study.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE trials (name TEXT UNIQUE)")
        connection.executemany("INSERT INTO trials VALUES (?)", [(f"{number:0100d}",) for number in range(500)])
    connection.close()
    content = path.read_bytes()
    assert verify([tmp_path]) and list(tmp_path.iterdir()) == [path]
    for damaged in (content[:5000], content[:4096] + bytes(4096) + content[8192:], b"\0" + content[1:], b""):
        path.write_bytes(damaged)
        assert not verify([tmp_path]) and "delete it: what is done is read from the runs" in capsys.readouterr().out


def test_a_study_is_whole_together_with_its_log(tmp_path):
    for mode in ("wal", "delete"):
        path = tmp_path / mode / "study.db"
        path.parent.mkdir()
        writer = sqlite3.connect(path, isolation_level=None)
        writer.executescript(f"PRAGMA journal_mode={mode}; PRAGMA wal_autocheckpoint=0; PRAGMA cache_size=2")
        writer.executescript("CREATE TABLE trials (number INTEGER, name TEXT); CREATE INDEX names ON trials (name)")
        rows = [(number, os.urandom(100).hex()) for number in range(600)]
        for row in rows[:500]:
            writer.execute("INSERT INTO trials VALUES (?, ?)", row)
        reader = sqlite3.connect(path, isolation_level=None)
        if mode == "wal":
            reader.execute("BEGIN").execute("SELECT count(*) FROM trials").fetchall()
        else:
            writer.execute("BEGIN IMMEDIATE")
        for row in rows[500:]:
            writer.execute("INSERT INTO trials VALUES (?, ?)", row)
        if mode == "wal":
            writer.execute("PRAGMA wal_checkpoint(PASSIVE)")  # copies a part: the reader needs the rest as it is
        content = {each: each.read_bytes() for each in path.parent.iterdir()}
        assert verify([path]) and content == {each: each.read_bytes() for each in path.parent.iterdir()}
        reader.close()
        writer.close()


def test_the_mode_of_a_linked_file_stays(tmp_path):
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    trunk.write_text("weights")
    trunk.chmod(0o664)
    with atomic_write(branch) as temporary:
        link_or_copy(trunk, temporary)
    assert trunk.stat().st_mode & 0o777 == 0o664


def test_a_known_run_is_found_while_its_files_change(tmp_path):
    run = tmp_path / "sweep" / "run"
    write_config(tiny_run(run.parent), run)
    (run / "gone").symlink_to(tmp_path / "nowhere")  # as a temporary file that was there a moment ago
    assert KnownRuns(tmp_path).find(read_config_hash(run)) == run


def test_a_claim_that_fails_leaves_that_of_the_other(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with claim_folder(folder, "train"):
        answers = iter([False])  # both began before there was a folder
        monkeypatch.setattr(type(folder), "is_dir", lambda path: next(answers, True))
        with pytest.raises(InputError, match="in use by another process"), claim_folder(folder, "train"):
            pass
        assert (folder / ".train.lock").is_file()
    assert not folder.exists()


def test_broken_lines_of_previews_are_left_out(tmp_path):
    whole = {"step": 6, "metrics": {"fd_digits": 1.5}}
    lines = [json.dumps(whole).encode(), b'{"step": 7}', b"[8]", b"\xff\xfe", b'{"step": "9", "metrics": {}}', b'{"step": 1']
    (tmp_path / "previews.jsonl").write_bytes(b"\n".join(lines))
    assert read_previews(tmp_path) == [whole]
