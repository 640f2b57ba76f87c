"""A GPU that computes nothing: its tensors have shapes, dtypes and a device, so a step can be traced without a card.

`PLACEHOLDER`, torch's device without a backend, is there in every build: enough to count operators, forward and backward,
and to see every time that the host waits. `CUDA` needs a CUDA build of torch, but no card. It has autocast and CUDA's own
operators; the backward pass cannot run.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

PLACEHOLDER = torch.device("privateuseone", 0)
CUDA = torch.device("cuda", 0)

SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}
"""Operators that wait for the device."""


class _FakeGPU(FakeTensorMode):
    """Fake tensors on the device alone: what lies on the CPU is real, as schedulers and generators are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _touches_device(args, kwargs):
            return func(*args, **kwargs)
        if _is_copy_to_host(func, args, kwargs):  # nothing was computed: zeros and ones stand for what the host would read
            source = next(x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor))
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is torch.ops.aten._to_copy.default and not isinstance(args[0], FakeTensor):  # to the device
            options = {"dtype": kwargs.get("dtype") or args[0].dtype, "device": kwargs["device"]}
            func, args, kwargs = torch.ops.aten.empty.memory_format, (args[0].shape,), options
        return super().__torch_dispatch__(func, types, args, kwargs)


class _FusedAttention(TorchFunctionMode):
    """What a card computes attention with: torch cannot choose a kernel where there is none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or not isinstance(args[0], FakeTensor):
            return func(*args, **kwargs)
        q, k, v = args
        causal = kwargs.get("is_causal", False)
        if q.dtype is torch.float32:
            groups = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, q.requires_grad, 0.0, causal)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]


@contextlib.contextmanager
def fake_gpu(device: torch.device = PLACEHOLDER) -> Iterator[torch.device]:
    """Inside the block tensors on the device are fake."""
    with contextlib.ExitStack() as stack:
        if device == PLACEHOLDER:
            _register_placeholder()
        else:
            stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True))
            stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(_FusedAttention())
        stack.enter_context(_FakeGPU(allow_non_fake_inputs=True))
        yield device


@functools.cache
def _register_placeholder() -> None:
    if torch.version.cuda is not None:
        pytest.skip("torch's placeholder device would spoil fake CUDA tensors in this process; CPU builds run it")
    _setup_privateuseone_for_python_backend(backend_module=_Backend())


class _Backend(_DummyBackendModule):
    """A module of the placeholder's backend, as torch asks for it."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Operators(TorchDispatchMode):
    """Counts what runs on the fake device inside a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        """Operators that compute something, by name; views do not."""
        self.casts = 0
        """Kernels that only change the dtype."""
        self.syncs: Counter[str] = Counter()
        """Operators for which the host waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name().partition(".")[0]
        if _touches_device(args, kwargs) and not name.startswith("prim"):
            if name in SYNCS or _is_copy_to_host(func, args, kwargs):
                self.syncs[name] += 1
            elif not _is_view(func) and name not in ("aten::empty", "aten::empty_strided", "aten::detach"):
                self.kernels[name] += 1
                self.casts += name == "aten::_to_copy" and kwargs.get("dtype") not in (None, args[0].dtype)
        return func(*args, **kwargs)


def _touches_device(args: Any, kwargs: Any) -> bool:
    return any(
        isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type in (PLACEHOLDER.type, CUDA.type))
        for x in tree_iter((args, kwargs))
    )


def _is_copy_to_host(func: Any, args: Any, kwargs: Any) -> bool:
    name = func.name().partition(".")[0]
    if name == "aten::_to_copy":
        return isinstance(args[0], FakeTensor) and str(kwargs.get("device", "")) == "cpu"
    return name == "aten::copy_" and not isinstance(args[0], FakeTensor) and isinstance(args[1], FakeTensor)


def _is_view(func: Any) -> bool:
    """Whether the result shares the memory of an argument and nothing is written."""
    returns, arguments = func._schema.returns, func._schema.arguments
    return func.is_view or (
        func.name() in ("aten::_unsafe_view", "aten::_reshape_alias")
        or (
            any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
            and all(a.alias_info is None or not a.alias_info.is_write for a in arguments)
        )
    )
