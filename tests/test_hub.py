"""Models by hub id: from the cache alone where it holds them, no file too many else, and why they cannot be had."""

import re
import time
from contextlib import ExitStack

import pytest

from madformer.errors import InputError
from madformer.lookup import find_model, list_files
from tests.hub import fill_cache, serve_hub

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model.bin")


@pytest.fixture
def model(tmp_path):
    """A folder of one."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def hub(cache, monkeypatch):
    """Start a hub that is asked from here on."""
    from huggingface_hub import constants

    with ExitStack() as running:

        def start(*names):
            endpoint = running.enter_context(serve_hub({name: name.encode() for name in names}))
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")

        yield start


def refusal(location):
    """Why a model cannot be had."""
    with pytest.raises(InputError, match=r"\Acannot be had: .*; name a folder that exists\Z") as error:
        find_model(location, WEIGHTS, part="vae")
    return str(error.value).removeprefix("cannot be had: ").removesuffix("; name a folder that exists")


def test_folders(model, tmp_path):
    assert find_model(str(model), WEIGHTS) == model
    assert find_model(str(tmp_path), WEIGHTS, part="model") == model
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path))} holds no config.json, nor a vae/ that does$"):
        find_model(str(tmp_path), WEIGHTS, part="vae")
    with pytest.raises(InputError, match=r"holds no config.json$"):
        find_model(str(tmp_path), WEIGHTS)


@pytest.mark.parametrize("location", ["./missing", "/missing/vae", "a b/c", "../owner/name"])
def test_no_folder_and_no_hub_id(location):
    assert refusal(location) == "no such folder, and no hub id, which is owner/name"


@pytest.mark.parametrize(
    ("subfolder", "location"),
    [("", "owner/name"), ("vae", "owner/name"), ("vae", "owner/name/vae"), ("a/b", "owner/name/a/b/")],
)
def test_cached_files_need_no_network(model, cache, subfolder, location):
    snapshot = fill_cache(cache, model, subfolder)
    assert find_model(location, WEIGHTS, part="vae") == snapshot


def test_without_network_it_fails_at_once(model, cache):
    start = time.monotonic()
    reason = refusal("owner/name")
    assert reason.startswith("no such folder, and it is not in the cache, and the hub is out of reach: ")
    (model / "model.safetensors").unlink()
    fill_cache(cache, model)  # a download that was cut off
    assert refusal("owner/name") == reason
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("owner/nmae", "no such folder, and the hub has no such repository, or it is private (`hf auth login`)"),
        (
            "owner/gated",
            "no such folder, and the repository's owner must grant access first (accept the terms on its page, then `hf auth login`)",
        ),
        ("owner/name", "owner/name holds no vae/config.json"),
        ("owner/name/other", "owner/name holds no other/config.json"),
    ],
)
def test_what_the_hub_says(hub, location, reason):
    hub("README.md")
    assert refusal(location) == reason


def test_a_hub_that_is_out_of_order(hub):
    hub()
    with pytest.raises(InputError, match=r"^no such folder, and the hub refuses: Server error '503"):
        list_files("owner/down", "dataset")


SINGLE = {"model.safetensors", "model.bin"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


@pytest.mark.parametrize(
    ("weights", "taken"),
    [
        (SINGLE, {"model.safetensors"}),
        (SHARDS | {"model.safetensors.index.json", "model.bin"}, SHARDS | {"model.safetensors.index.json"}),
        ({"model.bin", "other.bin"}, {"model.bin"}),
    ],
)
@pytest.mark.parametrize("subfolder", ["", "vae/"])
def test_one_form_of_the_weights_is_downloaded(hub, weights, taken, subfolder):
    hub("README.md", *(f"{subfolder}{name}" for name in ("config.json", "processor.json", "more.json", *weights)))
    folder = find_model("owner/name", ("processor.json", "preprocessor.json"), WEIGHTS, part="vae")
    names = {"config.json", "processor.json", *taken}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "config.json").read_text() == f"{subfolder}config.json"
