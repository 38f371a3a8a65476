"""A Trainer in two processes prunes gradually, stops, resumes and exports: with DistributedDataParallel, and with FSDP2.

accelerate shards on GPUs and the like alone; on a CPU it would take DistributedDataParallel, so the test tells it to shard.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import in_two_processes

import blockprune as bp

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

KINDS = ("DDP", "FSDP2")
FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}


def tiny_bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()


def trainer(model: Any, folder: str, options: dict[str, Any]) -> Any:
    from blockprune.hf import GradualPruning  # noqa: PLC0415 (in the ranks alone, where transformers may warn)

    where = bp.including(bp.linears((4, 4)), "bert.encoder.*")
    prune = bp.Pipeline(partial(bp.collect.weights, where=where), bp.metric.l1, bp.allocate.per_layer)
    callback = GradualPruning(prune, partial(bp.schedule.cubic, final=0.75, end=6), every=2)
    rows = [{"input_ids": torch.arange(i, i + 6), "labels": torch.tensor(i % 2)} for i in range(8)]
    steps = {"max_steps": 8, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    arguments = transformers.TrainingArguments(output_dir=folder, use_cpu=True, report_to=[], disable_tqdm=True, **steps, **options)
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])


def shard_on_a_cpu() -> None:
    state = accelerate.state.AcceleratorState
    create = state.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        create(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = accelerate.DistributedType.FSDP, fsdp_plugin

    state.__init__ = init


def run_kind(folder: str, kind: str) -> dict[str, Any]:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of the kind before
    options = FSDP if kind == "FSDP2" else {}
    first = trainer(tiny_bert(), f"{folder}/a", options)
    first.train()
    second = trainer(tiny_bert(), f"{folder}/b", options)
    with torch.no_grad():
        second.model.classifier.weight.add_(1)  # what the checkpoint replaces
    second.train(resume_from_checkpoint=f"{folder}/a/checkpoint-3")
    states = [bp.distributed.full_state_dict(each.model) for each in (first, second)]
    if kind == "DDP":
        first.save_model(f"{folder}/saved")
    masks = [bp.distributed.agree(bp.read_masks(each.model)) for each in (first, second)]
    keeps = [{name: mask.keep for name, mask in of_one.items()} for of_one in masks]
    kinds = {type(each.model_wrapped).__name__ for each in (first, second)}
    return {"states": states, "keep": keeps, "kinds": kinds, "sparsity": bp.sparsity(masks[0])}


def run_rank(rank: int, folder: str) -> dict[str, Any]:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }  # not used
    shard_on_a_cpu()
    return {kind: run_kind(f"{folder}/{kind}", kind) for kind in KINDS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what each rank returned for each kind."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, in_two_processes(run_rank, folder, seconds=120)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_pruned_resumed_and_exported(kind: str, ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, of_ranks = ranks
    first, second = (results[kind] for results in of_ranks)
    assert first["kinds"] == {"DistributedDataParallel" if kind == "DDP" else "FSDPBertForSequenceClassification"}
    assert first["sparsity"] == 0.75
    state, resumed = first["states"]
    assert second["states"] == [{}, {}]
    assert all(torch.equal(state[name], resumed[name]) for name in state)
    torch.testing.assert_close(first["keep"], second["keep"], rtol=0, atol=0)
    exported = tiny_bert(seed=1)
    exported.load_state_dict(state)
    assert bp.sparsity(bp.masks_from_zeros(exported, where=bp.including(bp.linears((4, 4)), "bert.encoder.*"))) == 0.75
    if kind == "DDP":
        loaded = transformers.BertForSequenceClassification.from_pretrained(folder / kind / "saved")
        assert all(torch.equal(tensor, state[name]) for name, tensor in bp.finalize(loaded).state_dict().items())
