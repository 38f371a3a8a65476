"""The private names of other libraries in `_compat`: each is there, means what it meant, and is used in no other module."""

import ast
import contextlib
import copy
import importlib.metadata
import inspect
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import blockprune as bp
from blockprune.core import _compat, _compat_dynamo, _compat_fsdp, _compat_hf, _compat_pruning
from blockprune.native.library import address

ROOT = Path(bp.__file__).parent
COMPAT = Path(_compat.__file__)
ALL_COMPAT = (_compat, _compat_dynamo, _compat_fsdp, _compat_hf, _compat_pruning)


@contextlib.contextmanager
def private(name: str, use: str) -> Iterator[None]:
    """A block that uses a private name: if it fails, the message says which version lost the name and what blockprune loses with it."""
    package = name.partition(".")[0].replace("_", "-")
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        version = importlib.metadata.version(package)
        pytest.fail(
            f"{package} {version} no longer has {name}, or it does something else ({reason}); blockprune uses it {use}; "
            "look at blockprune/core/_compat.py",
            pytrace=False,
        )


def test_lazy_clone_shares_memory_until_a_side_is_written() -> None:
    with private("torch._lazy_clone", "to score a model without copying its weights"):
        x = torch.arange(4.0)
        clone = _compat.lazy_clone(x)
        with private("torch._C._data_address", "to read the memory of a lazy clone"):
            assert _compat.data_address(clone) == _compat.data_address(x)
            assert address(_compat.lazy_clone(x[1:])) == _compat.data_address(x) + x.element_size()
        clone[0] = 9
        assert x.tolist() == [0, 1, 2, 3]
        assert clone.data_ptr() != x.data_ptr()


def test_copy_on_write_tensors_are_recognised() -> None:
    with private("torch._C._is_cow_tensor", "to find the memory of a weight without copying it"):
        x = torch.ones(4)
        assert not _compat.is_copy_on_write(x)
        clone = _compat.lazy_clone(x)
        assert _compat.is_copy_on_write(clone)
        clone.add_(1)
        assert not _compat.is_copy_on_write(clone)


def test_outputs_of_linears_that_are_views_are_recognised() -> None:
    with private("torch.Tensor._is_view", "to have the gradients of outputs that are overwritten"):
        layer = nn.Linear(2, 3)
        assert _compat.is_view(layer(torch.ones(4, 5, 2)))
        assert not _compat.is_view(layer(torch.ones(4, 2)))


def test_views_have_the_storage_id_of_their_base() -> None:
    with private("torch.UntypedStorage._cdata", "to copy scores that are views of a weight"):
        x = torch.ones(2, 4)
        assert _compat.storage_id(x) == _compat.storage_id(x[1:].mT)
        assert _compat.storage_id(x) != _compat.storage_id(x.clone())


def test_the_version_counter_counts_writes() -> None:
    with private("torch.Tensor._version", "to tell whether a tensor was overwritten"):
        x = torch.ones(4)
        before = _compat.version_counter(x)
        x.sum()
        assert _compat.version_counter(x) == before
        x[:2].mul_(2)
        assert _compat.version_counter(x) > before


def test_a_subclass_is_treated_as_a_parameter_is() -> None:
    class Value(Tensor):
        __torch_function__ = _compat.disabled_torch_function

    with private("torch._C._disabled_torch_function_impl", "to pass changes in place of a masked weight on to the stored weight"):
        value = torch.ones(2).as_subclass(Value)
        assert (type(value), type(value * 2), type(value[0])) == (Value, Tensor, Tensor)


def test_swapping_asks_both_tensors_first() -> None:
    class Value(Tensor):
        pass

    asked: list[Tensor] = []
    with private("torch.Tensor._use_count", "to refuse that torch.utils.swap_tensors takes a masked weight"):
        setattr(Value, _compat.SWAP_CHECK, lambda self: asked.append(self) or 1)
        torch.utils.swap_tensors(torch.ones(2).as_subclass(Value), torch.ones(2).as_subclass(Value))
        assert len(asked) == 2


def test_setting_is_param_makes_a_parameter() -> None:
    with private("torch.nn.Parameter._is_param", "to make a plain Parameter of a masked weight"):
        layer = bp.apply_masks(nn.Linear(2, 2), {"weight": bp.BlockMask(torch.tensor([[True]]), bp.BlockGrid((2, 2), (2, 2)))})
        assert type(nn.Parameter(layer.weight)) is nn.Parameter


def test_a_parameter_takes_data_of_another_length_while_a_graph_lives() -> None:
    with private("torch.Tensor.data", "to change the masks of a model that trains block-sparse"):
        for dtype in (torch.float32, torch.float64):
            parameter = nn.Parameter(torch.ones(3, dtype=dtype))
            loss = parameter.sum()
            _compat.replace_data(parameter, torch.ones(2, dtype=dtype))
            parameter.sum().backward()
            assert (loss.item(), parameter.dtype, parameter.grad.shape) == (3, dtype, (2,))


def test_a_tensor_without_base_is_no_view() -> None:
    with private("torch.ops.aten._unsafe_view", "to notice changes of a masked weight through its views"):
        x = torch.ones(4, requires_grad=True)
        y = _compat.without_base((x * 2).view(2, 2))
        assert (y._is_view(), y.shape) == (False, (2, 2))
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [2] * 4


def test_zero_tensors_are_recognised() -> None:
    with private("torch._is_zerotensor", "to keep tensors without memory out of compiled code"):
        assert _compat.is_zero_tensor(torch._efficientzerotensor(2))
        assert not _compat.is_zero_tensor(torch.zeros(2))


def test_functorch_tensors_are_recognised() -> None:
    with private("torch._C._functorch.is_functorch_wrapped_tensor", "to keep the tensors of torch.func out of compiled code"):
        assert recorded_in_vmap(_compat.is_functorch_tensor) == [True]
        assert not _compat.is_functorch_tensor(torch.ones(2))


def test_active_functorch_is_noticed() -> None:
    with private("torch._C._are_functorch_transforms_active", "to let torch.func differentiate the block-sparse product"):
        assert recorded_in_vmap(lambda x: _compat.functorch_is_active()) == [True]
        assert not _compat.functorch_is_active()


def recorded_in_vmap(question: Callable[[Tensor], bool]) -> list[bool]:
    answers: list[bool] = []

    def function(x: Tensor) -> Tensor:
        answers.append(question(x))
        return x

    torch.func.vmap(function)(torch.ones(2, 3))
    return answers


class Asked(nn.Module):
    """Notes for each attribute that is set, but those of a module itself, whether functional_call sets it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale":
            self.answers.append(_compat.functional_call_assigns())
        super().__setattr__(name, value)

    def forward(self) -> Tensor:
        return self.scale  # type: ignore[return-value]


def test_attributes_that_functional_call_sets_are_recognised() -> None:
    with private("torch.nn.utils._named_member_accessor", "to keep functional_call from overwriting a masked weight"):
        model = Asked()
        model.answers = []
        model.scale = torch.ones(1)
        assert torch.func.functional_call(model, {"scale": torch.zeros(1)}, ()) == 0
        assert model.answers == [False, True, True]


def test_legacy_batched_gradients_are_recognised() -> None:
    with private("torch._C._functorch.is_legacy_batchedtensor", "to mask a weight under autograd.grad(is_grads_batched=True)"):
        answers: list[bool] = []

        def note(gradient: Tensor) -> None:
            answers.append(_compat.is_legacy_batched(gradient))

        x = torch.ones(3, requires_grad=True)
        y = 2 * x
        y.register_hook(note)
        torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
        assert answers == [True]
        assert not _compat.is_legacy_batched(x)


def test_active_forward_differentiation_is_noticed() -> None:
    with private("torch.autograd.forward_ad._current_level", "to give forward-mode tangents to torch instead of compiled code"):
        assert not _compat.forward_ad_is_active()
        with forward_ad.dual_level():
            assert _compat.forward_ad_is_active()
        assert not _compat.forward_ad_is_active()


def test_active_tracing_is_noticed() -> None:
    with private("torch._C._is_tracing", "to record torch's operations instead of compiled code in torch.jit.trace"):
        answers: list[bool] = []

        def function(x: Tensor) -> Tensor:
            answers.append(_compat.is_tracing())
            return x + 1

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated
            torch.jit.trace(function, torch.ones(2), check_trace=False)
        assert answers == [True]
        assert not _compat.is_tracing()


def test_active_autocast_is_noticed() -> None:
    with private("torch._C._is_any_autocast_enabled", "to multiply in the type of autocast"):
        assert not _compat.autocast_is_active()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert _compat.autocast_is_active()
        with torch.autocast("cpu", enabled=False):
            assert not _compat.autocast_is_active()


def test_active_dispatch_modes_are_noticed() -> None:
    with private("torch._C._len_torch_dispatch_stack", "to let modes such as FlopCounterMode see all operations"):
        assert not _compat.dispatch_mode_is_active()
        with FlopCounterMode(display=False):
            assert _compat.dispatch_mode_is_active()


def test_a_dispatch_mode_sees_every_operation_and_which_of_them_write() -> None:
    class Writes(_compat.DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append((func.overloadpacket.__name__, _compat.writes_arguments(func)))
            return func(*args, **(kwargs or {}))

    operations: list[tuple[str, bool]] = []
    with private("torch.utils._python_dispatch.TorchDispatchMode", "to tell constant units from those that depend on an input"):
        x = torch.ones(2)
        with Writes():
            x.add_(1).relu()
        assert operations == [("add_", True), ("relu", False)]


def test_a_dispatch_mode_knows_casts() -> None:
    class Casts(_compat.DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            casts.append((kwargs or {}).get("dtype") if _compat.is_cast(func) else None)
            return func(*args, **(kwargs or {}))

    casts: list[torch.dtype | None] = []
    with private("torch.ops.aten._to_copy", "so that find_axes computes in float64"):
        x = torch.ones(2)
        with Casts(), torch.no_grad():
            x.double().float().to(torch.bfloat16).relu()
        assert casts == [torch.float64, torch.float32, torch.bfloat16, None]


@pytest.mark.parametrize(
    "layer", [nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1)], ids=lambda layer: type(layer).__name__
)
def test_the_methods_that_compute_an_output_are_those_of_torch(layer: nn.Module) -> None:
    with private("torch.nn.Conv2d._conv_forward", "to recognise layers whose forward is not torch's own"):
        methods = {name for cls in type(layer).__mro__ for name in vars(cls) if "forward" in name or name == "__call__"}
        assert _compat.FORWARD_METHODS == ("forward", "_conv_forward", "__call__")
        assert methods - set(_compat.FORWARD_METHODS) <= {name for name in dir(nn.Module) if "forward" in name}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_can_be_disabled(use_reentrant: bool) -> None:
    x, calls = torch.ones(2, requires_grad=True), [0]

    def function(x: Tensor) -> Tensor:
        calls[0] += 1
        return x.exp()

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(checkpoint(function, x, use_reentrant=use_reentrant).sum(), x)[0]

    with private("torch.utils.checkpoint._checkpoint_without_reentrant_generator", "to differentiate checkpointed models by gates"):
        with _compat.disable_checkpointing():
            torch.testing.assert_close(gradient(x), x.exp())
        assert calls == [1]
        with _compat.disable_checkpointing(reentrant_only=True):
            torch.testing.assert_close(gradient(x), x.exp())
        assert calls == [2 if use_reentrant else 3]
    if use_reentrant:
        with pytest.raises(RuntimeError):
            gradient(x)


def test_the_base_classes_of_layers_tell_their_kind() -> None:
    convolutions = [nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1)]
    transposed = [nn.ConvTranspose1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1)]
    batch_norms = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)]
    with private("torch.nn.modules.conv._ConvNd", "to find convolutions"):
        assert all(isinstance(layer, _compat.ConvNd) for layer in convolutions + transposed)
        assert not isinstance(nn.Linear(2, 2), _compat.ConvNd)
    with private("torch.nn.modules.conv._ConvTransposeNd", "to find the input axis of a convolution"):
        assert all(isinstance(layer, _compat.ConvTransposeNd) for layer in transposed)
        assert not any(isinstance(layer, _compat.ConvTransposeNd) for layer in convolutions)
    with private("torch.nn.modules.batchnorm._BatchNorm", "to find the batch norm of a convolution"):
        assert all(isinstance(layer, _compat.BatchNorm) for layer in batch_norms)
        assert not any(isinstance(layer, _compat.BatchNorm) for layer in (nn.InstanceNorm2d(2), nn.LayerNorm(2)))
    with private("torch.nn.modules.batchnorm._NormBase", "to find the channel axis of a norm"):
        assert all(isinstance(layer, _compat.NormBase) for layer in (*batch_norms, nn.InstanceNorm1d(2)))
        assert not isinstance(nn.LayerNorm(2), _compat.NormBase)


def test_nested_containers_are_mapped() -> None:
    with private("torch.utils._pytree", "to change the tensors of a batch, whatever contains them"):
        batch = {"x": torch.ones(2), "rest": (torch.zeros(2), [3, None])}
        assert _compat.tree_map(lambda leaf: isinstance(leaf, Tensor), batch) == {"x": True, "rest": (True, [False, False])}
        assert _compat.tree_map_only(Tensor, lambda leaf: leaf.sum().item(), batch) == {"x": 2.0, "rest": (0.0, [3, None])}
        assert [leaf for leaf in _compat.tree_leaves(batch) if not isinstance(leaf, Tensor)] == [3, None]


@pytest.mark.parametrize("padding", ["same", "valid", (1, 2)])
def test_the_padding_of_a_convolution_is_that_of_pad(padding: Any) -> None:
    with private("torch.nn.modules.conv._ConvNd._reversed_padding_repeated_twice", "to pad the input of a convolution as it does"):
        conv, x = nn.Conv2d(2, 3, (2, 3), padding=padding, dilation=(2, 1)), torch.randn(1, 2, 7, 8)
        padded = F.pad(x, _compat.conv_padding(conv))
        torch.testing.assert_close(F.conv2d(padded, conv.weight, conv.bias, dilation=conv.dilation), conv(x))


def test_an_rnn_rebuilds_its_lists_of_weights() -> None:
    with private("torch.nn.RNNBase._flat_weights", "to copy RNNs whose weights are masked"):
        rnn, x = nn.LSTM(3, 4), torch.randn(5, 3)
        replica = copy.copy(rnn)
        replica.__dict__ = {key: value for key, value in vars(rnn).items() if key not in _compat.RNN_CACHES}
        assert len(vars(replica)) == len(vars(rnn)) - len(_compat.RNN_CACHES)
        with private("torch.nn.RNNBase._init_flat_weights", "to let the copy of a masked RNN compute with its own weights"):
            _compat.rebuild_rnn_caches(replica)
            assert set(_compat.RNN_CACHES) <= set(vars(replica))
            torch.testing.assert_close(replica(x)[0], rnn(x)[0])


def test_tensors_of_a_module_are_converted_one_by_one() -> None:
    with private("torch.nn.Module._apply", "to train a half-precision copy of a model in float32, without its complex and float64 tensors"):
        model = nn.Sequential(nn.BatchNorm1d(2).bfloat16(), nn.Linear(2, 2).double())
        weight = model[1].weight
        _compat.convert_tensors(model, lambda x: x.float() if x.dtype == torch.bfloat16 else x)
        assert {x.dtype for x in model[0].state_dict().values()} == {torch.float32, torch.int64}
        assert model[1].weight is weight
        assert weight.dtype == torch.float64


def test_a_loader_with_persistent_workers_of_its_own_takes_others() -> None:
    with private("torch.utils.data.DataLoader._iterator", "to resume `distill` with a DataLoader whose workers are persistent"):
        loader: Any = torch.utils.data.DataLoader(torch.arange(4), num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
        own = iter(loader)
        assert next(own) == 0
        workers = _compat.start_workers(loader)
        assert workers is not None
        for _ in range(2):
            assert _compat.pass_by_workers(loader, workers) is workers
            assert [int(x) for x in workers] == [0, 1, 2, 3]
        assert [int(x) for x in own] == [1, 2, 3]
        assert iter(loader) is own
        assert _compat.start_workers([1, 2]) is None
        assert _compat.start_workers(torch.utils.data.DataLoader([1, 2])) is None  # type: ignore[arg-type]


def test_hooks_of_state_dicts_are_listed() -> None:
    def hook(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        pass

    with private("torch.nn.Module._state_dict_hooks", "to add plain weights to a Hugging Face checkpoint once"):
        layer = nn.Linear(2, 2)
        assert _compat.state_dict_hooks(layer) == []
        layer.register_state_dict_post_hook(hook)
        assert _compat.state_dict_hooks(layer) == [hook]


def test_all_buffers_are_listed() -> None:
    with private("torch.nn.Module._buffers and _non_persistent_buffers_set", "to restore the buffers that a forward changes"):
        model = nn.BatchNorm1d(2)
        model.register_buffer("absent", None)
        model.register_buffer("table", torch.ones(1), persistent=False)
        listed = _compat.all_buffers(model)
        assert {name: persistent for name, (_, persistent) in listed.items()} == {
            "running_mean": True, "running_var": True, "num_batches_tracked": True, "absent": True, "table": False,
        }  # fmt: skip
        assert listed["absent"][0] is None
        assert listed["table"][0] is model.table


def test_all_names_of_parameters_are_listed() -> None:
    with private("torch.nn.Module._parameters", "to put the parameters of an unmasked module back in their order"):
        assert _compat.parameter_names(nn.Linear(2, 2, bias=False)) == ["weight", "bias"]
        assert _compat.parameter_names(nn.Sequential(nn.Linear(2, 2))) == []


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    ],
    ids=["forward", "forward_pre", "backward", "backward_pre"],
)
def test_hooks_are_noticed(register: Callable[[nn.Module], Any]) -> None:
    with private("torch.nn.Module._forward_hooks", "to leave layers with hooks as they are when a model is exported"):
        layer = nn.Linear(2, 2)
        assert not _compat.has_hooks(layer)
        handle = register(layer)
        assert _compat.has_hooks(layer)
        handle.remove()
        assert not _compat.has_hooks(layer)


def test_compiled_wrappers_are_recognised() -> None:
    with private("torch._dynamo.OptimizedModule._orig_mod", "to ask for the module itself instead of what torch.compile returned"):
        layer = nn.Linear(2, 2)
        assert not _compat.is_compiled_wrapper(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the import of the compiler uses deprecated functions
            assert _compat.is_compiled_wrapper(torch.compile(layer))
            compiled = torch.compile(nn.Sequential(torch.compile(layer)))
            assert [_compat.without_compiled_prefixes(name) for name in compiled.state_dict()] == ["0.weight", "0.bias"]


def test_all_tensors_of_a_parametrized_weight_are_listed() -> None:
    with private("torch.nn.utils.parametrize.ParametrizationList.ntensors", "to find the stored tensors behind a weight"):
        one, two = parametrizations.spectral_norm(nn.Linear(2, 3)), parametrizations.weight_norm(nn.Linear(2, 3))
        assert _compat.has_one_original(one.parametrizations.weight)
        assert [tuple(x.shape) for x in _compat.originals(one.parametrizations.weight)] == [(3, 2)]
        assert not _compat.has_one_original(two.parametrizations.weight)
        assert [tuple(x.shape) for x in _compat.originals(two.parametrizations.weight)] == [(3, 1), (3, 2)]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch 2.11, when it imports its compiler
def test_parametrizations_of_a_module_itself_are_found() -> None:
    with private("torch.nn.Module._modules", "to find the masks of a model"):
        layer = parametrizations.weight_norm(nn.Linear(2, 2))
        own = _compat.own_parametrizations(layer)
        assert own is layer.parametrizations
        assert list(own) == ["weight"]
        assert _compat.own_parametrizations(nn.Linear(2, 2)) is None
        assert _compat.own_parametrizations(torch.compile(layer)) is None


def test_fully_shard_finds_parameters_that_have_moved() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        with private("torch.nn.Module._is_fsdp_managed_module", "to refuse masks on a part of a model that is sharded as a whole"):
            assert not _compat_fsdp.is_fsdp_managed(model[0])
            fully_shard(model)
            assert _compat_fsdp.is_fsdp_managed(model[0])
        x = torch.ones(1, 2)
        expected = model(x).detach()
        model.reshard()
        parametrize.register_parametrization(model[0], "weight", nn.Identity(), unsafe=True)
        with private("torch.distributed.fsdp.FSDPModule._get_fsdp_state", "to add masks to a model that fully_shard has sharded"):
            _compat_fsdp.follow_fsdp_parameters(model, [model])
            assert torch.equal(model(x), expected)
            assert type(model[0].parametrizations.weight.original) is nn.Parameter  # whole after a forward, until the state dict is read
            state = model.state_dict()
            assert all(isinstance(tensor, torch.distributed.tensor.DTensor) for tensor in state.values())
            assert list(state) == ["0.bias", "0.parametrizations.weight.original", "1.weight", "1.bias"]
    finally:
        torch.distributed.destroy_process_group()


def test_a_forward_of_fully_shard_that_an_error_has_ended_is_over() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model: Any = fully_shard(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        expected = model(torch.ones(1, 2)).detach()
        with private("torch.distributed.fsdp.FSDPModule._get_fsdp_state", "to run the layers of a model that fully_shard has sharded"):
            with pytest.raises(RuntimeError):
                model(torch.ones(1, 3))
            model.reshard()
            assert not isinstance(model[0].weight, torch.distributed.tensor.DTensor)  # torch leaves it whole
            _compat_fsdp.end_fsdp_forwards([model])
            model.reshard()
            assert isinstance(model[0].weight, torch.distributed.tensor.DTensor)
            assert torch.equal(model(torch.ones(1, 2)), expected)
    finally:
        torch.distributed.destroy_process_group()


class AnyLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values, self.others = nn.Parameter(torch.ones(9)), nn.Parameter(torch.ones(9))

    def forward(self, x: Tensor) -> Tensor:
        return x * _compat_dynamo.read_at_any_length(self, "values").sum() * _compat_dynamo.read_at_any_length(self, "others").sum()


def test_compiled_models_take_lengths_of_parameters_as_variables() -> None:
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    with private("torch._dynamo.comptime, torch._dynamo.config.force_parameter_static_shapes", "to update compiled block-sparse models"):
        for marked in (True, False):
            torch.compiler.reset()
            model, before = AnyLength(), torch._dynamo.config.force_parameter_static_shapes
            compiled = torch.compile(model, fullgraph=True, backend=count)
            graphs.clear()
            for length in range(9, 29):
                assert compiled(torch.ones(2))[0] == len(model.values) * len(model.others)
                model.values = nn.Parameter(torch.ones(length))  # torch 2.11 may not notice that the data has another length
                if marked:  # both are variables when one of them changes
                    with private("torch._dynamo.maybe_mark_dynamic", "to compile block-sparse models once more, not once for each layer"):
                        _compat_dynamo.vary_lengths(model.parameters())
                if length > 20:
                    model.others = nn.Parameter(torch.ones(length))
            assert len(graphs) == (2 if marked else 3)
            assert torch._dynamo.config.force_parameter_static_shapes is before


def test_the_setting_of_lengths_comes_back_after_an_error() -> None:
    before = torch._dynamo.config.force_parameter_static_shapes
    torch.compiler.reset()
    broken = AnyLength()
    del broken.values
    with pytest.raises(Exception, match="values"):
        torch.compile(broken, fullgraph=True, backend="eager")(torch.ones(2))
    torch.compile(AnyLength(), fullgraph=True, backend="eager")(torch.ones(2))
    assert torch._dynamo.config.force_parameter_static_shapes is before


def test_layers_that_read_their_childrens_weights_are_recognised() -> None:
    with private("torch.nn.modules.transformer", "to leave layers dense whose weights torch's attention reads itself"):
        readers = (nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.MultiheadAttention)
        assert {reader.__module__ for reader in readers} == set(_compat.FAST_PATH_MODULES)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_a_packed_linear_multiplies() -> None:
    with private("torch.ops.mkldnn._linear_pointwise", "for the fastest dense product on a CPU, with which it compares"):
        assert _compat.has_packed_linear()
        x, weight, bias = torch.randn(8, 16), torch.randn(4, 16), torch.randn(4)
        with private("torch.ops.mkldnn._reorder_linear_weight", "to pack the weights of that product"):
            packed = _compat.pack_linear_weight(weight, 8)
        torch.testing.assert_close(_compat.packed_linear(x, packed, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(_compat.packed_linear(x, packed, None), F.linear(x, weight))
    with private("torch.ops.mkldnn._is_mkldnn_bf16_supported", "to know whether that product takes bfloat16"):
        if _compat.packs_bfloat16():
            half = weight.bfloat16()
            product = _compat.packed_linear(x.bfloat16(), _compat.pack_linear_weight(half, 8), None)
            torch.testing.assert_close(product.float(), F.linear(x, weight), atol=0.1, rtol=0.1)


def test_the_operators_for_two_of_four_weights_take_what_they_are_given() -> None:
    with private("torch._cslt_compress", "to store 2:4 weights"):
        assert [argument.name for argument in torch.ops.aten._cslt_compress.default._schema.arguments] == ["input"]
    with private("torch._cslt_sparse_mm", "to multiply with 2:4 weights"):
        names = [argument.name for argument in torch.ops.aten._cslt_sparse_mm.default._schema.arguments]
        assert names[:3] == ["compressed_A", "dense_B", "bias"]
        assert {"transpose_result", "alg_id"} < set(names)


@pytest.mark.skipif(not (torch.cuda.is_available() and torch.backends.cusparselt.is_available()), reason="no GPU with cuSPARSELt")
def test_a_two_of_four_weight_multiplies() -> None:
    with private("torch._cslt_sparse_mm", "to multiply with 2:4 weights"):
        keep = torch.tensor([True, False, False, True], device="cuda").repeat(32, 16)
        weight, x = torch.randn(32, 64, device="cuda").bfloat16() * keep, torch.randn(16, 64, device="cuda").bfloat16()
        with private("torch._cslt_compress", "to store 2:4 weights"):
            compressed = _compat.compress_two_of_four(weight)
        with private("torch._C._cusparselt.mm_search", "to choose the algorithm of that product"):
            algorithm = _compat.search_two_of_four(compressed, x.mT)
        product = _compat.two_of_four_product(compressed, x.mT, None, algorithm)
        torch.testing.assert_close(product, F.linear(x, weight), atol=0.1, rtol=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="only torch for Linux runs on this OpenMP")
def test_torch_exports_its_openmp() -> None:
    with private("torch.lib.libtorch_cpu.GOMP_parallel", "to share threads with torch"):
        assert _compat.gomp_parallel()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_tells_its_shared_memory() -> None:
    with private("torch.cuda.get_device_properties: shared_memory_per_block_optin", "to choose how far its kernels load ahead"):
        device = torch.device("cuda")
        assert _compat.shared_memory_bytes(device) == torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def test_conv1d_tells_its_outputs() -> None:
    transformers = pytest.importorskip("transformers")
    with private("transformers.pytorch_utils.Conv1D.nf", "to find GPT-2's transposed weights"):
        layer = transformers.pytorch_utils.Conv1D(6, 4)
        assert _compat_hf.conv1d_outputs(layer) == 6
        assert layer.weight.shape == (4, 6)
        parametrize.register_parametrization(layer, "weight", nn.Identity())
        assert _compat_hf.conv1d_outputs(layer) == 6
        assert _compat_hf.conv1d_outputs(nn.Conv1d(4, 6, 1)) is None


def test_layers_name_their_caches_as_before() -> None:
    pytest.importorskip("transformers")
    from transformers.models.falcon.modeling_falcon import FalconDecoderLayer  # noqa: PLC0415 (an extra)
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer  # noqa: PLC0415
    from transformers.models.mamba.modeling_mamba import MambaBlock  # noqa: PLC0415

    layers = [LlamaDecoderLayer, FalconDecoderLayer, MambaBlock]
    for beginning, layer in zip(_compat_hf.CACHE_ARGUMENTS, layers, strict=True):
        with private(f"transformers.{layer.__name__}.forward({beginning}=)", "to run a layer twice without filling its cache twice"):
            assert any(argument.startswith(beginning) for argument in inspect.signature(layer.forward).parameters)


def stacked_experts() -> tuple[nn.Module, nn.Module]:
    """Experts of Mixtral, ``[experts, outputs, inputs]``, and of GPT-OSS, transposed, their gates and ups alternating."""
    transformers = pytest.importorskip("transformers")
    if [int(part) for part in transformers.__version__.split(".")[:2]] < [5, 7]:
        pytest.skip("this version of transformers does not describe its experts' layout")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # noqa: PLC0415 (an extra)
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: PLC0415

    sizes = {"hidden_size": 4, "intermediate_size": 3, "num_local_experts": 2}
    experts = MixtralExperts(transformers.MixtralConfig(**sizes)), GptOssExperts(transformers.GptOssConfig(**sizes))
    for module in experts:
        for p in module.parameters():
            nn.init.normal_(p)
    return experts


def test_stacked_experts_describe_their_layout() -> None:
    plain, alternating = stacked_experts()
    with private("transformers.integrations.moe.use_experts_implementation", "to turn stacked experts into Linears"):
        assert all(hasattr(experts, name) for experts in (plain, alternating) for name in _compat_hf.EXPERT_ATTRIBUTES)
        assert [_compat_hf.experts_are_gated(experts) for experts in (plain, alternating)] == [True, True]
        assert [_compat_hf.experts_are_transposed(experts) for experts in (plain, alternating)] == [False, True]
        assert [_compat_hf.experts_are_concatenated(experts) for experts in (plain, alternating)] == [True, False]


def test_the_gate_of_stacked_experts_is_that_of_their_class() -> None:
    plain, _ = stacked_experts()
    with private("transformers.integrations.moe._default_apply_gate", "to compute what stacked experts compute"):
        gate, up = torch.randn(5, 3), torch.randn(5, 3)
        torch.testing.assert_close(_compat_hf.apply_expert_gate(plain, type(plain), torch.cat([gate, up], -1)), F.silu(gate) * up)


def test_stacked_experts_run_eagerly_when_asked_to() -> None:
    plain, _ = stacked_experts()
    with private("transformers.PreTrainedConfig._experts_implementation", "to run stacked experts of any type and size"):
        plain.config._experts_implementation = "no such implementation"
        arguments = torch.randn(5, 4), torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1)
        with pytest.raises(KeyError):
            plain(*arguments)
        _compat_hf.use_eager_experts(plain.config)
        assert plain(*arguments).shape == (5, 4)


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def test_unexpected_keys_are_ignored_by_pattern() -> None:
    model = tiny_llama()
    with private("transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected", "to load a masked model without a warning"):
        _compat_hf.ignore_unexpected_keys(model, "x")
        assert isinstance(model._keys_to_ignore_on_load_unexpected, set)
        assert list(model._keys_to_ignore_on_load_unexpected) == ["x"]


def test_parameters_that_stay_in_float32_are_known() -> None:
    model = tiny_llama()
    with private("transformers.PreTrainedModel._keep_in_fp32_modules", "to compute a streamed checkpoint in the types of from_pretrained"):
        model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict = ["wo"], {"router"}
        names = ["layers.0.wo.weight", "layers.0.word.weight", "router.bias"]
        kept = {
            dtype: [name for name in names if _compat_hf.float32_patterns(model, dtype)(name)]
            for dtype in (torch.float16, torch.bfloat16, torch.float32)
        }
        assert kept == {torch.float16: [names[0], names[2]], torch.bfloat16: names[2:], torch.float32: []}
        assert {"wo"} == set(pytest.importorskip("transformers").T5ForConditionalGeneration._keep_in_fp32_modules)


def test_keys_of_a_checkpoint_get_the_names_of_a_model() -> None:
    model = tiny_llama()
    with private("transformers.core_model_loading.rename_source_key", "to find the layers of a checkpoint in another class of model"):
        expected = ["model.layers.0.mlp.up_proj.layout", "lm_head.layout"]
        keys = {"layers.0.mlp.up_proj.layout": expected[0], expected[0]: expected[0], "lm_head.layout": expected[1], "x": "x"}
        assert _compat_hf.model_keys(model, keys, expected) == keys
        assert _compat_hf.model_keys(model.model, [expected[0]], [expected[0].removeprefix("model.")]) == {
            expected[0]: expected[0].removeprefix("model.")
        }


def test_a_new_layer_gets_the_hook_of_the_old_one() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    with private("accelerate.hooks: _hf_hook", "to replace layers of a model that is on several devices"):
        old, new = nn.Linear(2, 2), nn.Linear(2, 2)
        assert _compat_hf.keep_device_hook(old, new) is new
        assert not hasattr(new, "_hf_hook")
        hooks.add_hook_to_module(old, hooks.AlignDevicesHook("cpu"))
        assert _compat_hf.keep_device_hook(old, new)._hf_hook is old._hf_hook


def test_peft_takes_a_layer_of_ours() -> None:
    peft = pytest.importorskip("peft")

    class Adapter(peft.tuners.lora.Linear):  # type: ignore[misc]
        pass

    with private("peft.LoraConfig._register_custom_module", "to train adapters in the kept blocks alone"):
        config = peft.LoraConfig(r=2, target_modules=["0"])
        _compat_hf.register_lora_layer(config, nn.Linear, Adapter)
        assert isinstance(peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config).base_model.model[0], Adapter)


def test_offloaded_layers_are_recognised() -> None:
    accelerate = pytest.importorskip("accelerate")
    with private("accelerate.hooks.AlignDevicesHook.offload", "to say that the weights of offloaded models cannot be written"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        accelerate.cpu_offload(model[0], "cpu")
        assert model[0].weight.is_meta
        assert [_compat_hf.is_offloaded(layer) for layer in model] == [True, False]
        accelerate.hooks.add_hook_to_module(model[1], accelerate.hooks.SequentialHook(accelerate.hooks.AlignDevicesHook(offload=True)))
        assert _compat_hf.is_offloaded(model[1])


class Flattened(nn.Module):
    """A convolution of two channels, of which each becomes four inputs of a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 1), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.fc(self.conv(x).flatten(1))


def dependency_graph() -> tuple[Flattened, Any]:
    torch_pruning = pytest.importorskip("torch_pruning")
    model = Flattened()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, torch_pruning.DependencyGraph().build_dependency(model, torch.randn(1, 1, 2, 2), verbose=False)


def test_the_dependency_graph_has_the_attributes_that_are_read() -> None:
    model, graph = dependency_graph()
    with private("torch_pruning.DependencyGraph.module2node", "to follow what must be pruned with a unit"):
        nodes = _compat_pruning.nodes_by_module(graph)
        node = nodes[model.conv]
        assert node.module is model.conv
        assert nodes[model.scale].pruning_dim == 0
        with private("torch_pruning.dependency.Node", "to follow what must be pruned with a unit"):
            assert [name for name in inspect.get_annotations(_compat_pruning.PruningNode) if not hasattr(node, name)] == []
        with private("torch_pruning.dependency.Dependency", "to follow what must be pruned with a unit"):
            edge = node.dependencies[0]
            assert [name for name in inspect.get_annotations(_compat_pruning.PruningEdge) if not hasattr(edge, name)] == []
            assert edge.source is node


def test_the_dependency_graph_leads_from_a_unit_to_those_that_go_with_it() -> None:
    model, graph = dependency_graph()
    with private("torch_pruning._helpers._HybridIndex", "to follow a unit through flatten, split and concatenation"):
        start = _compat_pruning.nodes_by_module(graph)[model.conv], _compat_pruning.module_pruner(graph, model.conv).prune_out_channels
        reached, pending = {}, [(*start, [_compat_pruning.PrunedUnit(1, 1)])]
        while pending:
            node, prune, units = pending.pop()
            reached[node.module, prune] = {(unit.idx, unit.root_idx) for unit in units}
            for edge in node.dependencies:
                if edge.is_triggered_by(prune) and (edge.target.module, edge.handler) not in reached:
                    mapped = units
                    for mapping in edge.index_mapping:
                        mapped = mapped if mapping is None else mapping(mapped)
                    pending.append((edge.target, edge.handler, mapped))
        assert reached[model.fc, _compat_pruning.module_pruner(graph, model.fc).prune_in_channels] == {(i, 1) for i in range(4, 8)}


def test_the_dependency_graph_counts_channels_and_removes_them() -> None:
    model, graph = dependency_graph()
    with private("torch_pruning.DependencyGraph.get_out_channels", "to know how many units a layer has"):
        node = _compat_pruning.nodes_by_module(graph)[model.fc]
        assert [_compat_pruning.channel_count(graph, node, side) for side in ("outputs", "inputs")] == [3, 8]
    with private("torch_pruning.DependencyGraph.get_pruner_of_module", "to remove the units of a layer"):
        _compat_pruning.module_pruner(graph, model.fc).prune_out_channels(model.fc, [1])
        _compat_pruning.module_pruner(graph, model.fc).prune_in_channels(model.fc, [0, 5])
        assert model.fc.weight.shape == (2, 6)


def test_the_dependency_graph_tells_the_types_of_operations() -> None:
    model, graph = dependency_graph()
    with private("torch_pruning.ops.OPTYPE", "to tell layers that can lose units from those that cannot"):
        types, nodes = _compat_pruning.operation_types(), _compat_pruning.nodes_by_module(graph)
        assert nodes[model.conv].type == types.CONV
        assert {node.type for node in nodes.values()} >= {types.OUTPUT, types.ELEMENTWISE}
        assert len({types.OUTPUT, types.ELEMENTWISE, types.LN, types.GN, types.MHA, types.LSTM}) == 6


def test_fused_attention_shows_its_heads() -> None:
    with private("torch.autograd.graph.Node._saved_query", "to find heads that share keys"):
        query, key = torch.randn(1, 4, 3, 8, requires_grad=True), torch.randn(1, 2, 3, 8)
        saved = _compat_pruning.saved_query_and_key(F.scaled_dot_product_attention(query, key, key, enable_gqa=True).grad_fn)
        assert saved is not None
        assert [tuple(x.shape) for x in saved] == [(1, 4, 3, 8), (1, 2, 3, 8)]
        assert _compat_pruning.saved_query_and_key((query + 1).grad_fn) is None


def test_expand_slice_and_view_show_the_sizes_of_their_inputs() -> None:
    with private("torch.autograd.graph.Node._saved_self_sym_sizes", "to find heads that are repeated or rotated"):
        x = torch.randn(1, 2, 1, 3, 8, requires_grad=True)
        results = x.expand(1, 2, 4, 3, 8), x[..., :4], x.reshape(2, 24)
        assert [tuple(_compat_pruning.saved_sizes(result.grad_fn)) for result in results] == [(1, 2, 1, 3, 8)] * 3
        assert tuple(_compat_pruning.saved_sizes((x + 1).grad_fn)) == ()


def test_concatenation_shows_its_axis() -> None:
    with private("torch.autograd.graph.Node._saved_dim", "to find rotary embeddings"):
        x = torch.randn(2, 3, requires_grad=True)
        assert [_compat_pruning.saved_dim(torch.cat([x, x], axis).grad_fn) for axis in (1, -1)] == [1, 2**64 - 1]


class Overriding(nn.Linear):
    """Notes the calls of the private methods that blockprune overrides."""

    calls: list[tuple[str, int]]

    def _apply(self, fn: Any, recurse: bool = True) -> "Overriding":
        self.calls.append(("_apply", len(inspect.signature(fn).parameters)))
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.calls.append((prefix, len(args)))
        super()._load_from_state_dict(state_dict, prefix, *args)
        args[-1].append("an error of this layer")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}index"] = torch.arange(2)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("a reason of this layer")


def test_torch_calls_the_private_methods_that_blockprune_overrides() -> None:
    model = nn.Sequential(Overriding(2, 2))
    model[0].calls = []
    with private("torch.nn.Module._apply", "to keep masks and block indices when a model changes its type or device"):
        model.double()
        assert model[0].calls == [("_apply", 1)]
        assert model[0].weight.dtype == torch.float64
    model[0].calls.clear()
    with private("torch.nn.Module._load_from_state_dict", "to load checkpoints into masked and block-sparse layers"):
        with pytest.raises(RuntimeError, match="an error of this layer"):
            model.load_state_dict(model.state_dict())
        assert model[0].calls == [("0.", 5)]
    with private("torch.nn.Module._save_to_state_dict", "to save the indices of block-sparse layers, which are no buffers"):
        assert list(model.state_dict()) == ["0.weight", "0.bias", "0.index"]
    with (
        private("torch.nn.Module.__prepare_scriptable__", "to say why a masked or block-sparse layer cannot be scripted"),
        warnings.catch_warnings(action="ignore"),
        pytest.raises(RuntimeError, match="a reason of this layer"),
    ):
        torch.jit.script(model)


# What the tests above say when a version loses a name

LOSSES = [
    (torch, "_lazy_clone", test_lazy_clone_shares_memory_until_a_side_is_written),
    (torch, "_is_zerotensor", test_zero_tensors_are_recognised),
    (torch._C, "_is_cow_tensor", test_copy_on_write_tensors_are_recognised),
    (torch._C, "_data_address", test_lazy_clone_shares_memory_until_a_side_is_written),
    (torch._C, "_are_functorch_transforms_active", test_active_functorch_is_noticed),
    (torch._C, "_len_torch_dispatch_stack", test_active_dispatch_modes_are_noticed),
    (torch._C._functorch, "is_legacy_batchedtensor", test_legacy_batched_gradients_are_recognised),
    (forward_ad, "_current_level", test_active_forward_differentiation_is_noticed),
    (nn.RNNBase, "_init_flat_weights", test_an_rnn_rebuilds_its_lists_of_weights),
]


@pytest.mark.parametrize(("owner", "name", "test"), LOSSES, ids=[name for _, name, _ in LOSSES])
def test_a_lost_name_is_reported_with_its_use(owner: Any, name: str, test: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(pytest.fail.Exception, match=rf"torch {torch.__version__[:4]}.* no longer has .*{name}.*core/_compat.py"):
        test()


def test_a_lost_import_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(nn.modules.conv, "_ConvNd")
    with pytest.raises(ImportError, match=r"torch .*_ConvNd.* blockprune/core/_compat.py"):
        runpy.run_path(str(COMPAT))


# That the names stand in one module

OVERRIDES = {
    "_apply": {"model/gates.py", "model/parametrization.py", "export/sparse_layers.py", "export/semi_structured.py"},
    "_load_from_state_dict": {
        *("model/masked_class.py", "model/parametrization.py"),
        *("export/sparse_layers.py", "export/semi_structured.py"),
    },
    "_save_to_state_dict": {"model/masked_class.py", "export/sparse_layers.py", "export/semi_structured.py"},
    "__prepare_scriptable__": {"model/gates.py", "model/parametrization.py", "export/semi_structured.py", "export/sparse_layers.py"},
}
NAMEDTUPLE = {"_fields", "_replace"}  # documented by Python
UNDOCUMENTED = {  # without an underscore, or attributes of instances only
    *("is_transposed", "has_gate", "is_concatenated", "nf", "_apply_gate"),
    *("module2node", "OPTYPE", "get_pruner_of_module", "get_out_channels", "get_in_channels"),
    *("is_tensor", "ntensors", "GOMP_parallel", "mm_search", "shared_memory_per_block_optin"),
}
TORCH = {name for owner in (torch, torch._C, torch.ones(0), nn.Conv2d(1, 1, 1), nn.LSTM(1, 1)) for name in dir(owner)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name[1:].isidentifier()


def defined(tree: ast.AST) -> set[str]:
    """The names that a source defines: functions, classes, arguments, variables and attributes."""
    definitions = (ast.FunctionDef, ast.ClassDef)
    functions = {node.name for node in ast.walk(tree) if isinstance(node, definitions)}
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    variables = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return functions | arguments | variables | attributes


def used(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that a source takes from elsewhere, as imports, attributes or their names in strings, with their lines."""
    own = defined(tree) - OVERRIDES.keys()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_own = node.attr in own and (node.attr not in TORCH or ast.unparse(node.value) == "self")
            yield from [] if is_own else [(node.attr, node.lineno)]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("blockprune"):
            yield from ((part, node.lineno) for part in [*(node.module or "").split("."), *(alias.name for alias in node.names)])
        elif isinstance(node, ast.Import):
            yield from ((part, node.lineno) for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr"} and isinstance(node.args[1], ast.Constant):
            yield node.args[1].value, node.lineno
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in TORCH | UNDOCUMENTED and is_private(node.value)
        ):
            yield node.value, node.lineno


COMPAT_NAMES = {Path(module.__file__ or "").stem for module in ALL_COMPAT}
SOURCES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py")) if path.stem not in COMPAT_NAMES}


def foreign(tree: ast.AST, source: str = "") -> list[str]:
    """The private names of other packages in a source, but for the overrides that it may have."""
    names = [(name, line) for name, line in used(tree) if (is_private(name) and name not in NAMEDTUPLE) or name in UNDOCUMENTED]
    return [f"{source}:{line}: {name}" for name, line in names if source not in OVERRIDES.get(name, ())]


@pytest.mark.parametrize("source", SOURCES)
def test_no_other_module_uses_a_private_name(source: str) -> None:
    found = foreign(SOURCES[source], source)
    assert not found, f"{found}: take it from blockprune/core/_compat.py, or use what is public instead"


@pytest.mark.parametrize(
    "code",
    [
        "torch._C",
        "x.untyped_storage()._cdata",
        "from torch.utils._pytree import tree_map",
        "from torch.nn.modules.conv import _ConvNd",
        "import torch._dynamo",
        "getattr(module, '_forward_hooks')",
        "HOOKS = ('_forward_hooks', '_backward_hooks')",
        "hasattr(node.grad_fn, '_saved_query')",
        "self._modules",
        "layer._apply(fn)",
        "experts.has_gate",
        "graph.module2node",
    ],
)
def test_a_private_name_would_be_found(code: str) -> None:
    assert foreign(ast.parse(code))


@pytest.mark.slow
def test_the_overrides_are_those_that_the_docstring_lists() -> None:
    listed = {name: set(files.split(", ")) for name, files in re.findall(r"``nn\.Module\.(\w+)``: (.+)", _compat.__doc__ or "")}
    assert listed == OVERRIDES
    for name, files in OVERRIDES.items():
        assert files == {source for source, tree in SOURCES.items() if name in defined(tree)}


@pytest.mark.parametrize("module", ALL_COMPAT)
def test_compat_imports_nothing_of_blockprune(module: ModuleType) -> None:
    text = Path(module.__file__ or "").read_text()
    assert not any("blockprune" in name for name, _ in used(ast.parse(text)))
    assert not re.search(r"^(from|import) blockprune", text, re.MULTILINE)


def test_each_entry_says_since_when_it_is_there_and_has_a_test() -> None:
    tested = {name for name, _ in used(ast.parse(Path(__file__).read_text()))}
    entries = [(name, getattr(module, name)) for module in ALL_COMPAT for name in module.__all__]
    assert {name for name, _ in entries} - tested == set()
    own = [entry for _, entry in entries if getattr(entry, "__module__", "") in {module.__name__ for module in ALL_COMPAT}]
    assert len(own) > 30
    assert [
        entry.__name__ for entry in own if not re.search(r"\((torch|transformers|accelerate|peft|Torch-Pruning) \d", entry.__doc__)
    ] == []


def test_each_entry_is_used() -> None:
    taken = {name for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in imported(node)}
    assert {*_compat.__all__, *_compat_pruning.__all__} - taken <= {"PruningEdge"}  # the type of PruningNode.dependencies


def imported(node: ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if (node.module or "").removeprefix("blockprune.core.") in COMPAT_NAMES else []
