"""The work of two processes with a model sharded over them. They import this module when they start."""

from contextlib import nullcontext

import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_

from madformer.config import OptimizerConfig
from madformer.model import MADFormer
from madformer.training.module import build_optimizer, shard
from tests.conftest import TEXT, latents, prompts, timesteps, tiny

CONFIG = tiny(text=TEXT)
DTYPES = (None, torch.bfloat16)


def loss(model, dtype):
    inputs = (latents(CONFIG).float(), latents(CONFIG, seed=5).float(), timesteps(CONFIG), prompts(CONFIG))
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        out = model(*inputs[:3], text=inputs[3], outputs={"condition"})
    return out.denoised_BLCYX.float().square().mean() + out.condition_BLCYX.float().square().mean()


def whole(parameter):
    return parameter.detach().full_tensor()


def steps(rank, folder):
    """With gathered layers in float32 and in bfloat16; the first process keeps what it saw."""
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seen = [step(dtype) for dtype in DTYPES]
    if rank == 0:
        torch.save(seen, folder / "seen.pt")
    destroy_process_group()


def step(dtype):
    """Forward, backward, a step that is skipped and one that is made."""
    torch.manual_seed(0)
    model, seen = MADFormer(CONFIG), {}
    shard(model, init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",)), dtype)

    def look(layer, arguments):
        seen["layer"] = {parameter.dtype for parameter in layer.parameters()}
        seen["root"] = {model.boi_SD.dtype, model.text.embedding.weight.dtype, model.upsampler.conv_in.weight.dtype}
        seen["stream"] = {x.dtype for x in arguments[0].values()}

    model.layers[1].register_forward_pre_hook(look)
    seen["loss"] = loss(model, dtype)
    seen["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    seen["gradients"] = {name: whole(gradient) for name, gradient in gradients.items()}
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer = build_optimizer(model, OptimizerConfig(), fused=True)
    seen["weights"] = []
    for found_inf in (1.0, 0.0):
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        seen["weights"].append({name: whole(parameter) for name, parameter in model.named_parameters()})
    return {**seen, "loss": float(seen["loss"].detach())}
