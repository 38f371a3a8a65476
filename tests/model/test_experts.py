"""Stacked experts as Linears: the same outputs in every layout, and back; repair with the routes of the dense model."""

import itertools
from functools import partial

import attrs
import pytest
import torch
from torch import Tensor, nn

import blockprune as bp
from blockprune import allocate, budgets, collect, export, metric, reconstruct, statistics
from blockprune.model.experts import Experts

LAYOUTS = [
    *itertools.product((True,), (True, False), (True, False), (True, False)),
    *itertools.product((False,), (True,), (True, False), (True, False)),
]


class Stacked(nn.Module):
    """Like the experts of transformers, computed token by token and expert by expert."""

    def __init__(self, gate: bool = True, concatenated: bool = True, transposed: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.has_gate, self.is_concatenated, self.is_transposed, self.has_bias, self.act_fn = (
            gate,
            concatenated,
            transposed,
            bias,
            nn.Tanh(),
        )
        tall, name = (10, "gate_up_proj") if gate else (5, "up_proj")
        for key, rows, columns in ((name, tall, 4), ("down_proj", 4, 5)):
            weight = torch.randn(3, rows, columns)
            self.register_parameter(key, nn.Parameter(weight.mT.contiguous() if transposed else weight))
            if bias:
                self.register_parameter(f"{key}_bias", nn.Parameter(torch.randn(3, rows)))

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return self.act_fn(gate) * up

    def forward(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        def product(name: str, e: int, x: Tensor) -> Tensor:
            weight = getattr(self, name)[e]
            y = x @ (weight if self.is_transposed else weight.mT)
            return y + getattr(self, f"{name}_bias")[e] if self.has_bias else y

        rows = []
        for i, token in enumerate(x):
            row = torch.zeros_like(token)
            for e, s in zip(chosen[i].tolist(), share[i], strict=True):
                up = product("gate_up_proj" if self.has_gate else "up_proj", e, token)
                row = row + s * product("down_proj", e, self._apply_gate(up) if self.has_gate else self.act_fn(up))
            rows.append(row)
        return torch.stack(rows)


def tokens(n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 4), torch.rand(n, 3).argsort(1)[:, :2], torch.rand(n, 2)


@pytest.mark.parametrize(("gate", "concatenated", "transposed", "bias"), LAYOUTS)
def test_the_same_outputs_and_back(gate: bool, concatenated: bool, transposed: bool, bias: bool) -> None:
    model = nn.Sequential(Stacked(gate, concatenated, transposed, bias)).double().eval()
    model[0].down_proj.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = [x.double() if x.is_floating_point() else x for x in tokens()]
    expected = model[0](*arguments)
    converted = bp.as_linears(model)
    torch.testing.assert_close(converted[0](*arguments), expected)
    assert isinstance(converted[0], Experts)
    linears = {name: m for name, m in converted.named_modules() if isinstance(m, nn.Linear)}
    assert [*linears][: 2 + gate] == [f"0.0.{name}" for name in ("gate_proj", "up_proj", "down_proj")[not gate :]]
    assert len(linears) == 3 * (2 + gate)
    assert all(m.weight.is_contiguous() and not m.training for m in linears.values())
    assert all(m.weight.requires_grad == ("down" not in name) for name, m in linears.items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    pruned = bp.finalize(
        bp.apply_masks(converted, allocate.per_layer(metric.l1(collect.weights(converted, where=bp.linears((1, 1)))), 0.5))
    )
    back = bp.from_linears(pruned, model)
    torch.testing.assert_close(back[0](*arguments), pruned[0](*arguments))
    assert [*back.state_dict()] == [*before]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert abs(float((back[0].down_proj == 0).double().mean()) - 0.5) < 0.02


def test_hooks_attributes_and_shared_modules_stay() -> None:
    model = nn.ModuleList([experts := Stacked().eval(), nn.ModuleList([experts])])
    experts.register_forward_hook(lambda module, args, output: 2 * output)
    arguments = tokens()
    converted = bp.as_linears(model)
    assert converted[0] is converted[1][0]
    torch.testing.assert_close(converted[0](*arguments), experts(*arguments))
    torch.testing.assert_close(bp.from_linears(converted, model)[0](*arguments), experts(*arguments))
    single = bp.as_linears(experts)
    torch.testing.assert_close(single(*arguments), experts(*arguments))
    torch.testing.assert_close(bp.from_linears(single, experts)(*arguments), experts(*arguments))


def test_an_expert_of_another_device_gives_nothing() -> None:
    experts = Stacked()
    x, chosen, share = tokens()
    chosen[:, 1] = 3
    single = experts(x, chosen[:, :1], share[:, :1])
    torch.testing.assert_close(bp.as_linears(experts)(x, chosen, share), single)


class Scaled(Stacked):
    def forward(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        return 2 * super().forward(x, chosen, share)


class Fewer(Stacked):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x


@pytest.mark.parametrize(
    ("kind", "why"), [(Scaled, "computes something else than its experts"), (Fewer, r"cannot be compared .*positional arguments")]
)
def test_what_computes_something_else_stays_as_it_is(kind: type[Stacked], why: str) -> None:
    model = nn.ModuleList([kind(), Stacked()])
    with pytest.warns(UserWarning, match=rf"0, a {kind.__name__}, {why}.*its experts stay stacked and cannot be repaired"):
        converted = bp.as_linears(model)
    assert [type(m) for m in converted] == [kind, Experts]
    back = bp.from_linears(converted, model)
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_model_without_values_becomes_linears_too() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Stacked())
    assert isinstance(bp.as_linears(model)[0], Experts)


def test_errors_name_the_remedy() -> None:
    model = nn.ModuleList([Stacked(), nn.Linear(2, 2)])
    masks = allocate.per_layer(metric.l1(collect.weights(model, where=bp.named("0.*proj", (1, 2, 2)))), 0.5)
    masked = bp.apply_masks(bp.as_linears(model), allocate.per_layer(metric.l1(collect.weights(model, where=bp.linears((2, 2)))), 0.5))
    with pytest.raises(ValueError, match=r"0, a Stacked, is parametrized; .*bp\.finalize"):
        bp.as_linears(bp.apply_masks(model, masks))
    tied = nn.ModuleList([Stacked(), Stacked()])
    tied[1].down_proj = tied[0].down_proj
    with pytest.raises(ValueError, match=r"0, a Stacked, shares a weight with 1.*untie"):
        bp.as_linears(tied)
    with torch.device("meta"):
        empty = nn.ModuleList([Stacked(), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"like cannot hold values: 0\.gate_up_proj is on the meta device"):
        bp.from_linears(bp.as_linears(empty), empty)
    with pytest.raises(ValueError, match=r"1 is parametrized; give a plain model: bp\.finalize"):
        bp.from_linears(masked, model)
    with pytest.raises(ValueError, match=r"not like bp\.as_linears\(like\): .*0\.0\.gate_proj\.weight.*like="):
        bp.from_linears(nn.Linear(2, 2), nn.ModuleList([Stacked()]))
    with pytest.raises(ValueError, match=r"not like bp\.as_linears\(like\): .*like="):
        bp.from_linears(bp.as_linears(nn.ModuleList([Stacked(), nn.Linear(2, 2)])), nn.ModuleList([Stacked(), nn.Linear(2, 3)]))


class Layer(nn.Module):
    """A Linear before a router and experts: pruning the Linear makes the router choose other experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts, self.router = nn.Linear(4, 4), Stacked(), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.first(x)
        share, chosen = (h @ self.router.mT).softmax(-1).topk(2)
        return h + self.experts(h, chosen, share)


@pytest.mark.parametrize("padded", [False, True])
def test_experts_are_compared_on_the_tokens_that_the_dense_router_chose(padded: bool) -> None:
    torch.manual_seed(0)
    counts = torch.arange(20) < (14 if padded else 20)
    model = bp.as_linears(nn.Sequential(Layer(), Layer())).double()
    batches = list(torch.randn(4, 20, 4).double())
    targets: dict[str, Tensor] = {}
    order: list[list[str]] = []

    def repair(data: bp.Data, masks: bp.Masks) -> bp.Weights:
        order.append(sorted(data))
        targets.update({name: p.stats["input_cross"] for name, p in data.items()})
        return reconstruct.least_squares(data, masks, damping=0.1, progress=False)

    collector = partial(collect.with_statistics, where=bp.linears((2, 2)), statistics=[statistics.input_gram])
    pipeline = bp.Pipeline(collector, partial(metric.obs, progress=False), allocate.per_layer)
    result = bp.sequential(model, pipeline, repair, batches, 0.5, token_weights=lambda _: counts, progress=False)
    ups = [f"experts.{e}.{name}.weight" for e in range(3) for name in ("gate_proj", "up_proj")]
    downs = [f"experts.{e}.down_proj.weight" for e in range(3)]
    assert order == [[f"{i}.{name}" for name in names] for i in range(2) for names in (["first.weight"], ups, downs)]

    pruned = bp.finalize(bp.apply_masks(bp.as_linears(model), result.masks, result.weights))
    others = 0
    for number in range(3):
        sums, n = torch.zeros(4, 5).double(), 0
        for x in batches:
            h, g = x + model[0].first(x), x + pruned[0].first(x)
            chosen, now = (((y @ model[0].router.mT).topk(2).indices == number).any(1) for y in (h, g))
            others += int((chosen != now).sum())
            token = torch.where(chosen & counts)[0]
            sums += h[token].mT @ torch.cat([g[token], torch.ones(len(token), 1).double()], 1)
            n += len(token)
        torch.testing.assert_close(targets[f"0.experts.{number}.up_proj.weight"][0], sums / n)
    assert others, "the router chose the same experts, so this test shows nothing"
    sparse = export.block_sparse(bp.apply_masks(model, result.masks, result.weights), backend="torch")
    torch.testing.assert_close(sparse(batches[0]), pruned(batches[0]))


def test_padding_does_not_count_in_experts_either() -> None:
    torch.manual_seed(0)
    model = bp.as_linears(Layered()).double()
    x, mask = torch.randn(3, 6, 4).double(), torch.ones(3, 6).long()
    mask[0, 4:], mask[2, :3] = 0, 0
    collected = [statistics.input_gram, statistics.input_sq, statistics.output_grad_sq, statistics.output_grad_gram]
    collector = partial(collect.with_statistics, model, where=bp.linears((2, 1)), statistics=collected, progress=False)
    got = collector(batches=[{"x": x, "attention_mask": mask}], loss=lambda y, _: (y * mask[..., None]).square().sum())
    expected = collector(batches=[{"x": x[mask > 0][None]}], loss=lambda y, _: y.square().sum())
    for name, p in expected.items():
        for key, value in p.stats.items():
            torch.testing.assert_close(got[name].stats[key], value)


class Sent(nn.Module):
    """The last feature of each token is the number of its expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Stacked()
        with torch.no_grad():
            for p in self.experts.parameters():
                p.copy_(p[:1].expand_as(p))  # all experts are equal

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(x[:, :4], x[:, 4:].long(), torch.ones(len(x), 1).to(x))
        return y


def test_a_budget_takes_more_from_experts_that_fewer_tokens_choose() -> None:
    torch.manual_seed(0)
    model = bp.as_linears(Sent()).double()
    x = torch.cat([torch.randn(70, 4), torch.tensor([0] * 10 + [1] * 40 + [2] * 20)[:, None]], 1).double()
    collected = [statistics.input_gram, statistics.output_grad_gram]
    data = collect.with_statistics(
        model, where=bp.linears((1, 1)), statistics=collected, batches=[x], loss=lambda y, _: y.square().sum(), progress=False
    )
    budget = budgets.loss_weighted(metric.obs(data, progress=False), 0.5, max_sparsity=0.95)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert budget[f"experts.0.{name}.weight"] > budget[f"experts.2.{name}.weight"] > budget[f"experts.1.{name}.weight"]


def test_an_expert_that_the_first_batch_does_not_choose_sees_all_its_tokens() -> None:
    torch.manual_seed(0)
    model = bp.as_linears(nn.Sequential(Layer())).double()
    batches = list(torch.randn(40, 2, 4).double())

    def chosen(x: Tensor) -> Tensor:
        return ((x + model[0].first(x)) @ model[0].router.mT).topk(2).indices

    batches.sort(key=lambda x: int((chosen(x) == 2).sum()))
    assert not (chosen(batches[0]) == 2).any()
    rows: dict[str, Tensor] = {}

    def repair(data: bp.Data, masks: bp.Masks) -> bp.Weights:
        rows.update({name: p.stats["rows"] for name, p in data.items()})
        return {name: p.weight for name, p in data.items()}

    count = statistics.Statistic(
        "rows",
        source="inputs",
        init=lambda ref, param: {"n": torch.zeros(())},
        update=lambda sums, call: {"n": sums["n"] + len(call.inputs[0])},
        compute=lambda sums, ref, param: sums["n"],
    )
    collector = partial(collect.with_statistics, where=bp.linears((2, 2)), statistics=[statistics.input_gram, count])
    bp.sequential(
        model, bp.Pipeline(collector, partial(metric.obs, progress=False), allocate.per_layer), repair, batches, 0.0, progress=False
    )
    for number in range(3):
        expected = sum(int((chosen(x) == number).sum()) for x in batches)
        assert {int(n) for name, n in rows.items() if f"experts.{number}." in name} == {expected}


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(x.flatten(0, 1))
        return y.view_as(x)


def test_hidden_units_of_all_experts_and_the_stream_are_found_whatever_the_router_says() -> None:
    torch.manual_seed(0)
    model = bp.as_linears(nn.Sequential(nn.Linear(3, 4), Layer(), Layer(), nn.Linear(4, 2))).double()
    with torch.no_grad():
        model[1].router[2] = 0
        model[1].router[:2].abs_()
        model[0].bias.fill_(1)
        model[0].weight.mul_(0.1)
        model[1].first.weight.abs_()
    x = torch.randn(9, 3).double()
    assert not ((model[0](x) + model[1].first(model[0](x))) @ model[1].router.mT).topk(2).indices.eq(2).any()
    axes = bp.find_axes(model, x, progress=False)
    assert [len(s.order) for s in axes] == [4, *[5] * 6]
    assert {"1.router", "2.router"} <= {*axes[0].columns}
    hidden = {f"{i}.experts.{e}.down_proj.weight" for i in (1, 2) for e in range(3)}
    assert {name for s in axes[1:] for name in s.columns} == hidden
    permuted = bp.permute(model, [attrs.evolve(s, order=torch.randperm(len(s.order))) for s in axes])
    with torch.no_grad():
        before = model[1].router.clone()
        model[1].router.neg_()  # now it chooses other experts
        permuted[1].router.neg_()
    assert not torch.equal(before, model[1].router)
    torch.testing.assert_close(permuted(x), model(x))
    torch.testing.assert_close(permuted(-x), model(-x))
