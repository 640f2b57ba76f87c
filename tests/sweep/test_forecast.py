"""The forecast of the joint cost of several sweeps."""

import re

import pytest

from madformer.errors import InputError
from madformer.sweep.forecast import CPU_CORE
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.status import print_plan, print_suite
from tests.conftest import ROOT
from tests.tiny_runs import command, perform

DEPTHS = f"experiment: {ROOT}/experiments/digits.yaml\ngrid: {{model.diffusion_depth: [2, 4]}}\nevaluate: {{nfe: [16, 32]}}\n"
SEARCH = f"experiment: {ROOT}/experiments/digits.yaml\nsearch: {{space: {{optimizer.lr: [0.1, 0.2]}}, nfe: [16], trials: 2}}\n"
ON_GPU = "overrides: {trainer.accelerator: auto}\n"
GPU = DEPTHS + ON_GPU
LARGE = f"experiment: {ROOT}/experiments/ffhq1024.yaml\ngrid: {{model.diffusion_depth: [7]}}\n"


def sweeps(root, **texts):
    made = []
    for name, text in texts.items():
        (root / f"{name}.yaml").write_text(text)
        made.append(load_sweep(root / f"{name}.yaml", [f"output_dir={root}"]))
    return made


def hours(line):
    return float(line.rstrip(" │").rpartition(" ")[2].replace(",", ""))


def flops(line):
    """Of evaluation."""
    number, *unit = line.split("│")[6].split()
    return float(number) * {"": 1, "G": 1e9, "T": 1e12}["".join(unit)]


def test_what_sweeps_share_counts_once(tmp_path):
    more = DEPTHS.replace("[16, 32]", "[16, 64]").replace("[2, 4]", "[4, 8]")
    sweeps(tmp_path, one=DEPTHS, two=DEPTHS, more=more)
    files = [tmp_path / f"{name}.yaml" for name in ("one", "two", "more")]
    printed = perform(command("sweep", "plan", *files, f"output_dir={tmp_path}", "--mfu", "0.1"))
    title, heading, _, one, two, more, together, basis = printed.splitlines()
    assert title == "3 sweeps" and "CPU-hours" in heading and "an MFU of 10%" in basis
    counts = [[word.strip() for word in line.split("│")[2:5]] for line in (one, two, more, together)]
    assert counts == [["2", "2", "318 k"], ["2", "0", ""], ["2", "1", "318 k"], ["6", "3", "318 k"]]
    assert hours(two) == 0 and hours(together) == pytest.approx(hours(one) + hours(more), rel=0.01)


@pytest.mark.parametrize(
    ("ending", "share"),
    [
        ("}\noverrides: {evaluation.num_samples: 50_000}", 1),
        ("}\noverrides: {evaluation.feature_networks: [inception]}", 1),
        ("}\noverrides: {evaluation.batch_size: 1}", 0),
        (", samplers: [ddim, unipc]}", 1 / 2),
        (", guidance: [1], seeds: [1, 0], checkpoints: last3}", 5 / 6),
    ],
    ids=["samples", "networks", "batch", "samplers", "ways"],
)
def test_evaluations_are_shared_one_by_one(tmp_path, capsys, ending, share):
    one, more = sweeps(tmp_path, one=DEPTHS, more=DEPTHS.removesuffix("}\n") + ending)
    print_suite([more, more])
    print_suite([one, more])
    lines = capsys.readouterr().out.splitlines()
    alone, again, added = (line for line in lines if line.startswith("│ more"))
    assert flops(alone) > 0 and flops(again) == hours(again) == 0
    assert flops(added) == pytest.approx(share * flops(alone), rel=0.01)
    assert hours(added) == pytest.approx(flops(added) / CPU_CORE.flops_per_second / 3600, rel=0.01)


def test_searches_and_other_devices_are_planned_alone(tmp_path):
    with pytest.raises(InputError, match="two is a search"):
        print_suite(sweeps(tmp_path, one=DEPTHS, two=SEARCH))
    with pytest.raises(InputError, match=re.escape("some of the sweeps count CPU-hours and some GPU-hours")):
        print_suite(sweeps(tmp_path, one=DEPTHS, large=LARGE))
    assert "a=1: name a SWEEP.yaml before overrides" in perform(command("sweep", "plan", "a=1"), status=2)


def test_how_many_trials_could_share_a_gpu_is_told(tmp_path, capsys):
    """A trial needs 1 GiB of reserve and little else."""
    [sweep, shared, search] = sweeps(
        tmp_path, one=GPU, shared=f"{GPU}trials_per_device: 4\n", search=f"{SEARCH}{ON_GPU}trials_per_device: 4\n"
    )

    def plan(*arguments):
        print_plan(*arguments)
        return capsys.readouterr().out

    advice = "72 trials would fit one device (1.1 GiB each of 80.0 GiB, an estimate): trials_per_device: 72 at most"
    text = plan(sweep)
    assert f"\n{advice}; such a GPU is assumed, set --memory\n" in text and "trial-hours" not in text
    text = plan(shared, None, None, 3.5)
    assert "trials_per_device = 4 is refused: 3 trials would fit one device (1.1 GiB each of 3.5 GiB, an estimate)\n" in text
    [hours] = re.findall(r"([\d.e-]+) trial-hours, of which", text)
    [total, least] = re.findall(r"4 trials share a GPU: (.*) trial-hours take (.*) GPU-hours or more.", text)[0]
    assert total == hours and float(least) == pytest.approx(float(hours) / 4, rel=0.01)
    assert "1 trial would fit one device (1.1 GiB each of 1.5 GiB, an estimate)\n" in plan(sweep, None, None, 1.5)
    text = plan(search, None, None, 8)
    assert "7 trials would fit one device" in text and "4 trials share a GPU" in text


def test_sampling_with_large_batches_counts_too(tmp_path, capsys):
    [sweep] = sweeps(tmp_path, one=GPU.replace("auto", "auto, evaluation.batch_size: 100_000"))
    print_plan(sweep, memory_gib=80)
    [needed] = re.findall(r"would fit one device \((.*) GiB each", capsys.readouterr().out)
    assert 10 < float(needed) < 40


def test_what_does_not_fit_is_told_with_what_does(tmp_path, capsys):
    both = LARGE.replace("[7]", "[7, 14]") + "devices_per_trial: 8\noverrides: {data.batch_size_per_device: null}\n"
    [sweep] = sweeps(tmp_path, large=both)
    print_plan(sweep)
    printed = capsys.readouterr().out
    assert "memory" in printed and "refused" not in printed
    needed = [line.split("│")[3].strip() for line in printed.splitlines() if line.startswith("│ d")]
    for plan, name in (
        (print_plan, ""),
        (lambda sweep, memory_gib: print_suite([sweep, sweep], memory_gib=memory_gib), "large/"),
    ):
        for gib, verdict in ((80, "refused"), (170, "may not fit")):
            plan(sweep, memory_gib=gib)
            [line] = [line for line in capsys.readouterr().out.splitlines() if verdict in line]
            assert line.startswith(f"{name}d7-s0, {name}d14-s0: {verdict}: data.batch_size_per_device = null: 8 images")
            assert f"up to {needed[0]} on each device (an estimate), a device has {gib} GiB: set data.batch" in line
        plan(sweep, memory_gib=1000)
        assert "All cells fit into 1000 GiB, by an estimate." in capsys.readouterr().out
