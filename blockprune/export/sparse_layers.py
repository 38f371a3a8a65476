"""Layers that hold and multiply only the kept blocks of their weight."""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from blockprune.core._compat import autocast_is_active, dispatch_mode_is_active, is_tracing, replace_data
from blockprune.core._compat_dynamo import read_at_any_length
from blockprune.core._compat_fsdp import is_fsdp_managed
from blockprune.core.types import BlockMask
from blockprune.export import triton_launch
from blockprune.export.exported_weight import ExportedWeight
from blockprune.export.format import BlockSparse, ensure_valid, to_layout, unpack, validate
from blockprune.export.ops import BACKENDS, compiled_product, linear
from blockprune.export.packing import kept_mask, layout_numbers, read_state

INDICES = ("crow", "col", "layout")
STATE_KEYS = ("values", *INDICES)  # of a block-sparse weight in a state dict; one of int8 also has a "scale"


class BlockSparseLinear(nn.Module):
    """A Linear that holds and multiplies only the kept blocks of its weight.

    Its kept weights, ``values``, are a buffer, which ``requires_grad_`` does not reach, or a parameter if the layer is ``trainable``: then
    gradients and the state of an optimizer exist for kept weights alone. They have one axis, so an optimizer that decays parameters of two
    axes or more must be given them by name. The bias, if any, is a parameter. A state dict with another number of kept weights makes the
    state of an optimizer invalid: load it before the first step.

    Its state dict holds ``values``, ``crow`` and ``col`` (see `format.BlockSparse`), ``layout`` (rows, columns, height and width of a
    stored block, the shape of a pruned block if that is known, and 1 for the CPU layout or 0 for the GPU layout) and ``bias``. A weight of
    the same shape with other kept blocks loads into it; indices out of range are refused. After ``to`` and ``load_state_dict`` too, the
    weight is in the layout of its device. Tensors that are copied one by one into another layer are valid there only if both layers are on
    GPUs, or neither is.

    The indices ``crow``, ``col`` and ``layout`` are plain attributes, not buffers, and the state dict holds copies of them: a moving
    average over buffers or over a state dict must not average them. For the same reason DistributedDataParallel does not send them to
    other processes, so all must export the same masks. Indices that were written or replaced are validated before the next product, so
    that no kernel reads out of bounds; writes through ``.data``, NumPy or another process, which torch does not count, are not noticed.

    Args:
        weight: the kept blocks of ``[out_features, in_features]``.
        bias: ``[out_features]`` or None; shared, not copied.
        backend: "native" or "triton" (the device decides which of them runs; torch computes what it does not support), or "torch".
        trainable: whether ``values`` is a parameter.

    Raises:
        ValueError: a weight whose tensors do not fit each other, a bias that does not fit the weight, or an unknown backend; in
            ``forward``, indices that were changed and are no longer valid. The message begins with ``name``.

    Example:
        >>> from blockprune import export
        >>> from blockprune.export.format import pack
        >>> weight = pack(torch.ones(4, 4), torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> export.BlockSparseLinear(weight, None)(torch.ones(2, 4))
        tensor([[2., 2., 2., 2.],
                [2., 2., 2., 2.]])
    """

    constants: ClassVar[tuple[str, ...]] = INDICES  # tensors that nothing averages or converts, because they are no buffers
    values: Tensor
    crow: Tensor
    col: Tensor
    layout: Tensor
    pruned_block: tuple[int, ...] | None = None
    scale: Tensor | None = None
    bias: nn.Parameter | None

    def __init__(self, weight: BlockSparse, bias: nn.Parameter | None, backend: str = "native", *, trainable: bool = False) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} must be one of {BACKENDS}")
        validate(weight)
        if (weight.scale is None) == ("scale" in self.constants):
            other = "a Linear of int8 is an Int8BlockSparseLinear, and every other layer holds floating-point numbers"
            raise ValueError(f"{type(self).__name__} cannot hold a weight of {weight.values.dtype}: {other}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"a bias of shape {tuple(bias.shape)} does not fit a weight of shape {weight.shape}: it must be ({weight.shape[0]},)"
            )
        self.backend = backend
        self.trainable = trainable
        self.name = ""  # of the layer in the model that it was exported from; error messages begin with it
        if trainable:
            with torch.inference_mode(False):
                self.values = nn.Parameter(weight.values.clone() if weight.values.is_inference() else weight.values)
        elif "values" not in self.constants:
            self.register_buffer("values", None)
        self.store(weight)
        self.register_parameter("bias", bias)

    @property
    def prefix(self) -> str:
        """What an error message begins with."""
        return f"{self.name}: " if self.name else ""

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """That of the dense ``weight``."""
        return self.shape

    @property
    def packed_weight(self) -> BlockSparse:
        """The weight as it is stored.

        Raises:
            ValueError: its indices were changed and are no longer valid.
        """
        weight = BlockSparse(self.values, self.crow, self.col, self.shape, self.block, self.paired, self.scale, self.pruned_block)
        ensure_valid(weight, self.name)
        return weight

    def block_mask(self) -> BlockMask:
        """Which elements of the dense ``weight`` are stored, in the blocks that were pruned.

        If these are not known, as of a weight that `format.pack` has made or a state dict that an earlier blockprune has saved, or if one
        of them is stored in part, because indices were changed, blocks are those of the storage, which may be smaller.

        Raises:
            ValueError: as `packed_weight`.

        Example:
            >>> from blockprune import export
            >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((64, 64), (64, 32)))
            >>> export.BlockSparseLinear(export.pack_weight(torch.ones(64, 64), mask), None).block_mask() == mask
            True
        """
        return kept_mask(self.packed_weight, self.weight_shape)

    @property
    def weight(self) -> Tensor:
        """The dense weight, zero where pruned. Each read computes it anew, so a change of it in place raises: change ``values``."""
        return ExportedWeight.read(unpack(self.packed_weight), self.name)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return self._of_nested(input)
        if input.ndim == 0 or input.shape[-1] != self.shape[1]:
            raise ValueError(
                f"{self.prefix}an input of shape {tuple(input.shape)} does not fit a weight of shape {self.shape}: its last axis must be "
                f"{self.shape[1]}"
            )
        input, bias, weight = self.operands(input)
        if (packed := self.readable_weight(weight)) is not None:
            out = compiled_product(input, packed, bias, self.backend)  # a direct call avoids the overhead of torch's dispatcher
            if out is not None:
                return out
        self.check_devices(input, weight[0])
        return linear(input, bias, *weight)

    def _of_nested(self, input: Tensor) -> Tensor:
        """The product with a jagged tensor, whose rows stand one after the other in its values."""
        if input.layout != torch.jagged:
            raise TypeError(
                f"{self.prefix}a nested tensor of layout {input.layout} is not supported; make it with layout=torch.jagged, or pad it with "
                "torch.nested.to_padded_tensor"
            )
        jagged: Any = input
        axis = next(i for i, size in enumerate(jagged.shape) if isinstance(size, torch.SymInt))
        out = self(jagged.values())
        return torch.nested.nested_tensor_from_jagged(out, jagged.offsets(), jagged.lengths(), jagged_dim=axis)

    def check_devices(self, input: Tensor, values: Tensor) -> None:
        """Raise RuntimeError if some of the input, the kept weights and the bias have numbers, and others, on the meta device, have not."""
        if input.is_meta != values.is_meta or (self.bias is not None and self.bias.is_meta != values.is_meta):
            devices = f"the input is on {input.device}, the kept weights are on {values.device}"
            bias = "" if self.bias is None else f" and the bias is on {self.bias.device}"
            raise RuntimeError(
                f"{self.prefix}{devices}{bias}; the meta device has no numbers to compute with: load the layer's tensors first, with "
                "export.load_state_dict(model, state)"
            )

    def operands(self, input: Tensor) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
        """The input, the bias and the arguments of an operator for the weight; under autocast in its type."""
        dtype = None
        if autocast_is_active() and not input.is_meta and torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(input.device.type)
        input, values, bias = self._in_type(input, dtype)
        # tools such as accelerate move parameters and buffers one by one, and leave other tensors on their device
        device = values.device
        crow, col = self.crow.to(device), self.col.to(device)
        scale = None if self.scale is None else self.scale.to(device)
        return input, bias, (values, crow, col, self.shape, self.block, self.paired, self.backend, scale)

    def _in_type(self, input: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, values and bias as they are multiplied; with a type, that of autocast."""
        values = read_at_any_length(self, "values")  # `update` gives it others
        if not values.shape[0] and is_fsdp_managed(self):
            values = values.detach()  # fully_shard fails at an empty gradient
        bias: Tensor | None = self.bias
        _check_type(input, values.dtype, dtype, self)
        if dtype is not None:
            input, values, bias = input.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
        return input, values, bias

    def readable_weight(self, weight: tuple[Any, ...]) -> BlockSparse | None:
        """The weight, validated, where its numbers can be read: not while a graph is recorded."""
        values, crow, col, shape, block, paired, _, scale = weight
        if values.is_meta or torch.compiler.is_compiling() or is_tracing() or dispatch_mode_is_active():
            return None
        packed = BlockSparse(values, crow, col, shape, block, paired, scale)
        ensure_valid(packed, self.name)
        return packed

    def store(self, weight: BlockSparse) -> None:
        """Hold another weight of the same shape, in the layout of its device; ``values`` remains the same parameter or buffer.

        Example:
            >>> from blockprune import export
            >>> from blockprune.export.format import pack
            >>> grid = bp.BlockGrid((4, 4), (4, 2))
            >>> layer = export.BlockSparseLinear(pack(torch.ones(4, 4), torch.tensor([[True, False]]), grid), None)
            >>> layer.store(pack(torch.ones(4, 4), torch.tensor([[True, True]]), grid))
            >>> layer
            BlockSparseLinear(4, 4, bias=False, 0.0% pruned, native)
        """
        weight = to_layout(weight, paired=not triton_launch.uses_gpu_layout(weight.values.device))
        self.shape, self.block, self.paired, self.pruned_block = weight.shape, weight.block, weight.paired, weight.pruned_block
        self._set_values(weight.values)
        layout = torch.tensor(layout_numbers(weight), device=weight.values.device)
        tensors = {"values": weight.values, "scale": weight.scale, "crow": weight.crow, "col": weight.col, "layout": layout}
        self._set_constants(*(cast(Tensor, tensors[name]) for name in self.constants))

    def _set_values(self, values: Tensor) -> None:
        """Replace the values; a parameter remains the same object, which optimizers hold."""
        if self.trainable:
            with torch.inference_mode(False):
                self.values.grad = None
                replace_data(self.values, values.clone() if values.is_inference() else values.detach())
        else:
            self.values = values

    def _set_constants(self, *tensors: Tensor) -> None:
        with torch.inference_mode(False):  # torch does not count writes to an inference tensor
            for name, x in zip(self.constants, tensors, strict=True):
                setattr(self, name, x.clone() if x.is_inference() else x)

    def _convert_layout(self) -> None:
        """Convert a weight that came from another kind of device to the layout of this one."""
        if not self.values.is_meta and self.paired == triton_launch.uses_gpu_layout(self.values.device):
            self.store(self.packed_weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + name: getattr(self, name).clone() for name in self.constants}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *args: Any
    ) -> None:
        """Load a weight with any number of blocks if its tensors fit each other; otherwise report why not and change nothing."""
        keys = dict.fromkeys((*STATE_KEYS, *self.constants))
        if present := [name for name in keys if prefix + name in state_dict]:
            try:
                if len(present) < len(keys):
                    raise ValueError(f"the state dict has {', '.join(present)} of it; a block-sparse weight is all of {', '.join(keys)}")
                new = read_state(**{name: state_dict[prefix + name] for name in keys})
                if new.shape != self.shape:
                    raise ValueError(f"a weight of shape {new.shape} does not fit into a layer of {self.shape}")
            except ValueError as error:
                cast(list[str], args[-1]).append(f"{prefix.removesuffix('.') or 'the layer'}: {error}")
                return
            self.block, self.paired, self.pruned_block = new.block, new.paired, new.pruned_block
            assign, device = local_metadata.get("assign_to_params_buffers", False), self.values.device
            tensors = [state_dict[prefix + name] for name in self.constants]
            self._set_constants(
                *tensors if assign else (x.detach().to("cpu" if device.type == "meta" else device, copy=True) for x in tensors)
            )
            if "values" not in self.constants and self.values.shape != new.values.shape:
                self._set_values(self.values.new_empty(new.values.shape))
        elif strict:
            missing_keys += [prefix + name for name in self.constants]
        ignored = {prefix + name for name in self.constants}
        if present and state_dict.get(f"{prefix}weight", self.values).shape == (1,):  # of a Hugging Face model: see model/hf_checkpoint.py
            ignored.add(f"{prefix}weight")
        others = {key: value for key, value in state_dict.items() if key not in ignored}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, *args)
        self._convert_layout()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlockSparseLinear":
        """Convert the layer to another device or type. Indices keep their type and numbers, also where the layer is on the meta device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        devices = [fn(getattr(self, name)).device for name in self.constants]  # `share_memory` changes them in place
        tensors = [getattr(self, name) for name in self.constants]
        self._set_constants(*map(_moved, tensors, devices, (name in INDICES for name in self.constants)))
        self._convert_layout()
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"{self.name or 'the layer'}: torch.jit.script cannot compile a block-sparse layer of {self.weight_shape}; record the model "
            "with torch.jit.trace or torch.export.export, or script export.dense(model), which has plain layers"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_constants(*(getattr(self, name) for name in self.constants))
        self._convert_layout()  # `torch.load` may load it to another device

    def extra_repr(self) -> str:
        kept = self.values.numel() / (self.shape[0] * self.shape[1])
        trainable = ", trainable" if self.trainable else ""
        return f"{self.shape[1]}, {self.shape[0]}, bias={self.bias is not None}, {1 - kept:.1%} pruned, {self.backend}{trainable}"


class Int8BlockSparseLinear(BlockSparseLinear):
    """A Linear whose kept weights are int8 numbers with a scale for each output, and whose inputs are rounded to int8 row by row.

    ``y = sum(q_x * q_w) * (scale_x * scale_w) + bias``, in float32 and then in the type of the input, which is that of ``weight``, as in
    other layers; the sum is an exact integer. A row of inputs that is not finite gives a row of NaN. The gradient of the input is that of
    a product with ``weight``: rounding counts as the identity (straight-through, Bengio et al. 1308.3432). On a GPU the product runs by
    operators of torch, slowly.

    ``values``, int8, and ``scale``, float32 ``[out_features]``, are no buffers either: they keep type and numbers in every conversion, and
    the state dict holds copies of them. The buffer ``like`` is empty and has the type of ``weight``.

    Args:
        weight: of int8; `packing.pack_int8` makes one.
        bias: ``[out_features]`` or None; shared, not copied.
        backend: as in `BlockSparseLinear`.
        dtype: of ``weight``, the type that the model has otherwise.

    Raises:
        ValueError: as in `BlockSparseLinear`; a weight of another type than int8.
        TypeError: in ``forward``, an input of another type than ``weight``, outside of autocast.

    Example:
        >>> from blockprune import export
        >>> from blockprune.export.packing import pack_int8
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((4, 4), (4, 2)))
        >>> export.Int8BlockSparseLinear(pack_int8(torch.ones(4, 4), mask), None)(torch.ones(2, 4))
        tensor([[2., 2., 2., 2.],
                [2., 2., 2., 2.]])
    """

    constants: ClassVar[tuple[str, ...]] = ("values", "scale", *INDICES)
    like: Tensor

    def __init__(self, weight: BlockSparse, bias: nn.Parameter | None, backend: str = "native", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weight, bias, backend)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.values.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The dense weight, numbers times scales, zero where pruned. Each read computes it anew, so a change of it in place raises."""
        remedy = "change the weight of the masked model, and export that again"  # export.update gives int8 numbers no other scales
        return ExportedWeight.read(unpack(self.packed_weight).to(self.like.dtype), self.name, remedy)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers", False):  # the values may be on another device now
            self.like = torch.empty(0, dtype=self.like.dtype, device=self.values.device)

    def _in_type(self, input: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor | None]:
        like = self.like
        bias: Tensor | None = self.bias
        _check_type(input, like.dtype, dtype, self)
        input = input if dtype is None else input.to(dtype)
        return input, self.values.to(like.device), bias if bias is None or bias.dtype == input.dtype else bias.float()


def _check_type(input: Tensor, of_weight: torch.dtype, of_autocast: torch.dtype | None, layer: BlockSparseLinear) -> None:
    """Raise for an input for which a plain layer would raise: of another type, or under autocast of one that it does not convert."""
    if not input.is_floating_point() or (of_autocast is None and input.dtype != of_weight):
        raise TypeError(
            f"{layer.prefix}an input of {input.dtype} does not fit a weight of {of_weight}; convert it, input.to({of_weight}), or the model"
        )


def _moved(x: Tensor, device: torch.device, is_index: bool) -> Tensor:
    """A constant on another device; indices do not lose their numbers on the meta device.

    One that `torch.load` put on the meta device has no numbers: zeros until a state dict is loaded.
    """
    if is_index and device.type == "meta":
        return x
    return torch.zeros_like(x, device=device) if x.is_meta and device.type != "meta" else x.to(device)
