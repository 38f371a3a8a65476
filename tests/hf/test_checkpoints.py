"""Masked and exported models through ``save_pretrained`` and ``from_pretrained``."""

import copy
import importlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import blockprune as bp
from blockprune import export
from blockprune.model.experts import is_stacked
from blockprune.native import spmm

transformers = pytest.importorskip("transformers")
import blockprune.hf  # noqa: E402 (needs transformers)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(16).view(2, 8)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **SIZES, **options))


def qwen3(**options: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=64, head_dim=16, num_key_value_heads=2, **SIZES, **options))


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=64, **SIZES))


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SIZES))


MAKE: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True, attention_bias=True),
    "qwen3": qwen3,
    "bert": bert,
    "vit": vit,
}
LAYERS = bp.including(bp.linears((16, 16)), "*layer*.[01].*")
BACKEND = "native" if spmm.instructions() else "torch"  # that of loaded layers


def masked(make: Callable[[], Any], where: bp.Where = LAYERS) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    return bp.apply_masks(model, bp.recipes.magnitude(where)(model, 0.5).masks)


def exported(make: Callable[[], Any] = llama, where: bp.Where = LAYERS, dtype: str | None = None) -> Any:
    return export.block_sparse(masked(make, where), backend=BACKEND, dtype=dtype)


def output(model: Any) -> Tensor:
    with torch.no_grad():
        result = model(IMAGES if model.config.model_type == "vit" else IDS)
    return result.logits if "logits" in result else result.last_hidden_state


def sparse_layers(model: Any) -> dict[str, export.BlockSparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, export.BlockSparseLinear)}


def edit(folder: Path, **changes: Any) -> None:
    """Write tensors of a folder's file again, or leave them out if they are None."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("shards", [None, "50KB"], ids=["one", "several"])
@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("family", MAKE)
def test_an_exported_model_comes_back(family: str, dtype: str | None, shards: str | None, tmp_path: Path) -> None:
    model = exported(MAKE[family], dtype=dtype)
    model.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards is not None)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(output(loaded), output(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert bp.read_masks(loaded) == bp.read_masks(model)
    assert str(loaded) == str(model)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "again")), output(model))


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("block", [(32, 32), (-1, 1), (3, 3)])
def test_an_exported_model_comes_back_with_its_pruned_blocks(block: tuple[int, int], dtype: str | None, tmp_path: Path) -> None:
    model = masked(llama, bp.including(bp.linears(block), "*layer*.[01].*"))
    sparse = export.block_sparse(model, backend="torch", dtype=dtype, max_error=float("inf"))
    sparse.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert bp.read_masks(loaded) == bp.read_masks(sparse) == bp.read_masks(model)


@pytest.mark.parametrize("family", MAKE)
def test_a_masked_model_comes_back_with_its_masks(family: str, tmp_path: Path) -> None:
    model = masked(MAKE[family])
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert bp.read_masks(loaded) == bp.read_masks(model)
    assert torch.equal(output(loaded), output(model))
    for name, parameter in model.named_parameters():  # the dense values behind the zeros, too
        assert torch.equal(loaded.get_parameter(name), parameter), name
    loaded.load_state_dict(model.state_dict())
    export.block_sparse(loaded, backend="torch").save_pretrained(tmp_path / "exported")
    torch.testing.assert_close(output(type(model).from_pretrained(tmp_path / "exported")), output(model))


def test_a_mask_behind_weight_norm_comes_back(tmp_path: Path) -> None:
    """The convolution of wav2vec2, HuBERT and WavLM, whose weight torch computes from two tensors."""
    sizes = {"conv_dim": (16,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1, "num_conv_pos_embeddings": 16}
    config = transformers.Wav2Vec2Config(vocab_size=32, num_conv_pos_embedding_groups=4, **sizes, **SIZES)
    torch.manual_seed(0)
    model, x, name = transformers.Wav2Vec2Model(config).eval(), torch.randn(1, 800), "encoder.pos_conv_embed.conv.weight"
    shape = model.get_submodule(name.removesuffix(".weight")).weight.shape
    keep = torch.ones(shape[0] // 4, 1, 1).bool()
    keep[::2] = False
    bp.apply_masks(
        model,
        {
            name: bp.BlockMask(keep, bp.BlockGrid(shape, (4,))),
            **bp.recipes.magnitude(bp.named("*.k_proj.weight", (16, 16)))(model, 0.5).masks,
        },
    )
    model.save_pretrained(tmp_path)
    again = transformers.Wav2Vec2Model.from_pretrained(tmp_path).eval()
    assert bp.read_masks(again) == bp.read_masks(model)
    with torch.no_grad():
        assert torch.equal(again(x)[0], model(x)[0])
    key = name.replace("weight", "parametrizations.weight.1._extra_state")
    edit(tmp_path, **{key: None})
    with pytest.raises(ValueError, match=rf"{key}: the folder lacks this tensor of a masked weight"):
        transformers.Wav2Vec2Model.from_pretrained(tmp_path)


def test_masks_on_tied_embeddings_come_back(tmp_path: Path) -> None:
    where = bp.first_of(bp.named("model.embed_tokens.weight", (16, 16)), LAYERS)
    model = masked(MAKE["tied llama"], where)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert bp.read_masks(loaded) == bp.read_masks(model)
    assert loaded.lm_head.parametrizations.weight.original is loaded.model.embed_tokens.parametrizations.weight.original
    assert torch.equal(output(loaded), output(model))


@pytest.mark.slow
def test_a_fresh_process_loads_the_folders(tmp_path: Path) -> None:
    models = {"masked": masked(llama), "exported": exported(llama)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    program = (
        "import sys, torch, transformers, blockprune as bp, blockprune.hf\n"
        "for folder in sys.argv[1:]:\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "    torch.save((model(torch.arange(16).view(2, 8)).logits, len(bp.read_masks(model))), f'{folder}.pt')"
    )
    subprocess.run([sys.executable, "-c", program, *(tmp_path / name for name in models)], check=True)
    for name, model in models.items():
        logits, count = torch.load(tmp_path / f"{name}.pt")
        assert torch.equal(logits, output(model))
        assert count == len(bp.read_masks(model)) == 14


def test_the_file_is_as_large_as_the_kept_share(tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1}
    model = masked(lambda: transformers.LlamaModel(transformers.LlamaConfig(vocab_size=8, **sizes)), bp.linears((16, 16)))
    export.block_sparse(model, backend=BACKEND).save_pretrained(tmp_path / "sparse")
    bp.finalize(model).save_pretrained(tmp_path / "dense")
    sparse, dense = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("sparse", "dense"))
    elements = sum(p.numel() for p in bp.finalize(model).parameters())
    kept = 1 - sum((~bp.expand(mask.keep, mask.grid)).sum().item() for mask in bp.read_masks(model).values()) / elements
    assert sparse < (kept + 0.02) * dense


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"torch_dtype": torch.float16}, {"dtype": "auto"}, {"dtype": "float64"}],
    ids=["bfloat16", "torch_dtype", "auto", "float64"],
)
@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_model_loads_in_any_type(weights: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    model = exported(dtype=weights).bfloat16()
    model.save_pretrained(tmp_path)
    dtype = torch.bfloat16 if "auto" in options.values() else getattr(torch, str(next(iter(options.values()))).removeprefix("torch."))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, **options)
    assert {p.dtype for p in [*loaded.parameters(), *(layer.weight for layer in sparse_layers(loaded).values())]} == {dtype}
    assert {layer.values.dtype for layer in sparse_layers(loaded).values()} == {torch.int8 if weights else dtype}
    for name, layer in sparse_layers(model).items():
        if layer.scale is not None:
            assert torch.equal(sparse_layers(loaded)[name].scale, layer.scale), "in float32, whatever the type of the model"
    expected = copy.deepcopy(model).to(dtype)
    torch.testing.assert_close(output(loaded), output(expected), atol=1e-2, rtol=1e-2)  # the rotary frequencies stay in float32
    assert loaded.half().float().dtype == torch.float32  # transformers refuses this for quantized models


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
@pytest.mark.parametrize("make", [masked, exported])
def test_a_model_loads_with_a_device_map(make: Callable[..., Any], device_map: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = make(llama)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map=device_map)), output(model))


def test_the_base_model_of_a_folder_and_a_head_for_it(tmp_path: Path) -> None:
    model = exported()
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(output(base), output(model.model))
    base.save_pretrained(tmp_path / "base")
    headed = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(output(headed.model), output(base))


def test_a_loaded_model_is_treated_as_a_plain_one(tmp_path: Path) -> None:
    exported().save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not getattr(loaded, "is_quantized", False)
    assert getattr(loaded, "hf_quantizer", None) is None
    assert loaded.config.quantization_config == {"quant_method": "blockprune", "format": 1}
    loaded(IDS, labels=IDS).loss.backward()
    assert loaded.lm_head.weight.grad is not None


def test_the_configuration_names_blockprune_only_while_there_are_blocks(tmp_path: Path) -> None:
    model = masked(llama)
    sparse = export.block_sparse(model, backend=BACKEND)
    plain = llama()
    for marked in (model, sparse, copy.deepcopy(sparse), export.load_state_dict(plain, sparse.state_dict())):
        assert marked.config.quantization_config == {"quant_method": "blockprune", "format": 1}
    for unmarked in (plain, bp.finalize(model), export.dense(sparse), export.dense(model), bp.apply_masks(copy.deepcopy(model), {})):
        assert not hasattr(unmarked.config, "quantization_config")
        unmarked.save_pretrained(tmp_path)
        assert "blockprune" not in (tmp_path / "config.json").read_text()
    other = llama()
    other.config.quantization_config = {"quant_method": "another"}
    bp.apply_masks(other, bp.recipes.magnitude(LAYERS)(other, 0.5).masks)
    assert bp.finalize(other).config.quantization_config == other.config.quantization_config == {"quant_method": "another"}


def bart() -> Any:
    sides = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}
    options = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=64, d_model=32, **options))


ONE_PART: dict[str, tuple[Callable[[], Any], bp.Where]] = {
    "an encoder": (bart, bp.including(bp.linears((16, 16)), "*encoder.*")),
    "a decoder": (bart, bp.including(bp.linears((16, 16)), "*decoder.*")),
    "a head": (llama, bp.named("lm_head.weight", (16, 16))),
    "a classifier": (bert, bp.named("classifier.weight", (1, 16))),
}


@pytest.mark.parametrize("kind", ["masked", "exported"])
@pytest.mark.parametrize("part", ONE_PART)
def test_masks_of_one_part_come_back(part: str, kind: str, tmp_path: Path) -> None:
    """Other parts with the same configuration have none."""
    model = (masked if kind == "masked" else exported)(*ONE_PART[part])
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert bp.read_masks(loaded) == bp.read_masks(model) != {}
    assert torch.equal(output(loaded), output(model))


def test_models_that_were_built_from_one_configuration_are_marked_each_for_itself(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=64, **SIZES)
    student, teacher = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    masks = bp.recipes.magnitude(LAYERS)(student, 0.5).masks
    bp.apply_masks(student, masks)
    assert student.config is student.model.config is student.model.layers[0].self_attn.config is not config
    assert teacher.config is config
    for plain in (teacher, transformers.BertModel(transformers.BertConfig(vocab_size=64, **SIZES))):
        plain.save_pretrained(tmp_path / "plain")
        assert "blockprune" not in (tmp_path / "plain" / "config.json").read_text()
    skeleton = transformers.AutoModelForCausalLM.from_config(student.config)
    bp.apply_masks(skeleton, {})
    student.save_pretrained(tmp_path)
    assert bp.read_masks(transformers.LlamaForCausalLM.from_pretrained(tmp_path)) == masks
    skeleton.save_pretrained(tmp_path)
    assert "blockprune" not in (tmp_path / "config.json").read_text()


def test_masks_of_a_base_model_come_back_with_the_model_around_it(tmp_path: Path) -> None:
    model = llama().eval()
    bp.apply_masks(model.model, bp.recipes.magnitude(bp.linears((16, 16)))(model.model, 0.5).masks)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert bp.read_masks(loaded) == bp.read_masks(model) != {}


def configs_in(model: Any) -> list[Any]:
    """The configurations that the modules of a model have."""
    return [vars(module)["config"] for module in model.modules() if "config" in vars(module)]


REMOVE: dict[str, Callable[[Any], Any]] = {
    "apply_masks": lambda base: bp.apply_masks(base, {}),
    "finalize": lambda base: bp.finalize(base, inplace=True),
}


@pytest.mark.parametrize("remove", REMOVE)
@pytest.mark.parametrize("masks_on", ["the base model", "the whole model"])
def test_a_base_model_without_masks_again_keeps_the_configuration_of_the_model_around_it(masks_on: str, remove: str) -> None:
    model = llama().eval()
    part = model.model if masks_on == "the base model" else model
    bp.apply_masks(part, bp.recipes.magnitude(LAYERS)(part, 0.5).masks)
    assert model.config.quantization_config["quant_method"] == "blockprune"
    REMOVE[remove](model.model)
    assert len(configs_in(model)) > 4
    assert all(config is model.config for config in configs_in(model))
    assert not hasattr(model.config, "quantization_config")
    model.config.output_hidden_states = True
    assert model(IDS).hidden_states is not None


@pytest.mark.parametrize("kind", ["masked", "exported"])
def test_a_base_model_without_masks_again_leaves_the_mark_of_a_pruned_head(kind: str, tmp_path: Path) -> None:
    model = masked(llama, bp.linears((16, 16)))
    bp.apply_masks(model.model, {})
    if kind == "exported":
        model = export.block_sparse(model, backend=BACKEND)
        bp.apply_masks(model.model, {})
    assert all(config is model.config for config in configs_in(model))
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert bp.read_masks(loaded).keys() == bp.read_masks(model).keys() == {"lm_head.weight"}
    assert torch.equal(output(loaded), output(model))
    assert not hasattr(export.dense(model).config, "quantization_config")


def test_two_models_with_a_head_that_transformers_takes_for_base_models_do_not_mark_each_other() -> None:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    first, second = (transformers.T5ForConditionalGeneration(config) for _ in range(2))
    assert first.base_model is first
    bp.apply_masks(first, bp.recipes.magnitude(bp.including(bp.linears((4, 4)), "*block.*"))(first, 0.5).masks)
    assert first.config.quantization_config["quant_method"] == "blockprune"
    assert second.config is config
    assert not hasattr(config, "quantization_config")


def test_base_models_of_one_configuration_mark_each_other_until_none_has_blocks(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=64, **SIZES)
    first, second, plain = (transformers.LlamaModel(config).eval() for _ in range(3))
    for model in (first, second):
        bp.apply_masks(model, bp.recipes.magnitude(bp.linears((16, 16)))(model, 0.5).masks)
    bp.apply_masks(first, {})
    for name, model in {"first": first, "second": second, "plain": plain}.items():
        model.save_pretrained(tmp_path / name)
        loaded = transformers.LlamaModel.from_pretrained(tmp_path / name)
        assert bp.read_masks(loaded) == bp.read_masks(model)
        assert torch.equal(output(loaded), output(model))
    assert len(bp.read_masks(second)) == 14
    bp.apply_masks(second, {})
    assert first.config is second.config is plain.config is config
    assert not hasattr(config, "quantization_config")


def test_a_configuration_inside_another_stays_a_part_of_it(tmp_path: Path) -> None:
    text, vision = ({**SIZES, "num_hidden_layers": 1} for _ in range(2))
    config = transformers.CLIPConfig(text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4})
    model = transformers.CLIPModel(config)
    bp.apply_masks(model, bp.recipes.magnitude(bp.including(bp.linears((16, 16)), "text_model.*"))(model, 0.5).masks)
    model.save_pretrained(tmp_path)
    assert bp.read_masks(transformers.CLIPModel.from_pretrained(tmp_path)) == bp.read_masks(model)
    bp.apply_masks(model, {})
    assert model.config is config
    assert model.config.text_config is model.text_model.config
    assert model.config.vision_config is model.vision_model.config
    assert "blockprune" not in model.config.to_json_string()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_rowwise_int8_comes_back(tied: bool, tmp_path: Path) -> None:
    model = export.rowwise_int8(llama(tie_word_embeddings=tied).eval())
    assert isinstance(model.lm_head, export.Int8BlockSparseLinear)
    model.save_pretrained(tmp_path)
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize("kind", ["masked", "exported"])
@pytest.mark.parametrize(
    ("make", "other", "lacking"),
    [
        (llama, "LlamaModel", "lm_head"),
        (lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **SIZES)), "BertForSequenceClassification", "cls"),
        (bert, "BertForMaskedLM", r"bert\.pooler"),
    ],
)
def test_a_pruned_head_does_not_keep_a_folder_from_loading_without_it(
    make: Callable[[], Any], other: str, lacking: str, kind: str, tmp_path: Path
) -> None:
    model = (masked if kind == "masked" else exported)(make, bp.linears((2, 16)))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"{other} lacks the layers of these (masks|block-sparse layers) in the folder.*{lacking}"):
        loaded = getattr(transformers, other).from_pretrained(tmp_path)
    masks = bp.read_masks(loaded)
    assert len(masks) == len(bp.read_masks(loaded.base_model)) > 10
    with torch.no_grad():
        assert torch.equal(loaded.base_model(IDS)[0], model.base_model(IDS)[0])


FOREIGN = {
    "BertForMaskedLM": {},
    "BertForSequenceClassification": {},
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 2, "n_head": 4},  # has a lm_head.weight, as the folder does
    "T5ForConditionalGeneration": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},  # likewise, and no base model
    "OPTForCausalLM": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}


@pytest.mark.parametrize("kind", ["masked", "exported"])
@pytest.mark.parametrize("where", ["layers", "all Linears"])
@pytest.mark.parametrize("other", FOREIGN)
def test_a_folder_of_another_class_is_refused(other: str, where: str, kind: str, tmp_path: Path) -> None:
    model = (masked if kind == "masked" else exported)(llama, LAYERS if where == "layers" else bp.linears((16, 16)))
    model.save_pretrained(tmp_path)
    kind_of_model = getattr(transformers, other)
    config = kind_of_model.config_class.from_pretrained(tmp_path, **FOREIGN[other])
    with pytest.raises(ValueError, match=rf"{other} has no such layer.*model\.layers\.0\..*; load it with the class that was saved"):
        kind_of_model.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)


def test_a_plain_model_with_the_configuration_of_a_masked_one_comes_back(tmp_path: Path) -> None:
    model = masked(llama)
    plain = transformers.LlamaForCausalLM(model.config).eval()
    plain.save_pretrained(tmp_path)
    assert torch.equal(output(transformers.LlamaForCausalLM.from_pretrained(tmp_path)), output(plain))


@pytest.mark.usefixtures("without_blockprune_hf")
def test_without_blockprune_transformers_refuses_an_exported_model_and_loads_zeros_of_a_masked_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = masked(llama)
    export.block_sparse(model, backend=BACKEND).save_pretrained(tmp_path / "exported")
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "exported")
    model.save_pretrained(tmp_path / "masked")
    assert torch.equal(output(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "masked")), output(model))


@pytest.mark.parametrize(
    ("format", "message"),
    [(2, "has format 2 of blockprune's checkpoints, and this .* up to 1.*pip install -U blockprune"), ("x", "format='x'"), (0, "format=0")],
)
@pytest.mark.parametrize("make", [masked, exported])
def test_another_format_is_refused(make: Callable[..., Any], format: Any, message: str, tmp_path: Path) -> None:
    make(llama).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= {"format": format, "new_option": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("col", lambda x: x + 1000, f"{NAME}: the folder does not hold what was exported: .*col must be from 0"),
        ("col", lambda x: x.long(), f"{NAME}: .*col is torch.int64"),
        ("crow", lambda x: x[:-1].clone(), f"{NAME}: .*crow has"),
        ("values", lambda x: x[:-4].clone(), f"{NAME}: .*values has"),
        ("layout", lambda x: x * 2, f"{NAME}: .*layout is"),
        ("layout", lambda x: x.float(), f"{NAME}: .*layout is torch.float32"),
        ("layout", lambda x: torch.stack((x[1], x[0], *x[2:])), f"{NAME}: "),
        ("layout", lambda x: None, f"{NAME}: the folder lacks layout"),
        ("values", lambda x: None, f"{NAME}: the folder lacks values"),
        ("crow", lambda x: None, f"{NAME}: the folder lacks crow"),
    ],
)
def test_corrupt_blocks_are_refused(part: str, change: Callable[[Tensor], Any], message: str, tmp_path: Path) -> None:
    exported().save_pretrained(tmp_path)
    key = f"{NAME}.{part}"
    edit(tmp_path, **{key: change(load_file(tmp_path / "model.safetensors")[key])})
    with pytest.raises((ValueError, RuntimeError), match=message):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scale", lambda x: None, rf"{NAME}: the folder does not hold what was exported: .*values are torch.int8 with no scale"),
        ("scale", lambda x: x * float("nan"), f"{NAME}: .*scale must be finite"),
        ("scale", lambda x: x[:-1].clone(), rf"{NAME}: .*scale is torch.float32 of shape \(127,\)"),
        ("values", lambda x: x.float(), f"{NAME}: .*values are torch.float32 with a scale"),
        ("col", lambda x: x + 1000, f"{NAME}: .*col must be from 0"),
    ],
)
def test_corrupt_int8_blocks_are_refused(part: str, change: Callable[[Tensor], Any], message: str, tmp_path: Path) -> None:
    exported(dtype="int8").save_pretrained(tmp_path)
    key = f"{NAME}.{part}"
    edit(tmp_path, **{key: change(load_file(tmp_path / "model.safetensors")[key])})
    with pytest.raises((ValueError, RuntimeError), match=message):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


MASK = f"{NAME}.parametrizations.weight"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("0.keep", lambda x: x[:-1].clone(), f"{NAME}.weight: the mask in the state does not fit"),
        ("0._extra_state", lambda x: None, rf"{MASK}.0._extra_state: the folder lacks this tensor"),
        ("original", lambda x: x[:-1].clone(), rf"{MASK}.original: the folder has a masked weight of shape \(127, 64\)"),
        ("original", lambda x: None, f"{MASK}.original"),
        ("0.keep", lambda x: None, f"{MASK}.0.keep"),
    ],
)
def test_corrupt_masks_are_refused(part: str, change: Callable[[Tensor], Any], message: str, tmp_path: Path) -> None:
    masked(llama).save_pretrained(tmp_path)
    key = f"{MASK}.{part}"
    edit(tmp_path, **{key: change(load_file(tmp_path / "model.safetensors")[key])})
    with pytest.raises(ValueError, match=message):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def gpt2() -> Any:
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, **tokens))


KINDS: dict[str, Callable[[Any], Any]] = {
    "masked": lambda model: model,
    "exported": lambda model: export.block_sparse(model, backend=BACKEND),
    "trainable": lambda model: export.block_sparse(model, backend=BACKEND, trainable=True),
    "int8": lambda model: export.block_sparse(model, backend=BACKEND, dtype="int8"),
}


PATTERNS = ["*.c_*.weight", "*.attn.c_proj.weight", "*.0.mlp.c_fc.weight"]  # c_proj is as wide as it is high


@pytest.mark.parametrize(("kind", "pattern"), [*itertools.product(KINDS, PATTERNS), ("masked", "wte.weight")])
def test_a_model_of_as_linears_comes_back(kind: str, pattern: str, tmp_path: Path) -> None:
    model = KINDS[kind](masked(lambda: bp.as_linears(gpt2()), bp.named(f"transformer.{pattern}", (8, 8))))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(loaded), output(model))
    assert bp.read_masks(loaded) == bp.read_masks(model)
    assert type(loaded.transformer.h[1].mlp.c_proj).__name__ != "Conv1D"
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(output(export.load_state_dict(bp.as_linears(gpt2()), state).eval()), output(model))
    plain = bp.from_linears(bp.finalize(export.dense(loaded)), like=gpt2()).eval()
    torch.testing.assert_close(output(plain), output(export.dense(model)))


def test_masks_on_the_transposed_weights_themselves_come_back(tmp_path: Path) -> None:
    model = masked(gpt2, bp.named("transformer.*.c_*.weight", (8, 8)))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(loaded), output(model))
    assert bp.read_masks(loaded) == bp.read_masks(model)


@pytest.mark.parametrize("kind", ["masked", "exported"])
def test_a_model_that_is_not_converted_names_as_linears(kind: str, tmp_path: Path) -> None:
    KINDS[kind](masked(lambda: bp.as_linears(gpt2()), bp.named("transformer.*.c_*.weight", (8, 8)))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"convert the model first: bp.as_linears\(model\)"):
        export.load_state_dict(gpt2(), load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("kind", ["masked", "exported"])
def test_experts_of_as_linears_are_refused_with_what_to_do_which_works(kind: str, tmp_path: Path) -> None:
    def experts() -> Any:
        return transformers.MixtralForCausalLM(
            transformers.MixtralConfig(vocab_size=64, num_local_experts=4, num_key_value_heads=2, **SIZES)
        ).eval()

    if not any(map(is_stacked, experts().modules())):
        pytest.skip("this transformers does not stack experts")
    model = KINDS[kind](masked(lambda: bp.as_linears(experts()), bp.including(bp.linears((16, 16)), "model.layers.*")))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"experts of bp.as_linears, but MixtralForCausalLM stacks its experts.*load_masked or .*load_state"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    load = bp.load_masked if kind == "masked" else export.load_state_dict
    assert torch.equal(output(load(bp.as_linears(experts()), model.state_dict())), output(model))


def test_a_model_of_other_sizes_or_of_another_class_is_refused(tmp_path: Path) -> None:
    exported().save_pretrained(tmp_path)
    config = transformers.LlamaConfig.from_pretrained(tmp_path, intermediate_size=64)
    with pytest.raises((ValueError, RuntimeError), match=r"shape|mismatch"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=config)
    config = transformers.LlamaConfig.from_pretrained(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"model.layers.1.* LlamaForCausalLM has no such layer"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=config)


def test_a_state_dict_instead_of_a_folder_is_refused() -> None:
    model = exported()
    with pytest.raises(ValueError, match=r"safetensors.*export.load_state_dict"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())


def test_a_dense_folder_cannot_be_loaded_as_pruned(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pre-quantized|pre_quantized"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=blockprune.hf.BlockpruneConfig())


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "blockprune.hf")
    with pytest.raises(ImportError, match=r'pip install "blockprune\[lm\]"'):
        importlib.import_module("blockprune.hf")
