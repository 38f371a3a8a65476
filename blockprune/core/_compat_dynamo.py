"""Every private API of ``torch.compile`` that blockprune uses.

As in `_compat`, each docstring ends with the first version that has the API.
"""

import sys
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["read_at_any_length", "vary_lengths"]


def read_at_any_length(owner: nn.Module, name: str) -> Tensor:
    """A parameter or buffer, whose length ``torch.compile`` takes as a variable once it has met two lengths (torch 2.1).

    By itself it records a graph for each shape of a parameter, and gives up after eight. A setting says so for all parameters; it is read
    when a graph first uses a parameter, and has the other value while this one is used.
    """
    if not torch.compiler.is_dynamo_compiling() or torch.compiler._is_exporting_flag:  # `is_exporting` is always true here in torch 2.11
        return cast(Tensor, getattr(owner, name))
    from torch._dynamo.comptime import comptime  # noqa: PLC0415 (slow, and torch.compile has imported it)

    comptime(_let_shapes_vary)
    tensor = cast(Tensor, getattr(owner, name))
    tensor.size(0)  # the graph uses it here, while the setting has the other value
    comptime(_restore)
    return tensor


def vary_lengths(tensors: Iterable[Tensor]) -> None:
    """Let ``torch.compile`` take the lengths of all these tensors as variables when it next meets one of them (torch 2.1).

    Otherwise it records another graph for each tensor whose length changes for the first time.
    """
    if "torch._dynamo" in sys.modules:  # slow to import, and nothing is compiled before
        for x in tensors:
            torch._dynamo.maybe_mark_dynamic(x, 0)


_before: list[bool] = []


def _let_shapes_vary(_: Any) -> None:
    if not _before:  # otherwise an error has kept it from being restored
        _before.append(torch._dynamo.config.force_parameter_static_shapes)
    torch._dynamo.config.force_parameter_static_shapes = False


def _restore(_: Any) -> None:
    torch._dynamo.config.force_parameter_static_shapes = _before.pop()
