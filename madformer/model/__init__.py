"""The MADFormer model in pure torch: no Lightning, no files.

Tensor names carry shape suffixes, everywhere in this package:

    B batch            L blocks (AR length)     S tokens in a block    T text tokens       V vocabulary
    D model width      H query heads            G key/value heads      K head width
    C latent channels  Y, X rows, columns of a block's latents         y, x of its tokens  h, w of an image's latents
    P tokens of a tower (positions): L * S, J * S or T                 M keys of a query     A axes of positions
    U blocks in the U-Net, B * L                J clean blocks whose embedding is read: L, L - 1 or 0

With k noise draws per image, noisy tensors have batch B * k; image b's draws are at b * k .. b * k + k - 1.
N is not a shape here: it is the paper's depth, as in N - D. In the packages `data` and `evaluation` it is a number of images.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madformer.model.generation import generate
    from madformer.model.madformer import MADFormer, Outputs
    from madformer.model.official import from_released, to_released

_MODULES = {
    "MADFormer": "madformer",
    "Outputs": "madformer",
    "from_released": "official",
    "generate": "generation",
    "to_released": "official",
}

__all__ = ["MADFormer", "Outputs", "from_released", "generate", "to_released"]


def __getattr__(name: str) -> Any:
    """Import the network on first use: `cost` and `layer_plan` in this package need no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
