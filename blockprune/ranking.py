"""Ranking: which blocks of a group fall for a budget, by one rounding rule.

Blocks fall in ascending order of score, the earlier position first among equals, and one falls if that brings the group
closer to its budget. So the order does not depend on the budget, and what falls for a smaller one falls for a larger.
"""

import attrs
import torch
from torch import Tensor

from blockprune.types import Scores


def together(scores: Scores) -> Scores:
    """On one device, that of the first: what is ranked against each other is compared there."""
    if len({score.value.device for score in scores.values()}) < 2:
        return scores
    first = next(iter(scores.values())).value.device
    return {name: attrs.evolve(score, value=score.value.to(first)) for name, score in scores.items()}


def drop_lowest(value: Tensor, elements: Tensor, budget: float, *, down: bool = False) -> Tensor:
    """Drop the lowest blocks ``[B]`` of one group.

    Sorting all is slow, so blocks are counted into buckets by the leading bits of their score; only the bucket in which
    the budget runs out is sorted.
    """
    bucket = _leading_bits(value)
    if elements.stride(0) == 0 and len(elements):  # blocks of one size
        counts = torch.bincount(bucket, minlength=1 << 16).double() * elements[0]
    else:
        counts = torch.bincount(bucket, weights=elements.double(), minlength=1 << 16)
    fallen = counts.cumsum(0)
    last = int(torch.searchsorted(fallen, budget))  # the first bucket with which the budget is met
    drop = bucket < last
    if last < len(fallen):
        inside = (bucket == last).nonzero()[:, 0]
        inside = inside[value[inside].argsort(stable=True)]
        left = budget - (fallen[last] - counts[last])
        drop[inside] = falls(elements[inside][None], left.view(1, 1), down=down)[0]
    return drop


def falls(elements: Tensor, budget: Tensor, *, down: bool) -> Tensor:
    """Which blocks fall, of rows ``[G, B]`` in the order of falling and budgets ``[G, 1]`` in elements: the rounding rule."""
    after = elements.cumsum(1)
    if down:
        return after <= budget + 1e-6
    return (2 * after - elements < 2 * budget) & (elements > 0)  # falling halfway to the budget brings closer, halfway beyond it does not


def _leading_bits(value: Tensor) -> Tensor:
    """The order of floats in 16 bits: ``[B]`` int in [0, 65536); equal numbers share one, and so do near ones."""
    bits = (value + 0.0).view(torch.int32 if value.dtype == torch.float32 else torch.int64)  # + 0.0 makes -0.0 equal 0.0
    width = 8 * value.dtype.itemsize
    bits ^= (bits >> (width - 1)).bitwise_and_((1 << (width - 1)) - 1)  # negative floats order backwards
    bits >>= width - 16
    bits += 1 << 15
    return bits
