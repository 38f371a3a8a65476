"""A layer's squared output error as a quadratic in its weight: the damped Hessian, factored and checked, and the rows that share it."""

import warnings
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from blockprune.tables import Rows, Table
from blockprune.types import Data, Param

TENFOLDS = 3  # dampings that are tried, each ten times the one before, before giving up
LEAST = 1e-5  # what damping=0 counts as for that; and the share of an input's power that its variance counts as at least


@attrs.frozen(eq=False)
class Quadratic:
    """``tr((V - best) H (V - best)^T)``, up to a constant the mean squared error that weights V make; one H for each group of rows.

    Without another target ``best`` is the weight itself; damping is a ridge that draws V to the weight it had, each input's in proportion
    to its own power, so that neither a few huge inputs nor anyone's units decide how much the others are held.
    """

    rows: Tensor  # [groups, rows, k] the weight
    goal: Tensor  # [groups, rows, k] best @ hessian
    hessian: Tensor  # [groups, k, k] damped
    factor: Tensor  # [groups, k, k] its Cholesky factor in float64
    damping: float  # the share of the diagonal that was added
    moved: bool  # whether ``best`` is not the weight
    means: (
        tuple[Tensor, Tensor] | None
    )  # of the target's output [groups, rows] and the layer's inputs [groups, k], where a bias absorbs them

    @property
    def inverse(self) -> Tensor:
        """H^-1 in float64."""
        return torch.cholesky_inverse(self.factor)

    @property
    def best(self) -> Tensor:
        """The best weights without any mask, ``[groups, rows, k]``."""
        if not self.moved:
            return self.rows
        return torch.cholesky_solve(self.goal.double().mT, self.factor).mT.to(self.rows.dtype)


def quadratic(name: str, p: Param, *, damping: float) -> Quadratic:
    """The quadratic of one parameter with the statistic ``input_gram``.

    With ``input_mean`` and ``bias`` too, inputs count from their mean, which the bias absorbs. ``damping`` grows tenfold, with a warning,
    until H is positive definite, in its own precision and in float64, beyond what rounding alone could make of a singular one.

    Raises:
        ValueError: damping below 0, inputs that are all zero, NaN, or no damping up to 1000 times the given one that helps.
    """
    if not damping >= 0:
        raise ValueError(f"damping={damping} must be at least 0: the share of H's diagonal that is added to it")
    gram = p.stats["input_gram"]  # [groups, k, k]
    groups, k, _ = gram.shape
    rows = p.weight.to(gram).reshape(groups, -1, k)
    moved, means, power = "input_cross" in p.stats, None, gram.diagonal(dim1=1, dim2=2)  # [groups, k] mean squares
    goal = rows @ (p.stats["input_cross"].to(gram) if moved else gram)  # [groups, rows, k (+ 1)] the output aimed at, times the inputs
    if p.stats.get("stream_cross", gram.new_empty(0)).numel():
        goal = goal + p.stats["stream_cross"].to(gram)
    aim, goal = (goal[..., -1], goal[..., :-1]) if moved else (None, goal)
    if "input_mean" in p.stats and p.stats.get("bias", gram.new_empty(0)).numel():
        mean = _mean(p, "input_mean", groups, k).to(gram)
        means = (rows @ mean[:, :, None])[..., 0] if aim is None else aim, mean
        gram = gram - mean[:, :, None] * mean[:, None, :]
        goal = goal - means[0][:, :, None] * mean[:, None, :]
    held = torch.maximum(gram.diagonal(dim1=1, dim2=2), LEAST * power)  # [groups, k]
    here = f"{name} {p.grid.shape}"
    if not gram.isfinite().all():
        raise ValueError(f"{here}: its input_gram has NaN or inf; look at the batches")
    if (held <= 0).all():
        raise ValueError(
            f"{here}: its inputs are all zero, so no weight of it matters; leave it out with `excluding`, or look at the batches"
        )
    held = torch.where(held > 0, held, held[held > 0].min())  # dead inputs
    share = damping
    for share in (damping, *(max(damping, LEAST) * 10**i for i in range(1, TENFOLDS + 1))):
        ridge = share * held[:, None, :]
        hessian = gram + torch.diag_embed(ridge[:, 0])
        if (factor := _factor(hessian)) is not None:
            if share != damping:
                warnings.warn(
                    f"{here}: H is singular in {str(gram.dtype)[6:]} with damping={damping:g}; {share:g} was used instead "
                    "(more batches, or a larger damping, make this certain)",
                    stacklevel=4,
                )
            return Quadratic(rows, goal + ridge * rows, hessian, factor, share, moved, means)
    raise ValueError(
        f"{here}: H = X^T X / n is not positive definite with damping={damping:g}, nor with {share:g}; "
        "give more batches, float64 statistics or a larger damping"
    )


def _factor(hessian: Tensor) -> Tensor | None:
    """The Cholesky factor in float64, if each input keeps, beside those before it, a share of its own that is more than rounding."""
    factor = hessian
    for dtype in dict.fromkeys((hessian.dtype, torch.float64)):  # rounding may hide in one what the other shows
        h = hessian.to(dtype)
        factor, info = torch.linalg.cholesky_ex(h)
        own = factor.diagonal(dim1=1, dim2=2).square() / h.diagonal(dim1=1, dim2=2)
        if info.any() or not (own > max(16 * torch.finfo(hessian.dtype).eps, 1e-11)).all():
            return None
    return factor


def room(device: torch.device, memory: int | None) -> int:
    """Bytes for temporaries: as asked, else 16 MiB, or a quarter of what is free on a GPU (CUDA), what torch holds in reserve included.

    Example:
        >>> from blockprune.quadratic import room
        >>> room(torch.device("cpu"), None) >> 20
        16
    """
    if memory is not None:
        return memory
    if device.type != "cuda":
        return 1 << 24  # stays in caches, and malloc need not take it from the system anew each time
    return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) // 4


def _mean(p: Param, statistic: str, groups: int, k: int) -> Tensor:
    """[groups, k], from the shape in which `statistics.input_mean` broadcasts to the weight."""
    mean = p.stats[statistic]
    return mean.reshape(1, k) if groups == 1 else mean.reshape(groups, -1, k)[:, 0]


@attrs.frozen(repr=False)
class Conditioning(Table):
    """How well each parameter's Hessian is determined; prints in a terminal, renders in a notebook.

    Example:
        >>> bp.Conditioning({"fc.weight": (64, 60, 2, 1.5e4, 0.01)})
        parameter  inputs  rank  dead  condition  damping
        fc.weight      64    60     2    1.5e+04     0.01
    """

    rows: Mapping[str, tuple[int, int, int, float, float]]  # inputs, rank without damping, inputs always 0, condition, damping

    def table(self) -> Rows:
        """The cells, the head first."""
        head = ("parameter", "inputs", "rank", "dead", "condition", "damping")
        return [
            head,
            *((name, str(k), str(rank), str(dead), f"{cond:.1e}", f"{damp:g}") for name, (k, rank, dead, cond, damp) in self.rows.items()),
        ]


def conditioning(data: Data, *, damping: float = 0.01) -> Conditioning:
    """What `metric.obs` and `reconstruct.least_squares` have to work with: rank, dead inputs and condition of each damped Hessian.

    Args:
        data: with the statistic ``input_gram``.
        damping: as you give it to them; the table shows what was needed.

    Raises:
        ValueError: data without ``input_gram``; a Hessian that no damping saves.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(3, 2), where=bp.linears((1, 1)), statistics=[bp.statistics.input_gram],
        ...                                   batches=[torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])])
        >>> bp.conditioning(data)
        parameter  inputs  rank  dead  condition  damping
        weight          3     2     1    4.0e+02     0.01
    """
    found = {}
    for name, p in data.items():
        if "input_gram" not in p.stats:
            raise ValueError(
                f"{name} {p.grid.shape}: conditioning needs the statistic 'input_gram'; the data has {sorted(p.stats) or 'none'}"
            )
        q = quadratic(name, p, damping=damping)
        gram = p.stats["input_gram"].double()
        values = torch.linalg.eigvalsh(gram).clamp_min(0)  # [groups, k]
        damped = torch.linalg.eigvalsh(q.hessian.double())
        k = gram.shape[-1]
        rank = int((values > values.amax(1, keepdim=True) * k * torch.finfo(q.hessian.dtype).eps).sum(1).min())
        dead = int((gram.diagonal(dim1=1, dim2=2) == 0).sum(1).max())
        found[name] = (k, rank, dead, float((damped[:, -1] / damped[:, 0]).max()), q.damping)
    return Conditioning(found)
