"""GPT-2's transposed layers as Linears: the same outputs, the model unchanged, and all steps to blocks."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune as bp
from blockprune import allocate, collect, metric, reconstruct, statistics
from blockprune.model.selection import select


class Conv1D(nn.Module):
    """Like transformers.pytorch_utils.Conv1D."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_the_copy_computes_the_same_and_the_model_stays() -> None:
    shared = Conv1D(4, 4)
    shared.weight.requires_grad_(False)
    model, x = nn.Sequential(shared, nn.ReLU(), shared, Conv1D(6, 4)).eval(), torch.randn(3, 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    converted = bp.as_linears(model)
    torch.testing.assert_close(converted(x), model(x))
    assert [type(m) for m in converted] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    assert converted[0] is converted[2]
    assert not converted[0].weight.requires_grad
    assert converted[3].weight.requires_grad
    assert not any(m.training for m in converted.modules())
    assert [*converted.state_dict()] == [*before]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not {p.data_ptr() for p in converted.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert all(m.weight.is_contiguous() for m in converted if isinstance(m, nn.Linear))
    back = bp.from_linears(converted, model)
    assert all(torch.equal(value, before[key]) for key, value in back.state_dict().items())
    square = nn.Sequential(Conv1D(4, 4))
    assert torch.equal(bp.from_linears(square, square)[0].weight, square[0].weight)  # it was never converted
    assert isinstance(bp.as_linears(Conv1D(6, 4)), nn.Linear)


def test_tied_weights_stay_tied_and_hooks_stay() -> None:
    model, x = nn.Sequential(Conv1D(4, 4), nn.ReLU(), Conv1D(4, 4)), torch.randn(3, 4)
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    converted = bp.as_linears(model)
    torch.testing.assert_close(converted(x), model(x))
    assert converted[0].weight is converted[2].weight
    assert len([*converted.parameters()]) == 2


def test_other_classes_of_that_name_are_not_converted() -> None:
    other = type("Conv1D", (nn.Conv1d,), {})(4, 4, 3)
    wrapper = type("Conv1D", (nn.Sequential,), {})(other)
    model, x = nn.Sequential(wrapper), torch.randn(2, 4, 6)
    converted = bp.as_linears(model)
    assert type(converted[0][0]) is type(other)
    assert torch.equal(converted(x), model(x))
    where = bp.named("*.weight", (2, 2))
    assert "0.0.weight" in collect.with_statistics(model, where=where, statistics=[statistics.output_sq], batches=[x])


def test_errors_name_the_remedy() -> None:
    model = nn.Sequential(Conv1D(4, 4))
    with pytest.raises(ValueError, match=r"matches no parameter.*its Conv1D are no Linears: bp\.as_linears\(model\)"):
        select(model, bp.linears((2, 2)))
    collector = partial(collect.with_statistics, model, where=bp.named("*.weight", (2, 2)), batches=[torch.randn(3, 4)])
    for statistic in (statistics.input_sq, statistics.input_gram, statistics.output_sq, statistics.output_grad_gram):
        with pytest.raises(NotImplementedError, match=r"0\.weight.*Conv1D.*bp\.as_linears\(model\)"):
            collector(statistics=[statistic], loss=lambda output, batch: output.sum())
    masks = allocate.per_layer(metric.l1(collect.weights(model, where=bp.named("*.weight", (2, 2)))), 0.5)
    tied = nn.Sequential(Conv1D(4, 4), nn.Embedding(4, 4))
    tied[1].weight = tied[0].weight
    replaced = nn.Sequential(Conv1D(4, 4))
    replaced[0].forward = lambda x: x
    for bad, cause in (
        (bp.apply_masks(model, masks), r"is parametrized; .*bp\.finalize"),
        (tied, "shares a weight with 1.*untie"),
        (replaced, "has its own forward.*delete"),
    ):
        with pytest.raises(ValueError, match=f"0, a Conv1D, {cause}"):
            bp.as_linears(bad)


class Transposed(nn.Module):
    """A weight whose outputs lie along axis 1; no attribute says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("statistic", [statistics.output_sq, statistics.output_grad_gram])
def test_outputs_that_are_not_the_rows_are_refused(statistic: statistics.Statistic) -> None:
    collector = partial(collect.with_statistics, Transposed(), where=bp.named("weight", (2, 2)), loss=lambda output, batch: output.sum())
    with pytest.raises(
        ValueError, match=rf"weight: {statistic.name} expects 4 outputs, as the weight's shape says.* returned 6 .*excluding"
    ):
        collector(statistics=[statistic], batches=[torch.randn(3, 4)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers and what it imports
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_gpt2_is_converted_pruned_repaired_and_exported() -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config: Any = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=20, initializer_range=0.3, **config)).eval()
    batches = list(torch.randint(20, (4, 2, 16)))
    converted = bp.as_linears(model)
    torch.testing.assert_close(converted(batches[0]).logits, model(batches[0]).logits, atol=1e-4, rtol=1e-4)
    axes = bp.find_axes(converted, batches[0], progress=False)
    assert [len(axis.order) for axis in axes] == [32, 4, 128, 4, 128]  # the stream, and the heads and hidden units of each layer
    rule = bp.including(bp.linears((4, 4)), "transformer.h.*")
    collector = partial(collect.with_statistics, where=rule, statistics=[statistics.input_gram])
    pipeline = bp.Pipeline(collector, metric.obs, allocate.per_layer)
    repaired = bp.sequential(converted, pipeline, reconstruct.least_squares, batches, 0.5, progress=False)
    assert len(repaired.masks) == 8
    assert bp.sparsity(repaired.masks) == 0.5
    sparse = bp.export.block_sparse(bp.apply_masks(converted, repaired.masks, repaired.weights), backend="torch")
    assert sum(isinstance(m, bp.export.BlockSparseLinear) for m in sparse.modules()) == 8
    torch.testing.assert_close(sparse(batches[0]).logits, converted(batches[0]).logits, atol=1e-3, rtol=1e-3)
