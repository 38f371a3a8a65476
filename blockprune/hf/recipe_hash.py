"""A hash of all that a recipe's result depends on: its options, its functions and its calibration data."""

import hashlib
import types
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from blockprune.model.running import Calibration

__all__ = ["recipe_hash"]


def recipe_hash(*values: Any) -> str:
    """A hash of values: tensors and arrays by their contents, functions by their code and what they refer to, other objects by their class.

    Raises:
        TypeError: calibration batches that can be used once only.

    Example:
        >>> from blockprune.hf.recipe_hash import recipe_hash
        >>> recipe_hash(lambda x: x + 1) == recipe_hash(lambda x: x + 2)
        False
    """
    digest = hashlib.sha256()
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
        _add(digest, values, set())
    return digest.hexdigest()


def _add(digest: Any, value: Any, seen: set[int]) -> None:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        dense = value.detach().cpu()
        dense = (dense.to_dense() if dense.layout != torch.strided else dense).contiguous()
        _add_words(digest, "tensor", dense.dtype, tuple(dense.shape))
        digest.update(dense.flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device, range)):
        _add_words(digest, value)
    elif isinstance(value, (tuple, list)):
        _add_words(digest, "sequence", len(value))
        for item in value:
            _add(digest, item, seen)
    elif isinstance(value, Mapping):
        _add_words(digest, "mapping", len(value))
        for key, item in value.items():
            _add(digest, (key, item), seen)
    elif isinstance(value, (set, frozenset)):
        _add_words(digest, *sorted(map(repr, value)))
    elif id(value) not in seen:  # a function may refer to itself
        seen.add(id(value))
        _add_object(digest, value, seen)


def _add_object(digest: Any, value: Any, seen: set[int]) -> None:
    if isinstance(value, partial):
        _add(digest, ("partial", value.func, value.args, value.keywords), seen)
    elif isinstance(value, Calibration):
        if isinstance(value.batches, Iterator):
            kind = type(value.batches).__name__
            raise TypeError(f"calibration.batches is a {kind}, which can be used once only; give a list of batches")
        _add(digest, list(value.batches), seen)
        _add(digest, {field.name: getattr(value, field.name) for field in attrs.fields(Calibration) if field.name != "batches"}, seen)
    elif attrs.has(type(value)):
        _add_words(digest, type(value).__qualname__)
        _add(digest, {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}, seen)
    elif isinstance(value, types.FunctionType):
        _add_words(digest, value.__module__, value.__qualname__)
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        _add(digest, (value.__code__, value.__defaults__, value.__kwdefaults__, cells), seen)
    elif isinstance(value, types.CodeType):
        _add(digest, (value.co_code, value.co_names, value.co_consts), seen)
    elif isinstance(value, types.MethodType):
        _add(digest, (value.__func__, value.__self__), seen)
    elif isinstance(value, type):
        _add_words(digest, value.__module__, value.__qualname__)
    else:
        _add_words(digest, type(value).__module__, type(value).__qualname__, getattr(value, "__qualname__", ""))


def _add_words(digest: Any, *words: Any) -> None:
    digest.update(repr(words).encode())
