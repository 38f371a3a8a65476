"""Distilling keeps masks, changes neither model nor teacher, resumes to the bit, and brings the student closer to the teacher."""

import copy
import os
import re
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import blockprune as bp
from blockprune import export, losses

SGD = partial(torch.optim.SGD, lr=0.05)
ADAM = partial(torch.optim.AdamW, lr=1e-2)


class Tied(nn.Module):
    """A small language model whose head is its embedding, with a module under two names, dropout, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 8))
        self.again = self.body
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.again(self.body(self.embedding(tokens)))
        return self.head(self.norm(x.mT).mT)  # type: ignore[no-any-return]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def tokens(count: int, seed: int = 1) -> list[Tensor]:
    return list(torch.randint(12, (count, 4, 6), generator=torch.Generator().manual_seed(seed)))


def problem() -> tuple[nn.Module, dict[str, bp.BlockMask], list[Tensor]]:
    model = seeded(Tied).eval()
    where = bp.first_of(bp.linears((4, 4)), bp.named("embedding.weight", (4, 4)))
    return model, dict(bp.recipes.magnitude(where)(model, 0.5).masks), tokens(8)


def fingerprint(model: nn.Module) -> list[Any]:
    """All that a function could change of a model, and the random numbers that come next."""
    tensors = [(name, x.clone(), x.requires_grad, getattr(x, "grad", None)) for name, x in model.state_dict(keep_vars=True).items()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [tensors, [module.training for module in model.modules()], hooks, torch.get_rng_state()]


def same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    return len(x) == len(y) and all(map(same, x, y)) if isinstance(x, (list, tuple)) else bool(x == y)


def pruned_values_are_zero(weights: dict[str, Tensor], masks: dict[str, bp.BlockMask]) -> bool:
    return all(not weights[name][~bp.expand(mask.keep, mask.grid)].count_nonzero() for name, mask in masks.items() if name in weights)


def kl_to(teacher: nn.Module, model: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float(losses.kl(model(x), teacher(x))) for x in batches) / len(batches)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train": True},
        {"where": bp.norms_and_biases},
        {"lora_rank": 2, "optimizer": partial(torch.optim.Adam, lr=0.02)},
        {"autocast": torch.bfloat16},
        {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1), "accumulate": 2},
    ],
    ids=lambda options: ", ".join(options) or "all",
)
def test_masks_hold_and_the_student_comes_closer_and_nothing_else_changes(options: dict[str, Any]) -> None:
    model, masks, batches = problem()
    teacher = copy.deepcopy(model).train()
    for p in teacher.parameters():
        p.requires_grad_(False)
    before = [fingerprint(m) for m in (model, teacher)]
    held_out = tokens(2, seed=9)
    options = {"optimizer": ADAM, "steps": 40, **options}
    weights = bp.distill(model, masks, None, batches, teacher=teacher, loss=losses.kl, held_out=held_out, every=10, **options)
    assert same([fingerprint(m) for m in (model, teacher)], before)
    assert pruned_values_are_zero(weights, masks)
    assert "head.weight" not in weights
    pruned, recovered = (bp.apply_masks(copy.deepcopy(model), masks, w) for w in (None, weights))
    assert kl_to(model, recovered, held_out) < kl_to(model, pruned, held_out)
    assert all(type(x) is Tensor and not x.requires_grad for x in weights.values())


def test_only_what_where_chooses_changes() -> None:
    model, masks, batches = problem()
    options = {"teacher": model, "loss": losses.kl, "steps": 2}
    assert set(bp.distill(model, masks, None, batches, **options, where=bp.norms_and_biases)) == {
        "body.0.bias", "body.3.bias", "norm.weight", "norm.bias",
    }  # fmt: skip
    assert set(bp.distill(model, masks, None, batches, **options, where="*.0.*")) == {"body.0.weight", "body.0.bias"}
    given = {"head.weight": torch.ones(12, 8)}  # a tied tensor has its first name
    weights = bp.distill(model, masks, given, batches, **options, where=["norm.bias"])
    assert set(weights) == {"norm.bias", "embedding.weight"}
    assert torch.equal(weights["embedding.weight"], bp.expand(masks["embedding.weight"].keep, masks["embedding.weight"].grid).float())


def test_one_step_is_the_step_of_a_plain_loop() -> None:
    """The obvious twin: a masked model, torch's optimizer, one step after the other."""
    model, masks, batches = problem()
    student = bp.apply_masks(copy.deepcopy(model), masks)
    optimizer = SGD(student.parameters())
    for x in batches[:3]:
        optimizer.zero_grad()
        losses.kl(student(x), model(x)).backward()
        optimizer.step()
    expected = bp.finalize(student)
    options = {"teacher": model, "loss": losses.kl, "optimizer": SGD, "steps": 3, "clip": None, "final_lr": 1.0}
    weights = bp.distill(model, masks, None, batches, **options)
    for name, x in weights.items():
        torch.testing.assert_close(x, expected.get_parameter(name).detach())
    masked = bp.apply_masks(copy.deepcopy(model), masks)
    assert same(bp.distill(masked, None, None, batches, **options), weights)


def test_accumulated_gradients_are_those_of_one_large_batch() -> None:
    model, masks, batches = problem()
    options = {"teacher": model, "loss": losses.kl, "optimizer": SGD, "steps": 2}
    parts = bp.distill(model, masks, None, batches[:4], **options, accumulate=2)
    whole = bp.distill(model, masks, None, [torch.cat(batches[:2]), torch.cat(batches[2:4])], **options)
    for name, x in parts.items():
        torch.testing.assert_close(x, whole[name])


@pytest.mark.parametrize(
    "options", [{}, {"lora_rank": 2}, {"accumulate": 3}, {"optimizer": bp.muon}], ids=lambda options: ", ".join(options) or "plain"
)
def test_a_resumed_run_ends_in_the_same_bits(options: dict[str, Any], tmp_path: Any) -> None:
    """With dropout, a loader that shuffles, held-out batches and a file in between."""
    model, masks, batches = problem()
    loader = DataLoader(torch.cat(batches), batch_size=4, shuffle=True)  # type: ignore[arg-type]
    held_out = DataLoader(torch.cat(tokens(2, seed=9)), batch_size=4, shuffle=True)  # type: ignore[arg-type]
    options = {"teacher": model, "loss": losses.kl, "optimizer": ADAM, "steps": 13, "warmup": 2, "train": True, "every": 5, **options}
    options["held_out"] = held_out
    states: list[bp.DistillState] = []

    def keep(state: bp.DistillState) -> None:
        torch.rand(1)  # a callback may use random numbers
        torch.save(attrs.asdict(state, recurse=False), tmp_path / f"{state.step}.pt")
        states.append(state)

    weights = bp.distill(model, masks, None, loader, **options, callback=keep)
    assert [state.step for state in states] == [5, 10, 13]
    assert [entry[0] for entry in states[-1].history] == [0, 5, 10, 13]
    assert same(weights, dict(states[-1].best))
    for step in (5, 10, 13):
        state = bp.DistillState(**torch.load(tmp_path / f"{step}.pt", weights_only=True))
        later: list[bp.DistillState] = []
        assert same(bp.distill(model, masks, None, loader, **options, resume=state, callback=later.append), weights)
        if later:
            assert same(attrs.asdict(later[-1], recurse=False), attrs.asdict(states[-1], recurse=False))


def test_the_best_weights_are_returned_and_training_stops_early() -> None:
    model, masks, batches = problem()
    states: list[bp.DistillState] = []
    diverging = partial(torch.optim.SGD, lr=50.0)
    options = {"teacher": model, "loss": losses.kl, "optimizer": diverging, "held_out": batches[:2], "every": 1, "steps": 50}
    weights = bp.distill(model, masks, None, batches, **options, clip=None, patience=1, callback=states.append)
    assert len(states) == 2
    assert all(entry[3] >= states[-1].best_loss for entry in states[-1].history)  # type: ignore[operator]
    kept = {name: bp.finalize(bp.apply_masks(copy.deepcopy(model), masks)).get_parameter(name).detach() for name in weights}
    assert same(weights, kept)


def test_the_learning_rate_rises_and_falls() -> None:
    model, masks, batches = problem()
    rates = []

    class Recorded(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return Recorded([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 0.1}])

    bp.distill(model, masks, None, batches, teacher=model, loss=losses.kl, optimizer=optimizer, steps=6, warmup=2, final_lr=0.2)
    first = [rate[0] for rate in rates]
    assert first[:3] == [0.5, 1.0, 1.0]
    assert first[4] == pytest.approx(0.6)  # halfway along the cosine
    assert sorted(first[2:], reverse=True) == first[2:]
    assert [rate[1] for rate in rates] == pytest.approx([rate / 10 for rate in first])


def test_optimizers_that_share_out_the_parameters_are_as_one_with_groups() -> None:
    model, masks, batches = problem()

    def groups(parameters: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.01}]

    options = {"teacher": model, "loss": losses.kl, "steps": 5, "warmup": 2}
    expected = bp.distill(model, masks, None, batches, **options, optimizer=lambda parameters: torch.optim.SGD(groups(parameters)))
    several = bp.distill(
        model, masks, None, batches, **options, optimizer=lambda parameters: [torch.optim.SGD([group]) for group in groups(parameters)]
    )
    assert same(several, expected)


def test_a_state_of_other_optimizers_is_refused() -> None:
    model, masks, batches = problem()
    states: list[bp.DistillState] = []
    call = partial(bp.distill, model, masks, None, batches, teacher=model, loss=losses.kl, steps=2)
    call(optimizer=bp.muon, callback=states.append)
    with pytest.raises(ValueError, match="its state is of Muon, AdamW, not SGD; give optimizer= of the first call"):
        call(optimizer=SGD, resume=states[0])


def test_a_state_of_a_later_step_is_refused() -> None:
    model, masks, batches = problem()
    states: list[bp.DistillState] = []
    call = partial(bp.distill, model, masks, None, batches, teacher=model, loss=losses.kl)
    last = call(steps=3, callback=states.append)
    with pytest.raises(ValueError, match="resume: its state is of step 3, after steps=2; give more steps"):
        call(steps=2, resume=states[-1])
    assert same(call(steps=3, resume=states[-1]), last)


def test_muon_takes_the_weights_of_linears_and_keeps_the_masks() -> None:
    model, masks, batches = problem()
    wide = nn.Embedding(64, 2).weight
    first, second = bp.muon([*nn.Linear(8, 4).parameters(), wide], lr=0.5)
    assert [p.shape for p in first.param_groups[0]["params"]] == [(4, 8)]
    assert [p.shape for p in second.param_groups[0]["params"]] == [(4,), (64, 2)]
    assert [isinstance(optimizer, torch.optim.Muon) for optimizer in bp.muon([nn.Linear(2, 2).weight])] == [True]
    with pytest.raises(ValueError, match=r"no matrix for Muon.* among 1"):
        bp.muon([wide])
    weights = bp.distill(model, masks, None, batches, teacher=model, loss=losses.kl, optimizer=bp.muon, steps=8)
    assert pruned_values_are_zero(weights, masks)
    pruned, recovered = (bp.apply_masks(copy.deepcopy(model), masks, w) for w in (None, weights))
    assert kl_to(model, recovered, batches) < kl_to(model, pruned, batches)


def test_half_precision_weights_are_trained_in_float32_and_come_back_in_their_own() -> None:
    model, masks, batches = problem()
    half = copy.deepcopy(model).bfloat16()
    states: list[bp.DistillState] = []
    small = partial(torch.optim.SGD, lr=1e-4)  # too small a step for bfloat16
    weights = bp.distill(half, masks, None, batches, teacher=model, loss=losses.kl, optimizer=small, every=4, callback=states.append)
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}
    assert pruned_values_are_zero(weights, masks)
    moved = [not torch.equal(x.bfloat16().float(), x) for x in states[-1].internals["parameters"].values()]
    assert any(moved)
    bp.apply_masks(half, masks, weights)


def test_under_no_grad_inference_mode_autocast_and_compiled() -> None:
    model, masks, batches = problem()
    options = {"teacher": model, "loss": losses.kl, "optimizer": SGD, "steps": 2}
    expected = bp.distill(model, masks, None, batches, **options)
    with torch.inference_mode():
        inside = bp.distill(model, masks, None, batches, **options)
    with torch.no_grad():
        assert same(bp.distill(model, masks, None, batches, **options), expected)
    assert same(inside, expected)
    model.compile(backend="eager")
    assert same(bp.distill(model, masks, None, batches, **options), expected)


def test_gradients_of_batches_and_of_the_model_stay_as_they_are() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    model[0].weight.grad = torch.ones(8, 4)
    x = torch.randn(6, 4, requires_grad=True)
    bp.distill(model, {}, None, [x], teacher=model, loss=losses.hidden_states, steps=1)
    assert x.grad is None
    assert torch.equal(model[0].weight.grad, torch.ones(8, 4))


def test_low_rank_factors_reach_all_modules_of_a_tied_weight_and_keep_the_rank() -> None:
    model, masks, batches = problem()
    masks = {"embedding.weight": masks["embedding.weight"]}
    where = "embedding.weight"
    weights = bp.distill(model, masks, None, batches, teacher=model, loss=losses.cross_entropy, lora_rank=1, where=where, optimizer=ADAM)
    grid = masks[where].grid
    dense = {where: bp.BlockMask(torch.ones_like(masks[where].keep), grid)}
    change = bp.distill(model, dense, None, batches, teacher=model, loss=losses.cross_entropy, lora_rank=1, where=where, optimizer=ADAM)
    difference = change[where] - model.get_parameter(where).detach()
    assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 1
    assert pruned_values_are_zero(weights, masks)
    assert weights.keys() == {where}


def test_a_loader_with_its_own_generator_resumes_and_comes_back_as_it_was() -> None:
    model, masks, batches = problem()
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(torch.cat(batches), batch_size=4, shuffle=True, generator=generator)  # type: ignore[arg-type]
    held_out = DataLoader(torch.cat(tokens(2, seed=9)), batch_size=3, shuffle=True, generator=generator)  # type: ignore[arg-type]
    before, states = generator.get_state(), list[bp.DistillState]()
    options = {"teacher": model, "loss": losses.kl, "optimizer": ADAM, "steps": 13, "every": 5, "held_out": held_out}
    weights = bp.distill(model, masks, None, loader, **options, callback=states.append)
    assert torch.equal(generator.get_state(), before)
    for state in states:
        generator.manual_seed(99)  # another process made another generator
        assert same(bp.distill(model, masks, None, loader, **options, resume=state), weights)
    with pytest.raises(ValueError, match="random number generators of its own"):
        bp.distill(model, masks, None, batches, **options, resume=states[0])


def test_what_a_callback_does_to_a_state_changes_no_result() -> None:
    model, masks, batches = problem()
    options = {"teacher": model, "loss": losses.kl, "optimizer": ADAM, "steps": 4, "every": 1, "held_out": batches[:2]}
    states: list[bp.DistillState] = []

    def spoil(state: bp.DistillState) -> None:
        for x in (*state.best.values(), *state.weights.values()):
            x.zero_()

    expected = bp.distill(model, masks, None, batches, **options, callback=states.append)
    assert same(bp.distill(model, masks, None, batches, **options, callback=spoil), expected)
    best = {name: x.clone() for name, x in states[-1].best.items()}
    again = bp.distill(model, masks, None, batches, **options, resume=states[-1])
    for x in again.values():
        x.zero_()
    assert same(dict(states[-1].best), best)


def test_a_clock_that_stands_still_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockprune.repair.distillation.time.monotonic", lambda: 5.0)
    model, masks, batches = problem()
    bp.distill(model, masks, None, batches, teacher=model, loss=losses.kl, steps=1)


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_is_an_error_before_the_step(clip: float | None) -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="gradient is NaN or inf in step 0"):
        bp.distill(
            model, {}, None, [torch.ones(2, 4)], teacher=model, loss=lambda s, t, b: (s - t).norm() * (s - t).abs().sqrt().sum(), clip=clip
        )


def mean_square(student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
    return (student - teacher).square().mean()


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"steps": 0}, ValueError, "steps=0"),
    ({"accumulate": 0}, ValueError, "accumulate=0"),
    ({"steps": 2.5}, ValueError, "steps=2.5 must be an integer"),
    ({"every": True}, ValueError, "every=True must be an integer"),
    ({"lora_rank": 1.5}, ValueError, "lora_rank=1.5 must be an integer"),
    ({"optimizer": lambda parameters: None}, TypeError, "optimizer returned None"),
    ({"optimizer": lambda parameters: []}, TypeError, "or a list of some"),
    ({"optimizer": lambda parameters: [SGD(parameters), SGD(parameters[:1])]}, ValueError, "is in 2 of the optimizers"),
    ({"optimizer": lambda parameters: [SGD(parameters[:1]), SGD(parameters[2:])]}, ValueError, "is in 0 of the optimizers"),
    ({"optimizer": torch.optim.LBFGS}, ValueError, "returned LBFGS, whose step needs a closure.*AdamW"),
    ({"optimizer": lambda parameters: [SGD(parameters[:1]), torch.optim.LBFGS(parameters[1:])]}, ValueError, "returned LBFGS, whose"),
    ({"warmup": -1}, ValueError, "warmup=-1"),
    ({"warmup": 9, "steps": 8}, ValueError, "warmup=9 must be at most .* 8"),
    ({"final_lr": -0.1}, ValueError, "final_lr=-0.1"),
    ({"final_lr": float("nan")}, ValueError, "final_lr=nan"),
    ({"clip": 0.0}, ValueError, "clip=0.0"),
    ({"clip": float("inf")}, ValueError, "clip=inf"),
    ({"patience": 1}, ValueError, "patience=1 .*held_out="),
    ({"patience": -1, "held_out": tokens(1)}, ValueError, "patience=-1"),
    ({"autocast": torch.int8}, ValueError, "autocast=torch.int8"),
    ({"loss": "kl"}, TypeError, "loss='kl' must be a function"),
    ({"seed": 2**70}, ValueError, "seed=1180591620717411303424 must be an integer from"),
    ({"batches": [tokens(1)[0][:0]]}, ValueError, r"student's output has shape \(0, 6, 12\), so the batch is empty"),
    (
        {"batches": [*tokens(1), tokens(1)[0][:0]], "loss": mean_square},
        ValueError,
        "loss is nan in step 1; batch 1 has no tokens; leave out",
    ),
    ({"held_out": [*tokens(2), tokens(1)[0][:0]], "loss": mean_square}, ValueError, "step 0: .*; batch 2 of held_out has no tokens"),
    ({"batches": []}, ValueError, "batches has no batches"),
    ({"batches": iter([])}, ValueError, "unknown length"),
    ({"batches": iter([]), "steps": 1}, ValueError, "no more batches"),
    ({"batches": torch.zeros(2)}, TypeError, "one Tensor"),
    ({"held_out": []}, ValueError, "held_out has no batches"),
    ({"held_out": torch.zeros(2)}, TypeError, "held_out is one Tensor"),
    ({"teacher": nn.LazyLinear(4)}, ValueError, "weight of a lazy layer has no shape yet; run the model on one batch"),
    ({"loss": lambda s, t, b: s}, TypeError, "one number"),
    ({"loss": lambda s, t, b: s.mean() * 1j}, TypeError, "a real number, not torch.complex"),
    ({"loss": lambda s, t, b: s.mean() * torch.nan}, ValueError, "training loss is nan"),
    ({"loss": lambda s, t, b: t.mean()}, ValueError, "does not depend"),
    ({"where": "nothing.*"}, ValueError, "matches no floating-point parameter"),
    ({"where": bp.named("nothing.*", (1,))}, ValueError, "matches no parameter"),
    ({"lora_rank": 0}, ValueError, "lora_rank=0"),
    ({"lora_rank": 2, "where": "norm.*"}, ValueError, "masked matrices"),
    ({"autocast": torch.float16}, ValueError, "bfloat16"),
    ({"checkpointing": True, "train": True}, ValueError, "gradient_checkpointing_enable"),
    ({"train": 1}, TypeError, "train is a int; it must be True or False"),
    ({"teacher": lambda x: x}, TypeError, "teacher"),
    ({"weights": {"body.0.weight": torch.ones(2)}}, ValueError, "whole weight"),
    ({"masks": {"no": None}}, KeyError, "'no'"),
]


def test_a_lazy_layer_has_no_weights_to_train_yet() -> None:
    with pytest.raises(ValueError, match=r"0\.weight: this weight of a lazy layer has no shape yet; run the model on one batch first"):
        bp.distill(nn.Sequential(nn.LazyLinear(4)), {}, None, [torch.ones(2, 3)], teacher=None, loss=losses.kl, steps=1)


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_an_error_says_what_to_give_and_changes_nothing(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    model, masks, batches = problem()
    before = fingerprint(model)
    arguments = {"masks": masks, "weights": None, "batches": batches, "teacher": model, "loss": losses.kl, **bad}
    with pytest.raises(error, match=message):
        bp.distill(model, **arguments)
    assert same(fingerprint(model), before)


def test_a_masked_model_is_not_its_own_teacher_and_a_state_belongs_to_its_parameters() -> None:
    model, masks, batches = problem()
    states: list[bp.DistillState] = []
    bp.distill(model, masks, None, batches, teacher=model, loss=losses.kl, steps=1, every=1, callback=states.append)
    with pytest.raises(ValueError, match="different parameters"):
        bp.distill(model, masks, None, batches, teacher=model, loss=losses.kl, where="norm.*", resume=states[0])
    others = {name: bp.BlockMask(~mask.keep, mask.grid) for name, mask in masks.items()}
    with pytest.raises(ValueError, match="different masks, such as that of"):
        bp.distill(model, others, None, batches, teacher=model, loss=losses.kl, steps=2, resume=states[0])
    masked = bp.apply_masks(copy.deepcopy(model), masks)
    with pytest.raises(ValueError, match="masked model itself"):
        bp.distill(masked, None, None, batches, teacher=masked, loss=losses.kl)


def test_a_model_with_gates_is_refused_with_the_remedy() -> None:
    gated = bp.gates.add(nn.Linear(4, 4), where=bp.linears((2, 2)))
    with pytest.raises(ValueError, match=r"bp.gates.remove\(model\)"):
        bp.distill(gated, None, None, [torch.ones(2, 4)], teacher=nn.Linear(4, 4), loss=losses.hidden_states)


class Scaled(nn.Module):
    """It divides by a running mean of its inputs, which only training mode changes, as a quantizer does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        size = x.detach().abs().mean()
        if self.kind == "assigned":  # in evaluation, too
            self.scale = self.scale.lerp(size, 0.3)
        elif self.training:
            (self.scale.data if self.kind == "written through .data" else self.scale).lerp_(size, 0.3)
        return x / self.scale


def with_buffers(kind: str) -> nn.Module:
    if kind == "spectral_norm":
        return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4))
    return nn.Sequential(nn.Linear(6, 8), Scaled(kind), nn.Linear(8, 4))


@pytest.mark.parametrize("kind", ["written", "written through .data", "assigned", "spectral_norm"])
def test_buffers_that_a_forward_changes_are_put_back(kind: str) -> None:
    """The held-out loss is that of the model with the weights that are returned, and a resumed run has the same bits."""
    model = seeded(lambda: with_buffers(kind)).eval()
    teacher, batches = copy.deepcopy(model), [torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    masks = bp.recipes.magnitude(bp.including(bp.linears((2, 2)), "2.*"))(model, 0.5).masks
    before, states = copy.deepcopy(model.state_dict()), list[bp.DistillState]()
    options = {"teacher": teacher, "loss": losses.hidden_states, "steps": 6, "every": 2, "train": True, "where": "2.*", "optimizer": ADAM}
    options |= {"accumulate": 2, "held_out": batches[4:]}
    weights = bp.distill(model, masks, None, batches[:4], **options, callback=states.append)
    assert same(dict(model.state_dict()), dict(before))
    assert same(dict(teacher.state_dict()), dict(before))
    for state in states[:-1]:
        again: list[bp.DistillState] = []
        assert same(bp.distill(model, masks, None, batches[:4], **options, resume=state, callback=again.append), weights)
        assert same(dict(again[-1].weights), dict(states[-1].weights))
        assert again[-1].history == states[-1].history
    pruned = bp.apply_masks(copy.deepcopy(model), masks, weights).eval()
    expected = losses.hidden_states(pruned(batches[4]), copy.deepcopy(teacher)(batches[4]))
    assert states[-1].best_loss == pytest.approx(expected.item(), rel=1e-5)


class Rotated(nn.Module):
    """Half-precision weights beside complex and float64 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.wide = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4).double()
        self.register_buffer("angles", torch.polar(torch.ones(2), torch.tensor([1.0, 2.0])))
        self.register_buffer("count", torch.tensor(2**53 - 1))
        self.register_buffer("exact", torch.tensor(1 / 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.linear(x.to(self.linear.weight.dtype)).float().view(-1, 2, 2))
        return self.wide(torch.view_as_real(pairs * self.angles).flatten(1).double() * self.exact)  # type: ignore[no-any-return]


def test_only_half_precision_is_copied_in_float32() -> None:
    model = seeded(Rotated)
    seen = []

    def forward(student: nn.Module, x: Tensor) -> Tensor:
        if student is not model:
            seen.append({name: (value.dtype, value) for name, value in student.state_dict(keep_vars=True).items()})
        return student(x)  # type: ignore[no-any-return]

    masks = bp.recipes.magnitude(bp.including(bp.linears((2, 2)), "linear.*"))(model, 0.5).masks
    options = {"teacher": model, "loss": losses.hidden_states, "steps": 1, "where": "linear.*", "forward": forward}
    weights = bp.distill(model, masks, None, [torch.randn(5, 4)], **options)
    assert {name: x.dtype for name, x in weights.items()} == {"linear.weight": torch.bfloat16, "linear.bias": torch.bfloat16}
    assert seen[0]["linear.bias"][0] == torch.float32
    for name in ("wide.weight", "wide.bias", "angles", "count", "exact"):
        assert same(seen[0][name], (model.state_dict()[name].dtype, model.state_dict()[name]))


def test_an_optimizer_of_other_parameters_is_an_error() -> None:
    """Those of the model are not those of the copy that is trained."""
    model, masks, batches = problem()
    options = {"teacher": model, "loss": losses.kl, "steps": 1}
    with pytest.raises(ValueError, match=r"embedding.*original \(12, 8\) is not in the SGD that optimizer= returned.*copy of the model"):
        bp.distill(model, masks, None, batches, **options, optimizer=lambda _: SGD(model.parameters()))
    with pytest.raises(ValueError, match="is not in the SGD that optimizer= returned, so it would not be trained"):
        bp.distill(model, masks, None, batches, **options, optimizer=lambda parameters: SGD(parameters[:-1]))


def test_a_sampler_within_a_sampler_is_set_back_and_resumes() -> None:
    model, masks, batches = problem()
    data = torch.cat(batches)

    def loader(generator: torch.Generator) -> DataLoader[Any]:
        sampler = RandomSampler(data, generator=generator)  # type: ignore[arg-type]
        return DataLoader(TensorDataset(data), batch_size=None, sampler=BatchSampler(sampler, 4, drop_last=False))

    options = {"teacher": model, "loss": losses.kl, "steps": 10, "every": 3, "forward": lambda module, batch: module(batch[0])}
    resumes_exactly(model, masks, loader, options)


def test_persistent_workers_resume_from_every_pass() -> None:
    model, masks, batches = problem()
    data = torch.cat(batches[:3])

    def loader(generator: torch.Generator | None) -> DataLoader[Any]:
        options = {"batch_size": 4, "shuffle": True, "num_workers": 1, "persistent_workers": True, "generator": generator}
        return DataLoader(data, **options)  # type: ignore[arg-type]

    options = {"teacher": model, "loss": losses.kl, "steps": 8, "every": 2}
    resumes_exactly(model, masks, loader, options)
    resumes_exactly(model, masks, lambda _: loader(None), options)


class WithProcess(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Samples with the number of the process that loaded them."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.data[i], os.getpid()


def test_persistent_workers_are_started_once_and_other_passes_over_the_loader_go_on() -> None:
    model, masks, batches = problem()
    loader: DataLoader[Any] = DataLoader(WithProcess(torch.cat(batches[:3])), batch_size=4, num_workers=1, persistent_workers=True)
    others = iter(loader)
    processes = {int(process) for process in next(others)[1]}
    trained, held_out = list[int](), list[int]()

    def loss(student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
        (trained if torch.is_grad_enabled() else held_out).append(int(batch[1][0]))
        return losses.kl(student, teacher)

    options = {"teacher": model, "forward": lambda module, batch: module(batch[0]), "steps": 7, "every": 2}
    bp.distill(model, masks, None, loader, **options, loss=loss)
    assert len(trained) == 7
    assert len(set(trained)) == 1
    assert processes.isdisjoint(trained)
    assert len(list(others)) == 2
    bp.distill(model, masks, None, loader, **options, loss=loss, held_out=loader)
    assert len(held_out) == 5 * 3
    assert set(held_out) == processes


def resumes_exactly(model: nn.Module, masks: Any, loader: Callable[[torch.Generator], DataLoader[Any]], options: dict[str, Any]) -> None:
    """From all states, with a new loader and with one that was used before; its generator is set back at the end."""
    generator, states = torch.Generator().manual_seed(3), list[bp.DistillState]()
    before, used = generator.get_state(), loader(generator)
    weights = bp.distill(model, masks, None, used, **options, callback=states.append)
    assert torch.equal(generator.get_state(), before)
    for state in states[:-1]:
        for batches in (loader(torch.Generator().manual_seed(3)), used):
            assert same(bp.distill(model, masks, None, batches, **options, resume=state), weights)
    assert same(bp.distill(model, masks, None, used, **options), weights)


class Sparse(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(12, 8, sparse=sparse), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("clip", [None, 0.01])
def test_sparse_gradients_are_limited_as_dense_ones(clip: float | None) -> None:
    dense, sparse = (seeded(partial(Sparse, sparse=is_sparse)) for is_sparse in (False, True))
    masks = bp.recipes.magnitude(bp.linears((4, 4)))(dense, 0.5).masks
    options = {"teacher": seeded(partial(Sparse, sparse=False), seed=1), "loss": losses.kl, "optimizer": SGD, "clip": clip}
    expected, actual = (bp.distill(model, masks, None, tokens(4), **options) for model in (dense, sparse))
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x)


def test_where_takes_all_names_of_a_tied_weight() -> None:
    model, masks, batches = problem()
    options = {"teacher": model, "loss": losses.kl, "steps": 1, "optimizer": SGD}
    first, second = (bp.distill(model, masks, None, batches, **options, where=name) for name in ("embedding.weight", "head.weight"))
    assert same(first, second)
    assert same(bp.distill(model, masks, None, batches, **options, where=["head.*", "embedding.*"]), first)


def test_what_was_given_instead_is_named() -> None:
    model, masks, batches = problem()
    options = {"teacher": model, "loss": losses.kl, "steps": 2, "every": 1}
    states: list[bp.DistillState] = []
    bp.distill(model, masks, None, batches, **options, callback=states.append)
    with pytest.raises(TypeError, match=r"resume has the type dict; give a DistillState: bp\.DistillState\(\*\*torch\.load"):
        bp.distill(model, masks, None, batches, **options, resume=attrs.asdict(states[0], recurse=False))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"step 1: held_out has no batches \(any more\); give a list or a DataLoader"):
        bp.distill(model, masks, None, batches, **options, held_out=iter(batches))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_tensor_that_a_hook_computed_is_named() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    model(x)
    with pytest.raises(ValueError, match=r"0\.weight: a hook of the old weight_norm.*remove_weight_norm"):
        bp.distill(model, {}, None, [x], teacher=model, loss=losses.hidden_states)


def two(student: Tensor, teacher: Tensor) -> Tensor:
    return student.mean()


class OfTwo(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return student.mean()


OTHER_FORMS: list[tuple[Any, str, str]] = [
    (F.mse_loss, "mse_loss", "mse_loss(student, teacher)"),
    (F.kl_div, "kl_div", "kl_div(student, teacher)"),
    (F.cross_entropy, "cross_entropy", "cross_entropy(student, teacher)"),
    (partial(F.l1_loss, reduction="sum"), "l1_loss", "l1_loss(student, teacher)"),
    (torch.dist, "dist", "dist(student, teacher)"),
    (nn.MSELoss(), "MSELoss", "loss_function(student, teacher), with loss_function = nn.MSELoss()"),
    (nn.MSELoss, "MSELoss", "loss_function(student, teacher), with loss_function = nn.MSELoss()"),
    (two, "two", "two(student, teacher)"),
    (lambda student, teacher: student.mean(), "<lambda>", "..."),
    (lambda student, teacher, batch, more: student.mean(), "<lambda>", "..."),
    (OfTwo(), "OfTwo", "..."),
]


@pytest.mark.parametrize(("loss", "name", "call"), OTHER_FORMS, ids=[f"{name} {i}" for i, (_, name, _) in enumerate(OTHER_FORMS)])
def test_a_loss_that_does_not_take_a_batch_is_refused_with_the_code_that_does(loss: Any, name: str, call: str) -> None:
    model, masks, batches = problem()
    message = f"{name} does not take (student's output, teacher's output, batch), which a loss is called with; give lambda student, "
    with pytest.raises(TypeError, match=re.escape(f"loss={message}teacher, batch: {call}; or")):
        bp.distill(model, masks, None, batches, teacher=model, loss=loss)
    with pytest.raises(TypeError, match=re.escape(f"a loss of terms={message}teacher, batch: {call}; or")):
        losses.weighted({losses.kl: 1.0, loss: 1.0})


class OfThree(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
        return mean_square(student, teacher, batch)


@wraps(F.mse_loss)
def decorated(student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(student, teacher)


OF_THREE = [OfThree(), partial(mean_square), lambda *outputs: F.mse_loss(*outputs[:2]), losses.weighted({mean_square: 1}), decorated]


@pytest.mark.parametrize("loss", OF_THREE)
def test_all_that_takes_three_arguments_is_a_loss(loss: Any) -> None:
    model, masks, batches = problem()
    options = {"teacher": seeded(Tied, seed=1), "steps": 2, "optimizer": SGD}
    expected = bp.distill(model, masks, None, batches, loss=mean_square, **options)
    assert same(bp.distill(model, masks, None, batches, loss=loss, **options), expected)


def test_an_empty_batch_is_no_error_if_the_loss_is_a_number() -> None:
    model, masks, batches = problem()
    summed = lambda student, teacher, batch: (student - teacher).square().sum()  # noqa: E731
    bp.distill(model, masks, None, [batches[0][:0], *batches], teacher=model, loss=summed)


def test_kept_weights_that_are_frozen_are_not_left_out_without_a_word() -> None:
    """Unless the caller chooses what is trained."""
    dense = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    masked = bp.apply_masks(copy.deepcopy(dense), bp.recipes.magnitude(bp.linears((4, 4)))(dense, 0.5).masks)
    batches = [torch.randn(4, 8)]
    go = partial(bp.distill, masks=None, weights=None, batches=batches, teacher=dense, loss=mean_square)
    for options in ({}, {"dtype": "int8"}):
        frozen = export.block_sparse(masked, backend="native", **options)
        before = fingerprint(frozen)
        with pytest.raises(
            ValueError, match=r"layer '0' is exported.* frozen; .*export\.block_sparse\(model, trainable=True\), or .*where="
        ):
            go(frozen)
        assert same(fingerprint(frozen), before)
        assert set(go(frozen, where=bp.norms_and_biases)) == {"0.bias", "2.bias"}
    with pytest.raises(ValueError, match="the model is exported, and its kept weights are frozen"):
        go(export.block_sparse(masked[0], backend="native"), teacher=dense[0])
    assert set(go(export.block_sparse(masked, backend="native", trainable=True))) == {"0.values", "0.bias", "2.values", "2.bias"}
