"""The hidden states between two layers for all batches: of the pruned model and, beside it, of the dense one."""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from blockprune.model.calibration import Calibration, Loss
from blockprune.model.sharding import gather_from_ranks, raised_together
from blockprune.repair.dense_reference import LayerBatch
from blockprune.repair.skipped_layers import capture_batches
from blockprune.repair.transformer_layers import CapturedBatch, Layer, LoadWeights


class Tensors(Protocol):
    """A sequence whose tensors can be replaced, such as a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Tensor: ...
    def __setitem__(self, index: int, tensor: Tensor, /) -> None: ...


Store = Callable[[str, Iterable[Tensor]], Tensors]  # (name, tensors) -> the tensors, wherever they are kept


def in_memory(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Keep tensors in a list."""
    return list(tensors)


class TensorFiles:
    """A sequence of tensors in files; a tensor is in memory while it is used.

    Args:
        name: what the names of the files begin with.
        tensors: the first contents.
        folder: where the files are.

    Example:
        >>> import tempfile
        >>> from blockprune.repair.hidden_states import TensorFiles
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     states = TensorFiles("dense", [torch.zeros(2), torch.ones(2)], folder=folder)
        ...     states[0] = states[1] + 1
        ...     list(states)
        [tensor([2., 2.]), tensor([1., 1.])]
    """

    def __init__(self, name: str, tensors: Iterable[Tensor], *, folder: str | os.PathLike[str]) -> None:
        self.prefix, self.size = os.path.join(folder, name), 0
        for tensor in tensors:
            self.size += 1
            self[self.size - 1] = tensor

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        tensor: Tensor = torch.load(self._path(index), weights_only=True)
        return tensor

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        torch.save(tensor.detach().clone(), self._path(index))  # a view would be saved with all of its memory

    def _path(self, index: int) -> str:
        return f"{self.prefix}-{range(self.size)[index]}.pt"


@attrs.frozen(eq=False)
class LayerBatches:
    """The batches of a layer, with some of its parameters replaced; each is made when it is used.

    Example:
        >>> from blockprune.repair.hidden_states import LayerBatches
        >>> from blockprune.repair.transformer_layers import CapturedBatch, Layer
        >>> layer, captured = Layer("", nn.ReLU(), []), CapturedBatch(None, torch.ones(2), {"": ("", (), {})})
        >>> [batch.run() for batch in LayerBatches(layer, {}, [torch.tensor([-1.0, 2.0])], [captured], [None])]
        [tensor([0., 2.])]
    """

    layer: Layer
    parameters: Mapping[str, Tensor]
    hidden: Tensors
    captured: Sequence[CapturedBatch]
    token_weights: Sequence[Tensor | None]
    seed: int = 0  # of the random numbers that layers draw

    def __len__(self) -> int:
        return len(self.captured)

    def __getitem__(self, index: int) -> LayerBatch:
        seed = self.seed + zlib.crc32(f"{self.layer.name} {index}".encode())  # other noise in each layer and batch
        return LayerBatch(self.layer, self.parameters, self.hidden[index], self.captured[index], self.token_weights[index], seed)

    def __iter__(self) -> Iterator[LayerBatch]:
        return map(self.__getitem__, range(len(self)))


def layer_calibration(batches: Iterable[Any], *, loss: Loss | None = None, reduce: Callable[[Any], Any] | None = None) -> Calibration:
    """A calibration of batches that run a layer themselves, such as `LayerBatch`.

    Example:
        >>> from blockprune.repair.hidden_states import layer_calibration
        >>> layer_calibration([])
        Calibration(batches=list of 0, forward=run_batch, token_weights=token_weights, progress=False)
    """
    return Calibration(batches, forward=_run_batch, loss=loss, token_weights=_token_weights, progress=False, reduce=reduce)


def _run_batch(model: Any, batch: Any) -> Any:
    return batch.run()


def _token_weights(batch: Any) -> Tensor | None:
    weights: Tensor | None = batch.token_weights
    return weights


@attrs.frozen(eq=False)
class HiddenStates:
    """The hidden states of all batches before the current layer.

    Args:
        captured: the other arguments of the layers, by batch.
        token_weights: how much each token counts, by batch.
        pruned: in the model whose layers before are pruned.
        dense: in the dense model, if asked for.
        reduce: as in `Calibration`; other processes have the hidden states of their own batches.
        seed: of the random numbers that layers draw; the same for each run of a layer on a batch.

    Example:
        >>> from blockprune.repair.hidden_states import HiddenStates
        >>> from blockprune.repair.transformer_layers import find_layers
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> order = find_layers(model, None, ["0.weight"])
        >>> states = HiddenStates.of(model, order, bp.Calibration([torch.ones(1, 2)]), keep_dense=False)
        >>> states.advance_pruned(order[0], {})
        >>> torch.equal(states.pruned[0], model[0](torch.ones(1, 2)))
        True
    """

    captured: Sequence[CapturedBatch]
    token_weights: Sequence[Tensor | None]
    pruned: Tensors
    dense: Tensors | None
    reduce: Callable[[Any], Any] | None = None
    seed: int = 0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        order: Sequence[Layer],
        calibration: Calibration,
        *,
        keep_dense: bool,
        load: LoadWeights | None = None,
        store: Store = in_memory,
    ) -> "HiddenStates":
        """The hidden states before the first layer.

        Raises:
            ValueError: no batches on any rank, and what `capture_batches` raises.
        """
        generator = torch.Generator()  # a copy, so that nothing is drawn from torch's own
        generator.set_state(torch.get_rng_state())
        seed = int(torch.randint(1 << 62, (), generator=generator, device="cpu"))
        captured: list[CapturedBatch] = []
        weights: list[Tensor | None] = []

        def hidden() -> Iterator[Tensor]:
            for batch, token_weights in capture_batches(model, order, calibration, load):
                captured.append(attrs.evolve(batch, batch=None, hidden=batch.hidden.new_empty(0)))
                weights.append(token_weights)
                yield batch.hidden

        with raised_together(model, calibration.reduce):
            pruned = store("pruned", hidden())
        if not any(gather_from_ranks(len(captured), calibration.reduce)):
            raise ValueError("batches is empty: calibration needs at least one")
        dense = store("dense", map(pruned.__getitem__, range(len(pruned)))) if keep_dense else None
        return cls(captured, weights, pruned, dense, calibration.reduce, seed)

    def batches(self, layer: Layer, parameters: Mapping[str, Tensor], *, dense: bool = False) -> LayerBatches:
        """The layer's batches, with these of its parameters replaced."""
        hidden = self.dense if dense and self.dense is not None else self.pruned
        return LayerBatches(layer, parameters, hidden, self.captured, self.token_weights, self.seed)

    def advance_dense(self, layer: Layer) -> Tensors:
        """Run the dense layer; its outputs are what the next layer is given."""
        return _advance(self.dense, self.batches(layer, {}, dense=True)) if self.dense is not None else []

    def advance_pruned(self, layer: Layer, parameters: Mapping[str, Tensor]) -> None:
        """Run the layer with these of its parameters replaced."""
        _advance(self.pruned, self.batches(layer, parameters))


def _advance(hidden: Tensors, batches: LayerBatches) -> Tensors:
    """Replace the inputs of a layer by its outputs, one batch after the other, so that only one is there twice."""
    for i, batch in enumerate(batches):
        hidden[i] = batch.run()
    return hidden
