"""The third stage: allocate(scores, sparsity) -> masks, which prune the blocks with the lowest scores."""

from blockprune.allocate.allocators import n_of_m, per_bank, per_columns, per_layer, per_model, per_row

__all__ = ["n_of_m", "per_bank", "per_columns", "per_layer", "per_model", "per_row"]
