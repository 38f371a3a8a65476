"""Ranking: which blocks of a bank are pruned, by one rounding rule. A bank is a set of blocks that are compared with each other.

Blocks are pruned in ascending order of their scores, and in the order of their positions where scores are equal. A block is pruned if that
brings the removed total closer to the budget. The order does not depend on the budget, so a larger budget removes all that a smaller one
removes.
"""

import attrs
import torch
from torch import Tensor

from blockprune.core.types import Scores

FEW_BLOCKS = 1 << 12  # up to so many are counted by 8 bits: adding up 65,536 counts takes longer than sorting what 16 bits would tell apart


def to_common_device(scores: Scores) -> Scores:
    """The scores on the device of the first parameter, so that they can be compared."""
    if len({score.value.device for score in scores.values()}) < 2:
        return scores
    first = next(iter(scores.values())).value.device
    return {name: attrs.evolve(score, value=score.value.to(first)) for name, score in scores.items()}


def prune_lowest(score: Tensor, elements: Tensor, budget: float, *, round_down: bool = False) -> Tensor:
    """Mask of blocks to prune. A block is pruned if that brings the removed total closer to the budget; with `round_down`, only if it fits.

    Args:
        score: of each block of a bank, ``[B]``, not NaN.
        elements: of each block, ``[B]``.
        budget: elements to remove.
        round_down: never remove more than the budget.

    Example:
        >>> from blockprune.allocate.ranking import prune_lowest
        >>> score, elements = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([4, 4, 4])
        >>> prune_lowest(score, elements, 7), prune_lowest(score, elements, 7, round_down=True)
        (tensor([False,  True,  True]), tensor([False,  True, False]))
    """
    # Sorting all blocks is slow. They are counted by the leading bits of their scores instead, and only the blocks whose leading bits are
    # those with which the budget is reached are sorted.
    width = 8 if len(score) <= FEW_BLOCKS else 16
    bits = _leading_bits(score, width)
    if elements.stride(0) == 0 and len(elements):  # all blocks have the same size
        counts = torch.bincount(bits, minlength=1 << width).double() * elements[0]
    else:
        counts = torch.bincount(bits, weights=elements.double(), minlength=1 << width)
    removed = counts.cumsum(0)
    last = int(torch.searchsorted(removed, budget))
    pruned = bits < last
    if last < len(removed):
        undecided = (bits == last).nonzero()[:, 0]
        undecided = undecided[score[undecided].argsort(stable=True)]
        remaining = budget - (removed[last] - counts[last])
        pruned[undecided] = select_pruned(elements[undecided][None], remaining.view(1, 1), round_down=round_down)[0]
    return pruned


def select_pruned(elements: Tensor, budget: Tensor, *, round_down: bool) -> Tensor:
    """The rounding rule: which blocks of banks are pruned, ``[banks, B]``.

    Args:
        elements: of the blocks of each bank, in ascending order of their scores, ``[banks, B]``.
        budget: elements to remove from each bank, ``[banks, 1]``.
        round_down: never remove more than the budget.

    Example:
        >>> from blockprune.allocate.ranking import select_pruned
        >>> select_pruned(torch.tensor([[4, 4, 4]]), torch.tensor([[6.0]]), round_down=False)    # 4 is as close to 6 as 8
        tensor([[ True, False, False]])
    """
    after = elements.cumsum(1)
    if round_down:
        return after <= budget + 1e-6
    return (2 * after - elements < 2 * budget) & (elements > 0)  # closer if less than half of the block is beyond the budget


def _leading_bits(score: Tensor, width: int) -> Tensor:
    """The leading bits of each score as an integer of the same order, ``[B]`` in [0, 2**width); scores that are close share theirs."""
    bits = (score + 0.0).view(torch.int32 if score.dtype == torch.float32 else torch.int64)  # + 0.0 makes -0.0 equal 0.0
    all_bits = 8 * score.dtype.itemsize
    bits ^= (bits >> (all_bits - 1)).bitwise_and_((1 << (all_bits - 1)) - 1)  # the bits of negative floats have the reversed order
    bits >>= all_bits - width
    bits += 1 << (width - 1)
    return bits
