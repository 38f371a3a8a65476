"""Shrunk Hugging Face models are loaded by transformers alone, from the configuration that was saved with them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blockprune as bp
from blockprune import export
from blockprune.export import uniform_widths
from blockprune.model.hf_checkpoint import is_config, model_config

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch_pruning")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
IDS = torch.arange(16).view(2, 8)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, num_key_value_heads=4, **SIZES))


def qwen3() -> Any:
    config = transformers.Qwen3Config(vocab_size=64, head_dim=16, num_key_value_heads=4, tie_word_embeddings=True, **SIZES)
    return transformers.Qwen3ForCausalLM(config)


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=64, **SIZES))


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SIZES))


MAKE = {"llama": llama, "qwen3": qwen3, "bert": bert, "vit": vit}
FIRST = ("up_proj", "gate_proj", "intermediate.dense", "fc1")  # rows are hidden units
SECOND = ("down_proj", "fc2")  # columns are hidden units
ATTENTION = ("o_proj", "attention.output.dense")  # columns are heads


def masked(make: Callable[[], Any], units: tuple[int, int], heads: tuple[int, int]) -> Any:
    """A model whose layers keep these numbers of hidden units and of heads, by layer."""
    torch.manual_seed(0)
    model, masks = make().eval(), {}
    for name, p in model.named_parameters():
        layer, owner = int(".1." in name), name.removesuffix(".weight")
        if name == owner or p.ndim != 2:
            continue
        is_second = owner.endswith(SECOND) or (owner.endswith("output.dense") and "attention" not in owner)
        if owner.endswith(FIRST):
            masks[name] = bp.BlockMask(torch.arange(128)[:, None] < units[layer], bp.BlockGrid(tuple(p.shape), (1,)))
        elif is_second:
            masks[name] = bp.BlockMask(torch.arange(128)[None] < units[layer], bp.BlockGrid(tuple(p.shape), (-1, 1)))
        elif owner.endswith(ATTENTION):
            masks[name] = bp.BlockMask(torch.arange(8)[None] < heads[layer], bp.BlockGrid(tuple(p.shape), (-1, p.shape[1] // 8)))
    return bp.apply_masks(model, masks)


def output(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IMAGES if model.config.model_type == "vit" else IDS).logits
    return logits


def shrunk(model: Any, **options: Any) -> Any:
    return export.shrink(model, IMAGES if model.config.model_type == "vit" else IDS, **options)


@pytest.mark.usefixtures("without_blockprune_hf")
@pytest.mark.parametrize("family", MAKE)
def test_a_shrunk_model_is_loaded_by_transformers(family: str, tmp_path: Path) -> None:
    model = masked(MAKE[family], units=(48, 80), heads=(2, 4))
    before = model.config.to_dict()
    result = shrunk(model)
    result.model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)
    assert loaded.config.intermediate_size == 80
    assert loaded.config.num_attention_heads == {"llama": 4, "vit": 4}.get(family, 8)
    if family == "llama":
        assert (loaded.config.num_key_value_heads, loaded.config.head_dim) == (2, 8)
    assert model.config.to_dict() == before  # the given model is not changed
    free = shrunk(model, uniform=False)
    assert free.widths is None
    sizes = [sum(p.numel() for p in m.parameters()) for m in (free.model, loaded)]
    assert list(result.widths.parameters) == sizes
    assert "intermediate_size 128 -> 80" in str(result)
    assert f"{sizes[1] / sizes[0] - 1:+.1%} parameters for uniform widths" in str(result)
    for units in result.removed:  # what the table says is what the model lacks
        layer = result.model.get_submodule(units.layer)
        width = layer.out_features if units.side == "outputs" else layer.in_features
        assert width == units.total - len(units.indices)


def test_the_dtype_and_the_generation_config_stay() -> None:
    model = masked(llama, units=(48, 80), heads=(4, 4)).bfloat16()
    model.generation_config.max_new_tokens = 3
    small = shrunk(model).model
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small.generation_config.max_new_tokens == 3
    assert small.generate(IDS, do_sample=False).shape == (2, 11)


def test_a_number_of_heads_that_the_configuration_refuses_is_raised_to_the_next(tmp_path: Path) -> None:
    model = masked(llama, units=(128, 128), heads=(2, 6))  # 64 is no multiple of 6 heads
    result = shrunk(model)
    result.model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.num_attention_heads == 8
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)
    assert any("cannot express" in units.reason for units in result.kept)


class ModelOfAnotherLibrary(torch.nn.Linear):
    """With ``save_pretrained`` and a configuration, neither of transformers."""

    config = {"in_features": 8}  # noqa: RUF012

    def save_pretrained(self, folder: Path) -> None: ...


def test_a_configuration_of_another_library_is_none_of_a_hugging_face_model() -> None:
    model = ModelOfAnotherLibrary(8, 8)
    assert model_config(model) is None
    assert uniform_widths.uniform_widths(ModelOfAnotherLibrary(8, 4), model) is None
    assert not is_config(model.config)
    clip = transformers.CLIPConfig()
    assert is_config(clip)
    assert is_config(clip.text_config)
    hugging_face = llama()
    assert model_config(hugging_face) is hugging_face.config
    assert model_config(torch.nn.ModuleList([hugging_face])) is None


def t5_with_empty_heads() -> tuple[Any, dict[str, Tensor]]:
    """A T5 of which one attention has two empty heads of four, and its inputs."""
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    model, masks = transformers.T5ForConditionalGeneration(config).eval(), {}
    for name, p in model.named_parameters():
        if "EncDecAttention" in name:
            keep, block = torch.arange(32) >= 16, (-1, 1) if ".o." in name else (1,)
            masks[name] = bp.BlockMask(keep[None] if ".o." in name else keep[:, None], bp.BlockGrid(tuple(p.shape), block))
    return bp.apply_masks(model, masks), {"input_ids": IDS, "decoder_input_ids": IDS}


def test_zeros_fill_up_whole_heads_of_t5(tmp_path: Path) -> None:
    model, example = t5_with_empty_heads()
    result = export.shrink(model, example)
    assert result.widths is not None
    assert result.not_uniform == ""
    result.model.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = type(model).from_pretrained(tmp_path)(**example).logits
        torch.testing.assert_close(logits, model(**example).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"HEAD_SIZES": ()}, r"with uniform widths the outputs change \(by"),
        ({"_built_shapes": lambda *_: None}, "no configuration was found of which T5ForConditionalGeneration gets such widths"),
    ],
)
def test_a_model_without_uniform_widths_says_that_it_cannot_be_loaded(
    change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(uniform_widths, name, value)
    model, example = t5_with_empty_heads()
    with pytest.warns(UserWarning, match=rf"{reason}.*from_pretrained cannot load"):
        result = export.shrink(model, example)
    assert result.widths is None
    assert re.search(reason, result.not_uniform)
    assert re.search(f"config .*{reason}", str(result))
    assert export.shrink(model, example, uniform=False).not_uniform == ""
