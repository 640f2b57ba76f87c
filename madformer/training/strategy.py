"""How the work is spread over devices: DDP, or FSDP with every layer sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from madformer.config import TrainerConfig
from madformer.model import MADFormer


def build_strategy(config: TrainerConfig, devices: int) -> Strategy | str:
    """Lightning's strategy for a Trainer on `devices` devices of each node."""
    world_size = devices * config.num_nodes
    if config.strategy == "fsdp":
        # One file with whole tensors: a checkpoint does not depend on the number of devices that wrote it.
        return ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    if config.strategy == "ddp" or world_size > 1:
        return DDPStrategy(gradient_as_bucket_view=True)
    return "auto"


def shard(model: MADFormer, mesh: Any) -> None:
    """Shard weights, gradients and optimiser state over the devices of the mesh, layer by layer; None: nothing."""
    if mesh is None:
        return
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside the block, parts of the model can be called outside its forward. Layers gather their weights themselves."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
