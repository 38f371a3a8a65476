"""Scores from derivatives of the loss, most of them with respect to one gate a block (a factor on its weights, at 1).

Removing a block moves its gate g from 1 to 0, so the loss changes by ``-dL/dg + 1/2 d2L/dg2``: every criterion here is a term of that.
Scores are per element: times the block's elements they are the (approximate) loss change.
"""

from blockprune.blocks import pool
from blockprune.metric.scoring import each, needs, per_element
from blockprune.types import BlockScore, Data, Scores


def taylor(data: Data, *, squared: bool = False) -> Scores:
    """``|sum over the block of w E[g]|`` per element, the first-order loss change (Molchanov et al. 1611.06440, eq. 7).

    Args:
        data: with the statistic ``weight_grad``, or ``weight_grad_sq`` if squared.
        squared: the mean over the block of ``w^2 E[g^2]`` instead (Molchanov et al. 1906.10771, eq. 8 and 9).

    Raises:
        ValueError: data without the statistic.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.weight_grad],
        ...                                   batches=[torch.randn(8, 4)], loss=lambda output, batch: output.square().mean())
        >>> bp.metric.taylor(data)["weight"].value.shape
        torch.Size([2, 2])
    """
    if squared:
        needs(data, "weight_grad_sq", metric="taylor(squared=True)")
        return each(data, lambda p: pool(p.weight.square() * p.stats["weight_grad_sq"], p.grid, reduce="mean"))
    needs(data, "weight_grad", metric="taylor")
    return each(data, lambda p: pool(p.weight * p.stats["weight_grad"], p.grid, reduce="mean").abs())


def fisher(data: Data) -> Scores:
    """``1/2 E[(dL/dg)^2]`` per element: the loss change where the empirical Fisher stands for the Hessian (Theis et al. 1801.05787, eq. 6).

    Needs the statistic ``gate_fisher``.

    Raises:
        ValueError: data without ``gate_fisher``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.gate_fisher],
        ...                                   batches=[torch.randn(8, 4)], loss=lambda output, batch: output.square().mean())
        >>> bool((bp.metric.fisher(data)["weight"].value > 0).all())
        True
    """
    needs(data, "gate_fisher", metric="fisher")
    return each(data, lambda p: per_element(p.stats["gate_fisher"] / 2, p.grid))


def obd(data: Data) -> Scores:
    """``1/2 d2L/dg2`` per element (Optimal Brain Damage, LeCun et al. 1989, eq. 5, for a block).

    Needs the statistic ``gate_hvp``, which estimates the diagonal of the Hessian.

    Raises:
        ValueError: data without ``gate_hvp``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.gate_hvp(probes=8)],
        ...                                   batches=[torch.randn(8, 4)], loss=lambda output, batch: output.square().mean())
        >>> bp.metric.obd(data)["weight"].value.shape
        torch.Size([2, 2])
    """
    needs(data, "gate_hvp", metric="obd")
    return each(data, lambda p: per_element(p.stats["gate_hvp"] / 2, p.grid))


def snip(data: Data) -> Scores:
    """``|E[dL/dg]|`` as a share of the sum over the model, per element (SNIP, Lee et al. 1810.02340, eq. 5).

    Needs the statistic ``gate_grad``. Rank it with `allocate.global_`.

    Raises:
        ValueError: data without ``gate_grad``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.gate_grad],
        ...                                   batches=[torch.randn(8, 4)], loss=lambda output, batch: output.square().mean())
        >>> round(float(bp.metric.snip(data)["weight"].value.sum()) * 4, 4)
        1.0
    """
    needs(data, "gate_grad", metric="snip")
    total = sum(float(p.stats["gate_grad"].abs().sum()) for p in data.values()) or 1.0
    return each(data, lambda p: per_element(p.stats["gate_grad"].abs() / total, p.grid))


def grasp(data: Data) -> Scores:
    """``(H dL/dg) g`` per element: blocks whose removal would let the gradient flow less score high (GraSP, Wang et al. 2002.07376, eq. 8).

    Needs the statistic ``gate_hg``. Scores are signed. Rank it with `allocate.global_`.

    Raises:
        ValueError: data without ``gate_hg``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.gate_hg],
        ...                                   batches=[torch.randn(8, 4)], loss=lambda output, batch: output.square().mean())
        >>> bp.metric.grasp(data)["weight"].value.shape
        torch.Size([2, 2])
    """
    needs(data, "gate_hg", metric="grasp")
    return each(data, lambda p: per_element(p.stats["gate_hg"], p.grid))


def synflow(data: Data) -> Scores:
    """``dR/dg`` per element, R the summed output of the network of ``|weights|`` on ones (SynFlow, Tanaka et al. 2006.05467, eq. 3).

    Needs the statistic ``gate_flow``. Rank it with `allocate.global_`, in many small steps.

    Raises:
        ValueError: data without ``gate_flow``.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(4, 4), where=bp.linears((2, 2)), statistics=[bp.statistics.gate_flow],
        ...                                   batches=[torch.randn(8, 4)])
        >>> bool((bp.metric.synflow(data)["weight"].value > 0).all())
        True
    """
    needs(data, "gate_flow", metric="synflow")
    return each(data, lambda p: per_element(p.stats["gate_flow"], p.grid))


def movement(data: Data) -> Scores:
    """``- sum over steps of w g``, mean over the block: weights that training moves away from zero score high (Sanh et al. 2005.07683).

    Needs the statistic ``movement``, which `collect.movement` folds in your training loop.

    Raises:
        ValueError: data without ``movement``.

    Example:
        >>> model, data = nn.Linear(4, 4), None
        >>> for _ in range(3):                              # your loop: after backward, before the step
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     data = bp.collect.movement(model, where=bp.linears((2, 2)), previous=data)
        >>> bp.metric.movement(data)["weight"].value.shape
        torch.Size([2, 2])
    """
    needs(data, "movement", metric="movement")
    return {name: BlockScore(pool(p.stats["movement"], p.grid, reduce="mean"), p.grid) for name, p in data.items()}
