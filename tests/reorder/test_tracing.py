"""Tracing: a replay changes only the next layers' inputs, uses of units are recognized, and checks of parameters are remembered."""

import pytest
import torch
from torch import Tensor, nn

from blockprune.model.calibration import default_forward
from blockprune.reorder.recording import RecordedRun
from blockprune.reorder.tracing import AxisTracer, AxisUse, UsageCheck
from blockprune.reorder.working_copy import WorkingCopy

HALF = torch.tensor([True, False, False, True])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("unit_of_input", "use"),
    [
        ([0, 1, 2, 3], AxisUse(4, copies=1)),
        ([0, 0, 1, 1, 2, 2, 3, 3], AxisUse(8, copies=1)),  # flattened
        ([0, 1, 2, 3, 0, 1, 2, 3], AxisUse(8, copies=2, groups=1)),
        ([0, 1, 0, 1, 2, 3, 2, 3], AxisUse(8, copies=2, groups=2)),  # two value heads of two channels, each for two query heads
        ([0, 1, 2, 3, 3], AxisUse(5, copies=0)),
        ([3, 1, 2, 0, 0, 1, 2, 3], AxisUse(8, copies=2, groups=1)),  # units 0 and 3 are in the same half
        ([1, 0, 2, 3], AxisUse(4, copies=0)),
    ],
)
def test_the_use_of_units_follows_from_the_inputs_that_change(unit_of_input: list[int], use: AxisUse) -> None:
    changed = HALF[unit_of_input]
    assert AxisUse.of(HALF, changed, ~changed) == use


def test_inputs_that_depend_on_several_units_are_not_separate() -> None:
    everything = torch.ones(4, dtype=torch.bool)
    assert not AxisUse.of(HALF, everything, everything).is_separate


def test_some_inputs_may_be_dead_but_not_most() -> None:
    none = torch.zeros(4, dtype=torch.bool)
    assert AxisUse.of(HALF, HALF, none) == AxisUse(4, copies=1)
    assert not AxisUse.of(HALF, HALF & torch.tensor([True, False, False, False]), none).is_separate


@torch.no_grad()
def test_a_change_ends_at_the_next_mixing_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 1))
    recorded = RecordedRun.of(WorkingCopy.of(model, torch.randn(8, 2), default_forward))
    changed = recorded.replay("0", torch.arange(4) == 1)
    assert changed is not None
    assert {name: inputs.tolist() for name, inputs in changed.items()} == {
        "0": [False] * 2,
        "1": [False, True, False, False],
        "2": [True] * 4,  # behind the norm
        "3": [False] * 4,
    }
    assert recorded.replay("3", torch.tensor([True])) is None  # the output of the model changes
    assert AxisTracer(recorded).consumers_of("0") == {"1": AxisUse(4, copies=1), "2": AxisUse(4, copies=0)}


@torch.no_grad()
def test_a_check_of_a_parameter_is_remembered_and_leaves_its_value() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(2, 4), nn.Linear(4, 1)
            self.scale, self.unused = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            runs.append(1)
            return self.down(self.up(x) * self.scale)

    runs: list[int] = []
    usage = UsageCheck(RecordedRun.of(WorkingCopy.of(Scaled(), torch.randn(8, 2), default_forward)))
    before = {name: p.clone() for name, p in usage.recorded.unhooked_parameters.items()}
    assert usage.unhooked_parameters(4) == {"rows": ["scale"], "columns": ["unused"], "last": []}
    assert usage.unused_parameters(4) == ["unused"]
    assert all(torch.equal(p, before[name]) for name, p in usage.recorded.unhooked_parameters.items())
    runs.clear()
    assert usage.unused_parameters(4) == ["unused"]
    assert not runs
