"""2:4 weights, which keep two of every four consecutive elements, on GPUs whose matrix units skip the others (cuSPARSELt)."""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockprune.core._compat import compress_two_of_four, search_two_of_four, two_of_four_product
from blockprune.core.grid import BlockGrid
from blockprune.core.types import BlockMask
from blockprune.export.exported_weight import ExportedWeight

_DTYPES = (torch.bfloat16,)  # in float16, cuSPARSELt's search for an algorithm ended in an illegal instruction (H200, torch 2.11)
REQUIREMENT = "2:4 in bfloat16 on a GPU, with sides that are multiples of 16"
_SIDE_MULTIPLE = 16  # of the weight; cuSPARSELt requires it
_BATCH_MULTIPLE = 8  # of the inputs; cuSPARSELt requires it
_SEARCH_ROWS = 2048  # rows of inputs for which an algorithm is searched; with fewer, 2:4 is hardly faster than dense


def status() -> tuple[bool, str]:
    """Whether this machine multiplies 2:4 weights; and by what, or the reason why not.

    Example:
        >>> from blockprune.export import semi_structured
        >>> semi_structured.status()[0] <= torch.cuda.is_available()
        True
    """
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if not torch.backends.cusparselt.is_available():
        return False, "this torch was built without cuSPARSELt"
    return True, f"cuSPARSELt on {torch.cuda.get_device_name()}, two of four weights kept, bfloat16"


def is_supported(weight: Tensor) -> bool:
    """Whether a weight is 2:4 and on a device, of a type and of a shape that cuSPARSELt takes (Mishra et al. 2104.08378, section 3).

    Example:
        >>> from blockprune.export import semi_structured
        >>> semi_structured.is_supported(torch.ones(16, 16))
        False
    """
    fits = weight.ndim == 2 and weight.is_cuda and weight.dtype in _DTYPES and not any(side % _SIDE_MULTIPLE for side in weight.shape)
    return fits and is_two_of_four(weight)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether each group of four consecutive elements of a row has at most two that are not zero.

    Example:
        >>> from blockprune.export import semi_structured
        >>> semi_structured.is_two_of_four(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]]))
        True
    """
    return weight.shape[-1] % 4 == 0 and bool((weight.unflatten(-1, (-1, 4)) != 0).sum(-1).le(2).all())


class SemiStructuredLinear(nn.Module):
    """A Linear whose weight is 2:4 and frozen, in cuSPARSELt's format; the bias, if any, remains a parameter.

    Only cuSPARSELt can read that format, ``values``, in which the places of the kept weights are bits beside the numbers. So it is no
    buffer, and a moving average over buffers leaves it alone; the state dict holds its bits as int16. A state of a layer of the same shape
    loads. To change the type or the device, convert the masked model, or that of `export.dense`, again. Gradients of the inputs are dense
    products.

    Args:
        plain: on a GPU, with a weight that `is_supported`; its bias is shared, not copied.

    Raises:
        ValueError: a weight that is not supported.

    Example:
        >>> from blockprune.export.semi_structured import SemiStructuredLinear
        >>> SemiStructuredLinear(export.dense(masked)[0])(x)  # doctest: +SKIP
    """

    constants: ClassVar[tuple[str, ...]] = ("values",)  # tensors that nothing averages or converts, because they are no buffers
    values: Tensor
    bias: nn.Parameter | None

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        weight = plain.weight.detach().contiguous()
        if not is_supported(weight):
            raise ValueError(f"a weight {tuple(weight.shape)} of {weight.dtype} on {weight.device} is not {REQUIREMENT}")
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.values = compress_two_of_four(weight)
        self.register_parameter("bias", plain.bias)
        example = weight.new_ones(_SEARCH_ROWS, self.in_features)
        self.algorithm = search_two_of_four(self.values, example.mT)

    @property
    def weight(self) -> Tensor:
        """The dense weight, zero where pruned. Each read computes it by a product, so a change of it in place raises."""
        dense = _dense(self.values, self.algorithm, self.out_features, self.in_features)
        return ExportedWeight.read(dense, "", "change the weight of export.dense(model), and export that again")

    def block_mask(self) -> BlockMask:
        """Which elements of the dense ``weight`` are not zero, in blocks of one element."""
        return BlockMask(self.weight != 0, BlockGrid((self.out_features, self.in_features), (1, 1)))

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"an input of shape {tuple(input.shape)} does not fit a weight of {self.in_features} columns: "
                f"its last axis must be {self.in_features}"
            )
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(self.values.dtype)
        if input.dtype != self.values.dtype:
            raise TypeError(f"an input of {input.dtype} does not fit a 2:4 weight of {self.values.dtype}; convert the input")
        out = linear(input.reshape(-1, self.in_features), self.bias, self.values, self.algorithm, self.out_features)
        return cast(Tensor, out).view(*input.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SemiStructuredLinear":
        new = fn(self.values)
        if new.dtype != self.values.dtype or not new.is_cuda:
            weight = f"a 2:4 weight ({self.out_features}, {self.in_features})"
            raise TypeError(
                f"{weight} cannot become {new.dtype} on {new.device.type}; convert the masked model or export.dense(model) and export again"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.values = self.values.to(new.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}values"] = self.values.view(torch.int16).clone()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *args: Any
    ) -> None:
        key = f"{prefix}values"
        bits, present = state_dict.get(key), self.values.view(torch.int16)
        if bits is None:
            missing_keys += [key] if strict else []
        elif (bits.shape, bits.dtype) != (present.shape, present.dtype):
            cast(list[str], args[-1]).append(
                f"{key}: {bits.dtype} {tuple(bits.shape)} are not the bits of a 2:4 weight ({self.out_features}, {self.in_features}), "
                f"which are {present.dtype} {tuple(present.shape)} and cannot be averaged or converted; load the state dict of a 2:4 layer"
            )
            return
        else:
            self.values = bits.detach().to(present.device, copy=True).view(self.values.dtype)
        ignored = {key}
        if bits is not None and state_dict.get(f"{prefix}weight", bits).shape == (1,):  # of a Hugging Face model: see hf_checkpoint.py
            ignored.add(f"{prefix}weight")
        others = {name: value for name, value in state_dict.items() if name not in ignored}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, *args)

    def __prepare_scriptable__(self) -> nn.Module:
        weight = f"a 2:4 weight ({self.out_features}, {self.in_features})"
        raise RuntimeError(f"torch.jit.script cannot compile {weight}; script export.dense(model), which has plain layers")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, 2:4"


@torch.library.custom_op("blockprune::two_of_four_linear", mutates_args=())
def linear(x: Tensor, bias: Tensor | None, values: Tensor, algorithm: int, rows: int) -> Tensor:
    """``x W^T + bias`` of ``x [n, columns]`` with ``W [rows, columns]`` in cuSPARSELt's format, by one of its algorithms: ``[n, rows]``."""
    if not len(x):
        return x.new_empty(0, rows)
    padded = F.pad(x, (0, 0, 0, -len(x) % _BATCH_MULTIPLE))
    return two_of_four_product(values, padded.mT, bias, algorithm)[: len(x)]


@linear.register_fake
def _(x: Tensor, bias: Any, values: Any, algorithm: int, rows: int) -> Tensor:
    return x.new_empty(len(x), rows)


def _dense(values: Tensor, algorithm: int, rows: int, columns: int) -> Tensor:
    eye = torch.eye(columns, dtype=values.dtype, device=values.device)
    return cast(Tensor, linear(eye, None, values, algorithm, rows)).mT.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.dense_options = *inputs[3:], inputs[0].shape[1]  # algorithm, rows, columns


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input_grad = grad @ _dense(ctx.saved_tensors[0], *ctx.dense_options) if ctx.needs_input_grad[0] else None
    return input_grad, grad.sum(0) if ctx.needs_input_grad[1] else None, None, None, None


linear.register_autograd(_backward, setup_context=_setup_context)
