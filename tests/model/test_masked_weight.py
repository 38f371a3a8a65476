"""Changes in place of a masked weight reach the stored weight, or raise."""

import contextlib
import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import blockprune as bp
from blockprune.model.masked_weight import _FOLLOWED, MaskedWeight

GRID = bp.BlockGrid((6, 4), (3, 2))
masks = st.lists(st.booleans(), min_size=4, max_size=4).map(lambda keep: bp.BlockMask(torch.tensor(keep).view(2, 2), GRID))


def pair(mask: bp.BlockMask) -> tuple[nn.Linear, nn.Linear]:
    """A plain layer with zeros in the pruned blocks, and a masked layer that reads the same and has other values behind the zeros."""
    torch.manual_seed(0)
    plain = nn.Linear(4, 6)
    masked = bp.apply_masks(copy.deepcopy(plain), {"weight": mask})
    with torch.no_grad():
        plain.weight.copy_(masked.weight)
    return plain, masked


def keep(mask: bp.BlockMask) -> Tensor:
    return bp.expand(mask.keep, mask.grid)


def stored(layer: nn.Module) -> Tensor:
    return dict(layer.named_parameters())["parametrizations.weight.original"].detach().clone()


def add_data(layer: nn.Linear) -> None:
    layer.weight.data += 1


def assign_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 3


def fill_item(layer: nn.Linear) -> None:
    layer.weight.data[1] = 5.0


def write_through_view(layer: nn.Linear) -> None:
    layer.weight.view(-1)[2:7].mul_(-2)


def write_through_transpose(layer: nn.Linear) -> None:
    layer.weight.t().add_(1)


def write_through_kept_view(layer: nn.Linear) -> None:
    view = layer.weight[2]
    view.fill_(3)
    layer(torch.ones(1, 4))


def keep_reference(layer: nn.Linear) -> None:
    weight = layer.weight
    weight.mul_(2)
    weight.data.mul_(3)
    weight.detach().div_(4)
    weight *= 1.5
    weight.data[1] *= 2
    weight.add_(1)


def orthogonal(layer: nn.Linear) -> None:
    torch.manual_seed(1)
    nn.init.orthogonal_(layer.weight)


def kaiming(layer: nn.Linear) -> None:
    torch.manual_seed(1)
    layer.reset_parameters()


def trunc_normal(layer: nn.Linear) -> None:
    nn.init.trunc_normal_(layer.weight, generator=torch.Generator().manual_seed(1))


def sparse(layer: nn.Linear) -> None:
    torch.manual_seed(1)
    nn.init.sparse_(layer.weight, 0.5)


CHANGES: list[Callable[[nn.Linear], object]] = [
    lambda layer: layer.weight.mul_(2),
    lambda layer: layer.weight.data.mul_(2),
    lambda layer: layer.weight.data.detach().clamp_(-0.1, 0.1),
    lambda layer: layer.weight.copy_(torch.arange(24.0).view(6, 4)),
    lambda layer: torch.add(layer.weight, 1, out=layer.weight.data),
    lambda layer: torch._foreach_mul_([layer.weight], 2),
    lambda layer: nn.init.eye_(layer.weight),
    lambda layer: nn.init.zeros_(layer.weight),
    lambda layer: layer.weight.masked_fill_(layer.weight > 0, 7),
    lambda layer: layer.weight.index_copy_(0, torch.tensor([1]), torch.ones(1, 4)),
    lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(6, 4))),
    *(add_data, assign_data, fill_item, write_through_view, write_through_transpose, write_through_kept_view, keep_reference, orthogonal),
    *(kaiming, sparse, trunc_normal),
]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
@given(mask=masks)
def test_a_masked_weight_changes_as_a_plain_weight_does(change: Callable[[nn.Linear], object], mask: bp.BlockMask) -> None:
    plain, masked = pair(mask)
    before = stored(masked)
    with torch.no_grad():
        change(plain)
        change(masked)
    expected = plain.weight.detach()
    assert torch.equal(masked.weight, torch.where(keep(mask), expected, 0))
    if change is not sparse:  # which writes zeros over other new values
        # behind the mask: what was written, unless that is the zero that was read
        assert torch.equal(stored(masked), torch.where(keep(mask) | (expected != 0), expected, before))


MASK = bp.BlockMask(torch.tensor([[True, False], [False, True]]), GRID)


def test_reads_differ_from_plain_tensors_in_writing_only() -> None:
    _, layer = pair(MASK)
    weight = layer.weight
    assert type(weight) is MaskedWeight
    assert {type(x) for x in (weight * 2, weight[0], weight.clone(), weight.t(), nn.functional.linear(torch.ones(1, 4), weight))} == {
        Tensor
    }
    assert weight.data_ptr() == weight.data.data_ptr() == weight.detach().data_ptr()
    weight.sum().backward()
    assert torch.equal(layer.parametrizations.weight.original.grad, keep(MASK).float())  # type: ignore[union-attr]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_is_a_plain_tensor(copied: Callable[[Tensor], Tensor]) -> None:
    _, layer = pair(MASK)
    weight = copied(layer.weight.detach())
    assert type(weight) is Tensor
    before = stored(layer)
    weight.mul_(2)
    assert torch.equal(stored(layer), before)


@pytest.mark.parametrize(
    "values", [lambda layer: layer.weight, lambda layer: layer.weight.data, lambda layer: layer.weight.detach().clone()]
)
def test_a_parameter_made_of_a_masked_weight_is_a_plain_parameter(values: Callable[[nn.Linear], Tensor]) -> None:
    _, layer = pair(MASK)
    before, parameter = stored(layer), nn.Parameter(values(layer))
    assert type(parameter) is nn.Parameter
    assert parameter.is_leaf
    with torch.no_grad():
        parameter.mul_(2)
    del parameter
    assert torch.equal(stored(layer), before)


def test_changing_it_where_gradients_are_recorded_raises_as_for_a_parameter() -> None:
    _, layer = pair(MASK)
    before = stored(layer)
    with pytest.raises(RuntimeError, match=r"masked weight \(6, 4\) that requires gradients .* mul_.*no_grad"):
        layer.weight.mul_(2)
    assert torch.equal(stored(layer), before)
    layer.requires_grad_(False)
    layer.weight.mul_(2)
    assert torch.equal(stored(layer)[0, :2], 2 * before[0, :2])


def test_a_stale_weight_cannot_be_changed() -> None:
    _, layer = pair(MASK)
    with torch.no_grad():
        weight, view = layer.weight, layer.weight.data[0]
        layer.weight.mul_(2)
        before = stored(layer)
        with pytest.raises(RuntimeError, match=r"stored values or its mask have changed since it was read; read it again"):
            weight.mul_(2)
        view.mul_(2)
        with pytest.warns(RuntimeWarning, match="would be lost"):
            del view
        assert torch.equal(stored(layer), before)


def test_a_weight_that_another_parametrization_computes_cannot_be_changed() -> None:
    layer = bp.apply_masks(parametrizations.weight_norm(nn.Linear(4, 6)), {"weight": MASK})
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"change .* would be lost, because other operations compute the weight"):
        nn.init.zeros_(layer.weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.apply_(lambda v: 2 * v + 1),
        lambda w: w.map_(torch.ones(6, 4), lambda v, one: 2 * v + one),
        lambda w: w.map2_(torch.ones(6, 4), torch.ones(6, 4), lambda v, one, other: 2 * v + one * other),
    ],
    ids=["apply_", "map_", "map2_"],
)
@pytest.mark.parametrize("inference", [False, True])
def test_methods_whose_writes_torch_does_not_count_reach_the_stored_weight(change: Callable[[Tensor], object], inference: bool) -> None:
    plain, masked = pair(bp.BlockMask(torch.tensor([[True, False], [True, True]]), GRID))
    with torch.inference_mode(inference), torch.no_grad():
        for weight in (plain.weight, masked.weight):
            change(weight.detach())
    kept = keep(bp.read_masks(masked)["weight"])
    assert torch.equal(masked.weight[kept], plain.weight[kept])


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.set_(torch.ones(6, 4)),
        lambda w: w.resize_(2, 2),
        lambda w: w.t_(),
        lambda w: torch.utils.swap_tensors(w, nn.Parameter(torch.ones(6, 4))),
        lambda w: torch.utils.swap_tensors(nn.Parameter(torch.ones(6, 4)), w),
    ],
    ids=["set_", "resize_", "t_", "swapped", "swapped with"],
)
def test_other_memory_or_another_shape_raises(change: Callable[[Tensor], object]) -> None:
    _, masked = pair(bp.BlockMask(torch.tensor([[True, False], [True, True]]), GRID))
    before = masked.weight.detach().clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"masked weight \(6, 4\)"):
        change(masked.weight)
    assert torch.equal(masked.weight, before)


def test_arrays_of_it_are_read_only() -> None:
    _, layer = pair(MASK)
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.detach().numpy()[0] = 1
    assert layer.weight.detach().clone().numpy().flags.writeable


def test_changes_in_inference_mode() -> None:
    _, layer = pair(MASK)
    with torch.inference_mode():
        layer.weight.mul_(2)
        before = layer.weight.clone()
        layer.weight.data.mul_(2)
    assert torch.equal(layer.weight, 2 * before)


@pytest.mark.parametrize("value", [torch.ones(2, 4), torch.ones(6, 4).char()])
def test_a_parameter_of_another_shape_or_kind_cannot_replace_it(value: Tensor) -> None:
    _, layer = pair(MASK)
    before = stored(layer)
    with pytest.raises(TypeError, match=r"weight \(6, 4\) is masked and cannot be .*finalize"):
        layer.weight = nn.Parameter(value, requires_grad=False)
    assert torch.equal(stored(layer), before)


def test_assigned_data_has_the_whole_shape_and_may_have_another_type() -> None:
    _, layer = pair(MASK)
    with pytest.raises(
        ValueError, match=r"the data of a masked weight \(6, 4\) cannot be a tensor of shape \(4,\); give the whole .*bp.finalize"
    ):
        layer.weight.data = torch.ones(4)
    layer.weight.data = layer.weight.data.bfloat16()
    assert layer.weight.dtype == stored(layer).dtype == torch.bfloat16


def test_an_optimizer_step_between_reading_and_deleting_is_no_change() -> None:
    _, layer = pair(MASK)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad()
            weight = layer.weight
            weight.square().sum().backward()
            optimizer.step()
            del weight


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*:DeprecationWarning")
def test_tracing_a_masked_model_names_finalize() -> None:
    model = nn.Sequential(pair(MASK)[1])
    with pytest.raises(RuntimeError, match=r"torch.jit.trace .* \(6, 4\).*bp.finalize\(model\)"):
        torch.jit.trace(model, torch.ones(1, 4))
    traced = torch.jit.trace(bp.finalize(model), torch.ones(1, 4))
    assert torch.equal(traced(torch.ones(1, 4)), model(torch.ones(1, 4)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning")
def test_scripting_a_masked_model_names_finalize() -> None:
    masked, x = pair(MASK)[1], torch.ones(1, 4)
    model = nn.Sequential(masked, nn.ReLU(), nn.Linear(6, 4), masked)  # a module under two names
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for scripted in (model, masked, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"torch.jit.script .* \(6, 4\).*bp.finalize\(model\)"):
            torch.jit.script(scripted)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.jit.script(bp.finalize(model))(x), model(x))


VIEWS: dict[str, Callable[[nn.Linear], Tensor]] = {
    "of data": lambda layer: layer.weight.data[0],
    "of a detached weight": lambda layer: layer.weight.detach()[0],
    "of a kept weight": lambda layer: layer.weight[0],
    "data itself": lambda layer: layer.weight.data,
}
READERS: dict[str, Callable[[nn.Linear], Tensor]] = {
    "weight": lambda layer: layer.weight,
    "forward": lambda layer: layer(torch.eye(4)).T - layer.bias[:, None],
    "finalize": lambda layer: bp.finalize(layer).weight,
    "finalize in place": lambda layer: bp.finalize(layer, inplace=True).weight,
    "deepcopy": lambda layer: copy.deepcopy(layer).weight,
    "state_dict": lambda layer: layer.state_dict()["parametrizations.weight.original"],
    "load_masked": lambda layer: bp.load_masked(nn.Linear(4, 6), layer.state_dict()).weight,
    "collect": lambda layer: bp.collect.weights(layer, where=bp.linears((3, 2)))["weight"].weight,
    "masked_parameters": lambda layer: bp.masked_parameters(
        layer, {"weight": bp.BlockMask(torch.ones(1, 1).bool(), bp.BlockGrid((6, 4), (6, 4)))}
    )["parametrizations.weight.original"],
    "other masks": lambda layer: bp.apply_masks(layer, {}).weight,
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@torch.no_grad()
def test_a_change_through_a_view_in_use_is_seen_by_all_that_reads_the_weight(
    view: Callable[[nn.Linear], Tensor], reader: Callable[[nn.Linear], Tensor]
) -> None:
    _, layer = pair(MASK)
    held = [view(layer)]
    torch._foreach_add_(held, 3.0)  # an operation on lists
    expected, kept = held[0].expand(6, 4)[0].clone(), keep(MASK)[0]
    torch.testing.assert_close(reader(layer)[0, kept], expected[kept])


@torch.no_grad()
def test_a_change_through_a_view_is_seen_by_a_tied_module() -> None:
    layers: Any = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6))
    layers[0].weight = layers[1].weight
    bp.apply_masks(layers, {"0.weight": MASK})
    row = layers[1].weight.data[0]
    row.fill_(3)
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert copy.deepcopy(layers)[0].weight[0, 0] == 3


@torch.no_grad()
def test_views_of_several_reads_are_all_followed() -> None:
    _, layer = pair(MASK)
    first, second = layer.weight.data[0], layer.weight.data[1]
    first.fill_(3)
    assert layer.weight[0, 0] == 3
    second.fill_(4)  # of the values before the first change
    with pytest.raises(RuntimeError, match="would be lost"):
        layer(torch.ones(1, 4))
    with pytest.warns(RuntimeWarning, match="would be lost"):
        del second


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@torch.no_grad()
def test_a_view_is_followed_after_other_reads(reader: Callable[[nn.Linear], Tensor]) -> None:
    _, layer = pair(MASK)
    row = layer.weight[0]
    layer(torch.ones(1, 4))
    row.fill_(3)
    assert torch.allclose(reader(layer)[0, keep(MASK)[0]], torch.tensor(3.0))


def test_a_change_that_an_optimizer_step_overtakes_raises_once() -> None:
    _, layer = pair(MASK)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 4)).sum().backward()
    view = layer.weight.data.view(-1)
    view.mul_(2)
    optimizer.step()
    before: Tensor = dict(layer.named_parameters())["parametrizations.weight.original"].detach().clone()
    with pytest.raises(RuntimeError, match=r"\(6, 4\) would be lost, .* made through a view.*it is not stored"):
        layer(torch.ones(1, 4))
    for reader in READERS.values():
        reader(copy.deepcopy(layer))
    assert torch.equal(stored(layer), before)
    view.mul_(2)
    with pytest.raises(RuntimeError, match="would be lost"):
        _ = layer.weight
    with pytest.warns(RuntimeWarning, match="would be lost"):
        del view


@pytest.mark.parametrize("load", [lambda layer, state: layer.load_state_dict(state), bp.load_masked])
@pytest.mark.parametrize("is_stale", [False, True])
def test_loading_a_state_replaces_what_was_written_through_a_view(load: Callable[[nn.Linear, Any], object], is_stale: bool) -> None:
    _, layer = pair(MASK)
    state = copy.deepcopy(layer.state_dict())
    held = [layer.weight.data.view(-1)]
    held[0].fill_(7)
    if is_stale:
        with torch.no_grad():
            dict(layer.named_parameters())["parametrizations.weight.original"].mul_(2)
    load(layer, state)
    layer(torch.ones(1, 4))
    assert all(torch.equal(x, state[name]) for name, x in layer.state_dict().items())
    with pytest.warns(RuntimeWarning, match="would be lost") if is_stale else contextlib.nullcontext():
        held.clear()
    assert all(torch.equal(x, state[name]) for name, x in layer.state_dict().items())


def test_kept_reads_are_followed_in_a_limited_number() -> None:
    _, layer = pair(MASK)
    held = []
    for _ in range(100):
        held.append(layer.weight.detach())
        with torch.no_grad():
            layer.weight.mul_(1.01)
    (followed,) = _FOLLOWED.values()
    assert len(followed) < 20
    held[-1][0].mul_(2)  # its values are still recent
    with pytest.raises(RuntimeError, match="would be lost"):
        _ = layer.weight
    with pytest.warns(RuntimeWarning, match="would be lost"):
        held.clear()
    kept = [layer.weight.data for _ in range(100)]  # all of the present values
    kept[0][0].fill_(3)
    assert layer.weight[0, 0] == 3


@torch.no_grad()
def test_data_of_data_is_other_memory_as_of_a_plain_weight() -> None:
    mask = bp.BlockMask(torch.ones(2, 2).bool(), GRID)
    plain, masked = pair(mask)
    for layer in (plain, masked):
        weight = layer.weight
        data = weight.data
        data.data = torch.ones(6, 4)
        weight.mul_(5)
        weight.data = weight.data + 1
        assert torch.equal(data, torch.ones(6, 4))
        del data
        weight.mul_(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del weight
    assert torch.equal(masked.weight, plain.weight)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), lambda: parametrizations.weight_norm(nn.Linear(4, 6))], ids=["plain", "normed"])
def test_reads_beside_others_in_inference_mode(make: Callable[[], nn.Linear]) -> None:
    layer = bp.apply_masks(make(), {"weight": MASK})
    with torch.inference_mode():
        held = layer.weight
        expected = layer(torch.ones(1, 4))
        assert torch.equal(layer.weight, held)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    assert not torch.equal(layer(torch.ones(1, 4)), expected)


@torch.no_grad()
def test_a_read_holds_no_memory_after_its_end() -> None:
    _, layer = pair(MASK)
    view = layer.weight.data[0]
    assert _FOLLOWED
    del view, layer
    assert not _FOLLOWED


@pytest.mark.parametrize("change", ["w.view(-1).mul_(2)", "torch._foreach_zero_([w])", "torch.add(w, 1, out=w)"])
def test_a_process_may_end_with_a_change_that_is_not_stored_yet(change: str) -> None:
    code = f"""
import torch, blockprune as bp
mask = bp.BlockMask(torch.eye(2).bool(), bp.BlockGrid((4, 4), (2, 2)))
layer = bp.apply_masks(torch.nn.Linear(4, 4), {{"weight": mask}})
w = layer.weight.data
{change}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def set_attribute(layer: nn.Linear, value: bool) -> None:
    layer.weight.requires_grad = value


@pytest.mark.parametrize("switch", [set_attribute, lambda layer, value: layer.weight.requires_grad_(value)])
def test_gradients_are_switched_for_the_stored_parameter(switch: Callable[[nn.Linear, bool], object]) -> None:
    _, layer = pair(MASK)
    for value in (False, True, False):
        switch(layer, value)
        assert layer.weight.requires_grad == dict(layer.named_parameters())["parametrizations.weight.original"].requires_grad == value


def test_requires_grad_is_that_of_the_stored_parameter() -> None:
    _, layer = pair(MASK)
    with torch.no_grad():
        weight = layer.weight
    assert weight.requires_grad
    assert not weight.detach().requires_grad
    weight.requires_grad_(False)
    assert not weight.requires_grad
    layer.requires_grad_(True)
    assert weight.requires_grad
    weight[0] *= 2  # it has no graph
    x = torch.ones(1, 4)
    assert not (x @ weight.T).requires_grad
    assert layer(x).requires_grad
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, keep(MASK).float())


def test_gradients_and_hooks_are_those_of_the_stored_parameter() -> None:
    _, layer = pair(MASK)
    parameter = dict(layer.named_parameters())["parametrizations.weight.original"]
    layer.weight.grad = torch.ones(6, 4)
    assert parameter.grad is layer.weight.grad is not None
    del layer.weight.grad
    assert parameter.grad is None
    calls: list[Tensor] = []
    layer.weight.register_hook(lambda gradient: 2 * gradient)
    layer.weight.register_post_accumulate_grad_hook(calls.append)
    layer.weight.sum().backward()
    assert torch.equal(parameter.grad, 2 * keep(MASK).float())
    assert calls == [parameter]
    weight = layer.weight
    weight.retain_grad()
    weight.sum().backward()
    assert torch.equal(weight.grad, torch.ones(6, 4))


def test_a_detached_weight_has_gradients_of_its_own() -> None:
    _, layer = pair(MASK)
    weight = layer.weight.detach().requires_grad_()
    weight.sum().backward()
    assert torch.equal(weight.grad, torch.ones(6, 4))  # type: ignore[arg-type]
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: set_attribute(layer, False),
        lambda layer: setattr(layer.weight, "grad", None),
        lambda layer: layer.weight.register_hook(print),
    ],
)
def test_gradients_of_a_weight_that_another_parametrization_computes_name_the_stored_ones(change: Callable[[nn.Linear], object]) -> None:
    layer = bp.apply_masks(parametrizations.weight_norm(nn.Linear(4, 6)), {"weight": MASK})
    with pytest.raises(RuntimeError, match=r"masked weight \(6, 4\) would be lost.*model.named_parameters\(\)"):
        change(layer)
