"""`apply_masks(straight_through=...)`: gradients reach pruned blocks; values, copies and files are those of an ordinary mask."""

import copy
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import grids, normal, seeds
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, vmap

import blockprune as bp
from blockprune.model.masking import mask_blocks, straight_through

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own forward AD uses it

GRID = bp.BlockGrid((4, 6), (2, 3))
MASK = bp.BlockMask(torch.tensor([[True, False], [False, True]]), GRID)
WIDER = bp.BlockMask(torch.tensor([[True, True], [False, True]]), GRID)


def layer(**options: Any) -> nn.Linear:
    torch.manual_seed(0)
    return bp.apply_masks(nn.Linear(6, 4), {"weight": MASK}, **options)


def stored(model: nn.Module) -> Tensor:
    return model.parametrizations.weight.original  # type: ignore[union-attr, return-value]


def blocks(draw_seed: int, size: tuple[int, ...]) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(draw_seed)) < 0.5


@given(grids(), seeds, st.sampled_from([0.0, 0.25]), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(max_examples=60)
def test_values_are_those_of_the_mask_and_gradients_those_of_the_wider_one(
    grid: bp.BlockGrid, seed: int, decay: float, dtype: torch.dtype
) -> None:
    weight, upstream = normal(grid.shape, seed).to(dtype), normal(grid.shape, seed + 1).to(dtype)
    keep, reached = blocks(seed, grid.size), blocks(seed + 2, grid.size)
    weight.requires_grad_()
    read = straight_through(weight, keep, reached, grid, decay=decay)
    assert torch.equal(read, reference.masked(weight.detach(), keep, grid))
    (gradient,) = torch.autograd.grad(read, weight, upstream)
    pruned = reference.masked(weight.detach(), ~keep & reached, grid)
    assert torch.equal(gradient, reference.masked(upstream, keep | reached, grid) + decay * pruned)


def test_nan_in_a_pruned_block_does_not_leak() -> None:
    weight = torch.full((4, 6), torch.nan)
    weight[:2, :3] = 1
    weight.requires_grad_()
    keep = torch.tensor([[True, False], [False, False]])
    read = straight_through(weight, keep, torch.ones(2, 2, dtype=torch.bool), GRID, decay=0.0)
    read.sum().backward()
    assert torch.equal(read, mask_blocks(weight, keep, GRID))
    assert torch.equal(weight.grad, torch.ones(4, 6))


def test_it_is_linear_in_every_mode_of_differentiation() -> None:
    weight, keep, wide = normal((4, 6), 0), MASK.keep, WIDER.keep

    def read(w: Tensor) -> Tensor:
        return straight_through(w, keep, wide, GRID, decay=0.0)

    expected = torch.diag(bp.expand(wide, GRID).flatten().double()).view(4, 6, 4, 6)
    assert torch.equal(jacrev(read)(weight), expected)
    assert torch.equal(jacfwd(read)(weight), expected)
    assert torch.equal(vmap(read)(weight[None].repeat(3, 1, 1)), read(weight).repeat(3, 1, 1))
    batched = vmap(grad(lambda w: (read(w) * weight).sum()))(weight[None].repeat(3, 1, 1))
    assert torch.equal(batched, (weight * bp.expand(wide, GRID)).repeat(3, 1, 1))
    w = weight.clone().requires_grad_()
    upstream = normal((5, 4, 6), 1)
    (many,) = torch.autograd.grad(read(w), w, upstream, is_grads_batched=True)
    assert torch.equal(many, upstream * bp.expand(wide, GRID))
    everywhere = torch.ones_like(keep)
    assert gradcheck(lambda w: straight_through(w, everywhere, everywhere, GRID, decay=0.0).sin(), w)


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    model(x).square().sum().backward()
    found = stored(model).grad
    assert found is not None
    return found.clone()


X = normal((3, 6), 7).float()


def dense_gradient(model: nn.Linear) -> Tensor:
    plain = bp.finalize(model)
    plain(X).square().sum().backward()
    assert plain.weight.grad is not None
    return plain.weight.grad


def test_a_layer_passes_the_gradient_of_the_weight_that_it_uses() -> None:
    model = layer(straight_through=True)
    torch.testing.assert_close(gradient(model, X), dense_gradient(model))
    bp.apply_masks(model, {"weight": MASK}, straight_through={"weight": WIDER})
    torch.testing.assert_close(gradient(model, X), dense_gradient(model) * bp.expand(WIDER.keep, GRID))
    bp.apply_masks(model, {"weight": MASK}, straight_through=True, decay=0.5)
    pruned = stored(model).detach() * ~bp.expand(MASK.keep, GRID)
    torch.testing.assert_close(gradient(model, X), dense_gradient(model) + 0.5 * pruned)
    bp.apply_masks(model, {"weight": MASK})  # the last call decides
    torch.testing.assert_close(gradient(model, X), dense_gradient(model) * bp.expand(MASK.keep, GRID))


def test_a_parameter_that_the_wider_masks_lack_gets_gradients_in_kept_blocks_alone() -> None:
    model = layer(straight_through={})
    torch.testing.assert_close(gradient(model, X), dense_gradient(model) * bp.expand(MASK.keep, GRID))


def test_a_tied_tensor_gets_the_option_in_all_its_modules_under_any_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    mask = bp.BlockMask(torch.eye(2).bool(), bp.BlockGrid((6, 6), (3, 3)))
    everything = bp.BlockMask(torch.ones(2, 2).bool(), mask.grid)
    bp.apply_masks(model, {"0.weight": mask}, straight_through={"1.weight": everything})
    model(X).square().sum().backward()
    assert all(module.parametrizations.weight.original.grad.count_nonzero() == 36 for module in model)


def test_copies_and_updates_keep_it_and_nothing_else_shows_it() -> None:
    plain, model = layer(), layer(straight_through=True, decay=0.1)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    replica = copy.deepcopy(model)
    assert torch.equal(gradient(replica, X), gradient(model, X))
    bp.apply_masks(replica, {"weight": MASK})
    assert gradient(model, X).count_nonzero() == 24  # a copy is a model of its own
    assert type(bp.finalize(model)) is nn.Linear
    assert sorted(vars(bp.finalize(model))) == sorted(vars(nn.Linear(6, 4)))
    bp.apply_masks(model, {})
    assert type(model) is nn.Linear
    assert sorted(vars(model)) == sorted(vars(nn.Linear(6, 4)))


def test_loading_a_checkpoint_keeps_the_option_of_the_model() -> None:
    model, state = layer(straight_through=True), layer().state_dict()
    bp.load_masked(model, state)
    assert gradient(model, X).count_nonzero() == 24
    model.load_state_dict(state)
    assert gradient(model, X).count_nonzero() == 24


def test_gradients_of_functional_calls_and_statistics_reach_pruned_blocks() -> None:
    model = layer(straight_through=True)
    by_function = grad(lambda w: functional_call(model, {"parametrizations.weight.original": w}, (X,)).square().sum())
    torch.testing.assert_close(by_function(stored(model).detach()), dense_gradient(model))
    loss: Any = lambda output, batch: output.square().sum()  # noqa: E731
    options: Any = {"where": bp.linears((2, 3)), "statistics": [bp.statistics.weight_grad], "batches": [X], "loss": loss}
    torch.testing.assert_close(bp.collect.with_statistics(model, **options)["weight"].stats["weight_grad"], dense_gradient(model))


def test_gradients_in_half_precision_and_under_autocast() -> None:
    model = layer(straight_through=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(X).float().square().sum().backward()
    assert stored(model).grad.count_nonzero() == 24
    half = layer(straight_through=True).bfloat16()
    assert gradient(half, X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does it with any autograd.Function
def test_a_compiled_model_is_not_recompiled_when_masks_and_reached_blocks_change() -> None:
    compiled_times = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal compiled_times
        compiled_times += 1
        return graph

    model = layer(straight_through={"weight": WIDER})
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    others = [(MASK, WIDER), (WIDER, MASK), (MASK, bp.BlockMask(torch.ones(2, 2).bool(), GRID))]
    for mask, wider in others:
        bp.apply_masks(model, {"weight": mask}, straight_through={"weight": wider})
        model.zero_grad()
        compiled(X).square().sum().backward()
        expected = dense_gradient(model) * bp.expand(mask.keep | wider.keep, GRID)
        torch.testing.assert_close(stored(model).grad, expected)
    assert compiled_times == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 0.1}, ValueError, "decay=0.1 changes the gradients of pruned blocks.*straight_through=True"),
        ({"decay": -1.0, "straight_through": True}, ValueError, "decay=-1.0 must be a number from 0 on"),
        ({"decay": float("nan"), "straight_through": True}, ValueError, "decay=nan must be"),
        ({"straight_through": "yes"}, TypeError, "straight_through is a str"),
        ({"straight_through": {"bias": MASK}}, KeyError, "straight_through has 'bias', which masks does not have"),
        ({"straight_through": {"wight": MASK}}, KeyError, "straight_through names 'wight'"),
        ({"straight_through": {"weight": MASK.keep}}, TypeError, "is a Tensor, not a BlockMask"),
        (
            {"straight_through": {"weight": bp.BlockMask(torch.ones(4, 6).bool(), bp.BlockGrid((4, 6), (1, 1)))}},
            ValueError,
            "weight: straight_through has BlockGrid.*but the mask has",
        ),
    ],
)
def test_bad_options_are_errors_and_change_nothing(options: Any, error: type[Exception], message: str) -> None:
    model = layer(straight_through=True)
    before = gradient(model, X)
    with pytest.raises(error, match=message):
        bp.apply_masks(model, {"weight": WIDER}, **options)
    assert bp.read_masks(model) == {"weight": MASK}
    assert torch.equal(gradient(model, X), before)


def test_an_error_halfway_restores_the_option() -> None:
    model = layer(straight_through={"weight": WIDER}, decay=0.5)
    before = gradient(model, X)

    class Broken(bp.BlockMask):  # fails when it is copied onto the model
        @property
        def keep(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, AttributeError)):
        bp.apply_masks(model, {"weight": object.__new__(Broken)})
    assert torch.equal(gradient(model, X), before)


def test_collected_gradients_are_copies_and_missing_ones_are_errors() -> None:
    model = layer(straight_through=True)
    with pytest.raises(ValueError, match=r"weight \(4, 6\): this weight has no gradient; call `backward` first"):
        bp.collect.gradients(model, where=bp.linears((2, 3)))
    found = gradient(model, X)
    collected = bp.collect.gradients(model, where=bp.linears((2, 3)))["weight"].stats["weight_grad"]
    assert torch.equal(collected, found)
    collected.zero_()
    assert stored(model).grad.count_nonzero() == 24
    bp.apply_masks(model, {"weight": MASK}, straight_through={"weight": WIDER})
    with pytest.raises(ValueError, match=r"weight \(4, 6\): its mask keeps gradients from some pruned blocks"):
        bp.collect.gradients(model, where=bp.linears((2, 3)))
    expected = reference.pool(found, GRID, reduce="mean", elementwise=torch.abs)
    bp.apply_masks(model, {"weight": MASK}, straight_through=True)
    torch.testing.assert_close(
        bp.metric.gradient_magnitude(bp.collect.gradients(model, where=bp.linears((2, 3))))["weight"].value, expected
    )


def test_the_straight_through_estimator_revives_blocks_that_the_data_needs() -> None:
    """Magnitude masks of stored weights that all learn find the blocks of the solution; without gradients they stay where they began."""
    torch.manual_seed(0)
    x, solution = torch.randn(128, 6), torch.zeros(4, 6)
    solution[2:, :3], solution[:2, 3:] = 2.0, 0.3
    y = x @ solution.T
    masks = {}
    for reaches in (True, False):
        model = nn.Linear(6, 4, bias=False)
        nn.init.constant_(model.weight, 0.1)
        with torch.no_grad():
            model.weight[:2, 3:] = 0.3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        prune = bp.recipes.magnitude(bp.linears((2, 3)))
        for _ in range(40):
            bp.apply_masks(model, prune(model, 0.75).masks, straight_through=reaches)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        masks[reaches] = bp.read_masks(model)["weight"].keep
    assert masks[True].tolist() == [[False, False], [True, False]]
    assert masks[False].tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("options", [{}, {"straight_through": True}, {"straight_through": True, "decay": 0.5}])
def test_the_gradient_is_by_the_mask_of_the_forward(options: Any) -> None:
    """Masks may change between a forward and its backward."""
    model, expected = layer(**options), layer(**options)
    loss = model(X).sum()
    bp.apply_masks(model, {"weight": WIDER}, straight_through={"weight": MASK})
    bp.apply_masks(model, {"weight": bp.BlockMask(~MASK.keep, GRID)}, **options)
    loss.backward()
    expected(X).sum().backward()
    assert torch.equal(stored(model).grad, stored(expected).grad)


@pytest.mark.parametrize("first", [False, True])
def test_averages_of_weights_stay_right_when_it_is_switched(first: bool) -> None:
    """`AveragedModel` pairs the buffers of two models."""
    model = nn.Sequential(layer(), nn.Linear(4, 4))
    masks = {**bp.read_masks(model), "1.weight": bp.BlockMask(torch.tensor([[True, False], [False, True]]), bp.BlockGrid((4, 4), (2, 2)))}
    bp.apply_masks(model, masks, straight_through=first)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    bp.apply_masks(model, masks, straight_through={"0.weight": WIDER} if first else not first)
    average.update_parameters(model)
    masks |= {"0.weight": WIDER}
    bp.apply_masks(model, masks, straight_through=not first)
    average.update_parameters(model)
    assert bp.read_masks(average.module) == masks
    assert not [name for name in model.state_dict() if "reached" in name]


def test_models_of_an_ensemble_have_their_own_reached_blocks() -> None:
    models = [nn.Sequential(layer(straight_through={"weight": mask})) for mask in (MASK, WIDER)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0])
    together = vmap(grad(lambda p, b: functional_call(base, (p, b), (X,)).sum()))({n: p.detach() for n, p in parameters.items()}, buffers)
    for found, model in zip(together["0.parametrizations.weight.original"], models, strict=True):
        model(X).sum().backward()
        assert torch.equal(found, stored(model[0]).grad)


@pytest.mark.parametrize("block", [(2, 3), (4, 1)])
def test_other_masks_for_one_run_pass_gradients_to_kept_blocks_alone(block: tuple[int, int]) -> None:
    """`masked_parameters` has the gradients of the plain masks, whatever the masks on the model let pass."""
    model, plain = layer(straight_through=True, decay=0.5), layer()
    grid = bp.BlockGrid((4, 6), block)
    masks = {"weight": bp.BlockMask(torch.arange(grid.blocks).view(grid.size) % 2 == 0, grid)}
    functional_call(model, bp.masked_parameters(model, masks), (X,)).sum().backward()
    bp.apply_masks(plain, masks)(X).sum().backward()
    assert torch.equal(stored(model).grad, stored(plain).grad)
    assert bp.read_masks(model) == {"weight": MASK}
