"""Masked and exported models through ``save_pretrained`` and ``from_pretrained``, registered with transformers as a quantization method."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from blockprune.core._compat_hf import ignore_unexpected_keys, keep_device_hook, model_keys
from blockprune.export.module_replacement import replace_modules
from blockprune.export.packing import read_state
from blockprune.export.sparse_convs import sparse_layer_like
from blockprune.export.sparse_layers import STATE_KEYS, BlockSparseLinear
from blockprune.model.apply import apply_masks
from blockprune.model.checkpoint import masks_in_state
from blockprune.model.experts import is_stacked
from blockprune.model.hf_checkpoint import FORMAT, QUANT_METHOD, prepare_checkpoints
from blockprune.model.hf_linears import is_transposed, make_linears
from blockprune.model.parameters import parameter_refs

MASK_PART = re.compile(r"(.*\bparametrizations\.[^.]+\.)(\d+)\.(keep|_extra_state)")  # of a masked weight in a state dict
_DTYPES = {"I64": torch.int64, "I32": torch.int32, "I8": torch.int8}  # of indices and weights of int8, as safetensors names them


@register_quantization_config(QUANT_METHOD)
class BlockpruneConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` in the config.json of a masked or exported model.

    Args:
        format: of the folder; this version of blockprune reads formats up to `FORMAT`.
        options: other entries; a later version of blockprune may write some.
    """

    def __init__(self, format: int = FORMAT, **options: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.format = format


@register_quantizer(QUANT_METHOD)
class BlockpruneQuantizer(HfQuantizer):
    """Loads the kept blocks and the masks of a folder. The model is then what was saved, and transformers treats it as a plain model.

    Layers are replaced before transformers loads the tensors, so a layer's dense weight is never in memory.
    """

    requires_calibration = True  # so that transformers refuses to make such a model of a dense folder

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.files: list[str] = []  # of the folder
        self.tensors: dict[str, tuple[list[int], str]] = {}  # in the files: shapes and types

    def validate_environment(self, *args: Any, **options: Any) -> None:
        """Raise ValueError if a later version of blockprune has written the folder."""
        config: Any = self.quantization_config
        version = config.format
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"quantization_config in config.json has format={version!r}; blockprune writes a number from 1 to {FORMAT}")
        if version > FORMAT:
            raise ValueError(
                f"the folder has format {version} of blockprune's checkpoints, and this blockprune reads formats up to {FORMAT}; "
                "install a newer one: pip install -U blockprune"
            )

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        self.files = _files(model, options.get("checkpoint_files"))
        self.tensors = _tensors(self.files)
        _check_experts(model, self.tensors)
        _convert_transposed(model, self.tensors)
        replace_modules(model, _stored_weights(model, self.tensors).get)
        ignore_unexpected_keys(model, r"(^|\.)parametrizations\.[^.]+\.(original|\d+\.keep|\d+\._extra_state)$")

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        names = {module: name for name, module in model.named_modules()}
        replace_modules(model, lambda module: module.layer(names[module]) if isinstance(module, _StoredWeight) else None)
        _load_masks(model, self.tensors, self.files)
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):  # transformers restricts what quantized models may do
            vars(model).pop(name, None)
        del model.config.quantization_config
        prepare_checkpoints(model)

    def is_serializable(self, *args: Any, **options: Any) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained; the kept blocks of exported layers do not train."""
        return True


class _StoredWeight(nn.Module):
    """The tensors of a block-sparse layer while transformers loads them, and the layer whose place it takes."""

    def __init__(self, template: Any, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        self.template = (template,)  # in a tuple, so that torch does not register it
        self.keys = tuple(tensors)
        for key, (shape, name) in tensors.items():
            dtype = torch.float32 if key == "scale" else _DTYPES.get(name, template.weight.dtype)
            self.register_buffer(key, torch.empty(shape, dtype=dtype, device="meta"))
        weight = torch.empty(1, dtype=template.weight.dtype, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)  # transformers ties parameters alone, as that of an int8 head
        self.register_parameter("bias", template.bias)

    def layer(self, name: str) -> BlockSparseLinear:
        """The block-sparse layer with the loaded tensors.

        Raises:
            ValueError: the tensors are not a weight of this layer.
        """
        (template,) = self.template
        shape = (len(template.weight), template.weight[0].numel())
        try:
            weight = read_state(**{key: getattr(self, key) for key in self.keys})
            if weight.shape != shape:
                raise ValueError(f"a weight of shape {weight.shape} does not fit a layer of {shape}")
        except ValueError as error:
            raise ValueError(f"{name}: the folder does not hold what was exported: {error}") from None
        template.bias = self.bias
        layer = sparse_layer_like(template, weight)
        layer.name = name
        return keep_device_hook(self, layer)


def _files(model: Any, files: Iterable[str] | None) -> list[str]:
    """The safetensors files that are loaded; transformers 4 does not name them, but the folder."""
    folder = Path(model.config.name_or_path)
    if files is None and folder.is_dir():
        files = sorted(map(str, folder.glob("*.safetensors")))
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError(
            f"blockprune reads the safetensors files of a folder, and there are none for {str(folder)!r}: save with "
            "model.save_pretrained(folder) and load with from_pretrained(folder), or pass a state dict to "
            "blockprune.export.load_state_dict or blockprune.load_masked"
        )
    return [str(file) for file in files]


def _tensors(files: Iterable[str]) -> dict[str, tuple[list[int], str]]:
    """The shape and the dtype of each tensor, which are all that is read."""
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118 (it is no mapping)
                part = content.get_slice(key)
                tensors[key] = (part.get_shape(), part.get_dtype())
    return tensors


def _check_experts(model: Any, tensors: Iterable[str]) -> None:
    """Raise for masked or exported experts of `as_linears`, which transformers would rename and stack."""
    experts = [key for key in tensors if re.search(r"\.experts\.\d+\..*\b(layout|parametrizations)\b", key)]
    if experts and any(map(is_stacked, model.modules())):
        kind = type(model).__name__
        raise ValueError(
            f"{experts[0]}: the folder has masked or exported experts of bp.as_linears, but {kind} stacks its experts, so from_pretrained "
            "cannot load them; save model.state_dict() with torch.save, and load it into bp.as_linears of a new model with "
            "blockprune.load_masked or blockprune.export.load_state_dict"
        )


def _convert_transposed(model: Any, tensors: Mapping[str, Any]) -> None:
    """Make the Conv1D of a model Linears, as `as_linears` does, if the files have the weights of Linears for them."""
    modules = {name: module for name, module in model.named_modules() if is_transposed(module)}
    expected = {f"{name}.{part}": module for name, module in modules.items() for part in ("weight", "layout")}
    names = model_keys(model, [key for key in tensors if key.endswith(("weight", "layout"))], expected) if modules else {}
    for key, name in names.items():
        shape, module = tensors[key][0], expected.get(name)
        if module is not None and (name.endswith("layout") or (shape == [*module.weight.shape[::-1]] != [*module.weight.shape])):
            make_linears(modules.values())
            return


def _stored_weights(model: Any, tensors: Mapping[str, Any]) -> dict[nn.Module, _StoredWeight]:
    """What takes the place of the layers for which the files have kept blocks."""
    modules = dict(model.named_modules())
    prefixes = Counter(key.removesuffix(part) for key in tensors for part in STATE_KEYS if key == part or key.endswith(f".{part}"))
    keys = {f"{prefix}layout": prefix for prefix, parts in prefixes.items() if parts > 1}  # one alone may be a tensor of another module
    names = model_keys(model, keys, [f"{name}.layout" if name else "layout" for name in modules])
    stored: dict[nn.Module, _StoredWeight] = {}
    skipped: list[str] = []
    for key, prefix in keys.items():
        name = names[key].removesuffix("layout").removesuffix(".")
        if missing := [part for part in STATE_KEYS if prefix + part not in tensors]:
            raise ValueError(f"{name}: the folder lacks {', '.join(missing)} of this block-sparse layer; save the model again")
        module = modules.get(name)
        if module is None and _is_other_part(model, name):
            skipped.append(name)
            continue
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            kind = f"a {type(module).__name__} there" if module else "no such layer"
            raise ValueError(
                f"{name}: the folder has a block-sparse layer of this name, and {type(model).__name__} has {kind}; load it with the class "
                "that was exported, or pass its state dict to blockprune.export.load_state_dict"
            )
        parts = [part for part in (*STATE_KEYS, "scale") if prefix + part in tensors]
        stored[module] = _StoredWeight(module, {part: tensors[prefix + part] for part in parts})
    _check_skipped(model, tensors, "block-sparse layers", skipped)
    return stored


def _is_other_part(model: Any, name: str) -> bool:
    """Whether a layer or parameter belongs to a part, such as a head, that the model's class does not have.

    Transformers ignores the tensors of such a part, and a folder can be loaded into the base model, or with another head.
    """
    part = name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    return not any(part == child for owner in (model, model.base_model) for child, _ in owner.named_children())


def _check_skipped(model: Any, tensors: Iterable[str], what: str, names: Collection[str]) -> None:
    """Warn of what is not loaded; raise if nothing but a head could be, so that the folder is that of another class."""
    if not names:
        return
    shown = ", ".join([*names][:4]) + (", ..." if len(names) > 4 else "")
    if not _has_base_model(model, tensors):
        raise ValueError(
            f"the folder has {what} of these names, and {type(model).__name__} has no such layer, nor any other of the folder but a head: "
            f"{shown}; load it with the class that was saved, which config.json names"
        )
    warnings.warn(f"{type(model).__name__} lacks the layers of these {what} in the folder, which are not loaded: {shown}", stacklevel=3)


def _has_base_model(model: Any, tensors: Iterable[str]) -> bool:
    """Whether a file has a tensor of the base model; the name of a head, such as ``lm_head.weight``, is that of other classes, too."""
    base, head = set(model.base_model.modules()), model.get_output_embeddings()
    modules = [(name, module) for name, module in model.named_modules() if module in base and module is not head]
    expected = {f"{name}.{key}".removeprefix(".") for name, module in modules for key, _ in module.named_parameters(recurse=False)}
    return not expected.isdisjoint(model_keys(model, tensors, expected).values())


def _load_masks(model: Any, tensors: Collection[str], files: Iterable[str]) -> None:
    """Put the masks in the files on the model, and the dense weights behind their zeros."""
    refs = {ref.parametrized_name: ref for refs in parameter_refs(model).values() for ref in refs}
    expected = [key for prefix, ref in refs.items() for key in _mask_keys(prefix, len(ref.parametrizations or ()))]
    masked = {(match[1], int(match[2])) for match in map(MASK_PART.fullmatch, tensors) if match and _is_masked(match, tensors)}
    keys = [key for prefix, index in sorted(masked) for key in _mask_keys(prefix, index)]
    if missing := [key for key in keys if key not in tensors]:
        raise ValueError(f"{missing[0]}: the folder lacks this tensor of a masked weight; save the model again")
    names = model_keys(model, keys, expected)
    skipped = {key: name for key, name in names.items() if name not in expected and _is_other_part(model, name)}
    parameters = [match[1].replace("parametrizations.", "") for match in map(MASK_PART.fullmatch, skipped.values()) if match]
    _check_skipped(model, tensors, "masks", dict.fromkeys(name.removesuffix(".") for name in parameters))
    names = {key: name for key, name in names.items() if key not in skipped}
    apply_masks(model, masks_in_state(model, {names[key]: tensor for key, tensor in _read(files, names) if not key.endswith("original")}))
    with torch.no_grad():
        for key, tensor in _read(files, [key for key in names if key.endswith("original")]):
            ref = refs.get(names[key].removesuffix("original"))
            if ref is None or ref.shape != tuple(tensor.shape):
                problem = f"a parameter of shape {ref.shape}" if ref else "no such parameter"
                raise ValueError(f"{key}: the folder has a masked weight of shape {tuple(tensor.shape)}, and the model has {problem}")
            ref.stored.copy_(tensor)


def _mask_keys(prefix: str, index: int) -> list[str]:
    """The tensors of a mask that follows other parametrizations, if there are any; they compute the weight from tensors of their own."""
    return [f"{prefix}{index}.keep", f"{prefix}{index}._extra_state", *([] if index else [f"{prefix}original"])]


def _is_masked(match: re.Match[str], tensors: Collection[str]) -> bool:
    """Whether this part belongs to a mask; other parametrizations may have an extra state, too."""
    return match[3] == "keep" or f"{match[1]}original" in tensors


def _read(files: Iterable[str], keys: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors with these keys, one after the other, so that only one is in memory."""
    for file in files:
        with safe_open(file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118
                if key in keys:
                    yield key, content.get_tensor(key)
