"""Examples in docstrings assume these imports."""

import importlib.util
from functools import partial

import attrs
import pytest
import torch
from torch import nn

import blockprune as bp

collect_ignore = [] if importlib.util.find_spec("triton") else ["blockprune/export/triton_kernels.py"]


@pytest.fixture(autouse=True)
def _imports(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, nn=nn, bp=bp, partial=partial, attrs=attrs)
