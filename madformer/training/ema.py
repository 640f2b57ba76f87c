"""The exponential moving average of the weights, element by element: of whole tensors or of a device's shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class MovingAverage:
    """An average of a model's parameters, on their devices and in their shards, in float32.

    Args:
        decay: weight of the past in each update, once warmed up.
        start: parameters by name to begin with, whole; None: the model's own.
    """

    def __init__(self, model: nn.Module, decay: float, start: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        if start is not None and start.keys() != self._parameters.keys():
            raise ValueError("the moving average is of another model: its parameters have other names")
        self._shards = {
            name: _local(parameter).detach().float().clone() if start is None else _shard(start[name], parameter)
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters; `step` updates went before. The decay is warmed up: min(decay, (1 + t) / (10 + t))."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [_local(parameter).float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._shards.values()), current, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the averaged parameters inside the block, and its own again behind it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The average by parameter name, whole, on the CPU. Every rank must call it where parameters are sharded."""
        return {name: self._whole(name).detach().cpu().clone() for name in self._shards}

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            local, shard = _local(parameter), self._shards[name]
            own = local.float().clone()
            local.copy_(shard)
            shard.copy_(own)

    def _whole(self, name: str) -> Tensor:
        parameter, shard = self._parameters[name], self._shards[name]
        if not isinstance(parameter, DTensor):
            return shard
        sharded = DTensor.from_local(
            shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
        return sharded.full_tensor()


def _local(parameter: Tensor) -> Tensor:
    """What of a parameter lies on this device, sharing its memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _shard(whole: Tensor, parameter: Tensor) -> Tensor:
    whole = whole.to(parameter.device, torch.float32)
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local().clone()
    return whole.clone()
