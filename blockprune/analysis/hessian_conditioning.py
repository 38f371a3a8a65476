"""How well calibration data determines each layer's Hessian."""

from collections.abc import Mapping

import attrs
import torch

from blockprune.core.hessian import layer_quadratic
from blockprune.core.table import Rows, Table
from blockprune.core.types import Data


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
        """Rows of cells; the first row is the header."""
        head = ("parameter", "inputs", "rank", "dead", "condition", "damping")
        return [
            head,
            *((name, str(k), str(rank), str(dead), f"{cond:.1e}", f"{damp:g}") for name, (k, rank, dead, cond, damp) in self.rows.items()),
        ]


def conditioning(data: Data, *, damping: float = 0.01) -> Conditioning:
    """What `metric.obs` and `reconstruct.least_squares` have to work with: rank, dead inputs and condition of each damped Hessian.

    Args:
        data: with the statistic ``input_gram``.
        damping: the damping that you give to `metric.obs` or `reconstruct.least_squares`; the table shows the damping that made each
            Hessian invertible.

    Raises:
        ValueError: data without ``input_gram``; a Hessian that stays singular with 1000 times the damping.

    Example:
        >>> data = bp.collect.with_statistics(nn.Linear(3, 2), where=bp.linears((1, 1)), statistics=[bp.statistics.input_gram],
        ...                                   batches=[torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])])
        >>> bp.conditioning(data)
        parameter  inputs  rank  dead  condition  damping
        weight          3     2     1    4.0e+02     0.01
    """
    rows = {}
    for name, p in data.items():
        if "input_gram" not in p.stats:
            raise ValueError(
                f"{name} {p.grid.shape}: conditioning needs the statistic 'input_gram'; the data has {sorted(p.stats) or 'none'}"
            )
        q = layer_quadratic(name, p, damping=damping)
        gram = p.stats["input_gram"].double()
        values = torch.linalg.eigvalsh(gram).clamp_min(0)  # [groups, k]
        damped = torch.linalg.eigvalsh(q.hessian.double())
        k = gram.shape[-1]
        rank = int((values > values.amax(1, keepdim=True) * k * torch.finfo(q.hessian.dtype).eps).sum(1).min())
        dead = int((gram.diagonal(dim1=1, dim2=2) == 0).sum(1).max())
        rows[name] = (k, rank, dead, float((damped[:, -1] / damped[:, 0]).max()), q.damping)
    return Conditioning(rows)
