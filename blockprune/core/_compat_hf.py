"""Every private or undocumented API of transformers, accelerate and peft that blockprune uses.

As in `_compat`, each docstring ends with the first version that has the API. hf/checkpoints.py overrides the private methods
``_process_model_before_weight_loading`` and ``_process_model_after_weight_loading`` of ``transformers.quantizers.HfQuantizer``, as
every quantization method does (transformers 4.57).
"""

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "CACHE_ARGUMENTS",
    "EXPERT_ATTRIBUTES",
    "apply_expert_gate",
    "conv1d_outputs",
    "experts_are_concatenated",
    "experts_are_gated",
    "experts_are_transposed",
    "float32_patterns",
    "ignore_unexpected_keys",
    "is_offloaded",
    "keep_device_hook",
    "model_keys",
    "register_lora_layer",
    "use_eager_experts",
]

M = TypeVar("M", bound=nn.Module)


# transformers

CACHE_ARGUMENTS = ("past_key_value", "layer_past", "cache_params")  # beginnings of arguments that a layer adds to (transformers 4.57)
EXPERT_ATTRIBUTES = ("_apply_gate", "has_gate", "has_bias", "is_transposed", "is_concatenated")  # of stacked experts (transformers 5.7)


def conv1d_outputs(module: nn.Module) -> int | None:
    """The outputs of a ``Conv1D``, which keeps its weight transposed, and None for any other module (transformers 4.57)."""
    is_conv1d = parametrize.type_before_parametrizations(module).__name__ == "Conv1D"
    return getattr(module, "nf", None) if is_conv1d else None


def experts_are_gated(experts: Any) -> bool:
    """Whether stacked experts have a gate projection beside the up projection (transformers 5.3)."""
    return bool(experts.has_gate)


def experts_are_transposed(experts: Any) -> bool:
    """Whether stacked experts keep their weights as ``[experts, inputs, outputs]`` (transformers 5.0)."""
    return bool(experts.is_transposed)


def experts_are_concatenated(experts: Any) -> bool:
    """Whether the rows of the gate come before those of the up projection; otherwise they alternate (transformers 5.7)."""
    return bool(experts.is_concatenated)


def apply_expert_gate(experts: Any, original_class: Any, gate_and_up: Tensor) -> Tensor:
    """What an expert's down projection is given, by the class that the experts had before they became Linears (transformers 5.0)."""
    gated: Tensor = original_class._apply_gate(experts, gate_and_up)
    return gated


def use_eager_experts(config: Any) -> None:
    """Run stacked experts by their own Python code, since their kernels support only some types and sizes (transformers 5.0)."""
    config._experts_implementation = "eager"


def float32_patterns(model: Any, dtype: torch.dtype) -> Callable[[str], Any]:
    """Whether ``from_pretrained`` keeps a parameter, given by its name, in float32 when it loads a model in this dtype (transformers 4.57).

    Args:
        model: a Hugging Face model, which lists parts of such names.
        dtype: of the model.
    """
    parts = {
        *((model._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()),
        *((model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else ()),
    }
    return re.compile("|".join(rf"(?:^|\.){part}(?:$|\.)" for part in parts) or "(?!)").search


# accelerate


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate holds the parameters of a module on another device or on disk between forwards (accelerate 1.0)."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ())))


def ignore_unexpected_keys(model: Any, pattern: str) -> None:
    """Let ``from_pretrained`` not warn of keys in a checkpoint that the model does not have (transformers 4.57)."""
    patterns = model._keys_to_ignore_on_load_unexpected
    patterns = [] if patterns is None else patterns  # a list in transformers 4, a set in 5
    model._keys_to_ignore_on_load_unexpected = type(patterns)([*patterns, pattern])


def model_keys(model: Any, keys: Iterable[str], expected: Collection[str]) -> dict[str, str]:
    """The names that ``from_pretrained`` gives to the tensors of a checkpoint, by their keys in the file.

    ``transformers.core_model_loading`` renames keys as it does for plain weights (transformers 5.0; earlier versions only add or remove the
    prefix of the base model).

    Args:
        model: a Hugging Face model.
        keys: in the file.
        expected: the names that the model could have.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415 (an extra)
        from transformers.core_model_loading import WeightRenaming, rename_source_key  # noqa: PLC0415
    except ImportError:
        prefix = f"{model.base_model_prefix}."
        candidates = {key: (key, f"{prefix}{key}", key.removeprefix(prefix)) for key in keys}
        return {key: next((name for name in names if name in expected), key) for key, names in candidates.items()}
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    names, prefix = {}, model.base_model_prefix
    for key in keys:
        renamed, _ = rename_source_key(key, renamings, [], prefix, dict.fromkeys(expected, True))
        if renamed not in expected:
            renamed, _ = rename_source_key(key, [], [], prefix, dict.fromkeys(expected, True))
        names[key] = renamed
    return names


def keep_device_hook(old: nn.Module, new: M) -> M:
    """Give a new module the hook by which accelerate moves the inputs and weights of the old one (accelerate 1.0)."""
    if (hook := getattr(old, "_hf_hook", None)) is not None:
        from accelerate.hooks import add_hook_to_module  # noqa: PLC0415 (an extra)

        add_hook_to_module(new, hook)
    return new


def register_lora_layer(config: Any, layer: type[nn.Module], adapter: type) -> None:
    """Let a `peft.LoraConfig` use this adapter for layers of a type (peft 0.15)."""
    config._register_custom_module({layer: adapter})
