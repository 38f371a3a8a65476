"""The results do not depend on torch's default dtype and default device, which users set for their own tensors."""

import ast
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import blockprune as bp
from blockprune import export

FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros"}
SOURCES = sorted(Path(bp.__file__).parent.rglob("*.py"))
WHERE = bp.linears((16, 16))


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


OTHER_DEFAULTS = pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float16, "cpu"), (torch.float32, "meta"), (torch.float64, "meta")],
    ids=["float64", "bfloat16", "float16", "meta", "float64 on meta"],
)


def everything(model: nn.Sequential, x: Tensor, folder: Path) -> dict[str, Tensor]:
    """Masks, weights and outputs of the main functions."""
    calibration = bp.Calibration([x], loss=lambda output, _: output.square().mean(), progress=False)
    recipes = {
        "magnitude": bp.recipes.magnitude(WHERE)(model, 0.5),
        "wanda": bp.recipes.wanda(WHERE, calibration)(model, 0.5),
        "obs": bp.recipes.obs(WHERE, calibration)(model, 0.5),
        "sparsegpt": bp.recipes.sparsegpt(WHERE, calibration)(model, 0.5),
    }
    data = bp.collect.with_statistics(model, where=WHERE, calibration=calibration, statistics=[bp.statistics.gate_fisher])
    fisher = bp.allocate.per_layer(bp.metric.fisher(data), 0.5)
    axes = bp.find_axes(model, x)
    ordered = bp.permute(model, bp.cluster(bp.metric.l1(bp.collect.weights(model, where=bp.linears((1, 1)))), axes, block=(16, 16)))
    bp.save_masks(fisher, folder / "masks.safetensors")
    masked = bp.apply_masks(copy.deepcopy(model), bp.load_masks(folder / "masks.safetensors"))
    sgd = partial(torch.optim.SGD, lr=0.1)  # AdamW of torch 2.11 counts its steps on the default device
    weights = bp.distill(model, fisher, None, [x], teacher=model, loss=bp.losses.hidden_states, optimizer=sgd, steps=2, progress=False)
    results = {
        "ordered": ordered[0].weight,
        "sparse": export.block_sparse(masked, backend="torch")(x),
        "int8": export.block_sparse(masked, backend="native", dtype="int8")(x) if native() else x,
        "native": export.block_sparse(masked, backend="native")(x) if native() else x,
        "trainable": export.block_sparse(masked, backend="torch", trainable=True)(x),
        **{f"distilled {name}": weight for name, weight in weights.items()},
        **{f"fisher {name}": mask.keep for name, mask in fisher.items()},
    }
    for recipe, result in recipes.items():
        results |= {f"{recipe} {name}": mask.keep for name, mask in result.masks.items()}
        results |= {f"{recipe} {name}, weight": weight for name, weight in result.weights.items()}
    return {name: value.detach() for name, value in results.items()}


def native() -> bool:
    return any(row.name == "native" and row.available for row in export.backends().rows)


@OTHER_DEFAULTS
@pytest.mark.filterwarnings("ignore")
def test_results_are_those_of_the_usual_defaults(dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32))
    x = torch.randn(32, 64)
    usual = everything(model, x, tmp_path)
    with defaults(dtype, device):
        results = everything(model, x, tmp_path)
    assert results.keys() == usual.keys()
    for name, value in usual.items():
        assert results[name].dtype == value.dtype, name
        assert torch.equal(results[name], value), name


def test_each_new_tensor_names_its_device() -> None:
    unnamed = [
        f"{path.name}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
        and not {"device", None}.intersection(keyword.arg for keyword in node.keywords)
    ]
    assert not unnamed, f"{unnamed}: with torch.set_default_device these tensors would be elsewhere; give device="
