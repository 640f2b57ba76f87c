"""The embedded digits."""

import torch

from madformer.data.digits import load_digits


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
