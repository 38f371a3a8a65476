"""From a masked model to one that holds and runs only its kept blocks; from a state dict; and to dense models and ONNX files."""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import attrs
import torch
from torch import Tensor, nn

from blockprune.core.patterns import suggest
from blockprune.export import semi_structured
from blockprune.export.backend_choice import MAX_ERROR, choose, fixed_backend
from blockprune.export.candidates import Candidate, find_candidates
from blockprune.export.choice_table import Choice, Choices, warn_if_all_dense
from blockprune.export.module_replacement import replace_modules
from blockprune.export.packing import pack_int8, pack_weight, read_state
from blockprune.export.quantization import wants_int8
from blockprune.export.sparse_convs import BlockSparseConv2d, sparse_layer_like
from blockprune.export.sparse_layers import STATE_KEYS, BlockSparseLinear, Int8BlockSparseLinear
from blockprune.export.timed_layers import DEFAULT_ROWS
from blockprune.model.apply import apply_masks, finalize
from blockprune.model.calibration import Forward, default_forward
from blockprune.model.checkpoint import exported_layers, masks_in_state, with_tied_names, without_wrapper
from blockprune.model.hf_checkpoint import prepare_checkpoints
from blockprune.model.hf_linears import is_transposed
from blockprune.model.mask_reading import parameter_masks
from blockprune.model.parameters import check_all_loaded, parameter_refs
from blockprune.model.sharding import check_not_fully_sharded

M = TypeVar("M", bound=nn.Module)


def block_sparse(
    model: M,
    *,
    backend: str | Choices = "auto",
    trainable: bool = False,
    dtype: str | torch.dtype | None = None,
    max_error: float = MAX_ERROR,
    inputs: Any = None,
    rows: int = DEFAULT_ROWS,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> M:
    """A new model whose masked Linears and convolutions hold and multiply only their kept blocks; its outputs are the masked model's.

    With ``dtype="int8"``, kept weights of Linears are int8 and inputs are rounded to int8 row by row, so that outputs differ a little; a
    layer whose error is too large or that is not faster so stays in its type, or becomes dense int8.

    The kept weights are frozen: they are buffers, which ``model.requires_grad_(True)`` does not reach, and gradients reach the inputs, the
    biases and all other parameters. With ``trainable=True`` the kept weights are parameters too, with names such as ``fc.values`` and one
    axis, so that a training step computes and stores nothing for pruned blocks. Make the optimizer from the new model's parameters.
    `update` gives such a model other masks, also where `torch.compile` has compiled it, and
    ``bp.apply_masks(export.dense(sparse), bp.read_masks(sparse))`` is the masked model again. Which blocks are kept is in no buffer, so
    `torch.func.functional_call` with the parameters and buffers of another exported model, and ``stack_module_state`` of several, compute
    with the blocks of the model that is called: use masked models for that. A model that is saved and loaded is frozen
    until ``export.load_state_dict(model, model.state_dict(), trainable=True)``.

    A layer that has no block-sparse form, or that is faster dense, becomes a plain layer with zeros; if it is to train, it stays masked, so
    that its zeros remain. ``choose(model)`` says which, and why. A warning names the layers that have no block-sparse form, and says so if
    no layer became block-sparse. Biases and norms that are masked, as in structured pruning, have no product to leave out and do not count:
    they become plain parameters with zeros, and with ``trainable=True`` they stay masked.

    Args:
        model: with masks; it is not changed.
        backend: "auto" measures every layer (`choose`); "native", "triton", "2:4", "torch" or "dense" is used for all layers; or the result
            of `choose`. A 2:4 layer cannot be moved to another device or type, and `load_state_dict` does not load it.
        trainable: whether kept weights are parameters. "auto" then measures the forward and the backward pass of every layer.
        dtype, max_error: as in `choose`. With a backend by name, times do not count, and "dense" is dense int8.
        inputs, rows, forward, progress: as in `choose`, for "auto"; inputs and forward also for the errors of int8.

    Raises:
        ValueError: a model without masks, an unknown backend or dtype, a backend that has no int8, a choice of "2:4" for a weight that is
            not 2:4 or of int8 for a convolution, or a dtype beside choices, which name it; ``trainable`` with int8 or 2:4, which do not
            train.
        RuntimeError: a backend that this machine does not have; the message says why.
        KeyError: choices that were made for another model.

    Example:
        >>> from blockprune import export
        >>> x, mask = torch.randn(3, 4), bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> model = bp.apply_masks(nn.Sequential(nn.Linear(4, 2)), {"0.weight": mask})
        >>> sparse = export.block_sparse(model, backend="torch")
        >>> sparse
        Sequential(
          (0): BlockSparseLinear(4, 2, bias=True, 50.0% pruned, torch)
        )
        >>> torch.allclose(sparse(x), model(x), atol=1e-6), list(sparse.state_dict())
        (True, ['0.bias', '0.values', '0.crow', '0.col', '0.layout'])
        >>> trains = export.block_sparse(model, backend="torch", trainable=True)
        >>> optimizer = torch.optim.AdamW(trains.parameters(), lr=1e-3)
        >>> trains(x).square().sum().backward()
        >>> optimizer.step()
        >>> {name: tuple(p.shape) for name, p in trains.named_parameters()}
        {'0.values': (4,), '0.bias': (2,)}
    """
    options: dict[str, Any] = {"dtype": dtype, "max_error": max_error, "inputs": inputs, "rows": rows, "forward": forward}
    if trainable and dtype is not None:
        raise ValueError(f"dtype={dtype!r} and trainable=True are given: a weight of int8 does not train; leave one of them out")
    if isinstance(backend, Choices):
        if dtype is not None:
            raise ValueError(f"dtype={dtype!r} and backend are given, and the choices have types already: choose(model, dtype={dtype!r})")
        choices = backend
    elif backend == "auto":
        choices = choose(model, progress=progress, training=trainable, **options)
    else:
        choices = fixed_backend(model, backend, **options)
    if backend not in ("auto", "dense"):  # `choose` has warned already
        warn_if_all_dense(choices)
    result, unsupported = convert(model, choices, trainable=trainable)
    if unsupported and any(choice.backend != "dense" for choice in choices.rows):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(unsupported.items())[:3])
        warnings.warn(f"{len(unsupported)} of {len(choices.rows)} masked layers have no block-sparse form ({reasons})", stacklevel=2)
    return result


def convert(model: M, choices: Choices, *, trainable: bool = False) -> tuple[M, dict[str, str]]:
    """A new model whose layers run as chosen, and why masked weights have no block-sparse form, by name.

    If it is trainable, the weights that are not block-sparse keep their masks.

    Raises:
        ValueError, KeyError: as `block_sparse`.

    Example:
        >>> from blockprune.export.backend_choice import fixed_backend
        >>> from blockprune.export.conversion import convert
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> model = bp.apply_masks(nn.Linear(4, 2), {"weight": mask})
        >>> convert(model, fixed_backend(model, "torch"))
        (BlockSparseLinear(4, 2, bias=True, 50.0% pruned, torch), {})
    """
    chosen = {choice.name: choice for choice in choices.rows}
    if trainable:
        _check_trainable(choices)
    plain = finalize(model)
    new: dict[nn.Module, nn.Module] = {}
    masked = parameter_masks(model) if trainable else {}
    unsupported: dict[str, str] = {}
    for candidate in find_candidates(model):
        if candidate.unsupported_reason:
            unsupported[candidate.name] = candidate.unsupported_reason
        if candidate.name not in chosen:
            similar = suggest(candidate.name, chosen)
            raise KeyError(f"backend has no choice for {candidate.name!r}{similar}; make the choices from this model: choose(model)")
        choice = chosen[candidate.name]
        if (choice.backend != "dense" or choice.dtype) and not candidate.unsupported_reason:
            layer = plain.get_submodule(candidate.layer)
            new[layer] = _sparse_layer(layer, candidate, choice, trainable)
            masked.pop(candidate.name, None)
    result = replace_modules(plain, new.get)
    if masked:
        result = apply_masks(result, masked)
    prepare_checkpoints(result)
    return result, unsupported


def _check_trainable(choices: Choices) -> None:
    for choice in choices.rows:
        if choice.dtype or choice.backend == "2:4":
            kind = choice.dtype or choice.backend
            raise ValueError(f"backend chooses {kind} for {choice.name}, which does not train; choose(model, training=True)")


def _sparse_layer(layer: nn.Module, candidate: Candidate, choice: Choice, trainable: bool) -> nn.Module:
    if wants_int8(choice.dtype or None) and not isinstance(layer, nn.Linear):
        problem = f"{candidate.name} is no weight of a Linear, and backend chooses int8 for it"
        raise ValueError(f"{problem}; make the choices from this model: choose(model, dtype='int8')")
    if choice.backend != "2:4":
        mask = None if choice.backend == "dense" else candidate.mask
        packed = pack_int8(candidate.weight, mask) if choice.dtype else pack_weight(candidate.weight, candidate.mask)
        sparse = sparse_layer_like(layer, packed, "native" if choice.backend == "dense" else choice.backend, trainable=trainable)
        sparse.name = candidate.layer
        return sparse
    if not semi_structured.is_supported(cast(Tensor, layer.weight)):
        raise ValueError(
            f"{candidate.name} is not {semi_structured.REQUIREMENT}, which backend chooses for it; choose(model) of this model"
        )
    return semi_structured.SemiStructuredLinear(cast(nn.Linear, layer))


def load_state_dict(model: M, state: Mapping[str, Tensor], *, strict: bool = True, trainable: bool | None = None) -> M:
    """A new model from the state dict of an exported model and a plain model, such as ``AutoModel.from_config(config)``.

    The state dict of a trainable model is that of a frozen one.

    Args:
        model: plain, masked or exported; it is not changed. If it is on the meta device, the result shares the tensors of ``state``.
        state: of an exported model, such as `safetensors.torch.load_file` returns. A tied tensor may have one of its names alone.
        strict: as in `nn.Module.load_state_dict`.
        trainable: whether kept weights are parameters; by default as in ``model``, and not where that is plain.

    Raises:
        KeyError: a block-sparse layer that the model does not have.
        ValueError: tensors that are not a block-sparse weight (indices out of range, other lengths) or have another shape than the layer;
            a mask that does not fit; a tensor of a model on the meta device that the state dict does not have; a model that accelerate
            has offloaded.
        TypeError: no state dict, or a part of a block-sparse weight or a mask that is no tensor.
        RuntimeError: everything else that does not fit, as torch reports it.

    Example:
        >>> from blockprune import export
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> sparse = export.block_sparse(bp.apply_masks(nn.Sequential(nn.Linear(4, 2)), {"0.weight": mask}), backend="torch")
        >>> loaded, x = export.load_state_dict(nn.Sequential(nn.Linear(4, 2)), sparse.state_dict()), torch.randn(3, 4)
        >>> torch.allclose(loaded(x), sparse(x), atol=1e-6)
        True
    """
    _check_state(state)
    check_all_loaded(model, "export.load_state_dict")
    plain = finalize(model)
    modules = dict(plain.named_modules(remove_duplicate=False))
    new: dict[nn.Module, nn.Module] = {}
    for name in exported_layers(state):
        if name not in modules:
            problem = f"the state dict has a block-sparse layer {name!r} that the model does not have"
            remedy = without_wrapper(state)
            raise KeyError(f"{problem}; {remedy}" if remedy else f"{problem}{suggest(name, modules)}")
        prefix = f"{name}." if name else ""
        tensors = {key: state[prefix + key] for key in (*STATE_KEYS, "scale") if prefix + key in state}
        new[modules[name]] = _loaded_layer(name, modules[name], tensors, trainable)
    plain = replace_modules(plain, new.get)
    if masks := masks_in_state(plain, state):  # of a model that trains, some weights of which are masked
        plain = apply_masks(plain, masks)
    tied = [refs for refs in parameter_refs(plain).values() if len(refs) > 1]
    plain.load_state_dict(with_tied_names(plain, state), strict=strict, assign=any(p.is_meta for p in plain.parameters()))
    for first, *others in tied:  # with assign=True, torch assigns each of them a tensor of its own
        for ref in others:
            setattr(ref.owner, ref.attr, first.stored)
    if missing := [name for name, x in [*plain.named_parameters(), *plain.named_buffers()] if x.is_meta]:
        raise ValueError(
            f"{', '.join(missing[:4])}: still on the meta device, because the state dict has no such tensor; "
            "create the model on a CPU instead"
        )
    prepare_checkpoints(plain)
    return plain


def _check_state(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"state has the type {type(state).__name__}; give a state dict, such as safetensors.torch.load_file(path) returns")
    parts = {*STATE_KEYS, "scale", "keep"}
    for name, value in state.items():
        if name.rpartition(".")[2] in parts and not isinstance(value, Tensor):
            raise TypeError(f"state[{name!r}] is a {type(value).__name__}, not a tensor; give the state dict of an exported model")


def _loaded_layer(name: str, template: nn.Module, tensors: Mapping[str, Tensor], trainable: bool | None) -> BlockSparseLinear:
    """A layer with a weight of a state dict, and with the bias, device and type of the model's layer."""
    if not isinstance(template, (nn.Linear, nn.Conv2d, BlockSparseLinear)):
        kind = type(template).__name__
        remedy = "; convert the model first: bp.as_linears(model)" if is_transposed(template) else ""
        raise ValueError(f"{name}: the state dict has a block-sparse weight for a {kind}; only Linear and Conv2d can have one{remedy}")
    try:
        weight = read_state(**{key: tensor.detach().clone() for key, tensor in tensors.items()})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if weight.scale is not None and isinstance(template, (nn.Conv2d, BlockSparseConv2d)):
        raise ValueError(f"{name}: the state dict has a weight of int8 for a {type(template).__name__}; only a Linear can have one")
    if isinstance(template, BlockSparseLinear):
        plain, shape = template.like if isinstance(template, Int8BlockSparseLinear) else template.values, template.shape
    else:
        plain = template.weight
        shape = (len(plain), plain[0].numel())
    if weight.shape != shape:
        raise ValueError(
            f"{name}: the state dict has a weight of shape {weight.shape}, and the layer one of {shape}; is it that of another model?"
        )
    if not plain.is_meta:
        values, crow, col = (x.to(plain.device) for x in (weight.values, weight.crow, weight.col))
        scale = None if weight.scale is None else weight.scale.to(plain.device)
        weight = attrs.evolve(weight, values=values.to(plain.dtype) if scale is None else values, crow=crow, col=col, scale=scale)
    try:
        layer = sparse_layer_like(template, weight, trainable=trainable)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    layer.name = name
    return layer


def dense(model: M) -> M:
    """A copy with plain layers, zero where blocks were pruned, of a masked or an exported model.

    Its weights are parameters that require gradients, unless the bias of the layer does not, or the kept weights of a trainable layer do
    not. A frozen export holds buffers, so it does not know more of what was frozen before.

    Example:
        >>> from blockprune import export
        >>> mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
        >>> sparse = export.block_sparse(bp.apply_masks(nn.Linear(4, 2), {"weight": mask}), backend="torch")
        >>> export.dense(sparse)
        Linear(in_features=4, out_features=2, bias=True)
    """
    plain = replace_modules(finalize(model), _plain_layer)
    prepare_checkpoints(plain)
    return plain


def _plain_layer(module: nn.Module) -> nn.Module | None:
    if not isinstance(module, (BlockSparseLinear, semi_structured.SemiStructuredLinear)):
        return None
    weight, bias = module.weight, module.bias
    if isinstance(module, BlockSparseConv2d):
        options: Any = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        plain: Any = nn.Conv2d(module.in_channels, module.out_features, bias=False, device="meta", **options)
    else:
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    is_trainable = isinstance(module, BlockSparseLinear) and module.trainable
    requires_grad = module.values.requires_grad if is_trainable else bias is None or bias.requires_grad
    plain.weight, plain.bias = nn.Parameter(weight.detach(), requires_grad=requires_grad), bias
    return cast(nn.Module, plain)


def onnx(model: nn.Module, args: tuple[Any, ...], path: str | Path, **options: Any) -> None:
    """Write a masked or exported model as an ONNX file.

    ONNX has no block-sparse product, so the weights are dense, and a warning says so.

    Args:
        model: is not changed.
        args: example inputs.
        path: of the file.
        options: for `torch.onnx.export`, such as dynamic_shapes.

    Raises:
        ImportError: onnx and onnxscript are not installed: ``pip install "blockprune[onnx]"``.
        ValueError: a model that ``fully_shard`` or ``parallelize_module`` has sharded.

    Example:
        >>> from blockprune import export
        >>> export.onnx(model, (x,), "model.onnx")  # doctest: +SKIP
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ImportError(f'ONNX files need {" and ".join(missing)}: pip install "blockprune[onnx]"')
    check_not_fully_sharded(model, "an ONNX file holds whole weights", nor_dtensors=True)
    warnings.warn("ONNX has no block-sparse product: the file holds dense weights, zero where blocks were pruned", stacklevel=2)
    torch.onnx.export(dense(model), args, path, dynamo=True, verbose=False, **options)
