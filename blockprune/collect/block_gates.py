"""Derivatives of a batch's loss with respect to gates. A gate is a factor on the weights of one block, equal to 1."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockprune.core._compat import disable_checkpointing, tree_leaves, tree_map
from blockprune.core.grid import BlockGrid, expand
from blockprune.core.precision import double
from blockprune.model.calibration import Calibration, scalar_loss
from blockprune.model.inputs import InputHooks, check_not_nested
from blockprune.model.masking import mask_blocks
from blockprune.model.parameters import ParameterRef, stored_aliases, under_all_names
from blockprune.statistics import GateDerivatives

T = TypeVar("T")
GateValues = Mapping[str, Tensor]  # by parameter, [*grid.size]


def gate_derivatives(  # noqa: PLR0917 (it has one caller)
    model: nn.Module,
    grids: Mapping[str, BlockGrid],
    refs: Mapping[str, ParameterRef],
    hooks: InputHooks,
    batch: Any,
    calibration: Calibration,
    *,
    needs: Sequence[str],
) -> dict[str, GateDerivatives]:
    """The derivatives of one batch, by parameter name. Each is computed when it is first called.

    Memory grows with samples x blocks, not with samples x weights.

    Args:
        model: any module.
        grids: the blocks of each parameter.
        refs: the place of each parameter in the model.
        hooks: the modules whose calls show that a parameter is used.
        batch: one batch.
        calibration: the forward and the loss.
        needs: names of the statistics that need the derivatives, for error messages.

    Raises:
        RuntimeError: an operation that vmap cannot run.

    Example:
        >>> from blockprune.collect.block_gates import gate_derivatives
        >>> from blockprune.model.inputs import input_hooks
        >>> from blockprune.model.parameters import parameter_refs
        >>> model, x = nn.Linear(4, 2, bias=False), torch.ones(3, 4)
        >>> calibration, refs = bp.Calibration([x], loss=lambda output, batch: output.sum()), parameter_refs(model)
        >>> grids, hooks = {"weight": bp.BlockGrid((2, 4), (2, 2))}, input_hooks(model, refs)
        >>> gates = gate_derivatives(model, grids, {"weight": refs["weight"][0]}, hooks, x, calibration, needs=[])
        >>> gates["weight"].per_sample().shape          # one gate per block, one gradient per sample
        torch.Size([3, 1, 2])
    """
    gated = _GatedModel(model, grids, refs, hooks, batch, calibration, needs)
    return {name: gated.derivatives(name) for name in grids}


class NoGradientError(RuntimeError):
    """Autograd cannot differentiate the loss of a model with respect to gates."""


class _GatedModel:
    """A model whose chosen weights are multiplied by gates, and the loss of one batch as a function of them."""

    def __init__(  # noqa: PLR0917 (called once)
        self,
        model: nn.Module,
        grids: Mapping[str, BlockGrid],
        refs: Mapping[str, ParameterRef],
        hooks: InputHooks,
        batch: Any,
        calibration: Calibration,
        needs: Sequence[str],
    ) -> None:
        strided = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.is_nested and x.layout == torch.strided]
        check_not_nested(next(iter(grids)), strided, "gradients of gates")  # those with jagged rows run with per_sample="loop"
        self.model, self.grids, self.refs, self.hooks = model, grids, refs, hooks
        self.batch, self.calibration, self.needs = batch, calibration, needs
        self.aliases = stored_aliases(model)
        self.called: set[str] = set()  # parameters whose layer the forward calls
        self.weights = {name: _without_pruned(ref) for name, ref in refs.items()}
        self.ones = {name: torch.ones(grids[name].size, dtype=w.dtype, device=w.device) for name, w in self.weights.items()}
        self.frozen = {name: p.detach() for name, p in model.named_parameters()}  # so that autograd records the gates only
        self.buffers = dict(model.named_buffers())
        self.buffer_names: dict[str, list[str]] = {name: [] for name in self.buffers}
        first = {id(buffer): name for name, buffer in self.buffers.items()}
        for name, buffer in model.named_buffers(remove_duplicate=False):
            self.buffer_names[first[id(buffer)]].append(name)
        self.curvatures: dict[tuple[int, int], dict[str, Tensor]] = {}  # by probes and seed

    def derivatives(self, name: str) -> GateDerivatives:
        return GateDerivatives(
            per_sample=lambda: self.per_sample[name],
            hessian_grad=lambda: self.hessian_times_gradient[name],
            curvature=lambda probes, seed: self.curvature(probes, seed)[name],
            flow=lambda: self.flow[name],
            called=lambda: name in self.called,
            reached=lambda: name in self.reached,
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return scalar_loss(self.calibration, self.calibration.forward(model, batch), batch, self.needs)

    def run(
        self,
        gates: GateValues,
        function: Callable[[nn.Module], T],
        *,
        absolute: bool = False,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> T:
        """``function(model)`` while the weights are multiplied by their gates; with ``absolute``, while all parameters are positive.

        The model has copies of its buffers, so that each run begins with the same ones. Within torch.func they must be arguments: it lets
        a function write into these, and not into tensors that it captures.
        """
        weights = {name: w.abs() if absolute else w for name, w in self.weights.items()}
        frozen = {name: p.abs() if absolute else p for name, p in self.frozen.items()}
        gated = {self.refs[name].stored_name: weights[name] * expand(gate, self.grids[name]) for name, gate in gates.items()}
        replacements = {f"model.{name}": x for name, x in under_all_names({**frozen, **gated}, self.aliases).items()}
        copies = {name: x.clone() for name, x in (self.buffers if buffers is None else buffers).items()}
        replacements |= {f"model.{alias}": copies[name] for name, names in self.buffer_names.items() for alias in names}
        with contextlib.ExitStack() as stack:
            stack.enter_context(disable_checkpointing())
            for name, _, module in self.hooks:
                stack.callback(module.register_forward_hook(lambda *_, name=name: self.called.add(name)).remove)
            result: T = functional_call(_Function(self.model), replacements, (function,), tie_weights=False)
            return result

    def gradient(self, total: Callable[[nn.Module], Tensor], *, absolute: bool = False) -> dict[str, Tensor | None]:
        """The gradient of a number that is computed by the model; None for the gates that it does not depend on."""
        gates = self._differentiable_gates()

        def gradients(model: nn.Module) -> Sequence[Tensor | None]:
            value = total(model)
            try:
                return torch.autograd.grad(value, list(gates.values()), allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise NoGradientError(
                    f"gates of this model have no gradient: {str(error).strip().splitlines()[0]}. If an autograd.Function in it "
                    "differentiates by itself, as gradient checkpointing of another library does, turn that off, or use a metric of "
                    "activations, such as metric.wanda"
                ) from error

        with torch.enable_grad():
            return dict(zip(gates, self.run(gates, gradients, absolute=absolute), strict=True))

    def _differentiable_gates(self) -> dict[str, Tensor]:
        return {name: ones.clone().requires_grad_() for name, ones in self.ones.items()}

    def _or_zeros(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(self.ones[name]) if g is None else g for name, g in gradients.items()}

    @cached_property
    def per_sample(self) -> dict[str, Tensor]:
        """The gradient of each sample's loss, ``[samples, *size]``."""

        def loss(sample: Any, model: nn.Module) -> Tensor:
            return self.loss(model, tree_map(lambda x, whole: x[None] if _has_samples(whole) else x, sample, self.batch))

        def sample_loss(gates: GateValues, buffers: Mapping[str, Tensor], sample: Any) -> Tensor:
            return self.run(gates, partial(loss, sample), buffers=buffers)

        count = _samples(self.batch)
        if not count:
            return {name: ones.new_zeros(0, *ones.shape) for name, ones in self.ones.items()}
        if self.calibration.per_sample == "loop":
            samples = [_sample(self.batch, i) for i in range(count)]
            gradients = [self._or_zeros(self.gradient(partial(loss, sample))) for sample in samples]
            return {name: torch.stack([g[name] for g in gradients]) for name in self.ones}
        axes = tree_map(lambda x: 0 if _has_samples(x) else None, self.batch)
        over_samples = partial(vmap, in_dims=(None, None, axes), randomness="different", chunk_size=self.calibration.chunk_size)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # an operation without a batching rule
                return over_samples(grad(sample_loss))(self.ones, self.buffers, self.batch)  # type: ignore[no-any-return]
        except RuntimeError as error:
            try:  # without vmap the error of a loss that is no tensor says more
                self.gradient(partial(loss, _sample(self.batch, 0)))
            except NoGradientError:
                raise
            except RuntimeError:
                pass
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(f"vmap cannot run this model: {reason}. Pass per_sample='loop', which is slower but equal") from error

    @cached_property
    def hessian_times_gradient(self) -> dict[str, Tensor]:
        largest = torch.zeros((), device="cpu")

        def unit_gradient(gradients: GateValues) -> GateValues:  # products with a tiny gradient would vanish in float32
            nonlocal largest
            largest = torch.stack([g.detach().abs().max() for g in gradients.values()]).max()
            return {name: g.detach() / torch.where(largest > 0, largest, 1) for name, g in gradients.items()}

        return {name: double(product) * largest for name, product in self._hessian_times(unit_gradient).items()}

    def _hessian_times(self, vector: Callable[[GateValues], GateValues]) -> dict[str, Tensor]:
        """The Hessian times a vector, which is a function of the gradient."""
        gates = self._differentiable_gates()

        def products(model: nn.Module) -> Sequence[Tensor | None]:
            first = torch.autograd.grad(self.loss(model, self.batch), list(gates.values()), create_graph=True, allow_unused=True)
            gradients = self._or_zeros(dict(zip(gates, first, strict=True)))
            v = vector(gradients)
            slope = torch.stack([(gradients[name] * v[name]).sum() for name in gates]).sum()
            if not slope.requires_grad:  # the loss is linear
                return [None] * len(gates)
            return torch.autograd.grad(slope, list(gates.values()), allow_unused=True)

        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
            return self._or_zeros(dict(zip(gates, self.run(gates, products), strict=True)))

    def curvature(self, probes: int, seed: int) -> dict[str, Tensor]:
        """``v * (H v)`` for random signs v, ``[probes, *size]``; computed once."""
        if (probes, seed) not in self.curvatures:
            self.curvatures[probes, seed] = self._curvature(probes, seed)
        return self.curvatures[probes, seed]

    def _curvature(self, probes: int, seed: int) -> dict[str, Tensor]:
        """``v * (H v)`` for random signs v, ``[probes, *size]``."""
        generator = torch.Generator().manual_seed(seed)
        products: list[dict[str, Tensor]] = []
        for _ in range(probes):
            v = {name: (torch.randint(2, g.shape, generator=generator, device="cpu") * 2 - 1).to(g) for name, g in self.ones.items()}
            products.append({name: v[name] * hv for name, hv in self._hessian_times(partial(_always, v)).items()})
        return {name: torch.stack([product[name] for product in products]) for name in self.ones}

    @cached_property
    def flow(self) -> dict[str, Tensor]:
        """The gradient of the summed output of the network of ``|weights|`` on an input of ones."""
        flow = self._or_zeros(self.gradient(self._summed_output, absolute=True))
        if too_large := [name for name, x in flow.items() if not x.isfinite().all()]:
            raise ValueError(
                f"{too_large[0]} {self.grids[too_large[0]].shape}: 'gate_flow' overflows {str(flow[too_large[0]].dtype)[6:]}, because it "
                "multiplies the absolute values of all weights on a path through the network; convert the model to float64: model.double()"
            )
        return flow

    def _summed_output(self, model: nn.Module) -> Tensor:
        ones = tree_map(_sample_of_ones, self.batch)
        return _main_output(self.calibration.forward(model, ones))

    @cached_property
    def reached(self) -> set[str]:
        """The parameters that a gradient reaches: of the loss, or of the flow if no derivative of the loss was computed."""
        of_loss = bool(self.curvatures or {"per_sample", "hessian_times_gradient"} & vars(self).keys())
        total = partial(self.loss, batch=self.batch) if of_loss else self._summed_output
        gradients = self.gradient(total, absolute=not of_loss)
        return {name for name, g in gradients.items() if g is not None}


class _Function(nn.Module):
    """A function of a model as a module, so that `functional_call` replaces the model's parameters until the function returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.model)


def _always(value: T, gradients: Any) -> T:
    return value


def _without_pruned(ref: ParameterRef) -> Tensor:
    """The stored weight, with zeros in the pruned blocks that no gradient reaches: NaN there would make the gradient of the gate NaN."""
    weight, mask = ref.stored.detach(), ref.mask
    if mask is None:
        return weight
    keep = mask.keep if mask.reached is None else mask.keep | mask.reached
    return mask_blocks(weight, keep.to(weight.device), mask.grid)


def _sample_of_ones(x: Any) -> Any:
    return x.new_ones(1, *x.shape[1:]) if _has_samples(x) else torch.ones_like(x) if isinstance(x, Tensor) else x


def _main_output(output: Any) -> Tensor:
    """What a model computes from its inputs: the logits or the last hidden states, and not the loss."""
    named = dict(output) if isinstance(output, Mapping) else vars(output) if is_dataclass(output) else None
    if fields := getattr(output, "_fields", None):  # of a named tuple
        named = dict(zip(fields, output, strict=True))
    if named is None:
        leaves = [x for x in tree_leaves(output) if _is_output(x)][:1]
    elif main := [named[name] for name in ("logits", "last_hidden_state") if _is_output(named.get(name))]:
        leaves = main[:1]
    else:
        leaves = [x for name, value in named.items() if name != "loss" for x in tree_leaves(value) if _is_output(x)]
    if not leaves:
        raise TypeError(
            f"synflow sums the model's output, but the forward gave a {type(output).__name__} without a floating-point tensor that has "
            "axes; give forward=, a function of (model, batch) that returns one tensor"
        )
    return torch.stack([x.sum() for x in leaves]).sum()


def _is_output(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0


def _has_samples(x: Any) -> bool:
    """Whether the first axis of an entry of a batch holds samples; a number without axes is the same for all of them."""
    return isinstance(x, Tensor) and x.ndim > 0


def _samples(batch: Any) -> int:
    """How many samples a batch has.

    Raises:
        ValueError: tensors that differ in this, or none.
    """
    lengths = dict(_lengths(batch, ""))
    if len(set(lengths.values())) != 1:
        differ = "differ in length: " + ", ".join(f"{name or 'batch'} has {length}" for name, length in lengths.items())
        raise ValueError(
            "gradients of each sample need the samples along axis 0 of every tensor of a batch, but its tensors "
            f"{differ if lengths else 'have no axes'}; put the samples first, give them one by one as batches, or bind what is no sample "
            "to the forward: forward=lambda model, batch: model(batch, scale)"
        )
    return lengths.popitem()[1]


def _lengths(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """The length of each tensor with axes in a batch, by the keys and positions that lead to it."""
    if _has_samples(value):
        yield name, len(value)
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (tuple, list)) else ()
    for key, item in items:
        yield from _lengths(item, f"{name}[{key!r}]")


def _sample(batch: Any, index: int) -> Any:
    return tree_map(lambda x: x[index] if _has_samples(x) else x, batch)
