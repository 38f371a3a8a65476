"""Derivatives of a batch's loss with respect to gates, by `torch.func`. A gate is a factor on the weights of one block, equal to 1."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from blockprune.core._compat import tree_map
from blockprune.core.grid import BlockGrid, expand
from blockprune.model.inputs import InputHooks
from blockprune.model.parameters import ParameterRef, stored_aliases, under_all_names
from blockprune.model.running import Calibration, scalar_loss
from blockprune.statistics import Gates

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
) -> dict[str, Gates]:
    """The derivatives of one batch, by parameter name. Each is computed when it is first called.

    They take memory for samples * blocks numbers, not for samples * weights.

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
        >>> gates["weight"].per_sample().shape          # one gate a block, one gradient a sample
        torch.Size([3, 1, 2])
    """
    gated = _GatedModel(model, grids, refs, hooks, batch, calibration, needs)
    return {name: gated.derivatives(name) for name in grids}


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
        self.model, self.grids, self.refs, self.hooks = model, grids, refs, hooks
        self.batch, self.calibration, self.needs = batch, calibration, needs
        self.aliases = stored_aliases(model)
        self.called: set[str] = set()  # parameters whose layer the forward calls
        self.weights = {name: ref.stored.detach() for name, ref in refs.items()}
        self.ones = {name: torch.ones(grids[name].size, dtype=w.dtype, device=w.device) for name, w in self.weights.items()}
        self.frozen = {name: p.detach() for name, p in model.named_parameters()}  # so that autograd records the gates only
        self.curvatures: dict[tuple[int, int], dict[str, Tensor]] = {}  # by probes and seed

    def derivatives(self, name: str) -> Gates:
        return Gates(
            per_sample=lambda: self.per_sample[name],
            hg=lambda: self.hessian_times_gradient[name],
            curvature=lambda probes, seed: self.curvature(probes, seed)[name],
            flow=lambda: self.flow[name],
            called=lambda: name in self.called,
        )

    def loss(self, gates: GateValues, batch: Any) -> Tensor:
        call = self._gated(self.weights, self.frozen, gates)
        return scalar_loss(self.calibration, self.calibration.forward(call, batch), batch, self.needs)

    def _gated(self, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor], gates: GateValues) -> Callable[..., Any]:
        """The model as a function, with these parameters and with these weights times their gates."""
        gated = {self.refs[name].stored_name: weights[name] * expand(gate, self.grids[name]) for name, gate in gates.items()}
        replacements = under_all_names({**parameters, **gated}, self.aliases)

        def call(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                for name, _, module in self.hooks:
                    handle = module.register_forward_hook(lambda *_, name=name: self.called.add(name))
                    stack.callback(handle.remove)
                return functional_call(self.model, replacements, args, kwargs, tie_weights=False)

        return call

    @cached_property
    def per_sample(self) -> dict[str, Tensor]:
        """The gradient of each sample's loss, ``[samples, *size]``."""

        def sample_loss(gates: GateValues, sample: Any) -> Tensor:
            return self.loss(gates, tree_map(lambda x: x[None] if isinstance(x, Tensor) else x, sample))

        if self.calibration.per_sample == "loop":
            samples = [_sample(self.batch, i) for i in range(_samples(self.batch))]
            gradients = [grad(sample_loss)(self.ones, sample) for sample in samples]
            return {name: torch.stack([g[name] for g in gradients]) for name in self.ones}
        axes = tree_map(lambda x: 0 if isinstance(x, Tensor) else None, self.batch)
        over_samples = partial(vmap, in_dims=(None, axes), randomness="different", chunk_size=self.calibration.chunk_size)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # an operation without a batching rule
                return over_samples(grad(sample_loss))(self.ones, self.batch)  # type: ignore[no-any-return]
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(f"vmap cannot run this model: {reason}. Pass per_sample='loop', which is slower but equal") from error

    @cached_property
    def hessian_times_gradient(self) -> dict[str, Tensor]:
        return self._hessian_times(grad(self.loss)(self.ones, self.batch))

    def _hessian_times(self, vector: GateValues) -> dict[str, Tensor]:
        def slope_along(gates: GateValues) -> Tensor:
            slope = grad(self.loss)(gates, self.batch)
            return torch.stack([(slope[name] * vector[name]).sum() for name in gates]).sum()

        return grad(slope_along)(self.ones)  # type: ignore[no-any-return]

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
            v = {name: (torch.randint(2, g.shape, generator=generator) * 2 - 1).to(g) for name, g in self.ones.items()}
            products.append({name: v[name] * hv for name, hv in self._hessian_times(v).items()})
        return {name: torch.stack([product[name] for product in products]) for name in self.ones}

    @cached_property
    def flow(self) -> dict[str, Tensor]:
        """The gradient of the summed output of the network of ``|weights|`` on an input of ones."""
        absolute = {name: p.detach().abs() for name, p in self.model.named_parameters()}
        weights = {name: w.abs() for name, w in self.weights.items()}
        ones = tree_map(lambda x: torch.ones_like(x[:1]) if isinstance(x, Tensor) else x, self.batch)

        def summed_output(gates: GateValues) -> Tensor:
            output = self.calibration.forward(self._gated(weights, absolute, gates), ones)
            total: Tensor = (output if isinstance(output, Tensor) else output[0]).sum()
            return total

        return grad(summed_output)(self.ones)  # type: ignore[no-any-return]


def _samples(batch: Any) -> int:
    sizes: list[int] = []
    tree_map(lambda x: sizes.append(len(x)) if isinstance(x, Tensor) else None, batch)
    return sizes[0] if sizes else 0


def _sample(batch: Any, index: int) -> Any:
    return tree_map(lambda x: x[index] if isinstance(x, Tensor) else x, batch)
