"""The order of samples is a function of seed and step, whatever the number of devices."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madformer.errors import ConfigError
from madformer.randomness import BatchSampler, BatchShard, SampleOrder


def stream(samples, batch_size, limit, world_size, steps, first_step=0):
    """Samples of each step over all devices, by index in the global batch."""
    order = SampleOrder(samples, batch_size, seed=3)
    found: dict[tuple[int, int], int] = {}
    for rank in range(world_size):
        shard = BatchShard.of(batch_size, limit, rank, world_size)
        for batch in itertools.islice(BatchSampler(order, shard, first_step), steps * shard.accumulation):
            for index, sample in zip(batch.indices, batch.samples.tolist(), strict=True):
                assert (batch.step, index) not in found
                found[batch.step, index] = sample
    return found


@given(
    st.integers(5, 60),
    st.sampled_from([4, 8, 12]),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 9),
)
def test_the_global_order_does_not_depend_on_devices_accumulation_or_restarts(
    samples, batch_size, limit, world_size, first_step
):
    whole = stream(samples, batch_size, None, 1, steps=12)
    parts = stream(samples, batch_size, limit, world_size, steps=12 - first_step, first_step=first_step)
    assert parts == {key: sample for key, sample in whole.items() if key[0] >= first_step}


def test_every_epoch_has_every_sample_once_in_another_order():
    found = stream(samples=10, batch_size=4, limit=None, world_size=2, steps=5)
    flat = [found[key] for key in sorted(found)]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_micro_batches_are_equal_and_as_large_as_allowed():
    assert BatchShard.of(64, None, 0, 1) == BatchShard(64, 1, 0, 1)
    assert BatchShard.of(64, 24, 1, 2) == BatchShard(16, 2, 1, 2)
    assert BatchShard.of(7, 3, 0, 1) == BatchShard(1, 7, 0, 1)
    message = "data.batch_size = 9: must be a multiple of the 2 devices"
    with pytest.raises(ConfigError, match=re.escape(message)):
        BatchShard.of(9, None, 0, 2)
