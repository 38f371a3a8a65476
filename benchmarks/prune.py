"""Speed and memory of pruning: scoring against one read of the weights, and the whole call against other libraries.

python benchmarks/prune.py            # 12 x Linear(4096, 4096); `make peers` first to compare side by side
python benchmarks/prune.py --tiny     # seconds, for the test command
"""

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from timing import machine, medians
from torch import nn
from tqdm import tqdm

import blockprune as bp
from blockprune import native

BLOCKS = [(2, 2), (4, 4), (1, 4), (16, 1), (16, 16), (32, 32), (64, 64), (1, -1)]
HERE = Path(__file__).parent
ROOT = HERE.parent


def scoring(layers: int, width: int, rounds: int) -> None:
    """`metric.l1` over all layers, as a multiple of reading the weights once (`w.sum()`)."""
    print(
        f"\nScoring {layers} x Linear({width}, {width}) with metric.l1, as a multiple of one read of the weights (w.sum()); "
        f"native loops: {native.status}"
    )
    print(f"{'dtype':10}{'threads':>8}{'read ms':>9}" + "".join(f"{b!s:>10}" for b in BLOCKS))
    every = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(dtype)
        for threads in sorted({1, every}):
            torch.set_num_threads(threads)
            reads, ratios = [], []
            for block in BLOCKS:
                data = bp.collect.weights(model, where=bp.linears(block), lazy=True)
                seen = medians({"read": partial(read, model), "score": partial(bp.metric.l1, data)}, rounds=rounds)
                reads.append(seen["read"])
                ratios.append(seen["score"] / seen["read"])
            print(
                f"{str(dtype)[6:]:10}{threads:>8}{1e3 * statistics.median(reads):>9.1f}" + "".join(f"{r:>10.2f}" for r in ratios),
                flush=True,
            )
    torch.set_num_threads(every)


def read(model: nn.Module) -> list[torch.Tensor]:
    return [weight.sum() for weight in model.parameters()]


def whole_call(layers: int, width: int, rounds: int, blocks: list[tuple[int, int]]) -> None:
    """The call that yields masks at 50 %, one thread and all: every library in a process of its own, asked in turn."""
    workers = {"ours": [sys.executable, "ours.py"], "torch.ao": [sys.executable, "torch_ao.py"]}
    for peer in ("nni28", "nni30"):
        if (python := ROOT / ".peers" / peer / "bin" / "python").exists():
            workers[peer] = [str(python), f"{peer}.py"]
    model_mib = layers * width * width * 4 / 2**20
    print(
        f"\nMasks at 50 % for {layers} x Linear({width}, {width}) float32 ({model_mib:.0f} MiB): "
        "median seconds, extra peak MiB (share of the model)"
    )
    if len(workers) < 4:
        print("(NNI is not installed: `make peers` adds NNI 2.8 and 3.0 to this table)")
    print(f"{'block':10}{'threads':>8}  " + f"{'library':24}{'seconds':>9}{'x ours':>8}{'extra MiB':>11}{'share':>8}")
    for threads in sorted({1, torch.get_num_threads()}):
        for block in blocks:
            seen = interleaved(workers, {"layers": layers, "width": width, "block": block, "threads": threads, "seed": 0}, rounds)
            ours = statistics.median(run["seconds"] for run in seen["blockprune"])
            for name, runs in seen.items():
                seconds, extra = (statistics.median(run[field] for run in runs) for field in ("seconds", "extra_peak_mib"))
                print(
                    f"{block!s:10}{threads:>8}  {name:24}{seconds:>9.3f}{seconds / ours:>8.1f}{extra:>11.1f}{extra / model_mib:>8.1%}",
                    flush=True,
                )


def interleaved(workers: dict[str, list[str]], config: dict[str, object], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Ask each worker process in turn, round after round."""
    processes = [
        subprocess.Popen(
            command, cwd=HERE / "peers", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )
        for command in workers.values()
    ]
    try:
        names = [ask(process, config)["name"] for process in processes]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in tqdm(range(rounds), desc=f"block {config['block']}", leave=False, disable=None):
            for name, process in zip(names, processes, strict=True):
                runs[name].append(ask(process, {"run": True}))
    finally:
        for process in processes:
            process.communicate()
    return runs


def ask(process: "subprocess.Popen[str]", request: dict[str, object]) -> dict:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    answer = json.loads(process.stdout.readline())
    if "error" in answer:
        raise RuntimeError(f"{process.args}: {answer['error']}")
    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="2 layers of 256, one round")
    tiny = parser.parse_args().tiny
    print(machine())
    scoring(2 if tiny else 12, 256 if tiny else 4096, 1 if tiny else 7)
    whole_call(2 if tiny else 12, 256 if tiny else 4096, 1 if tiny else 3, [(4, 4)] if tiny else [(4, 4), (32, 32)])
