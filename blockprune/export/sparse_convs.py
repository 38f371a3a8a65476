"""Block-sparse convolutions, and the block-sparse layer that takes the place of a layer of any kind."""

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from blockprune.core._compat import conv_padding
from blockprune.export.conv_ops import compiled_conv2d, conv2d
from blockprune.export.exported_weight import ExportedWeight
from blockprune.export.format import BlockSparse, unpack
from blockprune.export.sparse_layers import BlockSparseLinear, Int8BlockSparseLinear
from blockprune.native.spmm import Window


class BlockSparseConv2d(BlockSparseLinear):
    """A Conv2d (groups=1) whose kernel is stored as a matrix ``[out_channels, in_channels * kh * kw]`` of which blocks are kept.

    The output has the memory format of the input. On a CPU the compiled kernel reads patches of the image where they are; elsewhere, and
    where a gradient is needed, the matrix is multiplied with a copy of all patches (im2col).

    Args:
        weight: the kept blocks of the kernel as a matrix.
        template: the convolution whose bias, kernel size, stride, padding and dilation the layer takes.
        backend, trainable: as in `BlockSparseLinear`.

    Example:
        >>> from blockprune import export
        >>> from blockprune.export.format import pack
        >>> conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)
        >>> weight = pack(conv.weight.flatten(1), torch.ones(3, 1).bool(), bp.BlockGrid((6, 36), (2, 36)))
        >>> torch.allclose(export.BlockSparseConv2d(weight, conv)(x), conv(x), atol=1e-6)
        True
    """

    def __init__(self, weight: BlockSparse, template: nn.Conv2d, backend: str = "native", *, trainable: bool = False) -> None:
        super().__init__(weight, cast(Any, template.bias), backend, trainable=trainable)
        self.kernel_size, self.stride, self.dilation = template.kernel_size, template.stride, template.dilation
        self.padding, self.padding_mode = template.padding, template.padding_mode
        self._padding_sides = (
            template._padding_sides if isinstance(template, BlockSparseConv2d) else conv_padding(template)
        )  # as F.pad takes it

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.shape[1] // (self.kernel_size[0] * self.kernel_size[1])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """That of the dense ``weight``: filters, channels, height and width."""
        return self.shape[0], self.in_channels, *self.kernel_size

    @property
    def weight(self) -> Tensor:
        """The dense kernel, zero where pruned. Each read computes it anew, so a change of it in place raises: change ``values``."""
        return ExportedWeight.read(unpack(self.packed_weight).view(self.weight_shape), self.name)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim not in (3, 4) or input.shape[-3] != self.in_channels:
            raise ValueError(
                f"{self.prefix}an input of shape {tuple(input.shape)} does not fit a convolution of {self.in_channels} channels: "
                f"it must be [n, {self.in_channels}, height, width]"
            )
        x = input if input.ndim == 4 else input[None]
        sides = tuple(self._padding_sides)
        if self.padding_mode != "zeros" and any(sides):
            x, sides = F.pad(x, sides, mode=self.padding_mode), (0, 0, 0, 0)
        window = Window(self.kernel_size, self.stride, self.dilation, sides)
        if min(size := window.out_size(x)) < 1:
            raise ValueError(
                f"{self.prefix}an input of shape {tuple(input.shape)} is smaller than the kernel of {self.kernel_size} with dilation "
                f"{self.dilation} and padding {self._padding_sides}: the output would have {size[0]} rows and {size[1]} columns"
            )
        x, bias, weight = self.operands(x)
        packed, out = self.readable_weight(weight), None
        if packed is not None and self.backend != "torch":
            out = compiled_conv2d(x, packed, bias, window)
        if out is None:
            self.check_devices(x, weight[0])
            out = conv2d(x, bias, weight[:-1], window)
        return out if input.ndim == 4 else out[0]


def sparse_layer_like(
    template: nn.Module, weight: BlockSparse, backend: str = "native", *, trainable: bool | None = None
) -> BlockSparseLinear:
    """A block-sparse layer with this weight that takes the bias and options of a Linear, a Conv2d or another block-sparse layer.

    Args:
        template: the layer whose place it takes.
        weight: what it holds.
        backend: as in `BlockSparseLinear`.
        trainable: whether its kept weights are a parameter; by default as in the template, if that is a block-sparse layer.

    Raises:
        ValueError: a weight of int8 for a convolution, or for a layer that trains.

    Example:
        >>> from blockprune.export import pack_weight
        >>> from blockprune.export.sparse_convs import sparse_layer_like
        >>> layer, mask = nn.Linear(4, 2), bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> sparse_layer_like(layer, pack_weight(layer.weight, mask), "torch")
        BlockSparseLinear(4, 2, bias=True, 50.0% pruned, torch)
    """
    is_int8 = weight.scale is not None
    if trainable is None:
        trainable = isinstance(template, BlockSparseLinear) and template.trainable and not is_int8
    if trainable and is_int8:
        raise ValueError("a weight of int8 does not train: give the weight in a floating-point type")
    if is_int8:
        if isinstance(template, (nn.Conv2d, BlockSparseConv2d)):
            raise ValueError("a convolution has no int8 form: give its weight in a floating-point type")
        like = template.like if isinstance(template, Int8BlockSparseLinear) else cast(Tensor, template.weight)
        return Int8BlockSparseLinear(weight, cast(Any, template.bias), backend, like.dtype)
    if isinstance(template, (nn.Conv2d, BlockSparseConv2d)):
        layer: BlockSparseLinear = BlockSparseConv2d(
            weight, cast(Any, template), backend, trainable=trainable
        )  # both have the same options
    else:
        layer = BlockSparseLinear(weight, cast(Any, template.bias), backend, trainable=trainable)
    if trainable:  # a parameter that is frozen remains so; the buffer of an export has no say
        of_template = template.values if isinstance(template, BlockSparseLinear) else next(template.parameters())
        layer.values.requires_grad_(of_template.requires_grad or not isinstance(of_template, nn.Parameter))
    return layer
