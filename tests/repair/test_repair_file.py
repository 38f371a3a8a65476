"""A file of masks and weights is written whole or not at all, gives back what was saved, and damage is an error."""

import contextlib
import errno
import json
import os
import resource
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from strategies import DTYPES, dtypes, masks, normal, seeds
from torch import Tensor, nn

import blockprune as bp
from blockprune.repair.repair_file import _checksum

NAMES = ("w", "encoder.0.weight", "größe", "a b\n")


def same(a: bp.PruningResult, b: bp.PruningResult) -> bool:
    pairs = [(a.weights[name], b.weights[name]) for name in a.weights if name in b.weights]
    bits = all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(_bits(x), _bits(y)) for x, y in pairs)
    return bits and list(a.weights) == list(b.weights) and a.masks == b.masks and list(a.masks) == list(b.masks) and a.layers == b.layers


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def result(value: float = 1.0, size: int = 4) -> bp.PruningResult:
    mask = bp.BlockMask(torch.tensor([[True, False]]), bp.BlockGrid((size, size), (size, size // 2)))
    return bp.PruningResult({"0.weight": mask}, {"0.weight": torch.full((size, size), value)}, ("0", "1"))


@st.composite
def results(draw: st.DrawFn) -> bp.PruningResult:
    weights = {
        name: normal(tuple(draw(st.lists(st.integers(0, 4), max_size=3))), draw(seeds)).to(draw(dtypes))
        for name in draw(st.lists(st.sampled_from(NAMES), unique=True))
    }
    return bp.PruningResult(draw(masks(names=NAMES)), weights, tuple(draw(st.lists(st.sampled_from(NAMES), unique=True))))


@given(results())
def test_the_same_result_has_the_same_bytes(saved: bp.PruningResult) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(i) for i in range(8)]
        for path in files:
            bp.save_repair(saved, path)
        assert len({path.read_bytes() for path in files}) == 1


@given(results())
def test_what_is_saved_is_what_is_loaded_in_its_order(saved: bp.PruningResult) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bp.save_repair(saved, path := Path(folder) / "r.safetensors")
        assert os.listdir(folder) == ["r.safetensors"]
        assert same(bp.load_repair(path), saved)
        assert same(bp.load_repair(str(path)), saved)
        with safe_open(path, framework="pt") as file:  # any safetensors reader opens it
            assert all(torch.equal(_bits(file.get_tensor(f"weights.{name}")), _bits(x)) for name, x in saved.weights.items())


def test_weights_that_share_memory_are_saved_as_they_read(tmp_path: Path) -> None:
    matrix = torch.arange(24.0).view(4, 6)
    weights = {"a": matrix[:2], "b": matrix[1:], "c": matrix.mT, "d": matrix, "e": matrix, "f": matrix[0].expand(3, 6)}
    weights |= {"parameter": nn.Parameter(matrix), "signed zero and NaN": torch.tensor([-0.0, float("nan")])}
    bp.save_repair(saved := bp.PruningResult({}, weights), tmp_path / "r")
    assert same(bp.load_repair(tmp_path / "r"), saved)


def test_a_loaded_result_outlives_its_file(tmp_path: Path) -> None:
    bp.save_repair(result(1.0), path := tmp_path / "r")
    loaded = bp.load_repair(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # in place, not by another file of the same name
    assert same(loaded, result(1.0))
    loaded.weights["0.weight"].add_(1)  # memory of its own, which can be written


class Stopped(Exception):
    pass


@pytest.mark.parametrize("target", ["dense", "pruned"])
def test_going_on_from_a_file_gives_the_same_bits(target: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))
    pipeline = bp.Pipeline(partial(bp.collect.with_statistics, where=bp.linears((2, 2))), bp.metric.obs, bp.allocate.per_row)
    repair, batches = partial(bp.reconstruct.least_squares, damping=0.4), [torch.randn(20, 8) for _ in range(2)]
    run = partial(bp.sequential, model, pipeline, repair, batches, 0.5, target=target, progress=False)
    whole, path = run(), tmp_path / "r"
    for layers in range(1, 5):

        def save(so_far: bp.PruningResult, layers: int = layers) -> None:
            bp.save_repair(so_far, path)
            if len(so_far.layers) == layers:
                raise Stopped

        with pytest.raises(Stopped):
            run(callback=save)
        assert same(run(resume=bp.load_repair(path), callback=partial(bp.save_repair, path=path)), whole)
        assert same(bp.load_repair(path), whole)


# Written whole or not at all.

KILLED = """
import os, signal, sys, torch
import blockprune as bp
import blockprune.core.tensor_file as tensor_file

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, path, metadata):
    open(path, "wb").write(b"half")
    die()

for module, name, replacement in [(tensor_file, "save_file", half), (os, "fsync", die), (os, "replace", die)]:
    if (child := os.fork()) == 0:
        setattr(module, name, replacement)
        bp.save_repair(bp.PruningResult({}, {"w": torch.zeros(9)}, ()), sys.argv[1])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    bp.save_repair(result(1.0), path := tmp_path / "r")
    subprocess.run([sys.executable, "-c", KILLED, path], check=True)
    assert len(os.listdir(tmp_path)) == 4
    assert same(bp.load_repair(path), result(1.0))
    bp.save_repair(result(2.0), path)  # what the writers left is in nobody's way
    assert same(bp.load_repair(path), result(2.0))


def test_of_several_writers_at_once_one_wins_and_a_reader_always_finds_a_whole_file(tmp_path: Path) -> None:
    """Safetensors opens a path several times, so that a reader must notice a file that is replaced meanwhile."""
    path, values = tmp_path / "r", [1.0, 2.0, 3.0]
    bp.save_repair(result(values[0], 32), path)
    writers = [threading.Thread(target=lambda v=v: [bp.save_repair(result(v, 32), path) for _ in range(20)]) for v in values]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        loaded = bp.load_repair(path)
        assert any(same(loaded, result(value, 32)) for value in values)
    for writer in writers:
        writer.join()
    assert os.listdir(tmp_path) == ["r"]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a kilobyte; nothing else may write meanwhile, such as pytest its report."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_os_error_and_leaves_the_old_files(tmp_path: Path) -> None:
    path, large = tmp_path / "r", bp.BlockMask(torch.ones(128, 128).bool(), bp.BlockGrid((128, 128), (1, 1)))
    bp.save_repair(result(1.0), path)
    bp.save_masks({}, tmp_path / "m")
    with pytest.raises(OSError, match=r"r'$") as caught, full_disk():
        bp.save_repair(result(2.0, 64), path)
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(OSError, match=r"m'$"), full_disk():
        bp.save_masks({"w": large}, tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == ["m", "r"]
    assert same(bp.load_repair(path), result(1.0))
    assert bp.load_masks(tmp_path / "m") == {}


def test_a_path_that_cannot_be_written_to_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    cases = [(tmp_path / "no" / "r", FileNotFoundError), (tmp_path / "file" / "r", NotADirectoryError), (tmp_path / "folder", OSError)]
    for path, error in cases:
        with pytest.raises(error):
            bp.save_repair(result(), path)
    for path in (tmp_path / "no", tmp_path / "folder"):
        with pytest.raises(OSError):
            bp.load_repair(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    bp.save_repair(result(), tmp_path / "r")
    assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == stat.S_IMODE((tmp_path / "any").stat().st_mode)


def test_a_tensor_that_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    bp.save_repair(result(1.0), path := tmp_path / "r")
    with pytest.raises((NotImplementedError, ValueError)):
        bp.save_repair(bp.PruningResult({}, {"w": torch.empty(3, device="meta")}), path)
    assert os.listdir(tmp_path) == ["r"]
    assert same(bp.load_repair(path), result(1.0))


# Damage.


@pytest.mark.slow
def test_a_file_in_which_any_byte_changed_or_that_was_cut_is_an_error_or_says_the_same(tmp_path: Path) -> None:
    bp.save_repair(saved := result(), path := tmp_path / "r.safetensors")
    content = path.read_bytes()
    for position in range(len(content)):
        for change in (1, 0x20, 0x80):
            damaged = bytearray(content)
            damaged[position] ^= change
            path.write_bytes(damaged)
            assert _is_error_or(saved, path)
        path.write_bytes(content[:position])
        assert _is_error_or(saved, path)


@given(results(), st.data())
def test_a_damaged_file_never_gives_other_values(saved: bp.PruningResult, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bp.save_repair(saved, path := Path(folder) / "r.safetensors")
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        assert _is_error_or(saved, path)


def _is_error_or(saved: bp.PruningResult, path: Path) -> bool:
    try:
        return same(bp.load_repair(path), saved)
    except ValueError as error:
        return "r.safetensors" in str(error)


FORGED: dict[str, tuple[dict[str, str | None], str]] = {
    "no checksum": ({"sha256": None}, "its checksum is not that of its contents"),
    "a mask file": ({"format": "blockprune.masks"}, "holds no repair: it has format 'blockprune.masks'"),
    "no format": ({"format": None}, "holds no repair: it has format None"),
    "a new version": ({"version": "2"}, "update blockprune"),
    "layers that are no list": ({"layers": '"0"'}, "its layers are not a list"),
    "layers that are numbers": ({"layers": "[0]"}, "its layers are not a list"),
    "a layer twice": ({"layers": '["0", "0"]'}, "its layers are not a list of different names"),
    "layers that are no JSON": ({"layers": "["}, "its layers cannot be read"),
    "nested layers": ({"layers": "[" * 100000}, "its layers cannot be read"),
    "no weights": ({"weights": None}, "its weights cannot be read"),
    "weights without a tensor": ({"weights": '["0.weight", "v"]'}, "differ, such as in 'weights.v'"),
    "a tensor without a name": ({"weights": "[]"}, "differ, such as in 'weights.0.weight'"),
    "no grids": ({"grids": None}, "its grids cannot be read"),
    "a mask of another size": ({"grids": '{"0.weight": {"shape": [64, 64], "block": [1, 1]}}'}, "4096 blocks and needs 512 bytes"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_file_with_a_right_checksum_is_a_value_error_that_names_it(kind: str, tmp_path: Path) -> None:
    changes, message = FORGED[kind]
    bp.save_repair(result(), path := tmp_path / "r.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in list(file.keys())}
    del metadata["sha256"]
    metadata = {key: value for key, value in (metadata | changes).items() if value is not None}
    checksum = {} if "sha256" in changes else {"sha256": _checksum(metadata, tensors)}
    save_file(tensors, path, metadata=metadata | checksum)
    with pytest.raises(ValueError) as caught:
        bp.load_repair(path)
    assert "r.safetensors" in str(caught.value)
    assert message in str(caught.value)


def test_masks_and_results_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    bp.save_repair(result(), tmp_path / "r")
    bp.save_masks({}, tmp_path / "m")
    with pytest.raises(ValueError, match=r"holds no masks: it has format 'blockprune.repair'"):
        bp.load_masks(tmp_path / "r")
    with pytest.raises(ValueError, match=r"holds no repair: it has format 'blockprune.masks'"):
        bp.load_repair(tmp_path / "m")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_every_type_of_tensor_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {"w": (normal((3, 5), 0) * 8).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    bp.save_repair(saved := bp.PruningResult({}, weights, tuple(json.loads('["0"]'))), tmp_path / "r")
    assert same(bp.load_repair(tmp_path / "r"), saved)
