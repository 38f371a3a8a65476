"""A hash of all that a recipe's result depends on: its options, its functions and its calibration data."""

import dataclasses
import dis
import enum
import hashlib
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from blockprune.model.calibration import Calibration

__all__ = ["data_hash", "recipe_hash"]

DEEPEST = 100  # containers in each other, of which objects have one or two; what is further inside counts by its class
PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device, range, slice, type(...))
FUNCTIONS = (types.FunctionType, staticmethod, classmethod, property)


def data_hash(batches: Iterable[Any]) -> str:
    """A hash of the contents of calibration batches.

    Raises:
        TypeError: batches that can be used once only, or that hold a value whose contents cannot be read.

    Example:
        >>> from blockprune.hf.recipe_hash import data_hash
        >>> data_hash([torch.ones(2)]) == data_hash([torch.zeros(2)])
        False
    """
    if isinstance(batches, Iterator):
        raise TypeError(f"calibration.batches is a {type(batches).__name__}, which can be used once only; give a list of batches")
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
        return _Hash(data=True).of(list(batches))


def recipe_hash(recipe: Any, *, known: Any = ()) -> str:
    """A hash of a recipe: of its tensors, functions and other values.

    Tensors and arrays count by their contents, objects by their class and state, and functions by their code and all that it refers to:
    the variables around them, and global ones. What an installed package has counts by its name, but with what it was given.

    Args:
        recipe: any value.
        known: batches whose contents are left out; those of all other calibrations count.

    Raises:
        TypeError: calibration batches that can be used once only, or that hold a value whose contents cannot be read.

    Example:
        >>> from blockprune.hf.recipe_hash import recipe_hash
        >>> recipe_hash(lambda x: x + 1) == recipe_hash(lambda x: x + 2)
        False
    """
    return _Hash(known).of(recipe)


class _Hash:
    """A hash of nested values; an object that occurs again counts as a reference to where it occurred first.

    Args:
        known: as in `recipe_hash`.
        data: the values are batches, so that a value whose contents cannot be read is an error. Of a recipe it counts by its class.
    """

    def __init__(self, known: Any = (), *, data: bool = False) -> None:
        self.digest, self.known, self.data = hashlib.sha256(), known, data
        self.seen: dict[int, tuple[int, Any]] = {}  # by address: its number, and the object, so that the address stays its own
        self.enclosing: list[int] = []  # the addresses of the containers in which the present value is

    def of(self, value: Any) -> str:
        self.add(value)
        return self.digest.hexdigest()

    def add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.add_tensor(value)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self.add_words("array", value.dtype.descr, value.shape)
            self.digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        elif isinstance(value, PLAIN) and not isinstance(value, enum.Enum):
            self.add_words(value)
        elif isinstance(value, (tuple, list, Mapping, set, frozenset, np.ndarray)):
            if id(value) in self.enclosing:  # a container may hold itself
                self.add_words("enclosing", self.enclosing.index(id(value)))
                return
            self.enclosing.append(id(value))
            self.add_container(value)
            self.enclosing.pop()
        elif id(value) in self.seen:  # a function may refer to itself
            self.add_words("again", self.seen[id(value)][0])
        else:
            self.seen[id(value)] = len(self.seen), value
            self.add_object(value)

    def add_tensor(self, value: Tensor) -> None:
        if value.is_meta:
            self.add_words("tensor", value.dtype, tuple(value.shape))
            return
        dense = value.detach().cpu()
        dense = (dense.to_dense() if dense.layout != torch.strided else dense).contiguous()
        self.add_words("tensor", dense.dtype, tuple(dense.shape))
        self.digest.update(dense.flatten().view(torch.uint8).numpy().data)

    def add_container(self, value: Any) -> None:
        if isinstance(value, Mapping):
            self.add_words("mapping", len(value))
            for key, item in value.items():
                self.add((key, item))
        elif isinstance(value, (set, frozenset)):  # in any order
            self.add_words("set", *sorted(repr(item) if isinstance(item, (str, int, float)) else self.inside().of(item) for item in value))
        else:
            self.add_words("sequence", np.shape(value) if isinstance(value, np.ndarray) else len(value))
            for item in value.reshape(-1).tolist() if isinstance(value, np.ndarray) else value:
                self.add(item)

    def inside(self) -> "_Hash":
        """A hash of its own of a value in the present one."""
        hashed = _Hash(self.known, data=self.data)
        hashed.seen, hashed.enclosing = dict(self.seen), list(self.enclosing)
        return hashed

    def add_object(self, value: Any) -> None:
        if isinstance(value, partial):
            self.add(("partial", value.func, value.args, value.keywords))
        elif isinstance(value, Calibration):
            self.add_words(None if value.batches is self.known else data_hash(value.batches))
            self.add({field.name: getattr(value, field.name) for field in attrs.fields(Calibration) if field.name != "batches"})
        elif isinstance(value, (types.FunctionType, type)):
            data, self.data = self.data, False  # what code refers to is no batch
            if isinstance(value, type):
                self.add_class(value)
            else:
                self.add_function(value)
            self.data = data
        elif isinstance(value, types.CodeType):
            self.add((value.co_code, value.co_names, value.co_consts))
        elif isinstance(value, (types.MethodType, staticmethod, classmethod)):
            self.add((value.__func__, getattr(value, "__self__", None)))
        elif isinstance(value, types.ModuleType):
            self.add_words("module", value.__name__)
        elif isinstance(value, property):
            self.add((value.fget, value.fset))
        elif isinstance(value, torch.Generator):
            self.add_words("generator", value.initial_seed())
        elif isinstance(value, (np.random.Generator, np.random.RandomState, type(os.environ))):  # a run, or another job, changes them
            self.add(type(value))
        else:
            self.add(type(value))
            self.add_state(value)

    def add_function(self, value: types.FunctionType) -> None:
        """A function by its code, defaults, and the variables around it; one of other code than installed packages also by global ones."""
        self.add_words(value.__module__, value.__qualname__)
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        self.add((value.__code__, value.__defaults__, value.__kwdefaults__, cells))
        if not _is_installed(value.__module__):
            self.add(_global_values(value))

    def add_class(self, value: type) -> None:
        """A class of an installed package by its name, of other code also by its functions and values."""
        self.add_words(value.__module__, value.__qualname__)
        if _is_installed(value.__module__):
            return
        own = {name: item for name, item in vars(value).items() if isinstance(item, FUNCTIONS) or not name.startswith(("__", "_abc_"))}
        self.add((value.__bases__, own))

    def add_state(self, value: Any) -> None:
        """What an object holds: the fields of a dataclass, the attributes of a module, or what a pickle has of it."""
        if attrs.has(type(value)):
            self.add({field.name: getattr(value, field.name) for field in attrs.fields(type(value))})
        elif dataclasses.is_dataclass(value):
            self.add({field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)})
        elif isinstance(value, nn.Module):  # hooks count in their order, and not by their numbers, which torch draws
            self.add(
                {
                    name: list(item.values()) if "_hooks" in name and isinstance(item, Mapping) else item
                    for name, item in vars(value).items()
                }
            )
        elif isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            self.add_words(value.__qualname__)
            self.add(getattr(value, "__self__", None))
        else:
            try:
                state = value.__reduce_ex__(4)
                if len(self.enclosing) > DEEPEST:
                    raise ValueError("it is nested too deeply")
            except Exception as error:
                if self.data:
                    raise TypeError(
                        f"calibration.batches holds a {type(value).__name__}, whose contents cannot be read ({error}), so other data could "
                        "not be told apart; give batches of tensors, arrays, numbers and strings, in tuples, lists, mappings or dataclasses"
                    ) from None
                state = getattr(value, "__qualname__", "")
            parts = (state, getattr(value, "__wrapped__", None)) if isinstance(state, str) else state  # of functools.cache
            self.add([list(part) if isinstance(part, Iterator) else part for part in parts])

    def add_words(self, *words: Any) -> None:
        self.digest.update(repr(words).encode())


def _global_values(function: types.FunctionType) -> dict[str, Any]:
    """The global variables that a function reads, and what it reads of the user's own modules, by name."""
    codes = [function.__code__]
    for code in codes:  # those of functions in it are added meanwhile
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    names = sorted({step.argval for code in codes for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")})
    values = {name: function.__globals__[name] for name in names if name in function.__globals__}
    attributes = sorted({name for code in codes for name in code.co_names})
    for name, value in list(values.items()):
        if isinstance(value, types.ModuleType) and not _is_installed(value.__name__):
            values |= {f"{name}.{attr}": vars(value)[attr] for attr in attributes if attr in vars(value)}
    return values


def _is_installed(module: str | None) -> bool:
    """Whether a module is Python's, blockprune's or an installed package's, and not the user's own code."""
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names or top == "blockprune":
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None) or getattr(sys.modules.get(top), "__file__", None)
    return file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
