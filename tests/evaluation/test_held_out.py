"""Held-out images: from all over the data set, described as training describes them; distances to them."""

import logging
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset

from madformer.cli import app
from madformer.config import DataConfig, EvaluationConfig, ExperimentConfig, TextConfig, load_run
from madformer.data.codec import build_codec
from madformer.data.datamodule import LatentDataModule
from madformer.data.image_files import load_square, to_unit
from madformer.data.prompts import DIGIT_NAMES
from madformer.data.sources import load_digits
from madformer.errors import ConfigError, InputError
from madformer.evaluation.evaluate import evaluate
from madformer.evaluation.feature_networks import build_feature_network
from madformer.evaluation.held_out import read_held_out
from madformer.evaluation.measurement import Sampling
from madformer.evaluation.metrics import Moments, frechet_bias, frechet_distance
from madformer.evaluation.neighbours import memorisation, nearest_distances
from madformer.evaluation.record import read_points, record_path
from madformer.evaluation.request import parse_request
from madformer.evaluation.sampling import sample_batches
from madformer.model import MADFormer
from madformer.randomness import keyed_generator
from madformer.runs.checkpoints import CLASS_PROMPTS, DATA, EMA
from tests.conftest import tiny
from tests.evaluation.test_evaluate import METRICS, make_run, only_metrics, pleased, save_random_checkpoint
from tests.pictures import as_bytes, experiment, picture, write_codec, write_parquet, write_tars
from tests.tiny_runs import command, perform, scalars

CPU = torch.device("cpu")
TEXT = TextConfig(vocab_size=2048, length=4, pad_token_id=0)


def checkpoint(folder: Path, names=None) -> Path:
    """As far as images need one: what the classes are called."""
    path = folder / "step-00000001.ckpt"
    torch.save({"state_dict": {}, EMA: {}, DATA: {CLASS_PROMPTS: names}}, path)
    return path


def digits(**evaluation) -> ExperimentConfig:
    data = DataConfig(source="digits", codec="pixels", split="train[:90%]", batch_size=16, tokenizer="builtin")
    model = tiny(latent_channels=1, text=TEXT)
    return ExperimentConfig(model=model, data=data, evaluation=EvaluationConfig(nfe=(5,), **evaluation))


def pictures(folder: Path, model=None, **data) -> ExperimentConfig:
    """On 8 x 8 latents of 16 x 16 pixels; of 40 pictures the last 10 are held out."""
    images = Dataset.from_parquet(str(write_parquet(folder / "every.parquet", 40)), cache_dir=str(folder / "cache"))
    (folder / "parts").mkdir()
    images.select(range(30)).to_parquet(folder / "parts/train.parquet")
    images.select(range(30, 40)).to_parquet(folder / "parts/test.parquet")
    fields = {"source": str(folder / "parts"), "codec": write_codec(folder), "workers": 0, "tokenizer": "builtin", **data}
    evaluation = EvaluationConfig(nfe=(5,), held_out_split="test")
    model = model or tiny(latent_channels=3)
    return ExperimentConfig(output_dir=str(folder), model=model, data=DataConfig(**fields), evaluation=evaluation)


def evaluating(config: ExperimentConfig, **fields) -> ExperimentConfig:
    return replace(config, evaluation=replace(config.evaluation, **fields))


def latents_of(config: ExperimentConfig, numbers) -> torch.Tensor:
    squares = [load_square(as_bytes(picture(number)), 16) for number in numbers]
    return build_codec(config.data.codec).encode(to_unit(torch.stack(squares)))[0]


def as_rows(latents: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in latents.flatten(1).tolist()}


def test_a_tenth_of_the_digits_is_not_trained_on(tmp_path):
    config = digits(held_out_split="train[90%:]")
    samples = LatentDataModule(config)._samples
    trained, _ = samples.read(np.arange(len(samples)), np.zeros(len(samples), dtype=bool))
    held_out = read_held_out(config, checkpoint(tmp_path), 1000, CPU)
    assert (len(samples), len(held_out.latents_NChw)) == (1617, 180)
    assert not as_rows(held_out.latents_NChw) & as_rows(trained["latents"])
    assert (held_out.source, held_out.is_held_out) == ("digits, train[90%:]", True)
    images, labels = load_digits()
    named = {tuple(row): DIGIT_NAMES[label] for row, label in zip(images.flatten(1).tolist(), labels, strict=True)}
    assert held_out.captions == [named[tuple(row)] for row in held_out.latents_NChw.flatten(1).tolist()]


def test_another_split_of_a_data_set(tmp_path):
    config = pictures(tmp_path)
    held_out = read_held_out(config, checkpoint(tmp_path), 100, CPU)
    assert held_out.is_held_out and held_out.source == f"{tmp_path / 'parts'}, test"
    assert held_out.latents_NChw.dtype == torch.float32
    assert as_rows(held_out.latents_NChw) == as_rows(latents_of(config, range(30, 40)))


def test_another_source(tmp_path):
    config = evaluating(pictures(tmp_path), held_out_source=str(tmp_path / "every.parquet"), held_out_split=None)
    held_out = read_held_out(config, checkpoint(tmp_path), 100, CPU)
    assert held_out.is_held_out and len(held_out.latents_NChw) == 40


def test_without_a_name_they_are_training_images_and_it_says_so(tmp_path, caplog):
    config = evaluating(pictures(tmp_path), held_out_split=None)
    for same in (config, evaluating(config, held_out_split="train")):
        with caplog.at_level(logging.WARNING):
            held_out = read_held_out(same, checkpoint(tmp_path), 100, CPU)
        assert not held_out.is_held_out and len(held_out.latents_NChw) == 30
        assert "evaluation.held_out_split=validation" in caplog.text
        caplog.clear()


def test_few_are_the_first_of_many_and_come_from_all_over(tmp_path):
    config = evaluating(pictures(tmp_path), held_out_split="train")
    many, few = (read_held_out(config, checkpoint(tmp_path), images, CPU).latents_NChw for images in (30, 12))
    assert torch.equal(many[:12], few)
    halves = [as_rows(latents_of(config, numbers)) for numbers in (range(15), range(15, 30))]
    assert all(as_rows(few) & half for half in halves)
    other = read_held_out(evaluating(config, seed=1), checkpoint(tmp_path), 12, CPU).latents_NChw
    assert not torch.equal(other, few)


def test_a_stream_gives_the_first_images_of_several_files(tmp_path):
    config = pictures(tmp_path)
    write_tars(tmp_path / "tars", tars=4, rows=5)
    config = replace(config, data=replace(config.data, streaming=True, workers=2))
    config = evaluating(config, held_out_source=str(tmp_path / "tars"), held_out_split="train")
    read = {images: read_held_out(config, checkpoint(tmp_path), images, CPU).latents_NChw for images in (8, 100)}
    assert as_rows(read[8]) == as_rows(latents_of(config, [tar * 5 + row for tar in range(4) for row in range(2)]))
    assert as_rows(read[100]) == as_rows(latents_of(config, range(20))) and torch.equal(read[100][:8], read[8])


def test_broken_images_are_left_out(tmp_path):
    config = evaluating(pictures(tmp_path), held_out_source=str(tmp_path / "other.parquet"), held_out_split=None)
    write_parquet(tmp_path / "other.parquet", 9, broken=(2, 4))
    held_out = read_held_out(config, checkpoint(tmp_path), 7, CPU)
    assert as_rows(held_out.latents_NChw) == as_rows(latents_of(config, (0, 1, 3, 5, 6, 7, 8)))
    strict = replace(config, data=replace(config.data, max_skipped=1))
    with pytest.raises(InputError, match="more than data.max_skipped = 1 broken images"):
        read_held_out(strict, checkpoint(tmp_path), 9, CPU)


def test_classes_are_called_as_in_training_whatever_their_numbers(tmp_path):
    config = pictures(tmp_path, model=tiny(latent_channels=3, text=TEXT))
    path = checkpoint(tmp_path, ["cat", "dog", "eel"])
    by_number = read_held_out(config, path, 100, CPU).captions
    assert sorted(by_number) == sorted(["cat", "dog", "eel"][number % 3] for number in range(30, 40))
    # A data set that lacks a class numbers them otherwise.
    data = Dataset.from_parquet(str(tmp_path / "every.parquet"), cache_dir=str(tmp_path / "cache")).select([1, 4, 7])
    data = data.remove_columns("label").add_column("label", [0, 0, 0]).cast_column("label", ClassLabel(names=["dog"]))
    data.to_parquet(tmp_path / "dogs.parquet")
    dogs = evaluating(config, held_out_source=str(tmp_path / "dogs.parquet"), held_out_split="train")
    assert read_held_out(dogs, path, 100, CPU).captions == ["dog"] * 3
    # A list of names is the run's, by number.
    listed = replace(config, data=replace(config.data, class_names=str(tmp_path / "gone.txt")))
    assert set(read_held_out(listed, checkpoint(tmp_path, ["a", "b", "c"]), 100, CPU).captions) == {"a", "b", "c"}


def test_texts_go_before_classes(tmp_path):
    config = pictures(tmp_path, model=tiny(latent_channels=3, text=TEXT))
    data = Dataset.from_parquet(str(tmp_path / "every.parquet"), cache_dir=str(tmp_path / "cache")).select(range(5))
    data.add_column("text", [f"picture {number}" for number in range(5)]).to_parquet(tmp_path / "texts.parquet")
    config = evaluating(config, held_out_source=str(tmp_path / "texts.parquet"), held_out_split="train")
    assert sorted(read_held_out(config, checkpoint(tmp_path), 100, CPU).captions) == [f"picture {n}" for n in range(5)]


def test_what_is_refused(tmp_path):
    config, path = pictures(tmp_path), checkpoint(tmp_path)
    refused = {
        r"held_out_source = null, and data.source as well": replace(config, data=replace(config.data, source=None)),
        r"held-out images \(.*\): data.split = 'dev': must be one of": evaluating(config, held_out_split="dev"),
        r"held-out images \(.*\): data.source = 'nowhere'": evaluating(config, held_out_source="nowhere"),
        r"held-out images \(.*\): .*its images are 1 x 8 x 8": evaluating(config, held_out_source="digits"),
        r"held-out images \(.*\): data.split = 'test': must be train or a slice": digits(held_out_split="test"),
        r"data.split = 'train\[5:5\]': empty": digits(held_out_split="train[5:5]"),
        r"2 of digits, train\[:2\]; there must be at least 3": digits(held_out_split="train[:2]"),
    }
    for message, wrong in refused.items():
        with pytest.raises(ConfigError, match=message) as caught:
            read_held_out(wrong, path, 8, CPU)
        assert "\n" not in str(caught.value)
    write_tars(tmp_path / "tars", tars=1, rows=3)
    nameless = replace(evaluating(config, held_out_source=str(tmp_path / "tars"), held_out_split="train"))
    nameless = replace(nameless, model=tiny(latent_channels=3, text=TEXT))
    with pytest.raises(ConfigError, match="neither texts nor named classes for a model with text"):
        read_held_out(nameless, path, 8, CPU)


HELD_OUT = ["memorisation_digits", "fd_digits_held_out", "kid_digits_held_out"]


def test_distances_to_held_out_images_stand_beside_those_to_training(tmp_path, caplog):
    folder = f"evaluation.references={tmp_path / 'references'}"
    config, _, average = make_run(tmp_path, folder, "data.split=train[:80%]")
    plain = evaluate(parse_request(config, steps="2"))[0]
    printed = perform(command("evaluate", config.run_dir, "--steps", 2, "evaluation.held_out_split=train[80%:]"))
    before, point = read_points(config.run_dir)
    assert before == plain and "recorded before" not in printed, "it is measured again"
    assert list(point["metrics"]) == METRICS + HELD_OUT
    assert {name: point["metrics"][name] for name in METRICS} == plain["metrics"]

    network, model = build_feature_network("digits"), MADFormer(config.model)
    model.load_state_dict(average)
    samples = network(torch.cat(list(sample_batches(model, config, Sampling.of_steps(config, 2), range(16))))).features_BD
    learnt, held_out = (network(load_digits()[0][rows]).features_BD for rows in (slice(1438), slice(1438, None)))
    for name, features in (("fd_digits", learnt), ("fd_digits_held_out", held_out)):
        expected = frechet_distance(Moments.of(samples), Moments.of(features))
        assert point["metrics"][name] == pytest.approx(expected, rel=1e-6)
    drawn = held_out[torch.randperm(len(held_out), generator=keyed_generator("reference"))][:16]
    assert point["metrics"]["kid_digits_held_out"] == pytest.approx(kernel_distance(samples, drawn), rel=1e-6)
    nearest = [torch.cdist(features.double(), learnt.double()).amin(1) for features in (samples, held_out)]
    assert point["metrics"]["memorisation_digits"] == pytest.approx(memorisation(*nearest), abs=1e-3)
    moments = Moments.of(learnt)
    assert point["bias"] == {
        "fd_digits": pytest.approx(frechet_bias(moments, 16)),
        "fd_digits_held_out": pytest.approx(frechet_bias(moments, 16) + frechet_bias(moments, 359)),
    }
    assert [(each["images"], each.get("held_out")) for each in point["references"]] == [(1438, None), (359, True)]
    assert (
        len({each["sha256"] for each in point["references"]})
        == len(list((tmp_path / "references").glob("[!.]*.safetensors")))
        == 2
    )
    assert [tag for tag in scalars(config.run_dir) if re.search("memorisation.*_vs_nfe|_held_out_vs_nfe", tag)] == [
        f"{name}_vs_nfe" for name in HELD_OUT
    ]

    again = perform(command("evaluate", config.run_dir, "--steps", 2, "evaluation.held_out_split=train[80%:]"))
    assert "recorded before" in again and len(read_points(config.run_dir)) == 2
    record_path(config.run_dir).unlink()
    app(shlex.split(point["command"])[1:], standalone_mode=False)
    assert [each["metrics"] for each in read_points(config.run_dir)] == only_metrics([point]), "its command gives it again"
    assert "shares images" not in caplog.text


def kernel_distance(generated_ND, reference_MD):
    """The unbiased squared maximum mean discrepancy, by its definition."""
    x, y = generated_ND.double(), reference_MD.double()
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    within = [(kernel(a, a).sum() - kernel(a, a).trace()) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return (sum(within) - 2 * kernel(x, y).mean()).item()


def test_held_out_images_of_a_folder(tmp_path):
    """Two splits of a folder of images; the second one is read, cut and compared like the first."""
    for split, numbers in (("train", range(12)), ("test", range(12, 20))):
        (tmp_path / "images" / split).mkdir(parents=True)
        for number in numbers:
            picture(number).save(tmp_path / "images" / split / f"{number}.png")
    settings = (pleased(tmp_path), f"evaluation.references={tmp_path / 'references'}", "evaluation.held_out_split=test")
    config = experiment(tmp_path, *settings, source=tmp_path / "images")
    save_random_checkpoint(config)
    [point] = evaluate(parse_request(config, nfe="5"))
    assert list(point["metrics"])[-2:] == ["fd_spread_held_out", "kid_spread_held_out"]
    assert [each["images"] for each in point["references"]] == [12, 8]
    as_training = replace(
        config,
        output_dir=str(tmp_path / "others"),
        data=replace(config.data, split="test"),
        evaluation=replace(config.evaluation, held_out_split=None),
    )
    shutil.copytree(config.run_dir / "checkpoints", as_training.run_dir / "checkpoints")
    [other] = evaluate(parse_request(as_training, nfe="5"))
    for name in ("fd_spread", "kid_spread"):
        assert point["metrics"][f"{name}_held_out"] == pytest.approx(other["metrics"][name], rel=1e-6)
    assert len(list((tmp_path / "references").glob("[!.]*.safetensors"))) == 2, "of the same images there is one reference"


def test_held_out_images_that_are_not(tmp_path, caplog):
    config, *_ = make_run(tmp_path)
    [point] = evaluate(parse_request(config, nfe="5"))
    assert "shares images" not in caplog.text
    overlapping = load_run(config.run_dir, ["evaluation.held_out_split=train[90%:]"])
    assert evaluate(parse_request(overlapping, nfe="5")) == [point]
    assert "evaluation.held_out_split shares images with data.split: no distances to held-out images" in caplog.text
    for split, said in {"test": r"data\.split = 'test': must be train or a slice", "train[:1]": "1 reference images"}.items():
        data = replace(config.data, split="train[10:]")
        evaluation = replace(config.evaluation, held_out_split=split, references=str(tmp_path))
        with pytest.raises(InputError, match=rf"held-out images \(evaluation\..*{said}"):
            evaluate(parse_request(replace(config, data=data, evaluation=evaluation), nfe="5"))
    assert read_points(config.run_dir) == [point]


def test_the_bias_is_that_of_samples_and_of_held_out_images():
    """The numbers of docs/explanation/evaluation.md: digits against other digits."""
    features, generator = build_feature_network("digits")(load_digits()[0]).features_BD, torch.Generator().manual_seed(0)
    distances, rows = [], torch.arange(1797)
    for _ in range(20):
        learnt, held_out = (Moments.of(features[part]) for part in rows[torch.randperm(1797, generator=generator)].split(1438))
        distances.append(frechet_distance(learnt, held_out))
    assert sum(distances) / 20 == pytest.approx(5.0, abs=0.1)
    assert frechet_bias(learnt, 1438) + frechet_bias(learnt, 359) == pytest.approx(5.5, abs=0.1)
    slices = [Moments.of(features[part]) for part in rows.split(1438)]
    assert frechet_distance(*slices) == pytest.approx(11.5, abs=0.05)


def test_memorisation_of_real_digits():
    """The numbers of docs/explanation/evaluation.md."""
    features, generator = build_feature_network("digits")(load_digits()[0]).features_BD, torch.Generator().manual_seed(0)
    shares, rows = [], torch.arange(1797)
    for _ in range(20):
        learnt, *halves = (features[part] for part in rows[torch.randperm(1797, generator=generator)].split((1438, 180, 179)))
        nearest = [nearest_distances(half, learnt) for half in halves]
        shares.append(memorisation(*nearest))
        assert memorisation(nearest_distances(learnt, learnt), nearest[0]) == 1, "copies"
    assert sum(shares) / 20 == pytest.approx(0.5, abs=0.02)
    learnt, held_out = features.double().split(1438)
    others = torch.cdist(learnt, learnt, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf).amin(1)
    assert memorisation(others, nearest_distances(held_out, learnt)) == pytest.approx(0.61, abs=0.005)
