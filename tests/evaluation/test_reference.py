"""Reference statistics: computed once for each data set, size and network, kept, shared, refused where they do not belong."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open

from madformer.data.image_files import to_unit
from madformer.data.sources import digits_sha256, load_digits, open_source
from madformer.errors import ConfigError, InputError
from madformer.evaluation import reference as module
from madformer.evaluation.feature_cache import read_indices
from madformer.evaluation.feature_networks import build_feature_network
from madformer.evaluation.metrics import Moments
from madformer.evaluation.neighbours import pairs_within
from madformer.evaluation.reference import find_reference, load_reference
from tests.pictures import experiment, picture, write_parquet
from tests.tiny_runs import tiny_run

NETWORK = """
import torch
from torch import nn


class Coarse(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor({scale}))

    def forward(self, images):
        return self.scale * nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
"""
"""A user's own feature network: twelve means of quarters."""


def own_network(folder, scale=1.0):
    path = folder / f"coarse_{scale:.0f}.py"
    path.write_text(NETWORK.format(scale=scale))
    return f"{path}:Coarse"


def pictures(folder, *overrides, **data):
    """An experiment on 300 pictures, so that there is more than one unit."""
    if not (folder / "pictures.parquet").exists():
        write_parquet(folder / "pictures.parquet", 300, broken=(3, 299))
    return experiment(folder, f"evaluation.references={folder / 'references'}", *overrides, **data)


def kept(config):
    return sorted(path.name for path in (config.run_dir.parent.parent / "references").glob("*.safetensors"))


def test_it_is_of_every_image_that_can_be_read(tmp_path):
    config, network = pictures(tmp_path), build_feature_network(own_network(tmp_path))
    source = open_source(config.data)
    found = find_reference(network, config, 16, source.fingerprint)
    from madformer.data.image_files import square_image

    images = to_unit(torch.stack([square_image(picture(number), 16) for number in range(300) if number not in (3, 299)]))
    features = network(images).features_BD
    expected = Moments.of(features)
    assert found.moments.count == found.described["images"] == 298
    assert torch.allclose(found.moments.mean_D, expected.mean_D, rtol=1e-12)
    assert torch.allclose(found.moments.covariance_DD, expected.covariance_DD, rtol=1e-9)
    assert sorted(found.features_MD.tolist()) == sorted(features.tolist()), "in an order by chance"
    assert not torch.equal(found.features_MD, features)
    within = found.within(100, torch.device("cpu"))
    assert torch.equal(within.radii_NK, pairs_within(found.features_MD[:100]).radii_NK) and len(within.radii_NK) == 100
    assert found.described["image_size"] == 16 and found.described["source_sha256"] == source.fingerprint


def test_it_is_computed_once(tmp_path, monkeypatch):
    config, network = pictures(tmp_path), build_feature_network(own_network(tmp_path))
    sha256 = open_source(config.data).fingerprint
    first = find_reference(network, config, 16, sha256)
    assert len(kept(config)) == 1 and kept(config)[0].startswith("pictures-16-coarse-")

    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "_compute", refuse)
    monkeypatch.setattr(module, "open_source", refuse)  # the images need not even be there
    again = find_reference(network, config, 16, sha256)
    assert again.pedigree == first.pedigree and torch.equal(again.features_MD, first.features_MD)
    with pytest.raises(AssertionError):
        find_reference(network, config, 8, sha256)


def test_another_size_network_or_data_set_is_another_reference(tmp_path):
    config = pictures(tmp_path)
    one, two = (build_feature_network(own_network(tmp_path, scale)) for scale in (1.0, 2.0))
    sha256 = open_source(config.data).fingerprint
    found = [find_reference(network, config, size, sha256) for network, size in ((one, 16), (one, 8), (two, 16))]
    part = pictures(tmp_path, split="train[:50%]")
    found.append(find_reference(one, pictures(tmp_path, crop="top_left"), 16, sha256))
    found.append(find_reference(one, part, 16, None))
    assert len({reference.described["sha256"] for reference in found}) == len(kept(config)) == 5
    assert [reference.described["crop"] for reference in found[2:4]] == ["centre", "top_left"]
    assert found[-1].moments.count == 149


def test_it_is_found_where_the_data_has_moved(tmp_path, monkeypatch):
    config, network = pictures(tmp_path), build_feature_network(own_network(tmp_path))
    sha256 = open_source(config.data).fingerprint
    first = find_reference(network, config, 16, sha256)
    latents_alone = dataclasses.replace(config, data=dataclasses.replace(config.data, source=None, latents="latents"))
    assert find_reference(network, latents_alone, 16, sha256).pedigree == first.pedigree


def test_another_column_of_images_is_another_reference(tmp_path):
    config, network = pictures(tmp_path), build_feature_network(own_network(tmp_path))
    named = dataclasses.replace(config, data=dataclasses.replace(config.data, image_column="image"))
    found = [find_reference(network, each, 16, None).described["sha256"] for each in (config, named)]
    assert found[0] != found[1]


def test_interrupted_it_goes_on(tmp_path, monkeypatch):
    config, network = pictures(tmp_path), build_feature_network(own_network(tmp_path))
    sha256, whole = open_source(config.data).fingerprint, module.write_part
    expected = find_reference(network, config, 16, sha256)
    kept_file = tmp_path / "references" / kept(config)[0]
    content = kept_file.read_bytes()
    kept_file.unlink()

    def interrupt(*arguments):
        whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_part", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_reference(network, config, 16, sha256)
    [folder] = (tmp_path / "references").glob(".*.parts")
    assert len(read_indices(folder)) == 255, "the first unit, but for its broken image"
    monkeypatch.setattr(module, "write_part", whole)
    again = find_reference(network, config, 16, sha256)
    assert kept_file.read_bytes() == content and not folder.exists()
    assert torch.equal(again.moments.outer_DD, expected.moments.outer_DD)


def test_features_of_some_images_are_kept_of_many(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 100)
    config, network = pictures(tmp_path), build_feature_network(own_network(tmp_path))
    found = find_reference(network, config, 16, None)
    assert found.moments.count == 298 and found.features_MD.shape == (100, 12)
    assert torch.equal(found.features_MD, find_reference(network, config, 16, None).features_MD)


def test_files_that_are_given(tmp_path):
    config, network = pictures(tmp_path), build_feature_network(own_network(tmp_path))
    sha256 = open_source(config.data).fingerprint
    found = find_reference(network, config, 16, sha256)
    [path] = (tmp_path / "references").glob("*.safetensors")
    shared = path.rename(tmp_path / "shared.safetensors")
    nowhere = dataclasses.replace(config, data=dataclasses.replace(config.data, source=None, latents="latents"))
    assert find_reference(network, nowhere, 16, sha256, [shared]).pedigree == found.pedigree
    assert not kept(config)
    with pytest.raises(ConfigError, match=r"data\.source = null, .*--reference FILE"):
        find_reference(network, nowhere, 16, sha256)
    with pytest.raises(InputError, match=r"pixels along a side 16 there, 8 here .*pictures\.parquet.*: give another"):
        find_reference(network, config, 8, sha256, [shared])
    with pytest.raises(InputError, match=rf"SHA-256 of the images {sha256[:12]} there, 0123"):
        find_reference(network, config, 16, "0123", [shared])
    other = build_feature_network(own_network(tmp_path, 3.0))
    with pytest.raises(InputError, match=r"--reference .*shared\.safetensors: none is of the features of .*coarse_3"):
        find_reference(other, config, 16, sha256, [shared])
    with pytest.raises(InputError, match="no such reference"):
        load_reference(tmp_path / "none.safetensors")
    shared.write_bytes(shared.read_bytes()[:500])
    with pytest.raises(InputError, match="torn, or no reference"):
        load_reference(shared)


def test_images_that_have_changed_since_training(tmp_path):
    config, network = pictures(tmp_path), build_feature_network(own_network(tmp_path))
    sha256 = open_source(config.data).fingerprint
    write_parquet(tmp_path / "pictures.parquet", 20)
    with pytest.raises(InputError, match=rf"are not those that the run was trained on \({sha256[:12]}\)"):
        find_reference(network, config, 16, sha256)
    assert not kept(config)


def test_too_many_broken_images(tmp_path):
    config, network = pictures(tmp_path, max_skipped=1), build_feature_network(own_network(tmp_path))
    with pytest.raises(InputError, match=r"more than data\.max_skipped = 1 broken images: picture_0003"):
        find_reference(network, config, 16, None)


def test_a_slice_of_the_digits(tmp_path):
    config = tiny_run(tmp_path, f"evaluation.references={tmp_path / 'references'}", "data.split=train[80%:]")
    network = build_feature_network("digits")
    found = find_reference(network, config, 8, None)
    expected = Moments.of(network(load_digits()[0][1438:]).features_BD)
    assert found.moments.count == 359 and torch.allclose(found.moments.sum_D, expected.sum_D, rtol=1e-6)
    assert found.described["source_sha256"] == digits_sha256("train[80%:]") != digits_sha256()
    whole = tiny_run(tmp_path, f"evaluation.references={tmp_path / 'references'}")
    assert find_reference(network, whole, 8, None).moments.count == 1797


def test_digits(tmp_path):
    config = tiny_run(tmp_path, f"evaluation.references={tmp_path / 'references'}")
    found = find_reference(build_feature_network("digits"), config, 8, digits_sha256())
    assert found.moments.count == len(found.features_MD) == len(load_digits()[0]) == 1797
    [path] = (tmp_path / "references").glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["madformer"])
    assert described.pop("xxh3")
    assert described == found.described and described["network"]["label"] == "digits"
