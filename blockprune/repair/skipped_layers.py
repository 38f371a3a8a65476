"""What layers are called with on each batch, in a model whose layers are loaded one at a time, or skipped."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.core._compat import tree_leaves
from blockprune.model.calibration import Calibration, check_batch
from blockprune.model.running import to_model_device
from blockprune.model.token_streams import hidden_token_weights
from blockprune.repair.transformer_layers import CapturedBatch, Layer, LoadWeights, capture_layer_inputs

Forms = dict[str, Any]  # by layer: what it returns besides hidden states, without tensors; None if it returns a tensor alone


def capture_batches(
    model: nn.Module, order: Sequence[Layer], calibration: Calibration, load: LoadWeights | None = None
) -> Iterator[tuple[CapturedBatch, Tensor | None]]:
    """What the layers are called with on each batch (`capture_layer_inputs`), and the token weights of their hidden states.

    Args:
        model: whose weights may be missing if ``load`` provides them.
        order: the layers.
        calibration: batches and forward.
        load: loads one layer's weights at a time. The layers then run on the first batch, and are skipped on the others if the first one
            shows that what they are called with depends on nothing that they compute, besides the hidden states.

    Example:
        >>> from blockprune.repair.skipped_layers import capture_batches
        >>> from blockprune.repair.transformer_layers import find_layers
        >>> model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)
        >>> [(captured, weights)] = capture_batches(model, find_layers(model, None, ["0.weight"]), bp.Calibration([x]))
        >>> captured.hidden, weights
        (tensor([[1., 1.]]), None)
    """
    with contextlib.nullcontext() if load is None else load(None):
        forms: Forms = {}
        running = None if load is None else partial(run_loaded, load, forms)
        may_skip = None if load else False
        for number, raw in enumerate(calibration.batches):
            check_batch(number, raw, calibration.forward)
            batch = to_model_device(model, raw)
            capture = partial(capture_layer_inputs, model, order, calibration.forward, batch)
            with replaced_forwards(order, partial(skip, forms) if may_skip else running):
                captured = capture(to_end=not number)
            with replaced_forwards(order, running):
                token_weights = hidden_token_weights(model, calibration, batch, captured.hidden)
            if may_skip is None:
                may_skip = _is_same_without_layers(order, capture, forms, captured)
            yield captured, token_weights


def run_loaded(load: LoadWeights, forms: Forms, layer: Layer, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward with its weights loaded, which notes in what form it returns the hidden states."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with load(layer):
            output = forward(*args, **kwargs)
        others = (None,) * len(output[1:]) if isinstance(output, (tuple, list)) else None
        forms[layer.name] = others if isinstance(output, (Tensor, tuple, list)) else "unknown"
        return output

    return run


def skip(forms: Forms, layer: Layer, forward: Callable[..., Any], *, results: Mapping[str, Tensor] | None = None) -> Callable[..., Any]:
    """In place of a layer's forward: it returns the hidden states that it is given, in the layer's form and without anything else.

    Args:
        forms: as `run_loaded` has noted them.
        layer: to skip.
        forward: its own.
        results: hidden states to return instead, by layer.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        hidden, others = (results or {}).get(layer.name, next(iter((*args, *kwargs.values())))), forms[layer.name]
        return hidden if others is None else (hidden, *others)

    return run


def _is_same_without_layers(order: Sequence[Layer], capture: Callable[[], CapturedBatch], forms: Forms, expected: CapturedBatch) -> bool:
    """Whether the layers are called with the same arguments, besides hidden states, if none of them runs."""
    if "unknown" in forms.values():
        return False
    try:
        with replaced_forwards(order, partial(skip, forms)):
            captured = capture()
    except Exception:  # the model needs what its layers compute
        return False
    before, after = ([batch.arguments[layer.name] for layer in order] for batch in (expected, captured))
    return all(
        a[0] == b[0] and a[2].keys() == b[2].keys() and are_equal(tree_leaves(a[1:]), tree_leaves(b[1:]))
        for a, b in zip(before, after, strict=True)
    )


def are_equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            return type(x) is type(y) and x.dtype == y.dtype and torch.equal(x, y)
        return x is y or bool(x == y)

    return len(a) == len(b) and all(map(equal, a, b))


@contextlib.contextmanager
def replaced_forwards(order: Sequence[Layer], replace: Callable[[Layer, Callable[..., Any]], Callable[..., Any]] | None) -> Iterator[None]:
    """Layers with another forward; hooks and the signature stay."""
    with contextlib.ExitStack() as stack:
        for layer in order if replace else ():
            own = vars(layer.module).get("forward")  # of the instance, if it has one
            forward = layer.module.forward
            assert replace
            layer.module.forward = wraps(forward)(replace(layer, forward))
            stack.callback(partial(setattr, layer.module, "forward", own) if own else partial(delattr, layer.module, "forward"))
        yield
