"""Masks in safetensors files, one bit per block. A file from an untrusted source is safe to load."""

import json
import os
from typing import Any

import torch
from torch import Tensor

from blockprune.core.grid import BlockGrid
from blockprune.core.tensor_file import read_tensors, write_tensors
from blockprune.core.types import BlockMask, Masks, check_masks

VERSION = "1"
RESERVED = "__metadata__"  # the key of the header in safetensors files


def save_masks(masks: Masks, path: str | os.PathLike[str]) -> None:
    """Write masks to a safetensors file: one bit per block, and the grids in its header.

    An existing file is replaced in one step, when the new one is complete and on the disk; several processes may write to one path.

    Raises:
        OSError: the disk is full, or the folder is missing or cannot be written to. An existing file is as it was.
        TypeError: something else than masks, such as the result of a recipe, or a name that is no string.
        ValueError: a mask on the meta device, or the name ``__metadata__``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bp.save_masks({"w": bp.BlockMask(torch.tensor([True, False]), bp.BlockGrid((6,), (3,)))}, f"{folder}/masks.safetensors")
        ...     bp.load_masks(f"{folder}/masks.safetensors")["w"].keep
        tensor([ True, False])
    """
    check_masks(masks)
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise TypeError(f"masks has the name {name!r}, which is no string; give the names of parameters, such as 'layers.0.weight'")
        if name == RESERVED:
            raise ValueError(f"masks has the name {RESERVED!r}, which safetensors files use for their own data; give it another name")
        if mask.keep.is_meta:
            raise ValueError(f"masks[{name!r}] is on the meta device and has no values to write; make the masks on a CPU or a GPU")
    bits = {name: pack_bits(mask.keep) for name, mask in masks.items()}
    write_tensors(bits, path, {"format": "blockprune.masks", "version": VERSION, "grids": grids_as_json(masks)})


def load_masks(path: str | os.PathLike[str]) -> Masks:
    """Read masks that `save_masks` wrote.

    Nothing in the file is executed, and the memory that is allocated is proportional to the size of the file.

    Raises:
        ValueError: the file is not a mask file, has an unknown version, or its grids and its bits do not match.
        FileNotFoundError: the file does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bp.save_masks({}, f"{folder}/masks.safetensors")
        ...     bp.load_masks(f"{folder}/masks.safetensors")
        {}
    """
    bits, metadata = read_tensors(path, content="masks", version=VERSION)
    grids = read_grids(path, metadata.get("grids", ""))
    if unmatched := sorted(set(grids) ^ set(bits)):
        raise ValueError(f"{path} is corrupt: the grids and the bits name different parameters, such as {unmatched[0]!r}")
    return {name: BlockMask(unpack_bits(path, name, bits[name], grid), grid) for name, grid in grids.items()}


def grids_as_json(masks: Masks) -> str:
    """The grids of masks, by parameter name."""
    return json.dumps({name: {"shape": mask.grid.shape, "block": mask.grid.block} for name, mask in masks.items()})


def read_grids(path: Any, text: str) -> dict[str, BlockGrid]:
    """The grids that `grids_as_json` wrote; ``path`` is that of the file, for error messages."""
    try:
        return {name: _grid(grid["shape"], grid["block"]) for name, grid in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt: its grids cannot be read: {type(error).__name__}: {error}") from None


def _grid(shape: list[int], block: list[int]) -> BlockGrid:
    grid = BlockGrid(tuple(shape), tuple(block))
    if grid.block != tuple(block) or grid.elements >= 1 << 63 or len(shape) > 64:
        raise ValueError("a parameter has at most 64 axes and fewer than 2^63 elements, and its block has as many axes as its shape")
    return grid


def pack_bits(keep: Tensor) -> Tensor:
    """``[*size]`` bool -> ``[blocks / 8]`` uint8; the first block is in the lowest bit."""
    bits = keep.flatten().cpu().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(path: Any, name: str, packed: Tensor, grid: BlockGrid) -> Tensor:
    """The inverse of `pack_bits`; ``path`` and ``name`` are those of the file and the parameter, for error messages."""
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (-(-grid.blocks // 8),):
        raise ValueError(
            f"{path} is corrupt: {name} has {grid.blocks} blocks and needs {-(-grid.blocks // 8)} bytes, "
            f"but has a tensor of shape {tuple(packed.shape)} and type {packed.dtype}"
        )
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1  # [blocks / 8, 8]
    keep = bits.flatten().bool()
    if keep[grid.blocks :].any():
        raise ValueError(f"{path} is corrupt: {name} has bits set behind its {grid.blocks} blocks")
    return keep[: grid.blocks].clone().view(grid.size)
