"""The training stream: what a batch holds, that it is the same on any number of devices and workers, and what it refuses."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from madformer.data import datamodule
from madformer.data.datamodule import LatentDataModule
from madformer.data.encode import encode
from madformer.data.prompts import PromptTokenizer
from madformer.errors import ConfigError, InputError
from madformer.randomness import BatchShard, keyed_generator
from madformer.runs.checkpoints import DATA
from madformer.training.module import LitMADFormer
from tests.pictures import CODEC, experiment, moments, write_parquet, write_tars

ROWS = 37
TEXT = ("model.text.vocab_size=2048", "model.text.pad_token_id=0", "model.text.length=6", "model.text.dropout=0")
TEXT += ("data.tokenizer=builtin",)

pytestmark = pytest.mark.usefixtures("local_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and latents of them."""
    folder = tmp_path_factory.mktemp("pictures")
    write_parquet(folder / "pictures.parquet", ROWS)
    encode(experiment(folder, latents=folder / "latents", flip=True))
    return folder


def read(config, steps, first_step=0, ranks=1, state=None):
    """Batches as training sees them, over all devices, by (step, place)."""
    found = {}
    for rank in range(ranks):
        data, module = LatentDataModule(config), LitMADFormer(config)
        device = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=ranks, global_step=first_step, strategy=device, lightning_module=module
        )
        if state:
            data.load_state_dict(state)
        data.setup("fit")
        parts = data.trainer.accumulate_grad_batches
        for number, batch in enumerate(itertools.islice(data.train_dataloader(), steps * parts)):
            step = first_step + number // parts
            indices = BatchShard.of(config.data.batch_size, config.data.batch_size_per_device, rank, ranks).indices(
                number % parts
            )
            assert "keys" not in batch, "drawn by the threads that read"
            seen = data.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0)
            for place, index in enumerate(indices):
                assert (step, index) not in found
                found[step, index] = {
                    name: tensor[place] for name, tensor in seen.items() if name in ("latents", "text", "noise")
                }
    return found, data.state_dict()


def same(one, other):
    assert one.keys() == other.keys()
    for key, sample in one.items():
        assert sample.keys() == other[key].keys() >= {"latents", "noise"}
        assert all(torch.equal(tensor, other[key][name]) for name, tensor in sample.items()), key


KINDS = {
    "shards": {"latents": "latents"},
    "images": {},
    "stream": {"streaming": True},
}


def configure(folder, kind, *overrides, **data):
    latents = {"latents": folder / "latents"} if kind == "shards" else {}
    return experiment(folder, *overrides, **{**KINDS[kind], **latents, **data})


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_devices_workers_and_restarts_sees_the_same(kind, folder, monkeypatch):
    monkeypatch.setattr(datamodule, "WINDOW", 10)
    config = configure(folder, kind, *TEXT, flip=True)
    whole, state = read(config, steps=6)
    assert len(whole) == 6 * 16
    same(read(configure(folder, kind, *TEXT, flip=True, workers=2), steps=6)[0], whole)
    for ranks in (2, 4):
        limit = {"batch_size_per_device": 2} if ranks == 4 else {}
        same(read(configure(folder, kind, *TEXT, flip=True, **limit), steps=6, ranks=ranks)[0], whole)
    for first in (1, 3, 5):  # within the first epoch, behind its end (37 / 16 steps), in the third
        rest = {key: sample for key, sample in whole.items() if key[0] >= first}
        same(read(config, steps=6 - first, first_step=first)[0], rest)
        same(read(config, steps=6 - first, first_step=first, state=state)[0], rest)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_image_once_and_samples_it_anew(kind, folder, monkeypatch):
    monkeypatch.setattr(datamodule, "WINDOW", 10)
    found, _ = read(configure(folder, kind), steps=5)
    means = torch.stack([moments(number)[0] for number in range(ROWS)])
    order = [int((means - found[key]["latents"]).abs().mean(dim=(1, 2, 3)).argmin()) for key in sorted(found)]
    epochs = [order[:ROWS], order[ROWS : 2 * ROWS]]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs) and epochs[0] != epochs[1] != list(range(ROWS))
    for (step, index), number in [*list(zip(sorted(found), order, strict=True))[:3], ((3, 2), order[50])]:
        mean, deviation = moments(number)
        noise = torch.randn((1, 3, 8, 8), generator=keyed_generator(0, "posterior", step, index))[0]
        expected = mean.half().float() + deviation.half().float() * noise if kind == "shards" else mean + deviation * noise
        torch.testing.assert_close(found[step, index]["latents"], expected, atol=1e-6, rtol=1e-5)


def test_half_of_the_images_are_mirrored_and_which_ones_depends_on_their_place(folder):
    found, _ = read(configure(folder, "images", flip=True), steps=4)
    means = torch.stack([moments(number, flipped)[0] for number in range(ROWS) for flipped in (False, True)])
    nearest = [int((means - found[key]["latents"]).abs().mean(dim=(1, 2, 3)).argmin()) for key in sorted(found)]
    mirrored = [number % 2 for number in nearest]
    assert 20 < sum(mirrored) < 44, "of 64"
    same(read(configure(folder, "shards", flip=True), steps=1)[0], read(configure(folder, "shards", flip=True), steps=1)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_the_names_of_the_classes(kind, folder):
    config = configure(folder, kind, *TEXT)
    found, _ = read(config, steps=1)
    means = torch.stack([moments(number)[0] for number in range(ROWS)])
    tokenizer = PromptTokenizer("builtin", config.model.text)
    for sample in found.values():
        number = int((means - sample["latents"]).abs().mean(dim=(1, 2, 3)).argmin())
        assert torch.equal(sample["text"], tokenizer([("cat", "dog", "eel")[number % 3]])[0])


def test_digits_have_prompts_too(tmp_path):
    from tests.tiny_runs import tiny_run

    config = tiny_run(tmp_path, *TEXT)
    found, _ = read(config, steps=1)
    words = PromptTokenizer("builtin", config.model.text)(["zero", "nine"])
    assert all(sample["text"].any() for sample in found.values()) and not torch.equal(words[0], words[1])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_image_is_replaced_named_and_counted(streaming, tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=20, broken=(3, 14))
    config = experiment(tmp_path, streaming=streaming, batch_size=20)
    found, _ = read(config, steps=1)
    assert len(found) == 20 and all(sample["latents"].isfinite().all() for sample in found.values())
    named = (config.run_dir / "skipped.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in named) == ["picture_0003.png", "picture_0014.png"]
    assert "left out: 2 broken" in (summary := LatentDataModule(config).summary)
    assert streaming or ": 18 images, " in summary
    with pytest.raises(InputError, match=r"more than data\.max_skipped = 1 broken images"):
        read(experiment(tmp_path, streaming=streaming, batch_size=20, max_skipped=1), steps=1)


def test_the_hubs_tars_are_streamed_in_any_order(tmp_path):
    write_tars(tmp_path / "tars", tars=3, rows=8)
    config = experiment(tmp_path, source=tmp_path / "tars", streaming=True, batch_size=12)
    found, _ = read(config, steps=2)
    means = torch.stack([moments(number)[0] for number in range(24)])
    order = [int((means - found[key]["latents"]).abs().mean(dim=(1, 2, 3)).argmin()) for key in sorted(found)]
    assert sorted(order) == list(range(24)) and order != list(range(24))


def test_latents_that_contradict_the_experiment_are_refused(folder, tmp_path):
    def refused(*overrides, **data):
        with pytest.raises(InputError) as caught:
            LatentDataModule(experiment(folder, *overrides, latents=folder / "latents", **data))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "made with data.codec = " in refused(codec="pixels") and "Halving, the experiment has pixels" in refused(
        codec="pixels"
    )
    assert "model.latent_size = 8, the experiment has 16: set model.latent_size=8" in refused("model.latent_size=16")
    assert "model.latent_channels = 3, the experiment has 4" in refused("model.latent_channels=4")
    assert "data.codec_dtype = float32, the experiment has bfloat16" in refused(codec_dtype="bfloat16")
    assert "data.source = " in refused(source="elsewhere") and "the experiment has elsewhere" in refused(source="elsewhere")
    moved = (tmp_path / "moved.py", folder / "halving.py")
    moved[0].write_text(moved[1].read_text())
    LatentDataModule(experiment(folder, latents=folder / "latents", codec=f"{moved[0]}:Halving"))
    LatentDataModule(experiment(folder, latents=folder / "latents", source=None))
    other = tmp_path / "other"
    encode(experiment(folder, latents=other))
    with pytest.raises(InputError, match="made without mirrored images: set data.flip=false"):
        LatentDataModule(experiment(folder, latents=other, flip=True))


def test_a_model_with_text_needs_something_to_read(tmp_path):
    write_tars(tmp_path / "tars", tars=1, rows=4)
    with pytest.raises(ConfigError, match=r"neither texts nor named classes for a model with text: set data\.class_names"):
        LatentDataModule(experiment(tmp_path, *TEXT, source=tmp_path / "tars"))


def test_a_codec_of_other_latents_is_refused(folder):
    with pytest.raises(ConfigError, match=r"its latents have 3 channels, the model's 4: set model\.latent_channels=3"):
        LatentDataModule(experiment(folder, "model.latent_channels=4"))


def test_other_data_is_not_gone_on_with(folder, tmp_path):
    config = experiment(folder, latents=folder / "latents")
    state = LatentDataModule(config).state_dict()
    assert LatentDataModule.__qualname__ == DATA, "under which Lightning keeps it, and evaluation looks for it"
    encode(experiment(folder, latents=tmp_path / "other", split="train"))
    other = LatentDataModule(experiment(folder, latents=tmp_path / "other"))
    with pytest.raises(InputError, match="the latents that this run was trained on"):
        other.load_state_dict(state)
    LatentDataModule(config).load_state_dict(state)


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.source = null: nothing to train on"):
        LatentDataModule(experiment(tmp_path, source=None))
    with pytest.raises(InputError, match="no latents there"):
        LatentDataModule(experiment(tmp_path, latents=tmp_path / "nowhere"))


def test_rows_without_labels_have_no_prompt(folder):
    from madformer.data.loader import Captions

    captions = Captions(("cat",), use_text=False)
    assert (captions(0, "text"), captions(None, "text")) == ("cat", "")
    assert (Captions(None, use_text=True)(0, "text"), Captions(None, use_text=True)(0, None)) == ("text", "")


@pytest.mark.parametrize(
    ("max_skipped", "problem"),
    [
        (2, r"more than data\.max_skipped = 2 broken images: picture_"),
        (50, "20 images one after the other are broken: picture_"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_search_for_a_good_image_ends(streaming, max_skipped, problem, tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=20, broken=tuple(range(20)))
    with pytest.raises(InputError, match=problem):
        read(experiment(tmp_path, streaming=streaming, max_skipped=max_skipped), steps=1)


def test_columns_and_names_that_are_not_those_of_the_latents(folder, tmp_path):
    with pytest.raises(InputError, match=r"made with data\.image_column = image, the experiment has mask"):
        LatentDataModule(experiment(folder, latents=folder / "latents", image_column="mask"))
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    with pytest.raises(InputError, match=r"data\.class_names: 2 names, but there is an image of class 2"):
        LatentDataModule(experiment(folder, *TEXT, latents=folder / "latents", class_names=names))
    with pytest.raises(InputError, match=r"data\.class_names: 2 names"):
        read(experiment(folder, *TEXT, class_names=names), steps=1)


def test_a_codec_of_other_weights_is_noticed(tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=5)
    preview = "evaluation.preview_every=6"
    encode(experiment(tmp_path, latents=tmp_path / "latents"))
    state = LatentDataModule(experiment(tmp_path)).state_dict()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.pictures.CODEC", CODEC.replace("torch.tensor(0.5)", "torch.tensor(0.25)"))
        with pytest.raises(InputError, match="the codec that this run was trained on"):
            LatentDataModule(experiment(tmp_path)).load_state_dict(state)
        with pytest.raises(InputError, match=r"made with data\.codec = .* of other weights \(SHA-256"):
            LatentDataModule(experiment(tmp_path, preview, latents=tmp_path / "latents"))


def test_other_names_are_not_gone_on_with(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\neel\n")
    state = LatentDataModule(experiment(folder, *TEXT, latents=folder / "latents", class_names=names)).state_dict()
    assert state["class_prompts"] == ["cat", "dog", "eel"]
    names.write_text("cat\nhound\neel\n")
    with pytest.raises(InputError, match="the class names that this run was trained on"):
        LatentDataModule(experiment(folder, *TEXT, latents=folder / "latents", class_names=names)).load_state_dict(state)
