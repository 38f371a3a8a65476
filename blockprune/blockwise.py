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
        held_out: share of the batches, the last ones, that only say when to stop; 0 tunes on all and keeps the last epoch.
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
    learn = len(targets) - round(held_out * len(targets)) if held_out else len(targets)
    if not 0 <= held_out < 1 or learn < 1:
        raise ValueError(f"held_out={held_out} of {len(targets)} batches leaves none to learn from; give more batches or a smaller share")
    generator = torch.Generator().manual_seed(seed)
    leaves = {name: parameters[name].detach().clone().requires_grad_(True) for name in masks}
    keep = {name: mask.keep.to(parameters[name].device) for name, mask in masks.items()}

    def masked() -> dict[str, Tensor]:
        return {**parameters, **{name: mask_blocks(leaf, keep[name], masks[name].grid) for name, leaf in leaves.items()}}

    def error(i: int) -> Tensor:
        return (run(masked(), i) - targets[i]).float().square().mean()

    def held_out_error() -> float:
        with torch.no_grad():
            return sum(error(i).item() for i in range(learn, len(targets)))

    best, least, waited = {name: leaf.detach().clone() for name, leaf in leaves.items()}, held_out_error(), 0
    optimizer = torch.optim.Adam(leaves.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * learn)
    with torch.enable_grad():
        for _ in range(epochs):
            for i in torch.randperm(learn, generator=generator).tolist():
                optimizer.zero_grad()
                error(i).backward()
                optimizer.step()
                schedule.step()
            now = held_out_error()
            waited = 0 if now < least else waited + 1
            if now < least or learn == len(targets):
                best, least = {name: leaf.detach().clone() for name, leaf in leaves.items()}, now
            elif waited > patience:
                break
    return {name: mask_blocks(weight, keep[name], masks[name].grid) for name, weight in best.items()}
