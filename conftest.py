"""Examples in docstrings assume these imports; pictures are drawn without a screen, and closed after each test."""

import gc
import importlib.util
import sys
from collections.abc import Iterator
from functools import partial

import attrs
import matplotlib as mpl
import pytest
import torch
from torch import nn

import blockprune as bp

mpl.use("Agg")  # not by the environment, which the kernels of notebooks inherit
collect_ignore = [] if importlib.util.find_spec("triton") else ["blockprune/export/triton_kernels.py"]


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # the garbage collector does not go through modules and thousands of tests again and again


@pytest.fixture(autouse=True)
def _imports(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, nn=nn, bp=bp, partial=partial, attrs=attrs)


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
