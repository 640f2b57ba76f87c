"""The exponential moving average (EMA) of the weights, whole or sharded."""

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
        start: whole tensors by parameter name to start from; None: the model's parameters.
    """

    def __init__(self, model: nn.Module, decay: float, start: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        if start is not None and start.keys() != self._parameters.keys():
            raise ValueError("the moving average is of another model: its parameters have other names")
        self._shards = {
            name: _local_tensor(parameter).detach().float().clone() if start is None else _shard(start[name], parameter)
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after `step` updates. The decay is warmed up: min(decay, (1 + step) / (10 + step))."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = [_local_tensor(parameter).float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._shards.values()), parameters, 1 - decay)

    @contextmanager
    def swap_in(self) -> Iterator[None]:
        """Give the model the averaged parameters inside the block, and its trained ones back after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The average by parameter name, in whole tensors on the CPU. If parameters are sharded, every rank must call it."""
        return {name: self._gather(name).detach().cpu().clone() for name in self._shards}

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            tensor, shard = _local_tensor(parameter), self._shards[name]
            copy = tensor.float().clone()
            tensor.copy_(shard)
            shard.copy_(copy)

    def _gather(self, name: str) -> Tensor:
        parameter, shard = self._parameters[name], self._shards[name]
        if not isinstance(parameter, DTensor):
            return shard
        return DTensor.from_local(
            shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        ).full_tensor()


def _local_tensor(parameter: Tensor) -> Tensor:
    """The part of a parameter on this device, sharing its memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _shard(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This device's part of a whole tensor, cut as the parameter is."""
    tensor = tensor.to(parameter.device, torch.float32)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements).to_local().clone()
    return tensor.clone()
