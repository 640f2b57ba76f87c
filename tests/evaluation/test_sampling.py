"""Samples in batches: what one batch leaves to the next, and the last one."""

from dataclasses import replace

import pytest
import torch

from madformer.config import load_experiment
from madformer.diffusion.samplers import build_sampler
from madformer.evaluation import sampling as module
from madformer.evaluation.measurement import Sampling
from madformer.evaluation.sampling import sample_batches
from madformer.model import MADFormer
from madformer.model.embedding import to_image
from madformer.model.generation import BlockSampler, generate
from madformer.randomness import sample_seed
from tests.conftest import ROOT, TEXT, prompts


@pytest.fixture
def run(monkeypatch):
    """Samples `count` images in batches of 3; the samples, the sizes of batches, and the samplers that were made."""
    config = load_experiment(ROOT / "experiments" / "digits.yaml", ["evaluation.batch_size=3"])
    torch.manual_seed(0)
    config = replace(config, model=replace(config.model, text=TEXT))
    model, made, text_BT = MADFormer(config.model).eval(), [], prompts(config.model, batch=8)

    class Counted(BlockSampler):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self.images)

    monkeypatch.setattr(module, "BlockSampler", Counted)

    def sample(count, fills):
        monkeypatch.setattr(module, "_fills_batches", lambda device: fills)
        sizes, budget = [], Sampling.of_steps(config, 2)
        made.clear()
        batches = sample_batches(
            model,
            config,
            budget,
            range(count),
            text_BT[:count],
            on_block=lambda block, x: sizes.append(len(x)) if not block else None,
        )
        return torch.cat(list(batches)), sizes, list(made)

    sample.model, sample.config, sample.text_BT = model, config, text_BT
    return sample


def test_batches_share_a_sampler_and_the_last_is_filled_up_where_sizes_are_costly(run):
    plain, sizes, made = run(8, fills=False)
    assert len(plain) == 8 and sizes == [3, 3, 2] and made == [3, 2]
    filled, sizes, made = run(8, fills=True)
    assert sizes == [3, 3, 3] and made == [3]
    sampler = build_sampler(run.config.diffusion, run.config.model.prediction_type)
    seeds = [sample_seed(run.config.evaluation.seed, index) for index in (6, 7, 7)]
    assert torch.equal(filled[:6], plain[:6])
    assert torch.equal(filled[6:], to_image(generate(run.model, sampler, 2, seeds=seeds, text=run.text_BT[[6, 7, 7]]))[:2])
    torch.testing.assert_close(filled, plain, rtol=1e-4, atol=1e-4)
    alone, sizes, made = run(2, fills=True)
    assert sizes == [2] and made == [2]
    torch.testing.assert_close(alone, plain[:2], rtol=1e-4, atol=1e-4)
