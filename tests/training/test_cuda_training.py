"""The commands on a GPU, on digits: every strategy, resuming, too little memory, encoding, evaluation, samples, a sweep.

Commands that do not need each other run side by side, each a process of its own.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch

from madformer.data.latents import ShardReader, read_manifest
from madformer.evaluation.record import read_points
from madformer.runs.checkpoints import checkpoint_path
from tests.data.vaes import KL, save
from tests.pictures import overrides, write_parquet
from tests.tiny_runs import DIGITS, command, differences, execute, scalars, train_command

pytestmark = pytest.mark.cuda

ACCELERATOR = "cuda"
LAST = 6
SETTINGS = (f"trainer.max_steps={LAST}", "trainer.checkpoint_every=3", "evaluation.preview_every=6", "optimizer.lr=1e-4")
GPU = (f"trainer.accelerator={ACCELERATOR}", "trainer.devices=1")
EAGER = (*SETTINGS, *GPU, "model.compile=false")
FLOAT32 = "trainer.precision=32-true"

RUNS = {
    "as-shipped": (*SETTINGS, *GPU, "trainer.precision=bf16-mixed", "model.width=32", "model.activation_checkpointing=true"),
    "cpu": (*SETTINGS, "trainer.accelerator=cpu", FLOAT32),
    "plain": (*EAGER, FLOAT32),
    "ddp": (*EAGER, FLOAT32, "trainer.strategy=ddp"),
    "fsdp": (*EAGER, FLOAT32, "trainer.strategy=fsdp"),
    "bf16": (*EAGER, "trainer.precision=bf16-mixed"),
    "bf16-ddp": (*EAGER, "trainer.precision=bf16-mixed", "trainer.strategy=ddp"),
    "bf16-fsdp": (*EAGER, "trainer.precision=bf16-mixed", "trainer.strategy=fsdp"),
    "deterministic": (*EAGER, "trainer.precision=bf16-mixed", "trainer.deterministic=true"),
}
"""As shipped: compiled layers and FlexAttention, if the configuration's own choice on a GPU is so."""

SWEEP = f"""
name: small
experiment: {DIGITS}
overrides: {{trainer.max_steps: 6, trainer.accelerator: {ACCELERATOR}, evaluation.num_samples: 16, evaluation.held_out_split: null}}
grid: {{model.diffusion_depth: [2, 4]}}
evaluate: {{nfe: [16]}}
workers: 2
"""

OUT_OF_MEMORY = """
import sys, torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(64 * 2**20 / total)
from madformer.cli import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def started(folder):
    """Commands by name, running: `result()` waits, and raises if the exit status is not zero."""
    (folder / "sweep.yaml").write_text(SWEEP)
    commands = {name: train_command(folder / name, *settings) for name, settings in RUNS.items()}
    commands["sweep"] = command("sweep", "run", folder / "sweep.yaml", f"output_dir={folder}")
    with ThreadPoolExecutor(max_workers=5) as pool:
        yield {name: pool.submit(execute, argv, timeout=600) for name, argv in commands.items()}


@pytest.fixture
def run_of(started, folder):
    """The folder of a run, once it is trained."""

    def wait(name):
        started[name].result()
        return folder / name / "digits"

    return wait


def loaded(run, step=LAST):
    return torch.load(checkpoint_path(run, step), weights_only=True)


@pytest.mark.parametrize(
    ("name", "like", "tolerance"),
    [
        ("plain", "cpu", 5e-3),  # TF32 in convolutions
        ("ddp", "plain", 1e-3),  # one device: a mean over one; but each process chooses its convolutions by their speed
        ("fsdp", "plain", 1e-3),  # weights in shards: other kernels, other orders of sums
        ("bf16", "plain", 5e-2),  # 8 bits
        ("bf16-ddp", "bf16", 1e-3),
        ("bf16-fsdp", "bf16", 5e-2),
    ],
)
def test_losses_are_alike(name, like, tolerance, run_of):
    found, expected = scalars(run_of(name)), scalars(run_of(like))
    for tag in ("loss/total", "gradient_norm"):
        assert [step for step, _ in found[tag]] == [step for step, _ in expected[tag]] == [2, 4, 6]
        for (_, a), (_, b) in zip(found[tag], expected[tag], strict=True):
            assert a == pytest.approx(b, rel=tolerance), tag
    average, other = loaded(run_of(name))["ema"], loaded(run_of(like))["ema"]
    assert average.keys() == other.keys() and all(tensor.isfinite().all() for tensor in average.values())


def test_the_configurations_own_choices_train(run_of):
    losses = [loss for _, loss in scalars(run_of("as-shipped"))["loss/total"]]
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)


def test_resumed_is_uninterrupted_bit_for_bit(run_of):
    """With deterministic algorithms, in bfloat16."""
    run = run_of("deterministic")
    whole, curves = loaded(run), scalars(run)
    checkpoint_path(run, LAST).unlink()
    again = train_command(run.parent, *RUNS["deterministic"])
    assert f"resuming after step 3 of {LAST}" in execute(again)
    for part in ("state_dict", "ema", "optimizer_states"):
        assert differences(whole[part], loaded(run)[part]) == [], part
    assert scalars(run) == curves


def test_too_little_memory_is_one_line(tmp_path):
    arguments = train_command(tmp_path, *EAGER, "data.batch_size=1024", "model.width=256")[3:]
    printed = execute([sys.executable, "-c", OUT_OF_MEMORY, *arguments], status=1)
    assert "out of memory: " in printed and "lower data.batch_size_per_device" in printed
    assert "Traceback" not in printed


def test_encoding_is_that_of_the_cpu(tmp_path):
    save(diffusers.AutoencoderKL, tmp_path / "vae", **KL)
    write_parquet(tmp_path / "pictures.parquet", rows=9)
    more = ("model.latent_channels=4", "data.codec_dtype=float32")
    means = []
    for accelerator in (ACCELERATOR, "cpu"):
        latents = tmp_path / accelerator
        settings = overrides(tmp_path, codec=f"vae:{tmp_path / 'vae'}", latents=latents)
        execute(command("encode", DIGITS, *settings, *more, f"trainer.accelerator={accelerator}"))
        reader = ShardReader(latents, read_manifest(latents))
        means.append(torch.from_numpy(reader.read("mean", np.arange(len(reader)))).float())
    assert means[0].shape == means[1].shape == (9, 4, 8, 8)
    assert (means[0] - means[1]).norm() < 1e-2 * means[1].norm(), "kept in float16; TF32 in convolutions"


def test_evaluation_and_samples(run_of, tmp_path):
    run = run_of("plain")
    execute(command("evaluate", run, "--nfe", "5"))
    execute(command("evaluate", run, "trainer.accelerator=cpu", "--nfe", "5", "--seeds", "0,1"))
    points = read_points(run)
    assert {point["device"] == "cpu" for point in points} == {False, True}
    assert all(value == value for point in points for value in point["metrics"].values())
    execute(command("sample", run, "--num", "4", "--nfe", "5", "--out", tmp_path / "samples"))
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 4


def test_a_sweep_of_two_cells(started, folder):
    printed = started["sweep"].result()
    assert "table and curves" in printed
    points = [json.loads(path.read_text().splitlines()[0]) for path in folder.glob("small/*/evaluations.jsonl")]
    assert len(points) == 2 and all(point["device"] != "cpu" for point in points)
