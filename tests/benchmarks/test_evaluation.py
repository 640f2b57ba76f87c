"""The benchmark of an evaluation's phases at a tiny size: everything but the clock."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import evaluation
from benchmarks.evaluation import FULL, INCEPTION_GFLOPS, QUICK, prepare
from benchmarks.measure import count_flops
from madformer.config import ModelConfig
from madformer.evaluation.feature_cache import INDICES, PHASES, read_parts
from madformer.evaluation.neighbours import compare_pairs, pairs_within
from madformer.model import MADFormer

pytestmark = pytest.mark.slow

TINY = ["--quick", "--nfe", "5"]
ROW = re.compile(r"^(sampling|decoding|features|statistics) +(\S+) +(\S+)%$", re.MULTILINE)
VERDICT = re.compile(r"^all but sampling, with (.+): (\S+) \(goal: at most 0.15, (reached|NOT reached)\)$", re.MULTILINE)


def run(capsys, *arguments):
    evaluation.main([*TINY, *arguments])
    return capsys.readouterr().out


def check_tables(printed):
    """For each network, four phases whose shares are those of their seconds, sum to one, and have a verdict."""
    names = [network.name for network in QUICK.networks]
    rows, verdicts = ROW.findall(printed), VERDICT.findall(printed)
    assert [name for name, *_ in verdicts] == names
    for number, (_, rest, verdict) in enumerate(verdicts):
        table = rows[4 * number : 4 * number + 4]
        assert [phase for phase, *_ in table] == [*PHASES, "statistics"]
        seconds, shares = ([float(row[column].replace(",", "")) for row in table] for column in (1, 2))
        assert min(seconds) > 0
        assert sum(shares) == pytest.approx(100, abs=0.03)
        assert shares == pytest.approx([100 * each / sum(seconds) for each in seconds], abs=0.1)
        assert float(rest) == pytest.approx(1 - shares[0] / 100, abs=1e-3)
        assert verdict == ("reached" if float(rest) <= 0.15 else "NOT reached")
    for network in QUICK.networks:
        line = f"{network.name}: {network.side} x {network.side}, random weights, {network.gflops:.3g} GFLOPs an image, 16 features"
        assert line in printed
    assert printed.count("its reference, once for all runs") == 2
    assert "pairs of 64 x 128 features, scaled to 8,000 x 8,000, and the Fréchet distance at full size" in printed


@pytest.mark.parametrize(("size", "nfe"), [(QUICK, 3), (QUICK, 21), (FULL, 280)])
def test_the_parts_of_sampling_are_all_of_it(size, nfe, tmp_path):
    bench = prepare(size, nfe, batch=1, images=0, device="meta", folder=str(tmp_path))
    with torch.device("meta"):
        model = MADFormer(bench.config.model)
    flops = dict.fromkeys(("AR stage", "denoising"), 0)
    with torch.no_grad():
        for part in evaluation.sampling_parts(bench, model):
            flops[part.stage] += part.times * count_flops(part.run)
    assert flops == evaluation.sampling_flops(bench)


def test_what_is_sampled_at_full_size(tmp_path):
    bench = prepare(FULL, 280, batch=1, images=0, device="cpu", folder=str(tmp_path))
    assert (bench.config.model, bench.budget.steps, bench.count) == (ModelConfig(), 19, 8000)
    assert (bench.side, FULL.channels) == (1024, (128, 256, 512, 512))
    first = FULL.networks[0]
    assert first.config.hidden_sizes[-1] == 2048
    assert first.gflops >= INCEPTION_GFLOPS, "it may not be cheaper than what it stands for"


def test_parts_are_timed_and_scaled(capsys):
    printed = run(capsys)
    assert printed.startswith("torch ") and "NFE 5 = 2 steps, batch 1, load" in printed
    assert (
        "sampling: NOT run, scaled from one start of the AR stage and one denoising step, in block 0 and in block 2" in printed
    )
    assert "to 4 starts and 4 x 2 steps" in printed
    stages = re.findall(r"^(AR stage|denoising) +(\S+) ", printed, re.MULTILINE)
    check_tables(printed)
    an_image = sum(float(seconds) for _, seconds in stages)
    sampling = [float(seconds.replace(",", "")) for phase, seconds, _ in ROW.findall(printed) if phase == "sampling"]
    assert sampling == pytest.approx([8000 * an_image] * 2, rel=1e-2)


def test_an_evaluation_runs_as_a_whole(capsys):
    printed = run(capsys, "--images", "3", "--batch", "2")
    assert printed.count("sampling: run, 1 images after a first batch that does not count") == len(QUICK.networks)
    assert "NOT run" not in printed
    check_tables(printed)


def test_the_first_batch_of_a_run_does_not_count(tmp_path):
    bench = prepare(QUICK, 3, batch=2, images=5, device="cpu", folder=str(tmp_path))
    model, codec, (entry, _) = MADFormer(bench.config.model), evaluation.open_codec(bench), evaluation.named_networks(bench)
    phases = evaluation.evaluate(bench, model, codec, entry.network)
    (folder,) = (bench.config.run_dir / "features").iterdir()
    (part,) = read_parts(folder)
    assert part[INDICES].tolist() == list(range(5))
    assert phases == {phase: pytest.approx(float(part[phase][1:].sum()) / 3) for phase in PHASES}


def test_pairs_are_scaled_by_what_they_cost():
    def flops(n, m):
        reference_MD = torch.randn(m, 8)
        with FlopCounterMode(display=False) as counter:
            within = pairs_within(reference_MD, block=1)
            compare_pairs(torch.randn(n, 8), reference_MD, within, block=1)
        return counter.get_total_flops()

    scaled = evaluation.pair_operations(32, 24) / evaluation.pair_operations(16, 4)
    assert flops(32, 24) / flops(16, 4) == pytest.approx(scaled, rel=0.05)


def test_a_photograph_has_as_many_bytes_as_ffhqs():
    content = evaluation.photograph(1024)
    assert 1.0e6 < len(content) < 1.6e6
    assert evaluation.load_square(content, 1024).shape == (3, 1024, 1024)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--images", "2", "--batch", "2"], "--images 2: must be more than one batch, --batch 2: the first one does not count"),
        (["--batch", "0"], "must be at least 1"),
        (["--nfe", "2"], "evaluation.nfe = 2: "),
    ],
)
def test_mistakes_are_one_line(mistake, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([*TINY, *mistake])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
