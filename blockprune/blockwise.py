"""Repair by gradients, one layer (transformer block) at a time: the kept weights learn the dense layer's outputs."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from blockprune.parametrization import mask_blocks
from blockprune.types import BlockMask


def blockwise(
    run: Callable[[Mapping[str, Tensor], int], Tensor],
    parameters: Mapping[str, Tensor],
    masks: Mapping[str, BlockMask],
    targets: Sequence[Tensor],
    *,
    epochs: int = 8,
    lr: float = 1e-4,
    held_out: float = 0.125,
    patience: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Tune kept weights towards the dense layer's outputs, by Adam on the mean squared error (EBFT, Guo et al. 2402.12419).

    Masks stay. Give it to `sequential` as ``tune=``, with options bound by ``functools.partial``; it runs after ``reconstruct``.

    Args:
        run: (parameters, i) -> the layer's output on the inputs of batch i.
        parameters: to start from, by the layer's own names; those with a mask are tuned.
        masks: by the same names.
        targets: the dense layer's output, one a batch.
        epochs: passes over the batches at most.
        lr: Adam's learning rate; it falls to 0 along a cosine.
        held_out: share of the batches, the last ones and at least one, that only say when to stop; 0 tunes on all and keeps the last epoch.
        patience: epochs without a lower error on them before it stops; the best epoch's weights are returned, the given ones if none is.
        seed: of the order of batches.

    Raises:
        ValueError: a held_out share that leaves no batch to learn from.

    Example:
        >>> x, dense = torch.randn(8, 16, 4), torch.randn(4, 4)
        >>> mask = bp.BlockMask(torch.tensor([[True, False], [True, True]]), bp.BlockGrid((4, 4), (2, 2)))
        >>> run = lambda parameters, i: x[i] @ parameters["weight"].mT
        >>> tuned = bp.blockwise(run, {"weight": dense}, {"weight": mask}, [x[i] @ dense.mT for i in range(8)], lr=0.1)
        >>> tuned["weight"][:2, 2:].count_nonzero().item()
        0
    """
    share = held_out if 0 <= held_out < 1 else 1
    learn = len(targets) - (max(1, round(share * len(targets))) if held_out else 0)
    if learn < 1:
        raise ValueError(
            f"held_out={held_out} of {len(targets)} batches leaves none to learn from; give more batches, or held_out=0 to hold none out"
        )
    if not masks or not epochs:
        return {
            name: mask_blocks(parameters[name].detach(), mask.keep.to(parameters[name].device), mask.grid) for name, mask in masks.items()
        }
    generator = torch.Generator().manual_seed(seed)
    wide = {name: torch.promote_types(parameters[name].dtype, torch.float32) for name in masks}  # small steps round away in half
    leaves = {name: parameters[name].detach().to(wide[name], copy=True).requires_grad_(True) for name in masks}
    keep = {name: mask.keep.to(parameters[name].device) for name, mask in masks.items()}

    def weight(name: str, leaf: Tensor) -> Tensor:
        return mask_blocks(leaf.to(parameters[name].dtype), keep[name], masks[name].grid)

    def masked() -> dict[str, Tensor]:
        return {**parameters, **{name: weight(name, leaf) for name, leaf in leaves.items()}}

    def error(i: int) -> Tensor:
        gap = run(masked(), i) - targets[i]
        return gap.to(torch.promote_types(gap.dtype, torch.float32)).square().mean()

    def held_out_error() -> float:
        with torch.no_grad():
            return sum(error(i).item() for i in range(learn, len(targets)))

    best, least, waited = {name: leaf.detach().clone() for name, leaf in leaves.items()}, held_out_error(), 0
    optimizer = torch.optim.Adam(leaves.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * learn)
    with torch.enable_grad():
        for _ in range(epochs):
            for i in torch.randperm(learn, generator=generator).tolist():
                gradients = torch.autograd.grad(error(i), list(leaves.values()), allow_unused=True)  # not of what else the layer has
                for leaf, gradient in zip(leaves.values(), gradients, strict=True):
                    leaf.grad = gradient
                optimizer.step()
                schedule.step()
            now = held_out_error()
            waited = 0 if now < least else waited + 1
            if now < least or learn == len(targets):
                best, least = {name: leaf.detach().clone() for name, leaf in leaves.items()}, now
            elif waited > patience:
                break
    return {name: weight(name, leaf) for name, leaf in best.items()}
