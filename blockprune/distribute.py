"""How one sparsity is spread over the parameters: (scores, sparsity) -> a sparsity for each."""

from blockprune.types import Scores


def uniform(scores: Scores, sparsity: float) -> dict[str, float]:
    """Every parameter the same sparsity.

    Example:
        >>> bp.allocate.uniform({"a": bp.BlockScore(torch.ones(4), bp.BlockGrid((4,), (1,)))}, 0.5)
        {'a': 0.5}
    """
    return dict.fromkeys(scores, sparsity)


def erk(scores: Scores, sparsity: float) -> dict[str, float]:
    """Density proportional to (sum of the shape) / (product of the shape), at most 1: small layers stay denser (Evci et al. 1911.11134).

    Example:
        >>> small, large = bp.BlockGrid((8, 8), (1, 1)), bp.BlockGrid((64, 64), (1, 1))
        >>> out = bp.allocate.erk({"s": bp.BlockScore(torch.ones(8, 8), small), "l": bp.BlockScore(torch.ones(64, 64), large)}, 0.9)
        >>> round(out["s"], 3), round(out["l"], 3)
        (0.278, 0.91)
    """
    raw = {name: sum(s.grid.shape) / s.grid.elements for name, s in scores.items()}
    keep = (1 - sparsity) * sum(s.grid.elements for s in scores.values())
    full: set[str] = set()
    while True:  # a layer that would need more than all its weights is full; the others share what is left
        rest = [name for name in scores if name not in full]
        weight = sum(raw[name] * scores[name].grid.elements for name in rest)
        scale = (keep - sum(scores[name].grid.elements for name in full)) / weight if rest else 0.0
        over = {name for name in rest if scale * raw[name] > 1}
        if not over:
            return {name: 0.0 if name in full else 1 - scale * raw[name] for name in scores}
        full |= over
