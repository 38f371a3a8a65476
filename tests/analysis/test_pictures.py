"""Pictures are legible as saved: titles and labels lie inside the figure and do not cover each other."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.text import Text
from torch import nn

import blockprune as bp
from blockprune.analysis.drawing import short_names

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
NAMES = [f"model.layers.{layer}.{kind}.weight" for layer in range(30) for kind in KINDS]
DENSE = {"float32": (55.6, 0.656), "float32, oneDNN packed": (51.2, 0.656), "bfloat16": (28.3, 0.655), "int8": (27.5, 0.64)}
PRUNED = {
    "16x16 blocks": {"25%": (47.0, 0.66), "50%": (34.0, 0.65), "75%": (22.0, 0.63), "90%": (14.0, 0.50)},
    "32x32 blocks, clustered and repaired": {"25%": (46.5, 0.655), "50%": (33.5, 0.635), "75%": (20.0, 0.6)},
}


def table(rows: int, columns: int) -> bp.Sensitivity:
    rises = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)).pow(6) * 10
    losses = {name: tuple(3 + rise for rise in row) for name, row in zip(NAMES, rises.tolist(), strict=False)}
    return bp.Sensitivity(tuple(0.05 * (i + 1) for i in range(columns)), 3.0, losses)


def curve(unit: str) -> bp.Pareto:
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)) ** 4
    return bp.pareto({"w": bp.BlockScore(values, bp.BlockGrid((800_000,), (4000,)))}, unit=unit)


def swept(recipes: int) -> bp.Sweep:
    names = ["magnitude", "Wanda, ranked in each row of blocks", "OBS with a budget and least squares", "SparseGPT"][:recipes]
    points = itertools.product(enumerate(names), (0.1, 0.25, 0.5, 0.75))
    rows = [bp.SweepRow(name, s, s, 0.1, {"perplexity": 20 * (1 + 10 * k * s**2) ** (1 + 3 * s)}) for (k, name), s in points]
    return bp.Sweep(tuple(rows), {"perplexity": 21.6})


def keep(*grid: int) -> torch.Tensor:
    return torch.rand(*grid, generator=torch.Generator().manual_seed(0)) > 0.4


MASKS = {
    "model.layers.0.self_attn.q_proj.weight": bp.BlockMask(keep(16, 16), bp.BlockGrid((256, 256), (16, 16))),
    "model.layers.0.mlp.a_projection_with_a_name_that_is_far_too_long.weight": bp.BlockMask(keep(9, 3), bp.BlockGrid((66, 24), (8, 8))),
    "model.layers.0.mlp.down_proj.weight": bp.BlockMask(keep(300, 900), bp.BlockGrid((300, 900), (1, 1))),
    "model.stem.conv.weight": bp.BlockMask(keep(17, 9, 1, 1), bp.BlockGrid((66, 34, 3, 3), (4, 4, 3, 3))),
    "model.stem.bias": bp.BlockMask(keep(66), bp.BlockGrid((66,), (1,))),
}
PICTURES: dict[str, Callable[[], Any]] = {
    "sensitivity of one": lambda: table(1, 1).plot(),
    "sensitivity of few": lambda: table(6, 3).plot(),
    "sensitivity of many": lambda: table(150, 8).plot(),
    "sensitivity of all": lambda: table(150, 4).plot(most=150),
    "sensitivity on small axes": lambda: table(150, 4).plot(plt.subplots(figsize=(6, 4), layout="constrained")[1], most=150),
    "pareto in weights": lambda: curve("weights").plot(),
    "pareto in microseconds": lambda: curve("microseconds on one thread, batch 128").plot(),
    "sweep of one": lambda: swept(1).plot(),
    "sweep": lambda: swept(4).plot(),
    "masks": lambda: bp.pictures.masks(MASKS).axes[0],
    "masks in one column": lambda: bp.pictures.masks(MASKS, columns=1).axes[0],
    "mask": lambda: bp.pictures.mask(MASKS["model.stem.conv.weight"]),
    "latency": lambda: bp.pictures.quality_against_latency(DENSE, PRUNED, quality="correlation", title="MiniLM without retraining " * 3),
    "latency of one": lambda: bp.pictures.quality_against_latency({"float32": (3.0, 0.5)}, {}),
}


def texts_of(figure: Any) -> list[Text]:
    """All texts that are visible: titles, labels, ticks within their axis, legends, annotations."""
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    ticks, minor = (
        {label for axis in axes for tick in getattr(axis, which)() for label in (tick.label1, tick.label2)}
        for which in ("get_major_ticks", "get_minor_ticks")
    )
    frames = {label: ax.get_window_extent() for ax in figure.axes for label in (*ax.get_xticklabels(), *ax.get_yticklabels())}
    return [text for text in shown if text not in minor and (text not in ticks or (text in frames and _in_view(text, frames[text])))]


def _in_view(label: Text, frame: Any) -> bool:
    """Whether a tick lies within the limits of its axis; matplotlib keeps labels of ticks outside, and does not draw them."""
    box = label.get_window_extent()
    x, y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    return bool(frame.x0 - 1 <= x <= frame.x1 + 1 or frame.y0 - 1 <= y <= frame.y1 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_titles_and_labels_lie_inside_the_figure_and_apart(name: str, tmp_path: Path) -> None:
    ax = PICTURES[name]()
    figure = ax.figure
    figure.savefig(tmp_path / "picture.png")
    page = figure.bbox
    texts = texts_of(figure)
    boxes = [text.get_window_extent() for text in texts]
    cut = [text.get_text() for text, b in zip(texts, boxes, strict=True) if b.x0 < 0 or b.y0 < 0 or b.x1 > page.x1 or b.y1 > page.y1]
    assert not cut
    pairs = itertools.combinations(zip(texts, [box.padded(-0.5) for box in boxes], strict=True), 2)
    covered = [(a.get_text(), b.get_text()) for (a, p), (b, q) in pairs if p.overlaps(q)]
    assert not covered
    assert len(texts) >= 3


def test_pictures_are_drawn_on_the_axes_that_are_given() -> None:
    figure, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
    assert table(6, 3).plot(axes[0, 0]) is axes[0, 0]
    assert curve("weights").plot(ax=axes[0, 1]) is axes[0, 1]
    assert swept(2).plot(ax=axes[0, 2]) is axes[0, 2]
    assert bp.pictures.mask(MASKS["model.stem.bias"], ax=axes[1, 0]) is axes[1, 0]
    assert bp.pictures.quality_against_latency(DENSE, PRUNED, ax=axes[1, 1]) is axes[1, 1]
    assert bp.pictures.masks({"w": MASKS["model.stem.bias"]}, axes=[axes[1, 2]]) is figure
    assert plt.get_fignums() == [figure.number]


def test_a_mask_is_drawn_as_it_is() -> None:
    mask = bp.BlockMask(torch.tensor([[True, False], [False, True], [True, True]]), bp.BlockGrid((5, 4), (2, 2)))
    ax = bp.pictures.mask(mask)
    (image,) = ax.images
    assert image.get_array().tolist() == mask.keep.float().tolist()
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 4), (5, 0))
    assert image.get_extent() == [0, 4, 6, 0], "the last row of blocks is half outside"
    fine = bp.BlockMask(torch.arange(512 * 4).view(512, 4) % 2 == 0, bp.BlockGrid((512, 4), (1, 1)))
    assert torch.tensor(bp.pictures.mask(fine).images[0].get_array().tolist()).shape == (256, 4)


def test_names_are_short_and_stay_different() -> None:
    assert short_names(NAMES[:2]) == ["q_proj", "k_proj"]
    assert short_names(["fc.weight"]) == ["fc"]
    assert short_names(["a.weight", "a.bias"]) == ["a.weight", "a.bias"]
    alike = [f"{'x' * 20}{i}{'y' * 20}.weight" for i in range(3)]
    assert len(set(short_names(alike))) == 3
    assert max(map(len, short_names(["m.long_" + "x" * 40, "n.b"]))) <= 32


def test_the_most_sensitive_parameters_are_drawn_in_the_models_order() -> None:
    sensitivity = bp.Sensitivity((0.5,), 1.0, {"x.a": (2.0,), "x.b": (1.1,), "x.c": (9.0,)})
    ax = sensitivity.plot(most=2)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["x.a", "x.c"]
    assert "2 most sensitive of 3" in ax.get_title().replace("\n", " ")


def test_a_table_without_a_rise_is_drawn() -> None:
    bp.Sensitivity((0.5,), 1.0, {"x.a": (1.0,), "x.b": (0.9,)}).plot().figure.canvas.draw()
    bp.Sensitivity((0.5,), 1.0, {"x.a": (float("inf"),), "x.b": (float("nan"),)}).plot().figure.canvas.draw()


def test_wrong_input_is_an_error() -> None:
    with pytest.raises(ValueError, match="one or more of both"):
        bp.pictures.masks({})
    with pytest.raises(ValueError, match="axes has 0 entries for 5 masks"):
        bp.pictures.masks(MASKS, axes=[])
    with pytest.raises(ValueError, match="dense must hold one or more"):
        bp.pictures.quality_against_latency({}, PRUNED)
    with pytest.raises(ValueError, match="two finite numbers"):
        bp.pictures.quality_against_latency(DENSE, {"16x16": {"50%": (float("nan"), 0.5)}})
    for point in ((1.0, 2.0, 3.0), (1.0,), 1.0, "12", (1.0, 1j), None):
        with pytest.raises(ValueError, match="two finite numbers"):
            bp.pictures.quality_against_latency({"float32": point}, PRUNED)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="16x16 is a tuple; give a mapping from labels"):
        bp.pictures.quality_against_latency(DENSE, {"16x16": (1.0, 2.0)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"mask is a dict; give one BlockMask, .*bp\.pictures\.masks\(masks\)"):
        bp.pictures.mask(MASKS)
    for most in (0, -1, 1.5):
        with pytest.raises(ValueError, match=r"most=.* must be an integer, at least 1"):
            bp.Sensitivity((0.5,), 1.0, {"a": (2.0,)}).plot(most=most)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in PICTURES if "axes" not in name])
def test_without_matplotlib_the_error_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"blockprune\[plot\]\""):
        PICTURES[name]()


def test_the_masks_of_a_model_are_drawn_under_their_names() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    result = bp.recipes.magnitude(bp.linears((4, 4)))(model, 0.5)
    figure = bp.pictures.masks(result.masks)
    assert [ax.get_title().split("\n")[0] for ax in figure.axes] == ["0.weight", "2.weight"]
