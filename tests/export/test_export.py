"""An exported model computes what the masked one does, and is an ordinary model: it saves, loads, copies, moves, compiles."""

import copy
import io
import math
import pickle
import types
import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import reference
import torch
import torch.fx.experimental.proxy_tensor
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import Matrix, kept_matrices, normal, seeds
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import blockprune as bp
from blockprune import export
from blockprune.export import conv_ops, ops, triton_launch
from blockprune.export.backend_choice import fixed_backend
from blockprune.export.format import pack
from blockprune.export.packing import pack_int8, pack_weight
from blockprune.native import spmm

BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(spmm._library is None, reason=spmm.status)),
    "torch",
    "int8",  # block_sparse(dtype="int8"), by operators of torch
]
MAY_STAY_DENSE = pytest.mark.filterwarnings("ignore:0 of . masked layers became block-sparse")  # so small layers, on some machines
BOTH_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
OF_CONVOLUTIONS = pytest.mark.parametrize("backend", BACKENDS[:2])  # they have no int8 form
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def random_masks(model: nn.Module, where: bp.Where, sparsity: float = 0.5) -> dict[str, bp.BlockMask]:
    data = bp.collect.weights(model, where=where)
    return {name: bp.BlockMask(torch.rand(p.grid.size) > sparsity, p.grid) for name, p in data.items()}


def masked(model: nn.Module, block: tuple[int, ...] = (4, 4), sparsity: float = 0.5) -> nn.Module:
    rule = bp.first_of(bp.linears(block), bp.convs(block))
    return bp.apply_masks(model.eval(), random_masks(model, rule, sparsity))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 10, bias=False))


def exported(model: nn.Module, backend: str) -> nn.Module:
    """A block-sparse model; one in int8 is forced to that type."""
    options: Any = {"dtype": "int8", "backend": "torch", "max_error": float("inf")} if backend == "int8" else {"backend": backend}
    return export.block_sparse(model, **options)


def expected_model(model: nn.Module, backend: str) -> nn.Module:
    """What an exported model computes."""
    return reference.int8_model(model) if backend == "int8" else model


def close(a: Tensor, b: Tensor, times: float = 1.0) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    if a.numel():
        assert (a.double() - b.double()).abs().max() <= times * TOLERANCE[a.dtype] * (1 + b.double().abs().max())


leading = st.sampled_from([(), (1,), (3,), (17,), (0,), (2, 3), (2, 1, 4)])


@BOTH_BACKENDS
@given(kept_matrices(), leading, seeds, st.sampled_from(list(TOLERANCE)))
def test_a_linear_equals_the_masked_one(backend: str, matrix: Matrix, batch: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    weight, keep, grid = matrix
    layer = nn.Linear(grid.shape[1], grid.shape[0], bias=seed % 2 == 0).to(dtype)
    bp.apply_masks(layer, {"weight": bp.BlockMask(keep, grid)}, {"weight": weight / 4})
    x, before = normal((*batch, grid.shape[1]), seed).to(dtype), copy.deepcopy(layer.state_dict())
    sparse, expected = exported(layer, backend), expected_model(layer, backend)
    assert type(sparse) is (export.Int8BlockSparseLinear if backend == "int8" else export.BlockSparseLinear)
    close(sparse(x), expected(x), times=grid.shape[1] ** 0.5)
    assert torch.equal(sparse.weight, expected.weight)
    assert sparse.weight.dtype == dtype
    assert before.keys() == layer.state_dict().keys()


@BOTH_BACKENDS
@pytest.mark.parametrize("trailing", [(), (2,)])
def test_rows_of_a_jagged_tensor_are_multiplied_as_rows(backend: str, trailing: tuple[int, ...]) -> None:
    model = masked(nn.Linear(24, 8))
    sparse, expected = exported(model, backend), expected_model(model, backend)
    rows = [normal((n, *trailing, 24), n).float() for n in (3, 0, 5)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    out = sparse(jagged)
    assert out.shape == (*jagged.shape[:-1], 8)
    for product, of_sequence in zip(out.unbind(), rows, strict=True):
        close(product, expected(of_sequence))
    out.values().sum().backward()
    assert jagged.grad is not None
    close(jagged.grad.values(), expected.weight.sum(0).expand_as(jagged.values()))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_another_layout_are_refused_with_a_remedy() -> None:
    sparse = exported(nn.Sequential(masked(nn.Linear(24, 8))), "torch")
    with pytest.raises(TypeError, match=r"^0: a nested tensor of layout torch.strided is not supported; make it with layout=torch.jagged"):
        sparse(torch.nested.nested_tensor([normal((3, 24), 0), normal((5, 24), 0)], layout=torch.strided))


@BOTH_BACKENDS
@pytest.mark.parametrize("block", [(4, 4), (4,), (-1, 2), (3, 1, 1), (1, 1, 2, 3), (2, 2, -1, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": "same", "padding_mode": "reflect", "dilation": 2},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "padding_mode": "circular"},
    ],
    ids=str,
)
def test_a_convolution_equals_the_masked_one(backend: str, block: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, **options).eval()
    block = tuple(min(b, s) for b, s in zip(block, conv.weight.shape, strict=False))
    bp.apply_masks(conv, random_masks(conv, bp.convs(block)))
    sparse = exported(conv, backend)
    assert isinstance(sparse, export.BlockSparseConv2d)
    x = torch.randn(2, 6, 9, 8)
    close(sparse(x), conv(x))
    close(sparse(x[0]), conv(x[0]))
    close(sparse(x.to(memory_format=torch.channels_last)), conv(x))
    assert torch.equal(sparse.weight, conv.weight)
    assert torch.equal(export.dense(sparse).weight, conv.weight)
    close(export.dense(sparse)(x), conv(x))


@BOTH_BACKENDS
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_inputs_and_biases_are_those_of_the_masked_model(backend: str, frozen: bool) -> None:
    model = masked(mlp())
    sparse, model = exported(model, backend), expected_model(model, backend)
    if frozen:
        sparse.requires_grad_(False)
    x, same = (torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    model(x).square().sum().backward()
    sparse(same).square().sum().backward()
    assert x.grad is not None
    assert same.grad is not None
    close(same.grad, x.grad)
    if not frozen:
        close(sparse[0].bias.grad, model[0].bias.grad)


@BOTH_BACKENDS
def test_the_operator_keeps_torchs_rules(backend: str) -> None:
    weight, keep = torch.randn(6, 8, dtype=torch.float64), torch.rand(3, 2) > 0.4
    mask = bp.BlockMask(keep, bp.BlockGrid((6, 8), (2, 4)))
    w = pack_int8(weight, mask) if backend == "int8" else pack_weight(weight, mask)
    x, bias = torch.randn(3, 8, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    arguments = (x, bias, w.values, w.crow, w.col, w.shape, w.block, w.paired, "torch" if backend == "int8" else backend, w.scale)
    torch.library.opcheck(ops.linear_op, arguments)
    torch.library.opcheck(ops.linear_input_grad_op, (torch.randn(3, 6, dtype=torch.float64), *arguments[2:]))
    x, bias = x.requires_grad_(), bias.requires_grad_()
    weight = (*arguments[2:-2], ops.UNROUNDED, w.scale) if backend == "int8" else arguments[2:]
    torch.autograd.gradcheck(lambda x, bias: ops.linear(x, bias, *weight), (x, bias))
    torch.autograd.gradgradcheck(lambda x: ops.linear(x, None, *weight), (x,))


@BOTH_BACKENDS
def test_vmap_is_a_batch_more(backend: str) -> None:
    sparse = exported(masked(mlp()), backend)
    x = torch.randn(3, 5, 24)
    close(torch.vmap(sparse)(x), sparse(x))
    close(torch.vmap(sparse, in_dims=1)(x), sparse(x.transpose(0, 1)))
    close(torch.vmap(torch.func.grad(lambda x: sparse(x).sum()))(x), torch.func.grad(lambda x: sparse(x).sum())(x))


@BOTH_BACKENDS
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_in_one_graph_and_exports(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()  # what other tests compiled counts against its limit
    model = masked(mlp())
    sparse, model = exported(model, backend), expected_model(model, backend)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (3, 7):
        x = torch.randn(n, 24, requires_grad=True)
        close(compiled(x), model(x))
    (grad,) = torch.autograd.grad(compiled(x).sum(), x)
    close(grad, torch.autograd.grad(model(x).sum(), x)[0])
    program = torch.export.export(sparse, (x,), dynamic_shapes=({0: torch.export.Dim("n")},) if dynamic else None)
    close(program.module()(x), model(x))


@BOTH_BACKENDS
def test_it_saves_loads_copies_and_moves(backend: str, tmp_path: Path) -> None:
    model, x = masked(mlp()), torch.randn(3, 24)
    sparse, expected = exported(model, backend), expected_model(model, backend)
    save_file(sparse.state_dict(), tmp_path / "sparse.safetensors")
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    with torch.device("meta"):
        skeleton = mlp().eval()
    loaded = [
        copy.deepcopy(sparse),
        pickle.loads(pickle.dumps(sparse)),
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
        export.load_state_dict(mlp().eval(), load_file(tmp_path / "sparse.safetensors")),
        export.load_state_dict(skeleton, load_file(tmp_path / "sparse.safetensors")),
        export.load_state_dict(model, sparse.state_dict()),
        export.load_state_dict(sparse, sparse.state_dict()),
        sparse.to("meta").to_empty(device="cpu"),
    ]
    loaded[-1].load_state_dict(load_file(tmp_path / "sparse.safetensors"))
    for copied in loaded:
        close(copied(x), expected(x))
        assert list(copied.state_dict()) == list(sparse.state_dict())
    half = copy.deepcopy(loaded[0]).to(torch.bfloat16)
    close(half(x.bfloat16()), expected(x).bfloat16())
    assert half[0].layout.dtype == torch.int64
    assert half[0].weight.dtype == torch.bfloat16
    if backend == "int8":
        assert (half[0].values.dtype, half[0].scale.dtype) == (torch.int8, torch.float32)


@pytest.mark.parametrize("backend", ["torch", "int8"])
@pytest.mark.parametrize("block", [(8, 8), (8, 1), (5, 3)])
def test_a_weight_is_stored_in_the_layout_of_its_device(monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], backend: str) -> None:
    model, x = masked(mlp(), block), torch.randn(3, 24)
    on_cpu = exported(model, backend)
    cpu_state, y = {key: value.clone() for key, value in on_cpu.state_dict().items()}, on_cpu(x)
    converted = copy.deepcopy(on_cpu)
    with monkeypatch.context() as patch:
        patch.setattr(triton_launch, "uses_gpu_layout", lambda device: True)
        on_gpu = exported(model, backend)
        state = {key: value.clone() for key, value in on_gpu.state_dict().items()}
        converted.to("cpu")  # as if to another device
        assert {key: value.tolist() for key, value in converted.state_dict().items()} == {
            key: value.tolist() for key, value in state.items()
        }
        assert state["0.layout"].tolist()[-1] == 0
        close(on_gpu(x), y)
        close(export.load_state_dict(mlp(), cpu_state)(x), y)
        on_gpu.load_state_dict(cpu_state)
        assert {key: value.tolist() for key, value in on_gpu.state_dict().items()} == {key: value.tolist() for key, value in state.items()}
    on_cpu.load_state_dict(state)
    assert on_cpu[0].layout.tolist()[-1] == 1
    assert torch.equal(on_cpu(x), y)
    close(export.load_state_dict(mlp(), state)(x), y)


def test_a_weight_from_another_kind_of_device_is_converted_however_it_arrives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = masked(mlp()), torch.randn(3, 24)
    on_cpu = export.block_sparse(model, backend="torch")
    y, kept = on_cpu(x), on_cpu.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(triton_launch, "uses_gpu_layout", lambda device: True)
        on_gpu = export.block_sparse(model, backend="torch")
        torch.save(on_gpu, tmp_path / "on_gpu.pt")
        state = on_gpu.state_dict()
    assert torch.load(tmp_path / "on_gpu.pt", weights_only=False)[0].paired, "as `torch.load` with map_location moves it"
    meta = copy.deepcopy(on_cpu).to("meta")
    with pytest.warns(UserWarning, match="no-op"):
        meta.load_state_dict(state)
    meta.load_state_dict(state, assign=True)
    close(meta(x), y)
    on_cpu.load_state_dict(state)
    assert kept["0.layout"].tolist()[-1] == 1, "a state dict that was taken before stays as it was"
    on_cpu.load_state_dict(kept)
    assert torch.equal(on_cpu(x), y)


@pytest.mark.parametrize("backend", ["torch", "int8"])
def test_another_mask_loads_into_the_same_layer(backend: str) -> None:
    first, second = (exported(masked(mlp(), sparsity=s), backend) for s in (0.3, 0.8))
    x = torch.randn(3, 24)
    first.load_state_dict(second.state_dict())
    close(first(x), second(x))


def test_the_masked_model_stays_and_nothing_is_shared() -> None:
    model, x = masked(mlp()), torch.randn(3, 24)
    before, state = model(x), copy.deepcopy(model.state_dict())
    sparse = export.block_sparse(model, backend="torch")
    with torch.no_grad():
        sparse[0].bias.add_(1)
        sparse[0].values.add_(1)
    assert torch.equal(model(x), before)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert sparse.training == model.training


@BOTH_BACKENDS
def test_nan_and_inf_reach_what_keeps_their_column(backend: str) -> None:
    layer = nn.Linear(4, 4, bias=False)
    bp.apply_masks(layer, {"weight": bp.BlockMask(torch.tensor([[True, False], [False, True]]), bp.BlockGrid((4, 4), (2, 2)))})
    sparse = exported(layer, backend)
    out = sparse(torch.tensor([[float("nan"), 1.0, 2.0, 3.0]]))
    whole_row = backend == "int8"
    assert out.isnan().tolist() == [[True, True, whole_row, whole_row]]


@BOTH_BACKENDS
def test_autocast_multiplies_in_its_type(backend: str) -> None:
    model, x = masked(mlp()), torch.randn(3, 24)
    sparse, expected = exported(model, backend), expected_model(model, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse(x)
        close(y, expected(x))
    y.float().sum().backward()
    assert sparse[0].bias.grad.dtype == torch.float32


class Unsupported(nn.Module):
    """One layer of each kind that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.convolution_1d = nn.Conv1d(8, 8, 1)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda *_: None)
        self.embedding, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.plain = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.attention(x, x, x)[0])
        x = x + self.grouped(x.mT[..., None].expand(-1, -1, -1, 3).clone().repeat(1, 1, 2, 1)).mean((2, 3))[:, None]
        return self.head(self.plain(self.hooked(self.normed(self.convolution_1d(x.mT).mT))))


def test_what_has_no_block_sparse_form_stays_dense_and_says_why() -> None:
    torch.manual_seed(0)
    model = Unsupported().eval()
    masks = random_masks(
        model, lambda name, owner: (2, 2) if "weight" in name and "norm" not in name.split(".")[-2] and "normed" not in name else None
    )
    masks |= random_masks(model, bp.named("normed.weight", (2, 2)))
    bp.apply_masks(model, masks)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "0 of .* masked layers became block-sparse")  # if the one that could be is faster dense
        choices = export.choose(model, inputs=torch.randn(2, 3, 8), progress=False)
    why = {row.name: row.reason for row in choices.rows if row.backend == "dense"}
    for name, said in {
        "attention.out_proj.weight": "has no block-sparse form",
        "encoder.linear1.weight": "reads the weight itself",
        "grouped.weight": "in groups",
        "convolution_1d.weight": "Conv1d",
        "normed.weight": "another parametrization",
        "hooked.weight": "hooks",
        "embedding.weight": "tied: head.weight",
    }.items():
        assert said in why[name], (name, why.get(name))
    with pytest.warns(UserWarning, match=r"^\d+ of \d+ masked layers have no block-sparse form \(.*attention.out_proj.weight: NonDyn"):
        x, sparse = torch.randn(2, 3, 8), export.block_sparse(model, backend="torch")
    assert [name for name, module in sparse.named_modules() if isinstance(module, export.BlockSparseLinear)] == ["plain"]
    close(sparse(x), model(x), times=10)
    assert "plain.weight" in repr(choices)
    assert "<table>" in choices._repr_html_()


@MAY_STAY_DENSE
def test_auto_takes_the_faster_backend() -> None:
    torch.manual_seed(0)
    model = masked(nn.Sequential(nn.Linear(512, 512), nn.Conv2d(16, 16, 1)), (16, 16), 0.9)
    choices = export.choose(model, rows=64, progress=False)
    first, second = choices.rows
    sparse = {key: ms for key, ms in first.milliseconds.items() if key in ops.BACKENDS}
    assert (first.backend in sparse) == (min(sparse.values()) < first.milliseconds["F.linear"])
    assert second.backend == "dense"
    chosen = export.block_sparse(model, backend=choices)
    assert isinstance(chosen[0], export.BlockSparseLinear) == (first.backend != "dense")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"0.col": lambda x: x + 100}, "col must be from 0"),
        ({"0.col": lambda x: x - 100}, "col must be from 0"),
        ({"0.values": lambda x: x[:-1]}, "values has"),
        ({"0.crow": lambda x: x.flip(0)}, "crow must rise"),
        ({"0.layout": lambda x: x[:3]}, "layout is"),
        ({"0.layout": lambda x: x.flip(0)}, "it is not what was exported"),
        ({"0.layout": lambda x: x + 2 * (torch.arange(len(x)) == len(x) - 1)}, "must end in 1 (CPU layout) or 0 (GPU layout)"),
        ({"0.crow": lambda x: x.int()}, "crow is"),
    ],
)
def test_a_corrupt_state_dict_is_caught_before_anything_reads_it(change: dict[str, Any], said: str) -> None:
    sparse, x = export.block_sparse(masked(mlp()), backend="torch"), torch.randn(3, 24)
    bad = {key: change[key](value) if key in change else value for key, value in sparse.state_dict().items()}
    before = sparse(x)
    with pytest.raises(ValueError, match=r"^0: ") as caught:
        export.load_state_dict(mlp(), bad)
    assert said in str(caught.value)
    with pytest.raises(RuntimeError, match=r"0: ") as raised:
        sparse.load_state_dict(bad)
    assert said in str(raised.value)
    assert torch.equal(sparse(x), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"0.col": lambda x: x + 100}, "col must be from 0"),
        ({"0.values": lambda x: x.float()}, "values are torch.float32 with a scale"),
        ({"0.values": lambda x: x.clone().fill_(-128)}, "values of int8 must be from -127 to 127"),
        ({"0.values": lambda x: x[:-1]}, "values has"),
        (
            {"0.scale": lambda x: x[:-1]},
            "scale is torch.float32 of shape (31,) on cpu, and must be contiguous",
        ),
        ({"0.scale": lambda x: x.double()}, "scale is torch.float64"),
        ({"0.scale": lambda x: x / 0}, "scale must be finite and not negative"),
        ({"0.scale": lambda x: x * float("nan")}, "scale must be finite and not negative"),
        ({"0.scale": lambda x: -x}, "scale must be finite and not negative"),
        ({"0.scale": None}, "no scale|is all of values, crow, col, layout, scale"),
    ],
)
def test_a_corrupt_state_dict_of_int8_is_caught_before_anything_reads_it(change: dict[str, Any], said: str) -> None:
    sparse, x = exported(masked(mlp()), "int8"), torch.randn(3, 24)
    bad = {key: change[key](value) if change.get(key) else value for key, value in sparse.state_dict().items()}
    bad = {key: value for key, value in bad.items() if key not in change or change[key]}
    before = sparse(x)
    with pytest.raises(ValueError, match=r"^0: ") as caught:
        export.load_state_dict(mlp(), bad)
    assert any(part in str(caught.value) for part in said.split("|"))
    with pytest.raises(RuntimeError, match=r"0: ") as raised:
        sparse.load_state_dict(bad)
    assert any(part in str(raised.value) for part in said.split("|"))
    assert torch.equal(sparse(x), before)


def test_a_weight_of_another_type_does_not_load() -> None:
    in_int8, in_float = (exported(masked(mlp()), backend) for backend in ("int8", "torch"))
    with pytest.raises(RuntimeError, match=r"the state dict has values, crow, col, layout of it; .* is all of .*scale"):
        in_int8.load_state_dict(in_float.state_dict())
    with pytest.raises(RuntimeError, match=r"values are torch.int8 with no scale"):
        in_float.load_state_dict(in_int8.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(export.load_state_dict(in_float, in_int8.state_dict())(x), in_int8(x))
    close(export.load_state_dict(in_int8, in_float.state_dict())(x), in_float(x))
    conv = nn.Sequential(nn.Conv2d(24, 32, 1), nn.GELU(), nn.Linear(32, 10, bias=False))
    with pytest.raises(ValueError, match=r"0: the state dict has a weight of int8 for a Conv2d; only a Linear can have one"):
        export.load_state_dict(conv, in_int8.state_dict())
    with pytest.raises(ValueError, match=r"^BlockSparseLinear cannot hold a weight of torch.int8: .* is an Int8BlockSparseLinear"):
        export.BlockSparseLinear(in_int8[0].packed_weight, None)
    with pytest.raises(ValueError, match=r"Int8BlockSparseLinear cannot hold a weight of torch.float32"):
        export.Int8BlockSparseLinear(in_float[0].packed_weight, None)


def test_int8_indices_and_scales_that_were_written_are_validated() -> None:
    layer, x = exported(masked(nn.Linear(8, 8)), "int8"), torch.randn(3, 8)
    layer(x)
    layer.scale[2] = float("nan")
    with pytest.raises(ValueError, match="scale must be finite"):
        layer(x)
    layer.scale = torch.ones(5)
    with pytest.raises(ValueError, match=r"scale is torch.float32 of shape \(5,\)"):
        layer(x)
    with pytest.raises(TypeError, match=r"an input of torch.int64 does not fit a weight of torch.float32"):
        layer(x.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_model_becomes_dense_in_its_own_type(dtype: torch.dtype) -> None:
    model, x = masked(mlp()).to(dtype), torch.randn(3, 24).to(dtype)
    sparse = exported(model, "int8")
    dense = export.dense(sparse)
    assert {type(layer) for layer in dense} == {nn.Linear, nn.GELU}
    assert {p.dtype for p in dense.parameters()} == {dtype}
    assert (dense(x) - sparse(x)).abs().max() <= 0.02 * (1 + sparse(x).abs().max())


def test_a_state_dict_on_the_meta_device_is_refused_and_indices_keep_their_type() -> None:
    sparse, x = export.block_sparse(masked(mlp()), backend="torch"), torch.randn(3, 24)
    with pytest.raises(RuntimeError, match=r"the layer: layout is torch.int64 of shape \(5,\) on meta"):
        sparse[0].load_state_dict({**sparse[0].state_dict(), "layout": torch.empty(5, dtype=torch.int64, device="meta")})
    y, state = sparse(x), {key: value.clone() for key, value in sparse.state_dict().items()}
    loaded = copy.deepcopy(sparse).to("meta").type(torch.float64).to_empty(device="cpu").float()
    loaded.load_state_dict(state)
    assert torch.equal(loaded(x), y)


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3))


@BOTH_BACKENDS
@pytest.mark.parametrize("part", ["all", "the kept weights", "the bias", "the input"])
@pytest.mark.parametrize("make", [mlp, convolution])
def test_what_is_on_the_meta_device_does_not_multiply_what_is_not(make: Any, part: str, backend: str) -> None:
    if make is convolution and backend == "int8":
        pytest.skip("a convolution has no int8 form")
    model, x = exported(masked(make()), backend), torch.randn(2, 24) if make is mlp else torch.randn(2, 4, 5, 5)
    if part == "the input":
        x = x.to("meta")
    elif part == "the bias":
        model[0].bias = nn.Parameter(model[0].bias.to("meta"))
    elif part == "the kept weights":
        bias = model[0].bias
        model[0].to("meta").bias = bias
    else:
        model.to("meta")
    with pytest.raises(RuntimeError, match=r"0: the input is on .* the kept weights are on .* the bias is on .* export.load_state_dict"):
        model(x)
    if part == "all":
        assert model(x.to("meta")).is_meta


@BOTH_BACKENDS
def test_a_layer_on_the_meta_device_takes_the_tensors_that_are_assigned(backend: str) -> None:
    model, x = exported(masked(mlp()), backend), torch.randn(3, 24)
    loaded = copy.deepcopy(model).to("meta")
    loaded.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(loaded(x), model(x))


def test_errors_about_inputs_begin_with_the_name_of_the_layer() -> None:
    sparse = export.block_sparse(masked(nn.ModuleDict({"fc": nn.Linear(24, 8), "conv": nn.Conv2d(4, 4, 3)})), backend="torch")
    for name, x, error, message in [
        ("fc", torch.randn(3, 25), ValueError, "an input of shape"),
        ("fc", torch.randn(3, 24).double(), TypeError, "an input of torch.float64"),
        ("conv", torch.randn(1, 3, 4, 4), ValueError, "an input of shape"),
        ("conv", torch.randn(1, 4, 2, 2), ValueError, "an input of shape"),
        ("conv", torch.randn(1, 4, 4, 4).double(), TypeError, "an input of torch.float64"),
    ]:
        with pytest.raises(error, match=rf"^{name}: {message}"):
            sparse[name](x)


@BOTH_BACKENDS
def test_all_that_was_exported_trains_again_as_plain_layers(backend: str) -> None:
    model = masked(mlp())
    model[0].requires_grad_(False)
    plain = export.dense(exported(model, backend))
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == {"0.weight": False, "0.bias": False, "2.weight": True}


def test_a_state_dict_of_another_model_says_which_layer() -> None:
    state = export.block_sparse(masked(mlp()), backend="torch").state_dict()
    with pytest.raises(ValueError, match=r"0: the state dict has a weight of shape \(32, 24\), and the layer one of \(8, 24\)"):
        export.load_state_dict(nn.Sequential(nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 10, bias=False)), state)
    with pytest.raises(KeyError, match="that the model does not have"):
        export.load_state_dict(nn.Sequential(nn.Linear(24, 32)), state)
    with pytest.raises(KeyError, match=r"'module.0' that the model does not have; its names begin with 'module.', of a wrapper; strip it"):
        export.load_state_dict(mlp(), {f"module.{key}": x for key, x in state.items()})
    with pytest.raises(ValueError, match="for a GELU"):
        export.load_state_dict(nn.Sequential(nn.GELU(), nn.GELU(), nn.Linear(32, 10, bias=False)), state)
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        export.load_state_dict(nn.Sequential(nn.Linear(24, 32, bias=False), nn.GELU(), nn.Linear(32, 10, bias=False)), state)


@MAY_STAY_DENSE
def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="has no masks"):
        export.block_sparse(mlp())
    model = masked(mlp())
    with pytest.raises(ValueError, match="backend='cuda' must be 'auto', one of 'native', 'triton', 'torch', '2:4', 'dense'"):
        export.block_sparse(model, backend="cuda")
    with pytest.raises(ValueError, match="rows=0"):
        export.block_sparse(model, rows=0)
    with pytest.raises(KeyError, match=r"no choice for '2.weight'"):
        export.block_sparse(model, backend=export.Choices(export.choose(model, progress=False).rows[:1]))
    sparse = export.block_sparse(model, backend="torch")
    with pytest.raises(ValueError, match=r"a bias of shape \(1,\) does not fit a weight of shape \(32, 24\): it must be \(32,\)"):
        export.BlockSparseLinear(sparse[0].packed_weight, nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"0.weight is not 2:4 in bfloat16 on a GPU"):
        export.block_sparse(model, backend=export.Choices(tuple(attrs.evolve(r, backend="2:4") for r in export.choose(model).rows)))
    with pytest.raises(ValueError, match=r"\(3, 25\) does not fit a weight of shape \(32, 24\): its last axis must be 24"):
        sparse(torch.randn(3, 25))
    with pytest.raises(TypeError, match=r"torch.float64 does not fit a weight of torch.float32"):
        sparse(torch.randn(3, 24).double())
    conv = export.block_sparse(masked(nn.Conv2d(4, 4, 1)), backend="torch")
    with pytest.raises(ValueError, match="convolution of 4 channels"):
        conv(torch.randn(1, 3, 2, 2))


@MAY_STAY_DENSE
def test_an_unavailable_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spmm, "_library", None)
    monkeypatch.setattr(spmm, "status", "not built (no compiler)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend='native' is not available: .*not built \(no compiler\)"):
        export.block_sparse(masked(mlp()), backend="native")
    assert [row.name for row in export.backends().rows if row.available] == ["torch", "dense"]
    assert {row.backend for row in export.choose(masked(mlp()), progress=False).rows} <= {"torch", "dense"}


@BOTH_BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_many_bands_add_up_in_float32(backend: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 4096, bias=False).to(dtype)
    mask = bp.BlockMask(torch.ones(1024, 16).bool(), bp.BlockGrid((4096, 64), (4, 4)))
    bp.apply_masks(layer, {"weight": mask}, {"weight": torch.ones(4096, 64)})
    x = torch.ones(1, 64, dtype=dtype, requires_grad=True)
    exported(layer, backend)(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 4096))


class Linear(nn.Linear):
    """Named as torch's, and more than a product, as LoRA's are."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_a_layer_that_does_more_than_a_product_stays_dense() -> None:
    x = torch.randn(2, 8)
    patched, backward = nn.Linear(8, 8), nn.Linear(8, 8)
    patched.forward = types.MethodType(lambda self, input: 10 * nn.Linear.forward(self, input), patched)  # type: ignore[method-assign]
    backward.register_full_backward_hook(lambda *_: None)
    for layer in (Linear(8, 8), patched, backward):
        model = masked(nn.Sequential(layer))
        with pytest.warns(UserWarning, match=r"0 of 1 masked layers became block-sparse \(0.weight: .*\); print\(choose\(model\)\) lists"):
            sparse = export.block_sparse(model, backend="torch")
        assert not any(isinstance(m, export.BlockSparseLinear) for m in sparse.modules())
    assert torch.equal(sparse(x), model(x))


class ReadsDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wo = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(x.to(self.wo.weight.dtype))


def test_a_layer_whose_weight_the_model_also_reads_stays_dense() -> None:
    with pytest.warns(UserWarning, match="0 of 1 masked layers became block-sparse"):
        (choice,) = export.choose(masked(ReadsDtype()), inputs=torch.randn(2, 8), progress=False).rows
    assert (choice.backend, choice.reason) == ("dense", "the model reads the weight itself")


@BOTH_BACKENDS
def test_no_index_reaches_the_product_unchecked(backend: str) -> None:
    layer, x = exported(masked(nn.Linear(8, 8)), backend), torch.randn(3, 8)
    before, state = layer(x), layer.state_dict()
    far = torch.full_like(layer.col, 2**28)
    with pytest.raises(RuntimeError, match="the state dict has col of it; a block-sparse weight is all of"):
        layer.load_state_dict({"col": far}, strict=False)
    with pytest.raises(RuntimeError, match="is all of values, crow, col, layout"):
        layer.load_state_dict({**{k: v for k, v in state.items() if k != "layout"}, "col": far})
    for layout in ([8, 8, 2**63 - 1, 4, 1], [8, 8, 8, 2**40, 1], [8, 8, -4, 4, 0], [2**62, 8, 4, 4, 1]):
        with pytest.raises(RuntimeError, match=r"it is not what was exported|does not fit into a layer"):
            layer.load_state_dict({**state, "layout": torch.tensor(layout)})
    for values in (state["values"].to(torch.complex64), state["values"].to("meta"), state["values"].long()):
        with pytest.raises(RuntimeError, match="on one device"):
            layer.load_state_dict({**state, "values": values})
    crow = torch.tensor([0, 2**63 - 1, -2, *state["crow"].tolist()])[: len(state["crow"])]
    with pytest.raises(RuntimeError, match="crow must rise"):
        layer.load_state_dict({**state, "crow": crow})
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.type(torch.float32)(x), before)
    assert layer.to("meta").to_empty(device="cpu")(x).shape == (3, 8)  # no numbers, but no crash


def test_a_loaded_layer_has_the_type_of_its_skeleton() -> None:
    x, model = torch.randn(3, 24), masked(mlp())
    sparse = export.block_sparse(model, backend="torch")
    for state, skeleton in ((copy.deepcopy(sparse).bfloat16().state_dict(), mlp()), (sparse.state_dict(), mlp().bfloat16())):
        dtype = skeleton[0].weight.dtype
        loaded = export.load_state_dict(skeleton, state)
        assert {p.dtype for p in [*loaded.parameters(), loaded[0].values]} == {dtype}
        close(loaded(x.to(dtype)).bfloat16(), model(x).bfloat16())


IMAGES = {  # as they lie in memory, and how torch's convolution stores their outputs
    "channels first": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "part of channels last": lambda x: torch.cat((x, x), 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "strided": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
}


@OF_CONVOLUTIONS
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("image", IMAGES)
def test_a_convolution_lies_in_memory_as_torchs(backend: str, size: int, image: str) -> None:
    conv = masked(nn.Conv2d(4, 8, size), (4, 4)).requires_grad_(False)
    x = IMAGES[image](torch.randn(2, 4, 8, 7))
    out = export.block_sparse(conv, backend=backend)(x)
    assert out.stride() == conv(x).stride()
    close(out, conv(x))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 1, bias=False), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(12, 6, (2, 3), dilation=2, padding="same", padding_mode="circular"))


@pytest.mark.slow
@OF_CONVOLUTIONS
@pytest.mark.parametrize(("layout", "dynamic"), [(torch.contiguous_format, True), (torch.channels_last, False)])
def test_convolutions_compile_in_one_graph_and_export(backend: str, layout: torch.memory_format, dynamic: bool) -> None:
    torch.compiler.reset()  # of what the other parameters compiled
    model = masked(convolutions(), (2, 1))
    sparse = export.block_sparse(model, backend=backend)
    # all sizes are symbols with one backend, which takes long; with the other the batch alone
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager", dynamic=(backend == "native" or None) if dynamic else False)
    for n in (3, 2):
        x = torch.randn(n, 3, 9, 8).to(memory_format=layout)
        if dynamic and backend != "native":
            torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert compiled(x).stride() == sparse(x).stride()
            close(compiled(x), model(x))
        close(compiled(x.requires_grad_()), model(x))
    (grad,) = torch.autograd.grad(compiled(x).sum(), x)
    close(grad, torch.autograd.grad(model(x).sum(), x)[0])
    with torch.no_grad():
        program = torch.export.export(sparse, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},) if dynamic else None)
        close(program.module()(x), model(x))


@OF_CONVOLUTIONS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gradients_and_transforms_of_convolutions_are_those_of_the_masked_model(backend: str) -> None:
    model, x = masked(convolutions(), (2, 1)), torch.randn(2, 3, 9, 8)
    sparse = export.block_sparse(model, backend=backend)
    same, x = x.clone().requires_grad_(), x.requires_grad_()
    model(x).square().sum().backward()
    sparse(same).square().sum().backward()
    close(same.grad, x.grad, times=4)
    close(sparse[0].bias.grad, model[0].bias.grad, times=4)
    x = x.detach()
    tangent = torch.func.jvp(sparse, (x,), (torch.ones_like(x),))[1]
    close(tangent, torch.func.jvp(model, (x,), (torch.ones_like(x),))[1])
    for images in (x[:, None], x[:, None].repeat(1, 2, 1, 1, 1).flatten(0, 1).to(memory_format=torch.channels_last)[:, None]):
        close(torch.vmap(sparse)(images), torch.stack([sparse(image) for image in images]))
    close(torch.func.grad(lambda x: sparse(x).square().sum())(x), same.grad, times=4)


def test_the_operator_of_convolutions_keeps_torchs_rules() -> None:
    weight, keep = torch.randn(6, 4 * 6, dtype=torch.float64), torch.rand(3, 2) > 0.4
    w = pack(weight, keep, bp.BlockGrid((6, 24), (2, 12)))
    window = ((2, 3), (2, 1), (1, 2), (1, 2, 0, 1))
    x, bias = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    arguments = w.values, w.crow, w.col, w.shape, w.block, *window
    for image in (x, x.to(memory_format=torch.channels_last), x.float()):
        values = w.values.to(image.dtype)
        torch.library.opcheck(conv_ops.conv2d_op, (image, bias.to(image.dtype), values, *arguments[1:]))
    x, bias = x.requires_grad_(), bias.requires_grad_()
    torch.autograd.gradcheck(lambda x, bias: conv_ops.conv2d_op(x, bias, *arguments), (x, bias))
    torch.autograd.gradgradcheck(lambda x: conv_ops.conv2d_op(x, None, *arguments), (x,))


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(8, 8, 1)])
def test_scripting_an_exported_model_names_what_can_be_recorded(layer: nn.Module) -> None:
    sparse = export.block_sparse(masked(nn.Sequential(layer)), backend="torch")
    with pytest.raises(RuntimeError, match=r"^0: torch.jit.script .* layer of \(8, 8.*torch.jit.trace.*script export.dense\(model\)"):
        torch.jit.script(sparse)
    x = torch.randn(2, 8, 1, 1).flatten(1) if isinstance(layer, nn.Linear) else torch.randn(2, 8, 1, 1)
    close(torch.jit.script(export.dense(sparse))(x), sparse(x))


def test_an_image_smaller_than_the_kernel_is_refused() -> None:
    conv = export.block_sparse(masked(nn.Conv2d(4, 4, 3, padding=(0, 1))), backend="torch")
    with pytest.raises(ValueError, match=r"input of shape \(1, 4, 2, 9\) is smaller than the kernel .* would have 0 rows and 9 columns"):
        conv(torch.randn(1, 4, 2, 9))


@BOTH_BACKENDS
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracers_and_transforms_see_the_product(backend: str) -> None:
    layer, x = exported(masked(nn.Linear(8, 8)), backend), torch.randn(3, 8)
    with torch.no_grad():
        close(torch.jit.trace(layer, x, check_trace=False)(2 * x), layer(2 * x))
        close(torch.fx.experimental.proxy_tensor.make_fx(layer)(x)(2 * x), layer(2 * x))
        close(layer(torch._neg_view(x)), layer(-x))
        close(layer(torch._efficientzerotensor(3, 8)), layer(torch.zeros(3, 8)))
        with torch.device("meta"):
            close(layer(x), layer(x.clone()))
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, 2 * x))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    close(tangent.detach(), 2 * x @ layer.weight.mT)
    close(torch.func.jvp(layer, (x,), (2 * x,))[1], 2 * x @ layer.weight.mT)
    flat = torch.func.hessian(lambda x: layer(x).square().sum())(x[0])
    close(flat, 2 * layer.weight.mT @ layer.weight, times=4)
    weight = layer.values, layer.crow, layer.col, layer.shape, layer.block, layer.paired, layer.backend, layer.scale
    biases = torch.randn(5, 8)
    close(torch.vmap(lambda bias: ops.linear(x, bias, *weight))(biases), layer(x)[None] - layer.bias + biases[:, None])


def test_a_module_under_two_names_loads() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    x, sparse = torch.randn(2, 8), export.block_sparse(masked(Twice()), backend="torch")
    loaded = export.load_state_dict(Twice(), sparse.state_dict())
    assert loaded.a is loaded.b
    close(loaded(x), sparse(x))


class Tied(nn.Module):
    """A tied tensor, and a layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight, self.again = self.embedding.weight, self.body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.body(self.embedding(x))))


@pytest.mark.parametrize("is_meta", [False, True])
@pytest.mark.parametrize("options", [{}, {"trainable": True}, {"dtype": "int8"}, None], ids=["frozen", "trainable", "int8", "masked"])
@given(st.data())
def test_a_tied_tensor_may_have_any_one_of_its_names(options: dict[str, Any] | None, is_meta: bool, data: st.DataObject) -> None:
    model, ids = masked(Tied()), torch.arange(8)
    saved = model if options is None else export.block_sparse(model, backend="torch", **options)
    state, names = saved.state_dict(), dict[int, list[str]]()
    for name, tensor in [*saved.named_parameters(remove_duplicate=False), *saved.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), []).append(name)
    for tied in names.values():
        kept = data.draw(st.sampled_from(tied))
        state = {name: x for name, x in state.items() if name == kept or name not in tied}
    with torch.device("meta" if is_meta else "cpu"):
        skeleton = Tied()
    loaded = export.load_state_dict(skeleton, state).eval()
    close(loaded(ids), saved(ids))
    assert loaded.body is loaded.again
    assert loaded.head.get_parameter("weight") is loaded.embedding.get_parameter("weight")
    assert bp.read_masks(loaded) == bp.read_masks(model)
    if options is None:
        assert torch.equal(bp.load_masked(Tied(), state).eval()(ids), saved(ids))
    with pytest.raises(RuntimeError, match="Missing key"):
        export.load_state_dict(skeleton, {name: x for name, x in state.items() if name not in ("embedding.weight", "head.weight")})


def test_a_tied_buffer_that_is_not_saved_is_not_loaded() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8))
        model.register_buffer("saved", torch.ones(2))
        model.register_buffer("not_saved", model.saved, persistent=False)
        return model

    model = masked(make())
    for saved in (model, export.block_sparse(model, backend="torch")):
        assert bp.read_masks(export.load_state_dict(make(), saved.state_dict())) == bp.read_masks(model)
    assert bp.read_masks(bp.load_masked(make(), model.state_dict())) == bp.read_masks(model)


def test_a_model_on_the_meta_device_keeps_its_ties_and_must_be_loaded_completely() -> None:
    class Tied(nn.Module):
        def __init__(self, extra: bool) -> None:
            super().__init__()
            self.e, self.l, self.h = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
            self.h.weight = self.e.weight
            self.register_buffer("ids", torch.arange(3) if extra else None, persistent=False)

    sparse = export.block_sparse(bp.apply_masks(m := Tied(False), random_masks(m, bp.named("l.weight", (4, 4)))), backend="torch")
    with torch.device("meta"):
        whole, lacking = Tied(False), Tied(True)
    loaded = export.load_state_dict(whole, sparse.state_dict())
    assert loaded.h.weight is loaded.e.weight
    with pytest.raises(ValueError, match="ids: still on the meta device"):
        export.load_state_dict(lacking, sparse.state_dict())


def test_autocast_leaves_float64_alone() -> None:
    sparse, x = export.block_sparse(masked(mlp().double()), backend="torch"), torch.randn(3, 24).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sparse(x).dtype == torch.float64


def test_a_layer_with_a_computed_bias_stays_dense() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer = nn.Linear(8, 8)
    nn.utils.parametrize.register_parametrization(layer, "bias", Double())
    model = bp.apply_masks(nn.Sequential(layer), random_masks(nn.Sequential(nn.Linear(8, 8)), bp.linears((4, 4))))
    with pytest.warns(UserWarning, match="0 of 1 masked layers became block-sparse"):
        (choice,) = export.choose(model, progress=False).rows
    assert "another parametrization computes the bias" in choice.reason


class FalconLinear(nn.Linear):
    """As in Falcon's first implementation: it computes what a Linear does, in other words."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


def test_layers_that_stay_dense_are_named_with_the_reason() -> None:
    reason = (
        r"0\.weight: FalconLinear, a subclass of Linear that may do more than a product, has no block-sparse form; replace it by a plain"
    )
    model, x = masked(nn.Sequential(FalconLinear(8, 8), nn.Linear(8, 8))), torch.randn(2, 8)
    with pytest.warns(UserWarning, match=rf"^1 of 2 masked layers have no block-sparse form \({reason}"):
        sparse = export.block_sparse(model, backend="torch")
    close(sparse(x), model(x))
    alone = masked(nn.Sequential(FalconLinear(8, 8)))
    nothing = rf"^0 of 1 masked layers became block-sparse \({reason}.*\); print\(choose\(model\)\) lists the reason for each layer$"
    for convert in (
        lambda: export.block_sparse(alone, backend="torch"),
        lambda: export.block_sparse(alone, progress=False),
        lambda: export.choose(alone, progress=False),
    ):
        with pytest.warns(UserWarning, match=nothing) as caught:
            convert()
        assert len(caught) == 1
    dense = export.Choice("0.weight", 0.5, "dense", "faster")
    with pytest.warns(UserWarning, match=r"^0 of 1 masked layers became block-sparse \(0.weight: faster\)"):
        export.block_sparse(masked(nn.Sequential(nn.Linear(8, 8))), backend=export.Choices((dense,)))
    export.block_sparse(alone, backend="dense")  # as requested


@BOTH_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inputs_of_another_type_are_refused_as_by_the_plain_layer(backend: str, dtype: torch.dtype) -> None:
    model = masked(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))).to(dtype)
    sparse = exported(model, backend)
    for layers in (sparse, copy.deepcopy(sparse), export.load_state_dict(model, sparse.state_dict())):
        assert layers(torch.randn(3, 8, dtype=dtype)).dtype == dtype
        for other in {torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64} - {dtype}:
            x = torch.ones(3, 8, dtype=other)
            with pytest.raises(RuntimeError):
                export.dense(layers)(x)
            with pytest.raises(TypeError, match=rf"an input of {other} does not fit a weight of {dtype}; convert it, input.to\({dtype}\)"):
                layers(x)
    other = torch.float16 if dtype != torch.float64 else torch.float32
    assert sparse.to(other)(torch.randn(3, 8, dtype=other)).dtype == other
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sparse(torch.randn(3, 8)).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"an input of torch.int64 does not fit"):
            sparse(torch.ones(3, 8, dtype=torch.int64))


class Normed(nn.Module):
    """A hidden axis that has biases and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8)
        self.embedding = nn.Embedding(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(self.embedding(x))).relu())


def with_masks(model: nn.Module, *names: str) -> nn.Module:
    """Every second group of four masked along the first axis, or along the second of ``b.weight``."""
    grids = {name: bp.BlockGrid(tuple(model.get_parameter(name).shape), (-1, 4) if name == "b.weight" else (4,)) for name in names}
    masks = {name: bp.BlockMask(torch.arange(math.prod(grid.size)).view(grid.size) % 2 == 0, grid) for name, grid in grids.items()}
    return bp.apply_masks(model, masks)


@pytest.mark.parametrize("trainable", [False, True])
def test_masked_biases_and_norms_are_no_layers_without_a_block_sparse_form(trainable: bool, recwarn: pytest.WarningsRecorder) -> None:
    along = ("a.bias", "norm.weight", "norm.bias")
    model, tokens = with_masks(Normed(), "a.weight", "b.weight", *along), torch.arange(8)
    assert [row.name for row in fixed_backend(model, "torch").rows] == ["a.weight", "b.weight"]
    sparse = export.block_sparse(model, backend="torch", trainable=trainable)
    assert not recwarn
    close(sparse(tokens), model(tokens))
    zeros = {name: ~bp.expand(mask.keep, mask.grid) for name, mask in bp.read_masks(model).items()}
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse(tokens).square().mean().backward()
    optimizer.step()
    assert set(bp.read_masks(sparse)) == {"a.weight", "b.weight", *(along if trainable else ())}
    for name in along if trainable else ():
        layer, attr = name.split(".")
        assert not getattr(sparse.get_submodule(layer), attr)[zeros[name]].any()
    loaded = export.load_state_dict(Normed(), sparse.state_dict())
    close(loaded(tokens), sparse(tokens))
    close(copy.deepcopy(sparse)(tokens), sparse(tokens))
    close(export.dense(sparse)(tokens), sparse(tokens))


def test_warnings_count_layers_and_not_their_biases() -> None:
    model = with_masks(Normed(), "embedding.weight", "a.weight", "a.bias", "norm.weight")
    with pytest.warns(
        UserWarning, match=r"^1 of 2 masked layers have no block-sparse form \(embedding.weight: Embedding has no[^;]*; [^;]*\)"
    ):
        export.block_sparse(model, backend="torch")
    only_biases = with_masks(Normed(), "a.bias", "norm.weight")
    with pytest.warns(UserWarning, match="0 of 0 masked layers became block-sparse .all masks are on biases and norms, which keep"):
        dense = export.block_sparse(only_biases, backend="torch")
    close(dense(torch.arange(8)), only_biases(torch.arange(8)))


def test_what_is_no_state_dict_is_refused() -> None:
    state = export.block_sparse(masked(mlp()), backend="torch").state_dict()
    for wrong in (None, [*state.items()], mlp()):
        with pytest.raises(TypeError, match=rf"state has the type {type(wrong).__name__}; give a state dict, such as safetensors"):
            export.load_state_dict(mlp(), wrong)  # type: ignore[arg-type]
    for key, value in {"0.values": 5, "0.layout": [1, 2], "2.col": None}.items():
        with pytest.raises(TypeError, match=rf"state\['{key}'\] is a {type(value).__name__}, not a tensor; give the state dict of"):
            export.load_state_dict(mlp(), {**state, key: value})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"keep'\] is a bool, not a tensor"):
        export.load_state_dict(mlp(), {"0.parametrizations.weight.0.keep": True})  # type: ignore[dict-item]
    assert isinstance(export.load_state_dict(mlp(), {**state, "epoch": 3}, strict=False)[0], export.BlockSparseLinear)  # type: ignore[dict-item]
