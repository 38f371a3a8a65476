"""Layers that hold only the kept blocks of their weight."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockprune import storage
from blockprune.blocks import BlockGrid, expand
from blockprune.export import gpu
from blockprune.export.product import BACKENDS, compiled, multiply
from blockprune.storage import BlockSparse
from blockprune.types import BlockMask

TENSORS = ("values", "crow", "col", "layout")  # of a block-sparse weight in a state dict

__all__ = ["BlockSparseConv2d", "BlockSparseLinear", "as_matrix"]


class BlockSparseLinear(nn.Module):
    """A Linear whose kept blocks are ordinary buffers and do not train; its bias, if any, is a parameter as before.

    Its state dict holds ``values``, ``crow``, ``col`` (see `storage.BlockSparse`), ``layout`` (rows, columns, the height and width of a
    stored block, 1 if in pairs) and ``bias``. Another mask of the same layer loads into it; indices out of range do not. The weight is
    stored as its device wants it, in pairs but on a GPU, also after ``to`` and ``load_state_dict``; tensors copied one by one into another
    layer mean the same there only if both layers are on GPUs, or neither.

    Args:
        weight: the kept blocks of ``[out_features, in_features]``.
        bias: ``[out_features]`` or None; taken as it is.
        backend: "native" or "triton", which are one (the device decides) and leave what they cannot multiply to torch, or "torch".

    Raises:
        ValueError: a weight whose tensors do not fit each other, a bias that does not fit it, a backend that is none of these.

    Example:
        >>> from blockprune import export, storage
        >>> weight = storage.pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> export.BlockSparseLinear(weight, None)(torch.ones(2, 4))
        tensor([[2., 2., 2., 2.],
                [2., 2., 2., 2.]])
    """

    values: Tensor
    crow: Tensor
    col: Tensor
    layout: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: BlockSparse, bias: nn.Parameter | None, backend: str = "native") -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} must be one of {BACKENDS}")
        storage.check(weight)
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"a bias of shape {tuple(bias.shape)} does not fit a weight of shape {weight.shape}: it must be ({weight.shape[0]},)"
            )
        self.backend = backend
        for name in TENSORS:
            self.register_buffer(name, None)
        self._store(weight)
        self.register_parameter("bias", bias)

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    @property
    def sparse(self) -> BlockSparse:
        """The weight as it is stored."""
        return BlockSparse(self.values, self.crow, self.col, self.shape, self.block, self.paired)

    @property
    def weight(self) -> Tensor:
        """The dense weight, zero where pruned; made anew at each read."""
        return storage.unpack(self.sparse)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 0 or input.shape[-1] != self.shape[1]:
            raise ValueError(
                f"an input of shape {tuple(input.shape)} meets a weight of shape {self.shape}: its last axis must be {self.shape[1]}"
            )
        values, bias = self.values, cast(Tensor | None, self.bias)
        if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(input.device.type)
            input, values, bias = input.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
        if input.dtype != values.dtype:
            raise TypeError(
                f"an input of {input.dtype} meets a weight of {values.dtype}; convert one: model.to({input.dtype}) or input.to(...)"
            )
        if not torch.compiler.is_compiling():  # no dispatcher in between
            out = compiled(input, BlockSparse(values, self.crow, self.col, self.shape, self.block, self.paired), bias, self.backend)
            if out is not None:
                return out
        return multiply(input, bias, values, self.crow, self.col, self.shape, self.block, self.paired, self.backend)

    def _store(self, weight: BlockSparse) -> None:
        """Take a weight, in the order that its device wants."""
        weight = storage.reorder(weight, paired=not gpu.takes(weight.values.device))
        self.shape, self.block, self.paired = weight.shape, weight.block, weight.paired
        self.values, self.crow, self.col = weight.values, weight.crow, weight.col
        self.layout = torch.tensor([*weight.shape, *weight.block, weight.paired], device=weight.values.device)

    def _settle(self) -> None:
        """Store the weight in the other order where it came from a device that wants that."""
        if not self.values.is_meta and self.paired == gpu.takes(self.values.device):
            self._store(self.sparse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take over another number of blocks, if the tensors fit each other; otherwise say why and stay as it is."""
        found = [name for name in TENSORS if prefix + name in state_dict]
        if found:
            try:
                if len(found) < len(TENSORS):
                    raise ValueError(f"the state dict has {', '.join(found)} of it; a block-sparse weight is all of {', '.join(TENSORS)}")
                values, crow, col, layout = (state_dict[prefix + name] for name in TENSORS)
                new = read(values, crow, col, layout)
                if new.shape != self.shape:
                    raise ValueError(f"a weight of shape {new.shape} does not fit into a layer of {self.shape}")
            except ValueError as error:
                cast(list[str], args[-1]).append(f"{prefix.removesuffix('.') or 'the layer'}: {error}")
                return
            self.block, self.paired = new.block, new.paired
            for name, tensor in (("values", values), ("crow", crow), ("col", col), ("layout", layout)):
                old = getattr(self, name)
                setattr(self, name, torch.empty(tensor.shape, dtype=old.dtype, device=old.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._settle()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlockSparseLinear":
        """Follow the model to another device and type, but keep the bits of the indices: `type` and `to_empty` would lose them."""
        indices = {name: getattr(self, name) for name in ("crow", "col", "layout")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, index in indices.items():
            now: Tensor = getattr(self, name)
            if not now.is_meta:  # what comes from the meta device has no numbers: until it is loaded, no block is kept
                setattr(self, name, torch.zeros_like(now, dtype=index.dtype) if index.is_meta else index.to(now.device))
            else:
                setattr(self, name, now.to(index.dtype))
        self._settle()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._settle()  # `torch.load` may have moved it

    def extra_repr(self) -> str:
        kept = self.values.numel() / (self.shape[0] * self.shape[1])
        return f"{self.shape[1]}, {self.shape[0]}, bias={self.bias is not None}, {1 - kept:.1%} pruned, {self.backend}"


class BlockSparseConv2d(BlockSparseLinear):
    """A Conv2d (groups=1) whose kernel ``[out_channels, in_channels * kh * kw]`` meets the patches of its input (im2col).

    Args:
        weight: the kept blocks of the kernel as a matrix.
        like: where the kernel's size, stride, padding and dilation are taken from, and the bias.
        backend: as for `BlockSparseLinear`.

    Example:
        >>> from blockprune import export, storage
        >>> conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)
        >>> weight = storage.pack(conv.weight.flatten(1), torch.ones(3, 1).bool(), bp.BlockGrid((6, 36), (2, 36)))
        >>> torch.allclose(export.BlockSparseConv2d(weight, conv)(x), conv(x), atol=1e-6)
        True
    """

    def __init__(self, weight: BlockSparse, like: nn.Conv2d, backend: str = "native") -> None:
        super().__init__(weight, cast(Any, like.bias), backend)
        self.kernel_size, self.stride, self.dilation = like.kernel_size, like.stride, like.dilation
        self.padding, self.padding_mode = like.padding, like.padding_mode
        self._around = like._reversed_padding_repeated_twice

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.shape[1] // (self.kernel_size[0] * self.kernel_size[1])

    @property
    def weight(self) -> Tensor:
        """The dense kernel, zero where pruned; made anew at each read."""
        return storage.unpack(self.sparse).view(self.shape[0], -1, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim not in (3, 4) or input.shape[-3] != self.in_channels:
            raise ValueError(
                f"an input of shape {tuple(input.shape)} meets a convolution of {self.in_channels} channels: [n, channels, h, w]"
            )
        x = input if input.ndim == 4 else input[None]
        if any(self._around):
            x = F.pad(x, self._around, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        high, wide = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
        if (kh, kw) == (1, 1):
            patches = x[:, :, ::sh, ::sw].movedim(1, -1)  # [n, high, wide, channels]
        else:
            patches = F.unfold(x, (kh, kw), (dh, dw), stride=(sh, sw)).mT.unflatten(1, (high, wide))
        out = super().forward(patches).movedim(-1, 1).contiguous()  # as Conv2d gives it
        return out if input.ndim == 4 else out[0]


def layer_like(like: nn.Module, weight: BlockSparse, backend: str = "native") -> BlockSparseLinear:
    """A layer with this weight in place of a Linear or Conv2d, or of a block-sparse one, with its bias.

    Example:
        >>> from blockprune.export.layers import as_matrix, layer_like
        >>> layer, mask = nn.Linear(4, 2), bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> layer_like(layer, as_matrix(layer.weight, mask), "torch")
        BlockSparseLinear(4, 2, bias=True, 50.0% pruned, torch)
    """
    if isinstance(like, (nn.Conv2d, BlockSparseConv2d)):
        return BlockSparseConv2d(weight, cast(Any, like), backend)  # both say how they move over their input
    return BlockSparseLinear(weight, cast(Any, like.bias), backend)


def read(values: Tensor, crow: Tensor, col: Tensor, layout: Tensor) -> BlockSparse:
    """The weight that four tensors of a state dict hold.

    Raises:
        ValueError: they hold none.

    Example:
        >>> from blockprune.export.layers import read
        >>> read(torch.ones(2), torch.tensor([0, 1]), torch.tensor([0]).int(), torch.tensor([2, 4, 2, 1, 1])).shape
        (2, 4)
    """
    if layout.shape != (5,) or layout.dtype != torch.int64 or layout.is_meta:
        raise ValueError(f"layout is {layout.dtype} of shape {tuple(layout.shape)} on {layout.device} and must be 5 numbers of int64")
    rows, cols, height, width, paired = layout.tolist()
    if paired not in (0, 1):
        raise ValueError(f"layout is {layout.tolist()}: it must end in 1 (in pairs) or 0; it is not what was exported")
    weight = BlockSparse(values, crow, col, (rows, cols), (height, width), bool(paired))
    storage.check(weight)
    return weight


def as_matrix(weight: Tensor, mask: BlockMask) -> BlockSparse:
    """The kept blocks of a weight of two axes or more, all but the first of which are columns.

    Blocks that are no rectangle of that matrix (single taps of a kernel) are stored a column wide.

    Example:
        >>> from blockprune.export import as_matrix
        >>> mask = bp.BlockMask(torch.tensor([True, False]).view(2, 1, 1, 1), bp.BlockGrid((4, 3, 2, 2), (2,)))
        >>> as_matrix(torch.ones(4, 3, 2, 2), mask).shape
        (4, 12)
    """
    (rows, *others), (height, *sides), keep = mask.grid.shape, mask.grid.block, mask.keep.to(weight.device)
    flat, paired = weight.detach().flatten(1), not gpu.takes(weight.device)
    if sides[1:] == others[1:]:  # whole kernels
        taps = flat.shape[1] // others[0]
        grid = BlockGrid((rows, flat.shape[1]), (height, sides[0] * taps))
        return storage.pack(flat, keep.reshape(grid.size), grid, paired=paired)
    each = expand(keep, BlockGrid((len(keep), *others), (1, *sides))).flatten(1)  # [bands, columns]
    return storage.pack(flat, each, BlockGrid((rows, flat.shape[1]), (height, 1)), paired=paired)
