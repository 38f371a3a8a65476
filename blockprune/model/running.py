"""Run a model without changing it: its state is preserved, and batches are moved to its device."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from blockprune.core._compat import all_buffers, version_counter

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
PutBack = Callable[..., None]  # what `buffers_as_now` returns


def to_model_device(model: nn.Module, batch: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of the batch, which a model may write into: tensors on its device, floating-point ones in its dtype or this one; dicts."""
    present = (p for p in model.parameters() if p.is_floating_point() and not p.is_meta)  # accelerate may have offloaded some
    like = next(present, torch.zeros((), device=torch.get_default_device()))
    wanted = dtype or like.dtype
    return _map_tensors(batch, lambda x: x.to(like.device, wanted if x.is_floating_point() else None, copy=True), lambda _: {})


def copy_batch(batch: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of the batch, which a model may write into: tensors stay where they are, floating-point ones in this dtype if one is given."""

    def copied(mapping: Mapping[Any, Any]) -> Any:  # a BatchEncoding, which has attributes, stays one
        return copy.copy(mapping) if isinstance(mapping, MutableMapping) else dict(mapping)

    return _map_tensors(batch, lambda x: x.to(dtype if dtype and x.is_floating_point() else x.dtype, copy=True), copied)


def _map_tensors(batch: Any, change: Callable[[Tensor], Tensor], new_mapping: Callable[[Mapping[Any, Any]], Any]) -> Any:
    """A copy of the batch with other tensors in its mappings, tuples, lists and dataclasses; other objects are copied with theirs.

    ``new_mapping`` makes the mapping that the changed values of a mapping are stored in.
    """
    if isinstance(batch, Tensor):
        tensor = change(batch)
        if type(batch) is type(tensor) is not Tensor:
            vars(tensor).update({key: value for key, value in vars(batch).items() if key not in vars(tensor)})  # a user's attributes
        return tensor
    if isinstance(batch, Mapping):
        mapping = new_mapping(batch)
        for key, value in batch.items():
            mapping[key] = _map_tensors(value, change, new_mapping)
        return mapping
    if isinstance(batch, (tuple, list)):
        values = [_map_tensors(value, change, new_mapping) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)  # a namedtuple takes its fields one by one
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        changed = copy.copy(batch)
        for field in dataclasses.fields(batch):
            if hasattr(batch, field.name):
                object.__setattr__(changed, field.name, _map_tensors(getattr(batch, field.name), change, new_mapping))
        return changed
    leaves = list(_leaves_in(batch))
    holds_tensors = any(isinstance(leaf, Tensor) for leaf in leaves) and not any(isinstance(leaf, nn.Module) for leaf in leaves)
    return _copy_if_possible(batch) if holds_tensors else batch


def _leaves_in(value: Any, depth: int = 4) -> Iterator[Any]:
    """What an object has in its attributes, and what these have in theirs."""
    if isinstance(value, (Tensor, nn.Module, type)) or not depth:
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(_leaves_in(item, depth) for item in value.values())
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(_leaves_in(item, depth) for item in value)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _leaves_in(vars(value), depth - 1)


def _copy_if_possible(value: T) -> T:
    try:
        return copy.deepcopy(value)  # a cache, for example, grows in the forward
    except Exception:  # such as that of a lock
        return value


@contextlib.contextmanager
def preserve_state(model: nn.Module, weights: Sequence[Tensor] = (), *, trains: bool = False) -> Iterator[PutBack]:
    """Run a model in evaluation mode, with gradients for these weights, and restore its state afterwards.

    The state is the training mode of all modules, ``requires_grad`` of the weights, all buffers and the random number generators. Unless
    the model trains, it is also the weights of embeddings with ``max_norm``, which their forward changes in place. Compiled models run
    eagerly, and `torch.inference_mode` is off. It yields the function that puts the buffers back, of `buffers_as_now`.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in weights]
    put_back = buffers_as_now(model, [] if trains else weights_written_by_forward(model))
    with (
        torch.inference_mode(False),
        without_compiled_code(),
        torch.random.fork_rng(cuda_devices(model)),
    ):
        try:
            model.eval()
            for p in weights:
                p.requires_grad_(True)
            yield put_back
        finally:
            for module, training in modes:
                module.training = training
            for p, flag in flags:
                p.requires_grad_(flag)
            put_back()


@contextlib.contextmanager
def warn_of_writes(model: nn.Module) -> Iterator[None]:
    """Warn at the end if the forward has changed parameters in place; to put them back, all parameters would have to be copied before.

    Example:
        >>> from blockprune.model.running import warn_of_writes
        >>> with warn_of_writes(nn.Linear(2, 2)):
        ...     pass
    """
    restored = {id(p) for embedding in _renormalized(model) for p in embedding.parameters()}
    before = {name: (p, _sample(p)) for name, p in model.named_parameters() if type(p) is nn.Parameter and id(p) not in restored}
    yield
    if written := [f"{name} {tuple(p.shape)}" for name, (p, sample) in before.items() if not torch.equal(sample, _sample(p))]:
        warnings.warn(
            f"{', '.join(written[:4])}{', ...' if len(written) > 4 else ''}: the forward changes these parameters in place, so running the "
            "model has changed it; let the forward do that in training mode only, or give a copy of the model",
            stacklevel=4,
        )


def _sample(x: Tensor) -> Tensor:
    """A copy of at most some 1,000 elements; none of a tensor whose values cannot be read one by one."""
    if x.layout != torch.strided or x.is_meta or not x.is_contiguous():
        return torch.empty(0, device="cpu")
    flat = x.detach().view(-1)
    return flat[:: max(1, len(flat) // 1000)].nan_to_num().clone()


def _renormalized(model: nn.Module) -> list[nn.Module]:
    """The embeddings with ``max_norm``."""
    return [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None]


def weights_written_by_forward(model: nn.Module) -> list[Tensor]:
    """The weights of embeddings with ``max_norm``, which their forward changes in place."""
    return [p.detach() for embedding in _renormalized(model) for p in embedding.parameters()]


def buffers_as_now(model: nn.Module, others: Sequence[Tensor] = ()) -> PutBack:
    """A function that gives all buffers of a model, and other tensors, the values that they have now.

    With ``quick=True`` it does not read the tensors of which torch says that nothing wrote to them since the last call. Torch does not see
    writes through ``.data``, so a tensor that an earlier call without ``quick`` found to be written in this way is still read.

    Example:
        >>> from blockprune.model.running import buffers_as_now
        >>> norm = nn.BatchNorm1d(1)
        >>> put_back = buffers_as_now(norm)
        >>> _ = norm(torch.ones(2, 1))
        >>> put_back()
        >>> norm.running_mean
        tensor([0.])
    """
    buffers = [(module, all_buffers(module)) for module in model.modules()]
    written = [*(buffer for _, own in buffers for buffer, _ in own.values() if buffer is not None), *others]
    values = [tensor.clone() for tensor in written]
    versions: list[int | None] = [_version(tensor) for tensor in written]  # None: torch does not see all writes

    @torch.no_grad()
    def put_back(*, quick: bool = False) -> None:
        for module, before in buffers:
            _restore_buffers(module, before)
        for i, (tensor, value) in enumerate(zip(written, values, strict=True)):
            is_counted = versions[i] is not None and versions[i] != _version(tensor)
            if tensor.shape != value.shape:
                tensor.set_(value.clone())  # type: ignore[call-overload]
            elif tensor.is_meta or (quick and versions[i] is not None and not is_counted):
                continue
            elif not _are_equal(tensor, value):
                versions[i] = versions[i] if is_counted else None
                tensor.copy_(value)
        versions[:] = [None if version is None else _version(tensor) for tensor, version in zip(written, versions, strict=True)]

    return put_back


def _are_equal(x: Tensor, y: Tensor) -> bool:
    """`torch.equal`, for sparse tensors too."""
    pairs = zip(_dense_parts(x), _dense_parts(y), strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _dense_parts(x: Tensor) -> list[Tensor]:
    if x.layout == torch.strided:
        return [x]
    if x.layout == torch.sparse_coo:
        x = x.coalesce()
        return [x.indices(), x.values()]
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [x.ccol_indices(), x.row_indices(), x.values()]
    return [x.to_dense()]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else version_counter(tensor)


def _restore_buffers(module: nn.Module, before: Mapping[str, tuple[Tensor | None, bool]]) -> None:
    """Put back the buffers that a forward has assigned or deleted; those that it has added stay, as it may not add them again."""
    now = all_buffers(module)
    for name, (buffer, is_persistent) in before.items():
        if name not in now:
            vars(module).pop(name, None)  # the forward may have put a plain tensor in its place
            module.register_buffer(name, buffer, is_persistent)
        elif now[name][0] is not buffer:
            setattr(module, name, buffer)


@contextlib.contextmanager
def keep_unfilled_buffers(model: nn.Module) -> Iterator[None]:
    """Put back None where a forward fills buffers that are None, and the other attributes of their modules, such as a flag that says so.

    Example:
        >>> from blockprune.model.running import keep_unfilled_buffers
        >>> layer = nn.Linear(2, 2)
        >>> layer.register_buffer("table", None)
        >>> with keep_unfilled_buffers(layer):
        ...     layer.table = torch.ones(2)
        >>> layer.table is None
        True
    """
    names = {module: [name for name, (buffer, _) in all_buffers(module).items() if buffer is None] for module in model.modules()}
    attributes = {module: dict(vars(module)) for module, unfilled in names.items() if unfilled}
    try:
        yield
    finally:
        for module, before in attributes.items():
            vars(module).update(before)
            for name in names[module]:
                setattr(module, name, None)


def cuda_devices(model: nn.Module) -> list[int]:
    """The GPUs that hold parameters or buffers of a model; running it may change their random number generators."""
    return sorted({p.device.index or 0 for p in itertools.chain(model.parameters(), model.buffers()) if p.device.type == "cuda"})


@contextlib.contextmanager
def seeded(seed: int, devices: Sequence[int]) -> Iterator[None]:
    """Draw the random numbers of a seed on the CPU and on these GPUs, and go on with the former ones afterwards.

    Example:
        >>> from blockprune.model.running import seeded
        >>> def draw() -> torch.Tensor:
        ...     with seeded(7, []):
        ...         return torch.rand(3)
        >>> torch.equal(draw(), draw())
        True
    """
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def without_compiled_code() -> contextlib.AbstractContextManager[Any]:
    """Run compiled models eagerly: compiled code would not run hooks that are registered later.

    Nothing is compiled before `torch._dynamo` is imported, which takes seconds.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """A function that ``torch.compile`` leaves out, because it looks for parameters in modules; the code around it is compiled.

    Unlike the decorator ``torch.compiler.disable`` it does not import `torch._dynamo`, which takes seconds.
    """

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **options)  # type: ignore[no-any-return]
        return function(*args, **options)

    return call


@contextlib.contextmanager
def disable_attention_fastpath() -> Iterator[None]:
    """Make torch's attention call its submodules, so that their hooks run; its fast path uses their weights without calling them."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def float64_copy(model: nn.Module, run: Callable[[nn.Module], list[Tensor]]) -> tuple[nn.Module, list[Tensor]]:
    """A copy of a model, in float64 if it runs in float64, and the outputs of the model itself.

    Args:
        model: the model; it is not changed.
        run: model -> outputs, for an example.

    Raises:
        ValueError: the model cannot run the example.
    """
    try:
        outputs = run(model)
    except Exception as error:
        raise ValueError(f"the model cannot run the example: {error}; give what `forward` takes, by default model(example)") from error
    try:
        double = copy.deepcopy(model).double()
        run(double)
    except Exception:  # the model creates tensors of another dtype, or its device has no float64
        return copy.deepcopy(model), outputs
    return double, outputs
