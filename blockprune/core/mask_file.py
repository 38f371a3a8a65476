"""Masks in safetensors files, one bit per block. A file from an untrusted source is safe to load."""

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blockprune.core.grid import BlockGrid
from blockprune.core.types import BlockMask, Masks

FORMAT, VERSION = "blockprune.masks", "1"


def save_masks(masks: Masks, path: str | os.PathLike[str]) -> None:
    """Write masks to a safetensors file: one bit per block, and the grids in its header.

    An existing file is replaced only when the new one is complete.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bp.save_masks({"w": bp.BlockMask(torch.tensor([True, False]), bp.BlockGrid((6,), (3,)))}, f"{folder}/masks.safetensors")
        ...     bp.load_masks(f"{folder}/masks.safetensors")["w"].keep
        tensor([ True, False])
    """
    grids = {name: {"shape": mask.grid.shape, "block": mask.grid.block} for name, mask in masks.items()}
    metadata = {"format": FORMAT, "version": VERSION, "grids": json.dumps(grids)}
    unfinished = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        save_file({name: _packed(mask.keep) for name, mask in masks.items()}, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


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
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} holds no masks: it has format {metadata.get('format')!r}, not {FORMAT!r}; give a file that save_masks wrote"
                )
            if metadata.get("version") != VERSION:
                raise ValueError(
                    f"{path} has version {metadata.get('version')!r}, but this blockprune reads version {VERSION!r}; update blockprune"
                )
            grids = _grids(path, metadata.get("grids", ""))
            if unmatched := sorted(set(grids) ^ set(file.keys())):
                raise ValueError(f"{path} is corrupt: the grids and the bits name different parameters, such as {unmatched[0]!r}")
            bits = {name: file.get_tensor(name) for name in grids}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is truncated: {error}") from None
    return {name: BlockMask(_unpacked(path, name, bits[name], grid), grid) for name, grid in grids.items()}


def _grids(path: Any, text: str) -> dict[str, BlockGrid]:
    try:
        return {name: _grid(grid["shape"], grid["block"]) for name, grid in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt: its grids cannot be read: {type(error).__name__}: {error}") from None


def _grid(shape: list[int], block: list[int]) -> BlockGrid:
    grid = BlockGrid(tuple(shape), tuple(block))
    if grid.block != tuple(block) or grid.elements >= 1 << 63 or len(shape) > 64:
        raise ValueError("a parameter has at most 64 axes and fewer than 2^63 elements, and its block has as many axes as its shape")
    return grid


def _packed(keep: Tensor) -> Tensor:
    """``[*size]`` bool -> ``[blocks / 8]`` uint8; the first block is in the lowest bit."""
    bits = keep.flatten().cpu().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpacked(path: Any, name: str, packed: Tensor, grid: BlockGrid) -> Tensor:
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (-(-grid.blocks // 8),):
        raise ValueError(
            f"{path} is corrupt: {name} has {grid.blocks} blocks and needs {-(-grid.blocks // 8)} bytes, "
            f"but has a tensor of shape {tuple(packed.shape)} and type {packed.dtype}"
        )
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [blocks / 8, 8]
    keep = bits.flatten().bool()
    if keep[grid.blocks :].any():
        raise ValueError(f"{path} is corrupt: {name} has bits set behind its {grid.blocks} blocks")
    return keep[: grid.blocks].clone().view(grid.size)
