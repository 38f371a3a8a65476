"""Batches without end, whose place and random numbers can be recorded and restored."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class BatchStream:
    """Batches without end, pass after pass. Its state is the place in the pass, and the random numbers there and where the pass began."""

    def __init__(self, batches: Iterable[Any], devices: Sequence[int]) -> None:
        self.batches, self.devices = batches, devices
        self._begin(self._random_state())

    def _begin(self, random_state: dict[str, list[Tensor]]) -> None:
        self.taken, self.first_state = 0, random_state
        self._set_random_state(random_state)
        self.iterator = iter(self.batches)

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
    """The random number generators of a DataLoader and its samplers."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    owners = (batches, getattr(batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    generators = [getattr(owner, "generator", None) for owner in owners]
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
