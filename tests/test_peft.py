"""Adapters of peft on a masked model: they are trained in the kept blocks, merged, and the zeros stay."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune as bp

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from blockprune.hf import masked_lora_config  # noqa: E402 (needs transformers)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def masked_model() -> tuple[Any, bp.Masks, Tensor]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    masks = bp.recipes.magnitude(bp.including(bp.linears((8, 8)), "model.layers.*"))(model, 0.5).masks
    return bp.apply_masks(model, masks), masks, torch.randint(0, 64, (4, 16))


def trained(model: Any, ids: Tensor, config: Any) -> Any:
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 3e-2)
    for _ in range(10):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    return adapted.eval()


TARGETS = ["q_proj", "up_proj", "down_proj"]


def test_adapters_in_the_kept_blocks_merge_without_loss() -> None:
    model, masks, ids = masked_model()
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name.endswith("original")}
    config = masked_lora_config(peft.LoraConfig(r=4, target_modules=TARGETS))
    start = model(ids, labels=ids).loss.item()
    adapted = trained(model, ids, config)
    before = adapted(ids, labels=ids).loss.item()
    merged = adapted.merge_and_unload()
    after = merged(ids, labels=ids).loss.item()
    assert before < start - 0.1
    assert abs(after - before) < 0.01 * before
    assert bp.read_masks(merged) == masks
    assert bp.read_masks(bp.apply_masks(bp.finalize(merged), {})) == {}
    assert bp.masks_from_zeros(bp.finalize(merged), where=bp.including(bp.linears((8, 8)), "model.layers.*")) == masks
    for name, tensor in merged.named_parameters():  # what is stored behind the zeros has not changed
        if name.endswith("original"):
            keep = bp.expand(*attributes(masks[name.replace("parametrizations.weight.original", "weight")]))
            assert torch.equal(tensor[~keep], dense[name][~keep])


def attributes(mask: bp.BlockMask) -> tuple[Tensor, bp.BlockGrid]:
    return mask.keep, mask.grid


def test_ordinary_adapters_merge_into_the_stored_weights_and_the_zeros_stay() -> None:
    model, masks, ids = masked_model()
    adapted = trained(model, ids, peft.LoraConfig(r=4, target_modules=TARGETS))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    expected = (layer.base_layer.weight + layer.get_delta_weight("default")).detach()
    merged = adapted.merge_and_unload()
    keep = bp.expand(*attributes(masks["model.layers.0.self_attn.q_proj.weight"]))
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight, torch.where(keep, expected, 0))
    assert bp.read_masks(merged) == masks


def test_quantizing_a_masked_model_names_finalize() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = bp.apply_masks(
        nn.Sequential(nn.Linear(32, 32)), {"0.weight": bp.BlockMask(torch.eye(2).bool(), bp.BlockGrid((32, 32), (16, 16)))}
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TypeError, match=r"weight \(32, 32\) is masked and cannot be .*bp.finalize\(model\)"):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    torchao.quantize_(bp.finalize(model), torchao.Int8WeightOnlyConfig())
