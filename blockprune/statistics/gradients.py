"""Statistics of the loss's derivatives with respect to weights, and with respect to one gate per block."""

from collections.abc import Callable
from functools import partial

import attrs
import torch
from torch import Tensor

from blockprune.core.arguments import check_counts, check_seed
from blockprune.core.precision import at_least_float32, double, float32_if_in_range
from blockprune.core.types import Param
from blockprune.model.parameters import ParameterRef
from blockprune.statistics.statistic import GateDerivatives, Statistic, Sums, zeros


def _of_weight(name: str, contribution: Callable[[Tensor], Tensor]) -> Statistic:
    """The mean of ``contribution(gradient)`` over batches."""

    def init(ref: ParameterRef, param: Param) -> Sums:
        return {"sum": zeros(*param.grid.shape, like=param), "n": zeros(like=param)}

    def update(sums: Sums, grad: Tensor | None) -> Sums:
        if grad is None:  # a batch that does not use the weight counts with a gradient of 0
            return {**sums, "n": sums["n"] + 1}
        return {"sum": sums["sum"] + contribution(at_least_float32(grad)), "n": sums["n"] + 1}

    return Statistic(name, "weight_grad", init, update, lambda sums, ref, param: sums["sum"] / sums["n"])


weight_grad = _of_weight("weight_grad", lambda grad: grad)
"""The gradient of the batch's loss with respect to the weight, mean over batches (first-order Taylor)."""

weight_grad_sq = _of_weight("weight_grad_sq", torch.square)
"""The squared gradient of the batch's loss with respect to the weight, mean over batches."""


def _of_gates(name: str, contribution: Callable[[GateDerivatives], Tensor], *, code: str | None = None) -> Statistic:
    """The mean of ``contribution(gates)`` ``[samples, *size]`` over samples, in float64 because gates are few."""

    def update(sums: Sums, gates: GateDerivatives) -> Sums:
        samples = contribution(gates)
        return {"sum": sums["sum"] + samples.sum(0), "n": sums["n"] + len(samples)}

    def init(ref: ParameterRef, param: Param) -> Sums:
        return {"sum": double(zeros(*param.grid.size, like=param)), "n": zeros(like=param)}

    def compute(sums: Sums, ref: ParameterRef, param: Param) -> Tensor:
        mean = sums["sum"] / sums["n"]
        return mean if param.weight.dtype == torch.float64 else float32_if_in_range(mean)

    return Statistic(name, "gates", init, update, compute, code=code)


gate_grad = _of_gates("gate_grad", lambda gates: double(gates.per_sample()))
"""dL/dgate, mean over samples. To first order, removing the block changes the loss by its negative."""

gate_fisher = _of_gates("gate_fisher", lambda gates: double(gates.per_sample()).square())
"""(dL/dgate)^2, mean over samples: the diagonal of the empirical Fisher matrix of the gates (Theis et al. 1801.05787)."""

gate_hessian_grad = _of_gates("gate_hessian_grad", lambda gates: double(gates.hessian_grad()[None]))
"""The Hessian of the gates times their gradient, mean over batches (GraSP, Wang et al. 2002.07376)."""

gate_flow = _of_gates("gate_flow", lambda gates: double(gates.flow()[None]))
"""dR/dgate, where R is the summed output of the network of |weights| on an input of ones (SynFlow, Tanaka et al. 2006.05467, eq. 3)."""


def gate_hessian_diagonal(*, probes: int = 1, seed: int = 0) -> Statistic:
    """The diagonal of the gates' Hessian H, estimated by Hutchinson's method: the mean of v * (H v) over batches and random signs v.

    Source: Bekas et al. 2007.

    Args:
        probes: vectors v for each batch; more of them make the estimate less noisy.
        seed: of the random signs, which are the same in every batch.

    Raises:
        ValueError: probes that are no integer from 1 on.
        TypeError: a seed that is no integer.

    Example:
        >>> bp.statistics.gate_hessian_diagonal(probes=4)
        gate_hessian_diagonal(probes=4, seed=0)
    """
    (probes,) = check_counts(1, meaning="a whole number of random vectors, at least 1", probes=probes)
    seed = check_seed("seed", seed)
    code = f"gate_hessian_diagonal(probes={probes}, seed={seed})"
    statistic = _of_gates("gate_hessian_diagonal", lambda gates: double(gates.curvature(probes, seed)).mean(0, keepdim=True), code=code)
    return attrs.evolve(statistic, made_by=(partial(gate_hessian_diagonal, probes=probes, seed=seed), ()))
