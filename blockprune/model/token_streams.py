"""Which token weights count for which layer: those of the entry of the batch whose tokens are the layer's rows.

A model may have several streams of tokens, such as those of an encoder and those of a decoder. If they may have rows of one shape, the
model runs once more, and each layer's input is followed back to the entries of the batch that flow into it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import DispatchMode, storage_id, tree_leaves
from blockprune.core.patterns import matches, matching_keys
from blockprune.model.calibration import Calibration, default_token_weights, inputs_of
from blockprune.model.inputs import InputHooks

# entries of a batch that Hugging Face models add up to one stream
_SAME_TOKENS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "segment_ids", "bbox")
_DECODER = ("decoder_*", "labels")  # models with a decoder make its tokens from the labels

_REMEDY = "give token_weights=, a function of the batch that returns 1 for each token that counts and 0 for padding"

Flows = Mapping[tuple[str, int], frozenset[str]]  # the entries that flow into the input of each call of each layer


@attrs.frozen(eq=False)
class TokenStreams:
    """The token weights of one batch.

    Args:
        tensors: the different weights, ``[batch, positions]``.
        weights: the weights of the tokens of the batch's entries, by name or pattern; None counts each token once. If several entries flow
            into a layer, the first pattern that matches one of them counts.
        sizes: the leading two sizes of the entries.
        flows: the entries that flow into each call; None if the shapes of the weights tell the streams apart.
        is_explicit: whether the user gave the patterns.

    Example:
        >>> from blockprune.model.token_streams import TokenStreams
        >>> mask = torch.ones(2, 3)
        >>> TokenStreams([mask]).select("fc.weight", 0, mask) is mask
        True
    """

    tensors: Sequence[Tensor] = ()
    weights: Mapping[str, Tensor | None] = attrs.field(factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict)
    flows: Flows | None = None
    is_explicit: bool = False

    def select(self, name: str, call: int, tensor: Tensor) -> Tensor | None:
        """The weights of the rows of a call, which have the shape of this tensor of weights.

        Raises:
            ValueError: several entries flow into the call, and it is unknown whose tokens its rows are.
        """
        if self.flows is None:
            return tensor
        size = tuple(tensor.shape)
        flowing = sorted(self.flows.get((name, call), ()))
        entries = [entry for entry in flowing if self.sizes[entry] == size] or flowing
        key_of = matching_keys(self.weights, entries)
        keys = [key for key in self.weights if key in key_of.values()]
        unknown = [entry for entry in entries if self.sizes[entry] == size and key_of[entry] is None]
        several = len({id(self.weights[key]) for key in keys}) > 1 and not self.is_explicit and keys[0] not in _DECODER
        if unknown or several:
            raise ValueError(
                f"{name}: its rows have the shape {size} of the token weights, and {', '.join(entries)} of the batch flow into them, so it "
                "is unknown whose tokens they are. Return weights by entry, of which the first that flows into a layer counts: "
                f"token_weights=lambda batch: {{{entries[0]!r}: batch['attention_mask'], '*': None}}; None counts each token once"
            )
        weights = self.weights[keys[0]] if keys else None
        return weights if weights is not None and weights.shape == tensor.shape else None

    def concerns(self, name: str, call: int, tensor: Tensor, rows: tuple[int, ...]) -> bool:
        """Whether tokens that these weights belong to flow into a call, whose rows have another shape."""
        known = {*self.sizes.values()}  # none if batches run a layer themselves
        if not known or {rows[:2], rows[1::-1]} & known:  # of another entry
            return False
        if self.flows is None:
            return True
        flowing = sorted(self.flows.get((name, call), ()))
        keys = matching_keys(self.weights, flowing).values()
        return any(key is not None and self.weights[key] is tensor for key in keys)


def token_streams(model: nn.Module, hooks: InputHooks, calibration: Calibration, batch: Any) -> TokenStreams:
    """The token weights of a batch, and which of them count for which layer.

    Raises:
        TypeError: weights that are no tensors.
        ValueError: weights that are negative or NaN, or not ``[batch, positions]``.

    Example:
        >>> from blockprune.model.token_streams import token_streams
        >>> batch = {"input": torch.ones(1, 2, 4), "attention_mask": torch.tensor([[1, 0]])}
        >>> token_streams(nn.Linear(4, 2), [], bp.Calibration([batch]), batch).tensors
        [tensor([[1, 0]])]
    """
    token_weights = checked_token_weights(calibration, batch)
    if token_weights is None:
        return TokenStreams()
    is_explicit = isinstance(token_weights, Mapping) and calibration.token_weights is not default_token_weights
    entries = _entries(model, batch)
    weights = dict(token_weights) if isinstance(token_weights, Mapping) else _by_entry(token_weights, entries)
    if is_explicit:
        _check_entries(weights, entries)
    tensors = [token_weights] if isinstance(token_weights, Tensor) else [w for w in weights.values() if w is not None]
    shapes = {tuple(w.shape) for w in tensors}
    sizes = {name: tuple(x.shape[:2]) for name, x in entries.items()}
    entries = {name: x for name, x in entries.items() if _may_have_rows(x, shapes)}
    streams = TokenStreams(tensors, weights, sizes, None, is_explicit)
    groups = set(matching_keys(weights, entries).values())
    if len(entries) < 2 or (len(groups) == 1 and None not in groups):
        return streams
    layers = {name: module for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None}
    modules = [*((name, module) for name, _, module in hooks), *((f"module {name}", module) for name, module in layers.items())]
    flows = entries_reaching(entries, modules, partial(calibration.forward, model, batch))
    reaching = {entry for flowing in flows.values() for entry in flowing if sizes[entry] in shapes}
    if not weights and len(reaching) == 1:  # no layer uses the other entries, which may be targets
        weights = dict.fromkeys(reaching, tensors[0])
    return attrs.evolve(streams, weights=weights, flows=flows)


def hidden_token_weights(model: nn.Module, calibration: Calibration, batch: Any, hidden: Tensor) -> Tensor | None:
    """The token weights of a batch that count for these hidden states, or None.

    Raises:
        ValueError: several entries of the batch have tokens of the shape of the hidden states, and what `token_streams` raises.

    Example:
        >>> from blockprune.model.token_streams import hidden_token_weights
        >>> batch = {"input": torch.ones(1, 2, 4), "attention_mask": torch.tensor([[1, 0]])}
        >>> hidden_token_weights(nn.Linear(4, 2), bp.Calibration([batch]), batch, torch.ones(1, 2, 4))
        tensor([[1, 0]])
    """
    streams = token_streams(model, [], calibration, batch)
    candidates = [w for w in streams.tensors if w.shape == hidden.shape[: w.ndim]] or list(streams.tensors[:1])
    if candidates and streams.flows is not None:
        entries = [name for name, size in streams.sizes.items() if size == tuple(candidates[0].shape)]
        raise ValueError(
            f"the token weights have the shape {tuple(candidates[0].shape)} of several entries of the batch ({', '.join(entries)}), so it "
            "is unknown to which of them the layers' tokens belong; give token_weights=, a function of the batch that returns one tensor, "
            "or None to count each token once"
        )
    rows = tuple(hidden.shape[:-1])
    padded = [w for w in streams.tensors if len(rows) > 1 and len(w) in rows[:2] and w.shape not in (rows[:2], rows[1::-1]) and not w.all()]
    if padded and padded[0] is candidates[0] and streams.concerns("", 0, padded[0], rows):
        warnings.warn(
            f"the layers' rows {rows} are not those of the token weights {tuple(padded[0].shape)}, such as those of the attention_mask, so "
            f"all of them count, padding too; {_REMEDY}, for each row, or None to count each row once",
            stacklevel=4,
        )
    return candidates[0] if candidates else None


def checked_token_weights(calibration: Calibration, batch: Any) -> Tensor | Mapping[str, Tensor | None] | None:
    """The result of ``calibration.token_weights``, or an error that says what is wrong with it; None if all tokens count once."""
    is_default = calibration.token_weights is default_token_weights
    token_weights = calibration.token_weights(batch)
    inputs = inputs_of(batch)
    mask = inputs.get("attention_mask") if is_default and isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.ndim != 2:
        raise ValueError(
            f"the attention_mask has the shape {tuple(mask.shape)} instead of [batch, positions], so it does not tell which tokens are "
            f"padding; {_REMEDY}, or token_weights=lambda batch: None to count all tokens"
        )
    mapping = token_weights if isinstance(token_weights, Mapping) else {"*": token_weights}
    for weights in mapping.values():
        if weights is not None:
            _check_weights(weights, is_default=is_default)
    return None if all(w is None or bool((w == 1).all()) for w in mapping.values()) else token_weights


def _check_weights(weights: Any, *, is_default: bool) -> None:
    source = "the attention_mask" if is_default else "token_weights"
    if not isinstance(weights, Tensor):
        raise TypeError(f"token_weights gave a {type(weights).__name__}; it must return a tensor [batch, positions] for a batch, or None")
    if weights.isnan().any():
        raise ValueError(f"{source} {tuple(weights.shape)} holds NaN; {_REMEDY}")
    if (weights < 0).any():
        raise ValueError(
            f"{source} {tuple(weights.shape)} holds negative values, as a mask that is added to attention scores does; {_REMEDY}, such as "
            "lambda batch: batch['attention_mask'] == 0"
        )
    if is_default and weights.is_floating_point() and not weights.any():
        raise ValueError(
            f"{source} {tuple(weights.shape)} is 0 everywhere, so no token would count. If it is a mask that is added to attention scores, "
            f"{_REMEDY}, such as lambda batch: batch['attention_mask'] == 0"
        )
    if weights.is_floating_point() and not weights.isfinite().all():
        raise ValueError(f"{source} {tuple(weights.shape)} holds inf; {_REMEDY}")


def _entries(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The tensors in the model's inputs by name, or by position, without masks."""
    inputs = inputs_of(batch)
    named = inputs.items() if isinstance(inputs, Mapping) else ((str(i), x) for i, x in enumerate(tree_leaves(batch)))
    is_decoder_only = getattr(getattr(model, "config", None), "is_encoder_decoder", None) is False  # its labels reach the loss alone
    skipped = {"labels"} if is_decoder_only else set()
    return {name: x for name, x in named if isinstance(x, Tensor) and "mask" not in name and name not in skipped}


def _by_entry(weights: Tensor, entries: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """One tensor of weights as a mapping by entry; empty if it is unknown to which it belongs."""
    if "input_ids" in entries or "inputs_embeds" in entries:
        return {**dict.fromkeys(_DECODER), **dict.fromkeys(_SAME_TOKENS, weights)}
    return {}


def _check_entries(weights: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    for key in weights:
        if key != "*" and not any(matches(key, name) for name in entries):
            raise ValueError(f"token_weights has a key {key!r}, but the batch has the entries {', '.join(map(repr, entries))}")


def _may_have_rows(x: Tensor, sizes: set[tuple[int, ...]]) -> bool:
    """Whether the tokens of an entry may have one of these shapes. The positions of images and sounds are not the entry's own."""
    return tuple(x.shape[:2]) in sizes or (x.is_floating_point() and x.ndim >= 3)


def entries_reaching(entries: Mapping[str, Tensor], modules: Sequence[tuple[str, nn.Module]], run: Callable[[], Any]) -> Flows:
    """Run a model, and follow entries of the batch to the modules that they reach.

    Args:
        entries: tensors of the batch, by name.
        modules: the modules, each with a name for its calls in the result.
        run: () -> output; runs the model on the batch.

    Example:
        >>> from blockprune.model.token_streams import entries_reaching
        >>> model, x = nn.Linear(4, 2), torch.ones(1, 4)
        >>> entries_reaching({"x": x}, [("fc", model)], lambda: model(x.exp()))
        {('fc', 0): frozenset({'x'})}
    """
    tracker = _EntryTracker(entries)
    flows: dict[tuple[str, int], frozenset[str]] = {}
    counts: dict[str, int] = {}

    def note(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = counts.get(name, 0)
        counts[name] = call + 1
        flows[name, call] = tracker.sources(tree_leaves((args, kwargs, output)))

    handles = [module.register_forward_hook(partial(note, name), with_kwargs=True) for name, module in modules]
    try:
        with torch.no_grad(), tracker:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return flows


class _EntryTracker(DispatchMode):
    """Notes for each memory that an operation writes which entries the operation's inputs come from."""

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_storage = {storage_id(x): frozenset({name}) for name, x in entries.items()}

    def sources(self, values: Sequence[Any]) -> frozenset[str]:
        tensors = [x for x in values if isinstance(x, Tensor) and x.layout == torch.strided]
        return frozenset().union(*(self.by_storage.get(storage_id(x), frozenset()) for x in tensors))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = self.sources(tree_leaves((args, kwargs)))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.layout == torch.strided:
                self.by_storage[storage_id(x)] = sources
        return result
