"""What is published: the sdist is complete, the wheel built from it serves every Python from 3.11 on, and both work without a compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("setuptools", minversion="77")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COMPILER = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="no compiler")
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
UNOPTIMIZED = """#!/bin/sh
exec {} "$@" -O0
"""  # a compiler that takes a quarter of the time
COMPILED = {"blockprune/native/kernels.abi3.so", "blockprune/native/spmm/kernels.abi3.so"}
LOAD = """
import torch, blockprune as bp
from blockprune import native
from blockprune.export import format
from blockprune.native import spmm
print(bp.__file__, native.status, spmm.status, sep="\\n")
"""
RUN = """
x = torch.arange(8.0).view(2, 4)
assert native.pool_sum(x, (2, 4), (2, 2), None).tolist() == [[10, 18]]
errors, order = native.obs_sweep(x[None], torch.eye(4)[None], torch.tensor([0]), 2, 2)
assert errors.tolist() == [[42, 98]] and order.tolist() == [[0, 1]]
sparse = format.pack(torch.ones(2, 4), torch.tensor([[True, False]]), bp.BlockGrid((2, 4), (2, 2)))
product = spmm.linear(x, sparse.values, sparse.crow, sparse.col, shape=(2, 4), block=(2, 2))
assert product.tolist() == [[1, 1], [9, 9]]
"""


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    command, variables = [sys.executable, *arguments], os.environ | environment
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(kind: str, source: Path, to: Path, **environment: str) -> Path:
    """The path of an sdist or a wheel that setuptools builds from a folder."""
    to.mkdir()
    python("-c", f"from setuptools import build_meta; build_meta.build_{kind}({str(to)!r})", cwd=source, **environment)
    (path,) = to.iterdir()
    return path


def run_installed(wheel: Path, to: Path, code: str) -> list[str]:
    """What code prints that runs with a wheel on a machine without a compiler."""
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(to), str(wheel), cwd=to.parent, **NO_COMPILER)
    return python("-c", code, cwd=to.parent, PYTHONPATH=str(to), **NO_COMPILER).splitlines()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, built from a copy without anything that was compiled before."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT / "blockprune", folder / "copy" / "blockprune", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "copy")
    return built("sdist", folder / "copy", folder / "sdist")


@pytest.fixture(scope="module")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    filtered: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **filtered)
    (path,) = folder.iterdir()
    return path


def test_the_sdist_holds_every_source_file(source: Path) -> None:
    sources = [path for path in (ROOT / "blockprune").rglob("*") if path.suffix in (".py", ".cpp", ".h", ".typed")]
    missing = [path for path in sources if not (source / path.relative_to(ROOT)).exists()]
    assert not missing
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= {path.name for path in source.iterdir()}


@COMPILER
@pytest.mark.skipif(sys.platform != "linux", reason="extensions of other systems have other names")
def test_a_wheel_from_the_sdist_works_where_there_is_no_compiler(source: Path, tmp_path: Path) -> None:
    compilers = {}
    for variable, names in {"CC": ("gcc", "cc", "g++", "c++"), "CXX": ("g++", "c++")}.items():
        path = tmp_path / variable
        path.write_text(UNOPTIMIZED.format(next(filter(None, map(shutil.which, names)))))
        path.chmod(0o755)
        compilers[variable] = str(path)
    wheel = built("wheel", source, tmp_path / "wheel", **compilers)
    assert "-cp311-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names >= COMPILED | {"blockprune/py.typed", "blockprune/__init__.py"}
    assert {name.partition("/")[0] for name in names} == {"blockprune", wheel.name.partition("-cp311")[0] + ".dist-info"}
    path, *statuses = run_installed(wheel, tmp_path / "site", LOAD + RUN)
    assert path.startswith(str(tmp_path))
    assert statuses == ["built", "built"]


def test_the_sdist_installs_without_a_compiler_too(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    wheel = built("wheel", copy, tmp_path / "wheel", **NO_COMPILER)
    with zipfile.ZipFile(wheel) as archive:
        assert not COMPILED & set(archive.namelist())
    path, *statuses = run_installed(wheel, tmp_path / "site", LOAD)
    assert path.startswith(str(tmp_path))
    assert len(statuses) == 2
    assert all(status.startswith("not built") for status in statuses)
