import shutil
from pathlib import Path

import diffusers
import fsspec
import pytest

from tests.data.vaes import KL, save


@pytest.fixture
def vae(tmp_path):
    """Of Stable Diffusion's architecture."""
    return save(diffusers.AutoencoderKL, tmp_path / "vae", **KL)


@pytest.fixture
def custom_codecs(tmp_path, monkeypatch):
    """A user's file, in the working directory and in a package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lab").mkdir()
    for file in ("mine.py", "lab/codecs.py"):
        shutil.copy(Path(__file__).with_name("custom_codecs.py"), file)


@pytest.fixture
def local_cache(monkeypatch, tmp_path_factory):
    """Nothing is written to the home folder, and no hub is asked."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", tmp_path_factory.mktemp("downloads"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # else addresses are refused, too


@pytest.fixture
def memory():
    """An address like a bucket's, empty before and after."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()
