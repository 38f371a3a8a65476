"""Masked modules are copied like plain ones, also inside wrappers."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import blockprune as bp

MASK = bp.BlockMask(torch.tensor([[True, False], [True, True]]), bp.BlockGrid((8, 8), (4, 4)))


class Wrapper(nn.Module):
    """Passes on the attributes that it lacks, as the wrappers of PEFT do, and adds a number."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.added = inner, nn.Parameter(torch.ones(1))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.added  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [copy.deepcopy, bp.finalize], ids=["deepcopy", "finalize"])
def test_a_wrapper_around_a_masked_module_is_copied_with_it(make: Any) -> None:
    model, x = nn.Sequential(Wrapper(nn.Linear(8, 8)), nn.ReLU()), torch.randn(4, 8)
    bp.apply_masks(model, {"0.inner.weight": MASK})
    copied = make(model)
    assert type(copied[0]) is Wrapper
    assert torch.equal(copied(x), model(x))
    assert sorted(p.shape for p in copied.parameters()) == sorted(p.shape for p in model.parameters())


def test_a_compiled_masked_module_is_copied_and_exported() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    bp.apply_masks(model, {"0._orig_mod.weight": MASK})
    finalized = bp.finalize(model)
    assert list(finalized.state_dict()) == ["0._orig_mod.weight", "0._orig_mod.bias"]
    x = torch.randn(4, 8)
    assert torch.equal(finalized(x), model(x))
    exported = bp.export.block_sparse(model, backend="torch")
    torch.testing.assert_close(exported(x), model(x))


def test_a_copy_has_a_class_and_a_mask_of_its_own() -> None:
    layer = bp.apply_masks(nn.LSTM(8, 2), {"weight_ih_l0": bp.BlockMask(MASK.keep, MASK.grid)})
    copied, x = copy.deepcopy(layer), torch.randn(3, 8)
    assert type(copied) is not type(layer)
    bp.apply_masks(copied, {})
    assert bp.read_masks(layer) == {"weight_ih_l0": MASK}
    assert not torch.equal(copied(x)[0], layer(x)[0])


def test_a_masked_module_cannot_be_pickled_or_copied_shallowly_and_says_what_to_do() -> None:
    layer = bp.apply_masks(nn.Linear(8, 8), {"weight": MASK})
    with pytest.raises(RuntimeError, match=r"a masked module cannot be pickled; save model.state_dict\(\), or call bp.finalize"):
        pickle.dumps(layer)
    with pytest.raises(RuntimeError, match=r"a shallow copy of a masked module .*; use copy.deepcopy\(model\)"):
        copy.copy(layer)
    assert bp.read_masks(layer) == {"weight": MASK}


GIVEN: dict[str, Any] = {
    "tensors": lambda layer: {name: x.detach().clone() for name, x in layer.named_parameters()},
    "parameters": lambda layer: dict(layer.named_parameters()),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_functional_call_with_plain_names_changes_nothing_and_names_the_stored_ones(given: Any) -> None:
    layer, other = nn.Linear(8, 8), nn.Linear(8, 8)
    bp.apply_masks(layer, {"weight": MASK})
    before = {name: (x, x.detach().clone()) for name, x in layer.named_parameters()}
    given, x = dict(reversed(given(other).items())), torch.ones(1, 8)
    copies = {name: x.detach().clone() for name, x in given.items()}
    with pytest.raises(RuntimeError, match=r"functional_call cannot replace weight \(8, 8\) .*'parametrizations.weight.original'"):
        functional_call(layer, given, (x,))
    assert all(now is before[name][0] and torch.equal(now, before[name][1]) for name, now in layer.named_parameters())
    assert all(torch.equal(x, copies[name]) for name, x in given.items())
    stored = {name.replace("weight", "parametrizations.weight.original"): x for name, x in given.items()}
    assert torch.equal(functional_call(layer, stored, (x,)), bp.apply_masks(other, {"weight": MASK})(x))


def tied(*masks: bp.BlockMask) -> Any:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    return bp.apply_masks(model, {f"{index}.weight": mask for index, mask in enumerate(masks)})


def test_a_masked_weight_assigned_to_its_own_module_keeps_the_stored_values() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    dense = model[0].weight.detach().clone()
    bp.apply_masks(model, {"0.weight": MASK})
    model[0].weight = model[0].weight
    model[1].weight = model[0].weight  # as tie_weights does
    with torch.no_grad():
        model[0].weight *= 2
    bp.apply_masks(model, {})
    kept = bp.expand(MASK.keep, MASK.grid)
    assert torch.equal(model[0].weight, torch.where(kept, 2 * dense, dense))
    assert model[0].weight is model[1].weight


def test_a_masked_weight_assigned_to_another_module_ties_equal_masks() -> None:
    model = tied(MASK, MASK)
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert torch.equal(model[0].weight, model[1].weight)
    assert len(list(model.parameters())) == 3


@pytest.mark.parametrize("detach", [False, True])
def test_a_masked_weight_with_another_mask_or_detached_is_refused(detach: bool) -> None:
    model = tied(MASK, MASK if detach else bp.BlockMask(~MASK.keep, MASK.grid))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"weight \(8, 8\) .* is masked and cannot become .*; tie the weights before bp.apply_masks"
    ) as error:
        model[1].weight = model[0].weight.detach() if detach else model[0].weight
    assert f"because it {'is detached' if detach else 'has another mask'};" in str(error.value)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_a_masked_weight_that_other_operations_compute_is_refused() -> None:
    plain, normed = (bp.apply_masks(make(nn.Linear(8, 8)), {"weight": MASK}) for make in (lambda x: x, parametrizations.weight_norm))
    for layer, other in ((plain, normed), (normed, plain)):
        with pytest.raises(ValueError, match=r"cannot become .* because other operations compute one of the two weights; tie"):
            layer.weight = other.weight


class OwnCopy(nn.Linear):
    """Has a lock, which cannot be copied, and a table, which its copies share."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.lock, self.table = threading.Lock(), [1]

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnCopy":
        new = OwnCopy()
        new.load_state_dict(self.state_dict())
        new.table = self.table
        return new


class OwnState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.lock, self.table = threading.Lock(), [1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.lock = threading.Lock()


class Single(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> "Single":
        return self


@pytest.mark.parametrize("kind", [OwnCopy, OwnState])
def test_a_modules_own_way_of_copying_is_used(kind: type[OwnCopy | OwnState]) -> None:
    model, x = nn.Sequential(kind(), nn.ReLU()), torch.randn(3, 8)
    bp.apply_masks(model, {"0.weight": MASK})
    order = [name for name, _ in model.named_parameters()]
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    assert bp.read_masks(copied) == bp.read_masks(model) == {"0.weight": MASK}
    assert [name for name, _ in copied.named_parameters()] == order
    assert copied[0].lock is not model[0].lock
    assert (copied[0].table is model[0].table) == (kind is OwnCopy)
    bp.apply_masks(copied, {})
    assert type(copied[0]) is kind
    assert bp.read_masks(model) == {"0.weight": MASK}
    assert type(bp.finalize(model)[0]) is kind


def test_a_module_that_is_never_copied_stays_the_same() -> None:
    model = bp.apply_masks(nn.Sequential(Single(8, 8)), {"0.weight": MASK})
    assert copy.deepcopy(model)[0] is model[0]
    assert bp.read_masks(model) == {"0.weight": MASK}


def test_a_modules_own_way_of_copying_cannot_copy_another_parametrization() -> None:
    model = bp.apply_masks(nn.Sequential(parametrizations.weight_norm(OwnCopy())), {"0.weight": MASK})
    with pytest.raises(RuntimeError, match=r"weight: the __deepcopy__ of ParametrizedOwnCopy .* another parametrization; remove"):
        copy.deepcopy(model)


class Scaled(nn.Linear):
    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        state[prefix + "weight"] = state[prefix + "weight"] * 2
        super()._load_from_state_dict(state, prefix, *args)


class Renamed(nn.Linear):
    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        _rename(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *args)


def _scale(_: nn.Module, state: Any, prefix: str, *args: Any) -> None:
    state[prefix + "weight"] = state[prefix + "weight"] * 2


def _rename(_: nn.Module, state: Any, prefix: str, *args: Any) -> None:
    if f"{prefix}kernel" in state:
        state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")


def hooked(hook: Any) -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.register_load_state_dict_pre_hook(hook)
    return layer


LAYERS = {
    "plain": lambda: nn.Linear(8, 8),
    "a method scales": lambda: Scaled(8, 8),
    "a method renames": lambda: Renamed(8, 8),
    "a hook scales": lambda: hooked(_scale),
    "a hook renames": lambda: hooked(_rename),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["plain", "masked", "masked Hugging Face", "kernel"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_masked_layer_loads_what_the_plain_layer_loads(name: str, kind: str, strict: bool) -> None:
    """Hooks and methods of the class see the weight under its plain name, in a checkpoint of a plain and of a masked model."""
    plain, values = nn.Sequential(LAYERS[name]()), {"0.weight": torch.randn(8, 8), "0.bias": torch.randn(8)}
    if kind == "kernel":
        values["0.kernel"] = values.pop("0.weight")
    if kind == "kernel" and "renames" not in name and (strict or "scales" in name):
        pytest.skip("the plain layer cannot load it either")
    model, state = bp.apply_masks(copy.deepcopy(plain), {"0.weight": MASK}), dict(values)
    if kind.startswith("masked"):
        saved = bp.apply_masks(nn.Sequential(nn.Linear(8, 8)), {"0.weight": MASK}, values)
        state = dict(saved.state_dict())
        if kind == "masked Hugging Face":
            state["0.weight"] = saved[0].weight.detach().clone()
    plain.load_state_dict(dict(values), strict=strict)
    outcome = model.load_state_dict(state, strict=strict)
    assert not outcome.unexpected_keys or kind == "kernel"
    assert torch.equal(model[0].parametrizations.weight.original, plain[0].weight)
    assert torch.equal(model[0].bias, plain[0].bias)
    assert bp.read_masks(model) == {"0.weight": MASK}
