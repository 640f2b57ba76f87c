"""Work on a device, counted without one: kernels, and every wait of the host.

Budgets are what the code needs today. One that is exceeded is a regression; lower it when the code gets better.
"""

from dataclasses import replace

import pytest
import torch

from madformer.config import load_experiment
from madformer.data.codec import build_codec
from madformer.data.encode import encode, encode_share
from madformer.data.latents import read_encoding, write_encoding
from madformer.diffusion.samplers import build_sampler
from madformer.evaluation.feature_cache import SampleRequest, sample_features
from madformer.evaluation.feature_networks import build_feature_network
from madformer.evaluation.measurement import Sampling
from madformer.model import MADFormer
from madformer.model.generation import generate
from madformer.parallel import Share
from tests.conftest import ROOT
from tests.fake_gpu import CUDA, Operators, fake_gpu
from tests.pictures import experiment, write_parquet

needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="needs a CUDA build of torch (no card): CONTRIBUTING.md"
)


def build(config, device):
    """The model on a fake device, without initial values: random numbers would be asked of a card."""
    with torch.device("meta"):
        return MADFormer(config).to_empty(device=device)


def denoising_step(model, config, device, images):
    """Operators of a denoising step of one block: of generating with two steps a block, less those with one."""
    sampler = build_sampler(config.diffusion, config.model.prediction_type)
    shape = (images, config.model.ar_length, config.model.latent_channels, config.model.block_size, config.model.block_size)
    noise_BLCYX, counts = torch.randn(shape, device=device), []
    for steps in (1, 2):
        with Operators() as operators:
            generate(model, sampler, steps, initial_noise_BLCYX=noise_BLCYX)
        counts.append(operators)
    extra = [sum(counter.values()) for counter in (counts[1].kernels - counts[0].kernels, counts[1].syncs)]
    return extra[0] / config.model.ar_length, extra[1]


def test_kernels_of_a_denoising_step():
    config = load_experiment(ROOT / "experiments/digits.yaml")
    with fake_gpu() as device:
        model = build(config.model, device)
        kernels, syncs = denoising_step(model, config, device, images=2)
    assert syncs == 0
    assert kernels <= 274


def test_syncs_of_an_evaluation(tmp_path):
    """Four for each batch: its samples, its images and its features are finite, and the features go to the host."""
    config = load_experiment(ROOT / "experiments/digits.yaml", ["evaluation.batch_size=2"])
    network, codec = build_feature_network("digits"), build_codec("pixels")
    request = SampleRequest(config, Sampling.of_nfe(config, config.evaluation.nfe[0]), [""] * 6, "title")
    with fake_gpu() as device:
        model = build(config.model, device)
        with Operators() as operators:
            sample_features(tmp_path, request, model, codec.to(device), [network.to(device)], range(6), lambda _: None)
    assert sum(operators.syncs.values()) == 3 * 4


def test_syncs_of_encoding(tmp_path):
    """Two for each batch: means and deviations go to the host, and are looked at there."""
    write_parquet(tmp_path / "pictures.parquet", rows=6)
    config = experiment(tmp_path, latents=tmp_path / "latents", codec_batch_size=2)
    encode(config)
    encoding = read_encoding(tmp_path / "latents")
    data = replace(config.data, latents=str(tmp_path / "again"))
    write_encoding(tmp_path / "again", encoding)
    with fake_gpu() as device, Operators() as operators:
        encode_share(Share(0, 1, str(device), lambda _: None), data, encoding)
    assert operators.syncs == {"aten::_to_copy": 3 * 2}


@needs_cuda_build
def test_kernels_of_a_denoising_step_at_the_paper_s_size():
    """Eager and in bfloat16; it was 774, of which 177 casts. Compiled layers have fewer, a graph launches all at once."""
    config = load_experiment(ROOT / "experiments/ffhq1024.yaml", ["model.attention_backend=sdpa", "model.compile=false"])
    with fake_gpu(CUDA) as device, torch.autocast("cuda", torch.bfloat16):
        model = build(config.model, device)
        model.prepare_for_sampling(torch.bfloat16)
        kernels, syncs = denoising_step(model, config, device, images=8)
    assert not syncs
    assert kernels <= 557
