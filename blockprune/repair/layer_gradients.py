"""Statistics of the dense model that need gradients of the loss, with the weights of one layer at a time.

The layers run once in order, and what each is given is kept. What follows the last one gives the gradient of the loss by its output. Then
the layers run again from the last to the first, each with its output's gradient, which gives those of its weights and that of its input.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blockprune.core._compat import disable_checkpointing
from blockprune.core.types import Data, Where
from blockprune.model.calibration import Calibration, check_batch, scalar_loss
from blockprune.model.running import preserve_state, to_model_device
from blockprune.model.selection import including_names, select
from blockprune.model.sharding import raised_together
from blockprune.repair.dense_reference import LayerBatch
from blockprune.repair.hidden_states import HiddenStates, LayerBatches, Store, Tensors, in_memory, layer_calibration
from blockprune.repair.skipped_layers import Forms, are_equal, replaced_forwards, run_loaded, skip
from blockprune.repair.transformer_layers import Layer, LoadWeights, find_layers


@attrs.frozen(eq=False)
class _OutputGradients:
    """The batches of a layer, each with the gradient of the loss by the layer's output."""

    batches: LayerBatches
    gradients: Tensors

    def __iter__(self) -> Iterator["_OutputGradient"]:
        for i, batch in enumerate(self.batches):
            yield _OutputGradient(batch, self.gradients[i])


@attrs.frozen(eq=False)
class _OutputGradient:
    batch: LayerBatch
    gradient: Tensor

    @property
    def token_weights(self) -> Tensor | None:
        return self.batch.token_weights

    def run(self) -> Tensor:
        return self.batch.run()

    def input_gradient(self) -> Tensor:
        with torch.enable_grad(), disable_checkpointing(reentrant_only=True):
            hidden = self.batch.hidden.detach().requires_grad_(True)
            output = attrs.evolve(self.batch, hidden=hidden).run()
            return torch.autograd.grad(output, hidden, self.gradient)[0]


def collect_layer_by_layer(
    model: nn.Module,
    collect: Callable[..., Data],
    where: Where,
    calibration: Calibration,
    *,
    layers: Sequence[str],
    receive: Callable[[Data], None],
    load: LoadWeights,
    store: Store = in_memory,
) -> None:
    """What ``collect(model, where=where, calibration=calibration)`` gives, of one layer at a time, from the last to the first.

    Args:
        model: whose weights ``load`` provides; it is unchanged afterwards.
        collect: such as ``partial(collect.with_statistics, statistics=...)``.
        where: which parameters, in what blocks; all of them lie in layers.
        calibration: batches, forward and loss; its batches are taken once and kept.
        layers: names of the layers, in order.
        receive: is given the data of each layer; it is dropped afterwards.
        load: loads one layer's weights at a time.
        store: where the inputs of all layers and the gradients are kept.

    Raises:
        ValueError: no loss; and what `find_layers` and the collector raise.
        RuntimeError: a layer overwrites a tensor that its own gradient needs.
        NotImplementedError: what follows the layers needs more of them than the last one's hidden states.

    Example:
        >>> import contextlib
        >>> from blockprune.repair.layer_gradients import collect_layer_by_layer
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> calibration = bp.Calibration([torch.ones(1, 2)], loss=lambda output, batch: output.sum())
        >>> collect = partial(bp.collect.with_statistics, statistics=[bp.statistics.output_grad_sq])
        >>> parts = []
        >>> collect_layer_by_layer(model, collect, bp.linears((1, 1)), calibration, layers=["0", "1", "2"], receive=parts.append,
        ...                        load=lambda layer: contextlib.nullcontext())
        >>> [list(data) for data in parts], parts[0]["2.weight"].stats["output_grad_sq"].flatten()
        ([['2.weight'], ['0.weight']], tensor([1., 1.]))
    """
    order = find_layers(model, layers, list(select(model, where)))
    learnt = [p for p in model.parameters() if p.requires_grad]
    with preserve_state(model, learnt), torch.no_grad():
        for p in learnt:
            p.requires_grad_(False)  # torch would keep the inputs of layers, which a layer may overwrite
        with raised_together(model, calibration.reduce):  # two passes need the same batches, and a DataLoader may shuffle in each
            calibration = attrs.evolve(calibration, batches=list(calibration.batches))
        states = HiddenStates.of(model, order, calibration, keep_dense=False, load=load, store=store)
        inputs = [states.pruned]
        for number, layer in enumerate(order):
            with load(layer):
                batches = attrs.evolve(states.batches(layer, {}), hidden=inputs[-1])
                inputs.append(store(f"input-{number + 1}", (batch.run() for batch in batches)))
        gradients = store("gradient", _head_gradients(model, order, calibration, inputs.pop(), load))
        for layer in reversed(order):
            with load(layer), _overwriting_named(layer):
                given = _OutputGradients(attrs.evolve(states.batches(layer, {}), hidden=inputs.pop()), gradients)
                if layer.parameters:
                    rule = including_names(where, layer.parameters)
                    receive(collect(layer.root, where=rule, calibration=layer_calibration(given, loss=_loss, reduce=calibration.reduce)))
                if layer is not order[0]:
                    for i, with_gradient in enumerate(given):
                        gradients[i] = with_gradient.input_gradient()


@contextlib.contextmanager
def _overwriting_named(layer: Layer) -> Iterator[None]:
    """Add the name of the layer to torch's error about a tensor that is overwritten."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"layer {layer.name!r} overwrites a tensor that its gradient needs, such as the input of a norm, so torch cannot compute that; "
            "write x = x + y in place of x += y, or prune without a budget: attrs.evolve(recipe, budget=None)"
        ) from error


def _head_gradients(
    model: nn.Module, order: Sequence[Layer], calibration: Calibration, outputs: Tensors, load: LoadWeights
) -> Iterator[Tensor]:
    """For each batch the gradient of the loss by the last layer's output."""
    forms: Forms = {}
    last = order[-1].name
    with load(None):
        for number, raw in enumerate(calibration.batches):
            check_batch(number, raw, calibration.forward)
            batch = to_model_device(model, raw)
            if not number:
                with replaced_forwards(order, partial(run_loaded, load, forms)):
                    expected = _loss_value(calibration, calibration.forward(model, batch), batch)
                if isinstance(expected, Tensor) and not expected.isfinite().all():
                    raise ValueError(
                        f"the loss of batch 0 is {expected.flatten()[0].item()}; check the batch and the weights for NaN and inf"
                    )
                with replaced_forwards(order, partial(skip, forms, results={last: outputs[0]})):
                    is_known = "unknown" not in forms.values()
                    if not is_known or not are_equal([expected], [_loss_value(calibration, calibration.forward(model, batch), batch)]):
                        raise NotImplementedError(
                            f"the loss depends on more than the hidden states of the last layer, {last!r}; prune this model in memory, or "
                            "without a budget: attrs.evolve(recipe, budget=None)"
                        )
            with torch.enable_grad(), disable_checkpointing(reentrant_only=True):
                hidden = outputs[number].detach().requires_grad_(True)
                with replaced_forwards(order, partial(skip, forms, results={last: hidden.clone()})):
                    output = calibration.forward(model, batch)
                loss = scalar_loss(calibration, output, batch, ["of a budget"])
                (gradient,) = torch.autograd.grad(loss, hidden)
            del output, loss
            yield gradient


def _loss_value(calibration: Calibration, output: Any, batch: Any) -> Any:
    return getattr(output, "loss", None) if calibration.loss is None else calibration.loss(output, batch)


def _loss(output: Tensor, batch: Any) -> Tensor:
    """A number whose gradient by the output is the given one."""
    product: Tensor = output * batch.gradient
    return product.sum()
