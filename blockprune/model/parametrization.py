"""`MaskBlocks`, the torch parametrization that sets pruned blocks to zero whenever a weight is read."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.core._compat import functorch_is_active, is_tracing
from blockprune.core.grid import BlockGrid
from blockprune.core.sharded_tensor import is_sharded
from blockprune.model.masked_weight import MaskedWeight, as_masked_shard, write_pending
from blockprune.model.masking import mask_blocks, straight_through


class MaskBlocks(nn.Module):
    """A weight with this parametrization reads as zero in its pruned blocks; the stored weight stays dense.

    The mask is a buffer with one bool per block, so it is saved, moved and broadcast with the model, and a compiled model need not be
    recompiled when the mask is changed in place. The state dict has the shape of a block, so that a state with different blocks is refused.
    NaN or inf in a pruned block reads as zero. Changing the weight in place also changes the stored weight (`MaskedWeight`), or raises if
    that is a DTensor, of which each rank masks its own shard.

    Args:
        keep: ``[*grid.size]`` bool, True = kept; it is copied.
        grid: the blocks.
        order: the names of the module's parameters in their original order, which torch loses when one is parametrized.

    The gradient of a read passes to kept blocks, and also to the blocks of ``reached``, unless that is None; ``decay`` times the values of
    pruned blocks is added to what reaches them. Both are options of the training loop: the state dict does not have them.
    """

    keep: Tensor
    reached_blocks: Tensor  # [*grid.size] bool; there also if it is not used, as torch's averages pair the buffers of two models

    def __init__(self, keep: Tensor, grid: BlockGrid, *, order: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("keep", keep.clone())
        self.register_buffer("reached_blocks", torch.zeros_like(keep), persistent=False)
        self.is_straight_through = False
        self.decay = 0.0
        self.grid = grid
        self.order = order

    def forward(self, weight: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._masked(weight)
        if is_tracing():
            raise RuntimeError(
                f"torch.jit.trace cannot record the mask of a weight {self.grid.shape}; trace bp.finalize(model), a copy with zeros "
                "instead of masks (this also holds for torch.onnx.export(dynamo=False))"
            )
        if is_sharded(weight):
            return as_masked_shard(self._masked(weight))
        if functorch_is_active() or type(weight) not in (Tensor, nn.Parameter):
            return self._masked(weight)
        stored = weight if isinstance(weight, nn.Parameter) else None
        write_pending(self.keep if stored is None else stored)
        return MaskedWeight.read(self._masked(weight), stored=stored, keep=self.keep, grid=self.grid)

    def _masked(self, weight: Tensor) -> Tensor:
        keep = self.keep if self.keep.device == weight.device else self.keep.to(weight.device)
        if not self.is_straight_through:
            return mask_blocks(weight, keep, self.grid)
        return straight_through(weight, keep, self.reached_blocks.to(weight.device), self.grid, decay=self.decay)

    @property
    def reached(self) -> Tensor | None:
        """The pruned blocks ``[*grid.size]`` that gradients reach; None if these reach kept blocks alone."""
        return self.reached_blocks if self.is_straight_through else None

    def pass_gradients(self, reached: Tensor | None, decay: float) -> None:
        """Let gradients pass to these pruned blocks ``[*grid.size]``; None lets them pass to kept blocks alone."""
        self.decay, self.is_straight_through = decay, reached is not None
        values = torch.zeros_like(self.keep) if reached is None else reached
        if self.reached_blocks.is_inference():
            with torch.inference_mode(False):
                self.reached_blocks = values.to(self.keep.device, copy=True)
        else:
            self.reached_blocks.copy_(values)  # in place, so that compiled models are not recompiled

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MaskBlocks":
        """Move the mask to another device, but keep its values: ``to_empty`` and the meta device would lose them."""
        device = fn(self.keep).device
        if device.type != "meta":
            self.keep = self.keep.to(device)
            self.reached_blocks = self.reached_blocks.to(device)
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script cannot compile the mask of a weight {self.grid.shape}; script bp.finalize(model), a copy with zeros instead "
            "of masks"
        )

    def get_extra_state(self) -> Tensor:
        """The shape of a block, as a tensor, which safetensors can save."""
        return torch.tensor(self.grid.block, device="cpu")

    def set_extra_state(self, block: Tensor) -> None:
        """Raise ValueError if a state dict has different blocks than this mask."""
        if tuple(block.tolist()) != self.grid.block:
            raise ValueError(
                f"the state has a mask of blocks {tuple(block.tolist())}, but the mask of this weight {self.grid.shape} has blocks "
                f"{self.grid.block}; remove the masks with bp.apply_masks(model, {{}}) and call bp.load_masked(model, state)"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Report different blocks as torch reports different shapes: after everything else has been loaded."""
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        except ValueError as error:
            args[-1].append(f"{prefix}keep: {error}")

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Store an assigned weight (``layer.weight = w``) as it is, dense."""
        return weight

    def extra_repr(self) -> str:
        return f"shape={self.grid.shape}, block={self.grid.block}"
