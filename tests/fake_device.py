"""A device without hardware: its tensors compute on the CPU, and raise an error if they are mixed with CPU tensors, as on a GPU.

Every operation runs on the CPU, so results are those of the CPU. A test on this device finds code that creates a tensor on the wrong one.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
FAKE_DEVICE = "fake"
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}  # take indices of the CPU, too


class FakeDeviceTensor(Tensor):
    """A tensor that reports the fake device; ``data_on_cpu`` holds its numbers."""

    data_on_cpu: Tensor

    @staticmethod
    def __new__(cls, data_on_cpu: Tensor) -> "FakeDeviceTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            data_on_cpu.size(),
            strides=data_on_cpu.stride(),
            storage_offset=data_on_cpu.storage_offset(),
            dtype=data_on_cpu.dtype,
            layout=data_on_cpu.layout,
            device=f"{FAKE_DEVICE}:0",
            requires_grad=data_on_cpu.requires_grad,
        )
        tensor.data_on_cpu = data_on_cpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run_on_cpu(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = FakeDeviceTensor(self.data_on_cpu.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=self.requires_grad)
        return memo.setdefault(id(self), copied)

    def data_ptr(self) -> int:
        return self.data_on_cpu.data_ptr()

    def tolist(self) -> Any:
        return self.data_on_cpu.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"FakeDeviceTensor({self.data_on_cpu})"


class _InterceptFactories(TorchDispatchMode):
    """Handles operations without a tensor of the fake device that create one, such as ``torch.zeros(3, device="fake")``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_fake = _device_argument(kwargs) == FAKE_DEVICE or any(isinstance(t, FakeDeviceTensor) for t in _tensors((args, kwargs)))
        return _run_on_cpu(func, args, kwargs) if on_fake else func(*args, **kwargs)


def _device_argument(kwargs: Mapping[str, Any]) -> str:
    return "" if kwargs.get("device") is None else torch.device(kwargs["device"]).type


def _run_on_cpu(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU and mark its results as tensors of the device on which a GPU would give them.

    Raises:
        RuntimeError: the tensors are on different devices, or the generator is on the CPU.
    """
    tensors = _tensors((args, kwargs))
    on_fake = [t for t in tensors if isinstance(t, FakeDeviceTensor)]
    device = _device_argument(kwargs)
    if (on_fake or device == FAKE_DEVICE) and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: the generator is on the CPU")
    result_on_fake = bool(on_fake)
    if device:
        result_on_fake, kwargs = device == FAKE_DEVICE, {**kwargs, "device": "cpu"}
    elif func is aten.copy_.default:
        result_on_fake = isinstance(args[0], FakeDeviceTensor)
    elif on_fake and (on_cpu := _forbidden_cpu_tensors(func, args, tensors)):
        raise RuntimeError(f"{func}: all tensors must be on one device, but {[tuple(t.shape) for t in on_cpu]} are on the CPU")
    results = func(*_on_cpu(args), **_on_cpu(kwargs))
    # an operation in place returns its argument: so must this one
    arguments = {id(t.data_on_cpu if isinstance(t, FakeDeviceTensor) else t): t for t in tensors}

    def mark(result: Tensor) -> Tensor:
        if id(result) in arguments:
            return arguments[id(result)]
        return FakeDeviceTensor(result) if result_on_fake else result

    return mark(results) if isinstance(results, Tensor) else tree_map_only(Tensor, mark, results)


def _tensors(arguments: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dictionaries; torch's own function takes six times as long."""
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, (tuple, list)):
        return []
    return [tensor for argument in arguments for tensor in _tensors(argument)]


def _on_cpu(arguments: Any) -> Any:
    """The arguments with CPU tensors for those of the fake device."""
    if isinstance(arguments, FakeDeviceTensor):
        return arguments.data_on_cpu
    if isinstance(arguments, dict):
        return {key: _on_cpu(argument) for key, argument in arguments.items()}
    return type(arguments)(map(_on_cpu, arguments)) if type(arguments) in (tuple, list) else arguments


def _forbidden_cpu_tensors(func: Any, args: Any, tensors: list[Tensor]) -> list[Tensor]:
    """The CPU tensors that a GPU operation would not accept: it takes indices, and numbers that it does not change."""
    indices = {id(t) for t in _tensors(args[1])} if func in INDEXING else set()
    pointwise = torch.Tag.pointwise in func.tags and not func._schema.is_mutable
    return [
        t
        for t in tensors
        if not isinstance(t, FakeDeviceTensor) and id(t) not in indices and not (t.ndim == 0 and (pointwise or t is not args[0]))
    ]


def _empty(func: Any) -> Callable[..., Tensor]:
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        options = {key: value for key, value in kwargs.items() if value is not None and key != "pin_memory"}
        return FakeDeviceTensor(func(*args, **{**options, "device": "cpu"}))

    return empty


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    source, destination = (t.data_on_cpu if isinstance(t, FakeDeviceTensor) else t for t in (source, target))
    destination.copy_(source)
    return target


_registered: list[torch.library.Library] = []  # a library unregisters its operators when it is freed


def _register() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: PLC0415 (torch 2.10 and later)

    _setup_privateuseone_for_python_backend(FAKE_DEVICE)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", _empty(aten.empty_strided.default), "PrivateUse1")
    library.impl("empty.memory_format", _empty(aten.empty.memory_format), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _registered.append(library)


@contextlib.contextmanager
def fake_device() -> Iterator[None]:
    """In this context torch has the device "fake"."""
    if not _registered:
        _register()
    with _InterceptFactories():
        yield


def to_fake_device(model: nn.Module) -> nn.Module:
    """A copy of a model on the fake device; tied parameters stay tied."""
    copies: dict[int, Tensor] = {}
    model = copy.deepcopy(model)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is None:
                    continue
                if id(t) not in copies:
                    copied = FakeDeviceTensor(t.detach().clone())
                    copies[id(t)] = nn.Parameter(copied, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else copied
                tensors[name] = copies[id(t)]  # type: ignore[assignment]
    return model
