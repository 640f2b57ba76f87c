"""The MADFormer model in pure torch: no Lightning, no files.

Tensor names carry shape suffixes, everywhere in this package:

    B batch           L blocks (AR length)         S tokens in a block     T text tokens
    D model width     H query heads                G key/value heads       K head width
    C latent channels Y, X rows, columns of a block's latents              N tokens of some tower, L * S or T
    J clean blocks in the sequence (L or L - 1)    M keys of some query    V vocabulary

With k noise draws per image, noisy tensors have batch B * k; image b's draws are at b * k .. b * k + k - 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madformer.model.madformer import MADFormer, Outputs

__all__ = ["MADFormer", "Outputs"]


def __getattr__(name: str) -> Any:
    """Import the network on first use: `cost` and `plan`, beside it in this package, need no torch."""
    if name in __all__:
        from madformer.model import madformer

        return getattr(madformer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
