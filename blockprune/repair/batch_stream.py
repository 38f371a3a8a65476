"""Batches without end, whose place and random numbers can be recorded and restored."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blockprune.core._compat import pass_by_workers, start_workers, tree_leaves
from blockprune.model.calibration import inputs_of


class BatchStream:
    """Batches without end, pass after pass. Its state is the place in the pass, and the random numbers there and where the pass began.

    Persistent workers of a DataLoader are started once, and not those that the DataLoader itself has: other code may be in a pass of them.
    """

    def __init__(self, batches: Iterable[Any], devices: Sequence[int]) -> None:
        self.batches, self.devices = batches, devices
        random_state = self._random_state()
        self.workers = start_workers(batches)  # their first pass draws a random number more than later ones, so it is left
        self._begin(random_state)

    def _begin(self, random_state: dict[str, list[Tensor]]) -> None:
        self.taken, self.first_state = 0, random_state
        self._set_random_state(random_state)
        self.iterator = iter(self.batches) if self.workers is None else pass_by_workers(self.batches, self.workers)

    def __next__(self) -> Any:
        batch = next(self.iterator, _END)
        if batch is _END:
            self._begin(self._random_state())
            batch = next(self.iterator, _END)
        if batch is _END:
            raise ValueError("batches has no more batches for the steps that remain; give a list or a DataLoader, or fewer steps")
        self.taken += 1
        return batch

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"taken": self.taken, "first_state": self.first_state, "state": self._random_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Pass over the batches that were taken."""
        self._begin(state["first_state"])
        for _ in range(state["taken"]):
            next(self)
        self._set_random_state(state["state"])

    def _random_state(self) -> dict[str, list[Tensor]]:
        return {
            "torch": [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)],
            "batches": [generator.get_state() for generator in _generators(self.batches)],
        }

    def _set_random_state(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        of_cpu, *of_devices = state["torch"]
        torch.set_rng_state(of_cpu)
        for device, of_device in zip(self.devices, of_devices, strict=False):
            torch.cuda.set_rng_state(of_device, device)
        generators = _generators(self.batches)
        if len(generators) != len(state["batches"]):
            raise ValueError(
                f"resume: batches has {len(generators)} random number generators of its own, and those of the state had "
                f"{len(state['batches'])}; give a DataLoader like that of the first call"
            )
        for generator, of_generator in zip(generators, state["batches"], strict=True):
            generator.set_state(of_generator)


_END = object()


def _generators(batches: Any) -> list[torch.Generator]:
    """The random number generators of a DataLoader, its samplers, and the samplers that these draw from."""
    owners: dict[int, Any] = {}
    unseen = [batches]
    while unseen:
        owner = unseen.pop(0)
        if owner is not None and id(owner) not in owners:
            owners[id(owner)] = owner
            unseen += [getattr(owner, name, None) for name in ("sampler", "batch_sampler")]
    generators = [getattr(owner, "generator", None) for owner in owners.values()]
    return list({id(generator): generator for generator in generators if isinstance(generator, torch.Generator)}.values())


@contextlib.contextmanager
def keep_generators(batches: Any) -> Iterator[None]:
    """Set the generators of batches back at the end."""
    states = [(generator, generator.get_state()) for generator in _generators(batches)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def size_of(batch: Any) -> tuple[int, str]:
    """How much a batch holds: tokens, or samples where it has no tokens."""
    inputs = inputs_of(batch)
    if isinstance(inputs, Mapping):
        mask, tokens = inputs.get("attention_mask"), inputs.get("input_ids")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return int((mask != 0).sum()), "tokens"
        if isinstance(tokens, Tensor):
            return tokens.numel(), "tokens"
    first = next((x for x in tree_leaves(inputs) if isinstance(x, Tensor)), None)
    if first is not None and first.ndim == 2 and not first.is_floating_point():
        return first.numel(), "tokens"
    if first is not None and not first.numel():
        return 0, "samples"
    return first.size(0) if first is not None and first.ndim else 1, "samples"
