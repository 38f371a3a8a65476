"""Optimizers for `distill`."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["muon"]

LONGEST = 16  # times the shorter side: a longer matrix is the table of an embedding


def muon(parameters: Iterable[Tensor], *, lr: float = 1e-3, weight_decay: float = 0.0) -> list[Optimizer]:
    """Muon for matrices, and AdamW for all other parameters (https://kellerjordan.github.io/posts/muon/).

    Muon makes the singular values of each update nearly equal; it often needs fewer tokens than AdamW alone. It takes the parameters with
    two axes of which the longer is at most 16 times the shorter. A longer one is taken for the table of an embedding, for which Muon is
    not meant; most low-rank factors are as long. The values of block-sparse layers have one axis, so AdamW trains them. Muon's updates have
    the size of AdamW's (Liu et al. 2502.16982, section 2.2), so that both can have one learning rate.

    Args:
        parameters: those to train.
        lr: the learning rate of both.
        weight_decay: of both, as a share of the learning rate.

    Raises:
        ValueError: none of the parameters is for Muon.

    Example:
        >>> [type(optimizer).__name__ for optimizer in bp.muon(nn.Linear(8, 4).parameters())]
        ['Muon', 'AdamW']
    """
    parameters = list(parameters)
    matrices, others = ([p for p in parameters if _is_for_muon(p) == wanted] for wanted in (True, False))
    if not matrices:
        raise ValueError(
            f"parameters has no matrix for Muon, two axes of which the longer is at most {LONGEST} times the shorter, among "
            f"{len(parameters)}; give torch.optim.AdamW"
        )
    optimizers: list[Optimizer] = [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]
    return [*optimizers, torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay)] if others else optimizers


def _is_for_muon(parameter: Tensor) -> bool:
    return parameter.ndim == 2 and max(parameter.shape) <= LONGEST * min(parameter.shape)
