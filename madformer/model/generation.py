"""Sampling block by block, with keys and values in buffers allocated once.

A layer's buffer has room for the text and every block, in the order of the sequence. Block i has a slot in it. Each of its
denoising steps overwrites the keys and values there. A query sees the slice up to the slot's end, so there is no mask and
nothing is concatenated. At last the clean tower overwrites the slot. Without clean blocks it keeps the keys and values of the
last denoising step. In a layer of local denoising all blocks use one slot after the text.

On CUDA the network call of a denoising step is the launch of one CUDA graph. Its inputs are in buffers too.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Hashable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from madformer.config import ModelConfig
from madformer.model.attention import Towers, sdpa
from madformer.model.embedding import Skips, null_text, to_blocks
from madformer.model.layer import autocast_dtype
from madformer.model.layer_plan import embedded_block_count, layer_plans
from madformer.model.madformer import MADFormer

_log = logging.getLogger(__name__)


@torch.no_grad()
def generate(
    model: MADFormer,
    scheduler: Any,
    steps: int,
    *,
    batch_size: int | None = None,
    seeds: Sequence[int] | None = None,
    initial_noise_BLCYX: Tensor | None = None,
    context_BLCYX: Tensor | None = None,
    text: Tensor | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    diffusion_depth: int | None = None,
    on_block: Callable[[int, Tensor], None] | None = None,
    make_sampler: Callable[..., BlockSampler] | None = None,
) -> Tensor:
    """Sample images, block by block.

    Args:
        model: samples on its device, in its dtype or autocast's. In evaluation mode on CUDA, steps run as CUDA graphs.
        scheduler: any diffusers scheduler with the model's prediction type. Its timesteps are set anew for every block.
        steps: denoising steps per block, as the scheduler counts them. NFE = (N - D) + D * calls of the network. There is one
            call per step; schedulers of higher order make more (Heun: 2 * steps - 1).
        batch_size: number of images; None: that of the seeds, noise, context or text.
        seeds: one for each image. An image depends on no other seed, and its noise does not depend on the number of blocks.
        initial_noise_BLCYX: noise that the blocks start from; None: it is drawn.
        context_BLCYX: clean latents of true images (teacher forcing): block i is generated after the true blocks < i, not the
            generated ones. Without clean blocks, a true block is read at the last timestep, in the noise it started from.
        text: token ids [B, T]; None: the null text.
        guidance: scale of classifier-free guidance; 1 is none. Needs text.
        guidance_interval: lowest and highest timestep at which guidance acts; None: all.
        diffusion_depth: layers that iterate (D), one of an elastic run's depths; None: the configuration's.
        on_block: called with (i, latents [B, L, C, Y, X]) after block i; later blocks are still zero. The latents are still
            being written, perhaps by a GPU: copy them to keep them.
        make_sampler: None: `BlockSampler`. A shared `functools.lru_cache(maxsize=1)(BlockSampler)` keeps buffers and graphs.

    Returns:
        Latents [B, L, C, Y, X]; `embedding.to_image` assembles them.

    Raises:
        ValueError: another prediction type, timesteps outside the schedule, sizes that do not fit, or guidance without text.
    """
    _check_scheduler(model, scheduler, steps)
    _check_guidance(model, text, guidance, guidance_interval)
    inputs = {"initial_noise_BLCYX": initial_noise_BLCYX, "context_BLCYX": context_BLCYX}
    _check_blocks(model, **inputs)
    batch = _batch_size(batch_size, seeds=seeds, **inputs, text=text)
    generators = None if seeds is None else [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    noise_BLCYX = _initial_noise(model, batch, generators, initial_noise_BLCYX)
    latents_BLCYX = torch.zeros_like(noise_BLCYX)
    past_BLCYX = latents_BLCYX if context_BLCYX is None else context_BLCYX.to(latents_BLCYX)
    dtype = autocast_dtype(model.boi_SD.device, model.boi_SD.dtype)
    sampler = (make_sampler or BlockSampler)(model, batch, _text_tokens(model, text), guidance, dtype, diffusion_depth)
    sampler.start_images(scheduler, text, guidance_interval)
    options = {"generator": generators} if generators and "generator" in inspect.signature(scheduler.step).parameters else {}
    for block in range(model.config.ar_length):
        sampler.set_timesteps(steps)
        sampler.start_block(block, past_BLCYX[:, block - 1] if block else None)
        x_BCYX = noise_BLCYX[:, block] * scheduler.init_noise_sigma
        for index, t in enumerate(scheduler.timesteps):
            prediction_BCYX = sampler.predict(scheduler.scale_model_input(x_BCYX, t), index)
            step = scheduler.step(prediction_BCYX.to(x_BCYX.dtype), t, x_BCYX, **options)
            x_BCYX = step.prev_sample.to(noise_BLCYX.dtype)
        latents_BLCYX[:, block] = x_BCYX
        if context_BLCYX is not None:
            sampler.replace_block(past_BLCYX[:, block], noise_BLCYX[:, block])
        if on_block:
            on_block(block, latents_BLCYX)
    return latents_BLCYX


class BlockSampler:
    """Runs the network for `generate`, with the cache and the network's inputs in buffers allocated once.

    It samples batches of `images` images with `text_tokens` tokens of text at one guidance. Keys and values have `dtype`.
    """

    def __init__(
        self,
        model: MADFormer,
        images: int,
        text_tokens: int,
        guidance: float,
        dtype: torch.dtype,
        diffusion_depth: int | None = None,
        use_graphs: bool = True,
    ) -> None:
        config, device = model.config.at_depth(diffusion_depth), model.boi_SD.device
        self.model, self.config, self.guidance, self.images = model, config, guidance, images
        self.rows = images if guidance == 1 else 2 * images
        self.plans = layer_plans(config, frozenset())
        self.ropes = model.ropes(device, text_tokens)
        self.cache = KeyValueCache(config, self.rows, text_tokens, device, dtype)
        self.t_B1 = torch.empty(self.rows, 1, device=device)
        self.condition_BSD = model.boi_SD.new_empty(self.rows, *model.boi_SD.shape) if config.use_condition else None
        # No graphs for a preview in training: weights change, and other threads use the GPU.
        self.graphs = StepGraphs(device) if use_graphs and device.type == "cuda" and not model.training else None

    def start_images(self, scheduler: Any, text: Tensor | None, interval: tuple[float, float] | None) -> None:
        """Begin a batch: fill the cache with its text.

        Args:
            interval: lowest and highest timestep at which guidance acts; None: all.
        """
        self.scheduler, self.interval = scheduler, interval
        if self.model.text is not None:
            self._extend("text", self.model.text.embedding(self._prompts(text)), block=0)

    def _prompts(self, text: Tensor | None) -> Tensor:
        """Token ids for all rows of the batch: the prompts, and with guidance as many null texts after them."""
        assert self.config.text is not None
        device = self.model.boi_SD.device
        prompts = null_text(self.config.text, self.images, device) if text is None else text.to(device)
        null = null_text(self.config.text, self.rows - self.images, device, length=prompts.shape[1])
        return torch.cat([prompts, null])

    def set_timesteps(self, steps: int) -> None:
        """Start the scheduler anew, and refuse timesteps that the model was never trained on."""
        # On the CPU: schedulers look up timesteps by value, and each look-up would wait for a GPU.
        self.scheduler.set_timesteps(steps)
        timesteps, end = self.scheduler.timesteps, self.scheduler.config.num_train_timesteps
        if bool(((timesteps < 0) | (timesteps >= end)).any()):
            outside = f"{steps} steps of this scheduler go from {timesteps.max()} to {timesteps.min()}"
            raise ValueError(f"scheduler.timesteps: {outside}, outside 0..{end - 1}; take another number of steps")

    def start_block(self, block: int, previous_BCYX: Tensor | None) -> None:
        """Run the clean tower on the previous block, then the AR stage. This fills the cache and `condition_BSD`."""
        self.block = block
        tokens_BSD = self.model.boi_SD.detach().expand(self.rows, -1, -1)
        if previous_BCYX is not None and embedded_block_count(self.config, frozenset()):
            t = self.scheduler.timesteps[-1] if self.config.clean_timestep == "released" else 0
            self.t_B1.fill_(float(t))
            tokens_BSD = self._for_all_rows(self._embed(previous_BCYX)[0])
            if "clean" in self.plans[0].keys:
                self._extend("clean", tokens_BSD, block - 1)
        if self.condition_BSD is not None:
            self.condition_BSD.copy_(self._extend("noise", tokens_BSD, block, last=self.config.ar_depth))

    def predict(self, noisy_BCYX: Tensor, index: int) -> Tensor:
        """The network's guided output for the noisy block at step `index`: its S tokens through the last D layers."""
        t = self.scheduler.timesteps[index]
        guided = self._is_guided(t)
        rows = self.rows if guided or self._fills_cache(index) else self.images
        self.t_B1.fill_(float(t))
        kind = (self.block, guided, rows)
        return self.graphs.run(self._denoise, noisy_BCYX, *kind) if self.graphs else self._denoise(noisy_BCYX, *kind)

    def _denoise(self, noisy_BCYX: Tensor, block: int, guided: bool, rows: int) -> Tensor:
        """The network call of a step. A graph repeats it, so everything that changes from step to step is in tensors."""
        tokens_BSD, skips = self._embed(noisy_BCYX)
        x_BSD = self._for_all_rows(tokens_BSD)[:rows]
        if self.condition_BSD is not None:
            x_BSD = x_BSD + self.condition_BSD[:rows]
        x_BSD = self._extend("noise", x_BSD, block, first=self.config.ar_depth)
        if not guided:
            return self._unembed(x_BSD[: self.images], skips)
        skips = tuple(torch.cat([skip, skip]) for skip in skips)
        prompted_BCYX, null_BCYX = self._unembed(x_BSD, skips).chunk(2)
        return null_BCYX + self.guidance * (prompted_BCYX - null_BCYX)

    def replace_block(self, true_BCYX: Tensor, noise_BCYX: Tensor) -> None:
        """Without clean blocks, let later blocks see the true block in place of the denoised one, at the last timestep."""
        last = len(self.scheduler.timesteps) - 1
        if self._fills_cache(last):
            alpha = self.scheduler.alphas_cumprod[int(self.scheduler.timesteps[last])]
            self.predict(alpha.sqrt() * true_BCYX + (1 - alpha).sqrt() * noise_BCYX, last)

    def _is_guided(self, t: Tensor) -> bool:
        return self.rows > self.images and (self.interval is None or self.interval[0] <= float(t) <= self.interval[1])

    def _fills_cache(self, index: int) -> bool:
        """Whether later blocks see the noisy block of this step (without clean blocks, the last step): all rows must run."""
        noisy_context = not (self.config.use_clean_blocks or self.config.local_denoising)
        is_last_block = self.block == self.config.ar_length - 1
        return noisy_context and not is_last_block and index == len(self.scheduler.timesteps) - 1

    def _extend(self, tower: str, x_BSD: Tensor, block: int, first: int = 0, last: int | None = None) -> Tensor:
        """Run a tower's tokens through those of layers first .. last - 1 that the plan runs it in, and fill the cache."""
        rope = self.ropes[tower]
        if tower != "text":
            rope = rope.part(block * self.config.block_tokens, (block + 1) * self.config.block_tokens)
        for layer in range(first, self.config.depth if last is None else last):
            if tower not in self.plans[layer].keys:
                break
            with_queries = tower in self.plans[layer].queries
            slot = self.cache.slot(layer, tower, block, rows=len(x_BSD), with_queries=with_queries)
            x_BSD = self.model.layers[layer]({tower: x_BSD}, {tower: rope}, slot).get(tower, x_BSD)
        return x_BSD

    def _embed(self, latents_BCYX: Tensor) -> tuple[Tensor, Skips]:
        return self.model.embed(latents_BCYX[:, None], self.t_B1[: len(latents_BCYX)])

    def _unembed(self, tokens_BSD: Tensor, skips: Skips) -> Tensor:
        return self.model.unembed(tokens_BSD, self.t_B1[: len(tokens_BSD)], skips)[:, 0]

    def _for_all_rows(self, x_BSD: Tensor) -> Tensor:
        return x_BSD if self.rows == self.images else torch.cat([x_BSD, x_BSD])


# ---- CUDA graphs


class StepGraphs:
    """Runs the network call of a step as a CUDA graph (torch.cuda.graph): the same kernels, in one launch.

    There is one graph for each kind of step. The first call of a kind runs without a graph, to set up libraries and compile
    layers. The second call is captured. A graph always uses the same memory, so inputs must be in buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._noisy_BCYX: Tensor | None = None
        self._graphs: dict[Hashable, tuple[Callable[[], None], Tensor] | None] = {}
        self._pool: Any = None
        self._failed = False

    def run(self, step: Callable[..., Tensor], noisy_BCYX: Tensor, *kind: Hashable) -> Tensor:
        """Run `step(noisy_BCYX, *kind)`, and return its result.

        Args:
            step: a function whose result depends only on its arguments and on buffers.
            kind: what decides the kernels; there is one graph for each.
        """
        if self._failed:
            return step(noisy_BCYX, *kind)
        self._noisy_BCYX = torch.empty_like(noisy_BCYX) if self._noisy_BCYX is None else self._noisy_BCYX
        call = functools.partial(step, self._noisy_BCYX.copy_(noisy_BCYX), *kind)
        name = self._device.type
        # A graph must cast weights itself: autocast frees its cached casts at its end.
        with torch.autocast(name, enabled=torch.is_autocast_enabled(name), cache_enabled=False):
            if kind not in self._graphs:
                self._graphs[kind] = None
                return self._aside(call)
            try:
                replay, output_BCYX = self._graphs[kind] = self._graphs[kind] or self._capture(call)
            except RuntimeError as error:
                _log.warning("CUDA graphs are off, sampling is slower without: a step cannot be captured (%s)", error)
                self._failed = True
                self._graphs.clear()
        if self._failed:  # outside of the handler: its error keeps the memory of the capture
            return step(noisy_BCYX, *kind)
        replay()
        return output_BCYX.clone()  # the next replay overwrites it, and samplers keep outputs

    def _capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()

        def capture() -> Tensor:
            # Other threads may use the GPU meanwhile: data loaders, NCCL's watchdog.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                return call()

        output_BCYX = self._aside(capture)
        self._pool = graph.pool()  # shared: outputs are copied before another graph runs
        return graph.replay, output_BCYX

    def _aside(self, call: Callable[[], Tensor]) -> Tensor:
        """Call on the stream for captures, in order with the current stream's work before and after."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output_BCYX = call()
        current.wait_stream(self._stream)
        return output_BCYX

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)


# ---- the cache


@dataclass
class CacheSlot:
    """Context of a layer when sampling: one tower's tokens are at [start, end) of the buffers and see [0, end)."""

    keys_BGMK: Tensor
    values_BGMK: Tensor
    start: int
    end: int
    queries: tuple[str, ...]

    def attend(self, q: Towers, k: Towers, v: Towers) -> Towers:
        """Store the keys and values, and return the attention of the queries over [0, end).

        Args:
            q: queries [B, H, P, K] by tower; empty: only store.
        """
        for tower in k:
            self.keys_BGMK[:, :, self.start : self.end] = k[tower]
            self.values_BGMK[:, :, self.start : self.end] = v[tower]
        keys, values = self.keys_BGMK[:, :, : self.end], self.values_BGMK[:, :, : self.end]
        return {tower: sdpa(q_BHPK, keys, values, causal=tower == "text") for tower, q_BHPK in q.items()}


class KeyValueCache:
    """Key and value buffers of all layers, for a batch of `batch` rows."""

    def __init__(self, config: ModelConfig, batch: int, text_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.text_tokens, self.block_tokens = text_tokens, config.block_tokens
        self.slots = [1 if plan.local else config.ar_length for plan in layer_plans(config, frozenset())]
        heads, width, size = config.kv_heads, config.head_width, config.block_tokens
        self.layers = [
            torch.empty(2, batch, heads, text_tokens + slots * size, width, device=device, dtype=dtype) for slots in self.slots
        ]

    def slot(self, layer: int, tower: str, block: int = 0, rows: int | None = None, with_queries: bool = True) -> CacheSlot:
        """The slot of a tower's tokens in a layer.

        Args:
            rows: number of rows, from the first one; None: all.
            with_queries: whether the tower's output is read.
        """
        keys, values = self.layers[layer][:, :rows]
        if tower == "text":
            start, end = 0, self.text_tokens
        else:
            start = self.text_tokens + min(block, self.slots[layer] - 1) * self.block_tokens
            end = start + self.block_tokens
        return CacheSlot(keys, values, start, end, (tower,) if with_queries else ())

    @property
    def bytes(self) -> int:
        """Memory of all buffers, in bytes."""
        return sum(layer.numel() * layer.element_size() for layer in self.layers)


# ---- checks and defaults of `generate`


def _text_tokens(model: MADFormer, text: Tensor | None) -> int:
    if model.config.text is None:
        return 0
    return model.config.text.length if text is None else text.shape[1]


def _check_scheduler(model: MADFormer, scheduler: Any, steps: int) -> None:
    prediction_type, expected = scheduler.config.get("prediction_type"), model.config.prediction_type
    if prediction_type != expected:
        raise ValueError(f"scheduler.config.prediction_type = {prediction_type!r}: must be the model's, {expected!r}")
    if steps != int(steps) or steps < 1:
        raise ValueError(f"steps = {steps}: must be an integer of at least 1")


def _check_guidance(model: MADFormer, text: Tensor | None, guidance: float, interval: tuple[float, float] | None) -> None:
    if text is not None and model.text is None:
        raise ValueError("text given to a model without text: set model.text")
    if text is not None and (text.ndim != 2 or not text.shape[1]):
        raise ValueError(f"text has shape {tuple(text.shape)}: must be [images, tokens]")
    if guidance != 1 and text is None:
        raise ValueError(f"guidance = {guidance}: needs text to guide towards; give text, or guidance=1")
    if interval is not None and interval[0] > interval[1]:
        raise ValueError(f"guidance_interval = {interval}: must be the lowest and the highest timestep")


def _check_blocks(model: MADFormer, **inputs: Tensor | None) -> None:
    c = model.config
    shape = (c.ar_length, c.latent_channels, c.block_size, c.block_size)
    for name, blocks_BLCYX in inputs.items():
        if blocks_BLCYX is not None and tuple(blocks_BLCYX.shape[1:]) != shape:
            expected = f"[images, {', '.join(map(str, shape))}]"
            raise ValueError(f"{name} has shape {tuple(blocks_BLCYX.shape)}: must be {expected}")


def _batch_size(batch_size: int | None, **inputs: Sized | None) -> int:
    sizes = {name: len(value) for name, value in inputs.items() if value is not None}
    if batch_size is not None:
        sizes["batch_size"] = int(batch_size)
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items()) or "none given"
        raise ValueError(f"number of images ({listed}): give batch_size or one of {', '.join(inputs)}, and let them agree")
    return next(iter(sizes.values()))


def _initial_noise(model: MADFormer, batch: int, generators: list[torch.Generator] | None, noise: Tensor | None) -> Tensor:
    # Latents are float32 even if the weights are not, since steps add up small differences.
    c, device, dtype = model.config, model.boi_SD.device, torch.promote_types(model.boi_SD.dtype, torch.float32)
    if noise is not None:
        return noise.to(device, dtype)
    # Noise is drawn as an image and then cut, so that it does not depend on the AR length.
    shape = (c.latent_channels, c.latent_size, c.latent_size)
    if generators is None:
        return to_blocks(torch.randn(batch, *shape, device=device, dtype=dtype), c.ar_length)
    drawn_BChw = torch.stack([torch.randn(shape, generator=generator, device="cpu") for generator in generators])
    return to_blocks(drawn_BChw, c.ar_length).to(device, dtype)
