"""Metrics over pairs of features: kernel distance, precision and recall, density and coverage, memorisation.

All of them are exact: no subsets are drawn. Pairs are computed in tiles, so that memory does not grow with their number.
Letters in shapes: N generated points, M reference points, D features, B and C the points along the two sides of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from madformer.errors import InputError

__all__ = ["Within", "compare_pairs", "memorisation", "nearest_distances", "pairs_within"]

NEIGHBOURS = (3, 5)
"""A neighbourhood reaches to the k-th nearest neighbour: k for precision and recall, k for density and coverage (papers')."""

BLOCK = 2048
"""Points along a side of a tile: with 2,048 features, about 250 MB of temporary memory."""

_ROUNDING = 1e-12
"""A squared distance may be wrong by this share of |x|^2 + |y|^2. Float32 features have no finer differences."""


class Within(NamedTuple):
    """Results over the pairs inside one set. For a reference they are computed once and stored."""

    radii_NK: Tensor
    """The distance of each point to its 3rd and its 5th nearest other point, [N, 2] float64. A duplicate is another point, at
    distance 0. Infinity: there are too few other points."""
    mean_kernel: float
    """The mean of the kernel distance's kernel over pairs of different points; NaN: there are no pairs."""


def pairs_within(features_ND: Tensor, block: int = BLOCK) -> Within:
    """Radii and mean kernel of a set. The cost is D N^2 / 2 float64 multiplications and as many additions.

    Args:
        features_ND: finite features. The computation runs on their device.
        block: points along a side of a tile. Results do not depend on it.
    """
    return _within(_Points(features_ND, features_ND.mean(0), features_ND.device, block))


def compare_pairs(generated_ND: Tensor, reference_MD: Tensor, reference: Within, block: int = BLOCK) -> dict[str, float]:
    """Metrics over all pairs of generated and reference points.

    * `kid`: the unbiased squared maximum mean discrepancy under the kernel (x . y / D + 1)^3 (Binkowski et al. 2018) over all
      points. The usual mean over random subsets estimates it. It may be slightly negative.
    * `precision`: the share of generated points in the neighbourhood of any reference point; `recall`: the share of reference
      points in the neighbourhood of any generated point (Kynkäänniemi et al. 2019; 3rd neighbours).
    * `density`: the mean number of reference points whose neighbourhood contains a generated point, over 5; `coverage`: the
      share of reference points with a generated point in their neighbourhood (Naeem et al. 2020; 5th neighbours).

    A neighbourhood includes its boundary, with a tolerance for rounding. So the reference points themselves have precision,
    recall and coverage 1. The cost is D (N M + N^2 / 2) float64 multiplications and as many additions.

    Args:
        generated_ND: finite features. The computation runs on their device; the reference is moved there block by block.
        reference_MD: finite features.
        reference: the reference points' `pairs_within`.
        block: points along a side of a tile. Results do not depend on it, except for the last digits of `kid`.

    Returns:
        The metrics by name, in this order. Precision needs 4 reference points, recall 4 generated ones, density and coverage 6
        reference points; with fewer they are left out.

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
    """The distance of each point to the nearest reference point, [N] float64; exactly 0 if the points are equal.

    The cost is D N M float64 multiplications and as many additions.

    Args:
        features_ND: finite features. The computation runs on their device; the reference is moved there block by block.
        reference_MD: finite features, at least one.
        block: points along a side of a tile. Results do not depend on it, except for rounding.
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

    Ties count half. At 0.5, samples are as near to the training images as new images are. Above, they copy; below, they are
    too far away. The test follows the three-sample test of data-copying by Meehan, Chaudhuri and Dasgupta (2020, arXiv
    2004.05675), but over the whole feature space instead of cells. Their Mann-Whitney U counts pairs in which the sample is
    farther, so this is 1 - U / (N M). With perfect samples the standard deviation is ((N + M + 1) / (12 N M))^(1/2).

    Args:
        generated_N: `nearest_distances` of generated images to training images.
        held_out_M: `nearest_distances` of held-out images to training images.
    """
    ordered_M = held_out_M.to(generated_N).sort().values
    ranks_N = torch.searchsorted(ordered_M, generated_N) + torch.searchsorted(ordered_M, generated_N, right=True)
    return 1 - float(ranks_N.double().mean()) / (2 * len(held_out_M))


class _Block:
    """Points of some rows in float64, minus the centre. This keeps distances and makes their rounding errors smaller."""

    def __init__(self, rows: slice, features_BD: Tensor, centre_D: Tensor) -> None:
        self.rows = rows
        self.points_BD = features_BD.to(centre_D) - centre_D
        self.squares_B = self.points_BD.square().sum(1)
        self.along_B = self.points_BD @ centre_D + centre_D.square().sum() / 2
        """The inner product of two features is that of their centred points plus both of these numbers."""


class _Points:
    """All points, which come to the computing device one block at a time. Any centre is correct."""

    def __init__(self, features_ND: Tensor, centre_D: Tensor, device: torch.device, block: int) -> None:
        self._features_ND, self._block = features_ND, block
        self.centre_D = centre_D.to(device, torch.float64)

    def __len__(self) -> int:
        return len(self._features_ND)

    @property
    def pairs(self) -> int:
        """Number of ordered pairs of different points."""
        return len(self) * (len(self) - 1)

    def blocks(self, start: int = 0) -> Iterator[_Block]:
        for first in range(start, len(self), self._block):
            rows = slice(first, first + self._block)
            yield _Block(rows, self._features_ND[rows], self.centre_D)

    def own_tiles(self) -> Iterator[_Tile]:
        """Yield the tile of any two blocks once, as the other order has the same pairs."""
        for one in self.blocks():
            for other in self.blocks(one.rows.start):
                yield _Tile(one, other)


class _Tile:
    """All pairs of a point of one block with a point of another."""

    def __init__(self, one: _Block, other: _Block) -> None:
        self.one, self.other = one, other
        self._inner_BC = one.points_BD @ other.points_BD.T

    @property
    def is_diagonal(self) -> bool:
        """Whether both blocks are the same, so that each point is paired with itself too."""
        return self.one.rows == self.other.rows

    def squares_BC(self, less: float = 0.0) -> Tensor:
        """Squared distances, minus the share `less` of |x|^2 + |y|^2."""
        scales_BC = self.one.squares_B[:, None] + self.other.squares_B
        return scales_BC.mul_(1 - less).sub_(self._inner_BC, alpha=2)

    def kernel_BC(self) -> Tensor:
        inner_BC = self._inner_BC + self.one.along_B[:, None]
        return inner_BC.add_(self.other.along_B).div_(self.one.points_BD.shape[1]).add_(1).pow_(3)

    def own_kernel(self) -> float:
        """The kernel's sum over ordered pairs of different points, for blocks of one set of points."""
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
    """Replace `nearest_BK` by the smallest of both, in rising order."""
    nearest_BK.copy_(torch.cat((nearest_BK, squares_BC), dim=1).topk(nearest_BK.shape[1], largest=False).values)


class _Sweep:
    """Adds up, over tiles of generated and reference points, the kernel and the points that are in neighbourhoods."""

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
        """Precision, recall, density and coverage, without those that need more points than there are."""
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
