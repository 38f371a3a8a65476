"""Safetensors files that are written as a whole or not at all, and read with checks."""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. An existing file is replaced in one step, when the new one is complete and on the disk.

    The same tensors and metadata give the same bytes. Several processes and threads may write to one path: the file is then that of one of
    them. A process that is killed may leave a file whose name ends in ``.tmp``.

    Raises:
        OSError: the disk is full, or the folder is missing or cannot be written to. An existing file is as it was.
    """

    def write(unfinished: str) -> None:
        save_file(_with_own_memory(tensors), unfinished, metadata=dict(metadata))
        _sort_metadata(unfinished)

    try:
        replace_file(path, write)
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1])), os.fspath(path)) if code else OSError(f"{path}: {error}")) from None


def replace_file(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Write a file as a whole or not at all: under another name, then to the disk, then in the old file's place.

    Args:
        path: of the file; its folder exists.
        write: (path) -> None, writes the file.

    Raises:
        OSError: the disk is full, or the folder is missing or cannot be written to. An existing file is as it was.
    """
    unfinished = f"{os.fspath(path)}.{secrets.token_hex(8)}.tmp"
    try:
        with open(unfinished, "xb") as file:
            permissions = os.fstat(file.fileno()).st_mode
        write(unfinished)
        os.chmod(unfinished, permissions)  # some versions of safetensors let only the owner read a file
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
    _sync_folder(os.path.dirname(os.path.abspath(path)))


def remove_unfinished(paths: Collection[Path]) -> None:
    """Remove what `replace_file` has left beside these files because its process was killed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from blockprune.core.tensor_file import remove_unfinished
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("a", "a.0123456789abcdef.tmp", "b.0123456789abcdef.tmp"):
        ...         (Path(folder) / name).touch()
        ...     remove_unfinished([Path(folder) / "a"])
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['a', 'b.0123456789abcdef.tmp']
    """
    for folder in {path.parent for path in paths}:
        for file in folder.glob("*.tmp"):
            if file.with_name(re.sub(r"\.[0-9a-f]+\.tmp$", "", file.name)) in paths:
                file.unlink()


def _sort_metadata(path: str) -> None:
    """Write the metadata of a safetensors file in the order of its keys, in which safetensors writes them at random."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # it is, as safetensors writes the same JSON and fills it up with spaces
            file.seek(8)
            file.write(text.ljust(size))


def _with_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors requires; only what shares memory is copied."""
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        own[name] = plain if plain.data_ptr() not in storages and plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()
        storages.add(own[name].data_ptr())
    return own


def _sync_folder(folder: str) -> None:
    """Write a folder's entries to the disk, so that a renamed file has its new name after a power failure."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems cannot
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_tensors(path: str | os.PathLike[str], *, content: str, version: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file that `write_tensors` wrote, in memory of their own, and its metadata.

    Args:
        path: of the file.
        content: what the file should hold, "masks" or "repair": a file of ``save_{content}`` has the format ``blockprune.{content}``.
        version: the version of the format.

    Raises:
        ValueError: the file is not a safetensors file, has another format or version, or is damaged.
        OSError: the file does not exist or cannot be read.
    """
    while True:
        error = None
        with open(path, "rb") as file:
            try:
                tensors_and_metadata = _read(path, content, version)
            except (SafetensorError, ValueError) as caught:
                error = caught
            # safetensors opens the path several times: what it read is of one file only if no other file has replaced it in between
            is_replaced = not os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        if is_replaced:
            continue
        if isinstance(error, SafetensorError):
            raise ValueError(f"{path} is not a safetensors file, or is truncated: {error}")
        if error:
            raise error
        return tensors_and_metadata


def _read(path: str | os.PathLike[str], content: str, version: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != f"blockprune.{content}":
            raise ValueError(
                f"{path} holds no {content}: it has format {metadata.get('format')!r}, not 'blockprune.{content}'; give a file that "
                f"save_{content} wrote"
            )
        if metadata.get("version") != version:
            raise ValueError(
                f"{path} has version {metadata.get('version')!r}, but this blockprune reads version {version!r}; update blockprune"
            )
        return {name: file.get_tensor(name).clone() for name in list(file.keys())}, metadata
