"""Distilling Hugging Face models: their outputs, gradient checkpointing, tied heads."""

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import blockprune as bp
from blockprune import losses
from blockprune.export import dynamic_int8

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}


def llama() -> tuple[nn.Module, dict[str, bp.BlockMask], list[dict[str, torch.Tensor]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
        tokens = torch.randint(20, (6, 2, 8))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    masks = bp.recipes.magnitude(bp.excluding(bp.linears((4, 4)), "lm_head*"))(model, 0.5).masks
    return model, dict(masks), [{"input_ids": x, "attention_mask": mask, "labels": x.masked_fill(mask == 0, -100)} for x in tokens]


def with_states(model: Any, batch: Any) -> Any:
    return model(**batch, output_hidden_states=True)


def test_checkpointing_gives_the_same_weights_and_leaves_the_model_without_it() -> None:
    model, masks, batches = llama()
    options = {"teacher": model, "loss": losses.kl, "optimizer": partial(torch.optim.SGD, lr=0.1), "train": True}
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = bp.distill(model, masks, None, batches, **options)
    assert len(calls) == 2 * len(batches)  # the teacher and the student
    again = bp.distill(model, masks, None, batches, **options, checkpointing=True)
    assert len(calls) == 5 * len(batches)  # the student's layers run again in the backward
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for name, x in plain.items():
        torch.testing.assert_close(again[name], x)
    with pytest.raises(ValueError, match="train=True"):
        bp.distill(model, masks, None, batches, teacher=model, loss=losses.kl, checkpointing=True)


def test_hidden_states_of_an_encoder_and_a_decoder() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    tokens = torch.randint(1, 20, (2, 6))
    mask, labels = torch.tensor([[1] * 6, [1] * 4 + [0] * 2]), tokens[:, :5].clone()
    labels[0, 3:] = -100
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    masks = bp.recipes.magnitude(bp.linears((4, 4)))(model, 0.5).masks
    pruned = bp.apply_masks(copy.deepcopy(model), masks)
    with torch.no_grad():
        student, teacher = with_states(pruned, batch), with_states(model, batch)
    count = len(teacher.encoder_hidden_states) + len(teacher.decoder_hidden_states)
    encoder = losses.hidden_states(student.encoder_hidden_states, teacher.encoder_hidden_states, {"attention_mask": mask})
    decoder = losses.hidden_states(student.decoder_hidden_states, teacher.decoder_hidden_states, {"labels": labels})
    total = losses.hidden_states(student, teacher, batch)
    expected = (encoder * len(teacher.encoder_hidden_states) + decoder * len(teacher.decoder_hidden_states)) / count
    torch.testing.assert_close(total, expected)
    weights = bp.distill(model, masks, None, [batch], teacher=model, loss=losses.hidden_states, steps=5, forward=with_states)
    with torch.no_grad():
        assert losses.hidden_states(with_states(bp.apply_masks(pruned, masks, weights), batch), teacher, batch) < total


def test_a_model_from_a_quantised_file_is_trained_and_timed_as_any_other() -> None:
    model, masks, batches = llama()
    plain = bp.distill(model.bfloat16(), masks, None, batches, teacher=model, loss=losses.kl)
    model.is_quantized = True  # as transformers marks a model that it loads from a GGUF file, whose .float() it refuses
    marked = bp.distill(model, masks, None, batches, teacher=model, loss=losses.kl)
    assert all(torch.equal(marked[name], x) for name, x in plain.items())
    assert next(dynamic_int8(model).parameters()).dtype == torch.float32


def test_all_losses_of_a_language_model_and_its_low_rank_recovery() -> None:
    model, masks, batches = llama()
    loss = losses.weighted({partial(losses.kl, top_k=5): 1.0, losses.hidden_states: 0.5, losses.cross_entropy: 0.1})
    adam = partial(torch.optim.AdamW, lr=5e-3)
    options = {"teacher": model, "loss": loss, "forward": with_states, "optimizer": adam, "steps": 30, "held_out": batches[:2], "every": 10}

    def error(weights: Any) -> float:
        student = bp.apply_masks(copy.deepcopy(model), masks, weights)
        with torch.no_grad():
            return sum(float(loss(with_states(student, batch), with_states(model, batch), batch)) for batch in batches[:2])

    for more in ({}, {"lora_rank": 4}):
        weights = bp.distill(model, masks, None, batches[2:], **options, **more)
        assert error(weights) < error(None)
        assert "lm_head.weight" not in weights  # tied to the embedding
        assert all(not weights[name][~bp.expand(mask.keep, mask.grid)].count_nonzero() for name, mask in masks.items())
        assert ("model.embed_tokens.weight" in weights) == (not more)
    with pytest.raises(TypeError, match="output_hidden_states=True"):
        bp.distill(model, masks, None, batches, teacher=model, loss=losses.hidden_states)


def test_an_encoder_and_an_image_classifier_come_closer_on_what_is_held_out() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bert = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=20)).eval()
        vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5)).eval()
        mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
        texts = [{"input_ids": x, "attention_mask": mask} for x in torch.randint(20, (9, 2, 6))]
        images = [{"pixel_values": x} for x in torch.randn(9, 4, 3, 8, 8)]
    adam = partial(torch.optim.AdamW, lr=1e-2)
    for model, batches, loss in ((bert, texts, losses.cosine), (vit, images, losses.kl)):
        masks = bp.recipes.magnitude(bp.linears((4, 4)))(model, 0.5).masks
        history: list[bp.DistillState] = []
        bp.distill(
            model,
            masks,
            None,
            batches[:6],
            teacher=model,
            loss=loss,
            optimizer=adam,
            steps=30,
            held_out=batches[6:],
            callback=history.append,
        )
        losses_held_out = [entry[3] for entry in history[-1].history]
        assert losses_held_out[-1] < losses_held_out[0]  # type: ignore[operator]
        assert repr(history[-1]).split(", ")[1].endswith("tokens" if model is bert else "samples")


def test_the_guides_trainer_averages_accumulated_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[2] / "notebooks" / "guides" / "recover.md").read_text()
    block = next(code for code in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "class DistillationTrainer" in code)
    names: dict[str, Any] = {"bp": bp, "torch": torch, "copy": copy, "losses": losses}
    exec(compile(block, "recover.md", "exec"), names)
    options = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True}
    options |= {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    students = []
    for size, accumulate in ((8, 1), (2, 4)):
        student = bp.apply_masks(copy.deepcopy(names["teacher"]), names["masks"])
        arguments = transformers.TrainingArguments(
            "trainer", per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, **options
        )
        names["DistillationTrainer"](student, arguments, train_dataset=names["tokens"]).train()
        students.append(bp.finalize(student).state_dict())
    torch.testing.assert_close(*students, rtol=1e-4, atol=1e-6)
    start = bp.finalize(bp.apply_masks(copy.deepcopy(names["teacher"]), names["masks"])).state_dict()
    assert max((students[0][name] - start[name]).abs().max() for name in start) > 1e-4
