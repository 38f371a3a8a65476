"""Of the loss's derivatives with respect to weights, and to one gate a block."""

from collections.abc import Callable

import torch
from torch import Tensor

from blockprune.names import Slot
from blockprune.statistics.triples import Gates, Statistic, Sums, wide, zeros
from blockprune.types import Param


def _of_weight(name: str, contribution: Callable[[Tensor], Tensor]) -> Statistic:
    def init(slot: Slot, param: Param) -> Sums:
        return {"sum": zeros(*param.grid.shape, like=param), "n": zeros(like=param), "reached": zeros(like=param)}

    def update(sums: Sums, grad: Tensor | None) -> Sums:
        if grad is None:  # a batch that does not reach the weight counts, with a gradient of 0
            return {**sums, "n": sums["n"] + 1}
        return {"sum": sums["sum"] + contribution(wide(grad)), "n": sums["n"] + 1, "reached": sums["reached"] + 1}

    return Statistic(name, "weight_grad", init, update, lambda sums, slot, param: sums["sum"] / sums["n"])


weight_grad = _of_weight("weight_grad", lambda grad: grad)
"""Mean over batches of the gradient of the batch's loss with respect to the weight (first-order Taylor)."""

weight_grad_sq = _of_weight("weight_grad_sq", torch.square)
"""Mean over batches of the squared gradient with respect to the weight."""


def _of_gates(name: str, contribution: Callable[[Gates], Tensor]) -> Statistic:
    """The mean of ``contribution(gates)`` ``[samples, *size]`` over samples."""

    def update(sums: Sums, gates: Gates) -> Sums:
        batch = wide(contribution(gates))
        return {"sum": sums["sum"] + batch.sum(0), "n": sums["n"] + len(batch)}

    def init(slot: Slot, param: Param) -> Sums:
        return {"sum": zeros(*param.grid.size, like=param), "n": zeros(like=param)}

    return Statistic(name, "gates", init, update, lambda sums, slot, param: sums["sum"] / sums["n"])


gate_grad = _of_gates("gate_grad", lambda gates: gates.per_sample())
"""Mean over samples of dL/dgate: the first-order loss change of removing the block is its negative."""

gate_fisher = _of_gates("gate_fisher", lambda gates: gates.per_sample().square())
"""Mean over samples of (dL/dgate)^2: the diagonal of the empirical Fisher of the gates (Theis et al. 1801.05787)."""

gate_hg = _of_gates("gate_hg", lambda gates: gates.hg()[None])
"""Mean over batches of the Hessian of the gates times their gradient (GraSP, Wang et al. 2002.07376)."""

gate_flow = _of_gates("gate_flow", lambda gates: gates.flow()[None])
"""dR/dgate of R = the summed output of the network of |weights| on ones (SynFlow, Tanaka et al. 2006.05467, eq. 3)."""


def gate_hvp(*, probes: int = 1, seed: int = 0) -> Statistic:
    """Diagonal of the gates' Hessian by Hutchinson: the mean over batches and probes of v * (H v), v = +-1 (Bekas et al. 2007).

    Example:
        >>> bp.statistics.gate_hvp(probes=4).name
        'gate_hvp'
    """
    return _of_gates("gate_hvp", lambda gates: gates.curvature(probes, seed).mean(0, keepdim=True))
