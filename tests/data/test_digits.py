"""The embedded digits."""

import re

import pytest
import torch

from madformer.data.sources import load_digits
from madformer.errors import ConfigError


def test_digits_are_whole_and_scaled():
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert labels.shape == (1797,) and labels.dtype == torch.int64
    assert images.min() == -1 and images.max() == 1
    assert torch.equal(images * 8, (images * 8).round())
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_images_belong_to_their_labels():
    images, labels = load_digits()
    assert labels[:10].tolist() == list(range(10))
    zero, one = images[labels == 0].mean(0)[0], images[labels == 1].mean(0)[0]
    centre = (slice(3, 5), slice(3, 5))
    assert zero[centre].mean() < -0.5 < 0.5 < one[centre].mean()  # a hole against a stroke


def test_digits_are_loaded_once():
    assert load_digits()[0] is load_digits()[0]


def test_slices_of_the_digits():
    images, labels = load_digits()
    parts = [load_digits(split) for split in ("train[:90%]", "train[90%:]")]
    assert [len(part) for part, _ in parts] == [1617, 180]
    for whole, pieces in ((images, [part for part, _ in parts]), (labels, [part for _, part in parts])):
        assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(load_digits("train[-5:]+train[:2]")[1], torch.cat([labels[-5:], labels[:2]]))


@pytest.mark.parametrize("split", ["test", "train[", "train[:200%]", "train[7:7]"])
def test_no_such_part_of_the_digits(split):
    with pytest.raises(ConfigError, match=rf"^data\.split = '{re.escape(split)}': .*must be train or a slice of it"):
        load_digits(split)
