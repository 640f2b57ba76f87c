"""An evaluation is a function of weights and request: not of batches, processes or interruptions, nor of what ran before."""

import dataclasses
import json
import shlex
import shutil
import sys

import pytest
import torch

from madformer.cli import app
from madformer.config import load_run, write_config
from madformer.data.sources import load_digits
from madformer.errors import ConfigError, InputError, NonFiniteError
from madformer.evaluation import evaluate as module
from madformer.evaluation.evaluate import evaluate, evaluate_share, prepare
from madformer.evaluation.feature_networks import build_feature_network
from madformer.evaluation.measurement import Sampling
from madformer.evaluation.metrics import FrechetDistance, Moments
from madformer.evaluation.record import read_diagnostics, read_means, read_points, record_path
from madformer.evaluation.request import parse_request, parse_sampling
from madformer.evaluation.sampling import sample_batches
from madformer.model import MADFormer, cost
from madformer.parallel import Share
from madformer.runs.checkpoints import EMA, checkpoint_path
from tests.pictures import CODEC, experiment, write_parquet
from tests.tiny_runs import command, execute, perform, run_until, tiny_run

METRICS = ["fd_digits", "kid_digits", "precision_digits", "recall_digits", "density_digits", "coverage_digits"]


def make_run(folder, *overrides, seed=0, scale=1.0, steps=(6,)):
    """A run with checkpoints of random weights: the average differs from the raw ones."""
    config = tiny_run(folder, *overrides)
    torch.manual_seed(seed)
    for step in steps:
        raw, average = save_random_checkpoint(config, step, scale)
    write_config(config, config.run_dir)
    return config, raw, average


def save_random_checkpoint(config, step=6, scale=1.0):
    raw, average = ({name: scale * tensor for name, tensor in MADFormer(config.model).state_dict().items()} for _ in range(2))
    path = checkpoint_path(config.run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in raw.items()}, EMA: average}, path)
    return raw, average


SPREAD = """
import torch


class Spread(torch.nn.Module):
    num_features = 2

    def forward(self, images):
        return torch.stack([37 * images.mean((1, 2, 3)), 53 * images.std((1, 2, 3))], 1).sin()
"""
"""A feature network that even random weights can please."""


def pleased(folder):
    """Overrides for it: metrics over pairs of a hopeless model are all 0 otherwise."""
    (folder / "spread.py").write_text(SPREAD)
    return f"evaluation.feature_networks=[{folder / 'spread.py'}:Spread]"


def only_metrics(points):
    return [pytest.approx(point["metrics"], rel=1e-5) for point in points]


def budgets(request):
    return [(sampling.nfe, sampling.steps) for sampling in request.samplings]


def tasks_of(request):
    return prepare(request, "cpu", silent=True)[1]


def test_the_number_is_the_distance_of_the_averaged_models_samples(tmp_path):
    config, raw, average = make_run(tmp_path)
    network, expected = build_feature_network("digits"), {}
    for name, weights in (("ema", average), ("model", raw)):
        model = MADFormer(config.model)
        model.load_state_dict(weights)
        distance = FrechetDistance(Moments.of(network(load_digits()[0]).features_BD))
        distance.update(
            network(torch.cat(list(sample_batches(model, config, Sampling.of_steps(config, 2), range(16))))).features_BD
        )
        expected[name] = distance.compute()
    for name in ("ema", "model"):
        [point] = evaluate(parse_request(config, steps="2", weights=name))
        assert point["metrics"]["fd_digits"] == pytest.approx(expected[name], rel=1e-6)
    assert expected["ema"] != pytest.approx(expected["model"], rel=1e-3)


def test_everything_that_made_a_number_stands_beside_it(tmp_path):
    config, *_ = make_run(tmp_path)
    [point] = evaluate(parse_request(config, nfe="6", axes={"sampler": "unipc", "seed": "3"}))
    assert point == json.loads(record_path(config.run_dir).read_text())
    expected = {"kind": "point", "nfe": 6, "nfe_actual": 5, "steps": 2, "checkpoint": "step-00000006.ckpt", "step": 6}
    expected |= {"weights": "ema", "sampler": "unipc", "guidance": 1.0, "num_samples": 16, "seed": 3, "prompts": None}
    expected |= {"batch_size": 16, "processes": 1, "device": "cpu", "threads": 1}
    assert {name: point[name] for name in expected} == expected
    assert list(point["metrics"]) == METRICS
    assert point["codec"]["name"] == "pixels" and len(point["codec"]["sha256"]) == 64
    [network], [reference] = point["feature_networks"], point["references"]
    assert (network["name"], network["label"], network["width"], len(network["sha256"])) == ("digits", "digits", 64, 64)
    assert (reference["source"], reference["images"], len(reference["sha256"])) == ("digits", 1797, 64)
    assert point["tflops_per_image"] == cost.sampling_flops(config.model).total(2) / 1e12
    assert 0 < sum(point["seconds_per_block"]) <= point["seconds_per_image"] and len(point["seconds_per_block"]) == 4
    assert point["seconds"] == point["seconds_spent"]["sampling"] > 0
    assert point["bias"]["fd_digits"] > 0 and point["peak_memory_gib"] is None
    assert not list((config.run_dir / "features").glob("*/part*")), "features have served"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_numbers_do_not_depend_on_the_batch_size(sampler, tmp_path):
    numbers = []
    for size in (1, 7, 64):
        sizes = (f"evaluation.batch_size={size}", "evaluation.num_samples=70", pleased(tmp_path))
        config, *_ = make_run(tmp_path / str(size), *sizes)
        numbers.append(evaluate(parse_request(config, nfe="5", axes={"sampler": sampler}))[0])
    assert all(0 < value < 10 for value in numbers[0]["metrics"].values()) and len(numbers[0]["metrics"]) == 6
    assert [point["batch_size"] for point in numbers] == [1, 7, 64]
    assert [point["metrics"] for point in numbers] == only_metrics(numbers[:1] * 3)


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "-m", "madformer")


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_numbers_do_not_depend_on_the_number_of_processes(torchrun, tmp_path):
    config, *_ = make_run(tmp_path / "one", "evaluation.num_samples=70", pleased(tmp_path))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    expected = evaluate(parse_request(config, nfe="3,5"))
    arguments = ["evaluate", "--nfe", "3,5", str(tmp_path / "two/digits")]
    if torchrun:
        execute([sys.executable, *TORCHRUN, *arguments])
    else:
        perform(command(*arguments, "--devices", 2))
    found = read_points(tmp_path / "two/digits")
    assert [point["metrics"] for point in found] == only_metrics(expected)
    assert {point["processes"] for point in found} == {2}


def test_killed_it_goes_on_with_the_samples_that_it_has(tmp_path):
    overrides = ("evaluation.num_samples=192", "evaluation.batch_size=16", pleased(tmp_path))
    config, *_ = make_run(tmp_path / "killed", *overrides)
    shutil.copytree(tmp_path / "killed", tmp_path / "whole")
    kept = config.run_dir / "features"
    run_until(command("evaluate", config.run_dir, "--steps", 8), lambda: list(kept.glob("*/part-*")), tmp_path / "log")
    [folder] = kept.iterdir()
    had = len(module.read_indices(folder))
    assert 0 < had < 192 and not record_path(config.run_dir).exists()
    request = parse_request(config, steps="8")
    sampled = []
    share = Share(0, 1, "cpu", sampled.append)
    evaluate_share(share, request, tasks_of(request))
    assert sampled[-1] == 192 - had, "no sample is made twice"
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    [expected] = evaluate(parse_request(whole, steps="8"))
    assert [point["metrics"] for point in read_points(config.run_dir)] == only_metrics([expected])


def test_shares_of_processes_that_change_in_number_fit_together(tmp_path):
    """Two of three die; one alone does the rest."""
    config, *_ = make_run(tmp_path / "some", "evaluation.num_samples=40", "evaluation.batch_size=4")
    shutil.copytree(tmp_path / "some", tmp_path / "whole")
    request = parse_request(config, nfe="5")
    for rank in (2, 0):
        evaluate_share(Share(rank, 3, "cpu", lambda _: None), request, tasks_of(request))
    assert not record_path(config.run_dir).exists()
    [point] = evaluate(request)
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    assert [point["metrics"]] == only_metrics(evaluate(parse_request(whole, nfe="5")))


def test_fewer_samples_are_the_first_of_many(tmp_path):
    """One of two processes has done its share of many, and then fewer are wanted: nothing is sampled again."""
    config, *_ = make_run(tmp_path / "some")
    many, few = (parse_request(config, nfe="5", num_samples=count) for count in (60, 20))
    evaluate_share(Share(0, 2, "cpu", lambda _: None), many, tasks_of(many))
    sampled = []
    evaluate_share(Share(0, 1, "cpu", sampled.append), few, tasks_of(few))
    assert sampled[-1] == 10
    whole, *_ = make_run(tmp_path / "whole")
    expected = evaluate(parse_request(whole, nfe="5", num_samples=20))
    assert [point["metrics"] for point in read_points(config.run_dir)] == only_metrics(expected)


def test_budgets_of_as_many_steps_are_the_same_samples(tmp_path, capsys):
    config, *_ = make_run(tmp_path)
    points = evaluate(parse_request(config, nfe="5,6"))
    assert [(point["nfe"], point["steps"]) for point in points] == [(5, 2), (6, 2)]
    assert points[0]["metrics"] == points[1]["metrics"] and points[0]["seconds"] == points[1]["seconds"]
    assert "--nfe 6" in points[1]["command"] and read_points(config.run_dir) == points
    assert "sampled 16/16" in capsys.readouterr().out
    assert evaluate(parse_request(config, nfe="6")) == points[1:] and len(read_points(config.run_dir)) == 2


def test_networks_lie_where_they_lie(tmp_path):
    """A network that has moved is the same; two whose metrics would have one name are refused before anything is paid for."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    names = [pleased(tmp_path / folder) for folder in ("here", "there")]
    config, *_ = make_run(tmp_path, names[0])
    [point] = evaluate(parse_request(config, nfe="5"))
    moved = load_run(config.run_dir, [names[1]])
    assert evaluate(parse_request(moved, nfe="5")) == [point]
    (tmp_path / "a,b").mkdir()
    command = evaluate(parse_request(load_run(config.run_dir, [pleased_in_quotes(tmp_path / "a,b")]), nfe="3"))[0]["command"]
    record_path(config.run_dir).unlink()
    app(shlex.split(command)[1:], standalone_mode=False)
    assert len(read_points(config.run_dir)) == 1
    both = ",".join(name.partition("=[")[2].rstrip("]") for name in names)
    with pytest.raises(ConfigError, match=r"its metrics would be named as those of .*here/spread\.py:Spread'"):
        evaluate(parse_request(load_run(config.run_dir, [f"evaluation.feature_networks=[{both}]"]), nfe="3"))


def pleased_in_quotes(folder):
    pleased(folder)
    return f'evaluation.feature_networks=["{folder / "spread.py"}:Spread"]'


def test_diagnostics_are_of_the_images_asked_for(tmp_path, caplog):
    config, *_ = make_run(tmp_path, "evaluation.num_samples=12")

    def look(*overrides, **options):
        evaluate(parse_request(load_run(config.run_dir, overrides), nfe="5", diagnostics=True, **options))
        return [(line["source"], line["held_out"], line["images"]) for line in read_diagnostics(config.run_dir)]

    assert look() == look() == [("digits, train", False, 12)]
    assert "the run was trained on" in caplog.text
    assert look("evaluation.held_out_split=train[90%:]")[1:] == [("digits, train[90%:]", False, 12)], "a part of training"
    assert look(num_samples=8)[2:] == [("digits, train", False, 8)]
    caplog.clear()
    assert len(look()) == 3 and "the denoiser is worse than returning" in caplog.text, "said again of what is recorded"
    path = record_path(config.run_dir)
    path.write_text(path.read_text().replace('"denoising_error":', '"of another version":'))
    assert look()[3:] == [("digits, train", False, 12)], "what an earlier version did not look at"
    lines = len(read_points(config.run_dir))
    with pytest.raises(ConfigError, match=r"held-out images .*data\.split = 'test': must be train or a slice"):
        look("evaluation.held_out_split=test", num_samples=14)
    assert len(read_points(config.run_dir)) == lines, "a mistake shows before anything is sampled"


def test_a_codec_that_overflows_is_no_number(tmp_path):
    config, *_ = make_run(tmp_path)
    (tmp_path / "overflowing.py").write_text(
        CODEC.replace("latents / self.gain", "latents * float('nan')").replace(".clamp(-1, 1)", "")
    )
    write_parquet(tmp_path / "pictures.parquet", 8)
    config = experiment(tmp_path, pleased(tmp_path), codec=f"{tmp_path / 'overflowing.py'}:Halving")
    save_random_checkpoint(config)
    with pytest.raises(NonFiniteError, match=r"Halving decodes samples to NaN or infinity: set data\.codec_dtype=float32"):
        evaluate(parse_request(config, nfe="5"))


def test_a_number_comes_again_from_its_record_alone(tmp_path, monkeypatch):
    config, *_ = make_run(tmp_path, steps=(6, 12))
    options = {"num_samples": 20, "checkpoints": "6", "weights": "model"}
    evaluate(parse_request(config, nfe="5", axes={"sampler": "ddpm,dpmsolver++", "seed": "5"}, **options))
    before = [json.loads(line) for line in record_path(config.run_dir).read_text().splitlines()]
    record_path(config.run_dir).unlink()
    monkeypatch.chdir(tmp_path)
    for point in before:
        words = shlex.split(point["command"])
        assert words[0] == "madformer"
        app(words[1:], standalone_mode=False)
    after = read_points(config.run_dir)
    assert [point["metrics"] for point in after] == [point["metrics"] for point in before]
    same = ("nfe", "steps", "checkpoint", "weights", "sampler", "seed", "num_samples", "references", "command")
    assert [[point[key] for key in same] for point in after] == [[point[key] for key in same] for point in before]


def test_only_what_is_missing_is_computed(tmp_path, capsys):
    config, *_ = make_run(tmp_path)
    evaluate(parse_request(config, nfe="3"))
    first = record_path(config.run_dir).read_text()
    evaluate(parse_request(config, nfe="3,5"))
    both = record_path(config.run_dir).read_text()
    assert both.startswith(first) and len(both.splitlines()) == 2
    said = [line for line in capsys.readouterr().out.splitlines() if "NFE" in line]
    assert [("recorded before" in line) for line in said] == [False, True, False]
    evaluate(parse_request(config, nfe="3", num_samples=8))
    assert len(record_path(config.run_dir).read_text().splitlines()) == 3
    record_path(config.run_dir).write_text(both[:-20])
    evaluate(parse_request(config, nfe="5"))
    again = [json.loads(line)["metrics"] for line in record_path(config.run_dir).read_text().splitlines()]
    assert again == [json.loads(line)["metrics"] for line in both.splitlines()], "a torn line is measured again"


def test_seeds_and_checkpoints_have_a_mean(tmp_path):
    config, *_ = make_run(tmp_path, steps=(6, 12))
    points = evaluate(parse_request(config, nfe="5", checkpoints="last2", axes={"seed": "0,1,2"}))
    assert len({point["metrics"]["fd_digits"] for point in points}) == 6
    [line] = read_means(config.run_dir)
    values = torch.tensor([point["metrics"]["fd_digits"] for point in points], dtype=torch.float64)
    assert line["metrics"]["fd_digits"] == pytest.approx(values.mean().item())
    assert line["standard_deviations"]["fd_digits"] == pytest.approx(values.std().item())
    assert (line["count"], line["seeds"]) == (6, [0, 1, 2])
    assert line["checkpoints"] == ["step-00000006.ckpt", "step-00000012.ckpt"]
    evaluate(parse_request(config, nfe="5", checkpoints="last2", axes={"seed": "0,1,2"}))
    assert len(read_means(config.run_dir)) == 1


def test_samplers_start_from_the_same_noise_and_end_elsewhere(tmp_path):
    config, *_ = make_run(tmp_path)
    points = evaluate(parse_request(config, nfe="9", axes={"sampler": "ddim,ddpm,dpmsolver++,unipc"}))
    assert len({point["metrics"]["fd_digits"] for point in points}) == 4
    assert {point["nfe_actual"] for point in points} == {9}


def test_spacings_are_curves_of_their_own_and_end_where_they_say(tmp_path):
    config, *_ = make_run(tmp_path, pleased(tmp_path))
    spacings = "uniform,power:1,power:2,logsnr,karras:7,list:999/600/200/50"
    points = evaluate(parse_request(config, steps="4", axes={"spacing": spacings}))
    assert [point["spacing"] for point in points] == ["uniform", "power:2", "logsnr", "karras:7", "list:999/600/200/50"]
    assert [point["last_timestep"] for point in points] == [249, 61, 0, 0, 50]
    assert len({point["metrics"]["fd_spread"] for point in points}) == len({point["nfe_actual"] for point in points}) * 5
    command_of_power = shlex.split(points[1]["command"])
    assert command_of_power[command_of_power.index("--spacing") + 1] == "power:2"
    with pytest.raises(ConfigError, match=r"'list:999/600': its timesteps are 2, evaluation.nfe = 9 makes 4 steps"):
        parse_request(config, steps="4", axes={"spacing": "list:999/600"})


def test_a_guidance_interval_reaches_the_samples(tmp_path):
    text = ["model.text.vocab_size=2048", "model.text.pad_token_id=0", "model.text.length=4", "data.tokenizer=builtin"]
    config, *_ = make_run(tmp_path, pleased(tmp_path), *text)
    axes = {"guidance": "1,4", "guidance_interval": "all,0/400,401/998"}
    points = evaluate(parse_request(config, steps="2", axes=axes))  # at timesteps 999 and 499
    found = {(point["guidance"], point["guidance_interval"]): point["metrics"]["fd_spread"] for point in points}
    assert list(found) == [(1, "all"), (4, "all"), (4, "0/400"), (4, "401/998")], "without guidance there is no interval"
    assert (
        found[4, "0/400"] == pytest.approx(found[1, "all"], rel=1e-5)
        and len({round(value, 5) for value in found.values()}) == 3
    )


def test_few_samples_are_warned_of(tmp_path, caplog):
    config, *_ = make_run(tmp_path)
    [point] = evaluate(parse_request(config, nfe="3"))
    [said] = [record.message for record in caplog.records if "few" in record.message]
    assert said.startswith("16 samples for features of width 64 are few: fd_digits of perfect samples would be ")
    assert f"{point['bias']['fd_digits']:.3g}" in said


def test_a_diverged_model_is_no_number(tmp_path):
    config, *_ = make_run(tmp_path, scale=1e12)
    with pytest.raises(NonFiniteError, match=r"step-00000006\.ckpt at NFE 5"):
        evaluate(parse_request(config, nfe="5"))
    assert not record_path(config.run_dir).exists()


def test_a_checkpoint_of_another_model(tmp_path):
    config, *_ = make_run(tmp_path)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, ffn_width=32))
    with pytest.raises(InputError, match="not of this run's model"):
        evaluate(parse_request(other, nfe="5"))


def test_requests(tmp_path):
    config, *_ = make_run(tmp_path)
    assert budgets(parse_request(config)) == [(3, 1), (5, 2)]
    assert budgets(parse_request(config, nfe="6, 6,7")) == [(6, 2), (7, 3)]
    assert budgets(parse_request(config, steps="4")) == [(9, 4)]
    assert parse_sampling(config, 3, None, 8, axes={"sampler": "unipc"}).sampling.sampler == "unipc"
    several = parse_request(config, nfe="5", axes={"sampler": "ddim, unipc", "seed": "1,2"}).samplings
    assert [(each.sampler, each.seed) for each in several] == [("ddim", 1), ("ddim", 2), ("unipc", 1), ("unipc", 2)]
    assert [each.guidance for each in parse_request(config, nfe="5", axes={"guidance": "1,1.0"}).samplings] == [1.0]
    mistakes = {
        r"steps = 1001: must be in 1\.\.1000": {"steps": "1001"},
        r"--sampler heun: must be one of ddim, ddpm, dpmsolver\+\+, unipc": {"axes": {"sampler": "ddim,heun"}},
        r"--guidance much: must be numbers": {"axes": {"guidance": "1,much"}},
        r"evaluation\.guidance = 2\.0: there is nothing to guide towards": {"axes": {"guidance": "1,2"}},
        r"evaluation\.guidance = nan: must be a number": {"axes": {"guidance": "nan"}},
        r"evaluation\.seed = 4001: must be in 0\.\.4000": {"axes": {"seed": "0,4001"}},
    }
    for message, options in mistakes.items():
        with pytest.raises((ConfigError, InputError), match=message):
            parse_request(config, **options)
    with pytest.raises(InputError, match="--sampler ddim,unipc: give one value"):
        parse_sampling(config, 3, None, 8, axes={"sampler": "ddim,unipc"})
    nothing = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, feature_networks=()))
    with pytest.raises(ConfigError, match=r"evaluation\.feature_networks = \[\]: nothing to measure with"):
        parse_request(nothing)
