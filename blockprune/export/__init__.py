"""From masks to milliseconds: models that hold and run only their kept blocks, and honest measurements of them."""

from blockprune.export.advise import Advice, Cost, Costs, Paying, advise, cost_table
from blockprune.export.benchmark import Comparison, Speed, benchmark
from blockprune.export.block_sparse import block_sparse, load_state_dict
from blockprune.export.choose import Backend, Backends, Choice, Choices, backends, choose
from blockprune.export.dense import dense, onnx
from blockprune.export.layers import BlockSparseConv2d, BlockSparseLinear, as_matrix
from blockprune.export.shrink import Shrunk, Units, shrink

__all__ = [
    "Advice",
    "Backend",
    "Backends",
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "Choice",
    "Choices",
    "Comparison",
    "Cost",
    "Costs",
    "Paying",
    "Shrunk",
    "Speed",
    "Units",
    "advise",
    "as_matrix",
    "backends",
    "benchmark",
    "block_sparse",
    "choose",
    "cost_table",
    "dense",
    "load_state_dict",
    "onnx",
    "shrink",
]
