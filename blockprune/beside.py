"""The dense layer beside the pruned one: in what order its weights meet their inputs, and where their outputs join a residual stream."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blockprune.experts import experts_in, routing
from blockprune.gates import Heard
from blockprune.layers import rows
from blockprune.layerwise import Calls, Enough, Layer
from blockprune.names import Slot
from blockprune.statistics import Statistic, input_cross, stream_cross

NEAR = 0.01  # of an output's size, by how much stream + output may miss the new stream


@attrs.frozen(eq=False)
class Anatomy:
    """What one forward of a layer shows of the weights in it.

    Example:
        >>> from blockprune.beside import Anatomy
        >>> Anatomy(groups=[["up.weight"], ["down.weight"]], calls={"up.weight": 1, "down.weight": 1}, joins={"down.weight": ""}).joins
        {'down.weight': ''}
    """

    groups: Sequence[Sequence[str]]  # in the order in which they meet their inputs; together those that are given the same
    calls: Mapping[str, int]  # how often each is used
    joins: Mapping[str, str]  # weights whose output is added to a stream: the module in the layer ("" = itself) that was given the stream


@attrs.frozen(eq=False)
class Alone:
    """How statistics of a layer are collected on the hidden states that it is given: batches are numbers.

    Example:
        >>> from blockprune.beside import Alone
        >>> from blockprune.layerwise import Calls, Layer
        >>> list(Alone([], Layer("", nn.ReLU(), []), [torch.ones(2)], [Calls(None, torch.ones(2), {"": ("", (), {})})]).batches())
        [0]
    """

    names: Sequence[str]  # weights of which they are collected
    layer: Layer
    given: Sequence[Tensor]
    calls: Sequence[Calls]

    @property
    def statistics(self) -> Sequence[Statistic]:
        """More of them than were asked for."""
        return ()

    def batches(self) -> Iterator[int]:
        """What `collect.with_statistics` goes through."""
        yield from range(len(self.calls))

    def forward(self, parameters: Mapping[str, Tensor], _: Any, i: int) -> Tensor:
        """The layer on a batch, some of its parameters replaced."""
        return self.layer.run(parameters, self.given[i], self.calls[i])


@attrs.frozen(eq=False)
class Beside:
    """The same of a layer as far as it is pruned, compared with the dense one, which runs before each batch, where no hooks listen.

    Tokens go through the experts that the dense layer's router chose, so that the two can be compared.

    Example:
        >>> from blockprune.beside import Anatomy, Beside
        >>> from blockprune.layerwise import Layer
        >>> [s.name for s in Beside([], Layer("", nn.ReLU(), []), [], [], [], [], Anatomy([], {}, {})).statistics]
        ['input_cross', 'stream_cross']
    """

    names: Sequence[str]  # weights of which they are collected
    layer: Layer
    given: Sequence[Tensor]
    calls: Sequence[Calls]
    dense: Sequence[Tensor]  # what the dense layer is given
    heard: Heard
    anatomy: Anatomy
    rows: dict[str, list[list[Tensor]]] = attrs.field(factory=lambda: defaultdict(list))  # of the dense layer, call by call
    stream: dict[str, list[Tensor]] = attrs.field(factory=lambda: defaultdict(list))
    ahead: dict[str, list[Tensor]] = attrs.field(factory=lambda: defaultdict(list))
    chosen: dict[str, list[Any]] = attrs.field(factory=dict)  # by the router, for each call of a module of experts

    @property
    def statistics(self) -> Sequence[Statistic]:
        """Those that compare the two."""
        return input_cross(self.rows), stream_cross(self.ahead, names=self.anatomy.joins)

    def batches(self) -> Iterator[int]:
        """The dense layer, batch by batch."""
        for i in range(len(self.calls)):
            for left in (self.rows, self.stream, self.ahead, self.chosen):
                left.clear()
            self._look({}, self.dense[i], i, join=self.stream, meet=self.rows)
            yield i

    def forward(self, parameters: Mapping[str, Tensor], _: Any, i: int) -> None:
        """The pruned one: these of its parameters are pruned already."""
        self._look(parameters, self.given[i], i, join=self.ahead)

    def _look(
        self,
        parameters: Mapping[str, Tensor],
        hidden: Tensor,
        i: int,
        *,
        join: dict[str, list[Tensor]],
        meet: dict[str, list[list[Tensor]]] | None = None,
    ) -> None:
        """Run the layer until each weight has met its inputs; note the streams that outputs join, and the rows."""
        left = {name: self.anatomy.calls.get(name, 0) for name, _, _ in self.heard}
        known = all(left.values())  # an expert that the first batch did not call may come after those that it did

        def joined(name: str, x: Tensor) -> None:
            join[name].append(self.stream[name].pop(0) - _rows(x) if meet is None else _rows(x))

        def after(name: str, slot: Slot) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                if meet is not None:
                    meet[name].append([_rows(x) for x in rows(slot, module, args, kwargs)])
                left[name] -= 1
                if known and not any(left.values()):
                    raise Enough

            return hook

        with contextlib.ExitStack() as stack:
            stack.enter_context(routing(self.layer.module, self.chosen, again=meet is None))
            for name, slot, module in self.heard:
                if name in self.anatomy.joins:
                    source = self.layer.module.get_submodule(self.anatomy.joins[name])
                    stack.callback(source.register_forward_pre_hook(_given(partial(joined, name)), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after(name, slot), with_kwargs=True).remove)
            with contextlib.suppress(Enough):
                self.layer.run(parameters, hidden, self.calls[i])


def _rows(x: Tensor) -> Tensor:
    """A copy, one row a token: what comes after may write into the tensor."""
    return x.detach().clone().reshape(-1, x.shape[-1])


def dissect(layer: Layer, hidden: Tensor, call: Calls, heard: Heard) -> Anatomy:
    """One dense forward, listening.

    An output joins a stream where some later module (or the layer's own result) shows the sum of it and what an earlier one was given.

    Example:
        >>> from blockprune.beside import dissect
        >>> from blockprune.layers import listeners
        >>> from blockprune.layerwise import Calls, Layer
        >>> from blockprune.names import slots
        >>> class Residual(nn.Sequential):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> model, call = Residual(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), Calls(None, torch.ones(1, 2), {"": ("", (), {})})
        >>> layer = Layer("", model, ["0.weight", "2.weight"])
        >>> found = dissect(layer, call.hidden, call, [one for one in listeners(model, slots(model)) if "weight" in one[0]])
        >>> found.groups, found.joins
        ([['0.weight'], ['2.weight']], {'2.weight': ''})
    """
    shown: list[tuple[str, Tensor]] = []  # what each module was given, in order, the layer's result last
    outputs: list[tuple[str, int, Tensor]] = []  # of each weight that may join a stream, and how much was shown before
    met: list[tuple[str, Any]] = []  # each weight, and what tells its input from others

    def show(name: str, x: Tensor) -> None:
        if x.shape == hidden.shape:
            shown.append((name, x.detach()[:1].clone()))

    def after(name: str, slot: Slot) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            met.append((name, beside.get(name) or (x.data_ptr(), x._version, x.shape, x.stride())))
            alive.append(x)
            if isinstance(module, nn.Linear) and isinstance(output, Tensor) and output.shape == hidden.shape and slot.attr == "weight":
                outputs.append((name, len(shown), output.detach()[:1].clone()))

        return hook

    alive: list[Tensor] = []  # so that no memory is used twice
    beside = _beside(layer, heard)
    with contextlib.ExitStack() as stack:
        for name, module in layer.module.named_modules():
            hook = _given(partial(show, name))
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for name, slot, module in heard:
            stack.callback(module.register_forward_hook(after(name, slot), with_kwargs=True).remove)
        result = layer.run({}, hidden, call)
    show("", result)
    groups: dict[Any, list[str]] = {}
    for name, key in [*met, *((name, beside.get(name, name)) for name in layer.inside)]:  # the last never called: collecting will say so
        if not any(name in group for group in groups.values()):
            groups.setdefault(key, []).append(name)
    calls = {name: sum(one == name for one, _ in met) for name, _ in met}
    joins = {name: at for name, before, y in outputs if calls[name] == 1 and (at := _joined(shown, before, y)) is not None}
    return Anatomy([*groups.values()], calls, joins)


def _beside(layer: Layer, heard: Heard) -> dict[str, tuple[str, bool]]:
    """What the Linears of all experts of a module have in common that meet their inputs at one time, though each its own."""
    name_of = {id(slot.owner): name for name, slot, _ in heard}
    return {
        name_of[id(linear)]: (at, part == "down_proj")
        for at, experts in experts_in(layer.module).items()
        for expert in experts.numbered()
        for part, linear in expert.named_children()
        if id(linear) in name_of
    }


def _given(show: Callable[[Tensor], None]) -> Callable[..., None]:
    """A hook that shows the first tensor that a module is given."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if x is not None:
            show(x)

    return hook


def _joined(shown: Sequence[tuple[str, Tensor]], before: int, y: Tensor) -> str | None:
    """The module that was given the stream which this output joins, one that is called once."""
    size, names = _norm(y), [name for name, _ in shown[:-1]]
    for _, later in shown[before:]:
        slack = min(max(NEAR * size, 2 * torch.finfo(later.dtype).eps * _norm(later)), 0.5 * size)
        for name, stream in shown[:before]:
            if size and names.count(name) == 1 and _norm(later - y.to(later.device) - stream.to(later.device)) <= slack:
                return name
    return None


def _norm(x: Tensor) -> float:
    return float(x.double().norm())
