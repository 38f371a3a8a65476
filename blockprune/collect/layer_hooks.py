"""One pass over batches: hooks on the layers, and gradients of the loss, give each statistic its evidence."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from blockprune.collect.accumulate import Fold, add_evidence
from blockprune.collect.block_gates import gate_derivatives
from blockprune.core._compat import ConvNd, version_counter
from blockprune.core.progress import progress_bar
from blockprune.model.experts import Experts, experts_in
from blockprune.model.inputs import InputHooks, input_axis, input_hooks, weight_inputs
from blockprune.model.parameters import ParameterRef, find_parameters
from blockprune.model.running import (
    Calibration,
    default_forward,
    disable_attention_fastpath,
    preserve_state,
    scalar_loss,
    to_model_device,
)
from blockprune.statistics import Call


def add_batches(model: nn.Module, fold: Fold, calibration: Calibration) -> Fold:
    """The fold with all batches added.

    The model's mode, gradients, buffers and hooks and the random number generators are restored afterwards, also after an error.
    """
    sees = {s.sees for s in fold.statistics}
    of_loss = sorted(s.name for s in fold.statistics if s.sees in ("output_grad", "weight_grad"))
    of_gates = sorted(s.name for s in fold.statistics if s.sees == "gates")
    hooks = input_hooks(model, find_parameters(model, fold.refs, what="where"))
    grids = {name: p.grid for name, p in fold.data.items()}
    with preserve_state(model, [ref.stored for ref in fold.refs.values()]), disable_attention_fastpath():
        for number, raw in enumerate(progress_bar(calibration.batches, "collect", calibration.progress)):
            if not isinstance(raw, (Tensor, Mapping, tuple, list)) and calibration.forward is default_forward:
                raise TypeError(f"batch {number} is a {type(raw).__name__}; give tensors, tuples or mappings, or pass forward=")
            batch = to_model_device(model, raw)
            if sees - {"gates"}:
                observer = _LayerObserver(fold, batch, number, calibration.token_weights(batch))
                fold = observer.run(model, hooks, calibration, of_loss)
            if "gates" in sees:
                derivatives = gate_derivatives(model, grids, fold.refs, hooks, batch, calibration, needs=of_gates)
                for name, gates in derivatives.items():
                    fold = add_evidence(fold, name, "gates", gates, number)
    return fold


class _LayerObserver:
    """One forward of one batch, and one backward if a statistic needs gradients.

    A hook adds the inputs and outputs of its layer to the fold at once, before the forward can overwrite them in place.
    """

    def __init__(self, fold: Fold, batch: Any, number: int, token_weights: Tensor | None) -> None:
        self.fold, self.batch, self.number, self.token_weights = fold, batch, number, token_weights
        self.sees = {s.sees for s in fold.statistics}
        self.calls: Counter[str] = Counter()  # of each parameter's layer, in this forward
        self.expert_weights: dict[nn.Module, Tensor] = {}  # the weight of each token, by an expert's Linear
        self.outputs: list[GradientEdge] = []  # of layer outputs whose gradients the statistics need
        self.last_inputs: tuple[Any, Call] | None = None

    def run(self, model: nn.Module, hooks: InputHooks, calibration: Calibration, needs_loss: Sequence[str]) -> Fold:
        try:
            loss = self._forward(model, hooks, calibration, needs_loss)
            if loss is not None:
                self._backward(loss)
        finally:
            self.outputs.clear()  # the graph's hooks refer to this object: a cycle through torch's graph would never be freed
        return self.fold

    def _forward(self, model: nn.Module, hooks: InputHooks, calibration: Calibration, needs_loss: Sequence[str]) -> Tensor | None:
        handles = self._register(model, hooks) if self.sees & {"inputs", "output", "output_grad"} else []
        try:
            with torch.set_grad_enabled(bool(needs_loss)):
                output = calibration.forward(model, self.batch)
                return scalar_loss(calibration, output, self.batch, needs_loss) if needs_loss else None
        finally:
            for handle in handles:
                handle.remove()

    def _register(self, model: nn.Module, hooks: InputHooks) -> list[Any]:
        handles = []
        if self.token_weights is not None:
            handles += [module.register_forward_pre_hook(self._route_token_weights) for module in experts_in(model).values()]
        for name, ref, module in hooks:
            # a head whose weight is tied to an embedding is not observed: the inputs of the two lie along different axes of the weight
            if input_axis(ref) == input_axis(self.fold.refs[name]):
                handles.append(module.register_forward_hook(partial(self._observe, name, ref), with_kwargs=True))
        return handles

    def _observe(  # noqa: PLR0917 (the first two are bound by `partial`, torch passes the others)
        self, name: str, ref: ParameterRef, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        raw: Tensor = output[0] if isinstance(output, tuple) else output
        with torch.no_grad():
            views = [x.detach() for x in weight_inputs(ref, module, args, kwargs)] if "inputs" in self.sees else []
            call = _call(ref, module, views, raw, self.expert_weights.get(module, self.token_weights))
            call = attrs.evolve(call, name=name, batch=self.batch, index=self.calls[name])
            self.calls[name] += 1
            if "inputs" in self.sees:
                self._add(name, "inputs", self._with_shared_results(call))
            self._add(name, "output", call)
        if "output_grad" in self.sees and raw.requires_grad:  # of this value, even if it is overwritten in place later
            raw.register_hook(lambda g: self._add(name, "output_grad", attrs.evolve(call, output_grad=_matrix(ref, g))))
            self.outputs.append(get_gradient_edge(raw))

    def _add(self, name: str, sees: str, evidence: Any) -> None:
        if sees in self.sees:
            self.fold = add_evidence(self.fold, name, sees, evidence, self.number)

    def _with_shared_results(self, call: Call) -> Call:
        """The call, with the results of the call before it if both have the same inputs, such as those of queries, keys and values."""
        tensors = [x for x in (*call.inputs, call.weights) if x is not None]
        # tensors of `torch.inference_mode` do not tell whether they were written in between, so their results are not shared
        key: Any = [object() if x.is_inference() else (x.data_ptr(), version_counter(x), x.shape, x.stride(), x.dtype) for x in tensors]
        if self.last_inputs is None or self.last_inputs[0] != key:
            self.last_inputs = key, attrs.evolve(call, shared={})  # keeps the inputs alive, so that their addresses stay unique
        return attrs.evolve(call, shared=self.last_inputs[1].shared)

    def _route_token_weights(self, module: Experts, args: Any) -> None:
        """Note for the Linears of each expert the weights of the tokens that the router sends to it."""
        assert self.token_weights is not None
        weights = self.token_weights.flatten()
        if len(args[1]) == len(weights):
            for number, expert in enumerate(module.experts()):
                self.expert_weights.update(dict.fromkeys(expert.children(), weights[torch.where(args[1] == number)[0]]))

    def _backward(self, loss: Tensor) -> None:
        if "weight_grad" in self.sees:
            weights = {name: ref.stored for name, ref in self.fold.refs.items()}
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, g in zip(weights, grads, strict=True):
                self._add(name, "weight_grad", g)  # None if this batch does not use the weight
        elif self.outputs:  # gradients of weights are not computed, to save time
            torch.autograd.grad(loss, _lowest(self.outputs), allow_unused=True)


def _lowest(edges: Sequence[GradientEdge]) -> list[GradientEdge]:
    """Keep edges with no other requested edge between them and the inputs; backpropagating to these fires every output hook."""
    requested = {edge.node for edge in edges}

    def is_lowest(node: Any) -> bool:
        visited: set[Any] = set()
        pending = [node]
        while pending:
            following = {f for f, _ in pending.pop().next_functions if f is not None} - visited
            if following & requested:
                return False
            visited |= following
            pending += following
        return True

    return [edge for edge in edges if is_lowest(edge.node)]


def _matrix(ref: ParameterRef, raw: Tensor) -> Tensor:
    """A layer's output, or its gradient, as ``[n, outputs]``."""
    raw = raw.detach()
    if isinstance(ref.owner, ConvNd):
        raw = raw.movedim(-len(ref.owner.kernel_size) - 1, -1)
    return raw.reshape(-1, raw.shape[-1])


def _call(ref: ParameterRef, module: nn.Module, views: list[Tensor], raw: Tensor, token_weights: Tensor | None) -> Call:
    """The inputs and the output of one call as matrices with one row a token.

    Token weights ``[batch, positions]`` apply if the layer's tensors have these axes, the same transposed, or both in one; a convolution's
    rows are not tokens and all count once.
    """
    inputs = [x.reshape(-1, x.shape[-1]) for x in views]
    if isinstance(ref.owner, ConvNd):
        return Call(inputs, _matrix(ref, raw), None)
    leading = {x.shape[:-1] for x in [*views, raw]}
    candidates = [] if token_weights is None else [token_weights, token_weights.movedim(0, -1), token_weights.flatten()]
    if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
        candidates = candidates[1:]  # its axes are [positions, batch], also where both have the same size
    weights = next((candidate.flatten() for candidate in candidates if candidate.shape in leading), None)
    return Call(inputs, _matrix(ref, raw), weights)
