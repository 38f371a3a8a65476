"""From masks to milliseconds: models that hold and run only their kept blocks, and honest measurements of them."""

from blockprune.export.block_sparse import block_sparse, load_state_dict
from blockprune.export.choose import Backend, Backends, Choice, Choices, backends, choose
from blockprune.export.dense import dense
from blockprune.export.layers import BlockSparseConv2d, BlockSparseLinear, as_matrix

__all__ = [
    "Backend",
    "Backends",
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "Choice",
    "Choices",
    "as_matrix",
    "backends",
    "block_sparse",
    "choose",
    "dense",
    "load_state_dict",
]
