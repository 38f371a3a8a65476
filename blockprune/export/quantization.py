"""Weights and inputs as int8 numbers times a scale of each row, and the error that this makes.

Both are symmetric: zero stays zero, so pruned blocks do. Weights have a scale for each row (output), because a scale for each row of each
block made outputs hardly more precise: most of the error comes from the inputs, which have a scale for each row of x, computed on the fly.
"""

import torch
from torch import Tensor

from blockprune.core.precision import no_autocast

TOP = 127  # the largest int8 number that is used, so that the numbers are symmetric
_SMALLEST = 1e-36  # inputs below are zeros, so that 127 / m stays finite


def wants_int8(dtype: object) -> bool:
    """Whether an option ``dtype`` asks for int8, as a word or as torch's type.

    Raises:
        ValueError: it is neither int8 nor None.

    Example:
        >>> from blockprune.export.quantization import wants_int8
        >>> wants_int8("int8"), wants_int8(None)
        (True, False)
    """
    if dtype not in (None, "int8", torch.int8):
        raise ValueError(f"dtype={dtype!r} must be 'int8', or None for the type of the weights; model.to(dtype) converts to another one")
    return dtype is not None


def is_quantizable(weight: Tensor) -> bool:
    """Whether float32, in which the scales are, holds each row: it is finite, and no float64 is too large or too small for it.

    Example:
        >>> from blockprune.export.quantization import is_quantizable
        >>> [is_quantizable(torch.tensor([[size]], dtype=torch.float64)) for size in (1.0, 0.0, 1e-60, 1e60)]
        [True, True, False, False]
    """
    largest = weight.detach().abs().amax(1)
    rounded = largest.float()
    return bool((rounded.isfinite() & ((rounded > 0) == (largest > 0))).all())


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of int8 from -127 to 127, ``[rows, columns]``, and the scale of each row, float32 ``[rows]``: ``weight ~ numbers * scale``.

    Raises:
        ValueError: a weight that is not `is_quantizable`.

    Example:
        >>> from blockprune.export.quantization import quantize_weight
        >>> quantize_weight(torch.tensor([[127.0, -1.2], [0.0, 0.0]]))
        (tensor([[127,  -1],
                [  0,   0]], dtype=torch.int8), tensor([1., 1.]))
    """
    if not is_quantizable(weight):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is not finite, or not in the range of float32, so it has no int8 form")
    exact = weight.detach().float()
    scale = exact.abs().amax(1) / TOP
    scale = torch.where(scale > 0, scale, 1)
    return (exact / scale[:, None]).round().clamp(-TOP, TOP).to(torch.int8), scale


def quantize_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, float32 ``[n, columns]``, and the scale of each row ``[n]``: ``x ~ numbers * scale``.

    A row that is not finite has the scale NaN, so that its outputs are NaN.

    Example:
        >>> from blockprune.export.quantization import quantize_inputs
        >>> quantize_inputs(torch.tensor([[63.5, -1.0, 0.0], [float("inf"), 1.0, 0.0]]))
        (tensor([[127.,  -2.,   0.],
                [  0.,   0.,   0.]]), tensor([0.5000,    nan]))
    """
    exact = x.float()
    largest = exact.abs().amax(1)
    finite = largest.isfinite()
    # TOP / largest would be TOP times the reciprocal, which rounds twice
    inverse = torch.where(largest < _SMALLEST, 0, torch.full_like(largest, TOP) / largest)
    return torch.where(finite[:, None], (exact * inverse[:, None]).round(), 0), torch.where(finite, largest / TOP, torch.nan)


def output_error(x: Tensor, weight: Tensor) -> float:
    """The relative error of ``x W^T`` in int8, ``x [n, columns]`` and ``W [rows, columns]``: ``|int8 - exact| / |exact|`` (norms).

    Rows of x that are not finite do not count; if no row is finite, the error is NaN. If all outputs are zero, it is 0.

    Example:
        >>> from blockprune.export.quantization import output_error
        >>> output_error(torch.tensor([[127.0, 50.0]]), torch.tensor([[127.0, 3.0]]))
        0.0
    """
    x, weight = x[x.isfinite().all(1)].float(), weight.float()
    if not len(x):
        return float("nan")
    numbers, scale = quantize_weight(weight)
    inputs, input_scale = quantize_inputs(x)
    with no_autocast():
        exact = x @ weight.mT
        error = (inputs * input_scale[:, None]) @ (numbers * scale[:, None]).mT - exact
    return float(error.norm() / exact.norm()) if bool(exact.any()) else 0.0
