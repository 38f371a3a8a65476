"""One pass over batches: hooks on the layers and gradients of the loss provide the inputs of each statistic."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from blockprune.collect.accumulate import GRADIENTS, Fold, RunningFold
from blockprune.collect.block_gates import gate_derivatives
from blockprune.core._compat import ConvNd, disable_checkpointing, is_view, tree_leaves
from blockprune.core.progress import progress_bar
from blockprune.core.sharded_tensor import whole
from blockprune.model.calibration import Calibration, check_batch, scalar_loss
from blockprune.model.experts import Experts, experts_in
from blockprune.model.inputs import InputHooks, check_not_nested, input_axis, input_hooks, value_key, weight_inputs
from blockprune.model.parameters import ParameterRef, check_not_inference, find_parameters
from blockprune.model.product_check import check_product
from blockprune.model.running import disable_attention_fastpath, preserve_state, to_model_device, warn_of_writes
from blockprune.model.sharding import in_step, without_broadcasts
from blockprune.model.token_streams import TokenStreams, token_streams
from blockprune.model.weight_reads import WeightReads
from blockprune.statistics import Call, Source


def add_batches(model: nn.Module, fold: Fold, calibration: Calibration) -> Fold:
    """The fold with all batches added.

    The model's mode, gradients, buffers and hooks and the random number generators are restored afterwards, also after an error.
    """
    sources = {s.source for s in fold.statistics}
    of_loss = sorted(s.name for s in fold.statistics if s.source in ("output_grad", "weight_grad"))
    of_gates = sorted(s.name for s in fold.statistics if s.source == "gates")
    hooks = input_hooks(model, find_parameters(model, fold.refs, what="where"))
    observed = [hook for hook in hooks if input_axis(hook[1]) == input_axis(fold.refs[hook[0]])]  # not a head tied to an embedding
    grids = {name: p.grid for name, p in fold.data.items()}
    running, unweighted = RunningFold(fold), set[str]()
    fold = running.fold  # the sums that it began with are dropped as they are replaced
    weights = [ref.stored for ref in fold.refs.values()]
    check_not_inference(fold.refs.values(), outside=True)  # `preserve_state` turns it off
    if sources & {*GRADIENTS}:
        _check_buffers(model)
    with preserve_state(model, weights), warn_of_writes(model), disable_attention_fastpath(), without_broadcasts(model):
        if of_loss and not sources & {"weight_grad", "gates"}:  # gradients of weights would keep the inputs of all layers in memory
            for weight in weights:
                weight.requires_grad_(False)
        for number, raw in enumerate(in_step(model, progress_bar(calibration.batches, "collect", calibration.progress))):
            check_batch(number, raw, calibration.forward)
            batch = to_model_device(model, raw)
            for name in fold.data:
                running.count(name, batches=1)
            if sources - {"gates"}:
                observer = _LayerObserver(running, batch, number, token_streams(model, observed, calibration, batch), unweighted)
                is_checked = number == 0 and bool(sources & {"inputs", "output_grad"})  # it takes some time
                reads = WeightReads(hooks, model.buffers()) if is_checked else None
                observer.run(model, observed, calibration, of_loss, reads)
            if "gates" in sources:
                derivatives = gate_derivatives(model, grids, fold.refs, hooks, batch, calibration, needs=of_gates)
                for name, gates in derivatives.items():
                    running.add(name, "gates", gates, number)
                    running.count(name, calls=int(gates.called()))
    return running.fold


def _check_buffers(model: nn.Module) -> None:
    """Raise a ValueError for a buffer that autograd cannot save."""
    for name, buffer in model.named_buffers():
        if buffer.is_inference() and buffer.is_floating_point():
            raise ValueError(
                f"{name} {tuple(buffer.shape)}: this buffer was made under torch.inference_mode, so torch computes no gradients with it; "
                "copy the model outside of torch.inference_mode: copy.deepcopy(model)"
            )


class _LayerObserver:
    """One forward of one batch, and one backward if a statistic needs gradients.

    A hook adds the inputs and outputs of its layer to the fold at once, before the forward can overwrite them in place.
    """

    def __init__(self, running: RunningFold, batch: Any, number: int, streams: TokenStreams, unweighted: set[str]) -> None:
        self.running, self.fold, self.batch, self.number, self.streams = running, running.fold, batch, number, streams
        self.unweighted = unweighted  # layers of which a warning said that padding counts in them
        self.sources = {s.source for s in self.fold.statistics}
        self.is_checking = False  # while the forward of a layer runs a second time, which is no call of the model
        self.calls: Counter[str] = Counter()  # of each parameter's layer, in this forward
        self.routes: dict[nn.Module, tuple[int, Tensor]] = {}  # the number of tokens, and those that are sent to the expert of a Linear
        self.outputs: list[GradientEdge] = []  # of layer outputs whose gradients the statistics need
        self.last_inputs: tuple[Any, Call] | None = None

    def run(
        self, model: nn.Module, hooks: InputHooks, calibration: Calibration, needs_loss: Sequence[str], reads: WeightReads | None
    ) -> None:
        """Add a batch; ``reads`` are to be checked."""
        try:
            loss = self._forward(model, hooks, calibration, needs_loss, reads or contextlib.nullcontext())
            if reads is not None:
                reads.check(self.calls, [s.name for s in self.fold.statistics if s.source in ("inputs", "output_grad")])
            if loss is not None:
                self._backward(loss)
        finally:
            self.outputs.clear()  # the graph's hooks refer to this object: a cycle through torch's graph would never be freed

    def _forward(
        self, model: nn.Module, hooks: InputHooks, calibration: Calibration, needs_loss: Sequence[str], reads: AbstractContextManager[Any]
    ) -> Tensor | None:
        handles = self._register(model, hooks)
        try:
            with torch.set_grad_enabled(bool(needs_loss)), disable_checkpointing(reentrant_only=True):
                with reads:  # not for the loss, which may have a penalty of weights
                    output = calibration.forward(model, self.batch)
                return scalar_loss(calibration, output, self.batch, needs_loss) if needs_loss else None
        finally:
            for handle in handles:
                handle.remove()

    def _register(self, model: nn.Module, hooks: InputHooks) -> list[Any]:
        handles = []
        if self.streams.tensors:
            handles += [module.register_forward_pre_hook(self._note_routes) for module in experts_in(model).values()]
        if "output_grad" in self.sources and not self.sources & {"weight_grad", "gates"}:
            handles += [module.register_forward_pre_hook(partial(_begin_graph, ref.stored), with_kwargs=True) for _, ref, module in hooks]
        for name, ref, module in reversed(hooks):  # each is put before the module's other hooks, which may change the output
            handles.append(module.register_forward_hook(partial(self._observe, name, ref), with_kwargs=True, prepend=True))
        return handles

    def _observe(  # noqa: PLR0917 (the first two are bound by `partial`, torch passes the others)
        self, name: str, ref: ParameterRef, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Tensor | None:
        if self.is_checking:
            return None
        self.running.count(name, calls=1)
        if self.sources <= {"weight_grad", "gates"}:
            return None
        check_not_nested(name, (args, kwargs, output), "statistics of inputs and outputs")
        is_tuple = isinstance(output, tuple)
        raw: Tensor = output[0] if is_tuple else output
        with torch.no_grad():
            if self.sources & {"inputs", "output_grad"}:
                self.is_checking = True
                check_product(ref, module, args, kwargs, raw)
                self.is_checking = False
            views = [whole(x.detach()) for x in weight_inputs(ref, module, args, kwargs)] if "inputs" in self.sources else []
            inputs = [x.reshape(-1, x.shape[-1]) for x in views]
            output = whole(raw)  # tensor parallel layers have shards of inputs and outputs
            weights = None if isinstance(ref.owner, ConvNd) else self._token_weights(name, module, [*views, output])
            call = Call(inputs, _matrix(ref, output), weights, name=name, batch=self.batch, index=self.calls[name])
            self.calls[name] += 1
            if "inputs" in self.sources:
                self._add(name, "inputs", self._with_shared_results(call))
            self._add(name, "output", call)
        if "output_grad" in self.sources and raw.requires_grad:  # of this value, even if it is overwritten in place later
            raw = raw if is_tuple or not is_view(raw) else raw.clone()  # torch would forget the hooks of a view
            raw.register_hook(partial(self._add_gradient, name, ref, attrs.evolve(call, inputs=[])))  # inputs need not stay in memory
            self.outputs.append(get_gradient_edge(raw))
        return None if is_tuple else raw

    def _add(self, name: str, source: Source, evidence: Any) -> None:
        if source in self.sources:
            self.running.add(name, source, evidence, self.number)

    def _add_gradient(self, name: str, ref: ParameterRef, call: Call, gradient: Tensor | None) -> None:
        if gradient is not None:  # as the backward of an autograd.Function may return
            self._add(name, "output_grad", attrs.evolve(call, output_grad=_matrix(ref, whole(gradient))))

    def _with_shared_results(self, call: Call) -> Call:
        """The call, with the results of the call before it if both have the same inputs, such as those of queries, keys and values."""
        tensors = [x for x in (*call.inputs, call.weights) if x is not None]
        key = [value_key(x) for x in tensors]
        if self.last_inputs is None or self.last_inputs[0] != key:
            self.last_inputs = key, attrs.evolve(call, shared={})  # keeps the inputs alive, so that their addresses stay unique
        return attrs.evolve(call, shared=self.last_inputs[1].shared)

    def _note_routes(self, module: Experts, args: Any) -> None:
        """Note for the Linears of each expert which tokens the router sends to it."""
        for number, expert in enumerate(module.experts()):
            self.routes.update(dict.fromkeys(expert.children(), (len(args[1]), torch.where(args[1] == number)[0])))

    def _token_weights(self, name: str, module: nn.Module, tensors: Sequence[Tensor]) -> Tensor | None:
        """The weights of the rows of a call, ``[n]``.

        Token weights ``[batch, positions]`` apply if the layer's tensors have these axes, the same transposed, or both in one, maybe with
        more axes behind, such as heads. A convolution's rows are not tokens and count once.
        """
        leading, call = {x.shape[:-1] for x in tensors}, self.calls[name]
        layouts: list[Callable[[Tensor], Tensor]] = [lambda w: w, lambda w: w.movedim(0, -1), torch.flatten]
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            layouts = layouts[1:]  # its axes are [positions, batch], also where both have the same size
        for tensor in self.streams.tensors:
            if module in self.routes and tensor.numel() == self.routes[module][0]:
                weights = self.streams.select(name, call, tensor)
                return None if weights is None else weights.flatten()[self.routes[module][1]]
            for layout in layouts:
                if layout(tensor).shape in leading:
                    weights = self.streams.select(name, call, tensor)
                    return None if weights is None else layout(weights).flatten()
        for tensor in self.streams.tensors:
            for layout in layouts:
                axes = layout(tensor).shape
                if behind := next((shape[len(axes) :] for shape in leading if shape[: len(axes)] == axes), None):
                    weights = self.streams.select(name, call, tensor)
                    return None if weights is None else layout(weights).flatten().repeat_interleave(behind.numel())
        self._warn_of_unweighted(name, call, leading)
        return None

    def _warn_of_unweighted(self, name: str, call: int, leading: Collection[torch.Size]) -> None:
        """Warn once of a layer whose rows include several of a sample that has padding, in an order that is unknown."""
        for tensor in self.streams.tensors:
            shapes = [shape for shape in leading if len(shape) > 1 and len(tensor) in shape[:2] and shape.numel() > len(tensor)]
            is_new = bool(shapes) and name not in self.unweighted and not tensor.all()
            if is_new and self.streams.concerns(name, call, tensor, tuple(shapes[0])):
                self.unweighted.add(name)
                warnings.warn(
                    f"{name}: its rows {tuple(shapes[0])} are not those of the token weights {tuple(tensor.shape)}, such as those of the "
                    "attention_mask, so all of them count, padding too; give token_weights=, a function of the batch that returns one "
                    "weight for each row, or None to count each row once",
                    stacklevel=2,
                )

    def _backward(self, loss: Tensor) -> None:
        if "weight_grad" in self.sources:
            weights = {name: ref.stored for name, ref in self.fold.refs.items()}
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, g in zip(weights, grads, strict=True):
                self._add(name, "weight_grad", g)  # None if this batch does not use the weight
        elif self.outputs:  # gradients of weights are not computed, to save time
            torch.autograd.grad(loss, _lowest(self.outputs), allow_unused=True)


def _begin_graph(weight: Tensor, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Let a layer's output have a gradient, also where none of its inputs has one."""
    if not any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves((args, kwargs))):
        weight.requires_grad_(True)


def _lowest(edges: Sequence[GradientEdge]) -> list[GradientEdge]:
    """Keep edges with no other requested edge between them and the inputs; backpropagating to these fires every output hook."""
    requested = {edge.node for edge in edges}
    reaches: dict[Any, bool] = {}  # by node: whether it, or a node between it and the inputs, is requested
    pending: list[Any] = list(requested)
    while pending:
        following = _following(pending[-1])
        if new := [node for node in following if node not in reaches]:
            pending += new
        else:
            node = pending.pop()
            reaches[node] = node in requested or any(reaches[f] for f in following)
    return [edge for edge in edges if not any(reaches[node] for node in _following(edge.node))]


def _following(node: Any) -> list[Any]:
    """The next nodes of torch's graph, in the direction of the inputs."""
    return [following for following, _ in node.next_functions if following is not None]


def _matrix(ref: ParameterRef, raw: Tensor) -> Tensor:
    """A layer's output, or its gradient, as ``[n, outputs]``."""
    raw = raw.detach()
    if isinstance(ref.owner, ConvNd):
        raw = raw.movedim(-len(ref.owner.kernel_size) - 1, -1)
    return raw.reshape(-1, raw.shape[-1])
