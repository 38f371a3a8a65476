"""The README's repair on one small model of each of many families, from evidence to the exported model and a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune as bp
from blockprune import export

hf = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of transformers and what it imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {**SIZES, "vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHARED = {**WORDS, "num_key_value_heads": 2}
IMAGE = {"image_size": 16, "patch_size": 4, "num_labels": 5}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48, "word_embed_proj_dim": 32}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 48}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
OSS = {"num_local_experts": 3, "num_experts_per_tok": 2}
GATED = {"num_experts": 3, "shared_expert_intermediate_size": 16}
STATES = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8, "moe_shared_expert_intermediate_size": 16}
LATENT = {"n_routed_experts": 3, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4}
LATENT |= {"first_k_dense_replace": 1, "v_head_dim": 8, "qk_nope_head_dim": 4, "num_key_value_heads": 4}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2, "image_size": 16, "patch_size": 2, "num_labels": 5}

# class and configuration, sizes, the pattern of its transformer blocks, hidden axes found, Linears pruned
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str, int, int]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SHARED, "model.layers.*", 5, 14),
    "qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", {**SHARED, "head_dim": 16}, "model.layers.*", 5, 14),
    "gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SHARED, "head_dim": 16}, "model.layers.*", 5, 14),
    "phi 3": ("Phi3ForCausalLM", "Phi3Config", SHARED, "model.layers.*", 3, 8),  # gate and up in one, queries, keys and values too
    "pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", WORDS, "gpt_neox.layers.*", 5, 8),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT, "model.decoder.layers.*", 5, 12),
    "gpt-2": ("GPT2LMHeadModel", "GPT2Config", GPT2, "transformer.h.*", 5, 8),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SHARED, "num_local_experts": 3}, "model.layers.*", 9, 26),
    "qwen 3 moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**SHARED, **MOE, "num_experts": 3, "head_dim": 8}, "model.layers.*", 9, 26),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**SHARED, **OSS, "head_dim": 8}, "model.layers.*", 9, 26),
    "qwen 2 moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**SHARED, **MOE, **GATED}, "model.layers.*_proj.weight", 11, 32),
    "phi moe": ("PhimoeForCausalLM", "PhimoeConfig", {**SHARED, "num_local_experts": 3}, "model.layers.*_proj.weight", 9, 26),
    "deepseek 3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**WORDS, **MOE, **LATENT}, "model.layers.*", 8, 25),
    "nemotron h": ("NemotronHForCausalLM", "NemotronHConfig", {**SHARED, **MOE, **STATES, "n_routed_experts": 3}, "model.layers.*", 7, 16),
    "mamba": ("MambaForCausalLM", "MambaConfig", MAMBA, "*.mixer.[iox]*_proj.weight", 1, 6),
    "bert": ("BertForMaskedLM", "BertConfig", WORDS, "bert.encoder.*", 5, 12),  # the head is tied
    "modern bert": ("ModernBertForMaskedLM", "ModernBertConfig", WORDS, "model.layers.*", 5, 8),
    "t5": ("T5EncoderModel", "T5Config", {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}, "encoder.block.*", 4, 12),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, **IMAGE}, "vit.*layer*", 5, 12),
    "convnext 2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", {**STAGES, "depths": [2, 2]}, "convnextv2.encoder.*", 6, 8),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", STAGES, "convnext.encoder.*", 5, 6),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_repair_of_the_readme(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config, sizes, pattern, axes, linears = FAMILIES[family]
    torch.manual_seed(0)
    make: Callable[[], nn.Module] = lambda: getattr(hf, kind)(getattr(hf, config)(**sizes)).eval()  # noqa: E731
    model = bp.as_linears(make())
    images = "image_size" in sizes
    batches = [torch.randn(3, 3, 16, 16) if images else torch.randint(3, 48, (3, 16)) for _ in range(3)]
    where = bp.including(bp.linears((4, 4)), pattern)
    calibration = bp.Calibration(batches, loss=_loss, progress=False)
    axes_of_calls: list[Any] = []

    def recorded(*args: Any, **options: Any) -> Any:
        axes_of_calls.append(bp.find_axes(*args, **options))
        return axes_of_calls[-1]

    monkeypatch.setattr("blockprune.recipes.find_axes", recorded)
    clustered = bp.recipes.cluster_units(model, where, calibration)
    assert [len(units) for units in axes_of_calls] == [axes]
    torch.testing.assert_close(_first(clustered(batches[0])), _first(model(batches[0])), atol=1e-5, rtol=1e-5)

    result = bp.recipes.obs(where, calibration)(clustered, 0.25)
    assert len(result.masks) == linears
    assert abs(bp.sparsity(result.masks) - 0.25) < 0.01
    masked = bp.apply_masks(clustered, result.masks, result.weights)
    want = _first(masked(batches[0]))

    sparse = export.block_sparse(masked, backend="torch")
    assert sum(isinstance(m, export.BlockSparseLinear) for m in sparse.modules()) == linears
    torch.testing.assert_close(_first(sparse(batches[0])), want, atol=1e-5, rtol=1e-5)
    again = export.load_state_dict(bp.as_linears(make()), sparse.state_dict())
    torch.testing.assert_close(_first(again(batches[0])), want, atol=1e-5, rtol=1e-5)
    final: Any = bp.from_linears(bp.finalize(masked), make())
    final.save_pretrained(tmp_path)
    torch.testing.assert_close(_first(type(final).from_pretrained(tmp_path).eval()(batches[0])), want)


def _first(output: Any) -> Tensor:
    x: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return x.detach()


def _loss(output: Any, batch: Tensor) -> Tensor:
    x: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return x.float().log_softmax(-1)[..., 0].mean().neg()
