"""A model is run without a trace: its state is afterwards as it was before."""

from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn

import blockprune as bp
from blockprune.model.running import (
    buffers_as_now,
    disable_attention_fastpath,
    float64_copy,
    preserve_state,
    to_model_device,
    uncompiled,
)

X = torch.ones(2, 4)


def test_a_batch_takes_the_models_dtype_and_keeps_its_structure() -> None:
    pair = namedtuple("pair", "x y")
    batch = {"pair": pair(X, torch.ones(2).long()), "list": [X, "text"], "tuple": (X.bool(), None)}
    got = to_model_device(nn.Linear(2, 2).double(), batch)
    assert isinstance(got["pair"], pair)
    assert got["pair"].x.dtype == got["list"][0].dtype == torch.float64
    assert got["pair"].y.dtype == torch.int64
    assert got["tuple"][0].dtype == torch.bool
    assert (got["list"][1], got["tuple"][1]) == ("text", None)
    assert batch["list"][0].dtype == torch.float32
    assert to_model_device(nn.ReLU(), X).dtype == torch.float32


# The model's state.


def test_modes_flags_buffers_and_random_numbers_are_preserved_even_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model[2].eval()
    model[0].weight.requires_grad_(False)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    random = torch.random.get_rng_state()

    def train_and_stop() -> None:
        with preserve_state(model, [model[0].weight]):
            assert not any(m.training for m in model.modules())
            assert model[0].weight.requires_grad
            model[1].train()(torch.randn(8, 4))
            assert not torch.equal(model[1].running_mean, buffers["1.running_mean"])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train_and_stop()
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert not model[0].weight.requires_grad
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_buffers_that_nothing_wrote_to_are_not_written_to() -> None:
    model = nn.BatchNorm1d(4)
    before = [b._version for b in model.buffers()]
    with preserve_state(model):
        model(torch.randn(8, 4))
    assert [b._version for b in model.buffers()] == before


@pytest.mark.parametrize("enabled", [True, False])
def test_the_attention_fastpath_is_restored(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: enabled)
    monkeypatch.setattr(torch.backends.mha, "set_fastpath_enabled", calls.append)

    def stop() -> None:
        with disable_attention_fastpath():
            assert calls == [False]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert calls == [False, enabled]


class OnlyFloat32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


@pytest.mark.parametrize(("model", "dtype"), [(nn.Linear(4, 2), torch.float64), (OnlyFloat32(4, 2), torch.float32)])
def test_a_copy_is_in_float64_if_the_model_runs_in_it(model: nn.Module, dtype: torch.dtype) -> None:
    double, (output,) = float64_copy(model, lambda m: [m(to_model_device(m, X))])
    assert torch.equal(output, model(X))
    assert [p.dtype for p in double.parameters()] == [dtype, dtype]
    assert {p.data_ptr() for p in double.parameters()}.isdisjoint({p.data_ptr() for p in model.parameters()})
    assert [p.dtype for p in model.parameters()] == [torch.float32, torch.float32]


def test_an_example_that_the_model_cannot_run_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the model cannot run the example: .*forward"):
        float64_copy(nn.Linear(3, 2), lambda m: [m(X)])


class Counting(nn.Module):
    """Its forward writes one buffer, assigns another, and adds a third."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("assigned", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.written.data.add_(1)
        self.assigned = torch.ones(5)
        self.register_buffer("added", torch.ones(3))
        return x


def test_buffers_are_put_back_as_often_as_wanted() -> None:
    model = Counting()
    written, put_back = model.written, buffers_as_now(model)
    for _ in range(2):
        model(X)
        put_back()
        assert model.written is written
        assert torch.equal(model.written, torch.zeros(2))
        assert torch.equal(model.assigned, torch.zeros(2))
        assert torch.equal(model.added, torch.ones(3))


class OnGraph(nn.Module):
    """A layer whose outputs a sparse matrix mixes, as in a network on a graph."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        edges = torch.eye(4) + torch.eye(4).roll(1, 0)
        blocks = {"blocksize": (2, 2)} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
        self.register_buffer("edges", edges.to_sparse(layout=layout, **blocks))

    def forward(self, x: Tensor) -> Tensor:
        return self.edges.to_dense() @ self.linear(x)


@pytest.mark.filterwarnings("ignore:Sparse")  # in beta state
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc])
def test_a_model_may_have_sparse_buffers(layout: torch.layout) -> None:
    model = OnGraph(layout)
    before = model.edges.to_dense()
    bp.collect.with_statistics(model, where=bp.linears((2, 2)), statistics=[bp.statistics.input_sq], batches=[torch.ones(4, 4)])
    with preserve_state(model):
        model.edges.values().mul_(2) if layout != torch.sparse_coo else model.edges.mul_(2)
        assert not torch.equal(model.edges.to_dense(), before)
    assert torch.equal(model.edges.to_dense(), before)


def test_distill_trains_a_model_with_a_sparse_buffer() -> None:
    model = OnGraph(torch.sparse_coo)
    masks = bp.recipes.magnitude(bp.linears((2, 2)))(model, 0.5).masks
    weights = bp.distill(model, masks, None, [torch.ones(4, 4)], teacher=model, loss=bp.losses.hidden_states, steps=2, every=1)
    assert set(weights) == {"linear.weight", "linear.bias"}


def test_quickly_only_buffers_that_were_written_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, equal = nn.Module(), list[int](), torch.equal
    names = ["counted", "hidden", "unwritten"]
    for name in names:
        model.register_buffer(name, torch.zeros(2))
    with torch.inference_mode():
        model.register_buffer("inference", torch.zeros(2))
    buffers = [*names, "inference"]
    monkeypatch.setattr(
        torch, "equal", lambda x, y: read.append(buffers.index(next(n for n in buffers if getattr(model, n) is x))) or equal(x, y)
    )

    def read_by(**options: bool) -> list[str]:
        read.clear()
        put_back(**options)
        assert all(equal(buffer, torch.zeros(2)) for buffer in model.buffers())
        return [buffers[i] for i in read]

    put_back = buffers_as_now(model)
    assert read_by(quick=True) == ["inference"]
    model.counted.add_(1)
    assert read_by(quick=True) == ["counted", "inference"]
    assert read_by(quick=True) == ["inference"]
    model.hidden.data.add_(1)
    model.counted.add_(1)
    assert read_by() == buffers
    model.hidden.data.add_(1)
    assert read_by(quick=True) == ["hidden", "inference"]
    assert read_by(quick=True) == ["hidden", "inference"]


def test_an_uncompiled_function_keeps_its_name_and_its_result() -> None:
    def double(x: Tensor, *, times: int) -> Tensor:
        return x * times

    outside = uncompiled(double)
    assert outside.__name__ == "double"
    assert torch.equal(outside(X, times=2), 2 * X)
    assert torch.equal(torch.compile(lambda x: outside(x + 1, times=2) - 1, backend="eager")(X), 2 * (X + 1) - 1)
