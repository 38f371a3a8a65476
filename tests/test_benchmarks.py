"""Each benchmark runs with tiny models and prints its table. Real models belong to `make bench`."""

import contextlib
import gc
import io
import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from blockprune.examples import efficientnet

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of transformers and what it imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def run(script: str, *options: str) -> str:
    """What a script prints; it runs in this process, which may have imported torch and transformers already."""
    output, threads = io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.syspath_prepend(FOLDER)
        patch.setattr(sys, "argv", [script, *options])
        gc.collect()
        gc.freeze()  # benchmarks collect garbage often, and would go through the objects of all other tests each time
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert torch.get_num_threads() == threads, "the script must set the number of threads back"
    return output.getvalue()


@pytest.mark.parametrize(
    ("script", "row"),
    [
        ("prune.py", r"\(4, 4\) +1  (blockprune|torch.ao)"),
        ("masked_forward.py", r" +1 +16 +\(\d+, -?\d+\) "),
        ("calibration.py", r" +1  (input_gram|gate_fisher|Wanda +blockprune|Taylor +blockprune) "),
        ("obs.py", r" +1 +64 +\(\d+, \d+\) "),
        ("scale.py", r" +\d\.\d\d +[13] +64(?: +\d\.\d{3}){4} +\d\.\d\d +\d+ +1 +the same$"),
        ("growth.py", r"(export.block_sparse|\d+ layers) .* \d+\.\d+"),
        ("memory.py", r"(find_axes, first batch|cluster_units|apply_masks) +\d+\.\d+ +-?\d+\.\d+ +\d+\.\d"),
    ],
)
def test_a_benchmark_prints_its_table(script: str, row: str) -> None:
    assert len(re.findall(rf"^{row}", run(script, "--tiny"), re.MULTILINE)) >= 2


def test_two_processes_prune_a_checkpoint_folder_with_the_masks_of_one() -> None:
    output = run("scale.py", "--tiny", "--recipe", "obs", "--processes", "1", "2")
    assert re.findall(r" +\d+ +([12]) +the same$", output, re.MULTILINE) == ["1", "2"]


def test_the_speed_of_layers() -> None:
    output = run("speed.py", "layers", "--tiny", "--roofline", "--bsr")
    assert re.findall(r"^    (\S+(?: \S+)?) +\d", output, re.MULTILINE) == ["16x16", "BSR 16x16", "16x1"] * 2


def test_the_speed_of_convolutions() -> None:
    row = r"^(?:ResNet-18|Efficient) 3x3 8-8 8 +1 +[\d.]+ +\d+(?: +[\d.]+x){6}$"
    assert len(re.findall(row, run("conv.py", "layers", "--tiny"), re.MULTILINE)) == 2
    row = r"^  (?:16x16|filters) +\d+%: .* of 19 layers block-sparse$"
    assert len(re.findall(row, run("conv.py", "model", "--tiny"), re.MULTILINE)) == 6


def test_the_speed_of_models() -> None:
    output = run("speed.py", "models", "--tiny")
    assert re.findall(r"^Tiny model, (.*);", output, re.MULTILINE) == ["2 x 32 tokens", "one token after 8", "16 x 1 tokens"]
    assert len(re.findall(r"^16x16 50%, \d+ of 14 layers sparse +float32", output, re.MULTILINE)) == 3


def test_the_quality_table_and_the_speed_of_its_masks(tmp_path: Path) -> None:
    methods = ["magnitude", "Wanda", "SparseGPT", "OBS + budget + cluster"]
    options = ["--model", "tiny", "--patterns", "32x32", "--sparsities", "0.5", "--save", str(tmp_path), "--methods", *methods]
    rows = [line for line in run("quality.py", *options).splitlines() if line.startswith("32x32")]
    assert [method in row and " 50.0%" in row for row, method in zip(rows, methods, strict=True)] == [True] * 4
    (masks,) = tmp_path.glob("*OBS*")
    output = run("speed.py", "models", "--tiny", "--models", "encoder", "--masks", str(masks))
    assert "tiny, 32x32, 0.5, OBS + budget + cluster, " in output


def test_ways_to_train_masks_end_at_their_sparsity(tmp_path: Path) -> None:
    output = run("train_masks.py", "--tiny", "--picture", str(tmp_path / "picture.png"))
    rows = re.findall(r"^(\S+(?: \w+)?) +(\d+\.\d)% +[\d.]+ \+- 0\.0 +[\d.]+ +[\d.]+ +[\d.]+%$", output, re.MULTILINE)
    assert len(rows) == 21
    assert all(abs(float(pruned) - target) < 1 for (_, pruned), target in zip(rows[1:], [80, 90] * 10, strict=True))
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_front_page_draws_its_picture(tmp_path: Path) -> None:
    output = run("front_page.py", "--tiny", "--picture", str(tmp_path / "picture.png"))
    assert re.findall(r"^(dense int8|50% pruned, float32)  +\w+ +[\d.]+ ", output, re.MULTILINE) == ["dense int8", "50% pruned, float32"]
    assert re.search(r"^  50% pruned, float32 +0\.\d{3}$", output, re.MULTILINE)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_recovery_goes_on_from_its_file_and_draws_its_picture(tmp_path: Path) -> None:
    options = ["--model", "tiny", "--pattern", "32x32", "--method", "magnitude", "--tokens", "256", "--step-tokens", "32", "--every", "64"]
    options += ["--folder", str(tmp_path)]
    outputs = [run("recover.py", *options, "--picture", str(tmp_path / "curve.png")) for _ in range(2)]
    assert outputs[0] == outputs[1]  # the second run finds all steps done
    assert len(re.findall(r"^ +[\d,]+ +\d+  [\d.]+$", outputs[0], re.MULTILINE)) == 5
    assert re.search(r"^after / dense +\d\.\d{3}$", outputs[0], re.MULTILINE)
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    control = next(tmp_path.glob("tiny 32x32*.json"))
    assert re.search(r"^dense, trained +\d", run("recover.py", *options, "--control", str(control)), re.MULTILINE)


def test_recovery_in_stages_ends_as_it_would_without_an_interruption(tmp_path: Path) -> None:
    options = ["--model", "tiny", "--pattern", "32x32", "--method", "magnitude", "--tokens", "256", "--step-tokens", "32", "--every", "64"]
    options += ["--stages", "0.2:0.25", "0.4:0.25", "--folder"]
    output = run("recover.py", *options, str(tmp_path / "whole"))
    assert "256 tokens, 25% of them at 20%, 25% of them at 40%, 32 a step" in output
    tokens = re.findall(r"^ +([\d,]+) +\d+  [\d.]+$", output, re.MULTILINE)
    first, second, *_ = [count for count in dict.fromkeys(tokens) if tokens.count(count) == 2]  # where a stage begins
    assert tokens[:5] == ["0", first, first, second, second]
    assert len(tokens) == 7

    def finished(folder: Path) -> dict[str, Any]:
        record = json.loads(next(folder.glob("*.json")).read_text())
        return {**record, "curve": [(tokens, figure) for tokens, _, figure in record["curve"]]}

    replace = os.replace
    for allowed in (2, 3, 5):  # files are written: the start, two for each of the first stages, three in the last

        def interrupted(*paths: Any, left: list[int] = [allowed]) -> None:  # noqa: B006
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            replace(*paths)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run("recover.py", *options, str(tmp_path / str(allowed)))
        run("recover.py", *options, str(tmp_path / str(allowed)))
        assert finished(tmp_path / str(allowed)) == finished(tmp_path / "whole")
    (path,) = (path for path in (tmp_path / "whole").glob("*.pt") if not path.name.startswith("start"))
    masks = torch.load(path, weights_only=True)["result"]["masks"].values()
    pruned = sum(int((~keep).sum()) for keep, _, _ in masks) / sum(keep.numel() for keep, _, _ in masks)
    assert abs(pruned - 0.5) < 0.02


def test_the_first_stage_begins_with_the_dense_model(tmp_path: Path) -> None:
    options = [
        "--model",
        "tiny",
        "--pattern",
        "32x32",
        "--method",
        "OBS + budget",
        "--tokens",
        "64",
        "--step-tokens",
        "32",
        "--every",
        "32",
    ]
    at_once = run("recover.py", *options, "--sparsity", "0.2", "--folder", str(tmp_path))
    in_stages = run("recover.py", *options, "--stages", "0.2:0.5:1e-4", "--folder", str(tmp_path))
    assert "50% of them at 20% with 0.0001" in in_stages
    first_rows = [re.findall(r"^ +0 +0  ([\d.]+)$", output, re.MULTILINE) for output in (at_once, in_stages)]
    assert first_rows[0] == first_rows[1]
    assert len(first_rows[0]) == 1


@pytest.mark.parametrize("stages", [["0.4:0.1", "0.2:0.1"], ["0.5:0.1"], ["0.2:0"], ["0.2:0.5", "0.4:0.5"]])
def test_stages_that_do_not_rise_or_leave_no_tokens_are_refused(stages: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("recover.py", "--model", "tiny", "--stages", *stages)
    assert "sparsities must rise from above 0 to below --sparsity" in capsys.readouterr().err


def test_recovery_of_an_image_model_needs_only_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(efficientnet, "SIDE", 96)  # pixels of the model's input instead of 224
    imagenet, classes = efficientnet.photos()
    right = float((efficientnet.load()(efficientnet.center(imagenet)).argmax(1) == classes).double().mean())
    assert 0 < right < 1
    (tmp_path / "photos").mkdir()
    for number in range(8):
        noise = torch.randint(256, (9, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        image.frombytes("RGB", (8, 9), noise.numpy().tobytes()).resize((240, 270)).save(tmp_path / "photos" / f"{number}.png")
    options = ["--model", "efficientnet", "--method", "magnitude", "--photos", str(tmp_path / "photos"), "--folder", str(tmp_path)]
    options += ["--tokens", "4", "--step-tokens", "2", "--every", "2", "--rounds", "1"]
    output = run("recover.py", *options, "--deploy", str(tmp_path / "deployed.png"))
    assert "5 photos trained on, 1 for choices, 2 and 20 of ImageNet reported" in output
    assert re.search(rf"^dense +1\.0000 +1\.0000 +{right:.4f} +0\.0000 +0\.0000$", output, re.MULTILINE)
    assert re.search(r"^distilled +\w+ +[\d.]+ ", output, re.MULTILINE)
    assert (tmp_path / "deployed.png").stat().st_size > 10_000
