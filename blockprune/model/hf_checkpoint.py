"""Checkpoints of masked and exported Hugging Face models, which ``from_pretrained`` can read."""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.core._compat import state_dict_hooks
from blockprune.core.grid import BlockGrid
from blockprune.core.sharded_tensor import is_sharded
from blockprune.model.masking import mask_blocks
from blockprune.model.parameters import STORED_NAME, is_exported
from blockprune.model.parametrization import MaskBlocks

QUANT_METHOD = "blockprune"  # under which transformers finds the loader of `blockprune.hf`
FORMAT = 1  # of the folders that ``save_pretrained`` writes; a later blockprune may write another
_WITH_BLOCKS: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # Hugging Face models that have got masks or exported layers


def model_config(model: nn.Module) -> Any:
    """The configuration of a Hugging Face model, and None for any other module.

    Example:
        >>> from blockprune.model.hf_checkpoint import model_config
        >>> model_config(nn.Linear(2, 2)) is None
        True
    """
    config = getattr(model, "config", None)
    return config if hasattr(model, "save_pretrained") and is_config(config) else None


def is_config(value: Any) -> bool:
    """Whether a value is a configuration of transformers, or a part of one, such as ``text_config``.

    Example:
        >>> from blockprune.model.hf_checkpoint import is_config
        >>> is_config({"hidden_size": 64})
        False
    """
    return hasattr(type(value), "model_type")


def add_plain_weights(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A hook for the state dicts of Hugging Face models: add each masked weight, zeros included, under its plain name.

    ``save_pretrained`` and checkpoints of a Trainer then load into a plain model with ``from_pretrained``, which knows no masks and would
    leave the weights of a masked layer random. A tied weight is one tensor under its plain names, which transformers knows to be tied, and
    has memory of its own under the names of torch's parametrizations, which transformers would refuse to save.

    An exported layer has no plain weight. Without `blockprune.hf`, transformers would warn and leave the weight random, so the state dict
    gets one number under its name: another shape is an error in ``from_pretrained``.
    """
    for name, module in model.named_modules():
        if is_exported(module) and f"{prefix}{name}.values" in state:
            values = state[f"{prefix}{name}.values"]
            dtype = values.dtype if values.is_floating_point() else None
            state[f"{prefix}{name}.weight"] = torch.full((1,), float("nan"), dtype=dtype, device=values.device)
    plain_weights: dict[int, Tensor] = {}  # by the address of the stored weight
    for name in [name for name in state if name.startswith(prefix)]:
        if match := STORED_NAME.fullmatch(name):
            stored, plain_name, mask = state[name], match.expand(r"\1\2"), f"{match[1]}parametrizations.{match[2]}.0."
            if f"{mask}keep" not in state or is_sharded(stored):
                continue
            if stored.data_ptr() in plain_weights:
                state[name] = stored.clone()
            elif plain_name in state:  # the hook of a model inside this model has added it
                plain_weights[stored.data_ptr()] = state[plain_name]
            else:
                grid = BlockGrid(stored.shape, tuple(state[f"{mask}_extra_state"].tolist()))
                plain_weights[stored.data_ptr()] = mask_blocks(stored.detach(), state[f"{mask}keep"].to(stored.device), grid)
            state[plain_name] = plain_weights[stored.data_ptr()]


def prepare_checkpoints(model: nn.Module) -> None:
    """Prepare the Hugging Face models in a model for ``save_pretrained``, in place.

    Their state dicts get plain weights (`add_plain_weights`). The configuration of a model with masks or exported layers gets a
    ``quantization_config`` that names blockprune, by which ``from_pretrained`` finds the loader of `blockprune.hf`. It is taken away from a
    model without them. A ``quantization_config`` of another method is left as it is.

    Another model may have been built from the same configuration, so a model gets copies of its configurations before one is changed.
    A base model, such as a ``LlamaModel``, keeps its own: it may be part of a model that is to be saved with its masks, and whose settings
    reach its layers through this configuration. Another model with the same configuration is then saved with this entry, too, and loads as
    it is: without masks. The entry stays while another model with this configuration has blocks, such as a masked head.
    """
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module not in inside and hasattr(module, "save_pretrained"):
            inside.update(module.modules())
            _prepare_outermost(module)


def _prepare_outermost(model: nn.Module) -> None:
    """Prepare a Hugging Face model and those inside of it, some of which have its configuration."""
    configs: dict[int, Any] = {}
    marked: dict[int, bool] = {}  # whether a model with this configuration has masks or exported layers
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            has_blocks = _has_blocks(module)
            if has_blocks:
                _WITH_BLOCKS.add(module)
            if has_blocks and add_plain_weights not in state_dict_hooks(module):
                module.register_state_dict_post_hook(add_plain_weights)
            config = model_config(module)
            if config is not None:
                configs[id(config)] = config
                marked[id(config)] = has_blocks or marked.get(id(config), False)
    wrong = [key for key, config in configs.items() if _needs_change(config, marked[key])]
    is_base_model = _is_base_model(model)
    copies = _copy_configs(model) if wrong and not is_base_model else {}
    for key in wrong:
        config = copies.get(key, configs[key])
        if marked[key]:
            config.quantization_config = {"quant_method": QUANT_METHOD, "format": FORMAT}
        elif not is_base_model or not any(model_config(other) is config and _has_blocks(other) for other in _WITH_BLOCKS):
            del config.quantization_config


def _is_base_model(model: Any) -> bool:
    """Whether a Hugging Face model has no head, and so may be part of one that has; transformers takes T5 with its head for one."""
    return hasattr(model, "base_model") and model.base_model is model and model.get_output_embeddings() is None


def _has_blocks(model: nn.Module) -> bool:
    return any(isinstance(part, MaskBlocks) or is_exported(part) for part in model.modules())


def _needs_change(config: Any, has_blocks: bool) -> bool:
    method = getattr(config, "quantization_config", None)
    return method is None if has_blocks else isinstance(method, dict) and method.get("quant_method") == QUANT_METHOD


def _copy_configs(model: nn.Module) -> dict[int, Any]:
    """Give the modules copies of their configurations, by the id of each; what shared one of them, or has one as a part, still does."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if is_config(value):
                vars(module)[name] = copy.deepcopy(value, copies)
    return copies
