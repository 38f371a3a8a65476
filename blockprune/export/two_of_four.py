"""Weights that keep two of every four neighbours, on GPUs whose matrix units skip the others: through cuSPARSELt, as torch has it."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_DTYPES = (torch.bfloat16,)  # in float16 cuSPARSELt's search for an algorithm ended in an illegal instruction (H200, torch 2.11)
WANTED = "2:4 in bfloat16 on a GPU, in sides of 16"
_SIDES = 16  # of which cuSPARSELt wants multiples
_FEWEST = 8  # and of inputs
_ROWS = 2048  # inputs for which its algorithm is searched: fewer hardly pay


def status() -> tuple[bool, str]:
    """Whether this machine multiplies 2:4 weights, and with what or why not.

    Example:
        >>> from blockprune.export import two_of_four
        >>> two_of_four.status()[0] <= torch.cuda.is_available()
        True
    """
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if not torch.backends.cusparselt.is_available():
        return False, "this torch was built without cuSPARSELt"
    return True, f"cuSPARSELt on {torch.cuda.get_device_name()}, two of four weights kept, bfloat16"


def fits(weight: Tensor) -> bool:
    """Whether a weight with zeros is 2:4, on a GPU, and of a type and shape that is multiplied so (Mishra et al. 2104.08378, section 3).

    Example:
        >>> from blockprune.export import two_of_four
        >>> two_of_four.fits(torch.ones(16, 16))
        False
    """
    whole = weight.ndim == 2 and weight.is_cuda and weight.dtype in _DTYPES and not any(side % _SIDES for side in weight.shape)
    return whole and is_two_of_four(weight)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether no four neighbours of a row, from the first on, keep more than two.

    Example:
        >>> from blockprune.export import two_of_four
        >>> two_of_four.is_two_of_four(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]]))
        True
    """
    return weight.shape[-1] % 4 == 0 and bool((weight.unflatten(-1, (-1, 4)) != 0).sum(-1).le(2).all())


class TwoOfFourLinear(nn.Module):
    """A Linear whose weight is 2:4 and frozen, held as cuSPARSELt wants it in a buffer; its bias, if any, is a parameter as before.

    Its numbers mean something to cuSPARSELt alone: for another type or device it is made again, from the masked model or `export.dense`.
    Gradients of inputs are dense products.

    Args:
        plain: on a GPU, with a weight that `fits`; its bias is taken as it is.

    Raises:
        ValueError: a weight that does not fit.

    Example:
        >>> from blockprune.export.two_of_four import TwoOfFourLinear
        >>> TwoOfFourLinear(export.dense(masked)[0])(x)  # doctest: +SKIP
    """

    values: Tensor
    bias: nn.Parameter | None

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        weight, library = plain.weight.detach().contiguous(), cast(Any, torch._C)
        if not fits(weight):
            raise ValueError(f"a weight {tuple(weight.shape)} of {weight.dtype} on {weight.device} is not {WANTED}")
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_buffer("values", torch._cslt_compress(weight))
        self.register_parameter("bias", plain.bias)
        some = weight.new_ones(_ROWS, self.in_features)
        self.algorithm = int(library._cusparselt.mm_search(self.values, some.mT, None, None, None, True)[0])

    @property
    def weight(self) -> Tensor:
        """The dense weight, zero where pruned; made anew at each read, which is a product."""
        return _dense(self.values, self.algorithm, self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"an input of shape {tuple(input.shape)} meets a weight of {self.in_features} columns: its last axis must be those"
            )
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(self.values.dtype)
        if input.dtype != self.values.dtype:
            raise TypeError(f"an input of {input.dtype} meets a 2:4 weight of {self.values.dtype}; convert the input")
        out = linear(input.reshape(-1, self.in_features), self.bias, self.values, self.algorithm, self.out_features)
        return cast(Tensor, out).view(*input.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TwoOfFourLinear":
        new = fn(self.values)
        if new.dtype != self.values.dtype or not new.is_cuda:
            weight = f"a 2:4 weight ({self.out_features}, {self.in_features})"
            raise TypeError(
                f"{weight} cannot become {new.dtype} on {new.device.type}; make it again: export.dense(model), or the masked model"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, 2:4"


@torch.library.custom_op("blockprune::two_of_four_linear", mutates_args=())
def linear(x: Tensor, bias: Tensor | None, values: Tensor, algorithm: int, rows: int) -> Tensor:
    """``x W^T + bias`` of ``x [n, columns]`` with ``W [rows, columns]`` as cuSPARSELt holds it, by one of its algorithms: ``[n, rows]``."""
    if not len(x):
        return x.new_empty(0, rows)
    padded = F.pad(x, (0, 0, 0, -len(x) % _FEWEST))
    return torch._cslt_sparse_mm(values, padded.mT, bias, alg_id=algorithm, transpose_result=True)[: len(x)]


@linear.register_fake
def _(x: Tensor, bias: Any, values: Any, algorithm: int, rows: int) -> Tensor:
    return x.new_empty(len(x), rows)


def _dense(values: Tensor, algorithm: int, rows: int, columns: int) -> Tensor:
    eye = torch.eye(columns, dtype=values.dtype, device=values.device)
    return cast(Tensor, linear(eye, None, values, algorithm, rows)).mT.contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.how = *inputs[3:], inputs[0].shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_x = grad @ _dense(ctx.saved_tensors[0], *ctx.how) if ctx.needs_input_grad[0] else None
    return to_x, grad.sum(0) if ctx.needs_input_grad[1] else None, None, None, None


linear.register_autograd(_backward, setup_context=_setup)
