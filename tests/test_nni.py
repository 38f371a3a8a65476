"""NNI's block pruning, written in plain torch: ours gives the same masks where NNI is right, and NNI's faults do not happen here.

NNI prunes ``k = int(sparsity * n)`` of n blocks, which rounds down; ours rounds to the nearest number of elements. Both are compared where
they must agree: blocks that divide the shape, no ties, and sparsities for which ``sparsity * n`` is a whole number.
"""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn

import blockprune as bp
from blockprune import allocate, collect, metric


def magnitude(where: bp.Where, allocator: Callable[..., bp.Masks] = allocate.per_layer) -> bp.Pipeline:
    return bp.Pipeline(partial(collect.weights, where=where), metric.l1, allocator)


def nni_metric(weight: Tensor, block: tuple[int, ...]) -> Tensor:
    """BlockNormMetricsCalculator of NNI's tutorial: unfold each axis, then take the L1 norm of each block."""
    for axis, size in enumerate(block):
        weight = weight.unfold(axis, size, size)
    return weight.norm(p=1, dim=list(range(len(block), 2 * len(block))))


def nni_expand(mask: Tensor, block: tuple[int, ...]) -> Tensor:
    for axis, size in enumerate(block):
        mask = mask.repeat_interleave(size, axis)
    return mask.bool()


def nni_28(value: Tensor, sparsity: float) -> Tensor:
    """The tutorial and NNI 2.8: the largest of the k lowest norms is the threshold (only 2.8 handles k = 0)."""
    k = int(sparsity * value.numel())
    threshold = value.min() - 1 if k == 0 else torch.topk(value.view(-1), k, largest=False)[0].max()
    return torch.gt(value, threshold)


def nni_210(value: Tensor, sparsity: float) -> Tensor:
    """NNI 2.10: the same threshold, and all ones for k = 0."""
    k = int(sparsity * value.numel())
    if k == 0:
        return torch.ones_like(value).bool()
    return torch.gt(value, torch.topk(value.reshape(-1), k, largest=False)[0].max())


def nni_30(value: Tensor, sparsity: float) -> Tensor:
    """NNI 3.0: the indices of the k lowest norms; a sparsity of 0 or 1 is handled separately."""
    if sparsity in (0.0, 1.0):
        return torch.full_like(value, 1 - sparsity).bool()
    _, lowest = value.view(-1).topk(int(value.numel() * sparsity), largest=False)
    return torch.ones(value.numel()).scatter(-1, lowest, 0.0).view_as(value).bool()


RULES = {"2.8": nni_28, "2.10": nni_210, "3.0": nni_30}
LAYERS: dict[str, tuple[Callable[[tuple[int, ...]], nn.Module], int, Callable[..., bp.Where]]] = {
    "linear": (lambda s: nn.Linear(s[1], s[0]), 2, bp.linears),
    "conv1d": (lambda s: nn.Conv1d(s[1], s[0], s[2]), 3, bp.convs),
    "conv2d": (lambda s: nn.Conv2d(s[1], s[0], s[2:]), 4, bp.convs),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", RULES)
@given(data=st.data(), seed=seeds)
def test_where_nni_is_right_ours_is_the_same(rule: str, layer: str, data: st.DataObject, seed: int) -> None:
    make, rank, where = LAYERS[layer]
    blocks = data.draw(st.tuples(*[st.integers(1, 6)] * 2))
    kernel = data.draw(st.tuples(*[st.integers(1, 3)] * (rank - 2)))
    sides = data.draw(st.tuples(*[st.integers(1, 4)] * 2))
    block = sides + kernel  # a block takes whole kernels of a convolution
    model = make(tuple(n * b for n, b in zip(blocks, sides, strict=True)) + kernel)
    weight = torch.randint(-(2**16), 2**16, model.weight.shape, generator=torch.Generator().manual_seed(seed)).float()  # sums are exact
    with torch.no_grad():
        model.weight.copy_(weight)
    value = nni_metric(weight, block)
    n = value.numel()
    assume(value.unique().numel() == n)
    # k / n * n may be just below k, and int() would round it down to k - 1
    k = data.draw(st.sampled_from([k for k in range(n + 1) if int(k / n * n) == k]))
    ours = magnitude(where(sides))(model, k / n)["weight"]
    theirs = RULES[rule](value, k / n)
    assert torch.equal(ours.keep.view(value.shape), theirs)
    assert torch.equal(bp.expand(ours.keep, ours.grid), nni_expand(theirs, block))
    assert int((~ours.keep).sum()) == k


@given(st.integers(1, 8), st.integers(1, 4), seeds, st.data())
def test_nnis_filter_pruning_is_the_block_of_one_row(filters: int, channels: int, seed: int, data: st.DataObject) -> None:
    model = nn.Conv2d(channels, filters, 3)
    weight = torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.weight.copy_(weight)
    value = weight.norm(p=1, dim=[1, 2, 3])  # NNI's dim=0
    assume((value.sort()[0].diff() > 1e-3).all())
    k = data.draw(st.sampled_from([k for k in range(filters + 1) if int(k / filters * filters) == k]))
    assert torch.equal(magnitude(bp.convs((1,)))(model, k / filters)["weight"].keep.flatten(), nni_28(value, k / filters))


@given(seeds, st.integers(0, 8), st.integers(0, 8))
def test_nnis_continuous_mask_is_restrict(seed: int, one_count: int, other_count: int) -> None:
    first, second = sorted((one_count, other_count))
    weights = [torch.rand(8, 8, generator=torch.Generator().manual_seed(seed + i)) for i in range(2)]  # before and after some training
    scores = [metric.l1({"w": bp.Param(w, bp.BlockGrid((8, 8), (2, 4)))}) for w in weights]
    kept = allocate.per_layer(scores[0], first / 8)
    again = allocate.per_layer(bp.restrict(scores[1], kept), second / 8)["w"].keep
    old = nni_28(nni_metric(weights[0], (2, 4)), first / 8)
    suppressed = nni_metric(weights[1], (2, 4)) * old  # the norms of pruned blocks become 0, the lowest
    assert torch.equal(again, nni_28(suppressed, second / 8) & old) if first < second else torch.equal(again, kept["w"].keep)


def test_the_tutorial_model_loses_half_of_each_layer_in_2x2_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    masks = magnitude(bp.linears((2, 2)))(model, 0.5)
    for name, layer in zip(masks, model, strict=True):
        assert torch.equal(masks[name].keep, nni_28(nni_metric(layer.weight.detach(), (2, 2)), 0.5))
        assert bp.sparsity({name: masks[name]}) == 0.5


# Each of NNI's faults, and what happens here instead.


def test_ties_do_not_over_prune() -> None:
    constant = nn.Linear(8, 8)
    nn.init.constant_(constant.weight, 0.1)
    assert not nni_28(nni_metric(constant.weight.detach(), (2, 2)), 0.5).any()  # all blocks are pruned instead of half of them
    assert bp.sparsity(magnitude(bp.linears((2, 2)))(constant, 0.5)) == 0.5
    with_ties = nn.Linear(32, 32).bfloat16()
    with_ties.weight.data.copy_(torch.arange(1024).remainder(5).view(32, 32))  # bfloat16 has many ties
    assert (~nni_28(with_ties.weight.detach().abs(), 0.5)).float().mean() > 0.6
    assert bp.sparsity(magnitude(bp.linears((1, 1)))(with_ties, 0.5)) == 0.5


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.1, 1 / 64])
def test_a_budget_below_one_block_prunes_nothing_and_does_not_crash(sparsity: float) -> None:
    with pytest.raises(RuntimeError):
        torch.topk(torch.rand(4), 0, largest=False)[0].max()  # the tutorial's line, k = 0
    assert bp.sparsity(magnitude(bp.linears((4, 4)))(nn.Linear(8, 8), sparsity)) == 0


def test_a_shape_that_blocks_do_not_divide_has_smaller_blocks_at_its_edges() -> None:
    model = nn.Linear(5, 7)
    masks = magnitude(bp.linears((2, 2)))(model, 0.5)
    assert masks["weight"].grid.size == (4, 3)
    assert abs(bp.sparsity(masks) - 0.5) <= 2 / 35  # at most half a block from what was asked for
    assert bp.apply_masks(model, masks).weight.shape == (7, 5)


def test_a_block_of_two_axes_on_a_convolution_takes_whole_kernels() -> None:
    model = nn.Conv2d(4, 4, 2)
    masks = magnitude(bp.convs((2, 2)))(model, 0.5)
    assert masks["weight"].grid.size == (2, 2, 1, 1)
    zeros = bp.apply_masks(model, masks).weight.eq(0).flatten(2)
    assert torch.equal(zeros.all(-1), zeros.any(-1))  # a kernel is kept or pruned as a whole
    assert bp.sparsity(masks) == 0.5


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_does_not_survive_masking(poison: float) -> None:
    model = nn.Linear(4, 4, bias=False)
    masks = {"weight": bp.BlockMask(torch.tensor([[False, True], [True, True]]), bp.BlockGrid((4, 4), (2, 2)))}
    with torch.no_grad():
        model.weight[0, 0] = poison
    assert torch.tensor(poison * 0.0).isnan()  # what NNI computes
    assert bp.apply_masks(model, masks)(torch.ones(1, 4)).isfinite().all()
    assert bp.finalize(model).weight.isfinite().all()


def test_nothing_writes_into_the_callers_data_scores_or_masks() -> None:
    data = collect.weights(nn.Linear(8, 8), where=bp.linears((2, 2)))
    first = copy.deepcopy(data)
    scores = metric.l1(data)
    second = copy.deepcopy(scores)
    masks = allocate.per_layer(bp.restrict(scores, allocate.per_layer(scores, 0.25)), 0.5)
    third = copy.deepcopy(masks)
    bp.apply_masks(nn.Linear(8, 8), masks).weight.sum().backward()
    assert (data, scores, masks) == (first, second, third)


def test_an_optimizer_made_before_trains_the_kept_blocks() -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = magnitude(bp.linears((2, 2)))(model, 0.5)
    bp.apply_masks(model, masks)
    before = model.weight.detach().clone()
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    changed = model.weight.detach() != before
    assert torch.equal(changed, bp.expand(masks["weight"].keep, masks["weight"].grid))


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "decode": nn.Linear(4, 8)})
    model["decode"].weight = model["embed"].weight
    bp.apply_masks(model, magnitude(bp.named("embed.weight", (2, 2)))(model, 0.5))
    assert torch.equal(model["embed"].weight, model["decode"].weight)
    assert model["decode"].weight.eq(0).sum() == 16
    plain = bp.finalize(model)
    assert plain["embed"].weight is plain["decode"].weight


def test_a_masked_model_deep_copies_and_the_copy_is_its_own() -> None:
    model = nn.Linear(4, 4)
    bp.apply_masks(model, magnitude(bp.linears((2, 2)))(model, 0.5))
    copied = copy.deepcopy(model)
    assert bp.read_masks(copied) == bp.read_masks(model)
    bp.apply_masks(copied, {})
    assert bp.read_masks(copied) == {}
    assert bp.sparsity(bp.read_masks(model)) == 0.5
    assert model.weight.eq(0).sum() == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_grows_by_a_byte_a_block_and_the_shape_of_one(dtype: torch.dtype) -> None:
    def size(model: nn.Module) -> int:
        return sum(value.numel() * value.itemsize for value in model.state_dict().values())

    model = nn.Linear(64, 64).to(dtype)
    plain = size(model)
    bp.apply_masks(model, magnitude(bp.linears((4, 4)))(model, 0.5))
    assert size(model) <= plain + 16 * 16 + 2 * 8  # and the shape of a block, two integers
    assert size(bp.finalize(model)) == plain


def test_per_model_reaches_every_sparsity_up_to_1_and_honours_caps() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16))
    where = bp.linears((2, 2))
    for sparsity in (0.0, 0.25, 0.5, 1.0):
        assert bp.sparsity(magnitude(where, allocate.per_model)(model, sparsity)) == sparsity
    capped = magnitude(where, partial(allocate.per_model, max_sparsity=0.75, min_keep=0))(model, 1.0)
    assert [bp.sparsity({name: mask}) for name, mask in capped.items()] == [0.75, 0.75]


def test_a_misspelled_name_is_an_error_that_suggests_similar_names() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 4)})
    pipeline = magnitude(bp.linears((2, 2)))
    with pytest.raises(ValueError, match=r"'encodr\.weight' matches no parameter.*'encoder\.weight'"):
        magnitude(bp.named("encodr.weight", (2, 2)))(model, 0.5)
    with pytest.raises(KeyError, match=r"'encodr\.weight' that matches no parameter.*'encoder\.weight'"):
        pipeline(model, {"encodr.weight": 0.5})
    masks = pipeline(model, 0.5)
    with pytest.raises(KeyError, match=r"'encodr\.weight'.*not a parameter.*'encoder\.weight'"):
        bp.apply_masks(model, {"encodr.weight": masks["encoder.weight"]})
    assert bp.read_masks(model) == {}
