"""Speed and memory of pruning: scoring against one read of the weights, and the whole call against other libraries.

python benchmarks/prune.py            # 12 x Linear(4096, 4096); `make peers` first to compare with other libraries
python benchmarks/prune.py --tiny     # seconds, for the test command
"""

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import machine, median_seconds
from torch import nn
from tqdm import tqdm

import blockprune as bp
from blockprune import native

BLOCKS = [(2, 2), (4, 4), (1, 4), (16, 1), (16, 16), (32, 32), (64, 64), (1, -1)]
FOLDER = Path(__file__).parent
PEERS = FOLDER.parent / ".peers"


def scoring(layers: int, width: int, rounds: int) -> None:
    """`metric.l1` over all layers, as a multiple of reading the weights once (`w.sum()`)."""
    print(
        f"\nScoring {layers} x Linear({width}, {width}) with metric.l1, as a multiple of one read of the weights (w.sum()); "
        f"native loops: {native.status}"
    )
    print(f"{'dtype':10}{'threads':>8}{'read ms':>9}" + "".join(f"{block!s:>10}" for block in BLOCKS))
    all_threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(dtype)
        for threads in sorted({1, all_threads}):
            torch.set_num_threads(threads)
            reads, ratios = [], []
            for block in BLOCKS:
                data = bp.collect.weights(model, where=bp.linears(block), lazy=True)
                seconds = median_seconds({"read": partial(read, model), "score": partial(bp.metric.l1, data)}, rounds=rounds)
                reads.append(seconds["read"])
                ratios.append(seconds["score"] / seconds["read"])
            cells = "".join(f"{ratio:>10.2f}" for ratio in ratios)
            print(f"{str(dtype)[6:]:10}{threads:>8}{1e3 * statistics.median(reads):>9.1f}{cells}", flush=True)
    torch.set_num_threads(all_threads)


def read(model: nn.Module) -> list[torch.Tensor]:
    return [weight.sum() for weight in model.parameters()]


def whole_call(layers: int, width: int, rounds: int, blocks: list[tuple[int, int]]) -> None:
    """The call that yields masks at 50 %, on one thread and on all; each library runs in a process of its own, and they take turns."""
    workers = {"ours": [sys.executable, "ours.py"], "torch.ao": [sys.executable, "torch_ao.py"]}
    for peer in ("nni28", "nni30"):
        if (python := PEERS / peer / "bin" / "python").exists():
            workers[peer] = [str(python), f"{peer}.py"]
    model_mib = layers * width * width * 4 / 2**20
    print(
        f"\nMasks at 50 % for {layers} x Linear({width}, {width}) float32 ({model_mib:.0f} MiB): "
        "median seconds, extra peak MiB (share of the model)"
    )
    if len(workers) < 4:
        print("(NNI is not installed: `make peers` adds NNI 2.8 and 3.0 to this table)")
    print(f"{'block':10}{'threads':>8}  {'library':24}{'seconds':>9}{'x ours':>8}{'extra MiB':>11}{'share':>8}")
    for threads in sorted({1, torch.get_num_threads()}):
        for block in blocks:
            config = {"layers": layers, "width": width, "block": block, "threads": threads, "seed": 0}
            runs = run_workers(workers, config, rounds)
            ours = statistics.median(run["seconds"] for run in runs["blockprune"])
            for name, answers in runs.items():
                seconds, extra = (statistics.median(answer[key] for answer in answers) for key in ("seconds", "extra_peak_mib"))
                print(
                    f"{block!s:10}{threads:>8}  {name:24}{seconds:>9.3f}{seconds / ours:>8.1f}{extra:>11.1f}{extra / model_mib:>8.1%}",
                    flush=True,
                )


def run_workers(workers: dict[str, list[str]], config: dict[str, object], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Start a process for each command, let them run in turn, and return the answers of each library by its name."""
    processes = [
        subprocess.Popen(
            command, cwd=FOLDER / "peers", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )
        for command in workers.values()
    ]
    try:
        names = [request(process, config)["name"] for process in processes]
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in tqdm(range(rounds), desc=f"block {config['block']}", leave=False, disable=None):
            for name, process in zip(names, processes, strict=True):
                answers[name].append(request(process, {"run": True}))
    finally:
        for process in processes:
            process.communicate()
    return answers


def request(process: "subprocess.Popen[str]", message: dict[str, object]) -> dict[str, Any]:
    """Send one message to a worker and return its answer; `peers/_worker.py` describes the protocol."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(message) + "\n")
    line = process.stdout.readline()
    answer: dict[str, Any] = json.loads(line) if line else {"error": "the worker ended without an answer; run it by hand to see why"}
    if "error" in answer:
        raise RuntimeError(f"{process.args}: {answer['error']}")
    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="2 layers of 256, one round")
    tiny = parser.parse_args().tiny
    print(machine())
    if tiny:
        scoring(2, 256, rounds=1)
        whole_call(2, 256, rounds=1, blocks=[(4, 4)])
    else:
        scoring(12, 4096, rounds=7)
        whole_call(12, 4096, rounds=3, blocks=[(4, 4), (32, 32)])
