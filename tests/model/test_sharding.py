"""Layers of a model that ``fully_shard`` has sharded run with other parameters, and have their own afterwards, also after an error."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call

import blockprune as bp
from blockprune.core.sharded_tensor import is_sharded
from blockprune.model.sharding import replaced_shards

WHERE = bp.linears((2, 2))
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
PARTS = [(0, 2), (0,), ()]  # the layers that are sharded apart; the model as a whole has the others


pytestmark = pytest.mark.usefixtures("process_group")


def plain() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))


def sharded(parts: tuple[int, ...], built: Any = None) -> Any:
    built = built or plain()
    for number in parts:
        fully_shard(built[number])
    return fully_shard(built)


def state(model: nn.Module) -> dict[str, Tensor]:
    """The values of the parameters, which are shards."""
    assert all(map(is_sharded, model.parameters()))
    return bp.distributed.full_state_dict(model)


@pytest.mark.parametrize("parts", PARTS)
def test_replaced_parameters_are_those_that_a_forward_uses(parts: tuple[int, ...]) -> None:
    model, new = sharded(parts), {"0.weight": torch.ones(6, 4), "2.bias": torch.arange(4.0)}
    for _ in range(2):
        with replaced_shards(model, new) as others:
            assert torch.equal(model(X), functional_call(plain(), new, X))
            assert not others
        assert all(torch.equal(value, plain().state_dict()[name]) for name, value in state(model).items())
        model(X)  # the outermost parameters stay whole


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("wrong", [X[:, :3], None])
def test_after_an_error_the_model_is_as_it_was(parts: tuple[int, ...], wrong: Tensor | None) -> None:
    model, before = sharded(parts), plain().state_dict()
    expected = model(X).detach()

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("an error in a hook")

    handle = model[2].register_forward_pre_hook(fail) if wrong is None else None
    with pytest.raises(RuntimeError), replaced_shards(model, {"0.weight": torch.ones(6, 4)}):
        model(X if wrong is None else wrong)
    if handle:
        handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("parts", PARTS)
def test_a_recipe_of_layers_leaves_the_model_as_it_was_after_an_error(parts: tuple[int, ...]) -> None:
    model, before = sharded(parts), plain().state_dict()
    with pytest.raises(ValueError, match="NaN"):
        bp.recipes.sparsegpt(WHERE, bp.Calibration([X, X * torch.nan], progress=False))(model, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    result = bp.recipes.sparsegpt(WHERE, bp.Calibration([X], progress=False))(model, 0.5)
    expected = bp.recipes.sparsegpt(WHERE, bp.Calibration([X], progress=False))(plain(), 0.5)
    assert result.masks == expected.masks
    assert all(torch.equal(weight, expected.weights[name]) for name, weight in result.weights.items())
    bp.apply_masks(model, result.masks, result.weights)
    finalized = bp.finalize(bp.apply_masks(plain(), expected.masks, expected.weights)).state_dict()
    assert all(torch.equal(value, finalized[name]) for name, value in state(model).items())


def test_parts_that_fully_shard_has_not_sharded_are_replaced_by_functional_call() -> None:
    new = {"weight": torch.ones(6, 4)}
    with replaced_shards(plain()[0], new) as others:
        assert others == new
    whole = sharded(())
    with replaced_shards(whole[0], new) as others:  # what is around it has its parameters
        assert others == new


def test_units_of_a_sharded_model_are_not_clustered() -> None:
    calibration = bp.Calibration([X], loss=lambda output, batch: output.square().mean(), progress=False)
    with pytest.raises(ValueError, match=r"fully_shard has sharded this FSDPSequential; call it before fully_shard"):
        bp.recipes.cluster_units(sharded((0, 2)), WHERE, calibration)


def test_masks_of_the_same_blocks_may_be_given_to_functional_call() -> None:
    def masks(seed: int) -> bp.Masks:
        keep = torch.rand(3, 2, generator=torch.Generator().manual_seed(seed)) > 0.5
        return {"0.weight": bp.BlockMask(keep, bp.BlockGrid((6, 4), (2, 2)))}

    model = sharded((0, 2), bp.apply_masks(plain(), masks(0)))
    expected = bp.apply_masks(plain(), masks(1))(X)
    assert torch.equal(functional_call(model, bp.masked_parameters(model, masks(1)), X), expected)
