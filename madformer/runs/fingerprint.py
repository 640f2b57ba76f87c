"""What tells two networks apart."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_sha256(network: nn.Module) -> str:
    """Hexadecimal SHA-256 of a network's weights (names, types, shapes and bytes), whatever file or device they are on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
