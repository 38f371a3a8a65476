"""A Trainer that prunes: masks follow the schedule, and training resumes as if it had not stopped."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import blockprune as bp

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from blockprune.hf import GradualPruning  # noqa: E402 (needs transformers)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

WHERE = bp.including(bp.linears((4, 4)), "bert.encoder.*")
MAGNITUDE = bp.Pipeline(partial(bp.collect.weights, where=WHERE), bp.metric.l1, bp.allocate.per_layer)
CALIBRATION = bp.Calibration([{"input_ids": torch.arange(24).view(4, 6)}], progress=False)
CUBIC = partial(bp.schedule.cubic, final=0.75, end=6)


def tiny_bert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()


class Record(transformers.TrainerCallback):  # type: ignore[misc]
    """The sparsity at each step."""

    def __init__(self) -> None:
        self.sparsities: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.sparsities.append(bp.sparsity(bp.read_masks(options["model"])))


def trainer(model: Any, folder: Path, *callbacks: Any, steps: int = 8) -> Any:
    rows = [{"input_ids": torch.arange(i, i + 6), "labels": torch.tensor(i % 2)} for i in range(8)]
    options = {"max_steps": steps, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    arguments = transformers.TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **options)
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))


def random_masks(model: nn.Module, sparsity: float) -> bp.Masks:
    """Masks that depend on the weights, and differ in every update."""
    seed = int(sum(p.double().abs().sum() for p in model.parameters()).item() * 1e4) % 1000
    metric = partial(bp.metric.random, generator=torch.Generator().manual_seed(seed))
    return bp.Pipeline(partial(bp.collect.weights, where=WHERE), metric, bp.allocate.per_layer)(model, sparsity)


def test_the_masks_follow_the_schedule(tmp_path: Path) -> None:
    model, record = tiny_bert(), Record()
    trainer(model, tmp_path, GradualPruning(MAGNITUDE, CUBIC, every=2), record).train()
    assert record.sparsities == pytest.approx([CUBIC(step // 2 * 2) for step in range(8)], abs=0.03)  # a block is 1/16 of a layer
    assert record.sparsities == sorted(record.sparsities)
    assert bp.sparsity(bp.read_masks(model)) == 0.75


def test_a_recipe_that_works_layer_by_layer_gets_a_plain_copy(tmp_path: Path) -> None:
    """The twin: the recipe, called with a finalized copy."""
    recipe, model, state = bp.recipes.sparsegpt(WHERE, CALIBRATION), tiny_bert(), transformers.TrainerState()
    callback = GradualPruning(recipe, CUBIC, every=2)
    callback.on_init_end(None, state, None, model=model)
    for state.global_step in (2, 4):
        plain = bp.finalize(model)
        expected = recipe(plain, CUBIC(state.global_step))
        callback.on_step_begin(None, state, None, model=model)
        assert bp.read_masks(model) == expected.masks
        twin = bp.finalize(bp.apply_masks(plain, expected.masks, expected.weights)).state_dict()
        assert all(torch.equal(value, twin[name]) for name, value in bp.finalize(model).state_dict().items())
    model, record = tiny_bert(), Record()
    trainer(model, tmp_path, GradualPruning(recipe, CUBIC, every=2), record).train()
    assert record.sparsities == pytest.approx([CUBIC(step // 2 * 2) for step in range(8)], abs=0.03)


def test_the_last_sparsity_is_reached_between_two_updates(tmp_path: Path) -> None:
    for every, end in ((5, None), (5, 6), (100, 6)):
        model, record = tiny_bert(), Record()
        trainer(model, tmp_path, GradualPruning(MAGNITUDE, CUBIC, every=every, end=end), record).train()
        assert bp.sparsity(bp.read_masks(model)) == pytest.approx(0.75)
        assert record.sparsities[6 if end else 5] == pytest.approx(0.75 if end else CUBIC(5), abs=0.03)


@pytest.mark.parametrize(
    ("prune", "schedule"),
    [
        (MAGNITUDE, CUBIC),
        (bp.recipes.magnitude(WHERE), CUBIC),
        (bp.recipes.sparsegpt(WHERE, CALIBRATION), CUBIC),
        (random_masks, partial(bp.schedule.constant, value=0.5)),
    ],
    ids=["gradual", "recipe", "layer by layer", "dynamic"],
)
def test_training_resumes_as_if_it_had_not_stopped(prune: Any, schedule: Any, tmp_path: Path) -> None:
    model, resumed = tiny_bert(), tiny_bert()
    trainer(model, tmp_path / "a", GradualPruning(prune, schedule, every=2)).train()
    with torch.no_grad():
        resumed.classifier.weight.add_(1)  # what the checkpoint replaces
    second = trainer(resumed, tmp_path / "b", GradualPruning(prune, schedule, every=2))
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert bp.read_masks(resumed) == bp.read_masks(model)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.state_dict().items())


def test_dynamic_masks_bring_blocks_back(tmp_path: Path) -> None:
    model = tiny_bert()
    callback = GradualPruning(random_masks, partial(bp.schedule.constant, value=0.5), every=4)
    work = trainer(model, tmp_path, callback)
    first = bp.read_masks(model)
    work.train()
    second = bp.read_masks(model)
    assert bp.sparsity(first) == bp.sparsity(second) == 0.5
    assert any((second[name].keep & ~first[name].keep).any() for name in first)


def test_straight_through_gradients_change_pruned_blocks(tmp_path: Path) -> None:
    for reaches in (True, False):
        model = tiny_bert()
        work = trainer(
            model, tmp_path, GradualPruning(MAGNITUDE, partial(bp.schedule.constant, value=0.5), every=100, straight_through=reaches)
        )
        name = "bert.encoder.layer.0.output.dense.weight"
        pruned = ~bp.expand((mask := bp.read_masks(model)[name]).keep, mask.grid)
        stored = model.get_submodule(name.removesuffix(".weight")).parametrizations.weight.original
        before = stored.detach().clone()
        work.train()
        assert bool((stored != before)[pruned].any()) is reaches


@pytest.mark.parametrize("is_from_pretrained", [True, False])
def test_straight_through_goes_on_after_a_resume(is_from_pretrained: bool, tmp_path: Path) -> None:
    """The law: the same bits as without a stop, also if the model comes with the masks of the checkpoint."""

    def run(model: Any, folder: str, checkpoint: str | None = None) -> dict[str, torch.Tensor]:
        constant = partial(bp.schedule.constant, value=0.5)
        callback = GradualPruning(MAGNITUDE, constant, every=5, straight_through=True, decay=0.1)
        trainer(model, tmp_path / folder, callback).train(resume_from_checkpoint=checkpoint)
        return dict(model.state_dict())

    whole, checkpoint = run(tiny_bert(), "a"), str(tmp_path / "a" / "checkpoint-3")
    model = transformers.BertForSequenceClassification.from_pretrained(checkpoint) if is_from_pretrained else tiny_bert()
    resumed = run(model, "b", checkpoint)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("is_best_early", [True, False])
def test_a_best_model_that_is_less_sparse_is_a_warning(is_best_early: bool, tmp_path: Path) -> None:
    model, seen = tiny_bert(), iter(range(100))

    def score(_: Any) -> dict[str, float]:
        step = next(seen)
        return {"score": -step if is_best_early else step}

    options = {"max_steps": 8, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "metric_for_best_model": "score"}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        load_best_model_at_end=True,
        greater_is_better=True,
        **options,
    )
    rows = [{"input_ids": torch.arange(i, i + 6), "labels": torch.tensor(i % 2)} for i in range(8)]
    callback = GradualPruning(MAGNITUDE, CUBIC)
    data = {"train_dataset": rows, "eval_dataset": rows, "compute_metrics": score}
    work = transformers.Trainer(model=model, args=arguments, callbacks=[callback], **data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work.train()
    messages = [str(warning.message) for warning in caught if "load_best_model_at_end=True has loaded" in str(warning.message)]
    assert len(messages) == is_best_early
    if is_best_early:
        assert "checkpoint-2, which is of an earlier step" in messages[0]
        assert "the last update pruned 75.0%" in messages[0]
        assert bp.sparsity(bp.read_masks(model)) == pytest.approx(CUBIC(1), abs=0.03)
    else:
        assert bp.sparsity(bp.read_masks(model)) == 0.75


class RigL(transformers.TrainerCallback):  # type: ignore[misc]
    """The callback of the guide "Masks that learn"."""

    def __init__(self, where: bp.Where, every: int, fraction: Any) -> None:
        self.where, self.every, self.fraction = where, every, fraction

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **options: Any) -> None:
        if state.global_step % self.every == self.every - 1:
            before, data = bp.read_masks(model), bp.collect.gradients(model, where=self.where)
            grow = bp.metric.gradient_magnitude(data)
            after = bp.regrow(before, drop=bp.metric.l1(data), grow=grow, fraction=self.fraction(state.global_step))
            bp.apply_masks(model, after, bp.zero_new_blocks(model, after), straight_through=True)
            bp.reset_state(getattr(optimizer, "optimizer", optimizer), model, before, after)


def test_rigl_is_a_callback_of_a_few_lines(tmp_path: Path) -> None:
    model = tiny_bert()
    before = bp.read_masks(bp.apply_masks(model, random_masks(model, 0.5), straight_through=True))
    trainer(model, tmp_path, RigL(WHERE, 2, partial(bp.schedule.cosine, initial=0.3, final=0.0, end=8))).train()
    after = bp.read_masks(model)
    assert after != before
    assert bp.sparsity(after) == bp.sparsity(before) == 0.5


def test_a_callback_that_is_added_late_cannot_resume(tmp_path: Path) -> None:
    trainer(tiny_bert(), tmp_path / "a", GradualPruning(MAGNITUDE, CUBIC), steps=4).train()
    late = trainer(tiny_bert(), tmp_path / "b")
    late.add_callback(GradualPruning(MAGNITUDE, CUBIC))
    with pytest.raises(ValueError, match=r"resumes at step 3, but the model has no masks.*Trainer\(callbacks="):
        late.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


@pytest.mark.parametrize("options", [{"every": 0}, {"end": 0}, {"every": -1}, {"every": 1.5}, {"end": "x"}])
def test_steps_must_be_positive(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=.* must be an integer, at least 1"):
        GradualPruning(MAGNITUDE, CUBIC, **options)


@pytest.mark.parametrize("options", [{"every": 1e2}, {"end": 0.8 * 1000}, {"every": torch.tensor(100), "end": 1e3}])
def test_steps_may_be_whole_floats(options: dict[str, Any]) -> None:
    callback = GradualPruning(MAGNITUDE, CUBIC, **options)
    assert {name: getattr(callback, name) for name in options} == options
    assert all(type(getattr(callback, name)) is int for name in options)
    with pytest.raises(ValueError, match=r"end=802\.4.* must be an integer, at least 1, or a whole float such as 1e2"):
        GradualPruning(MAGNITUDE, CUBIC, end=0.8 * 1003)  # type: ignore[arg-type]


def test_what_is_called_must_be_a_function() -> None:
    with pytest.raises(TypeError, match=r"prune=.* must be a function \(model, sparsity\)"):
        GradualPruning({}, CUBIC)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"schedule=0.5 must be a function step -> sparsity"):
        GradualPruning(MAGNITUDE, 0.5)  # type: ignore[arg-type]


def test_a_callback_reads_as_it_would_be_written_in_one_line() -> None:
    short = repr(GradualPruning(MAGNITUDE, CUBIC, every=100, end=1000))
    assert short == f"GradualPruning(prune={MAGNITUDE!r}, schedule=cubic(final=0.75, end=6), every=100, end=1000)"
    long = repr(GradualPruning(bp.recipes.obs(WHERE, CALIBRATION), CUBIC, decay=0.5, straight_through=True))
    assert long.startswith("GradualPruning(prune=LayerByLayer(pipeline=Pipeline(collect=")
    assert long.endswith("), schedule=cubic(final=0.75, end=6), straight_through=True, decay=0.5)")
    assert "\n" not in long
    assert " at 0x" not in long
