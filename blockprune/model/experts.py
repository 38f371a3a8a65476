"""Mixture-of-experts modules that keep all experts in one tensor (Hugging Face), and the same modules with an nn.Linear per projection."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.core._compat_hf import (
    EXPERT_ATTRIBUTES,
    apply_expert_gate,
    experts_are_concatenated,
    experts_are_gated,
    experts_are_transposed,
)

__all__ = ["Experts", "experts_in", "is_stacked", "record_routing", "stack_state_dict", "unstack_experts"]


def is_stacked(module: Any) -> bool:
    """Whether a module keeps its experts in tensors ``[experts, ...]``, as in transformers 5 (``use_experts_implementation``).

    Example:
        >>> from blockprune.model.experts import is_stacked
        >>> is_stacked(nn.Linear(2, 2))
        False
    """
    has_attributes = all(hasattr(module, name) for name in EXPERT_ATTRIBUTES)
    return has_attributes and isinstance(down := getattr(module, "down_proj", None), Tensor) and down.ndim == 3


class Experts(nn.Module):
    """The class that `unstack_experts` gives to a module: its experts are the children ``"0"``, ``"1"`` and so on.

    Each expert is an nn.ModuleDict of the Linears ``gate_proj`` (if it has a gate), ``up_proj`` and ``down_proj``.

    Example:
        >>> from blockprune.model.experts import Experts
        >>> isinstance(nn.Linear(2, 2), Experts)
        False
    """

    original_class: type[Any]  # the class before `unstack_experts`; it computes the gate
    act_fn: nn.Module

    def experts(self) -> list[nn.Module]:
        """The experts in the order of their numbers."""
        return [child for name, child in self.named_children() if name.isdecimal()]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, /) -> Tensor:
        """The weighted sum of the outputs of each token's experts.

        Args:
            hidden_states: ``[tokens, k]``.
            top_k_index: ``[tokens, n]``, the numbers of each token's experts. A number without an expert adds nothing: with expert
                parallelism it stands for the experts of other devices.
            top_k_weights: ``[tokens, n]``, the weights of their outputs.
        """
        output, experts = torch.zeros_like(hidden_states), dict(self.named_children())
        for number in top_k_index.unique().tolist():
            if str(number) not in experts:
                continue
            expert: Any = experts[str(number)]
            token, choice = torch.where(top_k_index == number)
            x = hidden_states[token]
            if experts_are_gated(self):
                gate, up = expert.gate_proj(x), expert.up_proj(x)
                joined = torch.cat([gate, up], -1) if experts_are_concatenated(self) else torch.stack([gate, up], -1).flatten(-2)
                x = apply_expert_gate(self, self.original_class, joined)
            else:
                x = self.act_fn(expert.up_proj(x))
            output.index_add_(0, token, (expert.down_proj(x) * top_k_weights[token, choice, None]).to(output.dtype))
        return output


def experts_in(model: nn.Module) -> dict[str, Experts]:
    """All `Experts` in a model, by name.

    Example:
        >>> from blockprune.model.experts import experts_in
        >>> experts_in(nn.Linear(2, 2))
        {}
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


@contextlib.contextmanager
def record_routing(model: nn.Module, routes: dict[str, list[Any]], *, replay: bool = False) -> Iterator[None]:
    """While a model runs, record the experts and weights that its routers choose; or replay recorded ones.

    Args:
        model: a model with `Experts`.
        routes: for each module of experts by name, ``top_k_index`` and ``top_k_weights`` of all its calls. Recording appends to them.
        replay: call the experts with the recorded routes, in order, instead of those that the router chooses now.

    Example:
        >>> from blockprune.model.experts import record_routing
        >>> with record_routing(nn.Linear(2, 2), routes := {}):
        ...     pass
        >>> routes
        {}
    """
    recorded = {name: iter(calls) for name, calls in routes.items()} if replay else {}

    def routing_hook(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> Any:
            if replay:
                return args[0], *next(recorded[name])
            routes.setdefault(name, []).append(args[1:])
            return None

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in experts_in(model).items():
            stack.callback(module.register_forward_pre_hook(routing_hook(name), prepend=True).remove)
        yield


def unstack_experts(module: Any) -> None:
    """Change a module with stacked experts into `Experts`, in place; its hooks and attributes stay.

    Example:
        >>> from blockprune.model.experts import unstack_experts
        >>> class Stacked(nn.Module):
        ...     has_gate, is_transposed, act_fn = False, False, torch.relu
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up_proj, self.down_proj = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 4, 3))
        >>> experts = Stacked()
        >>> unstack_experts(experts)
        >>> [name for name, _ in experts.named_parameters()][:2]
        ['0.up_proj.weight', '0.down_proj.weight']
    """
    projections, tensors = _projections(module), _stacked_tensors(module)
    for name in tensors:
        delattr(module, name)

    def parameter(tensor: str, number: int, rows: slice) -> nn.Parameter | None:
        if tensor not in tensors:
            return None
        values = _expert_view(module, tensors[tensor].detach(), number)[rows].clone(memory_format=torch.contiguous_format)
        return nn.Parameter(values, requires_grad=tensors[tensor].requires_grad)

    for number in range(len(tensors["down_proj"])):
        expert = nn.ModuleDict()
        for name, (tensor, rows) in projections.items():
            weight, bias = parameter(tensor, number, rows), parameter(f"{tensor}_bias", number, rows)
            assert weight is not None
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            linear.weight, linear.bias = weight, bias  # type: ignore[assignment]  # a Linear without bias has None
            expert[name] = linear
        module.add_module(str(number), expert.train(module.training))
    module.original_class, module.__class__ = type(module), Experts


def stack_state_dict(module: Any, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a module with stacked experts, from the state dict of a model in which it is `Experts`.

    Args:
        module: the module before `unstack_experts`.
        state: the state dict of the model with `Experts`.
        prefix: the module's name in the model and a dot, or "" for the model itself.

    Example:
        >>> from blockprune.model.experts import stack_state_dict
        >>> module = nn.Module()
        >>> module.has_gate, module.is_transposed = False, False
        >>> module.up_proj, module.down_proj = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 4, 3))
        >>> state = {f"{e}.{name}.weight": p[e] for e in range(2) for name, p in module.named_parameters()}
        >>> torch.equal(stack_state_dict(module, state, "")["down_proj"], module.down_proj)
        True
    """
    stacked = {name: torch.empty_like(p) for name, p in _stacked_tensors(module).items()}
    for name, (tensor, rows) in _projections(module).items():
        for suffix, kind in (("", "weight"), ("_bias", "bias")):
            for number, _ in enumerate(stacked.get(f"{tensor}{suffix}", [])):
                _expert_view(module, stacked[f"{tensor}{suffix}"], number)[rows] = state[f"{prefix}{number}.{name}.{kind}"]
    return {f"{prefix}{name}": tensor for name, tensor in stacked.items()}


def _stacked_tensors(module: Any) -> dict[str, nn.Parameter]:
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    return {name: p for name, p in parameters if name.removesuffix("_bias") in {"gate_up_proj", "up_proj", "down_proj"}}


def _projections(module: Any) -> dict[str, tuple[str, slice]]:
    """For each Linear of an expert: the stacked tensor that holds its weight, and the rows of the weight in it."""
    down = {"down_proj": ("down_proj", slice(None))}
    if not experts_are_gated(module):
        return {"up_proj": ("up_proj", slice(None)), **down}
    inner = module.down_proj.shape[1 if experts_are_transposed(module) else 2]
    gate, up = (slice(inner), slice(inner, None)) if experts_are_concatenated(module) else (slice(0, None, 2), slice(1, None, 2))
    return {"gate_proj": ("gate_up_proj", gate), "up_proj": ("gate_up_proj", up), **down}


def _expert_view(module: Any, stacked: Tensor, number: int) -> Tensor:
    """A view of one expert's weight ``[outputs, inputs]`` or bias ``[outputs]``."""
    view = stacked[number]
    return view.mT if experts_are_transposed(module) and view.ndim == 2 else view
