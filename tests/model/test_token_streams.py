"""Each stream of tokens has the weights of its own mask; what cannot be told is refused."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn

import blockprune as bp
from blockprune import collect, statistics


class TwoStreams(nn.Module):
    """An encoder, and a decoder that reads it through one projection."""

    def __init__(self, first: str = "input_ids", second: str = "decoder_input_ids") -> None:
        super().__init__()
        self.names = first, second
        self.embed, self.encoder, self.cross, self.decoder = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, **batch: Tensor) -> Tensor:
        first, second = (self.embed(batch[name]) for name in self.names)
        encoded = self.encoder(first)
        return self.decoder(second + self.cross(encoded).mean(1, keepdim=True))  # type: ignore[no-any-return]


def run(model: nn.Module, batch: Any, **options: Any) -> dict[str, float]:
    """The number of rows that each layer counts."""
    options.setdefault("where", bp.linears((4, 4)))
    fold = collect.fold(model, statistics=[statistics.input_sq], batches=[batch], **options)
    return {name.partition(".")[0]: float(sums["n"]) for (name, _), sums in fold.sums.items()}


class Wide(TwoStreams):
    """The second stream is longer, and no mask is its own."""

    def forward(self, **batch: Tensor) -> Tensor:
        text, image = self.embed(batch["input_ids"]), batch["pixel_values"]
        return self.encoder(text).mean() + self.decoder(image).mean()  # type: ignore[no-any-return]


def test_rows_of_another_stream_are_not_warned_of() -> None:
    batch = {"input_ids": ids(0, 2, 3), "pixel_values": torch.ones(2, 5, 8), "attention_mask": mask(1, 3, size=3)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(Wide(), batch, where=bp.named("*coder.weight", (4, 4))) == {"encoder": 4, "decoder": 10}


def ids(seed: int, *size: int) -> Tensor:
    return torch.randint(0, 50, size, generator=torch.Generator().manual_seed(seed))


def mask(*lengths: int, size: int) -> Tensor:
    return (torch.arange(size) < torch.tensor(lengths)[:, None]).long()


@settings(max_examples=10)
@given(seed=seeds, encoder=st.integers(1, 6), decoder=st.integers(1, 6), size=st.sampled_from([6, 7]), masked=st.booleans())
def test_each_stream_has_the_weights_of_its_own_mask(seed: int, encoder: int, decoder: int, size: int, masked: bool) -> None:
    batch = {"input_ids": ids(seed, 2, 6), "attention_mask": mask(encoder, 6, size=6), "decoder_input_ids": ids(seed + 1, 2, size)}
    if masked:
        batch["decoder_attention_mask"] = mask(decoder, size, size=size)
    want = {"encoder": encoder + 6, "cross": encoder + 6, "decoder": decoder + size if masked else 2 * size}
    assert run(TwoStreams(), batch) == want


@pytest.mark.parametrize("selected", ["decoder", "encoder"])
def test_one_stream_alone_may_be_selected(selected: str) -> None:
    batch = {"input_ids": ids(0, 2, 6), "attention_mask": mask(2, 6, size=6), "decoder_input_ids": ids(1, 2, 6)}
    where = bp.named(f"{selected}.weight", (4, 4))
    fold = collect.fold(TwoStreams(), where=where, statistics=[statistics.input_sq], batches=[batch])
    assert float(fold.sums[f"{selected}.weight", "input_sq"]["n"]) == (12 if selected == "decoder" else 8)


def test_masks_with_prefixes_count_for_the_entries_with_the_same_prefix() -> None:
    class Towers(TwoStreams):
        def forward(self, **batch: Tensor) -> Tensor:
            return self.encoder(self.embed(batch["query_ids"])) + self.decoder(self.embed(batch["document_ids"])) + self.cross.bias

    batch = {
        "query_ids": ids(0, 2, 6),
        "query_attention_mask": mask(2, 6, size=6),
        "document_ids": ids(1, 2, 6),
        "document_attention_mask": mask(3, 6, size=6),
    }
    where = bp.named("[ed]*coder.weight", (4, 4))
    fold = collect.fold(Towers(), where=where, statistics=[statistics.input_sq], batches=[batch])
    assert {name: float(sums["n"]) for (name, _), sums in fold.sums.items()} == {"encoder.weight": 8, "decoder.weight": 9}


def test_unknown_streams_of_one_shape_are_refused_and_can_be_named() -> None:
    model = TwoStreams("source", "target")
    batch = {"source": ids(0, 2, 6), "target": ids(1, 2, 6), "attention_mask": mask(2, 6, size=6)}
    with pytest.raises(ValueError, match=r"encoder.weight: its rows have the shape \(2, 6\).*source.*token_weights=lambda batch"):
        run(model, batch)
    by_entry = run(model, batch, token_weights=lambda b: {"target": None, "source": b["attention_mask"]})
    assert by_entry == {"encoder": 8, "cross": 8, "decoder": 12}
    with pytest.raises(ValueError, match="token_weights has a key 'sauce', but the batch has the entries 'source', 'target'"):
        run(model, batch, token_weights=lambda b: {"sauce": b["attention_mask"]})
    assert run(model, batch, token_weights=lambda b: None) == {"encoder": 12, "cross": 12, "decoder": 12}


def test_targets_that_no_layer_uses_are_no_stream() -> None:
    model, x = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8)), ids(0, 2, 6)
    weights = mask(2, 6, size=6)
    assert run(model, (x, x.clone()), token_weights=lambda b: weights) == {"1": 8}


def test_a_batch_of_inputs_and_targets_uses_the_mask_of_the_inputs() -> None:
    model = TwoStreams()
    batch = {"input_ids": ids(0, 2, 6), "attention_mask": mask(2, 6, size=6), "decoder_input_ids": ids(1, 2, 7)}
    assert run(model, (batch, torch.zeros(2))) == {"encoder": 8, "cross": 8, "decoder": 14}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.tensor([[0.0, -torch.inf]]), "holds negative values, as a mask that is added to attention scores"),
        (torch.tensor([[0.0, -1e9]]), "holds negative values"),
        (torch.tensor([[0.0, 0.0]]), "is 0 everywhere"),
        (torch.tensor([[1.0, torch.nan]]), "holds NaN"),
        (torch.tensor([[1.0, torch.inf]]), "holds inf"),
        (torch.ones(1, 1, 2, 2), r"has the shape \(1, 1, 2, 2\) instead of \[batch, positions\]"),
    ],
)
def test_masks_that_are_no_weights_are_refused(weights: Tensor, message: str) -> None:
    class Masked(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = Masked(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.fc(x)  # type: ignore[no-any-return]

    batch = {"x": torch.ones(1, 2, 4), "attention_mask": weights}
    with pytest.raises(ValueError, match=f"the attention_mask .*{message}.*token_weights="):
        run(Model(), batch)


@pytest.mark.parametrize("weights", [torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, torch.nan]])])
def test_the_users_own_weights_are_checked_too(weights: Tensor) -> None:
    with pytest.raises(ValueError, match=r"token_weights \(1, 2\) holds (negative|NaN)"):
        run(nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 2, 4), token_weights=lambda batch: weights)


def test_weights_of_zero_alone_are_told_from_a_layer_that_is_never_called() -> None:
    with pytest.raises(ValueError, match=r"0.weight .*: the batches are empty, or all rows of its Linear have the token weight 0"):
        collect.with_statistics(
            nn.Sequential(nn.Linear(4, 4)),
            where=bp.linears((4, 4)),
            statistics=[statistics.input_sq],
            batches=[torch.ones(1, 2, 4)],
            token_weights=lambda batch: torch.zeros(1, 2),
        )
