"""Repair by gradients, one layer or part of a layer at a time: the kept weights learn the dense module's outputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call

from blockprune.core.arguments import check_counts, check_function, check_number, check_seed
from blockprune.core.patterns import suggest
from blockprune.core.types import BlockMask, Masks
from blockprune.model.masking import mask_blocks
from blockprune.model.parameters import parameter_refs, stored_aliases, under_all_names
from blockprune.repair.dense_reference import LayerBatch
from blockprune.repair.hidden_states import LayerBatches, Tensors
from blockprune.repair.repaired_weights import checked_repair
from blockprune.repair.transformer_layers import Layer

Finetune = Callable[..., Mapping[str, Tensor]]  # such as `finetune_layer`


def finetune_layer(
    run: Callable[[Mapping[str, Tensor], Any], Tensor],
    parameters: Mapping[str, Tensor],
    masks: Mapping[str, BlockMask],
    batches: Sequence[Any],
    targets: Sequence[Tensor],
    *,
    epochs: int = 8,
    lr: float = 1e-4,
    held_out: float = 0.125,
    patience: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Tune a layer's kept weights towards the dense layer's outputs, by Adam on the mean squared error (EBFT, Guo et al. 2402.12419).

    The masks stay as they are. Give it to `sequential` as ``finetune=``, with options bound by ``functools.partial``; it runs after
    ``reconstruct``.

    Args:
        run: (parameters, batch) -> the layer's output on one batch.
        parameters: the parameters to start from, by the layer's own names; those with a mask are tuned.
        masks: by the same names.
        batches: the layer's inputs, in any form that ``run`` takes.
        targets: the dense layer's output for each batch.
        epochs: the most passes over the batches.
        lr: Adam's learning rate; it falls to 0 along a cosine.
        held_out: the share of the batches, the last ones and at least one, on which tuning is not done but stopped; 0 tunes on all
            batches and keeps the last epoch's weights.
        patience: epochs without a lower error on the held-out batches before tuning stops. The best epoch's weights are returned, or the
            given ones if no epoch is better.
        seed: of the order of the batches.

    Raises:
        ValueError: a held_out share that leaves no batch to learn from; NaN or inf in the error of a batch; a count that is no integer
            from 0 on.
        TypeError: a function, number or seed that is none.

    Example:
        >>> x, dense = torch.randn(8, 16, 4), torch.randn(4, 4)
        >>> mask = bp.BlockMask(torch.tensor([[True, False], [True, True]]), bp.BlockGrid((4, 4), (2, 2)))
        >>> run = lambda parameters, batch: batch @ parameters["weight"].mT
        >>> targets = [batch @ dense.mT for batch in x]
        >>> tuned = bp.finetune_layer(run, {"weight": dense}, {"weight": mask}, list(x), targets, lr=0.1)
        >>> tuned["weight"][:2, 2:].count_nonzero().item()
        0
    """
    check_function("run", run, "(parameters, batch) -> output")
    epochs, patience = check_counts(0, epochs=epochs, patience=patience)
    lr = float(check_number("lr", lr, "a finite number from 0 on", lowest=0))  # the schedule would write into a tensor
    held_out = float(check_number("held_out", held_out, "a number from 0 to 1, the share of the batches", lowest=0, highest=1))
    seed = check_seed("seed", seed)
    count = _training_batches(len(targets), held_out)
    layer = _MaskedLayer(run, parameters, masks)
    values = layer.trainable()
    if not masks or not epochs:
        return layer.weights(values)
    training, validation = (list(zip(batches[part], targets[part], strict=True)) for part in (slice(count), slice(count, None)))

    def validation_error() -> float:
        with torch.no_grad():
            return sum(_checked(layer.error(values, *pair), count + i).item() for i, pair in enumerate(validation))

    best, least, worse_epochs = _copies(values), validation_error(), 0
    optimizer = torch.optim.Adam(values.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * count)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            for i in torch.randperm(count, generator=generator, device="cpu").tolist():
                loss = _checked(layer.error(values, *training[i]), i)
                gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True)  # not of the layer's other parameters
                for value, gradient in zip(values.values(), gradients, strict=True):
                    value.grad = gradient
                optimizer.step()
                schedule.step()
            error = validation_error()
            worse_epochs = 0 if error < least else worse_epochs + 1
            if error < least or not validation:
                best, least = _copies(values), error
            elif worse_epochs > patience:
                break
    return layer.weights(best)


def _checked(error: Tensor, batch_number: int) -> Tensor:
    if not error.isfinite():
        raise ValueError(
            f"finetune_layer: the error of the layer's output on batch {batch_number} is {error.item()}; check that batch and its target "
            "for NaN and inf, or give a smaller lr"
        )
    return error


def _training_batches(total: int, held_out: float) -> int:
    """How many batches are tuned on."""
    count = total - (max(1, round(held_out * total)) if held_out else 0)
    if count < 1:
        raise ValueError(
            f"held_out={held_out} of {total} batches leaves none to learn from; give more batches, or held_out=0 to hold none out"
        )
    return count


class _MaskedLayer:
    """A layer as a function of the weights that have a mask; these are trained in float32, where small steps do not round away."""

    def __init__(
        self, run: Callable[[Mapping[str, Tensor], Any], Tensor], parameters: Mapping[str, Tensor], masks: Mapping[str, BlockMask]
    ) -> None:
        self.run, self.parameters, self.masks = run, parameters, masks
        self.keep = {name: mask.keep.to(parameters[name].device) for name, mask in masks.items()}

    def trainable(self) -> dict[str, Tensor]:
        """Copies of the weights to tune."""
        weights = {name: self.parameters[name].detach() for name in self.masks}
        return {name: w.to(torch.promote_types(w.dtype, torch.float32), copy=True).requires_grad_(True) for name, w in weights.items()}

    def weights(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masked weights, in the layer's dtypes."""
        return {name: mask_blocks(v.to(self.parameters[name].dtype), self.keep[name], self.masks[name].grid) for name, v in values.items()}

    def error(self, values: Mapping[str, Tensor], batch: Any, target: Tensor) -> Tensor:
        """The mean squared error of the output."""
        difference = self.run({**self.parameters, **self.weights(values)}, batch) - target
        return difference.to(torch.promote_types(difference.dtype, torch.float32)).square().mean()


def _copies(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


# The parts of a layer.


@attrs.frozen(eq=False)
class PartCall:
    """How a layer calls a module in it.

    Example:
        >>> from blockprune.repair.layer_finetuning import PartCall
        >>> PartCall(nn.ReLU(), (torch.tensor([-1.0, 2.0]),), {}, token_weights=None).run({})
        tensor([0., 2.])
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    token_weights: Tensor | None

    @classmethod
    def of(cls, part: str, batch: LayerBatch) -> tuple["PartCall", Tensor]:
        """Run the layer on a batch; returns the call and what the module gives.

        Raises:
            ValueError: the layer does not call the module once, or the module does not return a tensor first.
        """
        module, calls = batch.layer.module.get_submodule(part), []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((_copied_tensors(args), dict(zip(kwargs, _copied_tensors(kwargs.values()), strict=True))))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            outputs.append(first.clone() if isinstance(first, Tensor) else first)

        outputs: list[Any] = []
        handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        try:
            batch.run()
        finally:
            for handle in handles:
                handle.remove()
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
            what = f"gives a {type(outputs[0]).__name__} first" if len(outputs) == 1 else f"is called {len(outputs)} times in a forward"
            raise ValueError(
                f"finetune names {part!r}, which in layer {batch.layer.name!r} {what}; name modules that are called once and give a tensor"
            )
        return cls(module, *calls[0], batch.token_weights), outputs[0]

    def run(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The module's output with some of its parameters replaced."""
        kwargs = dict(zip(self.kwargs, _copied_tensors(self.kwargs.values()), strict=True))
        named = under_all_names(parameters, stored_aliases(self.module))
        output: Any = functional_call(self.module, named, _copied_tensors(self.args), kwargs, tie_weights=False)
        first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return _weighted_tokens(first, self.token_weights)


def _copied_tensors(values: Iterable[Any]) -> tuple[Any, ...]:
    """With copies of the tensors, which a module may write into."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in values)


def check_parts(finetune: Mapping[str, Finetune], order: Sequence[Layer]) -> None:
    """Check what is tuned.

    Raises:
        KeyError: a part that no layer has.
        TypeError: something else than a function for a part.
        ValueError: a part that is left without a weight to tune in every layer.

    Example:
        >>> from blockprune.repair.layer_finetuning import check_parts
        >>> check_parts({"": bp.finetune_layer}, [])
    """
    names = dict.fromkeys(name for layer in order for name, _ in layer.module.named_modules())
    for part, function in finetune.items():
        if part and part not in names:
            raise KeyError(f"finetune names {part!r}, which is a module of no layer{suggest(part, list(names)[1:])}")
        if not callable(function):
            raise TypeError(f"finetune[{part!r}] must be a function such as bp.finetune_layer, not {type(function).__name__}")
    remaining = {(layer.name, layer.local_names[name]) for layer in order for name in layer.parameters}
    for part in finetune if remaining else ():
        own = {(layer, name) for layer, name in remaining if name.startswith(f"{part}." if part else "")}
        if not own:
            raise ValueError(
                f"finetune has nothing to tune in {part!r}: no layer has a pruned weight in it that is not tuned in the modules before it; "
                "leave it out, or put it first"
            )
        remaining -= own


def dense_outputs(finetune: Mapping[str, Finetune], dense: LayerBatches) -> dict[str, Tensors]:
    """What the dense modules to be tuned give on each batch, but for the layer itself.

    Example:
        >>> from blockprune.repair.hidden_states import LayerBatches
        >>> from blockprune.repair.layer_finetuning import dense_outputs
        >>> from blockprune.repair.transformer_layers import CapturedBatch, Layer
        >>> layer = Layer("", nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["0.weight"])
        >>> batches = LayerBatches(layer, {}, [torch.ones(1, 2)], [CapturedBatch(None, torch.ones(1, 2), {"": ("", (), {})})], [None])
        >>> [output.shape for output in dense_outputs({"0": bp.finetune_layer}, batches)["0"]]
        [torch.Size([1, 2])]
    """
    chosen = {dense.layer.local_names[name] for name in dense.layer.parameters}
    parts = [part for part in finetune if part and any(name.startswith(f"{part}.") for name in chosen)]
    return {part: [PartCall.of(part, batch)[1] for batch in dense] for part in parts}


def finetune_parts(
    finetune: Mapping[str, Finetune], batches: LayerBatches, masks: Masks, targets: Mapping[str, Tensors]
) -> dict[str, Tensor]:
    """Tune modules of a layer in turn, each on the outputs of the modules that were tuned before it.

    Args:
        finetune: a function for each module, such as `finetune_layer`, by its name in the layer; "" is the layer, whose weights in
            modules that come before it in this mapping stay as they are tuned.
        batches: the pruned layer's.
        masks: by the parameters' names in the model.
        targets: the dense modules' outputs on each batch.

    Returns:
        The tuned parameters, by the layer's own names.

    Example:
        >>> layer = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> recipe = bp.recipes.obs(bp.linears((2, 2)), bp.Calibration([torch.randn(32, 4) for _ in range(4)]))
        >>> apart = attrs.evolve(recipe, budget=None, finetune={"0": bp.finetune_layer, "2": bp.finetune_layer})
        >>> apart(nn.Sequential(layer), 0.5)
        PruningResult(2 masks, 50.0% pruned; 2 weights; 1 layer: '0')
    """
    layer, parameters = batches.layer, dict(batches.parameters)
    tuned: dict[str, Tensor] = {}
    remaining = {layer.local_names[name]: masks[name] for name in layer.parameters}
    for part, function in finetune.items():
        prefix = f"{part}." if part else ""
        own = {name: mask for name, mask in remaining.items() if name.startswith(prefix)}
        if not own:
            continue
        remaining = {name: mask for name, mask in remaining.items() if name not in own}
        given = [attrs.evolve(batch, parameters=parameters) for batch in batches]
        calls: list[Any] = [PartCall.of(part, batch)[0] for batch in given] if part else given
        goal = [_weighted_tokens(targets[part][i], weights) for i, weights in enumerate(batches.token_weights)]
        named = under_all_names(parameters, layer.aliases)
        local = {name: named[prefix + name] for name in parameter_refs(layer.module.get_submodule(part)) if prefix + name in named}
        local_masks = {name.removeprefix(prefix): mask for name, mask in own.items()}
        new = function(_run_part if part else _run_layer, local, local_masks, calls, goal)
        checked = checked_repair(f"finetune[{part!r}]" if part else "finetune", new, layer, {name: prefix + name for name in local})
        tuned |= {f"{prefix}{name}": value for name, value in checked.items()}
        parameters |= tuned
    return tuned


def _run_part(parameters: Mapping[str, Tensor], call: PartCall) -> Tensor:
    return call.run(parameters)


def _run_layer(parameters: Mapping[str, Tensor], batch: LayerBatch) -> Tensor:
    return _weighted_tokens(attrs.evolve(batch, parameters=parameters).run(), batch.token_weights)


def _weighted_tokens(x: Tensor, weights: Tensor | None) -> Tensor:
    """The tokens that count, times the square root of their weights, so that a plain squared error is the weighted one."""
    if weights is None or x.shape[: weights.ndim] != weights.shape:
        return x
    counts = weights > 0
    return x[counts] * weights[counts].to(x).sqrt().view(-1, *[1] * (x.ndim - weights.ndim))
