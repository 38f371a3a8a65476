"""The README's code runs as printed, block after block, on a small model."""

import json
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import blockprune as bp

README = (Path(__file__).parent.parent / "README.md").read_text()


def small() -> nn.Module:
    return nn.Sequential(OrderedDict(a=nn.Linear(32, 32), relu=nn.ReLU(), b=nn.Linear(32, 16)))


def layered() -> nn.Module:
    """Named as Hugging Face names a language model."""
    layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    body = nn.Sequential(OrderedDict(layers=layers, norm=nn.LayerNorm(32)))
    return nn.Sequential(OrderedDict(model=body, lm_head=nn.Linear(32, 16)))


@pytest.mark.filterwarnings("ignore:0 of 2 masked layers became block-sparse")  # small layers are faster dense
def test_the_readmes_code_runs_as_printed() -> None:
    x = torch.randn(4, 32)
    names: dict[str, Any] = {"x": x, "batches": [x], "loader": [x] * 3}
    names["loss"], names["mean_loss"] = lambda output, batch: output.square().mean(), lambda model: model(x).square().mean()
    names["accuracy"] = lambda model: names["mean_loss"](model).item()
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block in blocks:
        names |= {"model": layered() if "model.layers" in block else small(), "dense": small(), "skeleton": small(), "batch": x}
        if "block_sparse" in block and "prune" in names:
            bp.apply_masks(names["model"], names["prune"](names["model"], 0.5))
        exec(block, names)
    assert len(blocks) >= 5
    assert set(names["result"].masks) == {"model.layers.0.weight", "model.layers.2.weight"}
    assert names["masks"].keys() == {0.25, 0.5, 0.75}
    assert set(names["wanda"](small(), 0.5)) == set(names["fisher"](small(), 0.5)) == {"a.weight", "b.weight"}


def test_the_first_table_says_what_was_recorded() -> None:
    results, text = Path(__file__).parent.parent / "benchmarks" / "results", README.replace("\n", " ")
    names = ("recover_minilm_75", "front_page_epyc", "front_page")
    zen5, epyc, xeon = ("\n".join(json.loads((results / f"{name}.json").read_text())["output"]) for name in names)
    rows = re.findall(r"^\| (dense [^|(]+?|75% pruned[^|]*?)(?: \([^|]*\))? \| ([\d.]+) \| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) == 7
    for name, cosine, milliseconds in rows:
        start = re.escape(name.replace("dense float32", "dense").replace(" in 16x16 blocks", "").replace("75% pruned", "distilled"))
        assert re.search(rf"^ +{start} +{cosine}$", zen5, re.MULTILINE), name
        assert milliseconds == fastest(zen5, start), name
    pruned, dense = (
        re.findall(rf"^{start} +\w+ +([\d.]+) +\d+ +([\d.]+) .*?([\d.]+)x$", zen5, re.MULTILINE)[0]
        for start in ("distilled, bfloat16", "dense, oneDNN packed")
    )
    gain = float(dense[0]) / float(pruned[0])
    assert f"is {gain:.2f} times as fast as in float32 and {pruned[2]} times as fast as the fastest dense model" in text
    assert f"in {float(pruned[1]):.0f} instead of {float(dense[1]):.0f} MiB" in text
    times = [fastest(epyc, f"{model} int8") for model in ("75% pruned,", "50% pruned,", "dense")]
    assert "takes {} ms in int8 with 75 % pruned and {} with half, the fastest dense model {};".format(*times) in text
    times = [fastest(xeon, f"{model} bfloat16") for model in ("dense", "50% pruned,", "75% pruned,")]
    assert "bfloat16, {} ms, and MiniLM in bfloat16 takes {} ms at 50 % and {} at 75 %".format(*times) in text
    layers = json.loads((results / "speed_layers_amx.json").read_text())["output"]
    first = next(i for i, line in enumerate(layers) if re.match(r"bfloat16 .* 512  F", line)) + 1
    assert "batch 512, is {}, {} and {} times as fast as dense bfloat16".format(*re.findall(r"([\d.]+)x(?: |$)", layers[first])) in text
    convolutions = "\n".join(json.loads((results / "conv_model.json").read_text())["output"])
    dense, pruned = re.findall(r"dense ([\d.]+) ms|16x16    75%: +([\d.]+) ms", convolutions)
    assert f"takes {float(pruned[1]):.0f} ms an image on the EPYC with AVX2, dense {float(dense[0]):.0f} ms" in README


def test_the_speed_of_training_is_what_was_recorded() -> None:
    def step(file: str, dtype: str) -> tuple[float, list[str]]:
        recorded = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / file).read_text())["output"]
        start = next(i for i, line in enumerate(recorded) if re.match(rf"{dtype} +1  4096x4096 +512 ", line))
        dense, masked = map(float, re.findall(r"([\d.]+) ms", recorded[start]))
        return dense / masked, re.findall(r"([\d.]+)x(?: |$)", next(line for line in recorded[start:] if "32x32" in line))

    masked, speedups = step("training_layers.json", "float32")
    assert f"is {speedups[0]}, {speedups[1]} and {speedups[2]} times as fast as the dense step" in README
    assert f"a masked one {masked:.2f} times" in README
    speedups = step("training_layers_avx512.json", "bfloat16")[1]
    assert f"In bfloat16 on an EPYC with AVX-512 it is {speedups[0]}, {speedups[1]} and {speedups[2]} times as fast" in README


def test_what_distillation_gives_back_is_what_was_recorded() -> None:
    pattern = r"\((\d+) minutes\).*cosine Lee50 ([\d.]+) -> ([\d.]+).*correlation Lee50 [\d.]+ -> ([\d.]+) \(([\d.]+)\)"
    results, text = Path(__file__).parent.parent / "benchmarks" / "results", README.replace("\n", " ")
    answer = json.loads((results / "recover_minilm_75.json").read_text())["answer"]
    minutes, before, after, *correlations = re.findall(pattern, answer)[0]
    tokens = int(re.findall(r"after ([\d,]+) tokens", answer)[0].replace(",", ""))
    trained = f"{after} after {tokens / 1e6:.0f} million tokens of distillation ({minutes} minutes on one core)"
    assert f"The cosine is {before} after repair and {trained}" in text
    assert "judgements is then {}, and {} for the dense model".format(*correlations) in text
    recorded = json.loads((results / "recover_minilm.json").read_text())
    before, after = re.findall(pattern, recorded["answer"])[0][1:3]
    assert f"With half of the blocks the cosine is {before} and {after}." in text
    answer = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "recover_smollm.json").read_text())["answer"]
    tokens, before, after = re.findall(r"after ([\d,]+) tokens .*perplexity Wikipedia ([\d.]+) -> ([\d.]+)", answer)[0]
    after = f"{float(after):.0f} after {round(int(tokens.replace(',', '')), -4):,} tokens of distillation"
    assert f"it is not usable yet ({float(before):.0f}; {after})" in text
    answer = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "recover_smollm_25.json").read_text())["answer"]
    tokens, before, after, dense = re.findall(r"after ([\d,]+) tokens .*perplexity Wikipedia ([\d.]+) -> ([\d.]+) \(([\d.]+)\)", answer)[0]
    assert f"has perplexity {float(before):.1f} after repair (dense {float(dense):.1f}; " in text
    assert f" and {float(after):.1f} after {round(int(tokens.replace(',', '')), -4):,} tokens of distillation, and" in text
    answer = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "recover_smollm_dense.json").read_text())["answer"]
    tokens, after = re.findall(r"after ([\d,]+) tokens .*perplexity Wikipedia [\d.]+ -> ([\d.]+)", answer)[0]
    trained = f"{float(after):.1f} after {round(int(tokens.replace(',', '')), -4):,} tokens of the same articles"
    assert f"The dense model has {trained}" in text


def fastest(output: str, start: str) -> str:
    times = re.findall(rf"^{start}(?:, oneDNN packed)?  +\w+ +([\d.]+) ", output, re.MULTILINE)
    return f"{min(map(float, times)):.0f}"


def test_the_results_are_those_that_were_recorded() -> None:
    subprocess.run([sys.executable, "benchmarks/report.py", "--check"], check=True, cwd=Path(__file__).parent.parent)
