"""torchrun of a script that prunes a checkpoint folder writes what one process writes: the same masks, and weights up to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

import blockprune as bp

transformers = pytest.importorskip("transformers")
from blockprune.hf import prune_checkpoint  # noqa: E402 (needs transformers)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

SCRIPT = Path(__file__)


def recipe(rank: int = 0, ranks: int = 1, **options: Any) -> Any:
    ids = torch.randint(64, (4, 2, 12), generator=torch.Generator().manual_seed(1))[rank::ranks]
    batches = [{"input_ids": x, "labels": x} for x in ids]
    return bp.recipes.obs(bp.including(bp.linears((8, 8)), "model.layers.*"), bp.Calibration(batches, progress=False, **options))


class Stopped(Exception):
    pass


def prune_on_this_rank(source: str, destination: str, rank: int, stop: str = "") -> None:
    """A call that stops after a file, or a whole one, the same call again, and others that are refused."""
    own = recipe(rank, 2, reduce=bp.distributed.all_reduce)
    files: list[str] = []

    def callback(file: str) -> None:
        files.append(file)
        if file == stop:
            raise Stopped

    masks = prune_checkpoint(source, destination, own, 0.5, callback=callback, spill=not stop)
    assert bool(files) == (rank == 0)
    assert masks == bp.load_masks(f"{destination}/masks.safetensors") == prune_checkpoint(source, destination, own, 0.5)
    with pytest.raises(ValueError, match="begun with another sparsity"):
        prune_checkpoint(source, destination, own, 0.25)


def stop_on_rank_0(rank: int, folder: str) -> None:
    """Rank 0 stops alone, as if its disk were full, and the other one ends with the process group."""
    try:
        prune_on_this_rank(f"{folder}/dense", f"{folder}/two", rank, "model-00002-of-00004.safetensors")
    except Stopped:
        os._exit(0)


def torchrun(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_torchrun_writes_the_files_of_one_process_also_after_an_interruption(tmp_path: Path) -> None:
    from two_processes import in_two_processes  # noqa: PLC0415 (torchrun starts this file and does not find it)

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "dense")
    masks = prune_checkpoint(tmp_path / "dense", tmp_path / "one", recipe(), 0.5)
    with pytest.raises(mp.ProcessRaisedException, match="Process 1 terminated"):
        in_two_processes(stop_on_rank_0, tmp_path)
    assert (tmp_path / "two" / "model-00002-of-00004.safetensors").exists()
    assert not (tmp_path / "two" / "model.safetensors.index.json").exists()
    ended = torchrun(tmp_path / "dense", tmp_path / "two")
    assert not ended.returncode, ended.stderr
    assert bp.load_masks(tmp_path / "two" / "masks.safetensors") == masks
    one, two = ({path.name: path for path in (tmp_path / folder).iterdir()} for folder in ("one", "two"))
    assert one.keys() == two.keys()
    for file, path in one.items():
        if file.startswith("model-"):
            torch.testing.assert_close(load_file(two[file]), load_file(path))
        elif file == "pruning.json":  # it also says which batches each process had
            assert json.loads(two[file].read_text())["source"] == json.loads(path.read_text())["source"]
        elif file != "masks.safetensors":
            assert two[file].read_bytes() == path.read_bytes()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    prune_on_this_rank(*sys.argv[1:], dist.get_rank())
    dist.destroy_process_group()
