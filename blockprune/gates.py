"""Derivatives of a batch's loss with respect to one gate a block (a factor on its weights, at 1), through `torch.func`."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from blockprune.blocks import BlockGrid, expand
from blockprune.names import Slot
from blockprune.statistics import Gates

Forward = Callable[[Callable[..., Any], Any], Any]  # (model, batch) -> output
Loss = Callable[[Any, Any], Tensor]  # (output, batch) -> scalar
Heard = Sequence[tuple[str, Slot, nn.Module]]  # parameters, their places, and the modules whose calls show their inputs


@attrs.frozen(eq=False)
class How:
    """How a batch becomes an output and a loss, and how samples are told apart.

    Example:
        >>> from blockprune.gates import How
        >>> How(lambda model, batch: model(batch), None, lambda batch: None, "vmap", 8).chunk
        8
    """

    forward: Forward
    loss: Loss | None
    token_weights: Callable[[Any], Tensor | None]
    per_sample: str  # "vmap" or "loop"
    chunk: int


def scalar(how: How, output: Any, batch: Any, needs: Sequence[str]) -> Tensor:
    """The loss of an output: one number with a gradient.

    Raises:
        ValueError: no loss, or one that is not that.

    Example:
        >>> from blockprune.gates import How, scalar
        >>> how = How(lambda model, batch: model(batch), lambda output, batch: output.sum(), lambda batch: None, "vmap", 8)
        >>> scalar(how, torch.ones(2, requires_grad=True), None, ["weight_grad"]).item()
        2.0
    """
    what = f"statistics {', '.join(needs)} need a loss"
    if how.loss is not None:
        loss = how.loss(output, batch)
    else:
        own: Tensor | None = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if own is None:
            raise ValueError(f"{what}: pass loss=(output, batch) -> scalar; the model's output ({type(output).__name__}) has none")
        loss = own
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{what} that is one number, but loss(output, batch) gave {given}; take its mean or sum")
    if not loss.requires_grad:
        raise ValueError(f"{what} with a gradient, but loss(output, batch) has none; is something detached or under no_grad?")
    return loss.reshape(())


def gates(  # noqa: PLR0917 (of one caller)
    model: nn.Module, grids: Mapping[str, BlockGrid], slots: Mapping[str, Slot], heard: Heard, batch: Any, how: How, *, needs: Sequence[str]
) -> dict[str, Gates]:
    """Derivatives with respect to one gate a block, through `torch.func`: memory is samples x blocks, not samples x weights.

    Raises:
        RuntimeError: an operation that vmap cannot run.

    Example:
        >>> from blockprune.gates import How, gates
        >>> from blockprune.layers import listeners
        >>> from blockprune.names import slots
        >>> model, x = nn.Linear(4, 2, bias=False), torch.ones(3, 4)
        >>> how = How(lambda model, batch: model(batch), lambda output, batch: output.sum(), lambda batch: None, "vmap", 8)
        >>> grids, slot, heard = {"weight": bp.BlockGrid((2, 4), (2, 2))}, slots(model)["weight"][0], listeners(model, slots(model))
        >>> found = gates(model, grids, {"weight": slot}, heard, x, how, needs=[])
        >>> found["weight"].per_sample().shape          # one gate a block, one gradient a sample
        torch.Size([3, 1, 2])
    """
    ones = {name: torch.ones(grids[name].size, dtype=slot.stored.dtype, device=slot.stored.device) for name, slot in slots.items()}
    weights = {name: slot.stored.detach() for name, slot in slots.items()}
    frozen = {name: p.detach() for name, p in model.named_parameters()}  # so that no graph is kept but that of the gates

    called: set[str] = set()

    def functional(weights: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for name, _, module in heard:
                handle = module.register_forward_hook(lambda *_, name=name: called.add(name))
                stack.callback(handle.remove)
            return functional_call(model, dict(weights), args, kwargs)

    def loss_of(gates: Mapping[str, Tensor], batch: Any) -> Tensor:
        gated = {_key(slots[name]): weights[name] * expand(gate, grids[name]) for name, gate in gates.items()}

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional({**frozen, **gated}, args, kwargs)

        return scalar(how, how.forward(call, batch), batch, needs)

    def single(gates: Mapping[str, Tensor], sample: Any) -> Tensor:
        return loss_of(gates, tree_map(lambda x: x[None] if isinstance(x, Tensor) else x, sample))

    @cache
    def per_sample() -> dict[str, Tensor]:
        if how.per_sample == "loop":
            samples = [_sample(batch, i) for i in range(_samples(batch))]
            each = [grad(single)(ones, sample) for sample in samples]
            return {name: torch.stack([g[name] for g in each]) for name in ones}
        dims = tree_map(lambda x: 0 if isinstance(x, Tensor) else None, batch)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # an operation without a batching rule
                return vmap(grad(single), (None, dims), randomness="different", chunk_size=how.chunk)(ones, batch)  # type: ignore[no-any-return]
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(f"vmap cannot run this model: {reason}. Pass per_sample='loop': slower, with the same result") from error

    @cache
    def gradient() -> dict[str, Tensor]:
        return grad(loss_of)(ones, batch)  # type: ignore[no-any-return]

    def times_hessian(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def along(gates: Mapping[str, Tensor]) -> Tensor:
            slope = grad(loss_of)(gates, batch)
            return torch.stack([(slope[name] * vector[name]).sum() for name in gates]).sum()

        return grad(along)(ones)  # type: ignore[no-any-return]

    @cache
    def hg() -> dict[str, Tensor]:
        return times_hessian(gradient())

    @cache
    def curvature(probes: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        found: list[dict[str, Tensor]] = []
        for _ in range(probes):
            v = {name: (torch.randint(2, g.shape, generator=generator) * 2 - 1).to(g) for name, g in ones.items()}
            found.append({name: v[name] * h for name, h in times_hessian(v).items()})
        return {name: torch.stack([f[name] for f in found]) for name in ones}

    @cache
    def flow() -> dict[str, Tensor]:
        linear = {name: p.detach().abs() for name, p in model.named_parameters()}

        def summed(gates: Mapping[str, Tensor]) -> Tensor:
            gated = {_key(slots[name]): weights[name].abs() * expand(gate, grids[name]) for name, gate in gates.items()}

            def call(*args: Any, **kwargs: Any) -> Any:
                return functional({**linear, **gated}, args, kwargs)

            first = tree_map(lambda x: torch.ones_like(x[:1]) if isinstance(x, Tensor) else x, batch)
            output = how.forward(call, first)
            output = output if isinstance(output, Tensor) else output[0]
            return output.sum()

        return grad(summed)(ones)  # type: ignore[no-any-return]

    def of(name: str) -> Gates:
        return Gates(
            lambda: per_sample()[name],
            lambda: hg()[name],
            lambda probes, seed: curvature(probes, seed)[name],
            lambda: flow()[name],
            lambda: name in called,
        )

    return {name: of(name) for name in ones}


def _key(slot: Slot) -> str:
    """The name under which `functional_call` replaces the stored weight."""
    return slot.name if slot.chain is None else f"{slot.name.removesuffix(slot.attr)}parametrizations.{slot.attr}.original"


def _samples(batch: Any) -> int:
    sizes: list[int] = []
    tree_map(lambda x: sizes.append(len(x)) if isinstance(x, Tensor) else None, batch)
    return sizes[0] if sizes else 0


def _sample(batch: Any, index: int) -> Any:
    return tree_map(lambda x: x[index] if isinstance(x, Tensor) else x, batch)
