"""Calibration data are given as the user says, and a loss is the user's or the model's own."""

import math
import pickle
import re
from functools import partial, wraps
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

import blockprune as bp
from blockprune.model.calibration import as_calibration, default_forward, default_token_weights, scalar_loss, several_batches

X = torch.ones(2, 4)


def half_loss(output: Tensor, batch: Any) -> Tensor:
    return output.sum() / 2


# Calibration.


@pytest.mark.parametrize(
    ("batches", "kind"), [(X, "Tensor"), ({"input_ids": X}, "dict"), (None, "NoneType"), (5, "int"), (nn.Linear(2, 2), "Linear")]
)
def test_batches_must_be_several(batches: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"batches is one {kind}; give an iterable of batches, such as \[batch\]"):
        bp.Calibration(batches)


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize("batches", [(X, LABELS), [X, LABELS], ({"input_ids": LABELS}, X), (LABELS, X, X)])
def test_one_batch_in_place_of_several_is_refused(batches: Any) -> None:
    with pytest.raises(TypeError, match=rf"batches is a {type(batches).__name__} of .* and .*; if the .* is one batch .* give \[batch\]"):
        bp.Calibration(batches)
    bp.Calibration([batches])
    bp.Calibration(batches, forward=lambda model, batch: model(batch))  # which may take both
    with pytest.raises(TypeError, match="held_out is a"):
        several_batches(batches, "held_out")


@pytest.mark.parametrize("batches", [(X, X), (X, X.double(), X[0]), (LABELS, LABELS), [(X, LABELS), X], [{"x": X}, {"x": X}], ()])
def test_batches_of_one_kind_are_several(batches: Any) -> None:
    assert bp.Calibration(batches).batches is batches


@pytest.mark.parametrize("per_sample", ["VMAP", "", None, True])
def test_per_sample_is_vmap_or_loop(per_sample: Any) -> None:
    with pytest.raises(ValueError, match=rf"per_sample={per_sample!r} must be 'vmap' or 'loop'"):
        bp.Calibration([X], per_sample=per_sample)


def test_a_calibration_is_frozen_and_evolves_checked() -> None:
    calibration = bp.Calibration([X])
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        calibration.loss = half_loss  # type: ignore[misc]
    assert attrs.evolve(calibration, loss=half_loss).loss is half_loss
    with pytest.raises(TypeError, match="batches is one Tensor"):
        attrs.evolve(calibration, batches=X)
    with pytest.raises(TypeError, match="positional"):
        bp.Calibration([X], half_loss)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        (bp.Calibration([X, X]), "Calibration(batches=list of 2)"),
        (bp.Calibration(X for _ in range(2)), "Calibration(batches=generator)"),
        (bp.Calibration([X], progress=False, chunk_size=8), "Calibration(batches=list of 1, progress=False)"),
        (bp.Calibration([X], loss=half_loss, chunk_size=2), "Calibration(batches=list of 1, loss=half_loss, chunk_size=2)"),
        (bp.Calibration([], per_sample="loop", forward=partial(default_forward)),
         "Calibration(batches=list of 0, forward=default_forward(), per_sample='loop')"),
    ],
)  # fmt: skip
def test_a_calibration_prints_as_it_would_be_written(calibration: bp.Calibration, text: str) -> None:
    assert repr(calibration) == text


def test_a_calibration_pickles() -> None:
    twin = pickle.loads(pickle.dumps(bp.Calibration([X], loss=half_loss, progress=False)))
    assert repr(twin) == "Calibration(batches=list of 1, loss=half_loss, progress=False)"
    assert torch.equal(twin.batches[0], X)


def test_fields_as_keywords_are_a_calibration() -> None:
    calibration = bp.Calibration([X], progress=False)
    assert as_calibration(calibration, {}) is calibration
    made = as_calibration(None, {"batches": [X, X], "loss": half_loss, "chunk_size": 3})
    assert repr(made) == "Calibration(batches=list of 2, loss=half_loss, chunk_size=3)"


@pytest.mark.parametrize(
    ("calibration", "options", "error", "text"),
    [
        (None, {}, TypeError, r"no data to run the model on; give calibration=bp\.Calibration\(batches, \.\.\.\), or batches="),
        (None, {"loss": half_loss}, TypeError, "no data to run the model on"),
        (bp.Calibration([X]), {"loss": half_loss}, TypeError,
         r"loss and calibration are both given; .*attrs\.evolve\(calibration, loss=\.\.\.\)"),
        (bp.Calibration([X]), {"batches": [X], "progress": False}, TypeError,
         r"batches, progress and calibration are both given; .*evolve\(calibration, batches=\.\.\., progress=\.\.\.\)"),
        (None, {"batches": X}, TypeError, "batches is one Tensor"),
        (None, {"batches": [X], "per_sample": "map"}, ValueError, "per_sample='map'"),
        (None, {"batches": [X], "lazy": True}, TypeError, "lazy"),
    ],
)  # fmt: skip
def test_a_calibration_and_its_fields_are_alternatives(calibration: Any, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        as_calibration(calibration, options)


# Batches.


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        (1, (1,), {}),
        ({"a": 1, "b": 2}, (), {"a": 1, "b": 2}),
        ((1, 2), (1,), {}),
        ([1, 2], (1,), {}),
        (({"a": 1}, 2), (), {"a": 1}),
        (((1, 3), 2), (1, 3), {}),
        ([[1, 3], 2], (1, 3), {}),
    ],
)
def test_the_default_forward_passes_the_inputs_of_a_batch(batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert default_forward(lambda *a, **k: (a, k), batch) == (args, kwargs)


def test_tokens_count_as_the_attention_mask_says() -> None:
    mask = torch.tensor([[1, 0]])
    assert default_token_weights({"attention_mask": mask}) is mask
    assert default_token_weights({"attention_mask": mask[None]}) is None
    assert default_token_weights({"input_ids": mask}) is None
    assert default_token_weights(mask) is None


# The loss.


def test_the_loss_is_the_users_or_the_outputs_own() -> None:
    x = X.clone().requires_grad_()
    loss = bp.Calibration([], loss=lambda output, batch: output.sum() * batch)
    assert scalar_loss(loss, x, 2, ["gate_grad"]).item() == 16
    assert scalar_loss(bp.Calibration([]), {"loss": x.sum().view(1, 1)}, None, ["gate_grad"]).shape == ()
    assert scalar_loss(bp.Calibration([]), attrs.make_class("Result", ["loss"])(x.sum()), None, ["gate_grad"]).item() == 8


@pytest.mark.parametrize(
    ("calibration", "output", "text"),
    [
        (bp.Calibration([]), X, r"statistics gate_grad, weight_grad need a loss: give Calibration\(batches, loss=.*\(Tensor\) has no loss"),
        (bp.Calibration([]), {"logits": X}, r"\(dict\) has no loss"),
        (bp.Calibration([], loss=lambda output, batch: output), X, r"one number, but loss\(output, batch\) gave shape \(2, 4\)"),
        (bp.Calibration([], loss=lambda output, batch: 1.0), X, r"one number, but loss\(output, batch\) gave float"),
        (bp.Calibration([], loss=half_loss), X, r"with a gradient, but loss\(output, batch\) has none"),
    ],
)
def test_what_is_no_loss_is_an_error_that_names_the_statistics(calibration: bp.Calibration, output: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        scalar_loss(calibration, output, None, ["gate_grad", "weight_grad"])


# Batches and losses of other forms.


class TwoInputs(nn.Module):
    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return x1 + x2


@pytest.mark.parametrize("batch", [(torch.ones(2), torch.ones(2)), [torch.ones(2), torch.ones(2)], ({"x1": torch.ones(2)}, torch.ones(2))])
def test_several_inputs_in_a_tuple_are_told_from_inputs_and_targets(batch: Any) -> None:
    with pytest.raises(
        TypeError, match=r"TwoInputs.forward\(x1: .*x2.*\(\(x1, x2\),\), or pass forward=lambda model, batch: model\(\*batch\)"
    ):
        default_forward(TwoInputs(), batch)
    x = torch.ones(2)
    assert torch.equal(default_forward(TwoInputs(), ((x, x),)), 2 * x)
    assert torch.equal(default_forward(TwoInputs(), ((x, x), x)), 2 * x)
    assert torch.equal(default_forward(TwoInputs(), {"x1": x, "x2": x}), 2 * x)


@pytest.mark.parametrize(
    "loss",
    [nn.functional.cross_entropy, nn.CrossEntropyLoss(), partial(nn.functional.cross_entropy, label_smoothing=0.1), nn.functional.mse_loss],
)
@pytest.mark.parametrize("batch", [(torch.ones(2, 3), torch.zeros(2).long()), {"x": torch.ones(2, 3), "labels": torch.zeros(2).long()}])
def test_a_loss_in_torchs_form_comes_with_the_loss_to_give(loss: Any, batch: Any) -> None:
    output = torch.ones(2, 3, requires_grad=True)
    target = "batch['labels']" if isinstance(batch, dict) else "batch[1]"
    with pytest.raises(TypeError, match=re.escape(f"(output, {target})")):
        scalar_loss(bp.Calibration([], loss=loss), output, batch, ["gate_grad"])


def test_a_loss_that_is_a_module_comes_with_a_remedy_that_calls_it() -> None:
    output, batch = torch.ones(2, 3, requires_grad=True), (torch.ones(2, 3), torch.zeros(2).long())
    with pytest.raises(TypeError) as caught:
        scalar_loss(bp.Calibration([], loss=nn.CrossEntropyLoss()), output, batch, ["gate_grad"])
    code, function = str(caught.value).rpartition("give loss=")[2].split(", with loss_function = ")
    loss = eval(code, {"loss_function": eval(function)})
    assert scalar_loss(bp.Calibration([], loss=loss), output, batch, ["gate_grad"]).item() == pytest.approx(math.log(3))


def test_a_loss_in_torchs_form_may_compare_the_output_with_the_batch() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert scalar_loss(bp.Calibration([], loss=nn.functional.mse_loss), x, torch.zeros(2, 3), ["gate_grad"]).item() == 1


def test_a_function_that_wraps_one_of_torch_is_in_the_users_form() -> None:
    @wraps(nn.functional.mse_loss)
    def loss(output: Tensor, batch: Any) -> Tensor:
        return nn.functional.mse_loss(output, batch[1])

    x = torch.ones(2, 3, requires_grad=True)
    assert scalar_loss(bp.Calibration([], loss=loss), x, (x, torch.zeros(2, 3)), ["gate_grad"]).item() == 1
