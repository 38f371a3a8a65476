"""Scores from derivatives of the loss, most of them with respect to gates. A gate is a factor on the weights of one block, equal to 1.

Pruning a block sets its gate g to 0, which changes the loss by about ``-dL/dg + 1/2 d2L/dg2``. Each criterion estimates a term of this.
Scores are per element: multiplied by the block's number of elements they estimate the change of the loss.
"""

import torch

from blockprune import statistics
from blockprune.core.grid import pool
from blockprune.core.pipeline import requires
from blockprune.core.types import Data, Scores
from blockprune.metric.scoring import per_element, score_parameters


@requires(statistics.weight_grad)
def taylor(data: Data) -> Scores:
    """``|sum over the block of w E[g]|`` per element, the first-order change of the loss (Molchanov et al. 1611.06440, eq. 7).

    Needs the statistic ``weight_grad``.

    Raises:
        ValueError: data without ``weight_grad``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.weight_grad],
        ...                                   batches=[torch.randn(8, 4)], loss=lambda output, batch: output.square().mean())
        >>> bp.metric.taylor(data)["weight"].value.shape
        torch.Size([2, 2])
    """
    return score_parameters(data, lambda p: pool(p.weight * p.stats["weight_grad"], p.grid, reduce="mean").abs())


@requires(statistics.weight_grad_sq)
def taylor_squared(data: Data) -> Scores:
    """Mean over the block of ``w^2 E[g^2]`` (Molchanov et al. 1906.10771, eq. 8 and 9).

    Needs the statistic ``weight_grad_sq``.

    Raises:
        ValueError: data without ``weight_grad_sq``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.weight_grad_sq],
        ...                                   batches=[torch.randn(8, 4)], loss=lambda output, batch: output.square().mean())
        >>> bp.metric.taylor_squared(data)["weight"].value.shape
        torch.Size([2, 2])
    """
    return score_parameters(
        data, lambda p: pool(p.weight.to(p.stats["weight_grad_sq"]).square() * p.stats["weight_grad_sq"], p.grid, reduce="mean")
    )


@requires(statistics.weight_grad)
def gradient_magnitude(data: Data) -> Scores:
    """Mean over the block of ``|E[g]|``, by which RigL grows blocks (Evci et al. 1911.11134, algorithm 1).

    Needs the statistic ``weight_grad``, which `collect.gradients` reads from the model's gradients.

    Raises:
        ValueError: data without ``weight_grad``.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> (model(torch.tensor([[1.0, -3.0]]))).sum().backward()
        >>> bp.metric.gradient_magnitude(bp.collect.gradients(model, where=bp.linears((1, 1))))["weight"].value
        tensor([[1., 3.]])
    """
    return score_parameters(data, lambda p: pool(p.stats["weight_grad"], p.grid, reduce="mean", elementwise=torch.abs))


@requires(statistics.gate_fisher)
def fisher(data: Data) -> Scores:
    """``1/2 E[(dL/dg)^2]`` per element: the second-order change of the loss, with the empirical Fisher matrix in place of the Hessian.

    Source: Theis et al. 1801.05787, eq. 6.

    Needs the statistic ``gate_fisher``.

    Raises:
        ValueError: data without ``gate_fisher``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.gate_fisher],
        ...                                   batches=[torch.randn(8, 4)], loss=lambda output, batch: output.square().mean())
        >>> bool((bp.metric.fisher(data)["weight"].value > 0).all())
        True
    """
    return score_parameters(data, lambda p: per_element(p.stats["gate_fisher"] / 2, p.grid))


@requires(statistics.gate_hessian_diagonal())
def obd(data: Data) -> Scores:
    """``1/2 d2L/dg2`` per element (Optimal Brain Damage, LeCun et al. 1989, eq. 5, for a block).

    Needs the statistic ``gate_hessian_diagonal``, which estimates the diagonal of the Hessian.

    Raises:
        ValueError: data without ``gate_hessian_diagonal``.

    Example:
        >>> curvature = bp.statistics.gate_hessian_diagonal(probes=8)
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[curvature],
        ...                                   batches=[torch.randn(8, 4)], loss=lambda output, batch: output.square().mean())
        >>> bp.metric.obd(data)["weight"].value.shape
        torch.Size([2, 2])
    """
    return score_parameters(data, lambda p: per_element(p.stats["gate_hessian_diagonal"] / 2, p.grid))


@requires(statistics.gate_grad)
def snip(data: Data) -> Scores:
    """``|E[dL/dg]|`` as a share of the sum over the model, per element (SNIP, Lee et al. 1810.02340, eq. 5).

    Needs the statistic ``gate_grad``. Rank it with `allocate.per_model`.

    Raises:
        ValueError: data without ``gate_grad``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.gate_grad],
        ...                                   batches=[torch.randn(8, 4)], loss=lambda output, batch: output.square().mean())
        >>> round(float(bp.metric.snip(data)["weight"].value.sum()) * 4, 4)
        1.0
    """
    total = sum(float(p.stats["gate_grad"].abs().sum()) for p in data.values()) or 1.0
    return score_parameters(data, lambda p: per_element(p.stats["gate_grad"].abs() / total, p.grid))


@requires(statistics.gate_hessian_grad)
def grasp(data: Data) -> Scores:
    """``(H dL/dg) g`` per element: blocks whose removal would reduce the gradient's norm score high (GraSP, Wang et al. 2002.07376, eq. 8).

    Needs the statistic ``gate_hessian_grad``. Scores are signed. Rank it with `allocate.per_model`.

    Raises:
        ValueError: data without ``gate_hessian_grad``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.gate_hessian_grad],
        ...                                   batches=[torch.randn(8, 4)], loss=lambda output, batch: output.square().mean())
        >>> bp.metric.grasp(data)["weight"].value.shape
        torch.Size([2, 2])
    """
    return score_parameters(data, lambda p: per_element(p.stats["gate_hessian_grad"], p.grid))


@requires(statistics.gate_flow)
def synflow(data: Data) -> Scores:
    """``dR/dg`` per element, where R is the summed output of the network of ``|weights|`` on an input of ones.

    Source: SynFlow, Tanaka et al. 2006.05467, eq. 3. Needs the statistic ``gate_flow``. Rank it with `allocate.per_model`, and prune in
    many small steps.

    Raises:
        ValueError: data without ``gate_flow``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.gate_flow],
        ...                                   batches=[torch.randn(8, 4)])
        >>> bool((bp.metric.synflow(data)["weight"].value > 0).all())
        True
    """
    return score_parameters(data, lambda p: per_element(p.stats["gate_flow"], p.grid))


def movement(data: Data) -> Scores:
    """``- sum over steps of w g``, mean over the block: weights that training moves away from zero score high (Sanh et al. 2005.07683).

    Needs the statistic ``movement``, which `collect.movement` adds up in your training loop.

    Raises:
        ValueError: data without ``movement``, or a parameter that had a gradient in no step.

    Example:
        >>> model, data = nn.Linear(4, 4), None
        >>> for _ in range(3):                              # your loop: after backward, before the step
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     data = bp.collect.movement(model, where=bp.linears((2, 2)), previous=data)
        >>> bp.metric.movement(data)["weight"].value.shape
        torch.Size([2, 2])
    """
    for name, p in data.items():
        if "movement" not in p.stats:
            raise ValueError(
                f"{name} {p.grid.shape}: metric.movement needs the statistic 'movement'; the data has {sorted(p.stats) or 'none'}; "
                "collect it: bp.collect.movement(model, where=..., previous=...) after each backward. If you did, no step gave this "
                "parameter a gradient, because the loss does not depend on it: leave it out with `excluding`"
            )
    return score_parameters(data, lambda p: pool(p.stats["movement"], p.grid, reduce="mean"))
