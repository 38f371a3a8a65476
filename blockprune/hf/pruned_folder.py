"""The folder into which a pruned checkpoint is written piece by piece, so that an interrupted call can go on.

While it is not finished, it has files of weights, a state that says what is being made, and a folder for what only the work needs. The
index of the weights is written last.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from blockprune.core.mask_file import load_masks, save_masks
from blockprune.core.tensor_file import remove_unfinished, replace_file, write_tensors
from blockprune.core.types import Masks
from blockprune.hf.checkpoint_folder import INDEX, Checkpoint, stored_tensors
from blockprune.model.sharding import gather_from_ranks, on_first_rank

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STATE, MASKS, WORK = "pruning.json", "masks.safetensors", "unfinished"
WEIGHT_FILES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".index.json"),
    *(".onnx", ".onnx_data", ".onnx.data", ".tflite", ".mlmodel", ".pb", ".npz", ".npy", ".pkl", ".pdparams", ".keras"),
)


@attrs.frozen(eq=False)
class PrunedFolder:
    """A folder that is being written.

    Args:
        path: of the folder.
        parts: the keys that each file of weights has, in the order of the files.
        callback: called with the name of each file of weights after it is written.

    Example:
        >>> import tempfile
        >>> from blockprune.hf.pruned_folder import PrunedFolder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pruned = PrunedFolder(Path(folder), [["a"], ["b"]])
        ...     pruned.work.mkdir()
        ...     pruned.write(0, {"a": torch.ones(2)}, masks={})
        ...     pruned.is_written(0), pruned.is_written(1), pruned.file(1)
        (True, False, 'model-00002-of-00002.safetensors')
    """

    path: Path
    parts: Sequence[Collection[str]]
    callback: Callable[[str], None] | None = None

    @property
    def work(self) -> Path:
        """The folder for what is not part of the result."""
        return self.path / WORK

    @property
    def is_finished(self) -> bool:
        """Whether all files are complete."""
        return (self.path / INDEX).exists()

    def file(self, number: int) -> str:
        """The name of a file of weights."""
        return f"model-{number + 1:05d}-of-{len(self.parts):05d}.safetensors"

    def is_written(self, number: int) -> bool:
        """Whether a file of weights and its masks are complete. The bytes of both are read, unless the whole folder is finished.

        Raises:
            ValueError: a file has been damaged or is another one.
        """
        path = self.path / self.file(number)
        if not path.exists():
            return False
        if set(stored_tensors(path)) != set(self.parts[number]):
            raise ValueError(f"{path} has different tensors than this checkpoint; delete it, and it will be made again")
        return self.is_finished or (is_sealed(path, self.work) and is_sealed(self._masks(number), self.work))

    def write(self, number: int, tensors: Mapping[str, Tensor], *, masks: Masks) -> None:
        """Write a file of weights, after its masks.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        path, masks_path = self.path / self.file(number), self._masks(number)
        for file in (path, masks_path):  # of files from before, of which these may be new versions
            _seal(file, self.work).unlink(missing_ok=True)
        write_sealed(masks_path, self.work, lambda: save_masks(masks, masks_path))
        write_sealed(path, self.work, lambda: write_tensors(tensors, path, {"format": "pt"}))
        if self.callback:
            self.callback(self.file(number))

    def masks(self, number: int) -> Masks:
        """The masks of a file that is written."""
        return load_masks(self._masks(number))

    def tensors(self, number: int, keys: Collection[str]) -> dict[str, Tensor]:
        """Tensors of a file that is written."""
        written = Checkpoint(self.path, stored_tensors(self.path / self.file(number)))
        return {key: written.read(key) for key in keys}

    def finish(self, source: Path) -> Masks:
        """Write the masks and the index, and copy the files of the source that are not the model's weights (`side_files`)."""
        masks = {name: mask for number in range(len(self.parts)) for name, mask in self.masks(number).items()}
        save_masks(masks, self.path / MASKS)
        copied = side_files(source)
        remove_unfinished({self.path / file for file in copied})
        for file in copied:
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path / file, lambda path, file=file: shutil.copyfile(source / file, path))  # type: ignore[misc]
        weight_map = {key: self.file(number) for number, keys in enumerate(self.parts) for key in keys}
        size = sum(_data_bytes(self.path / self.file(number)) for number in range(len(self.parts)))
        write_json(self.path / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
        return masks

    def _masks(self, number: int) -> Path:
        return self.work / f"masks-{number + 1:05d}.safetensors"


def write_sealed(path: Path, work: Path, write: Callable[[], Any]) -> None:
    """Write a file, and note in the work folder which bytes it has; a note about an earlier file goes first, as it would be wrong.

    Args:
        path: of the file.
        work: the folder for the note.
        write: writes the file, as a whole or not at all.

    Example:
        >>> import tempfile
        >>> from blockprune.hf.pruned_folder import is_sealed, write_sealed
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path, work = Path(folder) / "a", Path(folder)
        ...     before = is_sealed(path, work)
        ...     write_sealed(path, work, lambda: path.write_text("5"))
        ...     before, is_sealed(path, work)
        (False, True)
    """
    _seal(path, work).unlink(missing_ok=True)
    write()
    digest = _digest(path)
    replace_file(_seal(path, work), lambda unfinished: Path(unfinished).write_text(digest))


def is_sealed(path: Path, work: Path) -> bool:
    """Whether a file is complete: it is there, and has the bytes that `write_sealed` noted.

    Raises:
        ValueError: it has other bytes.
    """
    if not path.exists() or not _seal(path, work).exists():
        return False
    if _seal(path, work).read_text() != _digest(path):
        raise ValueError(f"{path} is damaged: it has other bytes than were written; delete it, and it will be made again")
    return True


def _seal(path: Path, work: Path) -> Path:
    return work / f"{path.name}.sha256"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def side_files(source: Path) -> list[Path]:
    """What a folder of a model has besides its weights, relative to the folder, in order.

    A subfolder that has weights is this model in another format, or another model, and is left out as a whole; but not one that
    modules.json names, which is a further module of a sentence-transformers model. Hidden subfolders, such as .git, are left out.

    Example:
        >>> import tempfile
        >>> from blockprune.hf.pruned_folder import side_files
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for file in ("config.json", "model.safetensors", "1_Pooling/config.json", "onnx/config.json", "onnx/model.onnx"):
        ...         (Path(folder) / file).parent.mkdir(exist_ok=True)
        ...         (Path(folder) / file).touch()
        ...     [file.as_posix() for file in side_files(Path(folder))]
        ['1_Pooling/config.json', 'config.json']
    """
    modules, names = _module_folders(source), []
    for entry in sorted(source.iterdir()):
        if entry.is_file():
            files = [] if entry.name == STATE or _has_weights(entry) else [entry]
        else:
            files = [] if entry.name.startswith(".") else sorted(path for path in entry.rglob("*") if path.is_file())
            if entry.name not in modules and any(map(_has_weights, files)):
                files = []
        names += [file.relative_to(source) for file in files]
    return names


def _has_weights(file: Path) -> bool:
    return file.name.endswith(WEIGHT_FILES) or ".data-" in file.name  # of TensorFlow: variables.data-00000-of-00001


def _module_folders(source: Path) -> set[str]:
    """The subfolders that the modules.json of a sentence-transformers model names."""
    try:
        return {module["path"].partition("/")[0] for module in json.loads((source / "modules.json").read_text())}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()


def _data_bytes(path: Path) -> int:
    """The bytes of the tensors of a safetensors file: what follows the header, whose length it begins with."""
    with open(path, "rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


@contextlib.contextmanager
def opened_by_first(folder: PrunedFolder, state: Mapping[str, Any], reduce: Callable[..., Any] | None) -> Iterator[None]:
    """`opened` by the first of the processes that ``reduce`` adds over; all raise its errors, and wait for all at the end.

    Example:
        >>> import tempfile
        >>> from blockprune.hf.pruned_folder import PrunedFolder, opened_by_first
        >>> with tempfile.TemporaryDirectory() as path, opened_by_first(PrunedFolder(Path(path), []), {"sparsity": 0.5}, None):
        ...     sorted(os.listdir(path))
        ['pruning.json', 'unfinished']
    """
    with contextlib.ExitStack() as stack:
        on_first_rank(lambda: stack.enter_context(opened(folder, state)), reduce)
        yield
        gather_from_ranks(None, reduce)


@contextlib.contextmanager
def opened(folder: PrunedFolder, state: Mapping[str, Any]) -> Iterator[None]:
    """Let this process alone write into a folder, and remove what only the work needs if it is finished at the end.

    Args:
        folder: it may exist if it is empty, or if an earlier call with the same state has written it.
        state: what the result depends on, by the words that an error message says.

    A warning says that files will be made again of which nothing says that they are complete, such as all files of earlier versions.

    Raises:
        ValueError: the folder holds something else, or has another state.
        BlockingIOError: another process is writing into it.
        OSError: it cannot be made.

    Example:
        >>> import tempfile
        >>> from blockprune.hf.pruned_folder import PrunedFolder, opened
        >>> with tempfile.TemporaryDirectory() as path, opened(PrunedFolder(Path(path), []), {"sparsity": 0.5}):
        ...     sorted(os.listdir(path))
        ['pruning.json', 'unfinished']
    """
    path = folder.path
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        is_begun = any(path.glob("model-*.safetensors")) or any(folder.work.glob("*.safetensors"))
        if not (path / STATE).exists() and (others := sorted(other.name for other in path.iterdir())):
            raise ValueError(f"{path} holds {others[0]} and is not a folder that prune_checkpoint began; give an empty or new folder")
        if not is_begun:
            write_json(path / STATE, state)
        _check_state(path / STATE, state)
        folder.work.mkdir(exist_ok=True)
        remove_unfinished({path / file for file in (STATE, MASKS, INDEX, *map(folder.file, range(len(folder.parts))))})
        if not folder.is_finished:
            _warn_of_unsealed(folder)
        yield
        if folder.is_finished:
            shutil.rmtree(folder.work)


def _warn_of_unsealed(folder: PrunedFolder) -> None:
    files = sorted((*folder.path.glob("model-*.safetensors"), *folder.work.glob("*.safetensors")))
    if unsealed := [file for file in files if not _seal(file, folder.work).exists()]:
        warnings.warn(
            f"{folder.path} has {len(unsealed)} files, such as {unsealed[0].name}, of which nothing says that they are complete, so they "
            "are made again: the process was killed as it wrote them, or an earlier version of blockprune, which noted nothing, began the "
            "folder",
            stacklevel=10,
        )


def _check_state(path: Path, state: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text())
        if not isinstance(before, dict):
            raise ValueError(f"it holds a {type(before).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; delete the folder and begin again") from None
    for what, value in state.items():
        if before.get(what) != json.loads(json.dumps(value)):
            raise ValueError(
                f"{path.parent} was begun with another {what}: {before.get(what)!r} and not {value!r}; call prune_checkpoint as before, or "
                "give another folder"
            )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock that the system releases when the process ends, however it ends. Windows has none for folders."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is writing into {folder}; wait for it, or give another folder") from None
        yield
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole or not at all.

    Example:
        >>> import tempfile
        >>> from blockprune.hf.pruned_folder import write_json
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(f"{folder}/a.json", {"a": 1})
        ...     Path(f"{folder}/a.json").read_text()
        '{"a": 1}'
    """
    replace_file(path, lambda unfinished: Path(unfinished).write_text(json.dumps(value)))
