"""A mask file gives back what was saved, one bit per block, and a hostile one gives a ValueError that names it."""

import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from strategies import masks

import blockprune as bp

Write = Callable[[Path], object]


@given(masks(names=("w", "encoder.0.weight", "größe", "a b\n")))
def test_what_is_saved_is_what_is_loaded_in_its_order(masks_: bp.Masks) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bp.save_masks(masks_, path := Path(folder) / "m.safetensors")
        assert os.listdir(folder) == ["m.safetensors"]  # nothing unfinished is left
        assert bp.load_masks(path) == bp.load_masks(str(path)) == masks_
        assert list(bp.load_masks(path)) == list(masks_)
        with safe_open(path, framework="pt") as file:  # any safetensors reader opens it
            assert {name: file.get_tensor(name).numel() for name in list(file.keys())} == {
                n: -(-m.grid.blocks // 8) for n, m in masks_.items()
            }


@given(masks(names=("w", "größe", 'a "b"\n\x01\x7f\u2028😀\\')))
def test_the_same_masks_have_the_same_bytes(masks_: bp.Masks) -> None:
    """Also those of names that JSON escapes; tensors begin at a multiple of eight bytes, as safetensors has them."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(i) for i in range(8)]
        for path in files:
            bp.save_masks(masks_, path)
        assert len({path.read_bytes() for path in files}) == 1
        assert int.from_bytes(files[0].read_bytes()[:8], "little") % 8 == 0
        assert bp.load_masks(files[0]) == masks_


def test_a_file_costs_a_bit_a_block_and_loaded_masks_outlive_it(tmp_path: Path) -> None:
    path = tmp_path / "m"
    mask = bp.BlockMask(torch.rand(512, 512) < 0.5, bp.BlockGrid((4096, 4096), (8, 8)))
    bp.save_masks({"w": mask}, path)
    assert path.stat().st_size < 512 * 512 / 8 + 1000
    loaded = bp.load_masks(path)
    bp.save_masks({"w": bp.BlockMask(~mask.keep, mask.grid)}, path)
    assert loaded == {"w": mask}
    assert bp.load_masks(path) == {"w": bp.BlockMask(~mask.keep, mask.grid)}


def test_masks_that_are_views_are_saved_as_they_read(tmp_path: Path) -> None:
    keep = torch.rand(9, 6) < 0.5
    for view in (keep.t(), keep[::2], keep[0].expand(4, 6)):
        mask = bp.BlockMask(view, bp.BlockGrid(view.shape, (1, 1)))
        bp.save_masks({"w": mask}, tmp_path / "m")
        assert bp.load_masks(tmp_path / "m") == {"w": mask}


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, mask = tmp_path / "m", bp.BlockMask(torch.ones(2).bool(), bp.BlockGrid((2,), (1,)))
    bp.save_masks({"w": mask}, path)

    def cut(tensors: object, file: str, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("blockprune.core.tensor_file.save_file", cut)
    with pytest.raises(OSError, match="disk full"):
        bp.save_masks({"v": mask}, path)
    assert os.listdir(tmp_path) == ["m"]
    assert bp.load_masks(path) == {"w": mask}


def test_masks_that_no_file_can_hold_are_refused(tmp_path: Path) -> None:
    grid = bp.BlockGrid((6,), (3,))
    mask = bp.BlockMask(torch.tensor([True, False]), grid)
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({"a": mask, "b": bp.BlockMask(mask.keep.to("meta"), grid)}, ValueError, r"masks\['b'\] is on the meta device"),
        ({"a": mask, "b": mask.keep}, TypeError, r"masks\['b'\] is a Tensor, not a BlockMask"),
        ({"__metadata__": mask}, ValueError, "masks has the name '__metadata__'"),
    ]
    for value, error, message in wrong:
        with pytest.raises(error, match=message):
            bp.save_masks(value, tmp_path / "masks.safetensors")
        assert not list(tmp_path.iterdir())


def test_a_missing_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bp.load_masks(tmp_path / "nowhere")


# Hostile files. `written` makes a well-formed file in which single things are wrong.

BYTE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
GOOD = {"w": {"shape": [6, 4], "block": [2, 2]}}  # 3 x 2 blocks: one byte


def written(grids: object = GOOD, bits: bytes = b"\x2a", *, entry: dict | None = None, **metadata: str | None) -> Write:
    text = grids if isinstance(grids, str) else json.dumps(grids)
    meta = {"format": "blockprune.masks", "version": "1", "grids": text, **metadata}
    header = {
        "__metadata__": {k: v for k, v in meta.items() if v is not None},
        "w": {**BYTE, "shape": [len(bits)], "data_offsets": [0, len(bits)]},
    }
    return raw({**header, "w": entry} if entry else header, bits)


def raw(header: dict | bytes, data: bytes = b"") -> Write:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def grid(shape: object, block: object) -> Write:
    return written({"w": {"shape": shape, "block": block}}, bits=b"\0")


def test_the_files_below_are_well_formed_but_for_what_is_wrong_with_them(tmp_path: Path) -> None:
    written()(tmp_path / "m")
    keep = torch.tensor([[False, True], [False, True], [False, True]])
    assert bp.load_masks(tmp_path / "m") == {"w": bp.BlockMask(keep, bp.BlockGrid((6, 4), (2, 2)))}


HOSTILE: dict[str, tuple[Write, str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not a safetensors file"),
    "text": (lambda path: path.write_text("import os; os.system('true')"), "not a safetensors file"),
    "pickle": (lambda path: torch.save({"w": torch.ones(1)}, path), "not a safetensors file"),
    "header longer than the file": (lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"), "not a safetensors file"),
    "header that is no json": (raw(b"{'w': 1}"), "not a safetensors file"),
    "header cut off": (lambda path: (written()(path), path.write_bytes(path.read_bytes()[:40])), "truncated"),
    "truncated bits": (lambda path: (written()(path), path.write_bytes(path.read_bytes()[:-1])), "truncated"),
    "bytes behind the bits": (lambda path: (written()(path), path.write_bytes(path.read_bytes() + b"\0")), "truncated"),
    "bits outside the file": (written(entry={**BYTE, "shape": [2**40], "data_offsets": [0, 2**40]}), "truncated"),
    "another's tensors": (lambda path: save_file({"w": torch.ones(2, 2)}, path), "holds no masks"),
    "wrong format": (written(format="someone.else"), "'someone.else'"),
    "no format": (written(format=None), "format None"),
    "unknown version": (written(version="2"), "version '2'"),
    "no version": (written(version=None), "version None"),
    "no grids": (written(grids="", bits=b"\0"), "grids cannot be read"),
    "grids that are no json": (written("{'w'"), "grids cannot be read"),
    "grids that are a list": (written([GOOD]), "grids cannot be read"),
    "grids that are null": (written("null"), "grids cannot be read"),
    "a grid that is a list": (written({"w": [6, 4]}), "grids cannot be read"),
    "a grid without a block": (written({"w": {"shape": [6, 4]}}), "grids cannot be read"),
    "nested json": (written("[" * 100_000), "grids cannot be read"),
    "nested shape": (written('{"w": {"shape": ' + "[" * 9000 + "]" * 9000 + ', "block": [1]}}'), "grids cannot be read"),
    "number of many digits": (written('{"w": {"shape": [' + "9" * 9000 + '], "block": [1]}}'), "grids cannot be read"),
    "zero block": (grid([6, 4], [0, 2]), "corrupt"),
    "negative block": (grid([6, 4], [-2, 2]), "corrupt"),
    "minus one block": (grid([8], [-1]), "corrupt"),  # a saved grid is resolved
    "block larger than its axis": (grid([6, 4], [7, 2]), "corrupt"),
    "block of more axes": (grid([6, 4], [2, 2, 1]), "corrupt"),
    "no axes": (grid([], []), "corrupt"),
    "empty axis": (grid([6, 0], [2, 1]), "corrupt"),
    "negative axis": (grid([-6, -4], [1, 1]), "corrupt"),
    "fractions": (grid([6.0, 4.0], [2, 2]), "corrupt"),
    "booleans": (grid([True], [True]), "corrupt"),
    "text for a shape": (grid("64", [2]), "corrupt"),
    "an object for a shape": (grid({"6": 4}, [2]), "corrupt"),
    "not a number": (written('{"w": {"shape": [NaN], "block": [Infinity]}}'), "corrupt"),
    "huge grid": (grid([2**40, 2**40], [1, 1]), "fewer than 2^63 elements"),
    "grid beyond 64 bits": (grid([10**30], [1]), "corrupt"),
    "few huge blocks": (grid([2**62, 2**62], [2**62, 2**62]), "corrupt"),  # one block, but no tensor has this shape
    "few blocks beyond 64 bits": (grid([2**200], [2**198]), "corrupt"),
    "too few bits": (grid([6, 4], [1, 1]), "24 blocks and needs 3 bytes"),
    "too many bits": (written(bits=b"\x2a\0"), "6 blocks and needs 1 bytes"),
    "bits behind the last block": (written(bits=b"\x6a"), "bits set behind its 6 blocks"),
    "bits of rank two": (written(entry={**BYTE, "shape": [1, 1]}), "needs 1 bytes"),
    "bits of rank zero": (written(entry={**BYTE, "shape": []}), "needs 1 bytes"),
    "bits that are bool": (written(entry={**BYTE, "dtype": "BOOL"}), "torch.bool"),
    "bits that are floats": (written(bits=b"\0" * 4, entry={**BYTE, "dtype": "F32", "data_offsets": [0, 4]}), "torch.float32"),
    "bits of an odd dtype": (written(entry={**BYTE, "dtype": "F8_E8M0"}), "corrupt"),
    "bits of an unknown dtype": (written(entry={**BYTE, "dtype": "X1"}), "not a safetensors file"),
    "a grid without bits": (written({**GOOD, "v": GOOD["w"]}), "name different parameters, such as 'v'"),
    "bits without a grid": (written({}), "name different parameters, such as 'w'"),
    "bits of another name": (written({"v": GOOD["w"]}), "name different parameters"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_a_value_error_that_names_it(kind: str, tmp_path: Path) -> None:
    write, says = HOSTILE[kind]
    path = tmp_path / "masks.from.a.stranger"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ValueError) as caught:
        bp.load_masks(path)
    assert "masks.from.a.stranger" in str(caught.value)
    assert says in str(caught.value)
    assert path.read_bytes() == before


@given(masks(names=("w", "v")), st.data())
def test_a_damaged_file_never_loads_as_anything_but_masks(masks_: bp.Masks, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bp.save_masks(masks_, path := Path(folder) / "m")
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
        message, loaded = str(path), {}
        try:
            loaded = bp.load_masks(path)
        except ValueError as error:
            message = str(error)
        assert str(path) in message
        assert all(isinstance(mask, bp.BlockMask) and mask.keep.shape == mask.grid.size for mask in loaded.values())


def test_a_name_that_is_no_string_is_refused(tmp_path: Path) -> None:
    mask: Any = {0: bp.BlockMask(torch.ones(1).bool(), bp.BlockGrid((1,), (1,)))}
    with pytest.raises(TypeError, match="masks has the name 0, which is no string; give the names of parameters"):
        bp.save_masks(mask, tmp_path / "masks.safetensors")
    assert not list(tmp_path.iterdir())
