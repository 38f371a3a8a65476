"""Permuted units compute the same function for every kind of layer, the inverse restores them exactly, and sorting helps block pruning."""

import copy
import re
from collections.abc import Callable, Sequence

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, dtypes, seeds
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

import blockprune as bp
from blockprune.core.unit_permutation import UnitPermutation
from blockprune.model.parameters import parameter_refs
from blockprune.reorder.permutation import permute, sort_units

Case = tuple[nn.Module, tuple[Tensor, ...], list[UnitPermutation]]


def rotated(units: int, *, groups: int = 1) -> Tensor:
    """An order in which no unit keeps its position, and every unit stays in its group."""
    size = units // groups
    return torch.cat([(torch.arange(size) + 1 + g % (size - 1)) % size + g * size for g in range(groups)])


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 10), nn.Linear(6, 10, bias=False), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Attention(nn.Module):
    """Causal attention with `heads` query heads, which share `kv` key and value heads."""

    def __init__(self, heads: int, kv: int, *, dim: int = 8, head: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(dim, heads * head), nn.Linear(dim, kv * head), nn.Linear(dim, kv * head)
        self.o, self.head = nn.Linear(heads * head, dim), head

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class Residual(nn.Module):
    """A residual stream that an embedding and a block write, and that the block and a tied head read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up, self.down = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        out: Tensor = self.head(x + self.down(self.up(self.norm(x)).relu()))
        return out


def both(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


BATCHNORM = ("1.weight", "1.bias", "1.running_mean", "1.running_var")
QKV = (*both("q"), *both("k"), *both("v"))


def mlp() -> Case:
    model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    first, second = (
        UnitPermutation(rotated(8), rows=both("0"), columns=["2.weight"]),
        UnitPermutation(rotated(6), rows=both("2"), columns=["4.weight"]),
    )
    return model, (torch.randn(7, 5),), [first, second]  # 2.weight is permuted along both axes


def gated() -> Case:
    rows = ("gate_proj.weight", "gate_proj.bias", "up_proj.weight")
    return Gated(), (torch.randn(2, 3, 6),), [UnitPermutation(rotated(10), rows=rows, columns=["down_proj.weight"])]


def heads() -> Case:
    return Attention(4, 4), (torch.randn(2, 5, 8),), [UnitPermutation(rotated(4), rows=QKV, columns=["o.weight"])]


def grouped_heads() -> Case:
    return Attention(6, 2), (torch.randn(2, 5, 8),), [UnitPermutation(rotated(6, groups=2), rows=both("q"), columns=["o.weight"])]


def whole_groups() -> Case:
    return Attention(6, 2), (torch.randn(2, 5, 8),), [UnitPermutation(rotated(2), rows=QKV, columns=["o.weight"])]


def value_channels() -> Case:
    return Attention(4, 4), (torch.randn(2, 5, 8),), [UnitPermutation(rotated(16, groups=4), rows=both("v"), columns=["o.weight"])]


def packed_heads() -> Case:
    order, x = rotated(4), torch.randn(2, 5, 8)
    packed = UnitPermutation(torch.cat([order, order + 4, order + 8]), rows=("in_proj_weight", "in_proj_bias"))
    return nn.MultiheadAttention(8, 4, batch_first=True), (x, x, x), [packed, UnitPermutation(order, columns=["out_proj.weight"])]


def convs() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    return model, (torch.randn(2, 3, 8, 8),), [UnitPermutation(rotated(6), rows=(*both("0"), *BATCHNORM), columns=["3.weight"])]


def depthwise() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    return model, (torch.randn(2, 3, 5, 5),), [UnitPermutation(rotated(6), rows=(*both("0"), *both("1")), columns=["3.weight"])]


def transposed() -> Case:
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3))
    return model, (torch.randn(2, 3, 4, 4),), [UnitPermutation(rotated(6), rows=("0.bias", "2.weight"), columns=["0.weight"])]


def flattened() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 2 * 3, 4))
    return model, (torch.randn(2, 3, 4, 5),), [UnitPermutation(rotated(6), rows=both("0"), columns=["3.weight"])]


def stream() -> Case:
    rows, columns = (*both("norm"), *both("down")), ("embed.weight", "head.weight", "up.weight")
    return Residual(), (torch.randint(11, (2, 5)),), [UnitPermutation(rotated(6), rows=rows, columns=columns)]


CASES = [
    mlp,
    gated,
    heads,
    grouped_heads,
    whole_groups,
    value_channels,
    packed_heads,
    convs,
    depthwise,
    transposed,
    flattened,
    stream,
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)


def trained(case: Callable[[], Case]) -> Case:
    """The case in evaluation mode, with values that differ from the initial ones (a batch norm starts with ones and zeros)."""
    torch.manual_seed(0)
    model, inputs, plan = case()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 1.1).mul_(0.5 if tensor.dim() == 1 else torch.randn(tensor.shape))
    return model.eval(), inputs, plan


def run(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(*inputs)
    return out[0] if isinstance(out, tuple) else out


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@every_case
def test_the_function_stays_the_same_and_every_listed_tensor_changes(case: Callable[[], Case]) -> None:
    model, inputs, plan = trained(case)
    permuted = permute(model, plan)
    torch.testing.assert_close(run(permuted, inputs), run(model, inputs), atol=1e-5, rtol=1e-5)
    before, after = model.state_dict(), permuted.state_dict()
    named = {name for permutation in plan for name in (*permutation.rows, *permutation.columns)}
    assert {name for name in before if not torch.equal(before[name], after[name])} == named


@every_case
def test_without_any_of_the_names_the_function_changes(case: Callable[[], Case]) -> None:
    """So the test above would notice a tensor that is not permuted."""
    model, inputs, plan = trained(case)
    want = run(model, inputs)
    for number, permutation in enumerate(plan):
        for name in (*permutation.rows, *permutation.columns):
            less = UnitPermutation(
                permutation.order, rows=[n for n in permutation.rows if n != name], columns=[n for n in permutation.columns if n != name]
            )
            if name in ("k.bias", "head.weight", "embed.weight"):
                continue  # softmax ignores a key's bias; to list one name of a tied tensor is an error, tested below
            assert not torch.allclose(run(permute(model, [*plan[:number], less, *plan[number + 1 :]]), inputs), want, atol=1e-5), name


def test_query_heads_that_leave_their_key_head_change_the_function() -> None:
    """So the groups are necessary."""
    model, inputs, (permutation,) = trained(grouped_heads)
    across = permute(model, [UnitPermutation(rotated(6), rows=permutation.rows, columns=permutation.columns)])
    assert not torch.allclose(run(across, inputs), run(model, inputs), atol=1e-3)


@every_case
def test_in_place_the_models_own_tensors_have_the_bits_of_the_copy(case: Callable[[], Case]) -> None:
    model, _, plan = case()
    expected, tensors = permute(model, plan).state_dict(), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert permute(model, plan, inplace=True) is model
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert all(t is tensors[name] for name, t in (*model.named_parameters(), *model.named_buffers()))


@pytest.mark.parametrize("after", [False, True])
@every_case
def test_in_place_an_error_in_the_middle_is_undone(case: Callable[[], Case], after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writing of each tensor fails once, before its work and after it."""
    model, _, plan = case()
    before, write = copy.deepcopy(model.state_dict()), Tensor.copy_

    class Stop(BaseException):
        pass

    def fails(at: int) -> bool:
        calls = 0

        def failing(self: Tensor, source: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if after or calls != at:
                write(self, source)
            if calls == at:
                raise Stop
            return self

        try:
            with monkeypatch.context() as patch:
                patch.setattr(Tensor, "copy_", failing)
                permute(model, plan, inplace=True)
        except Stop:
            return True
        return False

    writes = 0
    while fails(writes + 1):
        writes += 1
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert writes


@every_case
def test_the_inverse_restores_all_tensors_exactly(case: Callable[[], Case]) -> None:
    model, _, plan = trained(case)
    permuted = permute(model, plan)
    assert not same(permuted.state_dict(), model.state_dict())
    assert same(permute(permuted, [permutation.inverse for permutation in plan]).state_dict(), model.state_dict())


@every_case
def test_the_model_and_its_optimizer_do_not_change(case: Callable[[], Case]) -> None:
    model, _, plan = trained(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, parameters, orders = state(model), list(model.parameters()), [permutation.order.clone() for permutation in plan]
    permuted = permute(model, plan)
    assert same(model.state_dict(), before)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert all(p is q for p, q in zip(parameters, optimizer.param_groups[0]["params"], strict=True))
    assert all(torch.equal(permutation.order, order) for permutation, order in zip(plan, orders, strict=True))
    for tensor in (*permuted.parameters(), *permuted.buffers()):
        tensor.data.zero_()
    assert same(model.state_dict(), before)


@given(st.permutations(range(5)) | st.permutations(range(2)), st.integers(1, 4), st.integers(1, 4), dtypes, seeds)
def test_unit_i_is_the_former_unit_order_i(order: list[int], tall: int, wide: int, dtype: torch.dtype, seed: int) -> None:
    units = len(order)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, units * tall), nn.BatchNorm1d(units * tall), nn.Linear(units * wide, 2)).to(dtype)
    model.register_parameter("position", nn.Parameter(torch.randn(1, 3, units * wide).to(dtype)))
    permutation = UnitPermutation(
        torch.tensor(order), rows=("0.weight", "0.bias", "1.running_mean"), columns=("2.weight",), last=("position",)
    )
    permuted = permute(model, [permutation])
    for i, was in enumerate(order):
        for j in range(tall):
            assert torch.equal(permuted[0].weight[i * tall + j], model[0].weight[was * tall + j])
            assert torch.equal(permuted[0].bias[i * tall + j], model[0].bias[was * tall + j])
        for j in range(wide):
            assert torch.equal(permuted[2].weight[:, i * wide + j], model[2].weight[:, was * wide + j])
            assert torch.equal(permuted.position[..., i * wide + j], model.position[..., was * wide + j])
    assert same(permute(permuted, [permutation.inverse]).state_dict(), model.state_dict())
    assert permute(permuted, [permutation.inverse])[0].weight.dtype == dtype
    assert permutation.inverse.inverse == permutation


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.complex64, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dtype_device_layout_and_training_mode_stay(dtype: torch.dtype, device: str) -> None:
    model = nn.Conv2d(3, 4, 3, device=device).to(memory_format=torch.channels_last)
    model.register_buffer("table", torch.arange(4, device=device).to(dtype))
    model.weight.requires_grad_(False)
    permuted = permute(model.train(), [UnitPermutation(torch.tensor([3, 0, 1, 2]), rows=("weight", "bias", "table"))])
    assert permuted.table.dtype == dtype
    assert permuted.table.device == permuted.weight.device == torch.device(device)
    assert permuted.weight.stride() == model.weight.stride()
    assert (permuted.weight.requires_grad, permuted.bias.requires_grad, permuted.training) == (False, True, True)
    if device == "cpu":
        assert torch.equal(permuted.table.to(torch.complex64), torch.tensor([3, 0, 1, 2]).to(dtype).to(torch.complex64))


def test_tied_tensors_stay_tied_and_are_permuted_once() -> None:
    model, _, plan = trained(stream)
    permuted = permute(model, plan)
    assert permuted.head.weight is permuted.embed.weight
    assert torch.equal(permuted.embed.weight, model.embed.weight[:, plan[0].order])


def test_a_module_with_two_names_must_be_listed_by_both() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": layer})
    with pytest.raises(ValueError, match=re.escape("a.weight: (4, 4) is tied to ['b.weight']")):
        permute(model, [UnitPermutation(rotated(4), rows=("a.weight",))])
    assert torch.equal(permute(model, [UnitPermutation(rotated(4), rows=("a.weight", "b.weight"))])["b"].weight, layer.weight[rotated(4)])


# sorting --------------------------------------------------------------------------------------------------------------------


@given(st.data(), seeds)
def test_units_are_sorted_within_their_groups_by_the_sum_over_their_elements(data: st.DataObject, seed: int) -> None:
    groups, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    units, descending = groups * size, data.draw(st.booleans())
    generator, scores, want = torch.Generator().manual_seed(seed), {}, [0.0] * units
    for name, axis in (("up", 0), ("gate", 0), ("down", 1), ("conv", 1)):
        shape = [data.draw(st.integers(1, 4)) for _ in range(3 if name == "conv" else 2)]
        shape[axis] = units * data.draw(st.integers(1, 3))
        grid = bp.BlockGrid(shape, data.draw(grids_of(shape)))
        scores[name] = bp.BlockScore(torch.randint(-8, 9, grid.size, generator=generator).float(), grid)
        dense = reference.expand(scores[name].value, grid).double().transpose(0, axis).reshape(units, -1)
        want = [total + row.sum().item() for total, row in zip(want, dense, strict=True)]
    permutation = sort_units(
        scores, units=units, rows=("up", "gate", "bias"), columns=("down", "conv"), groups=groups, descending=descending
    )
    sorted_groups = [sorted(range(g * size, (g + 1) * size), key=lambda u: (-want[u] if descending else want[u], u)) for g in range(groups)]
    assert permutation.order.tolist() == pytest.approx([u for group in sorted_groups for u in group])
    assert (permutation.rows, permutation.columns) == (("up", "gate", "bias"), ("down", "conv"))


def grids_of(shape: Sequence[int]) -> st.SearchStrategy[list[int]]:
    return st.tuples(*(st.integers(1, s) for s in shape)).map(list)


def kept(model: nn.Module, block: Sequence[int], names: Sequence[str]) -> float:
    """The sum of |w| that remains after half of the blocks are pruned."""
    where = bp.first_of(*(bp.named(name, block) for name in names))
    masks = bp.allocate.per_layer(bp.metric.l1(bp.collect.weights(model, where=where)), 0.5)
    final = bp.finalize(bp.apply_masks(copy.deepcopy(model), masks))
    return sum(p.abs().sum().item() for name, p in final.named_parameters() if name in names)


def test_sorted_units_leave_more_weight_in_the_kept_blocks() -> None:
    """Every second hidden unit is a hundred times weaker, so a 16 x 16 block is weak only if it contains none of the strong ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    with torch.no_grad():
        model[0].weight[::2] *= 0.01
        model[2].weight[:, ::2] *= 0.01
    single = bp.first_of(bp.named("0.weight", (1, -1)), bp.named("2.weight", (-1, 1)))
    scores = bp.metric.l1(bp.collect.weights(model, where=single))
    permuted = permute(model, [sort_units(scores, units=64, rows=both("0"), columns=("2.weight",))])
    names, every = ("0.weight", "2.weight"), sum(model[i].weight.abs().sum().item() for i in (0, 2))
    assert kept(permuted, (16, 16), names) > 0.98 * every
    assert kept(model, (16, 16), names) < 0.6 * every
    x = torch.randn(5, 32)
    torch.testing.assert_close(permuted(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers and what it imports
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_a_llama_sorted_by_score_computes_the_same(kv: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=kv, initializer_range=0.3)).eval()

    def sort(model: nn.Module, *, whole_groups: bool) -> nn.Module:
        scores = bp.metric.l1(bp.collect.weights(model, where=bp.linears((1, 1))))
        plan = []
        for i in range(2):
            mlp, attn = f"model.layers.{i}.mlp", f"model.layers.{i}.self_attn"
            if whole_groups:  # first sort whole groups of heads, and the hidden units
                kvs = [f"{attn}.{letter}_proj.weight" for letter in "qkv"]
                plan.append(sort_units(scores, units=kv, rows=kvs, columns=[f"{attn}.o_proj.weight"]))
                ups = [f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"]
                plan.append(sort_units(scores, units=48, rows=ups, columns=[f"{mlp}.down_proj.weight"]))
            else:  # then sort the query heads within them
                qs = [f"{attn}.q_proj.weight"] if kv < 4 else [f"{attn}.{letter}_proj.weight" for letter in "qkv"]
                plan.append(sort_units(scores, units=4, rows=qs, columns=[f"{attn}.o_proj.weight"], groups=kv))
        return permute(model, plan)

    permuted = sort(sort(model, whole_groups=True), whole_groups=False)
    ids = torch.randint(31, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(permuted(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert not same(permuted.state_dict(), model.state_dict())
    assert type(permuted) is type(model)


# errors ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: UnitPermutation([1, 0]), TypeError, ["list", "int64", "torch.tensor([2, 0, 1])"]),
        (lambda: UnitPermutation(torch.tensor([1.0, 0.0])), TypeError, ["float32", "(2,)"]),
        (lambda: UnitPermutation(torch.zeros(2, 2).long()), TypeError, ["(2, 2)", "[units]"]),
        (lambda: UnitPermutation(torch.tensor([0, 2, 2])), ValueError, ["3 units", "lacks [1]"]),
        (lambda: UnitPermutation(torch.tensor([1, 2, 3])), ValueError, ["lacks [0]"]),
        (lambda: UnitPermutation(torch.tensor([0, -1])), ValueError, ["lacks [1]"]),
        (lambda: UnitPermutation(torch.tensor([]).long()), ValueError, ["0 units"]),
        (lambda: UnitPermutation(rotated(3), rows="0.weight"), TypeError, ["('0.weight',)"]),
        (lambda: UnitPermutation(rotated(3), columns="0.weight"), TypeError, ["('0.weight',)"]),
        (lambda: UnitPermutation(rotated(6), groups=4), ValueError, ["groups=4", "number of units, which is 6"]),
        (lambda: UnitPermutation(rotated(6), groups=2), ValueError, ["positions [2, 5]", "groups=2", "its group of 3"]),
        (lambda: UnitPermutation(rotated(3), rows=["a"], copies={"b": 2}), ValueError, ["copies={'b': 2}", "rows or columns"]),
        (lambda: UnitPermutation(rotated(3), rows=["a"], copies={"a": 0}), ValueError, ["copies={'a': 0}", "1 or more"]),
    ],
)
def test_an_invalid_order_is_an_error(make: Callable[[], UnitPermutation], error: type[Exception], says: list[str]) -> None:
    with pytest.raises(error) as caught:
        make()
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_a_permutation_keeps_its_order_when_the_callers_tensor_changes() -> None:
    order = torch.tensor([1, 0])
    permutation = UnitPermutation(order)
    order.zero_()
    assert permutation == UnitPermutation(torch.tensor([1, 0]))


GOOD = UnitPermutation(rotated(6), rows=both("0"), columns=["3.weight"])


@pytest.mark.parametrize(
    ("plan", "error", "says"),
    [
        (GOOD, TypeError, ["UnitPermutation, not a sequence", "[UnitPermutation("]),
        ([GOOD, "3.weight"], TypeError, ["sequence of UnitPermutation"]),
        ([GOOD, UnitPermutation(rotated(6), rows=["1.wieght"])], KeyError, ["plan[1]", "'1.wieght'", "'1.weight'"]),
        ([UnitPermutation(rotated(6), rows=["1.running_men"])], KeyError, ["'1.running_mean'"]),
        ([UnitPermutation(rotated(5), rows=["0.weight"])], ValueError, ["0.weight", "(6, 3, 3, 3)", "6 `rows`", "5 equal units"]),
        ([UnitPermutation(rotated(4), columns=["0.weight"])], ValueError, ["0.weight", "axis 1", "3 `columns`", "4 equal units"]),
        ([UnitPermutation(rotated(6), columns=["0.bias"])], ValueError, ["0.bias", "(6,)", "no axis 1"]),
        ([UnitPermutation(rotated(6), rows=["1.num_batches_tracked"])], ValueError, ["1.num_batches_tracked", "no axis 0"]),
        ([UnitPermutation(rotated(6), last=["1.num_batches_tracked"])], ValueError, ["1.num_batches_tracked", "no axis 0"]),
        ([UnitPermutation(rotated(6), last=["0.weight"])], ValueError, ["0.weight", "axis 3", "3 `last`"]),
        ([GOOD, UnitPermutation(rotated(3), rows=["0.bias"])], ValueError, ["0.bias: (6,)", "axis 0", "plan[0] and plan[1]", "twice"]),
        ([GOOD, GOOD], ValueError, ["0.weight", "plan[0] and plan[1]"]),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_an_error_before_the_model_is_copied(
    plan: list[UnitPermutation], error: type[Exception], says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = trained(convs)
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("the model was copied before the plan was checked"))
    with pytest.raises(error) as caught:
        permute(model, plan)
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_a_masked_model_must_be_finalized_first() -> None:
    model, inputs, plan = trained(mlp)
    masked = bp.apply_masks(model, {"4.weight": bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((3, 6), (3, 3)))})
    with pytest.raises(ValueError, match=re.escape("4.weight: the parameter (3, 6) is masked; permute before masking, or `finalize`")):
        permute(masked, plan)
    final = bp.finalize(masked)
    torch.testing.assert_close(run(permute(final, plan), inputs), run(masked, inputs), atol=1e-5, rtol=1e-5)


def test_a_tensor_that_is_tied_to_one_not_listed_is_an_error() -> None:
    model, _, _ = trained(stream)
    with pytest.raises(ValueError, match=re.escape("head.weight: (11, 6) is tied to ['embed.weight'], which plan[0] would change too")):
        permute(model, [UnitPermutation(rotated(6), columns=("head.weight", "up.weight"))])
    with pytest.raises(ValueError, match=re.escape("plan[0] and plan[1]")):
        permute(model, [UnitPermutation(rotated(6), columns=("head.weight", "embed.weight"))] * 2)


def test_a_weight_that_a_parametrization_computes_is_an_error_but_other_weights_are_not() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="computed by a parametrization"):
        permute(model, [UnitPermutation(rotated(6), rows=both("0"), columns=["1.weight"])])
    x, plan = torch.randn(3, 4), [UnitPermutation(rotated(2), rows=both("1"), columns=["2.weight"])]
    torch.testing.assert_close(run(permute(model, plan), [x]), run(model, [x]))
    assert list(parameter_refs(permute(model, plan))) == list(parameter_refs(model))


SCORES = {
    "a.weight": bp.BlockScore(torch.ones(3, 1), bp.BlockGrid((6, 4), (2, 4))),
    "b": bp.BlockScore(torch.ones(6), bp.BlockGrid((6,), (1,))),
}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"units": 6, "rows": ["a.wieght"]}, KeyError, ["a.wieght", "'a.weight'"]),
        ({"units": 6}, KeyError, ["no scores"]),
        ({"units": 4, "rows": ["a.weight"]}, ValueError, ["a.weight", "(6, 4)", "6 `rows`", "4 equal units"]),
        ({"units": 6, "columns": ["a.weight"]}, ValueError, ["a.weight", "4 `columns`", "6 equal units"]),
        ({"units": 6, "columns": ["b"]}, ValueError, ["b: its shape (6,) has no axis 1", "`columns`"]),
        ({"units": 6, "rows": ["b"], "groups": 4}, ValueError, ["units=6", "groups=4"]),
        ({"units": 6, "rows": ["b"], "groups": 0}, ValueError, ["groups=0"]),
        ({"units": 0, "rows": ["b"]}, ValueError, ["units=0"]),
        ({"units": 6, "rows": "b"}, TypeError, ["('b',)"]),
    ],
)
def test_units_that_cannot_be_sorted_are_an_error(options: dict[str, object], error: type[Exception], says: list[str]) -> None:
    with pytest.raises(error) as caught:
        sort_units(SCORES, **options)  # type: ignore[arg-type]
    assert all(part in str(caught.value) for part in says), str(caught.value)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_scores_that_are_not_finite_are_an_error(bad: float) -> None:
    score = bp.BlockScore(torch.tensor([1.0, bad]), bp.BlockGrid((2,), (1,)))
    with pytest.raises(ValueError, match=r"w: the scores of .* have NaN or infinite values"):
        sort_units({"w": score}, units=2, rows=["w"])


def two_layers() -> tuple[nn.Sequential, list[bp.UnitPermutation]]:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    return model, [bp.UnitPermutation(torch.tensor([2, 0, 1, 3]), rows=("0.weight",), columns=("2.weight",))]


def test_tensors_that_share_memory_are_not_reordered_in_place() -> None:
    model, plan = two_layers()
    model[2].weight.data = model[0].weight.data
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"shares its memory with 0\.weight; permute cannot change it in place"):
        bp.permute(model, plan, inplace=True)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="finalize cannot change it in place"):
        bp.finalize(bp.apply_masks(model, bp.recipes.magnitude(bp.named("0.weight", (2, 2)))(model, 0.5).masks), inplace=True)


def test_parts_of_one_memory_that_do_not_overlap_are_reordered_in_place() -> None:
    model, plan = two_layers()
    x, flat = torch.randn(3, 4), torch.randn(32)
    for layer, part in zip((model[0], model[2]), flat.view(2, 4, 4), strict=True):
        layer.weight.data = part
    expected = model(x)
    (axis,) = bp.find_axes(model, x)
    assert axis.rows == ("0.weight",)
    torch.testing.assert_close(bp.permute(model, plan, inplace=True)(x), expected)


def test_gradients_follow_their_units_in_place() -> None:
    model, plan = two_layers()
    x = torch.randn(3, 4)
    model(x).square().sum().backward()
    bp.permute(model, plan, inplace=True)
    gradients = [layer.weight.grad.clone() for layer in (model[0], model[2])]
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(gradients, [model[0].weight.grad, model[2].weight.grad])
