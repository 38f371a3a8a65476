"""Laws 4 and 6: masks go onto a model and off again exactly, and a failed call leaves no trace."""

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import blockprune as bp
from blockprune import export
from blockprune.model import apply as apply_module
from blockprune.model import optimizer_state, parameters
from blockprune.model.parameters import parameter_refs


class Plain(nn.Sequential):
    """Parameters of rank 1, 2 and 4, two in a module, one None, one frozen."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6, bias=False), nn.Linear(6, 5))
        self[4].weight.requires_grad_(False)


class Tied(nn.Module):
    """An embedding and a head that share one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).sum(-1).long() % 9
        return self.head(self.body(self.embed(x)))


class Shared(nn.Sequential):
    """One module under two names."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        twice = nn.Linear(27, 27)
        super().__init__(nn.Flatten(), twice, nn.ReLU(), twice, nn.Linear(27, 4))


MODELS = [Plain, Tied, Shared]
Blocks = dict[str, tuple[int, ...]]
NAMES = {kind: [name for name, _ in kind().named_parameters()] for kind in MODELS}
SHAPES = {kind: {name: tuple(p.shape) for name, p in kind().named_parameters()} for kind in MODELS}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


def random_mask(shape: tuple[int, ...], block: tuple[int, ...], seed: int = 0) -> bp.BlockMask:
    grid = bp.BlockGrid(shape, block)
    return bp.BlockMask(torch.rand(grid.size, generator=torch.Generator().manual_seed(seed)) < 0.5, grid)


def zeroed(plain: nn.Module, masks: bp.Masks) -> nn.Module:
    """What `finalize(apply_masks(...))` should return: the zeros written by hand."""
    model = copy.deepcopy(plain)
    for name, mask in masks.items():
        weight = model.get_parameter(name).data
        weight.copy_(reference.masked(weight, mask.keep, mask.grid))
    return model


def traces(model: nn.Module) -> list[tuple[Any, ...]]:
    """All that masking could leave on a module besides values: class, attributes, parameters and their order, hooks."""
    modules = [
        (name, type(m), m.training, list(m._parameters), list(m._buffers), list(m._modules), sorted(vars(m)))
        for name, m in model.named_modules()
    ]
    hooks = [len(value) for m in model.modules() for key, value in sorted(vars(m).items()) if key.endswith("_hooks")]
    return [*modules, (hooks,), *[(name, p.shape, p.dtype, p.requires_grad, p.is_leaf) for name, p in model.named_parameters()]]


def state(model: nn.Module, x: Tensor | None = None) -> dict[str, Any]:
    """All that a failed call must leave alone."""
    modules = [(name, type(module).__name__, sorted(vars(type(module)))) for name, module in model.named_modules()]
    return {
        "modules": modules,
        "masks": bp.read_masks(model),
        "parameters": [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters(remove_duplicate=False)],
        "state_dict": [(name, v.dtype, v.tolist()) for name, v in model.state_dict().items()],
        "outputs": None if x is None else model(x).tolist(),
    }


@contextmanager
def untouched(model: nn.Module, x: Tensor | None = None) -> Iterator[None]:
    before = state(model, x)
    yield
    after = state(model, x)
    for what, value in before.items():
        assert value == after[what], what


@st.composite
def mask_sets(draw: st.DrawFn, kind: type[nn.Module]) -> dict[str, bp.BlockMask]:
    """Masks for some of the parameters, in any order and any blocks."""
    names = draw(st.lists(st.sampled_from(NAMES[kind]), unique=True, max_size=4))
    shapes = [SHAPES[kind][name] for name in names]
    blocks = [draw(st.tuples(*[st.sampled_from([-1, 1, min(2, s), min(3, s)]) for s in shape])) for shape in shapes]
    return {n: random_mask(s, b, draw(st.integers(0, 99))) for n, s, b in zip(names, shapes, blocks, strict=True)}


@st.composite
def histories(draw: st.DrawFn) -> tuple[type[nn.Module], list[dict[str, bp.BlockMask]], torch.dtype]:
    kind = draw(st.sampled_from(MODELS))
    return kind, draw(st.lists(mask_sets(kind), min_size=1, max_size=4)), draw(strategies.dtypes)


History = tuple[type[nn.Module], list[dict[str, bp.BlockMask]], torch.dtype]


@given(histories())
def test_a_model_has_exactly_the_masks_applied_last(history: History) -> None:
    kind, applied, dtype = history
    plain, model = kind().to(dtype), kind().to(dtype)
    parameters, order = {id(p) for p in model.parameters()}, list(parameter_refs(model))
    for masks in [*applied, applied[-1]]:  # the last one twice: applying is idempotent
        assert bp.apply_masks(model, masks) is model
        expected = zeroed(plain, masks)
        assert bp.read_masks(model) == masks
        assert list(bp.read_masks(model)) == [name for name in order if name in masks]
        assert list(parameter_refs(model)) == order
        assert {id(p) for p in model.parameters()} == parameters
        for name, refs in parameter_refs(model).items():
            assert torch.equal(refs[0].stored, plain.get_parameter(name)), name
            assert len(refs[0].parametrizations or []) == (name in masks), name
            for ref in refs:
                assert ref.masked.dtype == dtype
                assert torch.equal(ref.masked, expected.get_parameter(name)), name
        assert torch.equal(model(inputs(dtype)), expected(inputs(dtype)))


@given(histories())
def test_no_masks_takes_all_off_without_a_trace(history: History) -> None:
    kind, applied, dtype = history
    plain, model = kind().to(dtype), kind().to(dtype)
    ids = [id(p) for p in model.parameters()]
    for masks in [*applied, {}]:
        bp.apply_masks(model, masks)
    assert traces(model) == traces(plain)
    assert [id(p) for p in model.parameters()] == ids
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


@given(histories())
def test_finalize_leaves_no_trace_and_the_original_alone(history: History) -> None:
    kind, applied, dtype = history
    plain, model, x = kind().to(dtype), kind().to(dtype), inputs(dtype)
    for masks in applied:
        bp.apply_masks(model, masks)
    with untouched(model, x):
        final = bp.finalize(model)
        assert traces(final) == traces(plain)
        assert list(final.state_dict()) == list(plain.state_dict())
        expected = zeroed(plain, applied[-1])
        assert all(torch.equal(p, q) for p, q in zip(final.parameters(), expected.parameters(), strict=True))
        assert torch.equal(final(x), model(x))
        assert bp.read_masks(final) == {}
        for p in final.parameters():
            p.data.fill_(3)  # shares no memory with the model


@given(histories())
def test_finalize_in_place_gives_what_the_copy_has_in_the_same_parameters(history: History) -> None:
    kind, applied, dtype = history
    plain, model = kind().to(dtype), kind().to(dtype)
    ids = [id(p) for p in model.parameters()]
    for masks in applied:
        bp.apply_masks(model, masks)
    expected = bp.finalize(model)
    assert bp.finalize(model, inplace=True) is model
    assert traces(model) == traces(plain)
    assert [id(p) for p in model.parameters()] == ids
    assert list(model.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


def test_finalize_in_place_has_what_was_written_into_a_masked_weight() -> None:
    model = bp.apply_masks(nn.Linear(4, 4), {"weight": random_mask((4, 4), (2, 2))})
    expected = model.weight.detach() * torch.tensor([[2.0], [1], [1], [1]])
    weight = model.weight
    weight.detach()[0].mul_(2)  # a change through a view is written back when the weight is read again
    bp.finalize(model, inplace=True)
    assert torch.equal(model.weight, expected)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_finalize_in_place_that_fails_changes_nothing(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = bp.apply_masks(Plain(), {name: random_mask(SHAPES[Plain][name], (2, 2)) for name in ("0.weight", "5.weight")})
    remove, calls = apply_module._remove_mask, []

    def failing(ref: Any) -> None:
        calls.append(ref)
        remove(ref)
        if len(calls) == 2:
            raise error("stop")

    monkeypatch.setattr("blockprune.model.apply._remove_mask", failing)
    with untouched(model, inputs()), pytest.raises(error, match="stop"):
        bp.finalize(model, inplace=True)
    assert len(calls) >= 2


def test_finalize_in_place_refuses_a_weight_that_is_computed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    bp.apply_masks(model, {name: random_mask((4, 4), (2, 2)) for name in ("0.weight", "1.weight")})
    with untouched(model, torch.ones(1, 4)), pytest.raises(ValueError, match=r"^1.weight: another parametrization computes .*\(4, 4\)"):
        bp.finalize(model, inplace=True)


@given(histories(), st.data())
def test_masked_parameters_try_masks_without_touching_the_model(history: History, data: st.DataObject) -> None:
    kind, applied, dtype = history
    plain, model, x = kind().to(dtype), kind().to(dtype), inputs(dtype)
    for masks in applied:
        bp.apply_masks(model, masks)
    tried = data.draw(mask_sets(kind))
    if data.draw(st.booleans()):  # the same blocks, which takes another path than other blocks
        tried |= {name: bp.BlockMask(~mask.keep, mask.grid) for name, mask in applied[-1].items()}
    with untouched(model, x):
        values, given = bp.masked_parameters(model, tried), copy.deepcopy(tried)
        got = functional_call(model, values, (x,), tie_weights=kind is not Shared)  # torch: True leaves its tensors in a shared module
        assert torch.equal(got, zeroed(plain, {**applied[-1], **tried})(x))
        for value in values.values():
            value.detach().fill_(0)  # shares no memory with the model, nor with the masks
        assert tried == given
    assert bp.masked_parameters(model, {}) == {}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("block", [None, (2, 2), (2, 3)], ids=["plain", "masked alike", "masked otherwise"])
def test_masked_parameters_are_differentiable(kind: type[nn.Module], block: tuple[int, ...] | None) -> None:
    plain, model, x = kind(), kind(), inputs()
    name = {Plain: "5.weight", Tied: "embed.weight", Shared: "1.weight"}[kind]
    mask = random_mask(SHAPES[kind][name], (2, 2), seed=3)
    if block:
        bp.apply_masks(model, {name: random_mask(SHAPES[kind][name], block)})
    functional_call(model, bp.masked_parameters(model, {name: mask}), (x,), tie_weights=kind is not Shared).pow(2).sum().backward()
    expected = zeroed(plain, {name: mask})
    expected(x).pow(2).sum().backward()
    want = reference.masked(expected.get_parameter(name).grad, mask.keep, mask.grid)
    got = parameter_refs(model)[name][0].stored.grad
    assert want.count_nonzero() > 0
    assert torch.equal(got, want)


def test_many_masks_are_tried_at_once_under_vmap() -> None:
    model, grid, x = nn.Linear(6, 4), bp.BlockGrid((4, 6), (2, 2)), torch.randn(3, 6)
    keeps = torch.rand(5, *grid.size) < 0.5
    got = torch.vmap(lambda k: functional_call(model, bp.masked_parameters(model, {"weight": bp.BlockMask(k, grid)}), (x,)))(keeps)
    torch.testing.assert_close(got, torch.stack([zeroed(model, {"weight": bp.BlockMask(k, grid)})(x) for k in keeps]))
    assert bp.read_masks(model) == {}


def test_masks_are_copied_in_and_out() -> None:
    model, mask = nn.Linear(4, 4), random_mask((4, 4), (2, 2))
    want = mask.keep.clone()
    bp.apply_masks(model, {"weight": mask})
    mask.keep.logical_not_()
    bp.read_masks(model)["weight"].keep.logical_not_()
    assert torch.equal(bp.read_masks(model)["weight"].keep, want)
    bp.apply_masks(model, {"weight": mask})  # in place this time
    mask.keep.logical_not_()
    assert torch.equal(bp.read_masks(model)["weight"].keep, ~want)


def test_a_mask_of_the_same_blocks_is_updated_in_place() -> None:
    model = bp.apply_masks(nn.Linear(4, 4), {"weight": random_mask((4, 4), (2, 2))})
    buffer = model.parametrizations.weight[0].keep
    bp.apply_masks(model, {"weight": random_mask((4, 4), (2, 2), seed=1)})
    assert model.parametrizations.weight[0].keep is buffer


def test_a_block_that_a_later_mask_keeps_comes_back() -> None:
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    none, all_ = (bp.BlockMask(torch.full((2, 2), keep), bp.BlockGrid((4, 4), (2, 2))) for keep in (False, True))
    assert bp.apply_masks(model, {"weight": none}).weight.count_nonzero() == 0
    assert torch.equal(bp.apply_masks(model, {"weight": all_}).weight, before)


def test_nan_under_a_pruned_block_leaks_nowhere() -> None:
    model = nn.Linear(4, 4)
    model.weight.data[:2, :2] = torch.nan
    model.weight.data[:2, 2:] = torch.inf
    mask = bp.BlockMask(torch.tensor([[False, False], [True, True]]), bp.BlockGrid((4, 4), (2, 2)))
    values = bp.masked_parameters(model, {"weight": mask})
    assert functional_call(model, values, (torch.ones(1, 4),)).isfinite().all()
    model = bp.apply_masks(model, {"weight": mask})
    model(torch.ones(1, 4)).sum().backward()
    assert model.parametrizations.weight.original.grad.tolist() == [[0] * 4] * 2 + [[1] * 4] * 2
    assert bp.finalize(model).weight[:2].count_nonzero() == 0
    assert model.parametrizations.weight.original[:2].isfinite().any().item() is False


def test_finalize_of_an_unmasked_model_is_an_equal_copy() -> None:
    model, x = Plain(), inputs()
    final = bp.finalize(model)
    assert traces(final) == traces(model)
    assert torch.equal(final(x), model(x))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in final.parameters()}


def test_finalize_keeps_mode_hooks_and_attributes() -> None:
    model, seen = Plain().eval(), []
    model[5].note = {"by": "the user"}
    model[5].register_forward_hook(lambda module, *_: seen.append(type(module)))
    final = bp.finalize(bp.apply_masks(model, {"5.weight": random_mask((5, 6), (2, 2))}))
    final(inputs())
    assert seen == [nn.Linear]
    assert final[5].note == {"by": "the user"}
    assert not any(module.training for module in final.modules())


def test_parameters_keep_their_order_among_ones_that_are_none() -> None:
    class Gaps(nn.Module):  # as MultiheadAttention has them
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("none", None)
            self.a, self.b, self.c = (nn.Parameter(torch.ones(4)) for _ in "abc")

    model = Gaps()
    for names in itertools.chain(*itertools.permutations(["b", "cb", "ab", "ca"])):
        bp.apply_masks(model, {name: random_mask((4,), (2,)) for name in names})
        assert list(parameter_refs(model)) == ["a", "b", "c"]
        final = bp.finalize(model)
        assert list(final._parameters) == list(Gaps()._parameters)
        assert list(final.state_dict()) == ["a", "b", "c"]


# Bad input ------------------------------------------------------------------------------------------------------------------

GOOD = random_mask((5, 6), (2, 2))
EYE = torch.eye(5, 6)
BAD: dict[str, tuple[Any, Any, type[Exception] | tuple[type[Exception], ...], list[str]]] = {
    "unknown name": ({"5.wieght": GOOD}, None, KeyError, ["5.wieght", "5.weight"]),
    "name of a module": ({"5": GOOD}, None, KeyError, ["'5'", "5.weight"]),
    "name in storage": ({"5.parametrizations.weight.original": GOOD}, None, KeyError, ["5.parametrizations"]),
    "no parameter": ({"1.none": GOOD}, None, KeyError, ["1.none"]),
    "not a string": ({5: GOOD}, None, (KeyError, TypeError), ["masks", "5"]),
    "wrong shape": ({"5.weight": random_mask((6, 5), (2, 2))}, None, ValueError, ["5.weight", "(5, 6)", "(6, 5)", "from this model"]),
    "the second bad": ({"5.weight": GOOD, "4.weight": GOOD}, None, ValueError, ["4.weight", "(6, 16)", "(5, 6)"]),
    "the second unknown": ({"5.weight": GOOD, "4.bias": GOOD}, None, KeyError, ["4.bias", "5.bias"]),
    "a tensor": ({"5.weight": GOOD.keep}, None, TypeError, ["5.weight", "Tensor", "BlockMask(keep"]),
    "a score": ({"5.weight": bp.BlockScore(GOOD.keep.float(), GOOD.grid)}, None, TypeError, ["5.weight", "BlockScore", "BlockMask(keep"]),
    "a list": (["5.weight"], None, TypeError, ["masks", "list", "BlockMask"]),
    "a lone mask": (GOOD, None, TypeError, ["masks", "BlockMask"]),
    "None": (None, None, TypeError, ["masks", "NoneType", "BlockMask"]),
    "weight of an unknown name": ({"5.weight": GOOD}, {"5.wieght": EYE}, KeyError, ["weights", "5.wieght", "5.weight"]),
    "weight of another shape": ({"5.weight": GOOD}, {"5.weight": EYE.T}, ValueError, ["5.weight", "(6, 5)", "(5, 6)", "whole weight"]),
    "weight with NaN": ({"5.weight": GOOD}, {"5.weight": EYE / 0}, ValueError, ["5.weight", "(5, 6)", "NaN"]),
    "second weight with inf": ({"5.weight": GOOD}, {"5.weight": EYE, "5.bias": torch.ones(5) / 0}, ValueError, ["5.bias", "(5,)", "inf"]),
    "weight too large for the type": (
        {"5.weight": GOOD},
        {"5.weight": EYE.double() * 1e300},
        ValueError,
        ["5.weight", "(5, 6)", "float32"],
    ),
    "weight no tensor": ({"5.weight": GOOD}, {"5.weight": [[1.0]]}, TypeError, ["5.weight", "list", "ensor"]),
    "weight None": ({"5.weight": GOOD}, {"5.weight": None}, TypeError, ["5.weight", "NoneType", "ensor"]),
    "weights a list": ({"5.weight": GOOD}, ["5.weight"], TypeError, ["weights", "list"]),
    "weight complex": ({"5.weight": GOOD}, {"5.weight": EYE * 1j}, TypeError, ["5.weight", "(5, 6)", "complex64"]),
    "weight sparse": ({"5.weight": GOOD}, {"5.weight": EYE.to_sparse()}, TypeError, ["5.weight", "(5, 6)", "sparse"]),
    "weight on meta": ({"5.weight": GOOD}, {"5.weight": EYE.to("meta")}, (TypeError, ValueError), ["5.weight", "(5, 6)", "meta"]),
}


def test_weights_without_masks_leave_the_masks_as_they_are() -> None:
    masks = {"5.weight": GOOD}
    model = bp.apply_masks(Plain(), masks)
    bp.apply_masks(model, None, {"5.weight": torch.ones(5, 6)})
    assert bp.read_masks(model) == masks
    assert torch.equal(model.get_submodule("5").weight, bp.expand(GOOD.keep, GOOD.grid).float())


@pytest.mark.parametrize(("masks", "weights", "error", "words"), BAD.values(), ids=BAD)
def test_a_refused_call_changes_nothing(masks: Any, weights: Any, error: type[Exception], words: list[str]) -> None:
    for old in ({}, {"0.weight": (2, 2)}, {"5.weight": (2, 2)}, {"5.weight": (1,), "5.bias": (2,)}):
        model = bp.apply_masks(Plain(), {name: random_mask(SHAPES[Plain][name], block, seed=9) for name, block in old.items()})
        with untouched(model, inputs()):
            with pytest.raises(error) as caught:
                bp.apply_masks(model, masks, weights)
            assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
            if weights is None:
                with pytest.raises(error) as caught:
                    bp.masked_parameters(model, masks)
                assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kind", "first", "second"), [(Tied, "embed.weight", "head.weight"), (Shared, "1.weight", "3.weight")])
def test_two_names_of_one_tied_tensor_are_refused(kind: type[nn.Module], first: str, second: str, masked: bool) -> None:
    model, shape = kind(), SHAPES[kind][first]
    mask = random_mask(shape, (3, 2))
    if masked:
        bp.apply_masks(model, {second: mask})
    both = {first: mask, second: random_mask(shape, (3, 2), seed=1)}
    weights = {first: torch.ones(shape), second: torch.zeros(shape)}
    with untouched(model, inputs()):
        for call in (bp.apply_masks, bp.masked_parameters, lambda model, _: bp.apply_masks(model, {}, weights)):
            with pytest.raises(KeyError, match=f"{second}.*{first}.*once"):
                call(model, both)


ODD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "integer": (lambda: torch.eye(4, dtype=torch.int8), "int8"),
    "bool": (lambda: torch.eye(4, dtype=torch.bool), "bool"),
    "complex": (lambda: torch.eye(4, dtype=torch.complex64), "complex64"),
    "sparse": (lambda: torch.eye(4).to_sparse(), "sparse_coo"),
    "sparse rows": (lambda: torch.eye(4).to_sparse_csr(), "sparse_csr"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize(("weight", "given"), ODD.values(), ids=ODD)
def test_a_parameter_that_cannot_be_masked_is_refused(weight: Callable[[], Tensor], given: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(weight(), requires_grad=False)
    mask = random_mask((4, 4), (2, 2))
    bp.apply_masks(model, {"0.bias": random_mask((4,), (2,))})
    before, masks = model[0].weight.detach().clone(), bp.read_masks(model)
    for call in (bp.apply_masks, bp.masked_parameters):
        with pytest.raises(TypeError) as caught:
            call(model, {"0.weight": mask, "1.weight": mask})
        assert [word for word in ("1.weight", "(4, 4)", given, "dense floating") if word not in str(caught.value)] == []
        assert torch.equal(model[0].weight, before)
        assert bp.read_masks(model) == masks


POINTS = ["blockprune.model.apply._set_mask", "blockprune.model.apply._remove_mask", "torch.nn.utils.parametrize.register_parametrization"]
CHANGES: dict[str, tuple[type[nn.Module], Blocks, Blocks]] = {
    "plain": (Plain, {}, {"5.bias": (2,), "0.weight": (2,), "5.weight": (2, 2)}),
    "same blocks": (Plain, {"0.weight": (2, 2), "5.weight": (2, 2)}, {"5.weight": (2, 2), "0.weight": (2, 2)}),
    "other blocks": (Plain, {"5.weight": (1, 3), "0.weight": (1,)}, {"0.weight": (2,), "5.bias": (2,), "5.weight": (2, 2)}),
    "others": (Plain, {"5.bias": (2,), "4.weight": (2,), "5.weight": (1,), "1.weight": (1,)}, {"5.weight": (2, 2), "0.weight": (2,)}),
    "all off": (Plain, {"5.bias": (2,), "5.weight": (1,), "1.weight": (1,)}, {}),
    "tied": (Tied, {"head.bias": (2,), "embed.weight": (3,)}, {"embed.weight": (2, 2), "body.weight": (2,)}),
    "shared": (Shared, {"1.bias": (2,), "1.weight": (3,)}, {"4.weight": (2,), "1.weight": (2, 2)}),
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("kind", "old", "new"), CHANGES.values(), ids=CHANGES)
def test_an_exception_in_the_middle_is_undone(
    kind: type[nn.Module], old: Blocks, new: Blocks, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of every step fails once, before its work and after it."""
    before, masks = (
        {name: random_mask(SHAPES[kind][name], block, seed) for name, block in blocks.items()} for seed, blocks in ((9, old), (0, new))
    )
    name, shape = list(SHAPES[kind].items())[-1]

    def attempt(model: nn.Module, point: str, fail_at: int = -1, after: bool = False) -> int:
        """Apply; the `fail_at`-th call of the step fails. How many calls there were."""
        module, _, function = point.rpartition(".")
        step, calls = getattr(sys.modules[module], function), 0

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            now = calls == fail_at
            if now and not after:
                raise error(point)
            result = step(*args, **kwargs)
            if now:
                raise error(point)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[module], function, failing)
            bp.apply_masks(model, masks, {name: torch.ones(shape)})
        return calls

    failures = 0
    for point in POINTS:
        for fail_at in range(1, 1 + attempt(bp.apply_masks(kind(), before), point)):
            for after in (False, True):
                model = bp.apply_masks(kind(), before)
                with untouched(model, inputs()), pytest.raises(error, match=point):
                    attempt(model, point, fail_at, after)
                assert traces(bp.apply_masks(model, {})) == traces(kind())
                failures += 1
    assert failures >= 4


def test_a_weight_that_cannot_be_written_undoes_all() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = nn.Parameter(torch.zeros(1).expand(4))  # four elements in one place: torch refuses to write to them
    bp.apply_masks(model, {"1.weight": random_mask((4, 4), (2, 2))})
    with untouched(model, torch.ones(1, 4)), pytest.raises(RuntimeError):
        bp.apply_masks(model, {"0.weight": random_mask((4, 4), (2, 2))}, {"0.weight": torch.ones(4, 4), "1.bias": torch.arange(4.0)})


# weights= -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_given", [torch.Tensor.detach, lambda w: torch.from_numpy(w.detach().numpy()), lambda w: w.data.mT.mT])
def test_weights_that_share_the_memory_of_others_are_written_as_they_were(as_given: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, second = (layer.weight.detach().clone() for layer in model)
    bp.apply_masks(model, {}, {"0.weight": as_given(model[1].weight), "1.weight": as_given(model[0].weight)})
    assert torch.equal(model[0].weight, second)
    assert torch.equal(model[1].weight, first)


@pytest.mark.parametrize("start", [{}, {"5.weight": (2, 2)}, {"5.weight": (1,)}], ids=["plain", "masked alike", "masked otherwise"])
@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_weights_are_written_under_the_mask_into_the_same_parameters(dtype: torch.dtype, start: dict[str, tuple[int, ...]]) -> None:
    model = Plain().to(dtype)
    bp.apply_masks(model, {name: random_mask((5, 6), block, seed=9) for name, block in start.items()})
    ids = {name: id(refs[0].stored) for name, refs in parameter_refs(model).items()}
    new = {"5.bias": torch.arange(5.0), "4.weight": torch.ones(6, 16, dtype=torch.float64), "5.weight": torch.full((5, 6), 2.0)}
    bp.apply_masks(model, {"5.weight": GOOD}, {name: value.clone().requires_grad_() for name, value in new.items()})
    assert bp.read_masks(model) == {"5.weight": GOOD}
    for name, refs in parameter_refs(model).items():
        assert id(refs[0].stored) == ids[name]
        assert refs[0].stored.requires_grad == (name != "4.weight")
        assert refs[0].stored.is_leaf
        if name in new:
            assert torch.equal(refs[0].stored, new[name].to(dtype)), name
    assert torch.equal(model[5].weight, reference.expand(GOOD.keep, GOOD.grid).to(dtype) * 2)


def test_weights_alone_need_no_masks_and_are_copied() -> None:
    model, weight = Plain(), torch.ones(5, 6)
    bp.apply_masks(model, {}, {"5.weight": weight})
    weight.fill_(2)
    assert torch.equal(model[5].weight, torch.ones(5, 6))


def test_weights_may_be_views_of_the_model_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    a, b = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    bp.apply_masks(model, {}, {"0.weight": model[1].weight, "1.weight": model[0].weight})
    assert torch.equal(model[0].weight, b)
    assert torch.equal(model[1].weight, a)


@pytest.mark.parametrize(("kind", "names"), [(Tied, ["embed.weight", "head.weight"]), (Shared, ["1.weight", "3.weight"])])
def test_a_tied_weight_is_written_by_either_name(kind: type[nn.Module], names: list[str]) -> None:
    ones = torch.ones(SHAPES[kind][names[0]])
    for name in names:
        model = bp.apply_masks(kind(), {names[0]: random_mask(tuple(ones.shape), (3, 2))}, {name: ones})
        assert all(torch.equal(ref.stored, ones) for ref in parameter_refs(model)[names[0]])


@pytest.mark.parametrize("change", ["masks", "masks and weights", "weights", "optimizer"])
def test_an_update_of_masks_looks_for_the_parameters_once(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = bp.recipes.magnitude(bp.linears((2, 2)))(model, 0.5).masks
    bp.apply_masks(model, masks)
    weights, calls = bp.zero_new_blocks(model, masks), []
    for module in (apply_module, optimizer_state, parameters):
        monkeypatch.setattr(module, "parameter_refs", lambda model: calls.append(model) or parameter_refs(model))
    if change == "optimizer":
        bp.reset_state(optimizer, model, masks, masks)
    else:
        bp.apply_masks(model, masks if "masks" in change else None, weights if "weights" in change else None)
    assert len(calls) == 1


def test_a_compiled_layer_has_the_same_names_with_and_without_a_mask() -> None:
    layer = nn.Linear(4, 4)
    compiled = torch.compile(layer, backend="aot_eager")
    mask = bp.BlockMask(torch.eye(2).bool(), bp.BlockGrid((4, 4), (2, 2)))
    for _ in range(2):
        bp.apply_masks(compiled, {"_orig_mod.weight": mask})
        assert bp.read_masks(compiled) == {"_orig_mod.weight": mask}
        assert list(parameter_refs(compiled)) == ["_orig_mod.weight", "_orig_mod.bias"]
    assert bp.read_masks(layer) == {"weight": mask}
    assert not bp.read_masks(bp.apply_masks(compiled, {}))


def test_a_child_may_be_named_as_torch_names_parametrizations() -> None:
    layer = nn.Linear(4, 4)
    layer.parametrizations = nn.Linear(4, 4)
    masks = bp.recipes.magnitude(bp.linears((2, 2)))(layer, 0.5).masks
    assert masks.keys() == {"weight", "parametrizations.weight"}


def test_a_lazy_layer_is_named_with_the_remedy() -> None:
    mask = bp.BlockMask(torch.ones(2, 2).bool(), bp.BlockGrid((4, 4), (2, 2)))
    with pytest.raises(ValueError, match=r"0\.weight: this weight of a lazy layer has no shape yet; run the model on one batch first"):
        bp.apply_masks(nn.Sequential(nn.LazyLinear(4)), {"0.weight": mask})


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning")
def test_a_scripted_module_is_refused_by_name() -> None:
    mask = bp.BlockMask(torch.ones(2, 2).bool(), bp.BlockGrid((4, 4), (2, 2)))
    scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"weight: the parameter \(4, 4\) belongs to a scripted or traced module.*before torch.jit"):
        bp.apply_masks(scripted, {"weight": mask})


def test_an_expanded_parameter_takes_a_mask_but_no_new_weight() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(1, 4).expand(4, 4))
    mask = {"weight": bp.BlockMask(torch.eye(2).bool(), bp.BlockGrid((4, 4), (2, 2)))}
    with pytest.raises(RuntimeError, match=r"weight: the parameter \(4, 4\) is expanded.*nn.Parameter\(weight.clone\(\)\)"):
        bp.apply_masks(layer, mask, {"weight": torch.ones(4, 4)})
    assert not bp.read_masks(layer)
    assert bp.finalize(bp.apply_masks(layer, mask)).weight.sum() == 8


def test_a_mask_without_values_is_refused() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"weight: the parameter \(2, 4\) has a mask on the meta device, which has no values"):
        bp.apply_masks(model, {"weight": bp.BlockMask(torch.ones(1, 2, dtype=torch.bool, device="meta"), bp.BlockGrid((2, 4), (2, 2)))})
    assert type(model) is nn.Linear


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (bp.apply_masks, KeyError),
        (lambda model, masks: bp.apply_masks(model, None, {"1.weight": torch.ones(8, 8)}), KeyError),
        (bp.masked_parameters, KeyError),
        (lambda model, masks: bp.recipes.magnitude(bp.linears((4, 4)))(model, 0.5), ValueError),
        (lambda model, masks: bp.recipes.magnitude(bp.named("1.weight", (4, 4)))(model, 0.5), ValueError),
    ],
)
def test_the_weight_of_an_exported_layer_is_refused_with_what_changes_it(call: Any, error: type[Exception], trainable: bool) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8, bias=False))
    masks = bp.recipes.magnitude(bp.linears((4, 4)))(model, 0.5).masks
    exported = export.block_sparse(bp.apply_masks(model, masks), backend="torch", trainable=trainable)
    with pytest.raises(error, match=r"exported layers \('1'\) have no .*export.update\(model, masks\).*export.dense\(model\)"):
        call(exported, masks)
