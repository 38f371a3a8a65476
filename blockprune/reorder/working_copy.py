"""A copy of a model that computes in float64 but stores its layers' weights in float32, and whose values can be exchanged."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockprune.core._compat import ConvNd, DispatchMode, is_cast, tree_leaves, tree_map_only
from blockprune.core._compat_hf import CACHE_ARGUMENTS
from blockprune.core.unit_permutation import UnitPermutation
from blockprune.model.calibration import Forward
from blockprune.model.copying import copy_model
from blockprune.model.experts import Experts, experts_in
from blockprune.model.inputs import check_not_nested
from blockprune.model.running import cuda_devices, disable_attention_fastpath, seeded, to_model_device
from blockprune.model.sharding import check_not_fully_sharded
from blockprune.reorder.permutation import permute
from blockprune.reorder.varied_values import (
    Change,
    integers_and_booleans,
    same_values,
    tensors_in_attributes,
    vary_inputs,
    vary_model,
)

SEED = 0  # every run of the model draws the same random numbers
ALIKE = 0.05  # the largest difference of two outputs, as a share of their norm
LINEAR_ELEMENTS = 1 << 22  # of a Linear's weight that are in float64 at one time

# those of the given model, or others, also or not in buffers; a number is the seed of integers and booleans beside varied parameters
Values = Literal["own", "varied", "varied parameters"] | int


@attrs.define(eq=False)
class WorkingCopy:
    """A copy of a model in evaluation mode, which runs an example in float64 if the model can.

    The weight of a Linear, an Embedding or a convolution stays in float32 and is converted while its layer runs, so the copy takes hardly
    more memory than the model. A model that reads such a weight elsewhere is copied in float64 as a whole.

    Args:
        source: the given model; it is not changed.
        model: the copy.
        example: what the model runs on.
        forward: (model, example) -> output.
        dtype: of the floating-point tensors of the example.
        values: which values the copy has at present.
        casts: whether casts in the model's own code, such as that of a norm to float32, are casts to float64 instead; not where that
            changes what the model computes, because it looks at the type or overflows.
        integers: the tensors of `integers_and_booleans` that can have other values (`find_integers`).

    Example:
        >>> from blockprune.model.calibration import default_forward
        >>> from blockprune.reorder.working_copy import WorkingCopy
        >>> copied = WorkingCopy.of(nn.Linear(2, 1), torch.ones(1, 2), default_forward)
        >>> copied.model.weight.dtype, copied.run()[0].dtype
        (torch.float32, torch.float64)
    """

    source: nn.Module
    model: nn.Module
    example: Any
    forward: Forward
    dtype: torch.dtype | None
    values: Values = "own"
    casts: bool = False
    integers: Sequence[Tensor] = ()

    @classmethod
    def of(cls, source: nn.Module, example: Any, forward: Forward) -> "WorkingCopy":
        """Copy a model and run the copy, to see in which precision it runs.

        Raises:
            ValueError: the model cannot be copied, cannot run the example, or returns no floating-point tensors.
        """
        check_not_fully_sharded(source, "find_axes runs a copy of the model", nor_dtensors=True)
        try:
            own = cls(source, _evaluation_copy(source), example, forward, None)
        except RuntimeError as error:  # for example, a module stores a tensor that it computed with a gradient
            raise ValueError(
                f"the model cannot be copied: {error}; find_axes runs a copy of the model, which copy.deepcopy makes"
            ) from error
        called: set[nn.Module] = set()
        try:
            with _noting_calls(own.model, called):
                outputs = own.run()
        except Exception as error:
            raise ValueError(f"the model cannot run the example: {error}; give what `forward` takes, by default model(example)") from error
        if not any(y.is_floating_point() or y.is_complex() for y in outputs):
            raise ValueError(
                "the model's output on the example has no floating-point tensors to compare; pass a forward= that returns some"
            )
        double = attrs.evolve(own, dtype=torch.float64)
        _convert(double.model, _layers_to_convert_when_called(double.model, called))
        for whole, double.casts in ((False, True), (False, False), (True, True), (True, False)):
            if whole and double.casts:
                double.model = _evaluation_copy(source).double()
            with contextlib.suppress(Exception):  # the model creates tensors of another dtype, or its device has no float64
                if all(map(_are_alike, double.run(), outputs)) or not double.casts:
                    return double
        return attrs.evolve(own, model=_evaluation_copy(source))

    def run(self, change: Change = same_values) -> list[Tensor]:
        """The tensors of the output on the example, without caches, after a change of the inputs; random numbers are the same each time.

        Those of the change have a generator of their own. The model draws from torch's, in which other threads may draw, too.
        """
        generator = torch.Generator().manual_seed(SEED)
        in_float64 = _CastsToFloat64() if self.casts else contextlib.nullcontext()  # type: ignore[no-untyped-call]
        with in_float64, disable_attention_fastpath(), seeded(SEED, cuda_devices(self.model)):
            example = tree_map_only(Tensor, lambda x: change(x, generator), to_model_device(self.model, self.example, self.dtype))
            output = self.forward(self.model, example)
        if isinstance(output, Mapping):
            output = {key: value for key, value in output.items() if not str(key).startswith(CACHE_ARGUMENTS)}
        return list(_tensors_in(output))

    def set_values(self, values: Values) -> None:
        """Give the copy its own values, or others; they are the same each time."""
        if values != self.values:
            self.values = "own"
            _copy_values(self.source, self.model)
            if values != "own":
                vary_model(self.model, buffers=values == "varied", generator=torch.Generator().manual_seed(SEED))
            if isinstance(values, int):
                generator = torch.Generator().manual_seed(values)
                with torch.no_grad():
                    for x in self.integers:
                        x.copy_(vary_inputs(x, generator))
            self.values = values

    def find_integers(self) -> list[Tensor]:
        """Note the integers and booleans that can have other values: the model then runs, and its outputs are as finite as before.

        Others may be indices, or masks without which a softmax has no finite value.

        Returns:
            The outputs with varied parameters alone.
        """
        self.set_values("varied parameters")
        before = self.run()

        def add(tensors: Sequence[Tensor]) -> None:
            accepted = self.integers
            self.set_values("own")
            self.integers = [*accepted, *tensors]
            self.set_values(SEED)
            with contextlib.suppress(Exception):
                if [bool(y.isfinite().all()) for y in self.run()] == [bool(y.isfinite().all()) for y in before]:
                    return
            self.integers = accepted
            if middle := len(tensors) // 2:
                add(tensors[:middle])
                add(tensors[middle:])

        if tensors := integers_and_booleans(self.model):
            add(tensors)
        self.set_values("own")
        return before

    @contextlib.contextmanager
    def permuted(self, plan: Sequence[UnitPermutation]) -> Iterator[None]:
        """Inside, the hidden units of the copy have another order.

        Raises:
            KeyError, ValueError: as `permute`.
        """
        permute(self.model, plan, inplace=True)
        try:
            yield
        finally:
            permute(self.model, [permutation.inverse for permutation in plan], inplace=True)


class _CastsToFloat64(DispatchMode):
    """Inside, casts to floating-point types are casts to float64, so that rounding errors do not look like changes."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_cast(operation) and (dtype := kwargs.get("dtype")) is not None and dtype.is_floating_point:
            kwargs = {**kwargs, "dtype": torch.float64}
        return operation(*args, **kwargs)


def is_mixing(module: nn.Module) -> bool:
    """Whether a layer computes each output unit from all of its inputs.

    Example:
        >>> from blockprune.reorder.working_copy import is_mixing
        >>> is_mixing(nn.Linear(4, 4)), is_mixing(nn.LayerNorm(4)), is_mixing(nn.Conv2d(4, 4, 3, groups=4))
        (True, False, False)
    """
    return isinstance(module, (nn.Linear, nn.Embedding)) or (isinstance(module, ConvNd) and module.groups == 1)


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, including those in dataclasses."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from _tensors_in([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])


def _are_alike(actual: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ by no more than rounding errors of half precision, so that a cast did not change what a model computes."""
    if actual.shape != expected.shape or not expected.is_floating_point():
        return actual.shape == expected.shape
    expected = expected.to(actual).nan_to_num()
    return bool((actual.nan_to_num() - expected).norm() <= ALIKE * expected.norm())


def _evaluation_copy(model: nn.Module) -> nn.Module:
    copied = copy_model(model).eval()
    for experts in experts_in(copied).values():
        experts.register_forward_pre_hook(_assign_tokens_in_turn)
    return copied


def _assign_tokens_in_turn(experts: nn.Module, args: Any) -> Any:
    """Replace the router's choice, so that every expert gets tokens, and the same ones in each run."""
    hidden, chosen, *weights = args
    count = len(cast(Experts, experts).experts())
    return hidden, torch.arange(chosen.numel(), device=chosen.device).view_as(chosen) % count, *weights


@contextlib.contextmanager
def _noting_calls(model: nn.Module, called: set[nn.Module]) -> Iterator[None]:
    """Inside, the mixing layers that are called are added to a set."""

    def note(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        check_not_nested(name, (args, kwargs), "replays of a layer")
        called.add(module)

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if is_mixing(module):
                stack.callback(module.register_forward_pre_hook(partial(note, name), with_kwargs=True).remove)
        yield


def _layers_to_convert_when_called(model: nn.Module, called: set[nn.Module]) -> list[nn.Module]:
    """The mixing layers with a plain weight that no other module has, unless that is such a layer, too."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), set()).add(module)
    plain = {module for module in called if "weight" in dict(module.named_parameters(recurse=False, remove_duplicate=False))}
    weights = {module: cast(Tensor, module.weight) for module in plain}
    return [m for m, w in weights.items() if w.is_floating_point() and w.itemsize < 8 and owners[id(w)] <= plain]


def _convert(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Convert a model to float64, except for the weights of some layers, which get float32 and are converted in each call."""
    stored = {id(layer.weight) for layer in layers}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if p.is_floating_point():
                p.data = p.data.to(torch.float32 if id(p) in stored else torch.float64)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.double())
    for layer in layers:
        layer.forward = partial(_forward_in_float64, layer, layer.forward)


def _forward_in_float64(layer: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What a layer returns with its weight and its inputs in float64."""
    weight = cast(nn.Parameter, layer.weight)
    args, kwargs = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, (args, kwargs))
    of_class = getattr(forward, "__func__", None)
    if of_class is nn.Linear.forward:
        (x,) = (*args, *kwargs.values())
        parts = weight.split(max(1, LINEAR_ELEMENTS // weight.shape[1]))
        y = torch.cat([F.linear(x, part.double()) for part in parts], -1)
        return y if layer.bias is None else y + cast(Tensor, layer.bias)
    if of_class is nn.Embedding.forward and layer.max_norm is None:
        return forward(*args, **kwargs).double()
    stored = weight.data
    weight.data = stored.double()
    try:
        return forward(*args, **kwargs)
    finally:
        weight.data = stored


def _copy_values(source: nn.Module, target: nn.Module) -> None:
    """Write the parameters, the buffers and the tensors in attributes of a model into those of a copy."""
    with torch.no_grad():
        for of, to in zip(source.modules(), target.modules(), strict=True):
            present: Mapping[str, Tensor] = {**dict(to.named_parameters(recurse=False)), **dict(to.named_buffers(recurse=False))}
            for name, value in (*of.named_parameters(recurse=False), *of.named_buffers(recurse=False)):
                if present[name].shape == value.shape:
                    present[name].copy_(value)
                else:  # the forward has assigned another buffer
                    setattr(to, name, value.to(present[name], copy=True))
            others = tensors_in_attributes(to)
            for name, values in tensors_in_attributes(of).items():
                if [x.shape for x in values] == [x.shape for x in others.get(name, ())]:  # a forward may have added some
                    for value, x in zip(values, others[name], strict=True):
                        x.copy_(value)
