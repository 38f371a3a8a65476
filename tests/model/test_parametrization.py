"""Law 9 and the calculus of `mask_blocks`: a masked read is `torch.where`, bit for bit and derivative for derivative."""

from collections.abc import Callable
from typing import Any

import pytest
import reference
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import blockprune as bp
from blockprune.model.masking import mask_blocks
from blockprune.model.parametrization import MaskBlocks

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own forward AD uses it

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 1e-45], dtype=torch.float64)


def expanded(keep: Tensor, grid: bp.BlockGrid) -> Tensor:
    """`reference.expand` without loops, for `vmap`: each element looks its block up."""
    where = [torch.arange(s) // b for s, b in zip(grid.shape, grid.block, strict=True)]
    return keep[torch.meshgrid(*where, indexing="ij")]


def masked(weight: Tensor, keep: Tensor, grid: bp.BlockGrid) -> Tensor:
    """`reference.masked` without loops."""
    return torch.where(expanded(keep, grid), weight, torch.zeros((), dtype=weight.dtype))


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(BITS[x.dtype.itemsize])


@st.composite
def grids(draw: st.DrawFn, side: int = 6) -> bp.BlockGrid:
    shape = draw(st.lists(st.integers(1, side), min_size=1, max_size=4))
    if side > 5 and draw(st.booleans()):
        shape[-1] = draw(st.sampled_from([63, 64, 70, 128]))  # long rows take another path than short ones
    block = [draw(st.sampled_from([-1, *range(1, s + 1)])) for s in shape]
    return bp.BlockGrid(shape, block[: draw(st.integers(0, len(shape)))])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, bp.BlockGrid]:
    """A weight with NaN, inf and -0 anywhere and in any memory order, a mask, and their blocks."""
    grid, dtype = draw(grids()), draw(strategies.dtypes)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(grid.shape, generator=rng, dtype=torch.float64)
    special = SPECIAL[torch.randint(len(SPECIAL), grid.shape, generator=rng)]
    weight = torch.where(torch.rand(grid.shape, generator=rng) < 0.3, special, weight).to(dtype)
    order = draw(st.permutations(range(weight.ndim)))
    memory = weight.permute(order).contiguous().permute([order.index(axis) for axis in range(weight.ndim)])
    if draw(st.booleans()):
        memory = torch.stack([memory, memory], -1)[..., 0]  # every second element
    return memory, torch.rand(grid.size, generator=rng) < draw(st.sampled_from([0.0, 0.5, 1.0])), grid


@given(cases())
@settings(max_examples=300)
def test_mask_blocks_is_where_bit_for_bit(case: tuple[Tensor, Tensor, bp.BlockGrid]) -> None:
    weight, keep, grid = case
    before = weight.clone(), keep.clone()
    out = mask_blocks(weight, keep, grid)
    assert out.dtype == weight.dtype
    assert out.shape == weight.shape
    assert torch.equal(bits(out), bits(reference.masked(weight, keep, grid)))
    out.detach().fill_(3)  # law 4: the result is memory of its own
    assert torch.equal(bits(weight), bits(before[0]))
    assert torch.equal(keep, before[1])


@given(cases(), st.booleans())
@settings(max_examples=100)
def test_gradient_is_the_same_mask_of_the_gradient(case: tuple[Tensor, Tensor, bp.BlockGrid], create_graph: bool) -> None:
    upstream, keep, grid = case  # NaN and inf in the gradient do not leak either
    weight = torch.full(grid.shape, torch.nan, dtype=upstream.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(mask_blocks(weight, keep, grid), weight, upstream, create_graph=create_graph)
    assert torch.equal(bits(gradient), bits(reference.masked(upstream, keep, grid)))


class Tagged(Tensor):
    """A tensor subclass that knows `where` but no bit tricks, as a DTensor does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__and__, Tensor.bitwise_and, torch.bitwise_and):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@given(cases())
@settings(max_examples=50)
def test_a_tensor_subclass_keeps_its_class(case: tuple[Tensor, Tensor, bp.BlockGrid]) -> None:
    weight, keep, grid = case
    out = mask_blocks(weight.as_subclass(Tagged), keep, grid)
    assert type(out) is Tagged
    assert torch.equal(bits(out.as_subclass(Tensor)), bits(reference.masked(weight, keep, grid)))


def drawn(grid: bp.BlockGrid, *batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, *grid.shape, generator=rng, dtype=torch.float64), torch.rand(*batch, *grid.size, generator=rng) < 0.5


@given(grids(side=3), st.integers(0, 1000))
@settings(max_examples=12)
def test_gradcheck(grid: bp.BlockGrid, seed: int) -> None:
    weight, keep = drawn(grid, seed=seed)
    weight.requires_grad_()

    def read(w: Tensor) -> Tensor:
        return mask_blocks(w.sin(), keep, grid).exp()

    assert gradcheck(read, weight, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(read, weight, check_batched_grad=True, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(create_graph: bool) -> None:
    grid = bp.BlockGrid((4, 6), (2, 3))
    weight, keep = drawn(grid)
    upstream, _ = drawn(grid, 5, seed=1)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(mask_blocks(weight, keep, grid), weight, upstream, is_grads_batched=True, create_graph=create_graph)
    assert torch.equal(gradient, torch.stack([masked(g, keep, grid) for g in upstream]))


GRIDS = [bp.BlockGrid((5,), (2,)), bp.BlockGrid((4, 6), (2, 3)), bp.BlockGrid((2, 3, 2), (1,)), bp.BlockGrid((2, 2, 3, 1), (1, 2, 2))]

# (read: (weight, keep) -> weight, loss: the same -> scalar, weight, keep, three weights, three masks) -> what the transform gives
TRANSFORMS = {
    "grad": lambda read, loss, w, k, ws, ks: grad(loss)(w, k),
    "vjp of grad": lambda read, loss, w, k, ws, ks: vjp(lambda v: grad(loss)(v, k), w)[1](ws[0])[0],
    "jvp": lambda read, loss, w, k, ws, ks: jvp(lambda v: read(v, k), (w,), (ws[0],))[1],
    "jvp of grad": lambda read, loss, w, k, ws, ks: jvp(lambda v: grad(loss)(v, k), (w,), (ws[0],))[1],
    "jacrev": lambda read, loss, w, k, ws, ks: jacrev(read)(w, k),
    "jacfwd": lambda read, loss, w, k, ws, ks: jacfwd(read)(w, k),
    "hessian": lambda read, loss, w, k, ws, ks: hessian(loss)(w, k),
    "jacfwd of jacfwd": lambda read, loss, w, k, ws, ks: jacfwd(jacfwd(loss))(w, k),
    "jacrev of jacrev": lambda read, loss, w, k, ws, ks: jacrev(jacrev(loss))(w, k),
    "vmap over weights": lambda read, loss, w, k, ws, ks: vmap(read, (0, None))(ws, k),
    "vmap over masks": lambda read, loss, w, k, ws, ks: vmap(read, (None, 0))(w, ks),
    "vmap over both, last axes": lambda read, loss, w, k, ws, ks: vmap(read, -1, -1)(ws.movedim(0, -1), ks.movedim(0, -1)),
    "vmap over weights, then masks": lambda read, loss, w, k, ws, ks: vmap(vmap(read, (0, None)), (None, 0))(ws, ks),
    "vmap of grad over masks": lambda read, loss, w, k, ws, ks: vmap(grad(loss), (None, 0))(w, ks),
    "vmap of hessian": lambda read, loss, w, k, ws, ks: vmap(hessian(loss))(ws, ks),
    "autograd.functional, forward": lambda read, loss, w, k, ws, ks: jacobian(
        lambda v: read(v, k), w, vectorize=True, strategy="forward-mode"
    ),
    "autograd.functional, reverse": lambda read, loss, w, k, ws, ks: jacobian(lambda v: read(v, k), w, vectorize=True),
    "grad through vmap": lambda read, loss, w, k, ws, ks: grad(lambda v: vmap(loss, (None, 0))(v, ks).sum())(w),
}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_torch_func_are_those_of_where(grid: bp.BlockGrid, transform: Callable[..., Tensor]) -> None:
    (weight, keep), (weights, keeps) = drawn(grid), drawn(grid, 3, seed=1)

    def result(mask: Callable[[Tensor, Tensor, bp.BlockGrid], Tensor]) -> Tensor:
        def read(w: Tensor, k: Tensor) -> Tensor:
            return mask(w.sin(), k, grid).exp()

        def loss(w: Tensor, k: Tensor) -> Tensor:
            return read(w, k).sum() ** 2

        return transform(read, loss, weight, keep, weights, keeps)

    fast, expected = result(mask_blocks), result(masked)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(fast, expected)


def test_module_holds_a_copy_of_its_mask_as_a_bool_buffer() -> None:
    keep, grid = torch.tensor([[True, False]]), bp.BlockGrid((2, 3), (2, 2))
    module = MaskBlocks(keep, grid).half()
    keep.fill_(False)
    assert module.keep.tolist() == [[True, False]]
    assert module.keep.dtype == torch.bool
    assert list(module.state_dict()) == ["keep", "_extra_state"]
    assert module.state_dict()["_extra_state"].tolist() == [2, 2]
    assert list(module.parameters()) == []
    assert module(torch.ones(2, 3)).tolist() == [[1, 1, 0]] * 2
    assert repr(module) == "MaskBlocks(shape=(2, 3), block=(2, 2))"


def test_a_layer_prints_its_blocks() -> None:
    layer = bp.apply_masks(nn.Linear(3, 2), {"weight": bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 3), (2, 2)))})
    assert "MaskBlocks(shape=(2, 3), block=(2, 2))" in repr(layer)
