"""Statistics take no more memory than they must, and have the same bits as if each layer were collected alone."""

import copy
import gc
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from strategies import seeds
from torch import Tensor, nn

import blockprune as bp
from blockprune import collect, statistics
from blockprune.collect.accumulate import compute_once
from blockprune.statistics import Statistic

WHERE = bp.linears((2, 2))


class Attention(nn.Module):
    """q and k always get the same input, v another one if the sum of the inputs is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 4), nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.q(x)) + torch.tanh(self.k(x))[:, 4:]
        return self.out(y * self.v(x if x.sum() > 0 else x.flip(0)))


def loss(output: Tensor, batch: Tensor) -> Tensor:
    return output.square().mean()


def gathered(model: nn.Module, batches: Sequence[Tensor], *collected: Statistic, where: bp.Where = WHERE) -> bp.Data:
    return collect.with_statistics(model, where=where, statistics=collected, batches=batches, loss=loss)


@given(seeds)
def test_layers_with_one_input_share_a_gram_of_the_same_bits(seed: int) -> None:
    torch.manual_seed(seed)
    model, batches = Attention(), [torch.randn(5, 6) for _ in range(3)]
    data = gathered(model, batches, statistics.input_gram, statistics.input_sq)
    for name, p in data.items():
        alone = gathered(model, batches, statistics.input_gram, where=bp.named(name, (2, 2)))
        assert torch.equal(p.stats["input_gram"], alone[name].stats["input_gram"])
    grams = {name: p.stats["input_gram"] for name, p in data.items()}
    assert grams["q.weight"] is grams["k.weight"]
    assert (grams["v.weight"] is grams["q.weight"]) == all(x.sum() > 0 for x in batches)
    assert grams["out.weight"] is not grams["q.weight"]


def test_layers_share_sums_only_if_all_tensors_of_the_sums_are_the_same() -> None:
    class Twice(nn.Module):
        """Both layers get the same input; the second is called where the sum of the input is positive."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + (self.second(x) if x.sum() > 0 else 0)

    def init(ref: object, param: object) -> statistics.Sums:
        return {"constant": torch.ones(()), "calls": torch.zeros(())}

    def update(sums: statistics.Sums, call: statistics.Call) -> statistics.Sums:
        return {"constant": sums["constant"], "calls": sums["calls"] + 1}

    calls = Statistic("calls", "inputs", init, update, lambda sums, ref, param: sums["calls"], shared=True)
    data = gathered(Twice(), [-torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4)], calls)
    assert {name: p.stats["calls"].item() for name, p in data.items()} == {"first.weight": 3, "second.weight": 2}


def test_no_sums_but_the_newest_stay_in_memory() -> None:
    counts: list[int] = []

    def update(sums: statistics.Sums, call: statistics.Call) -> statistics.Sums:
        alive = [x for x in gc.get_objects() if type(x) is Tensor and x.shape == (1, 37, 37)]
        counts.append(len({x.data_ptr() for x in alive}))
        return {"n": sums["n"] + 1}

    count = Statistic("count", "inputs", lambda ref, param: {"n": torch.zeros(())}, update, lambda sums, ref, param: sums["n"])
    batches = [torch.randn(9, 37) for _ in range(3)]
    gathered(nn.Linear(37, 2), batches, statistics.input_gram, count, where=bp.linears((2, 37)))
    assert len(counts) == 3
    assert max(counts) <= 2  # a caller may hold those that the first batch began with, once torch.compile evaluates the frames


@given(seeds)
def test_merged_folds_share_what_both_share(seed: int) -> None:
    torch.manual_seed(seed)
    model, batches = Attention(), [torch.randn(5, 6).abs() for _ in range(2)]
    parts = [collect.fold(model, where=WHERE, statistics=[statistics.input_gram], batches=[x]) for x in batches]
    merged = collect.merge(*parts)
    assert merged.sums["q.weight", "input_gram"] is merged.sums["v.weight", "input_gram"]
    assert merged.sums["q.weight", "input_gram"] is not merged.sums["out.weight", "input_gram"]
    for name, p in collect.compute(merged).items():
        sums = [part.sums[name, "input_gram"] for part in parts]
        expected = (sums[0]["sum"] + sums[1]["sum"]) / (sums[0]["n"] + sums[1]["n"])
        assert torch.equal(p.stats["input_gram"], expected)


def test_sums_are_removed_as_they_are_divided() -> None:
    model, kinds = Attention(), [statistics.input_gram, statistics.output_grad_sq]
    fold = collect.fold(model, where=WHERE, statistics=kinds, batches=[torch.ones(5, 6)], loss=loss)
    data = collect.compute(fold)
    assert len(fold.sums) == 8  # `compute` leaves the fold as it is
    for name, p in compute_once(fold).items():
        assert p.stats.keys() == data[name].stats.keys()
        assert all(torch.equal(value, data[name].stats[key]) for key, value in p.stats.items())
    assert not fold.sums


@pytest.mark.parametrize("frozen", [False, True])
@given(seeds)
def test_gradients_of_outputs_have_the_same_bits_with_and_without_those_of_weights(frozen: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model, batches = Attention().requires_grad_(not frozen), [torch.randn(5, 6) for _ in range(2)]
    alone = gathered(model, batches, statistics.output_grad_sq, statistics.output_grad_gram)
    beside = gathered(model, batches, statistics.output_grad_sq, statistics.output_grad_gram, statistics.weight_grad)
    for name, p in alone.items():
        assert all(torch.equal(value, beside[name].stats[key]) for key, value in p.stats.items())
        assert p.stats["output_grad_sq"].any()
    assert {p.requires_grad for p in model.parameters()} == {not frozen}


def test_without_gradients_of_weights_the_graph_keeps_no_inputs_of_layers() -> None:
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), torch.randn(64, 8)
    before = copy.deepcopy(model.state_dict())

    def kept(*collected: Statistic) -> int:
        """The elements of activations that the graph keeps."""
        sizes: list[int] = []

        def pack(t: Tensor) -> Tensor:
            sizes.append(t.numel() if t.shape == x.shape else 0)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            gathered(model, [x], *collected)
        return sum(sizes)

    assert kept(statistics.output_grad_sq) == 2 * x.numel()  # the first layer's input, whose graph begins at its weight, and the loss's
    assert kept(statistics.output_grad_sq, statistics.weight_grad) == 5 * x.numel()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_statistics_of_gradients_are_given_no_inputs() -> None:
    lengths: list[int] = []

    def update(sums: statistics.Sums, call: statistics.Call) -> statistics.Sums:
        lengths.append(len(call.inputs))
        return {"n": sums["n"] + 1}

    count = Statistic("count", "output_grad", lambda ref, param: {"n": torch.zeros(())}, update, lambda sums, ref, param: sums["n"])
    gathered(Attention(), [torch.ones(5, 6)], statistics.input_gram, count)
    assert lengths == [0] * 4
