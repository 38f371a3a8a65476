"""From masks to milliseconds: models that hold and run only their kept blocks, and measurements of their speed.

| file                                           | what it holds                                                                     |
|------------------------------------------------|-----------------------------------------------------------------------------------|
| `conversion`                                   | `block_sparse`, and back: `load_state_dict`, `dense`, `onnx`                      |
| `candidates`, `backend_choice`, `choice_table` | which masked layers can run block-sparse, and which backend runs each (`choose`)  |
| `sparse_layers`, `sparse_convs`                | layers that hold only the kept blocks, frozen or trainable                        |
| `exported_weight`                              | the dense weight that such a layer reads as, which refuses changes in place       |
| `semi_structured`                              | layers with 2:4 weights                                                           |
| `mask_updates`                                 | `update`: other blocks for a model that trains                                    |
| `format`                                       | how kept blocks are stored                                                        |
| `ops`, `conv_ops`, `torch_products`            | product, convolution and their gradients as operators of torch; any device        |
| `packing`, `quantization`                      | from a weight and its mask to stored blocks, in the weight's type or in int8      |
| `triton_launch`, `triton_kernels`              | the product on a GPU                                                              |
| `dense_baselines`, `timing`                    | the fastest dense layers and models; interleaved median times                     |
| `model_benchmark`, `recommendation`            | whole models against dense ones; which blocks make a layer faster, and their cost |
| `model_size`                                   | parameters and multiply-adds of a whole model, dense and kept                     |
| `shrinking`, `coupled_channels`                | smaller dense models without the units that masks have emptied                    |
| `uniform_widths`                               | widths that the configuration of a Hugging Face model can express                 |
| `constant_units`, `input_dependence`           | which units do not depend on the inputs of a model                                |
| `module_replacement`                           | `replace_modules`                                                                 |
"""

from blockprune.export.backend_choice import choose
from blockprune.export.choice_table import Backend, Backends, Choice, Choices, backends
from blockprune.export.conversion import block_sparse, dense, load_state_dict, onnx
from blockprune.export.dense_baselines import dynamic_int8, rowwise_int8
from blockprune.export.mask_updates import update
from blockprune.export.model_benchmark import ModelSpeed, SpeedComparison, benchmark
from blockprune.export.model_size import ModelSize, count_model
from blockprune.export.packing import pack_weight
from blockprune.export.recommendation import BlockCost, BlockCosts, BlockRecommendation, BlockSpeedup, cost_table, recommend_blocks
from blockprune.export.shrinking import ShrinkResult, Units, shrink
from blockprune.export.sparse_convs import BlockSparseConv2d
from blockprune.export.sparse_layers import BlockSparseLinear, Int8BlockSparseLinear

__all__ = [
    "Backend",
    "Backends",
    "BlockCost",
    "BlockCosts",
    "BlockRecommendation",
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "BlockSpeedup",
    "Choice",
    "Choices",
    "Int8BlockSparseLinear",
    "ModelSize",
    "ModelSpeed",
    "ShrinkResult",
    "SpeedComparison",
    "Units",
    "backends",
    "benchmark",
    "block_sparse",
    "choose",
    "cost_table",
    "count_model",
    "dense",
    "dynamic_int8",
    "load_state_dict",
    "onnx",
    "pack_weight",
    "recommend_blocks",
    "rowwise_int8",
    "shrink",
    "update",
]
