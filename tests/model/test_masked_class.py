"""Masked modules are copied like plain ones, also inside wrappers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
