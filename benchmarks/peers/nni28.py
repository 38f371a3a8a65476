"""NNI 2.8 with the customised Block-L1NormPruner of NNI's own tutorial "Customize Basic Pruner".

NNI 2.8 has no block pruner of its own. The classes below are the tutorial's, with its imports moved to where 2.8 keeps them.
"""

from __future__ import annotations

from typing import Any

import torch
from _worker import SPARSITY, serve
from nni.algorithms.compression.v2.pytorch.pruning.basic_pruner import BasicPruner
from nni.algorithms.compression.v2.pytorch.pruning.tools import DataCollector, MetricsCalculator, SparsityAllocator
from torch import Tensor, nn


class WeightDataCollector(DataCollector):  # type: ignore[misc]
    def collect(self) -> dict[str, Tensor]:
        return {wrapper.name: wrapper.module.weight.data for wrapper in self.compressor.get_modules_wrapper().values()}


class BlockNormMetricsCalculator(MetricsCalculator):  # type: ignore[misc]
    def __init__(self, block_sparse_size: list[int]) -> None:
        super().__init__(dim=None, block_sparse_size=block_sparse_size)

    def calculate_metrics(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        data_length = len(self.block_sparse_size)
        reduce_unfold_dims = list(range(data_length, 2 * data_length))
        metrics = {}
        for name, t in data.items():
            for dim, size in enumerate(self.block_sparse_size):
                t = t.unfold(dim, size, size)  # noqa: PLW2901 (as in the tutorial)
            metrics[name] = t.norm(dim=reduce_unfold_dims, p=1)
        return metrics


class BlockSparsityAllocator(SparsityAllocator):  # type: ignore[misc]
    def __init__(self, pruner: BasicPruner, block_sparse_size: list[int]) -> None:
        super().__init__(pruner, dim=None, block_sparse_size=block_sparse_size, continuous_mask=True)

    def generate_sparsity(self, metrics: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        masks = {}
        for name, wrapper in self.pruner.get_modules_wrapper().items():
            sparsity_rate = wrapper.config["total_sparsity"]
            metric = metrics[name]
            if self.continuous_mask:
                metric *= self._compress_mask(wrapper.weight_mask)
            prune_num = int(sparsity_rate * metric.numel())
            threshold = torch.topk(metric.view(-1), prune_num, largest=False)[0].max()
            mask = torch.gt(metric, threshold).type_as(metric)
            masks[name] = self._expand_mask(name, mask)
            if self.continuous_mask:
                masks[name]["weight"] *= wrapper.weight_mask
        return masks


class BlockL1NormPruner(BasicPruner):  # type: ignore[misc]
    data_collector: DataCollector | None
    metrics_calculator: MetricsCalculator | None
    sparsity_allocator: SparsityAllocator | None

    def __init__(self, model: nn.Module, config_list: list[dict[str, Any]], block_sparse_size: list[int]) -> None:
        self.block_sparse_size = block_sparse_size
        super().__init__(model, config_list)

    def reset_tools(self) -> None:
        if self.data_collector is None:
            self.data_collector = WeightDataCollector(self)
        else:
            self.data_collector.reset()
        if self.metrics_calculator is None:
            self.metrics_calculator = BlockNormMetricsCalculator(self.block_sparse_size)
        if self.sparsity_allocator is None:
            self.sparsity_allocator = BlockSparsityAllocator(self, self.block_sparse_size)


def setup(model: nn.Module, block: tuple[int, int]) -> BlockL1NormPruner:
    return BlockL1NormPruner(model, [{"op_types": ["Linear"], "total_sparsity": SPARSITY}], list(block))


def compute(pruner: BlockL1NormPruner) -> list[Tensor]:
    _, masks = pruner.compress()
    return [masks[name]["weight"] for name, _ in pruner.bound_model.named_children()]


if __name__ == "__main__":
    serve("NNI 2.8", setup, compute)
