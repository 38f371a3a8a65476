"""A function in two processes that can talk to each other."""

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
multiprocessing.set_forkserver_preload(  # what is not installed is left out
    ["blockprune.hf", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "transformers.models.llama.modeling_llama"]
)


def in_two_processes(function: Callable[..., Any], folder: Path, *args: Any, seconds: int = 60) -> list[Any]:
    """What ``function(rank, folder, *args)`` returns on each rank of a gloo group; an operation that takes longer than this fails.

    They are forked from a server that imports torch and transformers once for all calls, and never runs them.
    """
    mp.start_processes(_run, (function, str(folder), args, seconds), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def _run(rank: int, function: Callable[..., Any], folder: str, args: tuple[Any, ...], seconds: int) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timeout)
    torch.save(function(rank, folder, *args), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # freeing the reducer of DistributedDataParallel may hang: it joins a thread that needs Python's lock
