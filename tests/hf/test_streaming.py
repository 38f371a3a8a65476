"""A checkpoint folder is pruned layer by layer into the bits that the loaded model gives, wherever it was interrupted."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from interruption import Stopped, stop_after
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

import blockprune as bp
from blockprune import recipes

transformers = pytest.importorskip("transformers")
from blockprune.hf import prune_checkpoint  # noqa: E402 (needs transformers)
from blockprune.hf.checkpoint_folder import Checkpoint, Skeleton  # noqa: E402
from blockprune.hf.pruned_folder import side_files  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options))


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))  # its head is tied


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=16, num_key_value_heads=1, tie_word_embeddings=True, **SIZES))


def neox() -> Any:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))


MAKE: dict[str, Callable[[], Any]] = {"llama": llama, "bert": bert, "qwen3": qwen3, "gpt-neox": neox}
WHERE = bp.including(bp.linears((8, 8)), "*layer*.[012].*")


def batches(padded: bool = True) -> list[dict[str, Tensor]]:
    ids = torch.randint(64, (3, 2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 2, 12, dtype=torch.long)
    if padded:
        mask[1:, 0, 9:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]


def calibration(**options: Any) -> bp.Calibration:
    return bp.Calibration(batches(), progress=False, **options)


RECIPES: dict[str, Callable[[], Any]] = {
    "magnitude": lambda: recipes.magnitude(WHERE),
    "magnitude over the model": lambda: recipes.magnitude(bp.linears((8, 8)), allocate=bp.allocate.per_model),
    "sparsegpt": lambda: recipes.sparsegpt(WHERE, calibration()),
    "sparsegpt, pruned": lambda: recipes.sparsegpt(WHERE, calibration(), target="pruned"),
    "obs": lambda: attrs.evolve(recipes.obs(WHERE, calibration()), budget=None),
    "obs with a budget": lambda: recipes.obs(WHERE, calibration(loss=loss)),
}


def loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
    logits, labels = output.logits[:, :-1].float(), batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def saved(folder: Path, make: Callable[[], Any] = llama, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
    torch.manual_seed(0)
    make().to(dtype).save_pretrained(folder / "dense", max_shard_size=shard)
    return folder / "dense"


def loaded(folder: Path) -> Any:
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    return kind.from_pretrained(folder, dtype="auto")


def in_memory(folder: Path, recipe: Any, sparsity: Any = 0.5) -> tuple[bp.Masks, dict[str, Tensor]]:
    """The masks, and the state dict of the pruned model."""
    model = loaded(folder)
    result = recipe(model, sparsity)
    return result.masks, bp.finalize(bp.apply_masks(model, result.masks, result.weights)).state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def contents(folder: Path) -> dict[str, Any]:
    """The bytes of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# The same bits.


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", MAKE)
def test_it_is_the_recipe_on_the_loaded_model(family: str, recipe: str, tmp_path: Path) -> None:
    source = saved(tmp_path, MAKE[family])
    assert len(list(source.glob("*.safetensors"))) > 2
    masks, weights = in_memory(source, RECIPES[recipe]())
    before = contents(source)
    assert prune_checkpoint(source, tmp_path / "pruned", RECIPES[recipe](), 0.5) == masks
    assert bp.load_masks(tmp_path / "pruned" / "masks.safetensors") == masks
    assert same(loaded(tmp_path / "pruned").state_dict(), weights)
    assert contents(source) == before


@pytest.mark.parametrize("recipe", ["magnitude", "obs with a budget"])
def test_a_bfloat16_checkpoint_is_computed_and_written_in_bfloat16(recipe: str, tmp_path: Path) -> None:
    source = saved(tmp_path, dtype=torch.bfloat16)
    masks, weights = in_memory(source, RECIPES[recipe]())
    assert prune_checkpoint(source, tmp_path / "pruned", RECIPES[recipe](), 0.5) == masks
    assert same(loaded(tmp_path / "pruned").state_dict(), weights)
    assert {x.dtype for path in (tmp_path / "pruned").glob("model-*") for x in load_file(path).values()} == {torch.bfloat16}


@pytest.mark.parametrize("parts", [None, ["self_attn", "mlp"], ["self_attn", ""]])
def test_hidden_states_in_files_and_a_step_of_finetuning_change_no_bit(parts: list[str] | None, tmp_path: Path) -> None:
    source, tune = saved(tmp_path), partial(bp.finetune_layer, epochs=1, held_out=0.34)
    recipe = attrs.evolve(RECIPES["obs"](), finetune=dict.fromkeys(parts, tune) if parts else tune)
    masks, weights = in_memory(source, recipe)
    assert prune_checkpoint(source, tmp_path / "pruned", recipe, 0.5, spill=True) == masks
    assert same(loaded(tmp_path / "pruned").state_dict(), weights)
    assert not [path for path in (tmp_path / "pruned").iterdir() if path.is_dir()]


def test_a_loader_that_shuffles_is_the_recipe_on_the_loaded_model(tmp_path: Path) -> None:
    source = saved(tmp_path)
    loader = DataLoader([{key: x[i] for key, x in batch.items()} for batch in batches() for i in range(2)], batch_size=2, shuffle=True)  # type: ignore[arg-type]
    recipe = recipes.obs(WHERE, bp.Calibration(loader, loss=loss, progress=False))
    torch.manual_seed(1)
    masks, weights = in_memory(source, recipe)
    torch.manual_seed(1)
    assert prune_checkpoint(source, tmp_path / "pruned", recipe, 0.5) == masks
    assert same(loaded(tmp_path / "pruned").state_dict(), weights)


def test_a_mapping_of_sparsities_and_a_single_file(tmp_path: Path) -> None:
    source = saved(tmp_path, shard="1GB")
    assert (source / "model.safetensors").exists()
    shares = {"*.mlp.*": 0.75, "*": 0.25}
    masks, weights = in_memory(source, RECIPES["obs"](), shares)
    assert prune_checkpoint(source, tmp_path / "pruned", RECIPES["obs"](), shares) == masks
    assert same(loaded(tmp_path / "pruned").state_dict(), weights)


def test_another_class_than_that_of_the_configuration_and_buffers(tmp_path: Path) -> None:
    """A model without the head, whose prefix the keys have; its batches give no mask. Batch norms have buffers in the checkpoint."""
    source = saved(tmp_path)
    recipe = recipes.sparsegpt(bp.linears((8, 8)), bp.Calibration([b["input_ids"] for b in batches()], progress=False))
    masks = recipe(transformers.LlamaModel.from_pretrained(source), 0.5).masks
    assert prune_checkpoint(source, tmp_path / "pruned", recipe, 0.5, model_class=transformers.LlamaModel) == masks
    assert bp.masks_from_zeros(loaded(tmp_path / "pruned").model, where=bp.linears((8, 8))) == masks


def test_side_files_are_copied_and_weights_in_other_formats_are_not(tmp_path: Path) -> None:
    source = saved(tmp_path)
    copied = [
        "tokenizer.model",
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "code/a/b.py",
        "a/3_Dense/model.safetensors",
    ]
    left_out = [
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "model.Q4_0.gguf", "optimizer.pt", "pruning.json"),
        *("onnx/model.onnx", "onnx/config.json", "original/consolidated.00.pth", "original/params.json", "checkpoint-5/model.safetensors"),
        *("coreml/a.mlpackage/Manifest.json", "coreml/a.mlpackage/Data/weight.bin", ".git/objects/pack", "pruned before/masks.safetensors"),
        *("weights.npz", "mlx/weights.npz", "jax/params.pkl", "tf/variables/variables.data-00000-of-00001"),
    ]
    for name in (*copied, *left_out):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}, {"idx": 3, "path": "a/3_Dense"}]
    (source / "modules.json").write_text(json.dumps(modules))
    before = contents_below(source)
    (source / "cleaned.json").symlink_to("not there")
    prune_checkpoint(source, source / "pruned", RECIPES["magnitude"](), 0.5)  # also into a subfolder of the source
    found = contents_below(source / "pruned")
    own = {path.name for path in (source / "pruned").glob("*model-*")} | {
        "model.safetensors.index.json",
        "masks.safetensors",
        "pruning.json",
    }
    assert {Path(name).relative_to(source / "pruned").as_posix() for name in found} == {
        *copied,
        *own,
        "config.json",
        "generation_config.json",
    }
    assert all(found[str(source / "pruned" / name)] == before[str(source / name)] for name in copied)
    assert {name: data for name, data in contents_below(source).items() if name not in found} == before


@pytest.mark.parametrize("modules", ["text", "5", '["1_Pooling"]', "[{}]"])
def test_a_modules_json_of_another_form_names_no_folders(modules: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(modules)
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "model.safetensors").write_text("")
    assert side_files(tmp_path) == [Path("modules.json")]


# Interrupted and gone on with.


@pytest.mark.parametrize("recipe", ["magnitude", "sparsegpt"])
def test_stopped_after_any_file_it_goes_on_and_ends_in_the_same_bits(recipe: str, tmp_path: Path) -> None:
    source = saved(tmp_path)
    go = partial(prune_checkpoint, source, recipe=RECIPES[recipe](), sparsity=0.5)
    files: list[str] = []
    go(destination=tmp_path / "whole", callback=files.append)
    assert files == sorted(path.name for path in (tmp_path / "whole").glob("model-*"))
    for count in range(1, len(files) + 1):
        with pytest.raises(Stopped):
            go(destination=tmp_path / "again", callback=stop_after(count))
        with pytest.raises(OSError, match=r"model\.safetensors|config\.json"):
            loaded(tmp_path / "again")
        later: list[str] = []
        go(destination=tmp_path / "again", callback=later.append)
        assert later == files[count:]
        assert contents(tmp_path / "again") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "again")


def test_stopped_again_and_again(tmp_path: Path) -> None:
    source = saved(tmp_path)
    go = partial(prune_checkpoint, source, recipe=RECIPES["obs"](), sparsity=0.5)
    stops = 0
    while True:
        try:
            go(destination=tmp_path / "again", callback=stop_after(1))
            break
        except Stopped:
            stops += 1
    go(destination=tmp_path / "whole")
    assert stops > 3
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path)
    go = partial(prune_checkpoint, source, recipe=RECIPES["sparsegpt"](), sparsity=0.5)
    go(destination=tmp_path / "whole")

    def full(tensors: Any, path: str, *args: Any, **options: Any) -> None:
        if "model-00002" in str(path):
            Path(path).write_bytes(b"part")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("blockprune.core.tensor_file.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            go(destination=tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "model-00001-of-00004.safetensors",
        "pruning.json",
        "unfinished",
    ]
    go(destination=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_what_is_finished_is_returned_and_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    source = saved(tmp_path)
    go = partial(prune_checkpoint, source, tmp_path / "pruned", RECIPES["magnitude"](), 0.5)
    masks = go()
    before = contents(tmp_path / "pruned")
    (tmp_path / "pruned" / "model-00001-of-00004.safetensors.0123.tmp").write_bytes(b"part")
    files: list[str] = []
    assert go(callback=files.append) == masks
    assert not files
    assert contents(tmp_path / "pruned") == before


def test_a_budget_is_kept_for_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path)
    go = partial(prune_checkpoint, source, recipe=RECIPES["obs with a budget"](), sparsity=0.5, spill=True)
    go(destination=tmp_path / "whole")
    with pytest.raises(Stopped):
        go(destination=tmp_path / "again", callback=stop_after(1))
    monkeypatch.setattr("blockprune.hf.streamed_budget.collect_layer_by_layer", None)
    go(destination=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


# Bad input.


@pytest.mark.parametrize("change", ["recipe", "sparsity", "source", "calibration data"])
def test_another_recipe_sparsity_source_or_data_is_refused_on_resume(change: str, tmp_path: Path) -> None:
    source = saved(tmp_path)
    go = partial(prune_checkpoint, destination=tmp_path / "pruned")
    with pytest.raises(Stopped):
        go(source, recipe=RECIPES["sparsegpt"](), sparsity=0.5, callback=stop_after(2))
    before = contents_below(tmp_path / "pruned")
    other = attrs.evolve(RECIPES["sparsegpt"](), calibration=bp.Calibration(batches(padded=False), progress=False))
    recipe = {"recipe": RECIPES["sparsegpt, pruned"](), "calibration data": other}.get(change, RECIPES["sparsegpt"]())
    if change == "source":
        (tmp_path / "other").mkdir()
        source = saved(tmp_path / "other", lambda: llama(initializer_range=0.03))
    with pytest.raises(ValueError, match=rf"pruned was begun with another {change}: .* give another folder"):
        go(source, recipe=recipe, sparsity=0.6 if change == "sparsity" else 0.5)
    assert contents_below(tmp_path / "pruned") == before


def test_a_recipe_whose_functions_differ_is_another_one(tmp_path: Path) -> None:
    """Their representations are the same."""

    def shifted(by: int) -> Any:
        ids = [batch["input_ids"] for batch in batches()]
        options: Any = {"forward": lambda model, batch: model((batch + by) % 64), "progress": False}
        return recipes.sparsegpt(WHERE, bp.Calibration(ids, **options))

    source = saved(tmp_path / "dense")
    with pytest.raises(Stopped):
        prune_checkpoint(source, tmp_path / "pruned", shifted(1), 0.5, callback=stop_after(1))
    with pytest.raises(ValueError, match="another recipe or calibration data"):
        prune_checkpoint(source, tmp_path / "pruned", shifted(5), 0.5)
    prune_checkpoint(source, tmp_path / "pruned", shifted(1), 0.5)


def test_the_data_of_a_budget_counts_on_resume(tmp_path: Path) -> None:
    def budgeted(seed: int) -> Any:
        recipe = recipes.obs(WHERE, calibration(loss=loss))
        ids = torch.randint(64, (3, 2, 12), generator=torch.Generator().manual_seed(seed))
        other = bp.Calibration([{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids], loss=loss, progress=False)
        assert recipe.budget is not None
        collect: Any = recipe.budget.collect
        return attrs.evolve(recipe, budget=attrs.evolve(recipe.budget, collect=partial(collect, calibration=other)))

    source = saved(tmp_path / "dense")
    with pytest.raises(Stopped):
        prune_checkpoint(source, tmp_path / "pruned", budgeted(1), 0.5, callback=stop_after(1))
    with pytest.raises(ValueError, match="another recipe or calibration data"):
        prune_checkpoint(source, tmp_path / "pruned", budgeted(2), 0.5)


def test_a_pruned_folder_is_pruned_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    prune_checkpoint(saved(tmp_path / "dense"), first, RECIPES["magnitude"](), 0.25)
    masks = prune_checkpoint(first, second, RECIPES["magnitude"](), 0.5)
    assert prune_checkpoint(first, second, RECIPES["magnitude"](), 0.5) == masks
    (second / "model-00001-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00001.* is missing"):
        prune_checkpoint(first, second, RECIPES["magnitude"](), 0.5)


def test_folders_that_from_pretrained_reads_otherwise_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "dense")
    save_file({"x": torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(ValueError, match="which from_pretrained reads instead"):
        prune_checkpoint(source, tmp_path / "pruned", RECIPES["magnitude"](), 0.5)
    (source / "model.safetensors").unlink()
    edit_config(source, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"the model ties .* values differ"):
        prune_checkpoint(source, tmp_path / "pruned", RECIPES["magnitude"](), 0.5)


def test_a_sparsity_that_is_no_number_is_refused_and_one_of_numpy_is_taken(tmp_path: Path) -> None:
    source = saved(tmp_path / "dense")
    with pytest.raises(TypeError, match="sparsity='half' must be a number"):
        prune_checkpoint(source, tmp_path / "pruned", RECIPES["magnitude"](), "half")  # type: ignore[arg-type]
    assert bp.sparsity(prune_checkpoint(source, tmp_path / "pruned", RECIPES["magnitude"](), torch.tensor(0.5).numpy())) == 0.5


@pytest.mark.parametrize("recipe", ["magnitude", "sparsegpt", "obs with a budget"])
@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5, float("inf")])
def test_a_sparsity_that_is_no_fraction_is_refused_before_a_folder_is_made(value: float, recipe: str, tmp_path: Path) -> None:
    source = saved(tmp_path)
    go = partial(prune_checkpoint, source, tmp_path / "pruned", RECIPES[recipe]())
    usual = r"must be from 0 \(keep all\) to 1 \(remove all\); 50 % is 0\.5"
    for sparsity, what in ((value, "sparsity"), ({"*mlp*": 0.5, "*": value}, r"sparsity\['\*'\]")):
        with pytest.raises(ValueError, match=rf"^{what}={value} {usual}"):
            go(sparsity)
    assert not (tmp_path / "pruned").exists()


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, num_key_value_heads=2, **SIZES))


def test_stacked_experts_are_refused_with_what_to_do_which_works(tmp_path: Path) -> None:
    source, recipe = saved(tmp_path, mixtral), recipes.magnitude(WHERE)
    message = r"layers\.0\.mlp\.experts\.gate_up_proj \(4, 96, 32\), which transformers stacks .* prune it in memory: .*bp\.as_linears"
    for folder in (source, tmp_path / "again"):
        with pytest.raises(ValueError, match=message):
            prune_checkpoint(folder, tmp_path / "pruned", recipe, 0.5)
        loaded(source).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "pruned").exists()
    assert bp.sparsity(recipe(bp.as_linears(loaded(source)), 0.5).masks) == 0.5


def contents_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_writers_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path)
    go = partial(prune_checkpoint, source, tmp_path / "pruned", RECIPES["magnitude"](), 0.5)

    def second(_: str) -> None:
        with pytest.raises(BlockingIOError, match=r"another process is writing into .*pruned; wait for it, or give another folder"):
            go()

    go(callback=second)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda f: shard(f).unlink(), r"model-00002-of-.*safetensors is missing"),
    "a shard is cut": (lambda f: cut(shard(f)), r"model-00002-of-.* is truncated"),
    "a shard is text": (lambda f: shard(f).write_text("text"), r"model-00002-of-.* is no safetensors file"),
    "the index is text": (lambda f: (f / "model.safetensors.index.json").write_text("text"), r"index.json cannot be read"),
    "the index names a path": (
        lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": "../x.safetensors"})),
        r"index.json cannot be read: ValueError: its weight_map does not name files",
    ),
    "the index lies about a file": (
        lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": m["model.norm.weight"], "model.norm.weight": m["lm_head.weight"]})),
        r"says that .* is in model-.*, but it is in model-",
    ),
    "the index names what no file has": (
        lambda f: edit_index(f, lambda m: m.update({"model.layers.9.weight": m["lm_head.weight"]})),
        r"model.layers.9.weight is in .*, but no file has it",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "has neither model.safetensors.index.json nor model.safetensors"),
    "fewer layers": (lambda f: edit_config(f, num_hidden_layers=2), r"has model.layers.2.*, but config.json describes .* with 2 layers"),
    "more layers": (lambda f: edit_config(f, num_hidden_layers=4), r"LlamaForCausalLM with model.layers.3.*, which no file has"),
    "another width": (lambda f: edit_config(f, intermediate_size=64), r"gate_proj.weight \(64, 32\), but .* \(48, 32\)"),
    "no such class": (lambda f: edit_config(f, architectures=["OurModel"]), r"names the architecture 'OurModel'.*give model_class="),
    "quantized": (lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}), "holds quantized weights"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_with_the_name(name: str, tmp_path: Path) -> None:
    source = saved(tmp_path)
    BAD[name][0](source)
    with pytest.raises((ValueError, OSError), match=BAD[name][1]):
        prune_checkpoint(source, tmp_path / "pruned", RECIPES["magnitude"](), 0.5)
    assert not (tmp_path / "pruned").exists()


def test_a_damaged_file_of_the_result_is_refused_and_made_again_once_deleted(tmp_path: Path) -> None:
    source = saved(tmp_path)
    go = partial(prune_checkpoint, source, recipe=RECIPES["sparsegpt"](), sparsity=0.5)
    go(destination=tmp_path / "whole")
    with pytest.raises(Stopped):
        go(destination=tmp_path / "again", callback=stop_after(3))
    damaged = tmp_path / "again" / "model-00002-of-00004.safetensors"
    cut(damaged)
    with pytest.raises(ValueError, match=r"again/model-00002-of-00004.safetensors .* is truncated"):
        go(destination=tmp_path / "again")
    damaged.unlink()
    go(destination=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


FILES = {
    "again/model-00002-of-00004.safetensors": "sparsegpt",
    "again/unfinished/masks-00002.safetensors": "sparsegpt",
    "again/unfinished/masks.safetensors": "magnitude",
    "again/unfinished/budget.safetensors": "obs with a budget",
    "again/unfinished/masks-00001.safetensors": "magnitude",
}


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_is_noticed_on_resume_and_the_file_made_again_once_deleted(file: str, tmp_path: Path) -> None:
    source, damaged = saved(tmp_path), tmp_path / file
    go = partial(prune_checkpoint, source, recipe=RECIPES[FILES[file]](), sparsity=0.5)
    go(destination=tmp_path / "whole")
    with pytest.raises(Stopped):
        go(destination=tmp_path / "again", callback=stop_after(3))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{file} is damaged: it has other bytes than were written; delete it"):
        go(destination=tmp_path / "again")
    damaged.unlink()
    go(destination=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.parametrize("text", ["[]", "5", "{"])
def test_a_damaged_state_is_refused(text: str, tmp_path: Path) -> None:
    source = saved(tmp_path)
    go = partial(prune_checkpoint, source, tmp_path / "again", RECIPES["magnitude"](), 0.5)
    with pytest.raises(Stopped):
        go(callback=stop_after(1))
    (tmp_path / "again" / "pruning.json").write_text(text)
    with pytest.raises(ValueError, match=r"again/pruning.json is damaged: .*; delete the folder and begin again"):
        go()


@pytest.mark.parametrize("kind", ["masked", "exported"])
def test_a_folder_of_a_masked_or_exported_model_is_refused_with_what_to_do_which_works(kind: str, tmp_path: Path) -> None:
    source, recipe = saved(tmp_path), RECIPES["magnitude"]()
    model = loaded(source)
    bp.apply_masks(model, recipe(model, 0.5).masks)
    (model if kind == "masked" else bp.export.block_sparse(model, backend="torch")).save_pretrained(tmp_path / kind)
    message = rf"{kind} holds a masked or exported model.* bp\.finalize\(model\)\.save_pretrained.* bp\.export\.dense\(model\)"
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(tmp_path / kind, tmp_path / "pruned", recipe, 0.75)
    assert not (tmp_path / "pruned").exists()
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / kind)
    (bp.finalize(again) if kind == "masked" else bp.export.dense(again)).save_pretrained(tmp_path / "other")
    assert prune_checkpoint(tmp_path / "other", tmp_path / "pruned", recipe, 0.75) == recipe(loaded(source), 0.75).masks


def test_a_class_a_callback_or_a_device_that_cannot_be_used_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    go = partial(prune_checkpoint, saved(tmp_path), tmp_path / "pruned", RECIPES["magnitude"](), 0.5)
    with pytest.raises(TypeError, match=r"model_class='Llama' must be a function \(config\) -> model, such as transformers\.Auto"):
        go(model_class="Llama")
    with pytest.raises(TypeError, match=r"callback=5 must be a function \(name of a file\) -> None"):
        go(callback=5)  # type: ignore[arg-type]
    for device in ("nonsense", "meta", 5.5, *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match=rf"device={device!r} cannot be used: .*; give one that this machine has, such as 'cpu'"):
            go(device=device)  # type: ignore[arg-type]
    assert not (tmp_path / "pruned").exists()


def test_what_cannot_be_streamed_is_refused_with_what_to_do(tmp_path: Path) -> None:
    source = saved(tmp_path)
    go = partial(prune_checkpoint, source, tmp_path / "pruned")
    with pytest.raises(ValueError, match=r"needs the whole model; .*recipes.LayerByLayer\("):
        go(recipes.wanda(WHERE, calibration()), 0.5)
    with pytest.raises(TypeError, match=r"recipe is a Pipeline; give a value of bp.recipes"):
        go(recipes.magnitude(WHERE).pipeline, 0.5)
    with pytest.raises(ValueError, match="which would be overwritten; give a new folder"):
        prune_checkpoint(source, source, recipes.magnitude(WHERE), 0.5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"full holds thesis.txt and is not a folder that prune_checkpoint began"):
        prune_checkpoint(source, tmp_path / "full", recipes.magnitude(WHERE), 0.5)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["thesis.txt"]
    with pytest.raises(TypeError, match=r"sparsity is a mapping, .* leave that out: attrs.evolve\(recipe, budget=None\)"):
        go(RECIPES["obs with a budget"](), {"*": 0.5})
    with pytest.raises(TypeError, match="can be used once only; give a list of batches"):
        prune_checkpoint(source, tmp_path / "other", attrs.evolve(RECIPES["sparsegpt"](), calibration=bp.Calibration(iter(batches()))), 0.5)


def test_a_layer_that_is_tied_to_something_else_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, lambda: llama(tie_word_embeddings=True))

    class Tied(transformers.LlamaForCausalLM):  # type: ignore[misc]
        _tied_weights_keys = {  # noqa: RUF012
            "lm_head.weight": "model.embed_tokens.weight",
            "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        }

    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.weight in layer .* is tied to model.layers.1.*; prune it in memory"):
        prune_checkpoint(source, tmp_path / "pruned", RECIPES["sparsegpt"](), 0.5, model_class=Tied)


@pytest.mark.parametrize("recipe", ["sparsegpt", "obs with a budget"])
def test_a_layer_that_runs_several_times_is_refused(recipe: str, tmp_path: Path) -> None:
    source = saved(tmp_path, lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(embedding_size=16, **SIZES)))
    recipes_where = bp.including(bp.linears((8, 8)), "*albert_layer_groups.*")
    make = {"sparsegpt": recipes.sparsegpt, "obs with a budget": recipes.obs}[recipe]
    for prune in (partial(prune_checkpoint, source, tmp_path / "pruned"), lambda *args: args[0](loaded(source), args[1])):
        with pytest.raises(ValueError, match=r"layer 'albert.encoder.albert_layer_groups.0' is called twice"):
            prune(make(recipes_where, calibration(loss=loss)), 0.5)


def offloaded(*disk: str, folder: Path) -> Any:
    """A model on the CPU, of which accelerate keeps some modules on disk."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {part: "disk" if part in disk else "cpu" for part in parts}
    return accelerate.dispatch_model(llama(), device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


LINE = r"blockprune.hf.prune_checkpoint\(source, destination, recipe, sparsity\)"


@pytest.mark.parametrize("recipe", ["magnitude", "sparsegpt", "obs with a budget"])
@pytest.mark.parametrize("disk", [("model.layers.1", "model.layers.2"), ("lm_head",), ("model.embed_tokens",)], ids=" ".join)
def test_offloaded_models_are_refused_with_what_to_call(disk: tuple[str, ...], recipe: str, tmp_path: Path) -> None:
    """Weights that are there can be pruned by magnitude."""
    model = offloaded(*disk, folder=tmp_path)
    if recipe == "magnitude" and "model.layers.1" not in disk:
        torch.manual_seed(0)
        assert RECIPES[recipe]()(model, 0.5).masks == RECIPES[recipe]()(llama(), 0.5).masks
        return
    with pytest.raises(ValueError, match=rf"accelerate has offloaded .*: {LINE}"):
        RECIPES[recipe]()(model, 0.5)


@pytest.mark.parametrize("disk", [(), ("model.embed_tokens",), ("lm_head",)], ids=" ".join)
def test_statistics_of_a_model_that_is_offloaded_in_part_are_those_of_the_model(disk: tuple[str, ...], tmp_path: Path) -> None:
    """With nothing offloaded, accelerate's hooks change no recipe."""
    model, recipe = offloaded(*disk, folder=tmp_path), recipes.wanda(WHERE, calibration())
    torch.manual_seed(0)
    plain = llama()
    assert recipe(model, 0.5).masks == recipe(plain, 0.5).masks
    if not disk:
        found, expected = (RECIPES["obs with a budget"]()(m, 0.5) for m in (model, plain))
        assert found.masks == expected.masks
        assert same(dict(found.weights), dict(expected.weights))


# Memory.


@pytest.mark.parametrize("recipe", ["magnitude", "sparsegpt", "obs"])
def test_the_weights_of_one_layer_are_alive_at_a_time(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted is the memory that was read of the source; norms are read once more when a layer is written."""
    source, read = saved(tmp_path), Checkpoint.read
    seen: list[weakref.ref[Any]] = []
    most = 0

    def counted(checkpoint: Checkpoint, key: str) -> Tensor:
        nonlocal most
        array = read(checkpoint, key).numpy().copy()  # the memory of all tensors that are made of it
        if ".layers." in key and checkpoint.folder == source:
            seen.append(weakref.ref(array))
        most = max(most, alive())
        return torch.from_numpy(array)

    def alive() -> int:
        return sum(array.nbytes for ref in seen if (array := ref()) is not None)

    monkeypatch.setattr(Checkpoint, "read", counted)
    prune_checkpoint(source, tmp_path / "pruned", RECIPES[recipe](), 0.5)
    layer = llama().model.layers[0]
    assert 0 < most <= sum(p.nbytes for p in layer.parameters()) + sum(p.nbytes for p in layer.parameters() if p.ndim == 1)
    gc.collect()
    assert not alive()


def test_a_skeleton_is_empty_but_for_what_is_loaded(tmp_path: Path) -> None:
    skeleton = Skeleton.of(Checkpoint.open(saved(tmp_path, qwen3)))
    names = ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
    whole = loaded(tmp_path / "dense")

    def present() -> list[str]:
        return [name for name, p in skeleton.model.named_parameters(remove_duplicate=False) if not p.is_meta]

    with skeleton.loaded(names):
        assert present() == ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
        assert torch.equal(skeleton.model.lm_head.weight, whole.lm_head.weight)
    assert not present()
    buffers = dict(skeleton.model.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in whole.named_buffers())
    assert skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight
