"""Optimizers for `distill`."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["muon"]

LONGEST = 16  # times the shorter side: a longer matrix is the table of an embedding


def muon(parameters: Iterable[Tensor], *, lr: float = 1e-3, weight_decay: float = 0.0) -> list[Optimizer]:
    """Muon for the weights of Linears, and AdamW for all other parameters (https://kellerjordan.github.io/posts/muon/).

    Muon makes the singular values of each update nearly equal; it often needs fewer tokens than AdamW alone. It takes the parameters with
    two axes of which the longer is at most 16 times the shorter; a longer one is taken for the table of an embedding. Its updates have
    the size of AdamW's (Liu et al. 2502.16982, section 2.2), so that the same learning rate does for both.

    Args:
        parameters: those to train.
        lr: the learning rate of both.
        weight_decay: of both, as a share of the learning rate.

    Raises:
        ValueError: no parameters.

    Example:
        >>> [type(optimizer).__name__ for optimizer in bp.muon(nn.Linear(8, 4).parameters())]
        ['Muon', 'AdamW']
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError("parameters has no parameters; give those that are trained")
    matrices = [p for p in parameters if p.ndim == 2 and max(p.shape) <= LONGEST * min(p.shape)]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay))
    return optimizers
