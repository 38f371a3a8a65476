"""The squared output error of a layer as a quadratic function of its weight: the damped Hessian and its Cholesky factor."""

import warnings

import attrs
import torch
from torch import Tensor

from blockprune.core.arguments import check_counts, check_number
from blockprune.core.types import Param

MAX_DAMPING_RETRIES = 3  # if H is singular, the damping is multiplied by ten at most this many times
MIN_VARIANCE_SHARE = 1e-5  # an input's variance counts as at least this share of its mean square; a damping of 0 as this when it is retried


@attrs.frozen(eq=False)
class LayerQuadratic:
    """The mean squared error of a layer's output when its weight is V: up to a constant ``tr((V - best) H (V - best)^T)``.

    H is the mean of the inputs' outer products plus the damping. Each group of output rows (of a grouped convolution, of the query, key
    and value of an attention) has an H of its own. ``best`` is the weight itself, unless the data has statistics of another target output.
    The damping multiplies the diagonal of H by a constant above 1, so it depends neither on the scale of the other inputs nor on the
    unit of any input. It pulls V towards the present weight.
    """

    weight: Tensor  # [groups, rows, k]
    target_product: Tensor  # [groups, rows, k] target output times input, damped: best @ hessian
    hessian: Tensor  # [groups, k, k] damped
    cholesky: Tensor  # [groups, k, k] lower factor of the Hessian, in float64
    damping: float  # the share of the diagonal that was added
    has_target: bool  # whether ``best`` differs from the weight
    means: tuple[Tensor, Tensor] | None  # of target outputs [groups, rows] and inputs [groups, k], if a bias can compensate for them

    @property
    def best(self) -> Tensor:
        """The weight that minimizes the error when nothing is pruned, ``[groups, rows, k]``."""
        if not self.has_target:
            return self.weight
        return torch.cholesky_solve(self.target_product.double().mT, self.cholesky).mT.to(self.weight.dtype)


def layer_quadratic(name: str, p: Param, *, damping: float) -> LayerQuadratic:
    """The quadratic error of one parameter, from its statistic ``input_gram``.

    If the data has ``input_cross`` (and ``residual_cross``) too, the target is the output of the dense layer on the dense model's inputs
    (and what its residual input adds). If it has ``input_mean`` and ``bias``, all inputs are centered, because a bias can compensate for
    their mean. A singular Hessian is damped ten times as much, with a warning, until it is positive definite in its own precision and in
    float64.

    Raises:
        TypeError: an ``input_gram`` in half precision.
        ValueError: the damping is negative; the diagonal of ``input_gram`` is negative; the inputs are all zero or have NaN or inf; H is
            singular even with 1000 times the damping.
    """
    damping = check_number("damping", damping, "a number from 0 on, the share of H's diagonal that is added to it", lowest=0)
    gram = p.stats["input_gram"]  # [groups, k, k]
    if gram.dtype.itemsize < 4 or not gram.is_floating_point():
        raise TypeError(
            f"{name} {p.grid.shape}: its input_gram is {gram.dtype}, which rounds too much to invert it; collect it with "
            "statistics.input_gram, which adds up in float32 or wider"
        )
    weight = p.weight.to(gram).reshape(len(gram), -1, gram.shape[-1])
    target_product, target_mean = _target(p, weight)
    power, means = gram.diagonal(dim1=1, dim2=2), None  # [groups, k] mean squares
    if "input_mean" in p.stats and _has_elements(p, "bias"):
        mean = _input_mean(p).to(gram)  # [groups, k]
        means = (weight @ mean[:, :, None])[..., 0] if target_mean is None else target_mean, mean
        gram = gram - mean[:, :, None] * mean[:, None, :]
        target_product = target_product - means[0][:, :, None] * mean[:, None, :]
    layer = f"{name} {p.grid.shape}"
    scale = _damping_scale(layer, gram, power)
    share, hessian, cholesky = _damped(layer, gram, scale, damping)
    target_product = target_product + share * scale[:, None, :] * weight
    return LayerQuadratic(weight, target_product, hessian, cholesky, share, target_mean is not None, means)


def _target(p: Param, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Target output times input ``[groups, rows, k]``, and the target's mean ``[groups, rows]`` unless it is the layer's own output."""
    gram = p.stats["input_gram"]
    if "input_cross" not in p.stats:
        return weight @ gram, None
    product = weight @ p.stats["input_cross"].to(gram)  # [groups, rows, k + 1]: the last input is the constant 1
    if _has_elements(p, "residual_cross"):
        product = product + p.stats["residual_cross"].to(gram)
    return product[..., :-1], product[..., -1]


def _has_elements(p: Param, statistic: str) -> bool:
    return statistic in p.stats and p.stats[statistic].numel() > 0


def _input_mean(p: Param) -> Tensor:
    """The statistic ``input_mean``, which broadcasts to the weight, as ``[groups, k]``."""
    groups, k, _ = p.stats["input_gram"].shape
    mean = p.stats["input_mean"]
    return mean.reshape(1, k) if groups == 1 else mean.reshape(groups, -1, k)[:, 0]


def _damping_scale(layer: str, gram: Tensor, power: Tensor) -> Tensor:
    """What the damping of each input is a share of, ``[groups, k]``: its variance; for an input that is always 0, the smallest of all."""
    if not gram.isfinite().all():
        raise ValueError(f"{layer}: its input_gram has NaN or inf; check the calibration batches")
    if (power < 0).any():
        raise ValueError(
            f"{layer}: the diagonal of its input_gram has negative values, but that of X^T X / n is a mean of squares; check how it was "
            "computed, and that no token weight is negative"
        )
    scale = torch.maximum(gram.diagonal(dim1=1, dim2=2), MIN_VARIANCE_SHARE * power)
    if (scale <= 0).all():
        raise ValueError(
            f"{layer}: its inputs are all zero, so its weights have no effect; leave it out with `excluding`, or check the batches"
        )
    return torch.where(scale > 0, scale, scale[scale > 0].min())


def _damped(layer: str, gram: Tensor, scale: Tensor, damping: float) -> tuple[float, Tensor, Tensor]:
    """The smallest damping that makes H positive definite, the damped H, and its Cholesky factor."""
    share = damping
    for share in (damping, *(max(damping, MIN_VARIANCE_SHARE) * 10**i for i in range(1, MAX_DAMPING_RETRIES + 1))):
        hessian = gram.clone()
        hessian.diagonal(dim1=1, dim2=2).add_(share * scale)
        if (cholesky := _cholesky(hessian)) is None:
            continue
        if share != damping:
            warnings.warn(
                f"{layer}: H is singular in {str(gram.dtype)[6:]} with damping={damping:g}; {share:g} was used instead; "
                "more calibration batches or a larger damping avoid this",
                stacklevel=5,
            )
        return share, hessian, cholesky
    raise ValueError(
        f"{layer}: H = X^T X / n is not positive definite with damping={damping:g}, nor with {share:g}; "
        "give more batches, float64 statistics or a larger damping"
    )


def _cholesky(hessian: Tensor) -> Tensor | None:
    """The Cholesky factor in float64, or None if H is singular up to rounding, in its own precision or in float64.

    The square of the factor's diagonal is the part of each input's variance that the inputs before it do not explain.
    """
    factor = hessian
    for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
        del factor  # before the next one is made: it is as large as H
        factor = torch.empty_like(hessian, dtype=dtype).mT.copy_(hessian)  # column by column, so that it is factored where it is
        variance = factor.diagonal(dim1=1, dim2=2).clone()
        info = torch.linalg.cholesky_ex(factor, out=(factor, torch.empty_like(factor[:, 0, 0], dtype=torch.int32))).info
        unexplained = factor.diagonal(dim1=1, dim2=2).square() / variance
        if info.any() or not (unexplained > max(16 * torch.finfo(hessian.dtype).eps, 1e-11)).all():
            return None
    return factor


def inverse_of_factor(cholesky: Tensor) -> Tensor:
    """H^-1 ``[groups, k, k]``, written into the memory of the lower Cholesky factor of H.

    Example:
        >>> from blockprune.core.hessian import inverse_of_factor
        >>> inverse_of_factor(torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]))
        tensor([[[ 2., -1.],
                 [-1.,  1.]]])
    """
    return torch.cholesky_inverse(cholesky, out=cholesky).mT  # symmetric, and torch gives it column by column


def upper_factor(inverse: Tensor) -> Tensor:
    """The upper U of ``H^-1 = U^T U``, ``[groups, k, k]``, written into the memory of H^-1.

    Raises:
        torch.linalg.LinAlgError: rounding made the inverse indefinite.

    Example:
        >>> from blockprune.core.hessian import upper_factor
        >>> upper_factor(torch.tensor([[[4.0, 2.0], [2.0, 2.0]]]))
        tensor([[[2., 1.],
                 [0., 1.]]])
    """
    columns = inverse.mT  # symmetric, and LAPACK factors a matrix column by column
    torch.linalg.cholesky(columns, upper=True, out=columns)
    return columns


def workspace_bytes(device: torch.device, memory: int | None) -> int:
    """The bytes that temporary tensors may take: ``memory``, or by default 16 MiB, on a GPU a quarter of its free memory.

    Example:
        >>> from blockprune.core.hessian import workspace_bytes
        >>> workspace_bytes(torch.device("cpu"), None) >> 20
        16
    """
    if memory is not None:
        return int(check_counts(0, whole_floats=True, memory=memory)[0])
    if device.type != "cuda":
        return 1 << 24  # fits in the caches, and malloc reuses blocks of this size instead of mapping new pages each time
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's cache is free, too
    return (torch.cuda.mem_get_info(device)[0] + cached) // 4
