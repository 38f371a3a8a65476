"""The result of `sequential` in a safetensors file, so that an interrupted call can be resumed by another process."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from blockprune.core.mask_file import grids_as_json, pack_bits, read_grids, unpack_bits
from blockprune.core.tensor_file import read_tensors, write_tensors
from blockprune.core.types import BlockMask
from blockprune.repair.layer_by_layer import PruningResult

VERSION = "1"


def save_repair(result: PruningResult, path: str | os.PathLike[str]) -> None:
    """Write masks, repaired weights and the names of the finished layers to a safetensors file, with a checksum.

    Give it to `sequential` as ``callback=partial(bp.save_repair, path=...)``, and the loaded result as ``resume=``. An existing file is
    replaced in one step, when the new one is complete and on the disk; several processes may write to one path.

    Raises:
        OSError: the disk is full, or the folder is missing or cannot be written to. An existing file is as it was.

    Example:
        >>> import tempfile
        >>> result = bp.PruningResult(masks={}, weights={"fc.weight": torch.ones(2)}, layers=("fc",))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bp.save_repair(result, f"{folder}/repair.safetensors")
        ...     bp.load_repair(f"{folder}/repair.safetensors").weights
        {'fc.weight': tensor([1., 1.])}
    """
    masks = {f"masks.{name}": pack_bits(mask.keep) for name, mask in result.masks.items()}
    tensors = masks | {f"weights.{name}": weight.detach().cpu() for name, weight in result.weights.items()}
    metadata = {
        "format": "blockprune.repair",
        "version": VERSION,
        "grids": grids_as_json(result.masks),
        "weights": json.dumps(list(result.weights)),
        "layers": json.dumps(result.layers),
    }
    write_tensors(tensors, path, {**metadata, "sha256": _checksum(metadata, tensors)})


def load_repair(path: str | os.PathLike[str]) -> PruningResult:
    """Read what `save_repair` wrote; all tensors are on the CPU.

    Nothing in the file is executed, and the memory that is allocated is proportional to the size of the file.

    Raises:
        ValueError: the file is not one that `save_repair` wrote, has an unknown version, or is damaged.
        OSError: the file does not exist or cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bp.save_repair(bp.PruningResult(masks={}, weights={}, layers=("0", "1")), f"{folder}/repair.safetensors")
        ...     bp.load_repair(f"{folder}/repair.safetensors").layers
        ('0', '1')
    """
    tensors, metadata = read_tensors(path, content="repair", version=VERSION)
    checksum = metadata.pop("sha256", None)
    if checksum != _checksum(metadata, tensors):
        raise ValueError(f"{path} is corrupt: its checksum is not that of its contents; use an earlier file, or start again")
    grids = read_grids(path, metadata.get("grids", ""))
    names, layers = (_read_names(path, metadata, key) for key in ("weights", "layers"))
    if unmatched := sorted({*tensors} ^ {*(f"masks.{name}" for name in grids), *(f"weights.{name}" for name in names)}):
        raise ValueError(f"{path} is corrupt: the header and the tensors differ, such as in {unmatched[0]!r}")
    masks = {name: BlockMask(unpack_bits(path, name, tensors[f"masks.{name}"], grid), grid) for name, grid in grids.items()}
    return PruningResult(masks, {name: tensors[f"weights.{name}"] for name in names}, layers)


def _read_names(path: Any, metadata: Mapping[str, str], key: str) -> tuple[str, ...]:
    try:
        names = json.loads(metadata[key])
    except (ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt: its {key} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{path} is corrupt: its {key} are not a list of different names")
    return tuple(names)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a file says: metadata, names, types, shapes and values."""
    header = [sorted(metadata.items()), [(key, str(tensors[key].dtype), [*tensors[key].shape]) for key in sorted(tensors)]]
    digest = hashlib.sha256(json.dumps(header).encode())
    for key in sorted(tensors):
        digest.update(tensors[key].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
