"""An evaluation is a function of weights and request: not of batch size, nor of what ran before."""

import dataclasses
import json

import pytest
import torch

from madformer.checkpoints import EMA, checkpoint_path
from madformer.config import ConfigError, InputError, freeze
from madformer.data.digits import load_digits
from madformer.evaluation.evaluate import evaluate_run
from madformer.evaluation.features import feature_network
from madformer.evaluation.metrics import FrechetDistance
from madformer.evaluation.record import record_path
from madformer.evaluation.request import Budget, parse_request, parse_sampling
from madformer.evaluation.sampling import sample_batches
from madformer.model import MADFormer, cost
from madformer.training.errors import NonFiniteError
from tests.runs import tiny_run


def make_run(folder, *overrides, seed=0, scale=1.0):
    """A run with a checkpoint of random weights: the average differs from the raw ones."""
    config = tiny_run(folder, *overrides)
    torch.manual_seed(seed)
    raw, average = ({name: scale * tensor for name, tensor in MADFormer(config.model).state_dict().items()} for _ in range(2))
    path = checkpoint_path(config.run_dir, 6)
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in raw.items()}, EMA: average}, path)
    freeze(config, config.run_dir)
    return config, raw, average


def test_the_number_is_the_distance_of_the_averaged_models_samples(tmp_path):
    config, raw, average = make_run(tmp_path)
    expected = {}
    for name, weights in (("ema", average), ("model", raw)):
        model = MADFormer(config.model)
        model.load_state_dict(weights)
        distance = FrechetDistance(feature_network("digits"), load_digits()[0])
        distance.update(torch.cat(list(sample_batches(model, config, 2, range(16), 16))))
        expected[name] = distance.compute()
    for name in ("ema", "model"):
        [point] = evaluate_run(parse_request(config, steps="2", weights=name))
        assert point["metrics"] == {"fd_digits": pytest.approx(expected[name], rel=1e-6)}
    assert expected["ema"] != pytest.approx(expected["model"], rel=1e-3)


def test_everything_that_made_a_number_stands_beside_it(tmp_path):
    config, *_ = make_run(tmp_path)
    [point] = evaluate_run(parse_request(config, nfe="6"))
    assert point == json.loads(record_path(config.run_dir).read_text())
    told = {
        "kind": "point",
        "nfe": 6,
        "nfe_actual": 5,
        "steps": 2,
        "checkpoint": "step-00000006.ckpt",
        "step": 6,
        "weights": "ema",
    }
    told |= {
        "sampler": "ddim",
        "guidance": 1.0,
        "num_samples": 16,
        "seed": 0,
        "codec": "pixels",
        "device": "cpu",
        "threads": 1,
    }
    assert {name: point[name] for name in told} == told
    assert point["tflops_per_image"] == cost.sampling_flops(config.model).total(2) / 1e12
    assert point["seconds_per_image"] == point["seconds"] / 16 > 0
    assert point["reference"]["images"] == 1797 and len(point["feature_network"]["sha256"]) == 64


@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_the_number_does_not_depend_on_the_batch_size(batch_size, tmp_path):
    numbers = []
    for size in (batch_size, 5):
        config, *_ = make_run(tmp_path / str(size), f"evaluation.batch_size={size}")
        numbers.append(evaluate_run(parse_request(config, nfe="5"))[0]["metrics"]["fd_digits"])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


def test_only_what_is_missing_is_computed(tmp_path, capsys):
    config, *_ = make_run(tmp_path)
    evaluate_run(parse_request(config, nfe="3"))
    first = record_path(config.run_dir).read_text()
    evaluate_run(parse_request(config, nfe="3,5"))
    both = record_path(config.run_dir).read_text()
    assert both.startswith(first) and len(both.splitlines()) == 2
    assert [("recorded before" in line) for line in capsys.readouterr().out.splitlines()] == [False, True, False]
    evaluate_run(parse_request(config, nfe="3", num_samples=8))
    assert len(record_path(config.run_dir).read_text().splitlines()) == 3
    record_path(config.run_dir).write_text(both[:-20])
    evaluate_run(parse_request(config, nfe="5"))
    again = [json.loads(line)["metrics"] for line in record_path(config.run_dir).read_text().splitlines()]
    assert again == [json.loads(line)["metrics"] for line in both.splitlines()], "a torn line is measured again"


def test_another_seed_of_evaluation_is_another_point(tmp_path):
    config, *_ = make_run(tmp_path)
    other = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, seed=1))
    [one], [two] = (evaluate_run(parse_request(each, nfe="5")) for each in (config, other))
    assert one["metrics"] != two["metrics"]


def test_a_diverged_model_is_no_number(tmp_path):
    config, *_ = make_run(tmp_path, scale=1e12)
    with pytest.raises(NonFiniteError, match=r"step-00000006\.ckpt at NFE 5"):
        evaluate_run(parse_request(config, nfe="5"))
    assert not record_path(config.run_dir).exists()


def test_a_checkpoint_of_another_model(tmp_path):
    config, *_ = make_run(tmp_path)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, ffn_width=32))
    with pytest.raises(InputError, match="not of this run's model"):
        evaluate_run(parse_request(other, nfe="5"))


def test_budgets(tmp_path):
    config, *_ = make_run(tmp_path)
    assert parse_request(config).budgets == (Budget(3, 1), Budget(5, 2))
    assert parse_request(config, nfe="6, 6,7").budgets == (Budget(6, 2), Budget(7, 3))
    assert parse_request(config, steps="4").budgets == (Budget(9, 4),)
    assert parse_sampling(config, 3, None, 8).steps == 3
    with pytest.raises(ConfigError, match=r"steps = 1001: must be in 1\.\.1000"):
        parse_request(config, steps="1001")
