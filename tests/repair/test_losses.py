"""Losses equal their formulas, leave out padding, and say what to pass where something is missing."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import Tensor
from torch.nn import functional as F

from blockprune import losses


def logits(seed: int, shape: tuple[int, ...] = (3, 5, 7)) -> tuple[Tensor, Tensor]:
    return normal(shape, seed).double().requires_grad_(True), 2 * normal(shape, seed + 1).double()


def slow_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, top_k: int | None = None) -> float:
    """The sum over classes at each position, in Python."""
    total = 0.0
    for s, t in zip(student.flatten(0, -2).tolist(), teacher.flatten(0, -2).tolist(), strict=True):
        q, p = ([math.exp(x / temperature) / sum(math.exp(y / temperature) for y in row) for x in row] for row in (s, t))
        pairs = sorted(zip(p, q, strict=True), reverse=True)
        if top_k is not None and top_k < len(pairs):
            rest = [sum(pair[i] for pair in pairs[top_k:]) for i in (0, 1)]
            pairs = [*pairs[:top_k], (rest[0], rest[1])]
        total += sum(a * math.log(a / b) for a, b in pairs)
    return temperature**2 * total / (student.numel() // student.shape[-1])


@given(seed=seeds, temperature=st.floats(0.3, 5), top_k=st.integers(1, 9) | st.none())
def test_kl_is_its_formula(seed: int, temperature: float, top_k: int | None) -> None:
    student, teacher = logits(seed)
    loss = losses.kl(student, teacher, temperature=temperature, top_k=top_k)
    assert loss.item() == pytest.approx(slow_kl(student, teacher, temperature, top_k), rel=1e-9, abs=1e-12)
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@given(seed=seeds, gap=st.floats(5, 80), top_k=st.integers(1, 3), whose=st.sampled_from(["student", "teacher", "both"]))
def test_the_most_likely_classes_of_confident_models(seed: int, gap: float, top_k: int, whose: str) -> None:
    """In float32, where one minus a probability near 1 would be 0: value and gradient are those of the twin."""
    student, teacher = (x.detach().clone() for x in logits(seed, (2, 4)))
    for who, x in (("student", student), ("teacher", teacher)):
        if whose in (who, "both"):
            x[:, seed % 4] += gap
    student, teacher = student.float().requires_grad_(), teacher.float()
    loss = losses.kl(student, teacher, top_k=top_k)
    assert loss.item() == pytest.approx(slow_kl(student.detach().double(), teacher.double(), top_k=top_k), rel=1e-4, abs=1e-6)
    whole = losses.kl(student, teacher).item()
    assert loss.item() <= whole + 1e-6 + 1e-6 * whole
    loss.backward()
    q, p = student.detach().double().requires_grad_(), teacher.double()
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(top_k, -1).indices, True)
    rest = [x.masked_fill(chosen, -torch.inf).logsumexp(-1) - x.logsumexp(-1) for x in (q, p)]  # logs of probabilities
    of_rest = rest[1].exp() * (rest[1] - rest[0])
    of_chosen = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1)) * chosen).sum(-1)
    (of_rest + of_chosen).mean().backward()
    assert student.grad is not None
    assert q.grad is not None
    torch.testing.assert_close(student.grad.double(), q.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_most_likely_classes_have_exact_derivatives(top_k: int) -> None:
    student, teacher = logits(0, (2, 5))
    assert torch.autograd.gradcheck(lambda x: losses.kl(x, teacher, temperature=2.0, top_k=top_k), student)
    assert torch.autograd.gradgradcheck(lambda x: losses.kl(x, teacher, temperature=2.0, top_k=top_k), student)


def test_a_confident_student_learns_from_the_most_likely_classes() -> None:
    student = torch.tensor([[17.0, 0.0, 0.0, 0.0]], requires_grad=True)
    losses.kl(student, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), top_k=1).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.tensor([[0.525, -0.175, -0.175, -0.175]]), rtol=0, atol=1e-3)


@given(seed=seeds)
def test_more_classes_never_make_the_divergence_smaller_and_all_make_it_whole(seed: int) -> None:
    student, teacher = logits(seed)
    parts = [losses.kl(student, teacher, top_k=k).item() for k in range(1, 8)]
    assert all(x <= y + 1e-12 for x, y in itertools.pairwise(parts))
    assert parts[-1] == losses.kl(student, teacher).item()


@given(seed=seeds)
def test_at_high_temperatures_kl_is_the_squared_error_of_the_logits(seed: int) -> None:
    """Hinton et al., eq. 4: logits whose mean is zero, error over classes / 2."""
    student, teacher = logits(seed)
    difference = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    expected = difference.square().mean(-1).mean() / 2
    torch.testing.assert_close(losses.kl(student, teacher, temperature=1e4), expected, rtol=1e-2, atol=1e-6)


def test_confident_predictions_have_finite_gradients() -> None:
    student = torch.tensor([[100.0, 0.0, 0.0]], requires_grad=True)
    for top_k in (None, 1, 2):
        losses.kl(student, torch.tensor([[0.0, 90.0, 0.0]]), top_k=top_k).backward()
        losses.kl(student, student.detach(), top_k=top_k).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_classes_that_both_forbid_count_nothing() -> None:
    """The twin: the same logits without these classes."""
    student, teacher = logits(0, (2, 5))
    infinite = torch.tensor([True, False, False, True, False])
    for top_k in (None, 2, 4):
        kept = losses.kl(student[:, ~infinite], teacher[:, ~infinite], top_k=top_k)
        whole = losses.kl(student.masked_fill(infinite, -torch.inf), teacher.masked_fill(infinite, -torch.inf), top_k=top_k)
        torch.testing.assert_close(whole, kept)
        expected, actual = (torch.autograd.grad(loss, student)[0] for loss in (kept, whole))
        torch.testing.assert_close(actual, expected)


@given(seed=seeds)
def test_hidden_states_is_its_formula(seed: int) -> None:
    student, teacher = ([scale * normal((2, 3, 4), seed + i) for scale in (1.0, 100.0)] for i in (0, 1))
    expected = sum(F.mse_loss(x, y) / F.mse_loss(y, torch.zeros_like(y)) for x, y in zip(student, teacher, strict=True)) / 2
    outputs = [SimpleNamespace(hidden_states=tuple(states)) for states in (student, teacher)]
    for pair in ((student, teacher), outputs):
        torch.testing.assert_close(losses.hidden_states(*pair), expected)
    assert losses.hidden_states(teacher, teacher).item() == 0


def as_hf(x: Tensor) -> Any:
    return SimpleNamespace(logits=x, hidden_states=(x, x.sin()), last_hidden_state=x)


@given(seed=seeds)
@pytest.mark.parametrize("loss", [losses.kl, losses.hidden_states, losses.cosine])
def test_padding_changes_nothing(loss: Any, seed: int) -> None:
    """The law: samples of different lengths in one padded batch, whatever the padding holds, give what they give without padding."""
    lengths = (5, 2, 3)
    student, teacher = logits(seed, (3, 5, 7))
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in lengths])
    whole = loss(as_hf(student), as_hf(teacher), {"attention_mask": mask})
    changed = torch.where(mask[..., None] == 1, student, 9.0)
    torch.testing.assert_close(loss(as_hf(changed), as_hf(teacher), {"attention_mask": mask}), whole)
    parts = [loss(as_hf(student[i : i + 1, :n]), as_hf(teacher[i : i + 1, :n]), {}) for i, n in enumerate(lengths)]
    if loss is losses.cosine:
        torch.testing.assert_close(whole, torch.stack(parts).mean())
    if loss is losses.kl:
        torch.testing.assert_close(whole, sum(n * part for n, part in zip(lengths, parts, strict=True)) / sum(lengths))
    labels = torch.where(mask == 1, 3, -100)
    if loss is losses.kl:  # labels say the same as the mask
        torch.testing.assert_close(loss(as_hf(student), as_hf(teacher), {"labels": labels}), whole)


@given(seed=seeds)
def test_labels_that_repeat_the_tokens_belong_to_the_position_before(seed: int) -> None:
    student, teacher = logits(seed, (2, 5, 7))
    tokens = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[0, :3] = -100  # a prompt
    batch = {"input_ids": tokens, "labels": labels}
    shifted = F.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(losses.cross_entropy(student, None, batch), shifted)
    predicted = torch.cat([student[0, 2:4], student[1, :4]]), torch.cat([teacher[0, 2:4], teacher[1, :4]])
    torch.testing.assert_close(losses.kl(student, teacher, batch), losses.kl(*predicted))
    for plain in (tokens, (tokens,), {"input_ids": tokens}):
        expected = F.cross_entropy(student[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        torch.testing.assert_close(losses.cross_entropy(student, None, plain), expected)
    padded = {"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5])}
    kept = torch.cat([student[0, :2], student[1, :4]])
    torch.testing.assert_close(
        losses.cross_entropy(student, None, padded), F.cross_entropy(kept, torch.cat([tokens[0, 1:3], tokens[1, 1:]]))
    )


def test_other_labels_belong_to_their_own_position() -> None:
    student, _ = logits(0, (2, 5, 7))
    tokens, labels = torch.zeros(2, 5, dtype=torch.long), torch.full((2, 5), -100)
    labels[0, 1], labels[1, 4] = 3, 6  # masked tokens of a masked language model
    expected = F.cross_entropy(torch.stack([student[0, 1], student[1, 4]]), torch.tensor([3, 6]))
    torch.testing.assert_close(losses.cross_entropy(student, None, {"input_ids": tokens, "labels": labels}), expected)
    classes = torch.tensor([1, 2])
    of_samples = student[:, 0]
    for batch in ((torch.zeros(2, 4), classes), {"pixel_values": torch.zeros(2, 4), "labels": classes}):
        torch.testing.assert_close(losses.cross_entropy(of_samples, None, batch), F.cross_entropy(of_samples, classes))


def test_labels_of_few_positions_need_shift() -> None:
    """Masked tokens that stay as they are look like a prompt without labels."""
    student, teacher = logits(0, (1, 4, 9))
    tokens, labels = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[-100, -100, 6, -100]])
    for batch in ({"input_ids": tokens, "labels": labels}, (tokens, labels), ({"input_ids": tokens}, labels)):
        for shift, position in ((False, 2), (True, 1)):
            expected = F.cross_entropy(student[:, position], labels[:, 2])
            torch.testing.assert_close(losses.cross_entropy(student, None, batch, shift=shift), expected)
            here = losses.kl(student[:, position], teacher[:, position])
            torch.testing.assert_close(losses.kl(student, teacher, batch, shift=shift), here)
        for loss in (losses.kl, losses.cross_entropy):
            with pytest.raises(ValueError, match="give shift=True"):
                loss(student, teacher, batch)
    padded = {"input_ids": tokens, "labels": labels, "attention_mask": torch.tensor([[0, 1, 1, 0]])}  # half of the others has a label
    torch.testing.assert_close(losses.cross_entropy(student, None, padded), F.cross_entropy(student[:, 1], labels[:, 2]))


def test_labels_mean_the_same_in_tuples_and_mappings() -> None:
    student, teacher = logits(0, (2, 6, 9))
    tokens = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(6) >= 4, -100)
    for loss in (losses.kl, losses.cross_entropy):
        assert loss(student, teacher, (tokens, labels)) == loss(student, teacher, {"input_ids": tokens, "labels": labels})


def test_a_decoder_has_its_own_padding() -> None:
    student, teacher = logits(0, (2, 5, 7))
    output = SimpleNamespace(logits=student, encoder_last_hidden_state=torch.zeros(2, 5, 4))
    labels = torch.tensor([[1, 2, 3, 4, 5], [1, 2, -100, -100, -100]])
    batch = {"input_ids": labels.abs(), "attention_mask": torch.tensor([[1, 0, 0, 0, 0], [1] * 5]), "labels": labels}
    kept = labels != -100
    torch.testing.assert_close(losses.kl(output, teacher, batch), losses.kl(student[kept], teacher[kept]))
    torch.testing.assert_close(losses.cross_entropy(output, None, batch), F.cross_entropy(student[kept], labels[kept]))


def test_embeddings_of_a_decoder_are_the_means_over_its_own_positions() -> None:
    """The law: the same as of plain embeddings, where the encoder has more positions and other padding."""
    states = logits(0, (2, 5, 7))
    student, teacher = (SimpleNamespace(last_hidden_state=x, encoder_last_hidden_state=torch.zeros(2, 6, 7)) for x in states)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"attention_mask": torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6]), "decoder_attention_mask": mask}
    embeddings = [torch.stack([x[0].mean(0), x[1, :3].mean(0)]) for x in states]
    torch.testing.assert_close(losses.cosine(student, teacher, batch), losses.cosine(*embeddings))
    del batch["decoder_attention_mask"]
    torch.testing.assert_close(losses.cosine(student, teacher, batch), losses.cosine(*(x.mean(1) for x in states)))


def test_the_attention_mask_of_other_positions_is_none_of_labels_that_are_no_next_tokens() -> None:
    """Speech, and labels of a part of the positions."""
    student, labels = torch.randn(2, 3, 7), torch.tensor([[1, 2, 3], [4, -100, -100]])
    batch = {"input_features": torch.ones(2, 9, 4), "attention_mask": torch.ones(2, 9), "labels": labels}
    expected = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(losses.cross_entropy(student, None, batch), expected)
    torch.testing.assert_close(losses.cross_entropy(student, None, batch, shift=False), expected)


@given(seed=seeds, shift=st.sampled_from([True, False]))
def test_the_side_of_the_padding_changes_nothing(seed: int, shift: bool) -> None:
    """The law: logits at padding have no influence, and padding on the left gives what no padding gives."""
    student, teacher = (x.detach() for x in logits(seed, (2, 6, 7)))
    tokens = torch.randint(7, (2, 6), generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": mask}
    for loss in (losses.cross_entropy, losses.kl):
        whole = loss(student, teacher, batch, shift=shift)
        changed = torch.where(mask[..., None] == 1, student, 9 * teacher)
        torch.testing.assert_close(loss(changed, teacher, batch, shift=shift), whole)
        total, count = 0, 0
        for sample, start in ((slice(1), 2), (slice(1, 2), 0)):
            own, length = tokens[sample, start:], 6 - start - int(shift)
            part = loss(student[sample, start:], teacher[sample, start:], {"input_ids": own, "labels": own}, shift=shift)
            total, count = total + length * part, count + length
        torch.testing.assert_close(whole, total / count)


def test_samples_without_a_label_do_not_count() -> None:
    student, teacher = logits(0, (3, 7))
    labels = torch.tensor([2, -100, 5])
    for batch in ((torch.zeros(3, 4), labels), {"pixel_values": torch.zeros(3, 4), "labels": labels}):
        torch.testing.assert_close(losses.kl(student, teacher, batch), losses.kl(student[::2], teacher[::2]))
        torch.testing.assert_close(losses.kl(student, teacher, batch, top_k=2), losses.kl(student[::2], teacher[::2], top_k=2))
        torch.testing.assert_close(losses.cross_entropy(student, None, batch), F.cross_entropy(student[::2], labels[::2]))
    with pytest.raises(ValueError, match="no position"):
        losses.kl(student, teacher, (torch.zeros(3, 4), torch.full((3,), -100)))


def test_a_weighted_sum() -> None:
    student, teacher = logits(0)
    loss = losses.weighted({losses.kl: 2.0, losses.hidden_states: 0.5})
    expected = 2 * losses.kl(student, teacher) + 0.5 * losses.hidden_states(student, teacher)
    torch.testing.assert_close(loss(student, teacher, None), expected)


@pytest.mark.parametrize("loss", [losses.kl, losses.hidden_states, losses.cosine])
def test_half_precision_outputs_are_compared_in_float32(loss: Any) -> None:
    student, teacher = (x.bfloat16() for x in logits(0))
    assert loss(student, teacher, None).dtype == torch.float32
    torch.testing.assert_close(loss(student, teacher, None), loss(student.float(), teacher.float(), None))


@given(seed=seeds)
@pytest.mark.parametrize("loss", [losses.kl, losses.hidden_states, losses.cosine])
def test_a_sample_that_is_all_padding_changes_nothing(loss: Any, seed: int) -> None:
    student, teacher = logits(seed, (3, 5, 7))
    mask = torch.tensor([[1] * 5, [0] * 5, [1, 1, 0, 0, 0]])
    some, two = loss(as_hf(student), as_hf(teacher), {"attention_mask": mask}), slice(0, 3, 2)
    torch.testing.assert_close(some, loss(as_hf(student[two]), as_hf(teacher[two]), {"attention_mask": mask[two]}))
    assert abs(loss(as_hf(teacher), as_hf(teacher), {"attention_mask": mask}).item()) < 1e-9
    some.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[1].any()


@given(seed=seeds)
def test_hidden_states_of_an_encoder_and_a_decoder_have_their_own_padding(seed: int) -> None:
    """The twin: the states of each of the two alone."""
    of_encoder, of_decoder = logits(seed, (2, 5, 7)), logits(seed + 9, (2, 3, 7))
    student, teacher = (
        SimpleNamespace(encoder_hidden_states=(x, x.sin()), decoder_hidden_states=(y,), encoder_last_hidden_state=x)
        for x, y in zip(of_encoder, of_decoder, strict=True)
    )
    mask, labels = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]]), torch.tensor([[3, 4, 5], [6, -100, -100]])
    encoder = [losses.hidden_states(*map(f, of_encoder), {"attention_mask": mask}) for f in (torch.clone, torch.sin)]
    decoder = losses.hidden_states(*of_decoder, {"labels": labels})
    for batch in ({"attention_mask": mask, "labels": labels}, ({"attention_mask": mask, "labels": labels}, None)):
        torch.testing.assert_close(losses.hidden_states(student, teacher, batch), (sum(encoder) + decoder) / 3)
    no_encoder = [SimpleNamespace(decoder_hidden_states=(y,), encoder_last_hidden_state=y) for y in of_decoder]
    torch.testing.assert_close(losses.hidden_states(*no_encoder, {"labels": labels}), decoder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integers(dtype: torch.dtype) -> None:
    student, _ = logits(0, (4, 7))
    labels = torch.tensor([0, 3, 6, 1])
    expected = F.cross_entropy(student, labels)
    torch.testing.assert_close(losses.cross_entropy(student, None, (torch.zeros(4, 2), labels.to(dtype))), expected)


def test_logits_of_one_sample() -> None:
    student, teacher = logits(0, (7,))
    label = torch.tensor(2)
    torch.testing.assert_close(losses.cross_entropy(student, None, (torch.zeros(4), label)), F.cross_entropy(student, label))
    torch.testing.assert_close(losses.kl(student, teacher), losses.kl(student[None], teacher[None]))
    torch.testing.assert_close(losses.kl(student, teacher, top_k=2), losses.kl(student[None], teacher[None], top_k=2))


def test_classes_on_the_last_of_four_axes_and_what_the_error_advises_for_others() -> None:
    """The twin: torch's own, whose classes are the second axis."""
    student, _ = logits(0, (2, 4, 4, 5))
    labels = torch.randint(5, (2, 4, 4), generator=torch.Generator().manual_seed(0)).masked_fill(torch.eye(4, dtype=torch.bool), -100)
    expected = F.cross_entropy(student.movedim(-1, 1), labels)
    torch.testing.assert_close(losses.cross_entropy(student, None, (torch.zeros(2, 3), labels)), expected)
    square = normal((2, 3, 3, 3), 1)  # could be either
    labels = torch.randint(3, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"model\(batch\)\.flatten\(2\)\.mT, and labels \[batch, positions\] instead of \(2, 3, 3\)"):
        losses.cross_entropy(square, None, (X, labels))
    advised = losses.cross_entropy(square.flatten(2).mT, None, (X, labels.flatten(1)))
    torch.testing.assert_close(advised, F.cross_entropy(square, labels))
    with pytest.raises(ValueError, match=r"which axis .* returns logits \[classes\] or \[batch, classes\]"):
        losses.kl(torch.tensor(1.0), torch.tensor(1.0))


X = torch.zeros(2, 3, 4)
LABELS = torch.zeros(2, 3, dtype=torch.long)
SQUARE = torch.zeros(2, 3, 3, 3)
BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: losses.kl(SimpleNamespace(last_hidden_state=X), X), TypeError, "has no logits"),
    (lambda: losses.kl(X, None), TypeError, "give distill a teacher"),
    (lambda: losses.kl(X, X[..., 1:]), ValueError, "one shape"),
    (lambda: losses.kl(X, X, temperature=0), ValueError, "temperature=0"),
    (lambda: losses.kl(X, X, top_k=0), ValueError, "top_k=0"),
    (lambda: losses.kl(X, X, {"attention_mask": torch.zeros(2, 3)}), ValueError, "no position"),
    (lambda: losses.kl(X, X, {"attention_mask": torch.ones(2, 5)}), ValueError, "different positions"),
    (lambda: losses.kl(X[None], X[None]), ValueError, r"\(1, 2, 3, 4\).*forward that returns logits"),
    (lambda: losses.cosine(SimpleNamespace(last_hidden_state=X[None]), X), ValueError, r"\(1, 2, 3, 4\).*returns embeddings"),
    (lambda: losses.cosine(X[None], X[None]), ValueError, r"\(1, 2, 3, 4\).*forward that returns embeddings"),
    (lambda: losses.cross_entropy(X, None, {"input_ids": X[..., 0].long(), "labels": X[..., 0]}), TypeError, "no labels"),
    (lambda: losses.hidden_states(SimpleNamespace(logits=X, hidden_states=None), X), TypeError, "output_hidden_states=True"),
    (lambda: losses.hidden_states([X, X], [X]), ValueError, "2 hidden states and the teacher 1"),
    (lambda: losses.cosine(SimpleNamespace(logits=X), X), TypeError, "last_hidden_state"),
    (lambda: losses.cross_entropy(X, None, torch.zeros(2, 3)), TypeError, "no labels"),
    (lambda: losses.cross_entropy(X, None, torch.zeros(2, 5, dtype=torch.long)), ValueError, r"need labels \(2, 3\)"),
    (lambda: losses.cross_entropy(X, None, {"labels": torch.full((2, 3), -100)}), ValueError, "no label"),
    (lambda: losses.cross_entropy(SQUARE, None, (X, LABELS[:, :, None].expand(2, 3, 3))), ValueError, "cross_entropy.*which axis"),
    (lambda: losses.cross_entropy(torch.tensor(1.0), None, (X, torch.tensor(0))), ValueError, "which axis"),
    (lambda: losses.cross_entropy(X.mT, None, {"labels": LABELS}), ValueError, r"need labels \(2, 4\).*model\(batch\)\.mT"),
    (lambda: losses.cross_entropy(X, None, {"labels": LABELS.bool()}), TypeError, r"labels are bool.*labels\.long\(\)"),
    (lambda: losses.cross_entropy(X, None, {"labels": LABELS + 4}), ValueError, r"label 4 is none of the 4 classes.*from 0 to 3, or -100"),
    (lambda: losses.cross_entropy(X, None, {"labels": LABELS - 1}), ValueError, "label -1 is none of the 4 classes"),
    (lambda: losses.cross_entropy(X, None, {"labels": LABELS}, shift=1), ValueError, "shift=1 must be True, False or None"),
    (lambda: losses.cosine(as_hf(X), as_hf(X), {"attention_mask": torch.zeros(2, 3)}), ValueError, "no position"),
    (lambda: losses.weighted({}), ValueError, "empty"),
    (lambda: losses.kl(X[:0], X[:0]), ValueError, r"student's output has shape \(0, 3, 4\), so the batch is empty; leave out such"),
    (lambda: losses.cross_entropy(X[:0], None, {"labels": LABELS[:0]}), ValueError, "student's output has shape .* batch is empty"),
    (lambda: losses.cosine(X[:0, 0], X[:0, 0]), ValueError, r"student's output has shape \(0, 4\), so the batch is empty"),
    (lambda: losses.cosine(as_hf(X[:, :0]), as_hf(X[:, :0])), ValueError, r"student's output has shape \(2, 0, 4\), so the batch is"),
    (lambda: losses.hidden_states(X[:0], X[:0]), ValueError, r"student's output has shape \(0, 3, 4\), so the batch is empty"),
    (lambda: losses.hidden_states([X, X[:0]], [X, X[:0]]), ValueError, "student's output has shape .* batch is empty"),
    (lambda: losses.weighted([(losses.kl, 1.0)]), TypeError, "terms is a list; give a mapping from losses"),
    (lambda: losses.weighted({"kl": 1.0}), TypeError, "a loss of terms='kl' must be a function"),
    (lambda: losses.weighted({losses.kl: "1"}), TypeError, r"terms\[kl\]='1' must be a finite number"),
    (lambda: losses.weighted({losses.kl: math.inf}), ValueError, r"terms\[kl\]=inf must be a finite number"),
    (lambda: losses.weighted({losses.kl: torch.ones(1)}), TypeError, r"terms\[kl\]=tensor of shape \(1,\) must be a finite number"),
    (
        lambda: losses.cross_entropy(torch.zeros(2, 5, 4, 4), None, (X, torch.zeros(2, 4, 4).long())),
        ValueError,
        r"which axis.*flatten\(1\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_an_error_says_what_to_pass(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
