"""The cost of calibration: statistics against plain passes over the same batches, and Wanda and Taylor against other libraries.

python benchmarks/calibration.py            # SmolLM2-135M; `make peers` first to compare with other libraries
python benchmarks/calibration.py --tiny     # seconds, a random model, for the test command
"""

import argparse
import itertools
import json
import os
import statistics as numbers
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs
import tiny
import torch
from prune import FOLDER, PEERS, run_workers
from quality import next_token_loss
from timing import machine, median_seconds
from torch import Tensor, nn

import blockprune as bp
from blockprune import collect, statistics
from blockprune.examples import smollm

WHERE = bp.excluding(bp.linears((16, 16)), "lm_head*")
FORWARD, BACKWARD = "forward", "forward + backward"
GOALS = {  # for each statistic: the pass that it is compared with, and at most how many times as long it may take
    "input_sq": (FORWARD, 1.15),
    "input_gram": (FORWARD, 2.0),
    "weight_grad": (BACKWARD, None),
    "output_grad_gram": (BACKWARD, None),
    "gate_fisher": (BACKWARD, 4.0),
}
Workers = dict[str, list[str]]  # the command of each library's worker: an interpreter, a script and its arguments


@attrs.frozen(eq=False)
class Task:
    """A language model, batches of one window each for statistics of activations, and one batch of samples for gradients."""

    model: nn.Module
    batches: list[Tensor]
    samples: list[Tensor]


def smollm_task(windows: int, samples: int) -> Task:
    """SmolLM2 on the first articles of Wikipedia."""
    model, tokenizer = smollm.load()
    tokens = smollm.windows(tokenizer, smollm.articles()[:20], windows)
    return Task(model, list(tokens[:, None]), [tokens[:samples]])


def tiny_task() -> Task:
    """A small model with random weights, random tokens."""
    tokens = tiny.windows(4)
    return Task(tiny.load(), list(tokens[:, None]), [tokens[:2]])


def forward(task: Task) -> None:
    with torch.no_grad():
        for batch in task.batches:
            task.model(batch)


def forward_backward(task: Task, weights: list[nn.Parameter]) -> None:
    """The gradients of the weights that the statistics look at, dropped after each batch."""
    for batch in task.samples:
        torch.autograd.grad(next_token_loss(task.model(batch), batch), weights)


def calls(task: Task) -> dict[str, Callable[[], object]]:
    """Both plain passes and every statistic, each as a call without arguments."""
    parameters = dict(task.model.named_parameters())
    weights = [parameters[name] for name in collect.weights(task.model, where=WHERE, lazy=True)]
    passes: dict[str, Callable[[], object]] = {FORWARD: partial(forward, task), BACKWARD: partial(forward_backward, task, weights)}
    for name, (compared_with, _) in GOALS.items():
        batches = task.batches if compared_with == FORWARD else task.samples
        passes[name] = partial(
            collect.with_statistics,
            task.model,
            where=WHERE,
            statistics=[getattr(statistics, name)],
            calibration=bp.Calibration(batches, loss=next_token_loss, progress=False),
            lazy=True,  # as `Pipeline` calls it
        )
    return passes


def measure_time(task: Task, rounds: dict[str, int], extra_mib: dict[str, float]) -> None:
    """Print the seconds of each statistic over those of its plain pass, on one thread and on all, and its peak memory above the model."""
    count, length = sum(p.numel() for p in task.model.parameters()), task.batches[0].shape[1]
    print(
        f"\nCollecting from a model of {count / 1e6:.1f} M parameters (its Linears but lm_head, 16x16 blocks): {FORWARD} of "
        f"{len(task.batches)} batches of 1 x {length} tokens, {BACKWARD} of one of {len(task.samples[0])} x {length}; "
        "median seconds, extra peak MiB"
    )
    print(f"{'threads':>8}  {'what':20}{'seconds':>9}{'x pass':>8}{'goal':>7}{'met':>5}{'extra MiB':>11}")
    all_threads = torch.get_num_threads()
    by_name = calls(task)
    for threads in sorted({1, all_threads}):
        torch.set_num_threads(threads)
        for base in (FORWARD, BACKWARD):
            names = [base, *(name for name, (compared_with, _) in GOALS.items() if compared_with == base)]
            medians = median_seconds({name: by_name[name] for name in names}, rounds=rounds[base])
            for name, seconds in medians.items():
                ratio, goal = seconds / medians[base], GOALS[name][1] if name in GOALS else None
                verdict = f"{goal:>7.2f}{'yes' if ratio <= goal else 'no':>5}" if goal else " " * 12
                print(f"{threads:>8}  {name:20}{seconds:>9.3f}{ratio:>8.2f}{verdict}{extra_mib.get(name, float('nan')):>11.1f}", flush=True)
    torch.set_num_threads(all_threads)


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of each call above what is resident before it, in MiB; a child process measures it."""
    names = [FORWARD, BACKWARD, *GOALS]
    sizes = ["--tiny"] if options.tiny else ["--windows", str(options.windows), "--samples", str(options.samples)]
    command = [sys.executable, __file__, *sizes, "--memory", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-1000:]}")
    return {name: extra for line in done.stdout.splitlines() for name, extra in json.loads(line).items()}


def print_memory(names: list[str], task: Task) -> None:
    """The child's part: it loads the model once and without threads, so that every measurement can be a fork of it."""
    sys.path.insert(0, str(FOLDER / "peers"))
    import _worker  # noqa: PLC0415 (takes stdout for its protocol)

    short = attrs.evolve(task, batches=[task.batches[0][:, :16]], samples=[task.samples[0][:, :16]])
    for name in names:
        if child := os.fork():
            if os.waitpid(child, 0)[1]:
                sys.exit(f"{name} failed, see above")
            continue
        failed = 1
        try:
            calls(short)[name]()  # what is loaded on first use belongs to no measurement
            call = calls(task)[name]
            with _worker.PeakMemory() as memory:
                call()
            _worker.send({name: memory.extra_mib})
            failed = 0
        finally:
            if failed:
                traceback.print_exc()
            os._exit(failed)


def compare_libraries(layers: int, width: int, batches: int, rows: int, *, rounds: int, threads: int) -> None:
    """From a dense MLP to masks at 50 %: each library runs in a process of its own, they take turns, and their masks are compared."""
    ours = [sys.executable, "ours_calibrated.py"]
    by_method: dict[str, Workers] = {
        "Wanda": {
            "blockprune": [*ours, "Wanda"],
            "torchao's rule": [*ours, "Wanda-torchao"],
            "torchao": [str(PEERS / "torchao/bin/python"), "torchao_wanda.py"],
            "llm-compressor": [str(PEERS / "llmcompressor/bin/python"), "llmcompressor_wanda.py"],
        },
        "Taylor": {
            "blockprune": [*ours, "Taylor"],
            "NNI's rule": [*ours, "Taylor-squared"],
            "NNI 3.0": [str(PEERS / "nni30/bin/python"), "nni30_taylor.py"],
        },
    }
    print(
        f"\nMasks at 50 % of {layers} x Linear({width}, {width}) with ReLU, float32 ({layers * width * width / 2**18:.1f} MiB), "
        f"from {batches} batches of {rows}, passes included: Wanda on 1x1, Taylor on rows; "
        "median seconds, extra peak MiB, share of weights masked as the first and the second line do"
    )
    if missing := [name for workers in by_method.values() for name, command in workers.items() if not Path(command[0]).exists()]:
        print(f"(not installed: {', '.join(missing)}; `make peers` adds them to this table)")
    head = f"{'threads':>8}  {'method':8}{'library':38}{'seconds':>9}{'x ours':>8}{'extra MiB':>11}{'sparsity':>10}"
    print(f"{head}{'as first':>10}{'as second':>11}")
    for count, (method, workers) in itertools.product(sorted({1, threads}), by_method.items()):
        installed = {name: command for name, command in workers.items() if Path(command[0]).exists()}
        with tempfile.TemporaryDirectory() as folder:
            config = {"layers": layers, "width": width, "batches": batches, "rows": rows, "threads": count, "seed": 0, "masks": folder}
            answers = run_workers(installed, {**config, "block": method}, rounds)
            masks = {name: torch.load(Path(folder) / f"{name}.pt") for name in answers}
        first, second = itertools.islice(answers, 2)
        for name, runs in answers.items():
            seconds, extra, sparsity = (numbers.median(run[key] for run in runs) for key in ("seconds", "extra_peak_mib", "sparsity"))
            ratio = seconds / numbers.median(run["seconds"] for run in answers[first])
            shares = f"{agreement(masks[name], masks[first]):>10.3%}{agreement(masks[name], masks[second]):>11.3%}"
            print(f"{count:>8}  {method:8}{name:38}{seconds:>9.3f}{ratio:>8.2f}{extra:>11.1f}{sparsity:>10.2%}{shares}", flush=True)


def agreement(a: list[Tensor], b: list[Tensor]) -> float:
    """The share of weights that both keep or both prune; a mask may have one entry for each row."""
    pairs = [torch.broadcast_tensors(x.view(len(x), -1), y.view(len(y), -1)) for x, y in zip(a, b, strict=True)]
    return sum(int((x == y).sum()) for x, y in pairs) / sum(x.numel() for x, _ in pairs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random model of 2 layers, one round")
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, for statistics of activations")
    parser.add_argument("--samples", type=int, default=2, help="of 512 tokens, for gradients")
    parser.add_argument("--rounds", type=int, nargs=2, default=[3, 2], help="of both")
    parser.add_argument("--memory", nargs="+", metavar="CALL", help="print only the peak memory of these calls, as JSON")
    options = parser.parse_args()
    load = tiny_task if options.tiny else partial(smollm_task, options.windows, options.samples)
    if options.memory:
        print_memory(options.memory, load())
    else:
        print(machine())
        extra_mib = measure_memory(options)
        measure_time(load(), dict(zip((FORWARD, BACKWARD), [1, 1] if options.tiny else options.rounds, strict=True)), extra_mib)
        if options.tiny:
            compare_libraries(3, 64, 2, 16, rounds=1, threads=1)
        else:
            compare_libraries(6, 1024, 32, 128, rounds=3, threads=torch.get_num_threads())
