"""The Triton kernels equal their definition, on a GPU or interpreted on the CPU; and they compile for GPUs that this machine lacks."""

import copy
import ctypes
import importlib.util
import itertools
import mmap
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Matrix, batch_sizes, integers, kept_matrices, normal, seeds
from torch import Tensor, nn

import blockprune as bp
from blockprune import export
from blockprune.core.grid import BlockGrid
from blockprune.export import backend_choice, semi_structured, triton_launch
from blockprune.export.backend_choice import fixed_backend
from blockprune.export.format import BlockSparse, pack, to_layout
from blockprune.export.torch_products import torch_product

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar")  # of NumPy, by Triton 3.6
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS = pytest.mark.skipif(
    not INTERPRETED and not triton_launch.status()[0], reason=f"{triton_launch.status()[1]}, and TRITON_INTERPRET is not 1"
)
TRITON = pytest.mark.skipif(INTERPRETED or importlib.util.find_spec("triton") is None, reason="needs Triton, not interpreting already")
CUDA = pytest.mark.skipif(not triton_launch.status()[0], reason=triton_launch.status()[1])
TWO_OF_FOUR = pytest.mark.skipif(not semi_structured.status()[0], reason=semi_structured.status()[1])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def guarded(x: Tensor) -> Tensor:
    """The same numbers behind others that would show in any sum; interpreted, reading past their end is a crash."""
    if not INTERPRETED or not x.numel():
        around = torch.full((x.numel() + 128,), float("nan") if x.is_floating_point() else -1, dtype=x.dtype, device=DEVICE)
        found = around[64:-64]
    else:
        size, page = x.numel() * x.element_size(), mmap.PAGESIZE
        fits = -(-size // page) * page
        memory = mmap.mmap(-1, fits + page)
        memory[:fits] = b"\xff" * fits
        end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + fits
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
        found = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=fits - size)
    return found.copy_(x.flatten()).view(x.shape)


def linear(x: Tensor, sparse: BlockSparse, bias: Tensor | None = None) -> Tensor:
    sparse = to_layout(sparse, paired=False)
    tensors = [guarded(t) for t in (x, sparse.values, sparse.crow, sparse.col)]
    out = triton_launch.linear(*tensors, shape=sparse.shape, block=sparse.block, bias=None if bias is None else guarded(bias))
    assert out is not None
    return out.cpu()


def exact(x: Tensor, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype) -> None:
    weight, keep, grid = matrix
    sparse = pack(weight.to(dtype), keep, grid)
    y = x @ torch.where(bp.expand(keep, grid), weight, 0).mT + (0 if bias is None else bias)
    assert torch.equal(y, torch_product(x, pack(weight, keep, grid), bias))
    assert torch.equal(linear(x.to(dtype), sparse, None if bias is None else bias.to(dtype)), rounded(y, dtype))


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As the device rounds; the interpreter cuts bfloat16 off."""
    cut = INTERPRETED and dtype == torch.bfloat16
    return ((x.float().view(torch.int32) & -65536).view(torch.float32) if cut else x).to(dtype)


@RUNS
@given(kept_matrices(), batch_sizes, seeds, st.sampled_from(DTYPES))
def test_sums_of_whole_numbers_are_exact(matrix: Matrix, n: int, seed: int, dtype: torch.dtype) -> None:
    rows, cols = matrix[2].shape
    exact(integers((n, cols), seed, top=4), matrix, integers((rows,), seed + 1) if seed % 2 else None, dtype)


@RUNS
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (16, 32), (64, 64), (8, 1), (16, 1), (1, 16), (8, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8)
@given(n=st.integers(1, 70), more=st.tuples(st.integers(0, 40), st.integers(0, 40)), seed=seeds)
def test_blocks_of_the_matrix_units_sizes_are_exact(
    dtype: torch.dtype, block: tuple[int, int], n: int, more: tuple[int, int], seed: int
) -> None:
    grid = BlockGrid((block[0] + more[0], 2 * block[1] + more[1]), block)
    keep = torch.rand(grid.size, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[seed % len(keep)] = False
    matrix = integers(grid.shape, seed, top=4), keep, grid
    exact(integers((n, grid.shape[1]), seed + 1, top=4), matrix, integers((grid.shape[0],), seed + 2) if seed % 2 else None, dtype)


@RUNS
@pytest.mark.parametrize("n", [129, 300])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 64), (16, 1), (256, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_inputs_are_several_tiles(n: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    for grid in (BlockGrid((256, 192), block), BlockGrid((272, 200), block)):
        matrix = integers(grid.shape, 0, top=2), torch.rand(grid.size) < 0.5, grid
        exact(integers((n, grid.shape[1]), 1, top=2), matrix, integers((grid.shape[0],), 2) if n == 300 else None, dtype)


@RUNS
def test_wide_blocks_are_fetched_by_the_tensor_memory_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_launch_gather", None)
    grid = BlockGrid((128, 192), (64, 64))
    matrix = integers(grid.shape, 0, top=2), torch.rand(grid.size) < 0.7, grid
    exact(integers((150, 192), 1, top=2), matrix, None, torch.bfloat16)


@RUNS
def test_nan_reaches_only_what_keeps_its_column() -> None:
    sparse = pack(torch.ones(32, 32), torch.eye(2).bool(), BlockGrid((32, 32), (16, 16)))
    x = torch.ones(3, 32)
    x[1, 5], x[2, 20] = float("nan"), float("inf")
    out = linear(x, sparse)
    assert out.isnan().nonzero().tolist() == [[1, r] for r in range(16)]
    assert out.isinf().nonzero().tolist() == [[2, r] for r in range(16, 32)]


@RUNS
@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3)])
def test_a_layer_with_the_triton_backend_is_an_ordinary_layer(batch: tuple[int, ...]) -> None:
    masked = nn.Linear(32, 48)
    bp.apply_masks(masked, {"weight": bp.BlockMask(torch.rand(3, 2) < 0.5, BlockGrid((48, 32), (16, 16)))})
    layer = export.BlockSparseLinear(export.pack_weight(masked.weight, bp.read_masks(masked)["weight"]), masked.bias, "triton").to(DEVICE)
    masked = masked.to(DEVICE)
    x = normal((*batch, 32), 1).float().to(DEVICE)
    torch.testing.assert_close(layer(x), masked(x))
    wide = x.repeat(2, *[1] * x.ndim).movedim(0, -2)  # not contiguous
    torch.testing.assert_close(layer(wide), masked(wide))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), masked(x))
    torch.testing.assert_close(torch.vmap(layer)(x[None]), masked(x)[None])
    x, same = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(f(z).square().sum(), z)[0] for f, z in ((layer, x), (masked, same))))
    torch.testing.assert_close(layer.double()(x.double()), masked.double()(x.double()))  # float64 is torch's


@RUNS
def test_an_input_that_does_not_fit_says_so() -> None:
    sparse = pack(torch.ones(4, 4), torch.ones(2, 2).bool(), BlockGrid((4, 4), (2, 2)))
    with pytest.raises(ValueError, match=r"\(3, 5\) does not fit a weight of shape \(4, 4\)"):
        linear(torch.ones(3, 5), sparse)


@TRITON
@pytest.mark.skipif(triton_launch.status()[0], reason="the tests above ran on a GPU")
def test_the_laws_above_hold_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", __file__]
    folder, environment = Path(__file__).parents[2], {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 30


@TRITON
@pytest.mark.parametrize(("capability", "mma"), [(80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles_for_gpus_that_this_machine_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, mma: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # what unset means; 3.9 warns that this will change
    monkeypatch.setattr(triton_launch, "_supports_tma", lambda *_: False)
    for block, n in itertools.product([(16, 16), (64, 64), (16, 1), (8, 6)], [1, 128, 304]):
        rows = 70 if block[1] < 10 else 128
        compiled = _compile(monkeypatch, capability, torch.ones(n, 96, dtype=dtype), _whole(BlockGrid((rows, 96), block), dtype))
        assert compiled.metadata.shared <= 99 * 1024, "what a block of threads may use on every GPU"
        assert not re.search(r"\b(st|ld)\.local", compiled.asm["ptx"]), "registers spill"
        if dtype != torch.float32 and n > 1:
            assert mma in compiled.asm["ptx"] or "mma.sync" in compiled.asm["ptx"]
            assert re.search(r"cp\.async\.cg\.\S+ \[[^]]*\], \[[^]]*\], 0x10", compiled.asm["ptx"]), f"16 bytes {block} {n} at a time"


@TRITON
@pytest.mark.parametrize(("capability", "mma"), [(90, "wgmma.mma_async"), (100, "tcgen05.mma")])
@pytest.mark.parametrize("block", [(32, 32), (64, 64), (128, 64)])
def test_the_tma_kernel_compiles_to_tensor_copies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, mma: str, block: tuple[int, int]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setattr(triton_launch, "_launch_gather", None)
    monkeypatch.setattr(triton_launch, "_shared_memory_bytes", lambda device: 223 << 10)  # of these GPUs
    compiled = _compile(monkeypatch, capability, torch.ones(300, 128, dtype=torch.bfloat16), _whole(BlockGrid((256, 128), block)))
    assert compiled.metadata.shared <= 227 * 1024
    assert mma in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    assert not re.search(r"\b(st|ld)\.local", compiled.asm["ptx"]), "registers spill"


def _whole(grid: BlockGrid, dtype: torch.dtype = torch.bfloat16) -> BlockSparse:
    return pack(torch.ones(grid.shape, dtype=dtype), torch.ones(grid.size).bool(), grid, paired=False)


def _compile(monkeypatch: pytest.MonkeyPatch, capability: int, x: Tensor, sparse: BlockSparse) -> Any:
    """The kernel that `triton_launch.linear` would launch, compiled."""
    from triton import compile  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415
    from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415

    from blockprune.export import triton_kernels  # noqa: PLC0415

    launched: list[tuple[Any, dict[str, Any]]] = []

    class Grids:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: launched.append((self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | options))

    kernels = SimpleNamespace(**{name: Grids(getattr(triton_kernels, name)) for name in ("gather_kernel", "tma_kernel")})
    monkeypatch.setattr(triton_launch, "_is_interpreted", lambda: True)
    monkeypatch.setattr(triton_launch, "_kernels", lambda: kernels)
    triton_launch.linear(x, sparse.values, sparse.crow, sparse.col, shape=sparse.shape, block=sparse.block)
    ((kernel, given),) = launched
    options = {name: given.pop(name) for name in ("num_warps", "num_stages")}
    given["UPCAST"] = False
    types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}

    def kind(value: Any) -> str:
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{types[value.base.dtype]}{value.block_shape}>"
        return f"*{types[value.dtype]}" if isinstance(value, Tensor) else "i32"

    runtime = {name: value for name, value in given.items() if not isinstance(value, int) or (name[0].islower() and value != 1)}
    runtime = {name: value for name, value in runtime.items() if value is not None}
    signature = {name: kind(value) if name in runtime else "constexpr" for name, value in given.items()}
    place = {name: (i,) for i, name in enumerate(given)}
    plain = {name: value for name, value in runtime.items() if not isinstance(value, TensorDescriptor)}
    aligned = {place[name]: [["tt.divisibility", 16]] for name, value in plain.items() if isinstance(value, Tensor) or value % 16 == 0}
    source = ASTSource(kernel, signature, {place[name]: given[name] for name in given if name not in runtime}, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def test_it_says_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_launch.status() == (False, "no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_launch.status() == (False, 'Triton is not installed: pip install "blockprune[gpu]"')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert triton_launch.status() == (True, "Triton kernels on A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert triton_launch.status() == (False, "A GPU has compute capability 7.5; 8.0 is needed")


@pytest.mark.filterwarnings("ignore:0 of 1 masked layers became block-sparse")  # if dense is faster
def test_it_is_measured_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "status", lambda: (True, "so it says"))
    masked = bp.apply_masks(nn.Linear(32, 32), {"weight": bp.BlockMask(torch.eye(2).bool(), BlockGrid((32, 32), (16, 16)))})
    (choice,) = export.choose(masked, rows=2, progress=False).rows
    assert "triton" not in choice.milliseconds
    assert "torch" in choice.milliseconds


def test_on_a_cpu_a_triton_layer_runs_a_cpu_kernel() -> None:
    sparse = pack(torch.ones(32, 32), torch.eye(2).bool(), BlockGrid((32, 32), (16, 16)))
    layer = export.BlockSparseLinear(sparse, None, "triton")
    assert torch.equal(layer(torch.ones(2, 32)), torch.full((2, 32), 16.0))
    assert "triton" in repr(layer)


@CUDA
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, as it is imported
@pytest.mark.parametrize("graph", [False, True])
def test_layers_are_chosen_and_timed_on_a_gpu(graph: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024)).cuda().bfloat16()
    bp.apply_masks(model, {f"{i}.weight": bp.BlockMask(torch.rand(16, 16) > 0.9, BlockGrid((1024, 1024), (64, 64))) for i in (0, 2)})
    x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    choices = export.choose(model, inputs=x, graph=graph, rounds=3, progress=False)
    assert set(choices.rows[0].milliseconds) == {"F.linear", "triton", *([] if graph else ["torch"])}
    sparse = export.block_sparse(model, backend="triton")
    assert sparse[0].block == (64, 64)
    torch.testing.assert_close(sparse(x), model(x), atol=2e-2, rtol=2e-2)
    table = export.benchmark(model, sparse, inputs=x, graph=graph, rounds=3)
    assert [row.name for row in table.rows] == ["dense", "exported"]
    torch.testing.assert_close(copy.deepcopy(sparse).cpu()(x.cpu()), sparse(x).cpu(), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(torch.compile(sparse, fullgraph=True)(x), sparse(x), atol=2e-2, rtol=2e-2)


@TWO_OF_FOUR
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("bias", [False, True])
def test_two_of_four_is_torchs_own_product(tmp_path: Path, bias: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16
    model = nn.Sequential(nn.Linear(256, 512, bias=bias), nn.Linear(512, 10)).cuda().to(dtype)
    scores = bp.metric.l1(bp.collect.weights(model, where=bp.linears((1, 1))))
    bp.apply_masks(model, bp.allocate.n_of_m(scores, 0.5, m=4))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "0 of 2 masked layers became block-sparse")  # if dense is faster
        choices = export.choose(model, rows=64, rounds=3, progress=False)
    assert ["2:4" in row.milliseconds for row in choices.rows] == [True, False]
    sparse = export.block_sparse(model, backend="2:4")
    assert [row.backend for row in fixed_backend(model, "2:4").rows] == ["2:4", "dense"]
    torch.save(sparse, tmp_path / "model.pt")
    for n in (0, 1, 7, 130):
        x = torch.randn(n, 256, device="cuda", dtype=dtype)
        loaded = copy.deepcopy(sparse)
        loaded.load_state_dict(sparse.state_dict())
        for exported in (sparse, loaded, torch.load(tmp_path / "model.pt", weights_only=False), export.dense(sparse)):
            torch.testing.assert_close(exported(x), model(x), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(torch.compile(sparse, fullgraph=True)(x), sparse(x), atol=2e-2, rtol=2e-2)
    x, same = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(f(z).sum(), z)[0] for f, z in ((sparse, x), (model, same))), atol=2e-2, rtol=2e-2)
    x = x.detach()
    assert torch.equal(export.dense(sparse)[0].weight, model[0].weight)
    assert (
        export.benchmark(model, sparse, inputs=x, rounds=1).rows[1].mebibytes
        < export.benchmark(model, inputs=x, rounds=1).rows[0].mebibytes
    )


class Library:
    """What cuSPARSELt does, on a CPU."""

    @staticmethod
    def mm_search(*_: Any) -> tuple[int, ...]:
        return (7, 1, 1, 1)

    @staticmethod
    def sparse_mm(values: Tensor, x: Tensor, bias: Tensor | None, *, alg_id: int, transpose_result: bool) -> Tensor:
        assert transpose_result
        assert (alg_id, x.shape[1] % 8) == (7, 0)
        return x.mT @ values.mT + (0 if bias is None else bias)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has cuSPARSELt, as `Library` says."""
    monkeypatch.setattr(semi_structured, "is_supported", semi_structured.is_two_of_four)
    monkeypatch.setattr(semi_structured, "status", lambda: (True, "so it says"))
    monkeypatch.setattr(torch, "_cslt_compress", Tensor.clone, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", Library.sparse_mm, raising=False)
    monkeypatch.setattr(torch._C, "_cusparselt", Library, raising=False)


@pytest.mark.usefixtures("library")
@pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning")
def test_the_bits_of_a_two_of_four_layer_are_not_averaged_and_load_whole() -> None:
    def exported(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).to(torch.bfloat16)
        scores = bp.metric.l1(bp.collect.weights(model, where=bp.linears((1, 1))))
        return export.block_sparse(bp.apply_masks(model, bp.allocate.n_of_m(scores, 0.5, m=4)), backend="2:4")

    model, other = exported(0), exported(1)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    average.update_parameters(other)
    assert torch.equal(average.module[0].weight, model[0].weight)
    assert not torch.equal(average.module[0].bias, model[0].bias)
    state, before = other.state_dict(), model[0].weight
    assert state["0.values"].dtype == torch.int16
    mean = {name: (x + model.state_dict()[name]) / 2 for name, x in state.items()}
    for wrong in (mean, state | {"0.values": state["0.values"].bfloat16()}, state | {"0.values": state["0.values"][1:]}):
        with pytest.raises(RuntimeError, match=r"0.values: .* not the bits of a 2:4 weight \(16, 16\)"):
            model.load_state_dict(wrong)
        assert torch.equal(model[0].weight, before)
    with pytest.raises(RuntimeError, match=r"0\.values"):
        model.load_state_dict({name: x for name, x in state.items() if name != "0.values"})
    model.load_state_dict(state)
    assert torch.equal(model[0].weight, other[0].weight)
    assert model[0].values.data_ptr() != other[0].values.data_ptr()
    assert torch.equal(copy.deepcopy(model)[0].weight, other[0].weight)
    x = torch.randn(8, 16, dtype=torch.bfloat16)
    assert torch.equal(model.eval()(x), other.eval()(x))
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile a 2:4 weight \(16, 16\); script export.dense"):
        torch.jit.script(model)


@pytest.mark.usefixtures("library")
def test_a_two_of_four_layer_is_an_ordinary_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)).double()
    scores = bp.metric.l1(bp.collect.weights(model, where=bp.linears((1, 1))))
    whole = {name: score for name, score in scores.items() if name != "1.weight"}
    bp.apply_masks(model, bp.allocate.n_of_m(whole, 0.5, m=4) | bp.allocate.per_layer({"1.weight": scores["1.weight"]}, 0.5))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "0 of 3 masked layers became block-sparse")  # if dense is faster
        choices = export.choose(model, rows=8, rounds=1, progress=False)
    assert ["2:4" in row.milliseconds for row in choices.rows] == [True, False, True], (
        "layers of one shape are timed separately where only some are 2:4"
    )
    sparse = export.block_sparse(model, backend="2:4")
    assert [type(layer).__name__ for layer in sparse] == ["SemiStructuredLinear", "Linear", "SemiStructuredLinear"]
    for n in ((), (0,), (3,), (2, 5)):
        x, same = (normal((*n, 16), 1).requires_grad_() for _ in range(2))
        for exported in (sparse, copy.deepcopy(sparse), export.dense(sparse)):
            torch.testing.assert_close(exported(x), model(x))
        torch.testing.assert_close(*(torch.autograd.grad(f(z).square().sum(), z)[0] for f, z in ((sparse, x), (model, same))))
        torch.testing.assert_close(*(torch.autograd.grad(f(x).square().sum(), f[2].bias)[0] for f in (sparse, model)))
    torch.testing.assert_close(torch.compile(sparse, fullgraph=True, backend="aot_eager")(x), model(x))
    with pytest.raises(TypeError, match=r"a 2:4 weight \(16, 16\) cannot become torch.float32 on cpu"):
        sparse.float()
    with pytest.raises(ValueError, match="does not fit a weight of 16 columns: its last axis must be 16"):
        sparse[0](x[..., 1:])
    with pytest.raises(TypeError, match=r"torch.float32 does not fit a 2:4 weight of torch.float64"):
        sparse[0](x.float())
    with pytest.raises(ValueError, match=r"a weight \(16, 16\) of torch.float64 on cpu is not 2:4"):
        semi_structured.SemiStructuredLinear(export.dense(sparse)[1])
    with pytest.raises(ValueError, match=r"1\.weight is not 2:4"):
        export.block_sparse(model, backend=export.Choices(tuple(attrs.evolve(row, backend="2:4") for row in choices.rows)))


def test_where_a_graph_leaves_nothing_sparse_layers_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = bp.apply_masks(nn.Linear(8, 8), {"weight": bp.BlockMask(torch.eye(2).bool(), BlockGrid((8, 8), (4, 4)))})
    monkeypatch.setattr(backend_choice, "BACKENDS", ())
    with pytest.warns(UserWarning, match=r"0 of 1 masked layers became block-sparse \(weight: there is no sparse kernel"):
        (choice,) = export.choose(masked, rows=2, graph=True, rounds=1, progress=False).rows
    assert (choice.backend, choice.reason) == ("dense", "there is no sparse kernel for torch.float32 on cpu in a CUDA graph")


@given(integers_of=st.tuples(st.integers(1, 3), st.integers(1, 4), seeds))
def test_two_of_four_is_its_definition(integers_of: tuple[int, int, int]) -> None:
    rows, groups, seed = integers_of
    weight = (torch.rand(rows, 4 * groups, generator=torch.Generator().manual_seed(seed)) < 0.4).float()
    definition = all(sum(bool(weight[r, 4 * g + i]) for i in range(4)) <= 2 for r in range(rows) for g in range(groups))
    assert semi_structured.is_two_of_four(weight) == definition
    assert not semi_structured.is_supported(weight)


def test_two_of_four_says_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert semi_structured.status() == (False, "no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert semi_structured.status() == (False, "this torch was built without cuSPARSELt")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert semi_structured.status()[0]
    monkeypatch.setattr(triton_launch, "status", lambda: (False, "not asked here"))
    model = nn.Linear(16, 16)
    bp.apply_masks(model, bp.allocate.n_of_m(bp.metric.l1(bp.collect.weights(model, where=bp.linears((1, 1)))), 0.5, m=4))
    (choice,) = fixed_backend(model, "2:4").rows
    assert (choice.backend, choice.reason) == ("dense", "not 2:4 in bfloat16 on a GPU, with sides that are multiples of 16")
