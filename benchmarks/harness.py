"""Model sizes, options and the table of the benchmarks of sampling and training."""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import Setup, Side, matmul_rate
from madformer.config import ModelConfig, UNetConfig, load_experiment
from madformer.errors import ConfigError

GOAL = 0.9
"""Goal of the wall-clock ratio, as a share of the FLOPs ratio."""

_NARROW = UNetConfig(channels=(64, 128), layers=(1, 1), attention=(False, False))
_EXPERIMENTS = Path(__file__).parents[1] / "experiments"

SIZES = {
    "digits": load_experiment(_EXPERIMENTS / "digits.yaml").model,
    "small": ModelConfig(
        latent_size=16, depth=6, diffusion_depth=3, ar_length=4, width=192, num_heads=3, ffn_width=768, unet=_NARROW
    ),
    "middle": ModelConfig(
        latent_size=32, depth=12, diffusion_depth=6, ar_length=4, width=384, num_heads=6, ffn_width=1536, unet=_NARROW
    ),
    "imagenet256": replace(load_experiment(_EXPERIMENTS / "imagenet256.yaml").model, text=None),
    "ffhq1024": load_experiment(_EXPERIMENTS / "ffhq1024.yaml").model,
}
"""Sizes from the digits experiment to the paper's full models (ImageNet's without its text)."""

TOO_LARGE_FOR_CPU = ("imagenet256", "ffhq1024")
"""On a CPU the FLOPs of these sizes are counted, but nothing runs."""


# ---- options


def options(description: str, batch: int) -> argparse.ArgumentParser:
    """The options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="middle", help="model size")
    parser.add_argument("--diffusion-depth", type=int, default=None, help="layers of the diffusion stage; None: the size's own")
    parser.add_argument("--batch", type=positive, default=batch, help="images at once")
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs of each side, interleaved")
    parser.add_argument("--device", choices=("cpu", "cuda", "meta"), default="cpu", help="meta: count FLOPs, run nothing")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the compute; weights stay float32"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile each layer, on both sides")
    return parser


def positive(text: str) -> int:
    """An option that is an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Setup]:
    """Read the options; a mistake ends the program with one line."""
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none here; take cpu or meta")
    if given.device == "cpu" and given.size in TOO_LARGE_FOR_CPU:
        print(f"{given.size} is counted, not run: it does not fit a CPU")
        given.device = "meta"
    try:
        config = sized(given.size, given.diffusion_depth)
    except ConfigError as error:
        parser.error(str(error))
    config = replace(config, compile=given.compile and given.device != "meta")
    return given, Setup(config, torch.device(given.device), getattr(torch, given.dtype))


def sized(size: str, diffusion_depth: int | None = None) -> ModelConfig:
    """The configuration of a named size."""
    config = SIZES[size]
    return config if diffusion_depth is None else replace(config, diffusion_depth=diffusion_depth)


# ---- reporting


def header(setup: Setup, what: str) -> str:
    """Versions and hardware, and what runs."""
    c, device = setup.config, setup.device
    parts = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    elif device.type == "cpu":
        parts += [cpu_name(), f"{torch.get_num_threads()} threads of {os.cpu_count()} CPUs"]
    parts += [device.type, _name(setup.dtype), "compiled" if c.compile is True else "eager"]
    depth = f"{c.depth} layers, {c.diffusion_depth} of them in the diffusion stage"
    return f"{' | '.join(parts)}\n{depth}, width {c.width}, {c.ar_length} blocks of {c.block_tokens} tokens, {what}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def report(setup: Setup, sides: dict[str, Side], tokens: int, unit: str) -> str:
    """The table with a line for each side, and for each baseline a line with its time and FLOPs divided by ours."""
    lines = []
    if setup.runs:
        rate = matmul_rate(setup.device, setup.dtype)
        lines = [f"matmul rate: {rate / 1e12:.3f} TFLOP/s in {_name(setup.dtype)} = 100 % MFU", ""]
        heads = [f"s/{unit}", "least", "tokens/s", "TFLOP", "TFLOP/s", "MFU", "MiB"]
        rows = [(name, _cells(side, tokens, rate)) for name, side in sides.items()]
    else:
        heads, rows = ["TFLOP"], [(name, [f"{side.flops / 1e12:.4f}"]) for name, side in sides.items()]
    lines += table(heads, rows)
    if setup.runs:
        what = "CUDA's allocator" if setup.device.type == "cuda" else "tensors alive at once, without kernels' scratch memory"
        lines.append(f"MiB: peak over what was there before the {unit} ({what})")
    return "\n".join([*lines, "", *_ratios(sides)])


def _cells(side: Side, tokens: int, rate: float) -> list[str]:
    achieved = side.flops / side.median
    memory = "-" if side.peak_bytes is None else f"{side.peak_bytes / 2**20:.0f}"
    return [
        f"{side.median:.4f}",
        f"{min(side.seconds):.4f}",
        f"{tokens / side.median:.0f}",
        f"{side.flops / 1e12:.4f}",
        f"{achieved / 1e12:.3f}",
        f"{achieved / rate:.0%}",
        memory,
    ]


def table(heads: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    first = max(len(name) for name, _ in rows)
    widths = [max(len(head), *(len(cells[i]) for _, cells in rows)) for i, head in enumerate(heads)]

    def line(name: str, cells: Sequence[str]) -> str:
        return "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])

    return [line("", heads), *(line(name, cells) for name, cells in rows)]


def _ratios(sides: dict[str, Side]) -> list[str]:
    (_, ours), *baselines = sides.items()
    lines = []
    for name, side in baselines:
        flops = side.flops / ours.flops
        line = f"{name} / ours: {flops:.3f} in FLOPs"
        if side.seconds:
            wall = side.median / ours.median
            verdict = "reached" if wall >= GOAL * flops else "NOT reached"
            least = min(side.seconds) / min(ours.seconds)
            line += f", {wall:.3f} in seconds = {wall / flops:.0%} of it ({GOAL:.0%} {verdict}); least over least {least:.3f}"
        lines.append(line)
    return lines
