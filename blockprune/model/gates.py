"""Gates that learn which blocks a model needs: a trainable number for each block, which is multiplied with the block's weights.

A gate is a function of a `logit`, an ordinary Parameter. `add` puts gates on a model, a penalty closes them until a target is met,
`scores` and an allocator turn them into masks, and `remove` takes them off.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockprune.core._compat import functorch_is_active
from blockprune.core.arguments import check_model, check_number
from blockprune.core.grid import BlockGrid, block_elements
from blockprune.core.patterns import resolve_by_name
from blockprune.core.precision import at_least_float32, forget_casts, no_autocast
from blockprune.core.sharded_tensor import is_sharded, whole
from blockprune.core.types import BlockScore, Where
from blockprune.model.gate_kinds import Gate, hard_concrete, n_of_m, soft_movement
from blockprune.model.masked_class import has_mask_methods, let_copy_rnn, own_class
from blockprune.model.masking import broadcastable
from blockprune.model.parameters import (
    ParameterRef,
    check_dense_gradients,
    check_loaded,
    check_not_inference,
    distinct,
    is_in_replica,
    parameter_order,
    parameter_refs,
    restore_order,
)
from blockprune.model.parametrization import MaskBlocks
from blockprune.model.running import uncompiled
from blockprune.model.selection import select
from blockprune.model.sharding import is_fully_sharded, reshard

__all__ = ["Gate", "add", "expected_sparsity", "hard_concrete", "n_of_m", "parameters", "penalty", "remove", "scores", "soft_movement"]

ROUNDING = 1e-4  # by which sums of probabilities may be above 1
M = TypeVar("M", bound=nn.Module)


class GateBlocks(nn.Module):
    """The parametrization that multiplies each block of a weight with its gate.

    Args:
        logits: ``[*grid.size]``.
        grid: the blocks.
        gate: the function of the logits.
        order: the names of the module's parameters in their original order, which torch loses when one is parametrized.
    """

    def __init__(self, logits: Tensor, grid: BlockGrid, gate: Gate, order: tuple[str, ...]) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.grid, self.gate, self.order = grid, gate, order

    def forward(self, weight: Tensor) -> Tensor:
        with no_autocast():
            logits = self.wide_logits()
            value = _checked_gate("value", self.gate.value(logits, self.training), logits)
            shape, factors = broadcastable(value, self.grid)
            weight = whole(weight)  # outside of a forward fully_shard leaves shards here
            # in half precision small factors, and the products that are the gradients of the logits, would be 0
            return (at_least_float32(weight).reshape(shape) * factors).to(weight.dtype).reshape(weight.shape)

    def wide_logits(self) -> Tensor:
        """All logits in at least float32; where ``fully_shard`` has sharded them, all ranks must call it."""
        return at_least_float32(whole(self.logits))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GateBlocks":
        """Convert the logits with the model, but not to half precision, in which small steps of an optimizer would be lost."""

        def convert(x: Tensor) -> Tensor:
            new = fn(x)
            return new if new.dtype == at_least_float32(new).dtype else at_least_float32(x).to(new.device)

        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script cannot compile the gates of a weight {self.grid.shape}; take them off first: bp.gates.remove(model)"
        )

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Store an assigned weight (``layer.weight = w``) as it is."""
        return weight

    def extra_repr(self) -> str:
        return f"shape={self.grid.shape}, block={self.grid.block}"


def add(model: M, *, where: Where, gate: Gate | None = None, initial: float = 2.0) -> M:
    """Change a model in place, so that every block that a rule selects is multiplied with a trainable gate; return it.

    The stored weights stay the same Parameters. The logits are new ones, which an optimizer must be given: ``bp.gates.parameters(model)``.
    Logits, gates and their gradients are in at least float32, also in a model of half precision.

    Args:
        model: any module, masked or not.
        where: which parameters, in what blocks.
        gate: the kind of gate; `hard_concrete` by default.
        initial: the logit of every gate.

    Raises:
        ValueError: a parameter that has gates already or that accelerate has offloaded, an ``initial`` that is not finite, a rule that
            matches nothing, a block that does not fit.
        TypeError: a ``gate`` that is no `Gate`, a weight that cannot be pruned or has sparse gradients.
            After any error the model is as it was before the call.

    Example:
        >>> model, x, y = nn.Linear(8, 4), torch.randn(64, 8), torch.randn(64, 4)
        >>> where = bp.linears((2, 2))
        >>> optimizer = torch.optim.Adam(bp.gates.add(model, where=where).parameters(), lr=0.05)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     ((model(x) - y).square().mean() + 10 * bp.gates.penalty(model, sparsity=0.75)).backward()
        ...     optimizer.step()
        >>> masks = bp.allocate.per_layer(bp.gates.scores(model), 0.75)
        >>> bp.sparsity(bp.read_masks(bp.apply_masks(bp.gates.remove(model), masks)))
        0.75
    """
    gate = hard_concrete() if gate is None else gate
    if not isinstance(gate, Gate):
        raise TypeError(f"gate is a {type(gate).__name__}; give a Gate, such as bp.gates.hard_concrete()")
    initial = check_number("initial", initial)
    check_model(model)
    if _is_sharded_model(model):
        raise ValueError(
            "gates cannot be added to a model that fully_shard or parallelize_module has sharded; change the model first and shard it "
            "afterwards, with fully_shard"
        )
    selected, refs = select(model, where), parameter_refs(model)
    if is_in_replica(model, [ref for ref, _ in selected.values()]):
        raise ValueError(
            "gates cannot be added to a model in DistributedDataParallel, which would not average their gradients; change the model first "
            "and wrap it afterwards"
        )
    check_loaded(model, [ref for ref, _ in selected.values()], "gates.add")
    check_not_inference(ref for ref, _ in selected.values())
    for name, (ref, _) in selected.items():
        check_dense_gradients(name, ref)
        if _gate_of(ref) is not None:
            raise ValueError(f"{name} {ref.shape}: this parameter has gates already; take them off with bp.gates.remove(model)")
    for name, (first, grid) in selected.items():
        stored = first.stored
        with torch.inference_mode(False):  # an inference tensor could not be trained
            logits = torch.full(grid.size, float(initial), device=stored.device, dtype=torch.promote_types(stored.dtype, torch.float32))
        shared: GateBlocks | None = None
        for ref in distinct(refs[name]):
            _own_class(ref.owner)
            order = parameter_order(ref.owner)
            shared = GateBlocks(logits, grid, gate, order) if shared is None else _of_other_owner(shared, order)
            shared.train(ref.owner.training)
            parametrize.register_parametrization(ref.owner, ref.attr, shared, unsafe=True)
            if isinstance(ref.owner, nn.RNNBase):
                let_copy_rnn(ref.owner)
    return model


def _is_sharded_model(model: nn.Module) -> bool:
    return any(map(is_fully_sharded, model.modules())) or any(map(is_sharded, model.parameters()))


def _of_other_owner(gates: GateBlocks, order: tuple[str, ...]) -> GateBlocks:
    """Gates with the same logits, for another module that uses a tied weight."""
    sharing = GateBlocks(gates.logits.detach(), gates.grid, gates.gate, order)
    sharing.logits = gates.logits
    return sharing


def remove(model: M, *, fold: bool = True) -> M:
    """Change a model in place, so that it has no gates; return it.

    Weights and modules have the types and names that they had before `add`.

    A model that ``fully_shard`` has sharded keeps its gates. Masks of all gated parameters make it a plain model::

        bp.apply_masks(model, bp.allocate.per_model(bp.gates.scores(model), sparsity))
        plain.load_state_dict(bp.distributed.full_state_dict(model))  # on rank 0: gates and masks are multiplied into the weights

    Args:
        model: a model with gates.
        fold: multiply the gates, as they are in evaluation mode, into the weights, so that the outputs in evaluation mode stay. With False
            the weights become those that are stored.

    Raises:
        ValueError: a model without gates, one that is sharded or in DistributedDataParallel; or, with ``fold``, another parametrization
            besides masks that computes a gated weight.

    Example:
        >>> model = bp.gates.add(nn.Linear(4, 2), where=bp.linears((2, 2)))
        >>> type(model).__name__, type(bp.gates.remove(model)).__name__
        ('ParametrizedLinear', 'Linear')
    """
    gated = _gated(model)
    if _is_sharded_model(model):
        raise ValueError(
            "gates cannot be removed from a model that fully_shard has sharded; apply masks of them, bp.apply_masks(model, "
            "bp.allocate.per_model(bp.gates.scores(model), sparsity)), and load bp.distributed.full_state_dict(model), which has both "
            "multiplied into the weights, into a plain model"
        )
    if is_in_replica(model, [ref for refs in gated.values() for ref in refs]):
        raise ValueError(
            "gates cannot be removed from a model in DistributedDataParallel, which holds their logits; keep the module alone (model = "
            "wrapped.module, del wrapped), call bp.gates.remove(model) and wrap it again"
        )
    check_not_inference(refs[0] for refs in gated.values())
    for name, refs in gated.items():
        others = [p for p in refs[0].parametrizations or () if not isinstance(p, (GateBlocks, MaskBlocks))]
        if fold and others:
            raise ValueError(
                f"{name} {refs[0].shape}: {type(others[0]).__name__} also computes this weight, so no stored weight can hold the gates; "
                "remove that parametrization first, or give fold=False"
            )
    with torch.no_grad():
        for refs in gated.values():
            stored, gates = refs[0].stored, _gates_of(refs[0])
            folded = gates.eval()(stored.detach()) if fold else None
            for ref in refs:
                _remove_gates(ref)
            if folded is not None:
                stored.copy_(folded)
    forget_casts()
    return model


def _remove_gates(ref: ParameterRef) -> None:
    gates, parametrizations = _gates_of(ref), cast(parametrize.ParametrizationList, ref.parametrizations)
    _own_class(ref.owner)
    if len(parametrizations) == 1:
        parametrize.remove_parametrizations(ref.owner, ref.attr, leave_parametrized=False)
        restore_order(ref.owner, gates.order)
    else:
        del parametrizations[next(i for i, p in enumerate(parametrizations) if p is gates)]


def _own_class(owner: nn.Module) -> None:
    """Give a parametrized module a class of its own, because torch lets a copy of it share the class that is about to change."""
    if parametrize.is_parametrized(owner) and not has_mask_methods(owner):
        owner.__class__ = own_class(type(owner))


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The logits of all gates of a model, for a group of the optimizer with its own learning rate and no weight decay.

    Raises:
        ValueError: a model without gates.

    Example:
        >>> model = bp.gates.add(nn.Linear(4, 2), where=bp.linears((2, 2)))
        >>> logits = bp.gates.parameters(model)
        >>> weights = [p for p in model.parameters() if not any(p is logit for logit in logits)]
        >>> optimizer = torch.optim.AdamW([{"params": weights}, {"params": logits, "lr": 0.1, "weight_decay": 0.0}])
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [2, 1]
    """
    reshard(model)
    return [_gates_of(refs[0]).logits for refs in _gated(model).values()]


def scores(model: nn.Module) -> dict[str, BlockScore]:
    """The logits of all gates as scores of the blocks, by parameter name: what is closed first is pruned first.

    Of a model that ``fully_shard`` has sharded, the logits are gathered, and so they are in `expected_sparsity` and `penalty`: all ranks
    must call it.

    Raises:
        ValueError: a model without gates.

    Example:
        >>> model = bp.gates.add(nn.Linear(4, 2), where=bp.linears((2, 2)), initial=0.5)
        >>> bp.gates.scores(model)["weight"].value
        tensor([[0.5000, 0.5000]])
    """
    gates = {name: _gates_of(refs[0]) for name, refs in _gated(model).items()}
    return {name: BlockScore(gate.wide_logits().detach().clone(), gate.grid) for name, gate in gates.items()}


@uncompiled
def expected_sparsity(model: nn.Module, *, costs: Mapping[str, float] | None = None) -> Tensor:
    """The expected fraction of the gated parameters' elements whose gate is 0, differentiable (Louizos et al. 1712.01312, eq. 12).

    ``torch.compile`` leaves this function and `penalty` out of the compiled graph, so ``fullgraph=True`` raises an error.

    Args:
        model: a model with gates.
        costs: what each parameter costs while all its blocks are kept, such as milliseconds, by name or pattern; then the result is the
            expected fraction of the costs that closed gates save. By default each parameter costs its number of elements.

    Raises:
        ValueError: a model without gates; a cost that is negative or not finite, or costs that are all 0; an ``open_probability`` of
            another shape than the logits, or outside [0, 1].
        TypeError: an ``open_probability`` that is no floating-point tensor.
        KeyError: a parameter without a cost, a cost of a parameter that has no gates.

    Example:
        >>> model = bp.gates.add(nn.Linear(4, 2), where=bp.linears((2, 2)), gate=bp.gates.soft_movement(), initial=1.0)
        >>> bp.gates.expected_sparsity(model).item()
        0.0
    """
    gates = {name: _gates_of(refs[0]) for name, refs in _gated(model).items()}
    cost_of = _costs(gates, costs)
    total = sum(cost_of.values())
    saved: list[Tensor] = []
    with no_autocast():
        for name, gate in gates.items():
            logits = gate.wide_logits()
            probability = _checked_gate("open_probability", gate.gate.open_probability(logits), logits)
            _check_probability(name, probability)
            closed = 1 - probability
            share = (closed * block_elements(gate.grid, device=closed.device)).sum() / gate.grid.elements
            saved.append(share * (cost_of[name] / total))
    return torch.stack([share.to(saved[0].device) for share in saved]).sum()


def _checked_gate(function: str, result: Any, logits: Tensor) -> Tensor:
    """What a function of a `Gate` returned; its values are not read, so that compiled models and vmap run."""
    if not isinstance(result, Tensor) or not result.is_floating_point() or result.layout != torch.strided:
        kind = f"{result.dtype}, {result.layout}" if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(f"gate.{function} returned {kind}; it must return a dense floating-point tensor of shape {tuple(logits.shape)}")
    if result.shape != logits.shape:
        raise ValueError(
            f"gate.{function} returned a tensor of shape {tuple(result.shape)} for logits of shape {tuple(logits.shape)}; it must return "
            "one number for each logit, in the same shape"
        )
    return result


def _check_probability(name: str, probability: Tensor) -> None:
    values = probability.detach()
    if not functorch_is_active() and not values.is_meta and values.numel() and not ((values >= -ROUNDING) & (values <= 1 + ROUNDING)).all():
        raise ValueError(
            f"{name}: gate.open_probability returned numbers from {values.min().item():.4g} to {values.max().item():.4g}; each must be "
            "from 0 to 1"
        )


def _costs(gates: Mapping[str, GateBlocks], costs: Mapping[str, float] | None) -> dict[str, float]:
    if costs is None:
        return {name: float(gate.grid.elements) for name, gate in gates.items()}
    cost_of = {
        name: check_number(f"costs[{name!r}]", cost, "a number from 0 on", lowest=0)
        for name, cost in resolve_by_name(costs, gates, what="costs").items()
    }
    if not sum(cost_of.values()):
        raise ValueError(f"costs={dict(costs)} must not all be 0")
    return cost_of


def penalty(model: nn.Module, *, sparsity: float, costs: Mapping[str, float] | None = None) -> Tensor:
    """``|expected sparsity - target|``, to add to the loss with a factor.

    Its slope does not vanish near the target, so that any factor above the loss's own slope meets the target exactly. For a Lagrangian with
    multipliers that learn (CoFi, Xia et al. 2204.00408, section 3.2), compose it from `expected_sparsity`::

        gap = bp.gates.expected_sparsity(model) - target
        loss = loss + multipliers[0] * gap + multipliers[1] * gap**2  # an optimizer with maximize=True has the multipliers

    Args:
        model: a model with gates.
        sparsity: the target, 0 to 1; a schedule may raise it step by step.
        costs: as in `expected_sparsity`; then the target is the fraction of the costs to save.

    Raises:
        ValueError, KeyError: as `expected_sparsity`; a target outside [0, 1].

    Example:
        >>> model = bp.gates.add(nn.Linear(4, 2), where=bp.linears((2, 2)), gate=bp.gates.soft_movement(), initial=1.0)
        >>> bp.gates.penalty(model, sparsity=0.75).item()
        0.75
    """
    sparsity = check_number("sparsity", sparsity, "a number from 0 (all gates open) to 1 (all closed)", lowest=0, highest=1)
    return (expected_sparsity(model, costs=costs) - sparsity).abs()


def _gate_of(ref: ParameterRef) -> GateBlocks | None:
    """The gates of a parameter, or None."""
    return next((p for p in ref.parametrizations or () if isinstance(p, GateBlocks)), None)


def _gates_of(ref: ParameterRef) -> GateBlocks:
    gates = _gate_of(ref)
    assert gates is not None
    return gates


def _gated(model: nn.Module) -> dict[str, list[ParameterRef]]:
    """The parameters that have gates, by canonical name, with all modules that use them."""
    gated = {name: distinct(refs) for name, refs in parameter_refs(model).items() if _gate_of(refs[0]) is not None}
    if not gated:
        raise ValueError(f"{type(model).__name__} has no gates; add them with bp.gates.add(model, where=...)")
    check_loaded(model, [refs[0] for refs in gated.values()], "bp.gates")
    return gated
