"""Nothing is superlinear in the number of modules or layers: the number of function calls grows by as much for each module that is added.

Calls of Python and built-in functions are counted, not seconds, so that the counts are the same on every machine. `benchmarks/growth.py`
measures the seconds.
"""

import copy
import cProfile
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import nn

import blockprune as bp

WIDTH, FOLDER = 4, str(Path(bp.__file__).parent)
WHERE = bp.linears((2, 2))
MAGNITUDE = bp.Pipeline(partial(bp.collect.weights, where=WHERE), bp.metric.l1, bp.allocate.per_layer)


def chain(count: int) -> nn.Sequential:
    """Layers of a Linear and a ReLU, with weights near the identity, so that gradients do not vanish."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU()) for _ in range(count))).eval()
    for layer in model:
        nn.init.normal_(layer[0].weight, std=0.01).data.diagonal().add_(1)
    return model


def calls(run: Callable[[], object], *, ours: bool) -> int:
    """How many functions are called; with ``ours`` only those that the library itself calls or defines."""
    profile = cProfile.Profile(subcalls=ours)
    gc.disable()  # a collection in between calls finalizers of other tests' objects
    try:
        profile.runcall(run)
    finally:
        gc.enable()
    entries = profile.getstats()
    if not ours:
        return sum(entry.callcount for entry in entries)
    defined = [entry for entry in entries if isinstance(entry.code, CodeType) and entry.code.co_filename.startswith(FOLDER)]
    built_in = [call for entry in defined for call in entry.calls or () if isinstance(call.code, str)]
    return sum(entry.callcount for entry in (*defined, *built_in))


def pruned(count: int) -> tuple[nn.Module, bp.Masks, nn.Module]:
    model = chain(count)
    masks = MAGNITUDE(model, 0.5)
    return model, masks, bp.apply_masks(copy.deepcopy(model), masks)


def collecting(count: int, *statistics: bp.statistics.Statistic) -> Callable[[], object]:
    options = {"loss": lambda output, batch: output.sum(), "progress": False}
    calibration = bp.Calibration([torch.ones(2, WIDTH)] * 2, **options)
    return partial(bp.collect.with_statistics, chain(count), where=WHERE, statistics=statistics, calibration=calibration)


def repairing(count: int, target: str) -> Callable[[], object]:
    collect = partial(bp.collect.with_statistics, where=WHERE)
    pipeline, repair = bp.Pipeline(collect, bp.metric.obs, bp.allocate.per_row), partial(bp.reconstruct.least_squares, damping=0.4)
    batches = [torch.randn(8, WIDTH)]
    return lambda: bp.sequential(chain(count), pipeline, repair, batches, {"0.*": 0.25, "*": 0.5}, target=target, progress=False)


def saving(count: int, path: Path) -> Callable[[], object]:
    model, masks, _ = pruned(count)
    result = bp.PruningResult(masks, dict(model.named_parameters()), tuple(map(str, range(count))))

    def run() -> None:
        bp.save_masks(masks, path)
        bp.load_masks(path)
        bp.save_repair(result, path)
        bp.load_repair(path)

    return run


def again(plain: nn.Module, masks: bp.Masks, masked: nn.Module) -> None:
    bp.apply_masks(masked, masks)


def summed_up(masks: bp.Masks) -> tuple[str, float]:
    return str(bp.summary(masks)), bp.sparsity(masks)


def exported(count: int) -> nn.Module:
    return bp.export.block_sparse(pruned(count)[2], backend="torch")


PREPARED: dict[str, Callable[[int], Callable[[], object]]] = {
    "a pipeline": lambda n: partial(MAGNITUDE, chain(n), 0.5),
    "a sparsity for each name": lambda n: partial(MAGNITUDE, chain(n), {f"{i}.0.weight": 0.5 for i in range(n)}),
    "half the names and a star": lambda n: partial(MAGNITUDE, chain(n), {f"{i}.0.weight": 0.5 for i in range(n // 2)} | {"*": 0.2}),
    "per_model by names": lambda n: partial(bp.allocate.per_model, MAGNITUDE.scores(chain(n)), {f"{i}.0.weight": 0.5 for i in range(n)}),
    "coupled pairs": lambda n: partial(
        bp.allocate.per_layer,
        MAGNITUDE.scores(chain(n)),
        0.5,
        coupled=[(f"{i}.0.weight", f"{i + 1}.0.weight") for i in range(0, n, 2)],
    ),
    "apply_masks": lambda n: partial(bp.apply_masks, *pruned(n)[:2]),
    "apply_masks again": lambda n: partial(again, *pruned(n)),
    "apply_masks with weights": lambda n: partial(bp.apply_masks, chain(n), pruned(n)[1], dict(chain(n).named_parameters())),
    "apply_masks(model, {})": lambda n: partial(bp.apply_masks, pruned(n)[2], {}),
    "read_masks": lambda n: partial(bp.read_masks, pruned(n)[2]),
    "masked_parameters": lambda n: partial(bp.masked_parameters, *pruned(n)[:2]),
    "summary": lambda n: partial(summed_up, pruned(n)[1]),
    "finalize": lambda n: partial(bp.finalize, pruned(n)[2]),
    "deepcopy of a masked model": lambda n: partial(copy.deepcopy, pruned(n)[2]),
    "input statistics": lambda n: collecting(n, bp.statistics.input_sq, bp.statistics.input_gram),
    "output gradients": lambda n: collecting(n, bp.statistics.output_grad_gram),
    "gates": lambda n: collecting(n, bp.statistics.gate_grad),
    "sequential to the dense outputs": lambda n: repairing(n, "dense"),
    "sequential to each layer's own outputs": lambda n: repairing(n, "pruned"),
    "export": lambda n: partial(bp.export.block_sparse, pruned(n)[2], backend="torch"),
    "an exported model made dense": lambda n: partial(bp.export.dense, exported(n)),
}


def assert_linear(prepare: Callable[[int], Callable[[], object]], *, ours: bool = False) -> None:
    prepare(4)()  # imports and caches
    few, more, most = (calls(prepare(count), ours=ours) for count in (16, 32, 48))
    assert most - more <= 1.01 * (more - few) + 50


@pytest.mark.slow
@pytest.mark.parametrize("operation", PREPARED)
def test_each_module_costs_as_many_calls_as_the_one_before(operation: str) -> None:
    assert_linear(PREPARED[operation])


def test_files(tmp_path: Path) -> None:
    assert_linear(lambda count: saving(count, tmp_path / "file"))


LOADING: dict[str, Callable[[int], Callable[[], object]]] = {
    "a masked one": lambda n: partial(pruned(n)[2].load_state_dict, pruned(n)[2].state_dict()),
    "a plain one into a masked model": lambda n: partial(pruned(n)[2].load_state_dict, chain(n).state_dict()),
    "a masked one into a plain model": lambda n: partial(bp.load_masked, chain(n), pruned(n)[2].state_dict()),
    "an exported one": lambda n: partial(bp.export.load_state_dict, chain(n), exported(n).state_dict()),
}


@pytest.mark.slow
@pytest.mark.parametrize("state", LOADING)
def test_loading_a_state_dict(state: str) -> None:
    """Torch itself compares all keys with the prefix of each child, so that only the library's own calls are counted."""
    assert_linear(LOADING[state], ours=True)


@pytest.mark.parametrize("target", ["dense", "pruned"])
def test_sequential_walks_over_the_whole_model_equally_often_for_any_number_of_layers(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[nn.Module] = []
    named_modules = nn.Module.named_modules

    def counted(self: nn.Module, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        if not prefix and len(self._modules) > 2:  # the model itself; a layer has two children
            walks.append(self)
        return named_modules(self, memo, prefix, remove_duplicate)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    counts = []
    for layers in (4, 8, 16):
        walks.clear()
        repairing(layers, target)()
        counts.append(len(walks))
    assert counts[0] == counts[1] == counts[2] < 30
