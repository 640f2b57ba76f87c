"""Metrics over pairs of features: kernel distance, precision and recall, density and coverage, memorisation.

All of them are exact: no subsets are drawn. Pairs are computed in tiles, so that memory does not grow with their number.
Letters in shapes: N generated and M reference points, D features, B and C the points along the sides of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from madformer.errors import InputError

__all__ = ["Within", "compare_pairs", "memorisation", "nearest_distances", "pairs_within"]

NEIGHBOURS = (3, 5)
"""Which nearest neighbour a neighbourhood reaches to, as in the papers: for precision and recall, for density and coverage."""

BLOCK = 2048
"""Points along a side of a tile: with 2,048 features, about 250 MB of temporary memory."""

_ROUNDING = 1e-12
"""The part of |x|^2 + |y|^2 by which a squared distance may be wrong; float32 features have no finer differences anyway."""


class Within(NamedTuple):
    """What the pairs of one set tell: of a reference it is computed once and kept."""

    radii_NK: Tensor
    """The distance of each point to its 3rd and its 5th nearest other point, [N, 2] float64; a duplicate is another point, at
    distance 0; infinity where there are not as many others."""
    mean_kernel: float
    """The kernel distance's kernel, a mean over pairs of different points; NaN without any."""


def pairs_within(features_ND: Tensor, block: int = BLOCK) -> Within:
    """Look at all pairs of a set: D N^2 / 2 float64 multiplications and as many additions.

    Args:
        features_ND: [N, D], finite; computed where they are.
        block: points along a side of a tile; no result depends on it.
    """
    return _within(_Points(features_ND, features_ND.mean(0), features_ND.device, block))


def compare_pairs(generated_ND: Tensor, reference_MD: Tensor, reference: Within, block: int = BLOCK) -> dict[str, float]:
    """How generated points lie among reference points.

    * `kid`: the unbiased squared maximum mean discrepancy under the kernel (x . y / D + 1)^3 (Binkowski et al. 2018) of all
      points: what the customary mean over random subsets estimates. It may be slightly negative.
    * `precision`: which part of the generated points lies in the neighbourhood of any reference point; `recall`: which part of
      the reference points lies in the neighbourhood of any generated point (Kynkäänniemi et al. 2019; 3rd neighbours).
    * `density`: in how many reference points' neighbourhoods a generated point lies, over 5; `coverage`: which part of the
      reference points has a generated point in its neighbourhood (Naeem et al. 2020; 5th neighbours).

    A neighbourhood includes its rim, even when rounding moves it a little: the reference points themselves have precision,
    recall and coverage 1. The cost is D (N M + N^2 / 2) float64 multiplications and as many additions.

    Args:
        generated_ND: [N, D], finite; computed where they are, the reference is moved there block by block.
        reference_MD: [M, D], finite.
        reference: the reference points' `pairs_within`.
        block: points along a side of a tile; no result depends on it (but `kid`, in its last digits).

    Returns:
        The metrics by name, in this order, less those that cannot be had: precision with fewer than 4 reference points, recall
        with fewer than 4 generated ones, density and coverage with fewer than 6 reference points.

    Raises:
        InputError: fewer than two points of either kind.
    """
    for kind, count in (("generated", len(generated_ND)), ("reference", len(reference_MD))):
        if count < 2:
            raise InputError(f"{count} {kind} images: a kernel distance needs at least 2")
    device, centre_D = generated_ND.device, reference_MD.mean(0)
    points, others = _Points(generated_ND, centre_D, device, block), _Points(reference_MD, centre_D, device, block)
    generated = _within(points)
    sweep = _Sweep(generated.radii_NK, reference.radii_NK.to(generated.radii_NK))
    for one in points.blocks():
        for other in others.blocks():
            sweep.add(_Tile(one, other))
    return {"kid": generated.mean_kernel + reference.mean_kernel - 2 * sweep.mean_kernel, **sweep.shares()}


def nearest_distances(features_ND: Tensor, reference_MD: Tensor, block: int = BLOCK) -> Tensor:
    """The distance of each point to the nearest reference point, exactly 0 if it is one: [N] float64.

    The cost is D N M float64 multiplications and as many additions.

    Args:
        features_ND: [N, D], finite. The computation runs on their device; the reference is moved there block by block.
        reference_MD: [M, D], finite, at least one.
        block: points along one side of a tile of distances. Results do not depend on it, except for rounding.
    """
    device, centre_D = features_ND.device, reference_MD.mean(0)
    points, others = _Points(features_ND, centre_D, device, block), _Points(reference_MD, centre_D, device, block)
    distances = []
    for one in points.blocks():
        least_B, place_B = torch.full_like(one.squares_B, torch.inf), torch.zeros_like(one.squares_B, dtype=torch.long)
        for other in others.blocks():
            less_B, near_B = torch.addmm(other.squares_B, one.points_BD, other.points_BD.T, alpha=-2).min(1)  # |x|^2 less
            place_B = torch.where(less_B < least_B, near_B + other.rows.start, place_B)
            least_B = torch.minimum(less_B, least_B)
        nearest_BD = reference_MD[place_B.to(reference_MD.device)].to(one.points_BD)
        distances.append(torch.linalg.vector_norm(features_ND[one.rows].double() - nearest_BD, dim=1))
    return torch.cat(distances)


def memorisation(generated_N: Tensor, held_out_M: Tensor) -> float:
    """The probability that a sample is nearer to its nearest training image than a held-out image is to its own.

    Ties count half. 0.5: samples are as near to the training images as new images are; above, they copy; below, they are too
    far away. It follows the three-sample test of data-copying by Meehan, Chaudhuri and Dasgupta (2020, arXiv 2004.05675), but
    over the whole feature space instead of cells. Their Mann-Whitney U counts pairs in which the sample is farther, so this is
    1 - U / (N M). With perfect samples the standard deviation is ((N + M + 1) / (12 N M))^(1/2).

    Args:
        generated_N: `nearest_distances` of generated images to training images, [N].
        held_out_M: the same of held-out images, [M].
    """
    ordered_M = held_out_M.to(generated_N).sort().values
    ranks_N = torch.searchsorted(ordered_M, generated_N) + torch.searchsorted(ordered_M, generated_N, right=True)
    return 1 - float(ranks_N.double().mean()) / (2 * len(held_out_M))


class _Block:
    """Points of some rows in float64, less the centre: distances stay as they are, and are rounded less."""

    def __init__(self, rows: slice, features_BD: Tensor, centre_D: Tensor) -> None:
        self.rows = rows
        self.points_BD = features_BD.to(centre_D) - centre_D
        self.squares_B = self.points_BD.square().sum(1)
        self.along_B = self.points_BD @ centre_D + centre_D.square().sum() / 2
        """What the inner product of two features has more than that of the points: the sum of the two numbers here."""


class _Points:
    """All points, a block at a time on the device that computes. Any centre does."""

    def __init__(self, features_ND: Tensor, centre_D: Tensor, device: torch.device, block: int) -> None:
        self._features_ND, self._block = features_ND, block
        self.centre_D = centre_D.to(device, torch.float64)

    def __len__(self) -> int:
        return len(self._features_ND)

    @property
    def pairs(self) -> int:
        """Pairs of different points, in either order."""
        return len(self) * (len(self) - 1)

    def blocks(self, start: int = 0) -> Iterator[_Block]:
        for first in range(start, len(self), self._block):
            rows = slice(first, first + self._block)
            yield _Block(rows, self._features_ND[rows], self.centre_D)

    def own_tiles(self) -> Iterator[_Tile]:
        """Any two blocks once: in the other order they have the same pairs."""
        for one in self.blocks():
            for other in self.blocks(one.rows.start):
                yield _Tile(one, other)


class _Tile:
    """All pairs of a point of one block and a point of another."""

    def __init__(self, one: _Block, other: _Block) -> None:
        self.one, self.other = one, other
        self._inner_BC = one.points_BD @ other.points_BD.T

    @property
    def is_diagonal(self) -> bool:
        """Whether, among the tiles of the same points, each point meets itself here."""
        return self.one.rows == self.other.rows

    def squares_BC(self, less: float = 0.0) -> Tensor:
        """Squared distances, less a part of |x|^2 + |y|^2."""
        scales_BC = self.one.squares_B[:, None] + self.other.squares_B
        return scales_BC.mul_(1 - less).sub_(self._inner_BC, alpha=2)

    def kernel_BC(self) -> Tensor:
        inner_BC = self._inner_BC + self.one.along_B[:, None]
        return inner_BC.add_(self.other.along_B).div_(self.one.points_BD.shape[1]).add_(1).pow_(3)

    def own_kernel(self) -> float:
        """Among the tiles of the same points: the kernel's sum over pairs of different points, in either order."""
        kernel_BC = self.kernel_BC()
        return float(kernel_BC.fill_diagonal_(0).sum() if self.is_diagonal else 2 * kernel_BC.sum())


def _within(points: _Points) -> Within:
    nearest_NK = points.centre_D.new_full((len(points), max(NEIGHBOURS)), torch.inf)
    kernel = 0.0
    for tile in points.own_tiles():
        kernel += tile.own_kernel()
        squares_BC = tile.squares_BC().clamp_(min=0)
        if tile.is_diagonal:
            squares_BC.fill_diagonal_(torch.inf)
        else:
            _keep_nearest(nearest_NK[tile.other.rows], squares_BC.T)
        _keep_nearest(nearest_NK[tile.one.rows], squares_BC)
    radii_NK = nearest_NK[:, [k - 1 for k in NEIGHBOURS]].sqrt()
    return Within(radii_NK, kernel / points.pairs if points.pairs else torch.nan)


def _keep_nearest(nearest_BK: Tensor, squares_BC: Tensor) -> None:
    """Put the smallest of both into the first, in rising order."""
    nearest_BK.copy_(torch.cat((nearest_BK, squares_BC), dim=1).topk(nearest_BK.shape[1], largest=False).values)


class _Sweep:
    """The kernel's sum, and who lies in whose neighbourhood, over the tiles of generated and reference points."""

    def __init__(self, radii_NK: Tensor, radii_MK: Tensor) -> None:
        self._squares_NK, self._squares_MK = radii_NK.square(), radii_MK.square()
        self._precise_N = torch.zeros_like(radii_NK[:, 0], dtype=torch.bool)
        self._recalled_M = torch.zeros_like(radii_MK[:, 0], dtype=torch.bool)
        self._covered_M = torch.zeros_like(self._recalled_M)
        self._kernel, self._inside = 0.0, 0

    def add(self, tile: _Tile) -> None:
        ones, others = tile.one.rows, tile.other.rows
        self._kernel += float(tile.kernel_BC().sum())
        squares_BC = tile.squares_BC(less=_ROUNDING)
        self._precise_N[ones] |= (squares_BC <= self._squares_MK[others, 0]).any(1)
        self._recalled_M[others] |= (squares_BC <= self._squares_NK[ones, :1]).any(0)
        inside_BC = squares_BC <= self._squares_MK[others, 1]
        self._covered_M[others] |= inside_BC.any(0)
        self._inside += int(inside_BC.sum())

    @property
    def mean_kernel(self) -> float:
        return self._kernel / (len(self._squares_NK) * len(self._squares_MK))

    def shares(self) -> dict[str, float]:
        """Precision, recall, density, coverage; those of which there are the neighbours."""
        near, far = (bool(self._squares_MK[:, column].isfinite().all()) for column in range(2))
        shares = {}
        if near:
            shares["precision"] = float(self._precise_N.double().mean())
        if self._squares_NK[:, 0].isfinite().all():
            shares["recall"] = float(self._recalled_M.double().mean())
        if far:
            shares["density"] = self._inside / (NEIGHBOURS[1] * len(self._squares_NK))
            shares["coverage"] = float(self._covered_M.double().mean())
        return shares
