"""Fewer images at once, and tiles, where memory does not suffice."""

import logging

import pytest
import torch

from madformer.data.codec import build_codec
from tests.data.vaes import images_of


def test_fewer_images_at_once_where_memory_does_not_suffice(custom_codecs, caplog):
    codec, enough = build_codec("mine.py:Small"), build_codec("mine.py:Plain")
    images = images_of((16, 16), batch=9)
    sizes = codec._autoencoder.sizes
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            mean, deviation = codec.encode(images)
            assert torch.equal(mean, enough.encode(images)[0]) and not deviation.any()
    assert sizes == [9, 4, 2, 2, 2, 2, 1, 2, 2, 2, 2, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "codec mine.py:Small: memory does not suffice to encode 9 images at once: from now on 2 at once"
    ]
    sizes.clear()
    assert torch.equal(codec.decode(mean), enough.decode(mean)) and sizes == [9, 4, 2, 2, 2, 2, 1]
    sizes.clear()
    codec.encode(images_of((8, 8), batch=8))  # smaller images are another matter
    assert sizes == [8]


def test_a_single_image_too_large(custom_codecs, caplog):
    codec = build_codec("mine.py:Small")
    with pytest.raises(torch.OutOfMemoryError, match="small device"):
        codec.encode(images_of((32, 32)))
    assert codec._autoencoder.sizes == [2, 1] and not caplog.records


def test_tiles_where_memory_does_not_suffice_for_one_image(custom_codecs, caplog):
    codec = build_codec("mine.py:Tiled")
    vae = codec._autoencoder.vae
    images = images_of((64, 64))
    mean, deviation = codec.encode(images)
    assert mean.shape == deviation.shape == (2, 4, 8, 8) and not vae.use_tiling
    vae.enable_tiling()
    with torch.no_grad():
        expected = torch.cat([vae.encode(image[None]).latent_dist.mean for image in images])
    vae.disable_tiling()
    assert torch.equal(mean, expected) and torch.equal(codec.encode(images)[0], expected)
    assert len(caplog.records) == 1 and "from now on 1 at once, in overlapping tiles" in caplog.text
    codec.encode(images_of((32, 32), batch=1))
    assert codec.decode(mean).shape == images.shape and "to decode 2 images" in caplog.text


def test_no_call_is_repeated_where_memory_suffices(custom_codecs):
    codec = build_codec("mine.py:Small")
    codec.encode(images_of((16, 16)))
    assert codec._autoencoder.sizes == [2]
