"""Numbers that overflow or underflow float32 do not change the order of blocks, or are refused."""

from functools import partial
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import nn

import blockprune as bp
from blockprune import collect, metric, reconstruct, statistics
from blockprune.statistics import Statistic

SCALES = [1e20, 1e-30, 1e30]
DATA_FREE: dict[str, Any] = {
    "l1": metric.l1,
    "l2": metric.l2,
    "lp": partial(metric.lp, p=3),
    "a high power": partial(metric.lp, p=30),
    "lamp": metric.lamp,
    "fpgm": metric.fpgm,
}
OF_DATA: dict[str, Any] = {
    "wanda": metric.wanda,
    "block_output_error": metric.block_output_error,
    "obs": partial(metric.obs, progress=False),
    "sparsegpt": partial(metric.sparsegpt, sparsity=0.5),
    "taylor": metric.taylor,
    "taylor_squared": metric.taylor_squared,
}
OF_LOSS: dict[str, tuple[Any, Statistic]] = {
    "fisher": (metric.fisher, statistics.gate_fisher),
    "obd": (metric.obd, statistics.gate_hessian_diagonal()),
    "snip": (metric.snip, statistics.gate_grad),
    "grasp": (metric.grasp, statistics.gate_hessian_grad),
    "taylor": (metric.taylor, statistics.weight_grad),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def assert_same_order(a: bp.Scores, b: bp.Scores) -> None:
    for x, y in zip(a.values(), b.values(), strict=True):
        assert torch.equal(x.value.flatten().argsort(), y.value.flatten().argsort())
        assert len(y.value.unique()) == len(x.value.unique())


def scaled(data: bp.Data, scale: float) -> bp.Data:
    return {name: attrs.evolve(param, weight=param.weight * scale) for name, param in data.items()}


@pytest.mark.parametrize("name", DATA_FREE)
@settings(max_examples=5)
@given(seed=seeds, scale=st.sampled_from(SCALES[:2]))
def test_the_scale_of_weights_does_not_change_their_order(name: str, seed: int, scale: float) -> None:
    block = (1,) if name == "fpgm" else (2, 2)
    data = {"w": bp.Param(normal((8, 8), seed).float(), bp.BlockGrid((8, 8), block))}
    assert_same_order(DATA_FREE[name](data), DATA_FREE[name](scaled(data, scale)))


@pytest.mark.parametrize("name", OF_DATA)
@pytest.mark.parametrize("scale", SCALES)
def test_the_scale_of_weights_does_not_change_the_order_of_what_data_says(name: str, scale: float) -> None:
    chosen = [statistics.input_sq, statistics.input_gram, statistics.weight_grad, statistics.weight_grad_sq]
    options: dict[str, Any] = {"where": bp.linears((2, 2)), "statistics": chosen, "loss": lambda y, _: y.square().mean()}
    data = collect.with_statistics(model(), batches=[normal((64, 8), 0)], **options)
    assert_same_order(OF_DATA[name](data), OF_DATA[name](scaled(data, scale)))


@pytest.mark.parametrize("name", OF_LOSS)
@pytest.mark.parametrize("scale", [1e-20, 1e15])
@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
def test_the_scale_of_the_loss_does_not_change_the_order(name: str, scale: float, per_sample: str) -> None:
    score, statistic = OF_LOSS[name]
    plain, other = (
        score(
            collect.with_statistics(
                model(),
                where=bp.linears((2, 2)),
                statistics=[statistic],
                batches=[normal((4, 8), 0)],
                loss=lambda y, _, factor=factor: y.square().mean() * factor,
                per_sample=per_sample,
            )
        )
        for factor in (1, scale)
    )
    assert_same_order(plain, other)


@pytest.mark.parametrize("statistic", [statistics.weight_grad_sq, statistics.output_grad_sq, statistics.output_grad_gram])
def test_squares_of_gradients_that_vanish_are_refused(statistic: Statistic) -> None:
    with pytest.raises(
        ValueError, match=r"weight \(8, 8\): the gradients of the loss are at most .*e-2\d.*multiply the loss by a constant"
    ):
        collect.with_statistics(
            model(),
            where=bp.linears((2, 2)),
            statistics=[statistic],
            batches=[normal((4, 8), 0)],
            loss=lambda y, _: y.square().mean() * 1e-20,
        )


@pytest.mark.parametrize("statistic", [statistics.input_sq, statistics.input_gram])
def test_squares_of_inputs_that_vanish_are_refused(statistic: Statistic) -> None:
    with pytest.raises(ValueError, match=r"0.weight \(8, 8\): the inputs are at most .*e-20.*scale them"):
        collect.with_statistics(model(), where=bp.linears((2, 2)), statistics=[statistic], batches=[normal((4, 8), 0) * 1e-20])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_half_precision_weights_do_not_vanish(dtype: torch.dtype) -> None:
    weight = (torch.tensor([[1.0, 2.0, 3.0, 4.0]]) * 1e-4).to(dtype)
    data = {"w": bp.Param(weight, bp.BlockGrid((1, 4), (1, 1)), {"weight_grad_sq": torch.ones(1, 4)})}
    for score in (metric.l2, metric.lamp, metric.taylor_squared, partial(metric.lp, p=4)):
        assert len(score(data)["w"].value.unique()) == 4


@pytest.mark.parametrize("use", [metric.obs, lambda data: reconstruct.least_squares(data, {"w": KEEP})])
def test_a_gram_matrix_that_cannot_be_one_is_named(use: Any) -> None:
    gram = torch.eye(4)[None]
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match=rf"w \(4, 4\): its input_gram is {dtype}.*float32 or wider"):
            use({"w": bp.Param(torch.ones(4, 4), KEEP.grid, {"input_gram": gram.to(dtype)})})
    with pytest.raises(ValueError, match=r"w \(4, 4\): the diagonal of its input_gram has negative values"):
        use({"w": bp.Param(torch.ones(4, 4), KEEP.grid, {"input_gram": gram - 2 * torch.diag(torch.tensor([0.0, 0, 1, 0]))})})


KEEP = bp.BlockMask(torch.tensor([[True, False], [True, True]]), bp.BlockGrid((4, 4), (2, 2)))


@pytest.mark.parametrize("name", ["fisher", "obd", "snip", "grasp"])
@pytest.mark.parametrize("scale", [1e-38, 1e-42])
@pytest.mark.parametrize("per_sample", ["vmap", "loop"])
def test_derivatives_of_gates_that_float32_hardly_holds_are_refused(name: str, scale: float, per_sample: str) -> None:
    function, statistic = OF_LOSS[name]
    options: dict[str, Any] = {"where": bp.linears((4, 4)), "statistics": [statistic], "batches": [normal((8, 8), 0)]}
    options |= {"loss": lambda output, batch: scale * output.square().mean(), "per_sample": per_sample}
    with pytest.raises(
        ValueError, match=r"0.weight \(8, 8\): 'gate_.*' adds up to at most .*, from derivatives of which float32 keeps few digits"
    ):
        collect.with_statistics(model(), **options)
    assert_same_order(
        function(collect.with_statistics(model().double(), **options)),
        function(collect.with_statistics(model().double(), **options | {"loss": lambda output, batch: output.square().mean()})),
    )


def test_a_flow_beyond_float32_names_its_cause_and_not_the_batch() -> None:
    deep = nn.Sequential(*(nn.Linear(64, 64) for _ in range(70)))
    options: dict[str, Any] = {"where": bp.linears((16, 16)), "statistics": [statistics.gate_flow], "batches": [normal((2, 64), 0)]}
    with pytest.raises(ValueError, match=r"0.weight \(64, 64\): 'gate_flow' overflows float32, .*model.double\(\)"):
        collect.with_statistics(deep, **options)
    assert metric.synflow(collect.with_statistics(deep.double(), **options))["0.weight"].value.isfinite().all()
