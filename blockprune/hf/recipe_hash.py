"""A hash of all that a recipe's result depends on: its options, its functions and its calibration data."""

import hashlib
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from blockprune.model.running import Calibration

__all__ = ["data_hash", "recipe_hash"]


def data_hash(batches: Iterable[Any]) -> str:
    """A hash of the contents of calibration batches.

    Raises:
        TypeError: batches that can be used once only.

    Example:
        >>> from blockprune.hf.recipe_hash import data_hash
        >>> data_hash([torch.ones(2)]) == data_hash([torch.zeros(2)])
        False
    """
    if isinstance(batches, Iterator):
        raise TypeError(f"calibration.batches is a {type(batches).__name__}, which can be used once only; give a list of batches")
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
        return _Hash().of(list(batches))


def recipe_hash(recipe: Any, *, known: Any = ()) -> str:
    """A hash of a recipe: tensors and arrays by contents, functions by their code and what they refer to, other objects by their class.

    Args:
        recipe: any value.
        known: batches whose contents are left out; those of all other calibrations count.

    Raises:
        TypeError: calibration batches that can be used once only.

    Example:
        >>> from blockprune.hf.recipe_hash import recipe_hash
        >>> recipe_hash(lambda x: x + 1) == recipe_hash(lambda x: x + 2)
        False
    """
    return _Hash(known).of(recipe)


class _Hash:
    """A hash of nested values; an object that occurs again counts as a reference to where it occurred first."""

    def __init__(self, known: Any = ()) -> None:
        self.digest, self.known = hashlib.sha256(), known
        self.seen: dict[int, tuple[int, Any]] = {}  # by address: its number, and the object, so that the address stays its own

    def of(self, value: Any) -> str:
        self.add(value)
        return self.digest.hexdigest()

    def add(self, value: Any) -> None:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, Tensor):
            dense = value.detach().cpu()
            dense = (dense.to_dense() if dense.layout != torch.strided else dense).contiguous()
            self.add_words("tensor", dense.dtype, tuple(dense.shape))
            self.digest.update(dense.flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device, range)):
            self.add_words(value)
        elif isinstance(value, (tuple, list)):
            self.add_words("sequence", len(value))
            for item in value:
                self.add(item)
        elif isinstance(value, Mapping):
            self.add_words("mapping", len(value))
            for key, item in value.items():
                self.add((key, item))
        elif isinstance(value, (set, frozenset)):
            self.add_words(*sorted(map(repr, value)))
        elif id(value) in self.seen:  # a function may refer to itself
            self.add_words("again", self.seen[id(value)][0])
        else:
            self.seen[id(value)] = len(self.seen), value
            self.add_object(value)

    def add_object(self, value: Any) -> None:
        if isinstance(value, partial):
            self.add(("partial", value.func, value.args, value.keywords))
        elif isinstance(value, Calibration):
            self.add_words(None if value.batches is self.known else data_hash(value.batches))
            self.add({field.name: getattr(value, field.name) for field in attrs.fields(Calibration) if field.name != "batches"})
        elif attrs.has(type(value)):
            self.add_words(type(value).__qualname__)
            self.add({field.name: getattr(value, field.name) for field in attrs.fields(type(value))})
        elif isinstance(value, types.FunctionType):
            self.add_words(value.__module__, value.__qualname__)
            cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
            self.add((value.__code__, value.__defaults__, value.__kwdefaults__, cells))
        elif isinstance(value, types.CodeType):
            self.add((value.co_code, value.co_names, value.co_consts))
        elif isinstance(value, types.MethodType):
            self.add((value.__func__, value.__self__))
        elif isinstance(value, type):
            self.add_words(value.__module__, value.__qualname__)
        else:
            self.add_words(type(value).__module__, type(value).__qualname__, getattr(value, "__qualname__", ""))

    def add_words(self, *words: Any) -> None:
        self.digest.update(repr(words).encode())
