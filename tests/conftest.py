import contextlib
import itertools
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from madformer.config import ModelConfig, TextConfig, UNetConfig
from madformer.model import MADFormer

ROOT = Path(__file__).parents[1]

# Before anything imports the libraries of the hub, here or in a child: no test asks it, and none writes into the home folder.
HUB = tempfile.TemporaryDirectory(prefix="madformer-tests-")
os.environ |= {"HF_HOME": HUB.name, "HF_HUB_OFFLINE": "1"}

# A shell lets what it starts in the background ignore interrupts, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

TEXT = TextConfig(vocab_size=11, length=3, pad_token_id=0)
SWITCHES = [
    {"use_clean_blocks": clean, "use_condition": condition, "local_denoising": local, "parameter_sets": sets, "text": text}
    for clean, condition, local, sets, text in itertools.product(
        (True, False), (True, False), (False, True), ("separate", "shared"), (None, TEXT)
    )
]

# Shrinking a failing example of a model that takes a second may take minutes: not in CI.
PHASES = [phase for phase in Phase if not (phase is Phase.shrink and os.environ.get("CI"))]
settings.register_profile("madformer", deadline=None, derandomize=True, max_examples=25, phases=PHASES)
settings.load_profile("madformer")


def switch_name(switches: dict[str, Any]) -> str:
    words = [
        name if value is True else str(value) for name, value in switches.items() if isinstance(value, str) or value is True
    ]
    return "-".join(words + (["text"] if switches.get("text") else []))


def tiny(**changes: Any) -> ModelConfig:
    """A model of a few thousand parameters with every part: four blocks of 4 x 4 latents, 2 x 2 tokens each."""
    unet = UNetConfig(channels=(8, 16), layers=(1, 1), attention=(False, True), groups=4, num_heads=2, time_embed_dim=8)
    sizes = {"latent_channels": 2, "latent_size": 8, "ar_length": 4, "depth": 3, "diffusion_depth": 2}
    widths = {"width": 16, "num_heads": 2, "ffn_width": 24, "unet": unet}
    return ModelConfig(**{**sizes, **widths, **changes})


def build(config: ModelConfig, seed: int = 0) -> MADFormer:
    """The model in float64 with all its parameters perturbed, so that none is zero or one."""
    torch.manual_seed(seed)
    model = MADFormer(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def latents(config: ModelConfig, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, config.ar_length, config.latent_channels, config.block_size, config.block_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def timesteps(config: ModelConfig, batch: int = 2, seed: int = 2) -> torch.Tensor:
    return torch.randint(1000, (batch, config.ar_length), generator=torch.Generator().manual_seed(seed))


def prompts(config: ModelConfig, batch: int = 2, seed: int = 3) -> torch.Tensor | None:
    if config.text is None:
        return None
    return torch.randint(1, config.text.vocab_size, (batch, config.text.length), generator=torch.Generator().manual_seed(seed))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is slow, unless it is asked for, and what needs a GPU, where there is none."""
    cuda = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("cuda") and not cuda:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; `make test-gpu` where there is one"))
        if item.get_closest_marker("slow") and not os.environ.get("SLOW"):
            item.add_marker(pytest.mark.skip(reason="slow: SLOW=1 runs it"))


@contextlib.contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """FLOPs of what runs within, on the CPU: for tiny models in a third of the seconds that the meta device takes."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the counter knows no other of the CPU
        yield counter


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors: threads cost more than they bring, and the tests themselves run side by side."""
    torch.set_num_threads(1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub that cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"
