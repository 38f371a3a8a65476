"""The models of `recover.py`: how each is pruned, trained and judged.

Wikipedia articles, news texts and photos come from packages (`blockprune.examples` says which). Photos for EfficientNet-Lite0 besides the
20 of ImageNet, which are only reported: those of Debian's ``gcompris-qt-data``, or a folder of your own.
"""

import argparse
import gzip
import html
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import front_page
import tiny
import torch
from quality import SEED, Task, minilm_task, next_token_loss, smollm_task, tiny_task
from torch import Tensor, nn

import blockprune as bp
from blockprune import export, losses
from blockprune.analysis.pictures import quality_against_latency
from blockprune.examples import efficientnet, minilm, smollm

REPORTED, VALIDATION = 30, 4  # articles: the last ones are reported, those before them are for choices, all others are trained on
NEWS_VALIDATION, NEWS_REPEATS = 20, 3  # of the news texts of MiniLM: how many are for choices, and how often a pass has the others


class Spans:
    """Batches of random spans of a text, all of one length in a batch; one pass takes as many tokens as the text has."""

    def __init__(self, ids: Tensor, per_batch: int, lengths: tuple[int, int], as_batch: Callable[[Tensor], Any] = lambda x: x) -> None:
        self.ids, self.per_batch, self.lengths, self.as_batch = ids, per_batch, lengths, as_batch

    def __len__(self) -> int:
        return max(1, len(self.ids) // self.per_batch)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            length = int(torch.randint(self.lengths[0], self.lengths[1] + 1, ()))
            starts = torch.randint(len(self.ids) - length + 1, (max(1, self.per_batch // length), 1))
            yield self.as_batch(self.ids[starts + torch.arange(length)])


@attrs.frozen(eq=False)
class Problem:
    """A model and how it is pruned, trained, and judged."""

    task: Task
    batches: Iterable[Any]
    validation: Sequence[Any]
    forward: Callable[[Any, Any], Any]
    losses: tuple[str, ...]  # that suit the model, the default first
    curve: Callable[[nn.Module], float]  # a figure of the validation texts
    curve_name: str
    figures: Callable[[nn.Module], dict[str, float]]  # of the texts or photos that are reported
    deploy: Callable[[Mapping[str, nn.Module], argparse.Namespace], None] | None = None  # by name: export, time and draw masked models
    unit: str = "tokens"
    method: str = "OBS + budget + cluster"
    lr: float = 5e-4
    data: str = ""  # what it is trained and judged on, where that depends on what is installed


def smollm_problem(options: argparse.Namespace) -> Problem:
    task = smollm_task(16, options.held_out, 24, options.device)
    tokenizer, texts = smollm.load()[1], smollm.articles()
    training, validation = texts[: -REPORTED - VALIDATION], texts[-REPORTED - VALIDATION : -REPORTED]
    ids = [token for text in training for token in tokenizer(text, verbose=False)["input_ids"]]
    windows = {
        "validation": smollm.windows(tokenizer, validation, 8),
        "Wikipedia": smollm.windows(tokenizer, texts[-REPORTED:], options.held_out),
        "news": smollm.windows(tokenizer, minilm.background(), options.held_out),
    }
    windows = {name: x.to(options.device) for name, x in windows.items()}
    return Problem(
        task=task,
        batches=Spans(torch.tensor(ids), options.step_tokens // options.accumulate, (512, 512)),
        validation=list(windows["validation"].split(2)),
        forward=hidden_too if "hidden" in (options.loss or "") else lambda model, batch: model(batch, use_cache=False),
        losses=("KL", "KL + cross-entropy", "KL + hidden states", "cross-entropy"),
        curve=lambda model: smollm.perplexity(model, windows["validation"]),
        curve_name="perplexity",
        figures=lambda model: {f"perplexity {name}": smollm.perplexity(model, windows[name]) for name in ("Wikipedia", "news")},
    )


def hidden_too(model: Callable[..., Any], batch: Any) -> Any:
    inputs = batch if isinstance(batch, dict) else {"input_ids": batch, "use_cache": False}
    return model(**inputs, output_hidden_states=True)


def minilm_problem(options: argparse.Namespace) -> Problem:
    task = minilm_task(128, options.device)
    model, tokenizer = task.model, minilm.load()[1]
    texts = smollm.articles()
    training, validation = texts[: -REPORTED - VALIDATION], texts[-REPORTED - VALIDATION : -REPORTED]
    news = minilm.background()
    training = [*options.repeats * [*training, *NEWS_REPEATS * news[:-NEWS_VALIDATION]], *map(plain_text, files(options.texts))]
    ids = [token for text in training for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def as_batch(spans: Tensor) -> dict[str, Tensor]:
        first, last = (torch.full((len(spans), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
        tokens = torch.cat([first, spans, last], 1)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def encoded(texts: list[str]) -> list[dict[str, Tensor]]:
        batches = (minilm.tokens(tokenizer, texts[i : i + 10]) for i in range(0, len(texts), 10))
        return [{key: x.to(options.device) for key, x in batch.items()} for batch in batches]

    batches = {
        "validation": encoded([*paragraphs(validation)[:60], *news[-NEWS_VALIDATION:]]),
        "Wikipedia": encoded(paragraphs(texts[-REPORTED:])[: 5 * options.held_out]),
        "Lee50": encoded(minilm.documents()),
    }
    with torch.no_grad():
        dense = {name: torch.cat([minilm.embed(model, batch) for batch in parts]) for name, parts in batches.items()}

    def cosine(model: nn.Module, name: str) -> float:
        return minilm.mean_cosine(model, batches[name], dense[name])

    def figures(model: nn.Module) -> dict[str, float]:
        cosines = {f"cosine {name}": cosine(model, name) for name in ("Lee50", "Wikipedia")}
        return {**cosines, "correlation Lee50": minilm.pearson(model, batches["Lee50"])}

    return Problem(
        task=task,
        batches=Spans(torch.tensor(ids), options.step_tokens // options.accumulate, (16, 160), as_batch),
        validation=batches["validation"],
        forward=hidden_too,
        losses=("cosine + hidden states", "cosine + last hidden states", "cosine"),
        curve=partial(cosine, name="validation"),
        curve_name="cosine with the dense embeddings",
        figures=figures,
        deploy=partial(deploy_minilm, task.model, tokenizer),
    )


def files(paths: Sequence[Path]) -> list[Path]:
    """The files, and the text files in the folders."""
    inside = {path: (file for file in path.rglob("*") if file.name.endswith((".html", ".txt", ".txt.gz"))) for path in paths}
    return [file for path in paths for file in ([path] if path.is_file() else sorted(inside[path]))]


def plain_text(path: Path) -> str:
    """The paragraphs of a text or HTML file that are longer than a line."""
    text = gzip.decompress(path.read_bytes()).decode(errors="replace") if path.suffix == ".gz" else path.read_text(errors="replace")
    if path.suffix == ".html":
        text = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", "", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"(?i)<(p|div|br|li|h\d|tr)\b[^>]*>", "\n\n", text)))
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n".join(part for part in parts if len(part) >= 60)


def paragraphs(texts: list[str]) -> list[str]:
    """The paragraphs of 200 to 1,200 characters."""
    return [part for text in texts for part in text.split("\n") if 200 <= len(part) <= 1200]


def tiny_problem(options: argparse.Namespace) -> Problem:
    task = attrs.evolve(tiny_task(4), model=tiny.load())
    windows = tiny.windows(6)

    def perplexity(model: nn.Module) -> float:
        with torch.no_grad():
            return float(next_token_loss(model(windows), windows).exp())

    return Problem(
        task=task,
        batches=Spans(tiny.windows(8).flatten(), options.step_tokens // options.accumulate, (16, 32)),
        validation=[windows],
        forward=lambda model, batch: model(batch, output_hidden_states=True),
        losses=("KL", "KL + cross-entropy", "KL + hidden states", "cross-entropy"),
        curve=perplexity,
        curve_name="perplexity",
        figures=lambda model: {"perplexity": perplexity(model)},
    )


# Photos.

GCOMPRIS = Path("/usr/share/gcompris-qt/rcc")
RETINA = 8  # the thumbnails by which photos are compared are so many pixels wide and high
ALIKE = 0.95  # correlation of the thumbnails of two photos from which on only one of them is used


class Crops:
    """Batches of random crops of photos; one pass takes as many crops as there are photos."""

    def __init__(self, photos: Sequence[Tensor], per_batch: int) -> None:
        self.photos, self.per_batch = photos, per_batch

    def __len__(self) -> int:
        return max(1, len(self.photos) // self.per_batch)

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(len(self)):
            yield efficientnet.random_crops(self.photos, self.per_batch)


def different_photos(folder: Path) -> list[Tensor]:
    """The photos below a folder, in a random order: JPEG, PNG, WebP, and the WebP images in the resource files of gcompris.

    Those smaller than the model's input, without colours of their own (transparent or indexed) or much like another one are left out.
    """
    from PIL import Image  # noqa: PLC0415 (an extra)

    photos: list[Tensor] = []
    seen = torch.empty(0, 3 * RETINA**2)
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".rcc")):
        data = path.read_bytes()
        for image in images_inside(data) if path.suffix == ".rcc" else [data]:
            photo = Image.open(io.BytesIO(image))
            if photo.mode != "RGB" or min(photo.size) < efficientnet.SIDE:
                continue
            pixels = efficientnet.pixels(photo)
            small = nn.functional.adaptive_avg_pool2d(pixels, RETINA).flatten()
            small = nn.functional.normalize(small - small.mean(), dim=0)
            if not (seen @ small > ALIKE).any():
                photos.append(pixels)
                seen = torch.cat([seen, small[None]])
    if len(photos) < 8:
        raise SystemExit(
            f"{folder} has {len(photos)} photos of at least {efficientnet.SIDE} pixels, and 8 are the fewest; give --photos FOLDER, or "
            "install those of Debian: apt-get install gcompris-qt-data"
        )
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(SEED))
    return [photos[i] for i in order.tolist()]


def images_inside(data: bytes) -> list[bytes]:
    """The WebP images that a file holds one after the other, uncompressed."""
    starts = [match.start() for match in re.finditer(rb"RIFF....WEBP", data, re.DOTALL)]
    return [data[start : start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")] for start in starts]


def efficientnet_problem(options: argparse.Namespace) -> Problem:
    photos, (imagenet, classes) = different_photos(options.photos), efficientnet.photos()
    reported, validation = len(photos) // 4, len(photos) // 8
    parts = {"photos": photos[:reported], "ImageNet": imagenet}
    images = {name: efficientnet.center(part).to(options.device) for name, part in parts.items()}
    training = photos[reported + validation :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        held_out = efficientnet.random_crops(photos[reported : reported + validation], 4 * validation).to(options.device)
    model = efficientnet.load().to(options.device)
    task = efficientnet_task(model, training, options.device)
    with torch.no_grad():
        dense = {name: model(x) for name, x in [*images.items(), ("validation", held_out)]}

    @torch.no_grad()
    def divergence(model: nn.Module, name: str) -> float:
        return float(losses.kl(model(held_out if name == "validation" else images[name]), dense[name], None))

    @torch.no_grad()
    def figures(model: nn.Module) -> dict[str, float]:
        top = {name: model(x).argmax(1) for name, x in images.items()}
        same = {f"top-1 as dense, {name}": float((top[name] == dense[name].argmax(1)).double().mean()) for name in images}
        right = float((top["ImageNet"].cpu() == classes).double().mean())
        return {**same, "top-1 right, ImageNet": right, **{f"KL, {name}": divergence(model, name) for name in images}}

    return Problem(
        task=task,
        batches=Crops(training, options.step_tokens // options.accumulate),
        validation=list(held_out.split(32)),
        forward=lambda model, batch: model(batch),
        losses=("KL",),
        curve=partial(divergence, name="validation"),
        curve_name="KL from the dense model",
        figures=figures,
        deploy=partial(deploy_efficientnet, model, figures, images["ImageNet"][:1]),
        unit="crops",
        method="OBS + budget",
        lr=1e-5,  # AdamW at 1e-4 raises the loss of the validation photos
        data=f"{len(training)} photos trained on, {validation} for choices, {reported} and {len(imagenet)} of ImageNet reported",
    )


def efficientnet_task(model: nn.Module, photos: Sequence[Tensor], device: str) -> Task:
    """Prune the 1x1 convolutions; the loss for gradients is that of classes that the dense model draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        batches = list(efficientnet.random_crops(photos, 128).to(device).split(8))
        with torch.no_grad():
            drawn = [(x, model(x).softmax(1).multinomial(1)[:, 0]) for x in batches]
    blocks = [f"_blocks.{i}" for i in range(len(model.get_submodule("_blocks")))]  # type: ignore[arg-type]
    pointwise = re.compile(r".*_(expand|project)_conv\.weight|_conv_head\.weight")
    return Task(
        model=model,
        prunable=lambda block: bp.named(pointwise, block),
        calibration=bp.Calibration(batches, progress=False),
        gradients=bp.Calibration(drawn, loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch[1]), progress=False),
        figures=lambda model: [],
        down="",
        example=batches[0][:1],
        layers=[*blocks, "_conv_head"],
    )


# Export.


def deploy_minilm(dense: nn.Module, tokenizer: Any, masked: Mapping[str, nn.Module], options: argparse.Namespace) -> None:
    """Speed and size of the exported models beside dense ones, in a table and a picture."""
    speeds, quality = front_page.compared(dense, tokenizer, masked, options.rounds)
    share = f"{options.sparsity:.0%}"
    title = f"MiniLM with {share} of its 16x16 blocks pruned"
    front_page.draw(speeds, quality, {name: {share: name} for name in masked}, options.deploy, title)


def deploy_efficientnet(
    dense: nn.Module,
    figures: Callable[[nn.Module], dict[str, float]],
    inputs: Tensor,
    masked: Mapping[str, nn.Module],
    options: argparse.Namespace,
) -> None:
    """Speed of the exported models beside the dense one, and how often they say what it says, in a table and a picture."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models = {name: export.block_sparse(model, inputs=inputs) for name, model in masked.items()}
    speeds = export.benchmark(dense, *models.values(), names=list(models), inputs=inputs, rounds=options.rounds)
    torch.set_num_threads(threads)
    print(f"\nOne thread, one image a call\n{speeds}")
    same = {name: figures(model)["top-1 as dense, photos"] for name, model in models.items()}
    points = {name: {f"{options.sparsity:.0%}": (front_page.milliseconds(speeds, name), value)} for name, value in same.items()}
    axes = quality_against_latency(
        {"float32": (front_page.milliseconds(speeds, "dense"), 1.0)},
        points,
        latency="milliseconds an image (one thread)",
        quality="share of photos with the dense model's first class",
        title=f"EfficientNet-Lite0, {options.sparsity:.0%} of the {options.pattern} blocks of its 1x1 convolutions pruned",
    )
    axes.figure.savefig(options.deploy, dpi=150)


PROBLEMS = {"smollm": smollm_problem, "minilm": minilm_problem, "efficientnet": efficientnet_problem, "tiny": tiny_problem}
