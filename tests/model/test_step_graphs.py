"""Denoising steps as CUDA graphs, as far as a CPU can show it: replayed operators, kept buffers, no waiting for the GPU."""

import functools
import logging
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from madformer.config import DiffusionConfig
from madformer.config.evaluation import SamplerName
from madformer.diffusion.samplers import build_sampler
from madformer.model import MADFormer
from madformer.model.generation import BlockSampler, StepGraphs, generate
from tests.conftest import TEXT, build, latents, prompts, tiny
from tests.fake_gpu import FakeTensor, Operators, fake_gpu

SAMPLERS = get_args(SamplerName)
STEPS = 5
DEVICE = torch.device("cpu")


class Tape(TorchDispatchMode):
    """Records operators with every Python number in them, and runs the same ones again on the same tensors: as a graph does."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.autocast("cpu", enabled=False)  # the casts are recorded
    def replay(self):
        """Results go where they went when recorded."""
        made = {}
        for func, args, kwargs, recorded in self.calls:
            args, kwargs = tree_map(lambda x, made=made: made.get(id(x), x), (args, kwargs))
            result = func(*args, **kwargs)
            pairs = zip(recorded, result, strict=True) if isinstance(recorded, (tuple, list)) else [(recorded, result)]
            made |= {id(before): after for before, after in pairs if isinstance(before, Tensor)}
        self.output.copy_(made.get(id(self.output), self.output))


class Tapes(StepGraphs):
    """Graphs that a CPU can replay."""

    def __init__(self):
        super().__init__(DEVICE)
        self.captures = 0

    def _aside(self, call):
        return call()

    def _capture(self, call):
        self.captures += 1
        with Tape() as tape:
            tape.output = call()
        return tape.replay, tape.output


def taped(*arguments):
    sampler = BlockSampler(*arguments)
    sampler.graphs = Tapes()
    return sampler


CASES = {
    "plain": ({}, {}),
    "guided": ({"text": TEXT}, {"guidance": 3.0, "guidance_interval": (300, 700)}),
    "guided without clean blocks": (
        {"text": TEXT, "use_clean_blocks": False},
        {"guidance": 3.0, "guidance_interval": (300, 700)},
    ),
    "local": ({"local_denoising": True}, {}),
    "no condition": ({"use_condition": False}, {}),
    "true blocks": ({"use_clean_blocks": False}, {}),
}


@pytest.mark.parametrize(("name", "case"), [*(("ddim", case) for case in CASES), *((name, "guided") for name in SAMPLERS[1:])])
def test_replayed_steps_and_kept_buffers_change_no_sample(name, case):
    """A number of an earlier step or batch, kept in place of a tensor, would show in the samples."""
    switches, steps = CASES[case]
    config = tiny(**switches)
    model, scheduler = build(config), build_sampler(DiffusionConfig(), "sample", name)
    make_sampler = functools.lru_cache(maxsize=1)(taped)
    for number in (1, 2):
        options = {"seeds": [number, number + 5], "text": prompts(config, seed=number), **steps}
        if case == "true blocks":
            options["context_BLCYX"] = latents(config, seed=number)
        expected = generate(model, scheduler, STEPS, **options)
        assert torch.equal(generate(model, scheduler, STEPS, make_sampler=make_sampler, **options), expected)
    guided = 1 + ("guidance" in steps)
    noisy_context = "without clean" in case  # the last step of all blocks but the last has rows of its own: captured in batch 2
    assert make_sampler.cache_info().misses == 1
    sampler = make_sampler(model, 2, 3 if config.text else 0, steps.get("guidance", 1.0), torch.float64, None)
    assert sampler.graphs.captures == config.ar_length * guided + (config.ar_length - 1) * noisy_context


def test_replays_under_autocast_are_those_of_the_same_operators():
    model, scheduler = build(tiny()).float(), build_sampler(DiffusionConfig(), "sample")
    make_sampler = functools.lru_cache(maxsize=1)(taped)
    for seed in (1, 2):  # what autocast keeps of the first is gone in the second
        with torch.autocast("cpu", torch.bfloat16):
            expected = generate(model, scheduler, STEPS, seeds=[seed])
            assert torch.equal(generate(model, scheduler, STEPS, seeds=[seed], make_sampler=make_sampler), expected)


def test_other_sizes_and_guidance_take_other_buffers():
    model, scheduler = build(tiny(text=TEXT)), build_sampler(DiffusionConfig(), "sample")
    make_sampler = functools.lru_cache(maxsize=1)(taped)
    for images, guidance in ((2, 1.0), (3, 1.0), (3, 2.0), (2, 2.0)):
        options = {"seeds": range(images), "text": prompts(model.config, images), "guidance": guidance}
        sampled = generate(model, scheduler, 3, make_sampler=make_sampler, **options)
        assert torch.equal(sampled, generate(model, scheduler, 3, **options))
    assert make_sampler.cache_info().misses == 4


def test_steps_that_cannot_be_captured_run_as_they_are(caplog):
    class Failing(Tapes):
        def _capture(self, call):
            call()
            raise RuntimeError("operation not permitted when stream is capturing")

    def make_sampler(*arguments):
        sampler = BlockSampler(*arguments)
        sampler.graphs = Failing()
        return sampler

    model, scheduler = build(tiny()), build_sampler(DiffusionConfig(), "sample")
    with caplog.at_level(logging.WARNING):
        sampled = generate(model, scheduler, STEPS, seeds=[1], make_sampler=make_sampler)
    assert torch.equal(sampled, generate(model, scheduler, STEPS, seeds=[1]))
    assert [record.message for record in caplog.records] == [
        "CUDA graphs are off, sampling is slower without: a step cannot be captured "
        "(operation not permitted when stream is capturing)"
    ]


def test_graphs_are_for_evaluation_on_cuda():
    model = build(tiny())
    assert BlockSampler(model.eval(), 1, 0, 1.0, torch.float64).graphs is None


class Waits(Operators):
    """Counts copies to the GPU too: from memory that is not pinned, they wait for all that was launched before."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, result = func.name().partition(".")[0], super().__torch_dispatch__(func, types, args, kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            target, source = (result, args[0]) if name == "aten::_to_copy" else args[:2]
            if isinstance(target, FakeTensor) and not isinstance(source, FakeTensor):
                self.syncs[f"{name} to the GPU"] += 1
        return result


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_waits_for_the_gpu(name):
    """But for DDPM's: its noise is drawn on the CPU, so that samples are the same on every device."""
    config, counts = tiny(text=TEXT, ar_length=1), {}
    scheduler = build_sampler(DiffusionConfig(), "sample", name)
    with fake_gpu() as device:
        with torch.device(device):
            model = MADFormer(config)
        text = torch.ones(2, 3, dtype=torch.long, device=device)
        for steps in (3, 5):
            with Waits() as counts[steps]:
                generate(model, scheduler, steps, seeds=[1, 2], text=text, guidance=2.0, guidance_interval=(300, 900))
    waits = counts[5].syncs - counts[3].syncs
    assert waits == ({"aten::_to_copy to the GPU": 2} if name == "ddpm" else {})
