"""Experts that Hugging Face keeps in one tensor of three axes, as Linears: each token goes through those that its router chose."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Experts", "experts_in", "is_stacked", "routing", "split", "stacked"]


def is_stacked(module: Any) -> bool:
    """Whether a module holds its experts in tensors ``[experts, ...]``, as transformers 5 has them (``use_experts_implementation``).

    Example:
        >>> from blockprune.experts import is_stacked
        >>> is_stacked(nn.Linear(2, 2))
        False
    """
    known = all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "has_bias", "is_transposed", "is_concatenated"))
    return known and isinstance(down := getattr(module, "down_proj", None), Tensor) and down.ndim == 3


class Experts(nn.Module):
    """A module of experts whose class this became (`split`): its children are ``"0"``, ``"1"``, ..., all else is as it was.

    Example:
        >>> from blockprune.experts import Experts
        >>> isinstance(nn.Linear(2, 2), Experts)
        False
    """

    origin: type[Any]  # the class that it had, which knows how its gate works
    has_gate: bool
    is_concatenated: bool
    act_fn: nn.Module

    def numbered(self) -> list[nn.Module]:
        """The experts, by number."""
        return [child for name, child in self.named_children() if name.isdecimal()]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, /) -> Tensor:
        """``[tokens, k]``, and of each token its experts and what each counts, ``[tokens, n]`` -> ``[tokens, k]``."""
        output = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if str(number) not in self._modules:  # the number that says: of no expert here
                continue
            expert: Any = self._modules[str(number)]
            token, at = torch.where(top_k_index == number)
            x = hidden_states[token]
            if self.has_gate:
                both = expert.gate_proj(x), expert.up_proj(x)
                x = self.origin._apply_gate(self, torch.cat(both, -1) if self.is_concatenated else torch.stack(both, -1).flatten(-2))
            else:
                x = self.act_fn(expert.up_proj(x))
            output.index_add_(0, token, (expert.down_proj(x) * top_k_weights[token, at, None]).to(output.dtype))
        return output


def experts_in(model: nn.Module) -> dict[str, Experts]:
    """All modules of experts in a model, by name.

    Example:
        >>> from blockprune.experts import experts_in
        >>> experts_in(nn.Linear(2, 2))
        {}
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


@contextlib.contextmanager
def routing(model: nn.Module, chosen: dict[str, list[Any]], *, again: bool = False) -> Iterator[None]:
    """While a model runs, note what its routers choose, call by call; or send tokens where they went then, whatever is chosen now.

    Example:
        >>> from blockprune.experts import routing
        >>> with routing(nn.Linear(2, 2), chosen := {}):
        ...     pass
        >>> chosen
        {}
    """
    noted = {name: iter(calls) for name, calls in chosen.items()} if again else {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> Any:
            if again:
                return args[0], *next(noted[name])
            chosen.setdefault(name, []).append(args[1:])
            return None

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in experts_in(model).items():
            stack.callback(module.register_forward_pre_hook(note(name), prepend=True).remove)
        yield


def split(module: Any) -> None:
    """Turn a module with stacked experts into `Experts`, in place: hooks and attributes stay.

    Example:
        >>> from blockprune.experts import split
        >>> class Stacked(nn.Module):
        ...     has_gate, is_transposed, act_fn = False, False, torch.relu
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up_proj, self.down_proj = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 4, 3))
        >>> experts = Stacked()
        >>> split(experts)
        >>> [name for name, _ in experts.named_parameters()][:2]
        ['0.up_proj.weight', '0.down_proj.weight']
    """
    parts = _parts(module)
    held = {name: module._parameters.pop(name) for name in _tensors(module)}

    def own(tensor: str, number: int, rows: slice) -> nn.Parameter | None:
        if tensor not in held:
            return None
        mine = _view(module, held[tensor].detach(), number)[rows].clone(memory_format=torch.contiguous_format)
        return nn.Parameter(mine, requires_grad=held[tensor].requires_grad)

    for number in range(len(held["down_proj"])):
        expert = nn.ModuleDict()
        for name, (tensor, rows) in parts.items():
            weight, bias = own(tensor, number, rows), own(f"{tensor}_bias", number, rows)
            assert weight is not None
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            linear.weight, linear.bias = weight, bias  # type: ignore[assignment]  # None where there is none
            expert[name] = linear
        module.add_module(str(number), expert.train(module.training))
    module.origin, module.__class__ = type(module), Experts


def stacked(module: Any, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What a state dict of the `Experts` that a module became says of the module's own tensors.

    Example:
        >>> from blockprune.experts import stacked
        >>> module = nn.Module()
        >>> module.has_gate, module.is_transposed = False, False
        >>> module.up_proj, module.down_proj = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 4, 3))
        >>> state = {f"{e}.{name}.weight": p[e] for e in range(2) for name, p in module.named_parameters()}
        >>> torch.equal(stacked(module, state, "")["down_proj"], module.down_proj)
        True
    """
    found = {name: torch.empty_like(module._parameters[name]) for name in _tensors(module)}
    for name, (tensor, rows) in _parts(module).items():
        for end, kind in (("", "weight"), ("_bias", "bias")):
            for number, _ in enumerate(found.get(f"{tensor}{end}", [])):
                _view(module, found[f"{tensor}{end}"], number)[rows] = state[f"{prefix}{number}.{name}.{kind}"]
    return {f"{prefix}{name}": x for name, x in found.items()}


def _tensors(module: Any) -> list[str]:
    return [name for name in module._parameters if name.removesuffix("_bias") in {"gate_up_proj", "up_proj", "down_proj"}]


def _parts(module: Any) -> dict[str, tuple[str, slice]]:
    """Of which tensor, and of which of its rows, each Linear of an expert is made."""
    down = {"down_proj": ("down_proj", slice(None))}
    if not module.has_gate:
        return {"up_proj": ("up_proj", slice(None)), **down}
    inner = module.down_proj.shape[1 if module.is_transposed else 2]
    gate, up = (slice(inner), slice(inner, None)) if module.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
    return {"gate_proj": ("gate_up_proj", gate), "up_proj": ("gate_up_proj", up), **down}


def _view(module: Any, tensor: Tensor, number: int) -> Tensor:
    """One expert's weight or bias, as a Linear has it."""
    one = tensor[number]
    return one.mT if module.is_transposed and one.ndim == 2 else one
