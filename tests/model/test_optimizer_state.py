"""`reset_state` and `zero_new_blocks`: what the optimizer and the storage remember of blocks that come or go."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from strategies import grids, seeds
from torch import Tensor, nn

import blockprune as bp

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.03),
    "adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5),
}
INITIAL = {"step_size": 0.03, "sum": 0.5}  # the states that do not begin at 0
each = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
GRID = bp.BlockGrid((4, 6), (2, 3))
BEFORE = {"0.weight": bp.BlockMask(torch.tensor([[True, False], [True, True]]), GRID)}
AFTER = {"0.weight": bp.BlockMask(torch.tensor([[True, True], [False, True]]), GRID)}


def trained(make: Any, masks: bp.Masks) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = bp.apply_masks(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), masks, straight_through=True)
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def tensors(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    held = list(optimizer.state.values())
    return {(i, key): value.clone() for i, state in enumerate(held) for key, value in state.items() if isinstance(value, Tensor)}


@each
def test_exactly_the_blocks_that_come_or_go_are_forgotten(make: Any) -> None:
    model, optimizer = trained(make, BEFORE)
    before = tensors(optimizer)
    assert bp.reset_state(optimizer, model, BEFORE, AFTER) is optimizer
    changed = bp.expand(BEFORE["0.weight"].keep ^ AFTER["0.weight"].keep, GRID)
    position = [id(p) for p in optimizer.state].index(id(model[0].parametrizations.weight.original))
    for key, after in tensors(optimizer).items():
        expected = before[key].clone()
        if key[0] == position and expected.ndim:
            assert expected[changed].any()
            expected[changed] = INITIAL.get(key[1], 0.0)
        assert torch.equal(after, expected), key


@each
def test_equal_masks_and_optimizers_without_a_step_change_nothing(make: Any) -> None:
    model, optimizer = trained(make, BEFORE)
    before = tensors(optimizer)
    bp.reset_state(optimizer, model, BEFORE, BEFORE)
    bp.reset_state(optimizer, model, {}, {})
    assert all(torch.equal(value, before[key]) for key, value in tensors(optimizer).items())
    fresh = make(model.parameters())
    before = tensors(fresh)  # Adagrad has sums before the first step
    bp.reset_state(fresh, model, BEFORE, AFTER)
    assert all(torch.equal(value, before[key]) for key, value in tensors(fresh).items())


def test_a_new_block_learns_with_rprop_as_a_new_parameter_does() -> None:
    model, optimizer = trained(OPTIMIZERS["rprop"], BEFORE)
    optimizer.param_groups[0]["lr"] = 0.07  # as a schedule does
    bp.reset_state(optimizer, model, BEFORE, AFTER)
    bp.apply_masks(model, AFTER)
    stored = model[0].parametrizations.weight.original
    before = stored.detach().clone()
    optimizer.zero_grad()
    model(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    is_new = bp.expand(~BEFORE["0.weight"].keep & AFTER["0.weight"].keep, GRID)
    torch.testing.assert_close((stored - before)[is_new].abs(), torch.full((int(is_new.sum()),), 0.07))


def test_a_parameter_without_a_mask_was_or_is_kept_whole() -> None:
    for masks in ((BEFORE, {}), ({}, BEFORE)):
        model, optimizer = trained(OPTIMIZERS["momentum"], BEFORE)
        bp.reset_state(optimizer, model, *masks)
        state = optimizer.state[model[0].parametrizations.weight.original]["momentum_buffer"]
        assert torch.equal(state != 0, bp.expand(BEFORE["0.weight"].keep, GRID))


def test_tied_parameters_have_one_state_under_any_of_their_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    half = bp.BlockMask(torch.tensor([[True], [False]]), bp.BlockGrid((4, 4), (2, 4)))
    bp.reset_state(optimizer, model, {"0.weight": half}, {"1.weight": bp.BlockMask(~half.keep, half.grid)})
    assert not optimizer.state[model[0].weight]["momentum_buffer"].any()


def test_several_optimizers_share_the_parameters() -> None:
    model = bp.apply_masks(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), BEFORE, straight_through=True)
    optimizers = bp.muon(model.parameters())
    model(torch.ones(5, 6)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert bp.reset_state(optimizers, model, BEFORE, AFTER) is optimizers
    changed = bp.expand(BEFORE["0.weight"].keep ^ AFTER["0.weight"].keep, GRID)
    momentum = optimizers[0].state[model[0].parametrizations.weight.original]["momentum_buffer"]
    assert torch.equal(momentum == 0, changed)
    with pytest.raises(ValueError, match=r"optimizer is empty, which has none of the masked parameters"):
        bp.reset_state([], model, BEFORE, AFTER)


def test_an_optimizer_that_does_not_fit_is_an_error_and_stays_as_it_is() -> None:
    model, optimizer = trained(OPTIMIZERS["adam"], BEFORE)
    other = torch.optim.Adam(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"optimizer is Adam, which has none of the masked parameters, such as '0\.weight'"):
        bp.reset_state(other, model, BEFORE, AFTER)
    before = tensors(optimizer)
    with pytest.raises(ValueError, match=r"0\.weight has different blocks in before and after"):
        bp.reset_state(optimizer, model, BEFORE, {"0.weight": bp.BlockMask(torch.ones(4, 6).bool(), bp.BlockGrid((4, 6), (1, 1)))})
    with pytest.raises(KeyError, match=r"masks names '5\.weight'"):
        bp.reset_state(optimizer, model, BEFORE, {"5.weight": AFTER["0.weight"]})
    assert all(torch.equal(value, before[key]) for key, value in tensors(optimizer).items())
    model, optimizer = trained(torch.optim.Adafactor, BEFORE)
    with pytest.raises(ValueError, match=r"0.weight \(4, 6\): Adafactor holds 'row_var' of shape"):
        bp.reset_state(optimizer, model, BEFORE, AFTER)


@given(grids(rank=(2, 2)), seeds)
@settings(max_examples=40)
def test_new_blocks_begin_at_zero_and_all_others_keep_their_stored_values(grid: bp.BlockGrid, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, after = ({"weight": bp.BlockMask(torch.rand(grid.size, generator=generator) < 0.5, grid)} for _ in range(2))
    model = bp.apply_masks(nn.Linear(grid.shape[1], grid.shape[0]), before)
    dense = model.parametrizations.weight.original.detach().clone()
    weights = bp.zero_new_blocks(model, after)
    assert torch.equal(model.parametrizations.weight.original, dense)
    is_new = bp.expand(after["weight"].keep & ~before["weight"].keep, grid)
    assert torch.equal(weights["weight"], torch.where(is_new, 0, dense))
    bp.apply_masks(model, after, weights)
    assert not model.weight[is_new].any()


def test_zero_new_blocks_needs_masks_of_the_same_blocks() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"0.weight \(4, 6\): this parameter has no mask"):
        bp.zero_new_blocks(model, AFTER)
    bp.apply_masks(model, BEFORE)
    with pytest.raises(ValueError, match=r"0\.weight: the masks have BlockGrid"):
        bp.zero_new_blocks(model, {"0.weight": bp.BlockMask(torch.ones(4, 6).bool(), bp.BlockGrid((4, 6), (1, 1)))})


def test_a_state_that_belongs_to_no_single_weight_is_an_error() -> None:
    """LBFGS has lists under its first parameter, which may be another than the masked one."""
    model = bp.apply_masks(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), {"1.weight": BEFORE["0.weight"]})
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(3, 6)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(
        ValueError, match=r"optimizer: the state '\w+' of LBFGS is not one number for each weight; use an optimizer such as"
    ):
        bp.reset_state(optimizer, model, {"1.weight": BEFORE["0.weight"]}, {"1.weight": AFTER["0.weight"]})


@pytest.mark.parametrize("dim", [0, None])
def test_a_weight_that_is_computed_from_several_tensors_is_an_error(dim: int | None) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4), dim=dim))
    bp.apply_masks(model, BEFORE)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    before = tensors(optimizer)
    with pytest.raises(ValueError, match=r"0\.weight \(4, 6\): the parametrization WeightNorm computes this weight from 2 tensors"):
        bp.reset_state(optimizer, model, BEFORE, AFTER)
    assert all(torch.equal(value, before[key]) for key, value in tensors(optimizer).items())


def test_masks_of_another_type_are_named() -> None:
    model, optimizer = trained(OPTIMIZERS["adam"], BEFORE)
    with pytest.raises(TypeError, match=r"before\['0\.weight'\] is a int"):
        bp.reset_state(optimizer, model, {"0.weight": 3}, AFTER)  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_in_blocks_that_stay_pruned_becomes_zero(value: float) -> None:
    model = bp.apply_masks(nn.Sequential(nn.Linear(6, 4)), {"0.weight": bp.BlockMask(torch.zeros(2, 2).bool(), GRID)})
    original = model[0].parametrizations.weight.original
    with torch.no_grad():
        original.fill_(value)
        original[3, 5] = 5.0  # it stays
    after = {"0.weight": bp.BlockMask(torch.tensor([[True, False], [False, False]]), GRID)}
    bp.apply_masks(model, after, bp.zero_new_blocks(model, after))
    assert original[3, 5] == 5
    assert original.count_nonzero() == 1
    with torch.no_grad():
        original[0, 0] = value  # in a kept block it is the user's to see
    with pytest.raises(ValueError, match="NaN or inf"):
        bp.apply_masks(model, after, bp.zero_new_blocks(model, after))


@pytest.mark.parametrize("optimizer", ["adam", ["adam"], 3, nn.Linear(1, 1)])
def test_what_is_no_optimizer_is_refused(optimizer: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer has the type (str|int|Linear); give a torch.optim.Optimizer, or a list of them"):
        bp.reset_state(optimizer, nn.Sequential(nn.Linear(6, 4)), {}, {})
