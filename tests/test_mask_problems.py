"""The networks and images of `benchmarks/train_masks.py`."""

import gzip
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import blockprune as bp

FILE = Path(__file__).parents[1] / "benchmarks" / "mask_problems.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def problems() -> dict[str, Any]:
    return runpy.run_path(str(FILE))


@pytest.mark.parametrize("side", [4, 16])
@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "vit"])
def test_all_layers_but_the_first_and_the_last_are_prunable_and_the_network_trains(problems: dict[str, Any], name: str, side: int) -> None:
    problem = problems["PROBLEMS"][name]
    model, pixels = problem.network(), 784 if name == "fashion-mnist" else 64
    masks = bp.recipes.magnitude(problem.prunable(side))(model, 0.5).masks
    weights = [key for key, p in model.named_parameters() if p.ndim >= 2 and key != "place"]
    assert set(masks) == set(weights[1:-1])
    bp.apply_masks(model, masks)
    optimizer = problem.optimizer(model.parameters())
    images, labels = torch.rand(32, pixels), torch.randint(10, (32,))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_images_are_read_from_gzipped_files_and_split(problems: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    written = {}
    for part, count in (("train", 40), ("t10k", 10)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            numbers = torch.randint(256 if len(shape) > 1 else 10, shape, generator=generator, dtype=torch.uint8)
            header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + numbers.numpy().tobytes()))
            written[part, kind] = numbers
    names = problems["fashion_of"].__globals__
    for name, value in {"FASHION": tmp_path, "FASHION_TRAINING": 30, "FASHION_VALIDATION": 10}.items():
        monkeypatch.setitem(names, name, value)
    names["fashion_file"].cache_clear()
    images, labels, measured, measured_labels = problems["fashion_of"]("test")
    assert torch.equal(images, written["train", "images-idx3"][:30].flatten(1) / 255)
    assert torch.equal(labels, written["train", "labels-idx1"][:30].long())
    assert torch.equal(measured, written["t10k", "images-idx3"].flatten(1) / 255)
    assert torch.equal(measured_labels, written["t10k", "labels-idx1"].long())
    _, _, measured, measured_labels = problems["fashion_of"]("validation")
    assert torch.equal(measured, written["train", "images-idx3"][30:].flatten(1) / 255)
    assert torch.equal(measured_labels, written["train", "labels-idx1"][30:].long())
    names["fashion_file"].cache_clear()
    monkeypatch.setitem(names, "FASHION", tmp_path / "absent")
    with pytest.raises(SystemExit, match="absent is missing; install it: apt-get install dataset-fashion-mnist"):
        problems["fashion_of"]("test")
