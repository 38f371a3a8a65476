"""A model that ``parallelize_module`` has sharded is refused with what to do, which works."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import blockprune as bp
from blockprune import export
from blockprune.export.dense_baselines import has_dynamic_int8

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
MASKS = {"0.weight": bp.BlockMask(torch.arange(16)[:, None] < 12, bp.BlockGrid((16, 8), (1,)))}


pytestmark = pytest.mark.usefixtures("process_group")


def plain() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def parallel() -> Any:
    model = parallelize_module(plain(), init_device_mesh("cpu", (1,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return bp.apply_masks(model, MASKS)


CALLS: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "benchmark": (lambda model, _: export.benchmark(model, inputs=X, rounds=1), "benchmark times copies of the model"),
    "dynamic_int8": (lambda model, _: export.dynamic_int8(model), "dynamic_int8 rounds whole weights"),
    "onnx": (lambda model, path: export.onnx(model, (X,), path / "model.onnx"), "an ONNX file holds whole weights"),
    "shrink": (lambda model, _: export.shrink(model, X), "shrink runs smaller copies of the model"),
}
NEEDS = {"onnx": "onnxscript", "shrink": "torch_pruning"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_a_parallel_model_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if name == "dynamic_int8" and not has_dynamic_int8():
        pytest.skip("this torch has no dynamic int8")
    call, reason = CALLS[name]
    model = parallel()
    remedy = r"call it before parallelize_module, or on a plain model that loads bp\.distributed\.full_state_dict\(model\)"
    with pytest.raises(ValueError, match=rf"^{reason}, but parallelize_module has sharded this Sequential; {remedy}"):
        call(model, tmp_path)
    loaded = plain()
    loaded.load_state_dict(bp.distributed.full_state_dict(model))
    call(bp.apply_masks(loaded, bp.read_masks(model)), tmp_path)


def test_a_sharded_layer_stays_dense_and_says_why() -> None:
    model = parallel()
    reason = r"sharded by parallelize_module or fully_shard; load bp\.distributed\.full_state_dict\(model\) into a plain model"
    with pytest.warns(UserWarning, match=rf"0 of 1 masked layers became block-sparse \(0\.weight: {reason}"):
        (choice,) = export.choose(model, inputs=X, progress=False).rows
    assert choice.backend == "dense"
    loaded = plain()
    loaded.load_state_dict(bp.distributed.full_state_dict(model))
    sparse = export.block_sparse(bp.apply_masks(loaded, bp.read_masks(model)), backend="torch")
    torch.testing.assert_close(sparse(X), model(X))
    with pytest.warns(UserWarning, match=r"0: parallelize_module has sharded its weight; 2: parallelize_module .*; 2 in all"):
        torch.testing.assert_close(export.rowwise_int8(model)(X), model(X))
