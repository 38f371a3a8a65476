"""Widths that the configuration of a Hugging Face model can express: one number for all of its layers."""

import copy
import json
from collections.abc import Iterator, Mapping
from math import ceil, gcd
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blockprune.export.coupled_channels import HEAD_COUNTS, HEAD_SIZES, KEY_HEAD_COUNTS
from blockprune.model.hf_checkpoint import is_config, model_config

Shapes = Mapping[str, tuple[int, ...]]
Axis = tuple[str, int]  # a parameter and its axis
Path = tuple[str, ...]  # of a number in a configuration: text_config, intermediate_size

_MAX_PROBES = 64  # numbers of a configuration that are tried; each builds the model without memory


@attrs.frozen(eq=False)
class UniformWidths:
    """A model with uniform widths, and what they cost.

    Args:
        model: of the same class, built from the new configuration; where a layer was smaller, zeros fill it up.
        sizes: the numbers that changed in the configuration, as ``before -> after``.
        parameters: of the model with free widths, and of this one.
    """

    model: nn.Module
    sizes: Mapping[str, str]
    parameters: tuple[int, int]


def uniform_widths(smaller: Any, plain: Any) -> UniformWidths | None:
    """The smaller model with widths that its configuration can express, so that ``from_pretrained`` can load it.

    Which numbers of the configuration set which widths is not looked up by family: each number is changed, the model is built on the meta
    device, and the shapes are compared. The largest width of all layers becomes the one in the configuration, and the saved configuration
    must give back these shapes.

    Args:
        smaller: a Hugging Face model of which units were removed, each layer with a width of its own; it is not changed.
        plain: the model before, whose configuration is right.

    Returns:
        None if the model has no configuration, or the class cannot be built from it.
    """
    config = model_config(plain)
    if config is None:
        return None
    before, free = _shapes(plain), _shapes(smaller)
    if before == free or _built_shapes(type(plain), config) != before:
        return None
    config = _with_head_size(config)
    effects = _effects(type(plain), config, before, free)
    for new in _configurations(config, effects, free):
        if (target := _built_shapes(type(plain), new)) is None or target.keys() != free.keys():
            continue
        if any(size < smaller_size for name in free for size, smaller_size in zip(target[name], free[name], strict=True)):
            continue
        changed = {path: (_get(config, path), _get(new, path)) for path in effects if _get(config, path) != _get(new, path)}
        is_head = any(path[-1] in (*HEAD_COUNTS, *KEY_HEAD_COUNTS) for path in changed)
        final = new if is_head else _changed(plain.config, {path: size for path, (_, size) in changed.items()})
        with torch.random.fork_rng(devices=[]):
            model = _filled(smaller, type(plain)(final), target, effects)
        if hasattr(plain, "generation_config"):
            model.generation_config = copy.deepcopy(plain.generation_config)
        sizes = {".".join(path): f"{old} -> {size}" for path, (old, size) in changed.items()}
        return UniformWidths(model, sizes, (_count(smaller), _count(model)))
    return None


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def _built_shapes(kind: Any, config: Any) -> Shapes | None:
    """The shapes of the model that ``from_pretrained`` would build from the saved configuration; None if it cannot."""
    try:
        saved = type(config).from_dict(json.loads(config.to_json_string()))
        with torch.device("meta"):
            return _shapes(kind(saved))
    except Exception:  # the classes check their configurations with any exception
        return None


def _with_head_size(config: Any) -> Any:
    """A copy of the configuration with the size of a head, which otherwise follows from the number of heads."""
    config = copy.deepcopy(config)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if isinstance(heads, int) and isinstance(width, int) and getattr(config, "head_dim", None) is None:
        config.head_dim = width // heads
    return config


def _numbers(config: Any, prefix: Path = ()) -> Iterator[tuple[Path, int]]:
    for name, value in vars(config).items():
        if is_config(value):
            yield from _numbers(value, (*prefix, name))
        elif type(value) is int and value > 1 and not name.startswith("_") and name not in HEAD_SIZES:
            yield (*prefix, name), value


def _effects(kind: Any, config: Any, before: Shapes, free: Shapes) -> dict[Path, dict[Axis, int]]:
    """For each number of the configuration on which changed widths depend: the axes that it sets, with elements per unit of the number."""
    differing = [size for name in before for size, new in zip(before[name], free[name], strict=True) if size != new]
    candidates = [(path, value) for path, value in _numbers(config) if any(size % value == 0 for size in differing)]
    effects = {}
    for path, value in candidates[:_MAX_PROBES]:
        probe = value // 2 if value % 2 == 0 else 1
        shapes = _built_shapes(kind, _changed(config, {path: probe}))
        if shapes is None or shapes.keys() != before.keys():
            continue
        axes = {
            (name, axis): (size - new) // (value - probe)
            for name in before
            for axis, (size, new) in enumerate(zip(before[name], shapes[name], strict=True))
            if size != new
        }
        if any(free[name][axis] != before[name][axis] for name, axis in axes):
            effects[path] = axes
    return effects


def _configurations(config: Any, effects: Mapping[Path, Mapping[Axis, int]], free: Shapes) -> Iterator[Any]:
    """Configurations with the smallest widths that hold all layers, then with more heads, until a class accepts one; last, with all."""
    needed = {path: max(ceil(free[name][axis] / unit) for (name, axis), unit in axes.items()) for path, axes in effects.items()}
    heads = [path for path in effects if path[-1] in (*HEAD_COUNTS, *KEY_HEAD_COUNTS)]
    count = gcd(*(_get(config, path) for path in heads)) if heads else 1
    steps = {path: _get(config, path) // count for path in heads}  # so that queries per key stay the same
    first = max((ceil(needed[path] / step) for path, step in steps.items()), default=count)
    for groups in range(first, count + 1):
        yield _changed(config, needed | {path: groups * step for path, step in steps.items()})
    yield config


def _changed(config: Any, values: Mapping[Path, int]) -> Any:
    new = copy.deepcopy(config)
    for (*parents, name), value in values.items():
        setattr(_get(new, tuple(parents)), name, value)
    return new


def _get(config: Any, path: Path) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _filled(smaller: nn.Module, model: Any, target: Shapes, effects: Mapping[Path, Mapping[Axis, int]]) -> Any:
    """The model, of the target's shapes, with the tensors of the smaller one, and zeros where it has less; in place."""
    units = {
        axis: unit for path, axes in effects.items() if path[-1] not in (*HEAD_COUNTS, *KEY_HEAD_COUNTS) for axis, unit in axes.items()
    }
    state = {}
    for name, stored in smaller.state_dict().items():
        state[name] = stored
        for axis, size in enumerate(target[name]):
            parts = units.get((name, axis), 1)  # such as gate and up in one weight
            state[name] = torch.cat([_lengthened(part, axis, size // parts) for part in state[name].chunk(parts, axis)], axis)
    reference = next(iter(smaller.parameters()))
    model.to(device=reference.device, dtype=reference.dtype)
    model.load_state_dict(state)
    return model.train(smaller.training)


def _lengthened(tensor: Tensor, axis: int, size: int) -> Tensor:
    missing = list(tensor.shape)
    missing[axis] = size - missing[axis]
    return torch.cat((tensor, tensor.new_zeros(missing)), axis)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
