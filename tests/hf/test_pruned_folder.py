"""A folder that is being written: what is not complete is made again, whatever is left from before, and all ranks learn of an error."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from interruption import Stopped, stop_after
from two_processes import in_two_processes

import blockprune as bp

transformers = pytest.importorskip("transformers")
from blockprune.hf import prune_checkpoint, pruned_folder  # noqa: E402 (needs transformers)
from blockprune.hf.pruned_folder import PrunedFolder, is_sealed, write_sealed  # noqa: E402

MASKS = {"a": bp.BlockMask(torch.tensor([True, False]), bp.BlockGrid((4,), (2,)))}
WHERE = bp.including(bp.linears((8, 8)), "model.layers.*")


class Killed(BaseException):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, function: str, number: int) -> None:
    """The process ends after this call of a function of the module."""
    whole, calls = getattr(pruned_folder, function), iter(range(100))

    def killed(*args: Any, **options: Any) -> Any:
        result = whole(*args, **options)
        if next(calls) == number:
            raise Killed
        return result

    monkeypatch.setattr(pruned_folder, function, killed)


@pytest.mark.parametrize(
    "killed_at", [("save_masks", 0), ("write_tensors", 0), ("_digest", 0), ("_digest", 1), ("replace_file", 0)], ids=str
)
@pytest.mark.parametrize("deleted", ["model", "masks", "nothing"])
def test_a_write_that_is_killed_is_made_again_though_there_are_notes_of_earlier_files(
    deleted: str, killed_at: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notes belong to files with other bytes; a file that a user deleted as damaged leaves its note."""
    folder = PrunedFolder(tmp_path, [["a"]])
    folder.work.mkdir()
    folder.write(0, {"a": torch.zeros(4)}, masks={})
    if deleted != "nothing":
        (tmp_path / folder.file(0) if deleted == "model" else folder.work / "masks-00001.safetensors").unlink()
    with monkeypatch.context() as patch:
        kill_at(patch, *killed_at)
        with pytest.raises(Killed):
            folder.write(0, {"a": torch.ones(4)}, masks=MASKS)
    assert not folder.is_written(0)
    folder.write(0, {"a": torch.ones(4)}, masks=MASKS)
    assert folder.is_written(0)
    assert folder.masks(0) == MASKS
    assert folder.tensors(0, ["a"])["a"].tolist() == [1.0] * 4


def test_the_note_of_an_earlier_file_goes_before_the_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "budget.safetensors"
    write_sealed(path, tmp_path, lambda: path.write_text("old"))
    kill_at(monkeypatch, "_digest", 0)
    with pytest.raises(Killed):
        write_sealed(path, tmp_path, lambda: path.write_text("new"))
    assert not is_sealed(path, tmp_path)


def tiny(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder / "dense")
    return folder / "dense"


def loss(output: Any, batch: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = output.logits.square().mean()
    return result


def obs(**options: Any) -> bp.recipes.LayerByLayer:
    ids = torch.randint(64, (2, 2, 12), generator=torch.Generator().manual_seed(1))
    return bp.recipes.obs(WHERE, bp.Calibration(list(ids), loss=loss, progress=False, **options))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_files_of_earlier_versions_which_noted_nothing_are_made_again_with_a_warning(tmp_path: Path) -> None:
    go = partial(prune_checkpoint, tiny(tmp_path), recipe=obs(), sparsity=0.5)
    masks = go(destination=tmp_path / "whole")
    with pytest.raises(Stopped):
        go(destination=tmp_path / "again", callback=stop_after(1))
    notes = list((tmp_path / "again" / "unfinished").glob("*.sha256"))
    assert len(notes) == 3  # of the budget, of a layer and of its masks
    for note in notes:
        note.unlink()
    files: list[str] = []
    with pytest.warns(
        UserWarning, match=r"again has 3 files, such as .*, of which nothing says that they are complete.* earlier"
    ) as caught:
        assert go(destination=tmp_path / "again", callback=files.append) == masks
    assert caught[0].filename == __file__
    assert files == sorted(path.name for path in (tmp_path / "whole").glob("model-*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("file", ["config.json", "1_Pooling/config.json", "1_Pooling/deep/notes.txt", "model.safetensors.index.json"])
def test_no_file_of_a_killed_process_is_left_and_others_stay(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny(tmp_path)
    (source / "1_Pooling" / "deep").mkdir(parents=True)
    for name in ("1_Pooling/config.json", "1_Pooling/deep/notes.txt", "1_Pooling/own.tmp", "own.tmp"):
        (source / name).write_text("{}")
    go = partial(prune_checkpoint, source, recipe=bp.recipes.magnitude(WHERE), sparsity=0.5)
    masks = go(destination=tmp_path / "whole")
    pruned, replace, remove = tmp_path / "pruned", os.replace, os.remove

    def killed(unfinished: str, path: str) -> None:
        if Path(path) == pruned / file:
            raise Killed
        replace(unfinished, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(os, "remove", lambda path: None if str(path).endswith(".tmp") else remove(path))  # the process is dead
        with pytest.raises(Killed):
            go(destination=pruned)
    assert len(list((pruned / file).parent.glob(f"{Path(file).name}.*.tmp"))) == 1
    (pruned / "mine.0123456789abcdef.tmp").write_text("of a user")
    assert go(destination=pruned) == masks == go(destination=pruned)
    (pruned / "mine.0123456789abcdef.tmp").unlink()
    read = [{str(path.relative_to(f)): path.read_bytes() for path in f.rglob("*") if path.is_file()} for f in (pruned, tmp_path / "whole")]
    assert read[0] == read[1]
    assert (pruned / "own.tmp").exists()


# Several processes.


def begin_on_rank(rank: int, group: str, folder: str) -> None:
    """Rank 0 ends after a layer, as if it were killed, and the other one with the process group."""
    callback = (lambda file: os._exit(0)) if rank == 0 else None
    prune_checkpoint(f"{folder}/dense", f"{folder}/pruned", obs(reduce=bp.distributed.all_reduce), 0.5, callback=callback)


def go_on_on_rank(rank: int, group: str, folder: str) -> tuple[list[str], str]:
    """The files whose bytes a rank reads, and the error that it raises."""
    read: list[str] = []
    digest = pruned_folder._digest

    def counted(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    pruned_folder._digest = counted
    try:
        prune_checkpoint(f"{folder}/dense", f"{folder}/pruned", obs(reduce=bp.distributed.all_reduce), 0.5)
    except ValueError as error:
        return read, str(error)
    return read, ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_first_rank_reads_the_bytes_alone_and_all_learn_of_a_damaged_file(tmp_path: Path) -> None:
    tiny(tmp_path)
    groups = [tmp_path / str(i) for i in range(4)]
    for group in groups:
        group.mkdir()
    with pytest.raises(mp.ProcessRaisedException, match="Process 1 terminated"):
        in_two_processes(begin_on_rank, groups[0], str(tmp_path))
    for group, file in zip(groups[1:], ("budget", "masks-00001"), strict=False):
        path = tmp_path / "pruned" / "unfinished" / f"{file}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        (read, error), (read_by_second, error_of_second) = in_two_processes(go_on_on_rank, group, str(tmp_path))
        assert error == error_of_second
        assert f"{path} is damaged" in error
        assert path.name in read
        assert not read_by_second
        path.write_bytes(whole)
    (read, error), (read_by_second, error_of_second) = in_two_processes(go_on_on_rank, groups[3], str(tmp_path))
    assert {"budget.safetensors", "masks-00001.safetensors", "model-00001-of-00003.safetensors"} <= set(read)
    assert error == error_of_second == ""
    assert not read_by_second
    assert (tmp_path / "pruned" / "model.safetensors.index.json").exists()
