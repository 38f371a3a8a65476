"""Rules choose parameters by name and owner; a parameter keeps one name, masked or not, shared or not."""

import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import blockprune as bp
from blockprune.model.parameters import find_parameters, parameter_refs
from blockprune.model.selection import select


class Scaled(nn.Linear):
    """A subclass, as adapters and frameworks make them."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Scaled(8, 12))
        self.head = nn.Linear(12, 4)
        self.norm = nn.BatchNorm1d(4)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.decode = nn.Linear(4, 10)
        self.decode.weight = self.embed.weight


def chosen(model: nn.Module, rule: bp.Where) -> dict[str, tuple[int, ...]]:
    return {name: grid.block for name, (_, grid) in select(model, rule).items()}


def masked(model: nn.Module, rule: bp.Where, seed: int = 0) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    return bp.apply_masks(model, {n: bp.BlockMask(torch.rand(g.size, generator=rng) < 0.5, g) for n, (_, g) in select(model, rule).items()})


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (bp.linears((4, 4)), {"body.0.weight": (4, 4), "body.2.weight": (4, 4), "head.weight": (4, 4)}),
        (bp.linears([2]), {"body.0.weight": (2, 8), "body.2.weight": (2, 8), "head.weight": (2, 12)}),
        (bp.convs((1,)), {"stem.weight": (1, 3, 3, 3)}),
        (bp.named("body.*.weight", (2, 2)), {"body.0.weight": (2, 2), "body.2.weight": (2, 2)}),
        (bp.named(re.compile(r"^(stem|head)\.w"), (2,)), {"stem.weight": (2, 3, 3, 3), "head.weight": (2, 12)}),
        (bp.named("*.bias", (2,)), {"stem.bias": (2,), "body.0.bias": (2,), "body.2.bias": (2,), "head.bias": (2,), "norm.bias": (2,)}),
        (bp.first_of(bp.named("head.weight", (1, 2)), bp.linears((4, 4)), bp.convs((4,))),
         {"stem.weight": (4, 3, 3, 3), "body.0.weight": (4, 4), "body.2.weight": (4, 4), "head.weight": (1, 2)}),
        (bp.excluding(bp.linears((4, 4)), "head.*"), {"body.0.weight": (4, 4), "body.2.weight": (4, 4)}),
        (bp.excluding(bp.linears((4, 4)), re.compile("^body")), {"head.weight": (4, 4)}),
        (bp.including(bp.linears((4, 4)), "body.*"), {"body.0.weight": (4, 4), "body.2.weight": (4, 4)}),
        (bp.including(bp.linears((4, 4)), re.compile("^h"), "body.2.*"), {"body.2.weight": (4, 4), "head.weight": (4, 4)}),
        (bp.excluding(bp.including(bp.linears((4, 4)), "body.*"), "*.2.*"), {"body.0.weight": (4, 4)}),
        (bp.with_block(bp.excluding(bp.linears((4, 4)), "body.2.*"), (1, 2)), {"body.0.weight": (1, 2), "head.weight": (1, 2)}),
        (bp.with_block(bp.first_of(bp.named("head.weight", (1, 2)), bp.convs((4,))), [2]),
         {"stem.weight": (2, 3, 3, 3), "head.weight": (2, 12)}),
        (lambda name, owner: (3,) if type(owner) is nn.BatchNorm1d and name.endswith("weight") else None, {"norm.weight": (3,)}),
    ],
)  # fmt: skip
def test_a_rule_chooses_by_name_and_owner(rule: bp.Where, expected: dict[str, tuple[int, ...]]) -> None:
    assert chosen(Net(), rule) == expected


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"op_types": ["Linear"]}, bp.linears((2, 2))),
        ({"op_names": ["body.0", "head"]}, bp.first_of(bp.named("body.0.weight", (2, 2)), bp.named("head.weight", (2, 2)))),
        ({"op_partial_names": ["body"]}, bp.named("body*weight", (2, 2))),
        ({"op_types": ["Linear"], "exclude": ["head"]}, bp.excluding(bp.linears((2, 2)), "head.*")),
    ],
)
def test_what_an_nni_config_says_is_one_rule(config: dict[str, list[str]], rule: bp.Where) -> None:
    def nni(name: str, module: nn.Module) -> bool:
        by_type = nn.Linear in type(module).__mro__ if "op_types" in config else True
        by_name = name in config["op_names"] if "op_names" in config else True
        by_part = any(part in name for part in config["op_partial_names"]) if "op_partial_names" in config else True
        return hasattr(module, "weight") and by_type and by_name and by_part and name not in config.get("exclude", [])

    assert set(chosen(Net(), rule)) == {f"{name}.weight" for name, module in Net().named_modules() if nni(name, module)}


@pytest.mark.parametrize(
    ("owner", "shape"),
    [
        (nn.Conv1d(4, 6, 3), (6, 4, 3)),
        (nn.Conv2d(4, 6, 3, groups=2), (6, 2, 3, 3)),
        (nn.Conv3d(2, 4, 2), (4, 2, 2, 2, 2)),
        (nn.ConvTranspose1d(4, 6, 3), (4, 6, 3)),
        (nn.ConvTranspose2d(4, 6, 3), (4, 6, 3, 3)),
        (nn.ConvTranspose3d(2, 4, 2), (2, 4, 2, 2, 2)),
    ],
)
def test_convs_means_every_convolution_and_a_model_may_be_one(owner: nn.Module, shape: tuple[int, ...]) -> None:
    (ref, grid) = select(owner, bp.convs((1,)))["weight"]
    assert (ref.owner, ref.name, grid) == (owner, "weight", bp.BlockGrid(shape, (1,)))


def test_attention_recurrent_and_embedding_weights_have_names_and_blocks() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert chosen(attention, bp.linears((4, 4))) == {"out_proj.weight": (4, 4)}
    assert chosen(attention, bp.named("*proj*weight", (4, 4))) == {"in_proj_weight": (4, 4), "out_proj.weight": (4, 4)}
    assert chosen(nn.LSTM(4, 4, num_layers=2), bp.named("weight_hh_*", (4, -1))) == {"weight_hh_l0": (4, 4), "weight_hh_l1": (4, 4)}
    assert chosen(nn.Embedding(10, 4), bp.named("weight", (3, 2))) == {"weight": (3, 2)}


MODELS = [
    (Net, bp.first_of(bp.linears((2, 2)), bp.convs((1,)))),
    (lambda: nn.Linear(4, 4), bp.linears((2, 2))),
    (Tied, bp.named("embed.weight", (2, 2))),
    (lambda: nn.LSTM(4, 4), bp.named("weight_*", (2, 2))),
    (lambda: nn.MultiheadAttention(8, 2), bp.named("*weight", (2, 2))),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), bp.named("bias", (2,))),
]


@pytest.mark.parametrize(("make", "rule"), MODELS)
def test_masking_changes_no_name_no_order_and_no_choice(make: type[nn.Module], rule: bp.Where) -> None:
    plain, model = make(), masked(make(), rule)
    assert list(parameter_refs(model)) == list(parameter_refs(plain))
    assert [[s.name for s in refs] for refs in parameter_refs(model).values()] == [
        [s.name for s in refs] for refs in parameter_refs(plain).values()
    ]
    assert chosen(model, rule) == chosen(plain, rule)


@pytest.mark.parametrize(("make", "rule"), MODELS[:5])
def test_names_are_those_of_named_parameters(make: type[nn.Module], rule: bp.Where) -> None:
    plain, model = make(), make()
    masked(model, rule)
    assert list(parameter_refs(model)) == [name for name, _ in plain.named_parameters()]


def test_a_tied_tensor_goes_by_its_first_name_and_all_its_places_are_known() -> None:
    assert chosen(Tied(), bp.named("*.weight", (2, 2))) == {"embed.weight": (2, 2)}
    assert [ref.name for ref in parameter_refs(Tied())["embed.weight"]] == ["embed.weight", "decode.weight"]
    for rule in (bp.linears((2, 2)), bp.named("decode.weight", (2, 2))):  # the first name's owner decides
        with pytest.raises(ValueError, match=r"'decode\.weight' is tied to 'embed\.weight'"):
            select(Tied(), rule)


@pytest.mark.parametrize("pattern", ["embed.*", "decode.weight", re.compile("^dec")])
def test_a_tied_tensor_is_left_out_by_any_of_its_names(pattern: Any) -> None:
    model = nn.Sequential(Tied(), nn.Linear(4, 4))
    pattern = f"0.{pattern}" if isinstance(pattern, str) else re.compile("dec")
    everything = bp.named("*.weight", (2, 2))
    assert chosen(model, everything) == {"0.embed.weight": (2, 2), "1.weight": (2, 2)}
    assert chosen(model, bp.excluding(everything, pattern)) == {"1.weight": (2, 2)}
    inside = bp.including(bp.with_block(bp.excluding(everything, pattern), (4, 4)), "*.weight")
    assert chosen(model, inside) == {"1.weight": (4, 4)}
    assert chosen(model, bp.first_of(inside, everything)) == {"0.embed.weight": (2, 2), "1.weight": (4, 4)}


def test_a_rule_by_type_chooses_the_weight_and_no_other_parameter_whose_name_ends_alike() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    for layer in model:
        layer.scale_weight = nn.Parameter(torch.ones(4, 4))
    for rule, name in ((bp.linears((2,)), "0.weight"), (bp.convs((2,)), "1.weight"), (bp.batchnorms(), "2.weight")):
        assert list(chosen(model, rule)) == [name]


def test_a_module_used_twice_is_known_by_both_names() -> None:
    model = nn.Module()
    model.one = model.two = nn.Linear(4, 4)
    assert [ref.name for ref in parameter_refs(model)["one.weight"]] == ["one.weight", "two.weight"]
    with pytest.raises(ValueError, match=r"'two\.weight' is tied to 'one\.weight'"):
        select(model, bp.named("two.weight", (2, 2)))


def test_find_gives_the_places_by_canonical_name() -> None:
    assert list(find_parameters(Tied(), ["decode.weight"], what="masks")) == ["embed.weight"]
    with pytest.raises(KeyError) as caught:
        find_parameters(Tied(), ["embed.weight", "decode.weight"], what="masks")
    assert not [p for p in ("masks names one tied tensor twice", "'decode.weight'", "'embed.weight'", "once") if p not in str(caught.value)]
    with pytest.raises(KeyError) as caught:
        find_parameters(Tied(), ["embed.wieght"], what="masks")
    assert not [p for p in ("masks names 'embed.wieght'", "not a parameter", "'embed.weight'") if p not in str(caught.value)]


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (bp.linears((16, 4)), ["body.0.weight", "(8, 8)", "block=(16, 4)", "axis 0 has 8 elements", "leaving an axis out"]),
        (bp.linears((4, 0)), ["body.0.weight", "(8, 8)", "block=(4, 0)", "1 <= block[i]"]),
        (bp.linears((4, 4, 4)), ["body.0.weight", "(8, 8)", "has 3 axes", "has 2"]),
        (bp.named("*.weigth", (4, 4)), ["'*.weigth'", "matches no parameter", "similar names: "]),
        (bp.named("head.wieght", (4, 4)), ["'head.wieght'", "'head.weight'"]),
        (bp.named(re.compile("haed"), (4, 4)), ["haed", "matches no parameter"]),
        (bp.first_of(bp.linears((4, 4)), bp.named("steem.weight", (4,))), ["'steem.weight'", "'stem.weight'"]),
        (bp.including(bp.linears((4, 4)), "head.*", "haed.weight"), ["'haed.weight'", "'head.weight'"]),
        (bp.excluding(bp.linears((4, 4)), "haed.weight"), ["'haed.weight'", "'head.weight'"]),
        (bp.with_block(bp.named("haed.weight", (4, 4)), (1, 1)), ["'haed.weight'", "'head.weight'"]),
        (bp.with_block(bp.linears((1, 1)), (16, 4)), ["body.0.weight", "(8, 8)", "block=(16, 4)"]),
        (bp.excluding(bp.convs((4,)), "zzz.*"), ["'zzz.*' matches no parameter; its rule selects 'stem.weight'"]),
        (bp.including(bp.first_of(), "zzz.*"), ["'zzz.*' matches no parameter; the names are 'stem.weight', "]),
        (bp.excluding(bp.linears((4, 4)), "*"), ["matches no parameter of Net", "'stem.weight' (8, 3, 3, 3) of Conv2d", "linears"]),
        (bp.first_of(), ["matches no parameter of Net"]),
    ],
)
def test_a_rule_that_fits_nothing_or_badly_is_an_error_that_helps(rule: bp.Where, says: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        select(Net(), rule)
    assert not [part for part in says if part not in str(caught.value)]


@pytest.mark.parametrize(
    "rule",
    [
        bp.linears((16, 4)),
        bp.first_of(bp.convs((4,)), bp.linears((16, 4))),
        bp.excluding(bp.with_block(bp.linears((4, 4)), (16, 4)), re.compile("head")),
        bp.first_of(bp.norms_and_biases, bp.named("*.weight", (16, 4))),
    ],
)
def test_the_code_in_the_error_leaves_out_the_parameter_that_does_not_fit(rule: bp.Where) -> None:
    with pytest.raises(ValueError) as caught:
        select(model := Net(), rule)
    name = str(caught.value).partition(":")[0]
    where = eval(str(caught.value).rpartition("where=")[2], {"bp": bp, "re": re})
    assert where(name, model.get_submodule(name.rpartition(".")[0])) is None
    assert where("fc.weight", nn.Linear(32, 32)) == rule("fc.weight", nn.Linear(32, 32)) is not None


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (lambda: bp.linears(4), ["block=4", "(4, 4)"]),  # type: ignore[arg-type]
        (lambda: bp.named("*", "44"), ["block='44'", "integers"]),
        (lambda: bp.with_block(bp.linears((1, 1)), 4), ["block=4", "integers"]),  # type: ignore[arg-type]
        (lambda: bp.convs((2.0, 2)), ["block=(2.0, 2)", "integers"]),  # type: ignore[arg-type]
        (lambda: lambda name, owner: "44", ["stem.weight", "block='44'", "integers"]),  # one's own rule is asked for each parameter
    ],
)
def test_a_block_that_is_no_shape_is_an_error(rule: Callable[[], bp.Where], says: list[str]) -> None:
    with pytest.raises(TypeError) as caught:
        select(Net(), rule())
    assert not [part for part in says if part not in str(caught.value)]


def test_a_scalar_has_no_blocks_and_a_pattern_is_text_or_compiled() -> None:
    model = nn.ParameterDict({"gain": nn.Parameter(torch.tensor(1.0))})
    with pytest.raises(ValueError, match=r"gain.*shape=\(\).*at least one axis"):
        select(model, bp.named("gain", ()))
    with pytest.raises(TypeError, match=r"pattern=7.*glob.*re.compile"):
        bp.named(7, (1,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rule",
    [
        bp.first_of(bp.named(re.compile("head.w"), (1, 2)), bp.excluding(bp.linears((4, 4)), "head.*")),
        bp.with_block(bp.linears((4, 4)), (2, 2)),
    ],
)
def test_rules_are_values_that_pickle(rule: bp.Where) -> None:
    assert isinstance(rule, partial)
    assert chosen(Net(), pickle.loads(pickle.dumps(bp.first_of(rule, bp.convs((1,)))))) == chosen(Net(), bp.first_of(rule, bp.convs((1,))))


@given(st.lists(st.sets(st.sampled_from(["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])), max_size=4))
def test_masks_put_on_and_taken_off_in_any_order_leave_the_names_in_theirs(rounds: list[set[str]]) -> None:
    model, plain = nn.LSTM(4, 2), [name for name, _ in nn.LSTM(4, 2).named_parameters()]
    for names in rounds:
        grids = {name: bp.BlockGrid(tuple(find_parameters(model, [name], what="test")[name][0].stored.shape), (2,)) for name in names}
        bp.apply_masks(model, {name: bp.BlockMask(torch.ones(grid.size).bool(), grid) for name, grid in grids.items()})
        assert list(parameter_refs(model)) == plain
    assert [name for name, _ in bp.apply_masks(model, {}).named_parameters()] == plain


def test_excluding_takes_several_patterns() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    rule = bp.excluding(bp.linears((2, 2)), "0.*", re.compile(r"^2\."))
    assert list(bp.collect.weights(model, where=rule)) == ["1.weight"]


# Models and rules of other kinds.


@pytest.mark.parametrize("block", [(4, 4), [4, 4], "linears", None])
def test_a_block_instead_of_a_rule_is_refused_with_the_rule(block: Any) -> None:
    with pytest.raises(TypeError, match=r"where=.* must be a rule that selects parameters; .*where=bp.linears\("):
        select(nn.Linear(4, 4), block)


def test_a_lazy_layer_is_named_with_the_remedy() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0.weight: this weight of a lazy layer has no shape yet; run the model on one batch first"):
        select(model, bp.linears((2, 2)))
    assert list(select(model, bp.named("1.weight", (2, 2)))) == ["1.weight"]
    with pytest.raises(ValueError, match=r"'0.weight' \(no shape yet\) of LazyLinear"):
        select(model, bp.convs((2, 2)))
    model(torch.ones(2, 3))
    assert list(select(model, bp.linears((2, 2)))) == ["0.weight", "1.weight"]


class Wrapper(torch.Tensor):
    """A tensor subclass that shows other values than it stores, such as those of torchao."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)  # type: ignore[no-any-return,attr-defined]

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"{func}")


def test_quantized_weights_are_refused_before_their_shape_is_used() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)  # as bitsandbytes packs 4 bits
    with pytest.raises(TypeError, match=r"1.weight: the weight \(32, 1\) is torch.uint8.*`excluding`"):
        select(model, bp.linears((4, 4)))
    model[1].weight = nn.Parameter(Wrapper(torch.zeros(8, 8, dtype=torch.int8)), requires_grad=False)
    with pytest.raises(TypeError, match=r"1.weight: the weight \(8, 8\) is a Wrapper, a tensor subclass.*`excluding`"):
        select(model, bp.linears((4, 4)))
    assert list(select(model, bp.excluding(bp.linears((4, 4)), "1.*"))) == ["0.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_layers_that_are_scripted_or_quantized_say_why_no_rule_matches() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"where=linears\(block=\(4, 4\)\) matches no parameter .*before torch.jit.script"):
        select(torch.jit.script(model), bp.linears((4, 4)))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(ValueError, match=r"matches no parameter .*are quantized: prune the model before it is quantized"):
        select(quantized, bp.linears((4, 4)))


def test_a_stem_that_blocks_do_not_fit_comes_with_the_call_that_leaves_it_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"0.weight: block") as caught:
        select(model, bp.convs((4, 4)))
    call = str(caught.value).rpartition("where=")[2]
    assert call == "bp.excluding(bp.convs(block=(4, 4)), '0.weight')"
    assert list(select(model, eval(call))) == ["1.weight"]


class RMSNorm(nn.Module):
    """One of a user's own, with a gain of no axis besides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.ones(4)), nn.Parameter(torch.tensor(1.0))


class NormedLinear(nn.Linear):
    """Its name has "Norm" in it, but its weight is a matrix."""


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm((2, 3, 4)), ["weight", "bias"]),
        (nn.BatchNorm2d(4), ["weight", "bias"]),
        (nn.GroupNorm(2, 4), ["weight", "bias"]),
        (RMSNorm(), ["weight", "gain"]),
        (NormedLinear(4, 4), ["bias"]),
        (nn.PReLU(), []),
        (nn.ParameterDict({"scale": torch.ones(4)}), []),
        (nn.GRU(4, 4), ["bias_ih_l0", "bias_hh_l0"]),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_bias", "bias_k", "bias_v", "out_proj.bias"]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_norms_and_biases(module: nn.Module, expected: list[str]) -> None:
    refs = parameter_refs(module)
    assert [name for name, (ref, *_) in refs.items() if bp.norms_and_biases(name, ref.owner) is not None] == expected


def test_norms_and_biases_are_not_the_kept_values_of_an_exported_layer() -> None:
    model = bp.export.block_sparse(masked(nn.Sequential(nn.Linear(8, 8)), bp.linears((4, 4))), backend="torch", trainable=True)
    assert list(select(model, bp.norms_and_biases)) == ["0.bias"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: bp.first_of((2, 2)), r"rule=\(2, 2\) must be a rule .*: rule=bp.linears\(\(2, 2\)\)"),
        (lambda: bp.first_of(bp.linears, bp.convs((1,))), r"rule=linears makes rules and is none itself; call it"),
        (lambda: bp.including((2, 2), "*"), r"rule=\(2, 2\) must be a rule"),
        (lambda: bp.including(bp.linears((2, 2)), ["weight"]), r"pattern=\['weight'\] must be one pattern; give several"),
        (lambda: bp.excluding("x", bp.linears((2, 2))), "rule='x' must be a rule"),
        (lambda: bp.excluding(bp.linears((2, 2)), ["x"]), r"pattern=\['x'\] must be one pattern"),
        (lambda: bp.with_block((2, 2), (1, 1)), r"rule=\(2, 2\) must be a rule"),
        (lambda: bp.named(re.compile(b"w"), (1,)), r"pattern=re.compile\(b'w'\) must be a glob"),
        (lambda: select(nn.Linear(4, 4), bp.linears), r"where=linears makes rules and is none itself; call it, such as where=bp.linears"),
        (lambda: select(nn.Linear(4, 4), bp.convs), "where=convs makes rules"),
        (lambda: select(nn.Linear(4, 4), lambda name: (2, 2)), r"where=<lambda> must be a function \(parameter name, its module\) -> "),
    ],
)  # fmt: skip
def test_what_is_no_rule_is_named_with_what_would_do(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        make()


def test_a_name_that_looks_like_a_pattern_names_its_parameter() -> None:
    model = nn.ModuleDict({"in[0]": nn.Linear(3, 8), "out": nn.Linear(8, 8)})
    for rule in (bp.excluding(bp.linears((4, 4)), "in[0].weight"), bp.named("out.weight", (4, 4))):
        assert bp.collect.weights(model, where=rule).keys() == {"out.weight"}
    assert bp.collect.weights(model, where=bp.named("in[0].weight", (4, 3))).keys() == {"in[0].weight"}
    assert bp.collect.weights(model, where=bp.including(bp.linears((1, 1)), "in[0].weight")).keys() == {"in[0].weight"}
