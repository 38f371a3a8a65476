"""A checkpoint folder that is read one tensor at a time, and a model without weights into which they are loaded layer by layer."""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from blockprune.core._compat_hf import float32_patterns, model_keys
from blockprune.model.experts import is_stacked
from blockprune.model.hf_checkpoint import QUANT_METHOD
from blockprune.model.parameters import ParameterRef, parameter_refs
from blockprune.repair.transformer_layers import Layer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors names them
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # what is read of each file to recognize it


@attrs.frozen
class StoredTensor:
    """Where a tensor of a checkpoint is: its file, shape, and type as safetensors names it.

    Example:
        >>> from blockprune.hf.checkpoint_folder import StoredTensor
        >>> StoredTensor("model.safetensors", (2, 3), "BF16").shape
        (2, 3)
    """

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """The size of the tensor."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) // 8 if bits else 1)


@attrs.frozen(eq=False)
class Checkpoint:
    """A folder of safetensors files with a config.json, as ``save_pretrained`` writes it. Only headers are read until `read` is called.

    Args:
        folder: of the model.
        tensors: what is stored, by key.

    Example:
        >>> import tempfile, transformers
        >>> from blockprune.hf.checkpoint_folder import Checkpoint
        >>> sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
        ...     Checkpoint.open(folder).read("model.norm.weight").shape
        torch.Size([8])
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Read the index and the headers of all files.

        Raises:
            OSError: no config.json, no safetensors files, or a file of the index is missing.
            ValueError: a file is damaged, or the index and the files do not agree.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json; give the folder of a Hugging Face model, as save_pretrained writes it")
        index = _read_index(folder)
        tensors: dict[str, StoredTensor] = {}
        for file in sorted(set(index.values())) if index is not None else [SINGLE]:
            for key, tensor in stored_tensors(folder / file).items():
                if key in tensors:
                    raise ValueError(f"{folder}: {key} is in {tensors[key].file} and in {file}; leave it in one of them")
                tensors[key] = tensor
        for key, file in (index or {}).items():
            if key not in tensors or tensors[key].file != file:
                place = f"it is in {tensors[key].file}" if key in tensors else "no file has it"
                raise ValueError(f"{folder / INDEX} says that {key} is in {file}, but {place}; download the folder again")
        return cls(folder, tensors)

    def read(self, key: str) -> Tensor:
        """A tensor, in memory of its own.

        Raises:
            ValueError: the file has changed or is damaged.
        """
        path = self.folder / self.tensors[key].file
        try:
            with safe_open(path, framework="pt") as file:  # opened for each tensor, so that no file stays in memory
                tensor: Tensor = file.get_tensor(key).clone()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {key} cannot be read: {error}; download the file again") from error
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor."""
        return next((FLOATS[tensor.dtype] for tensor in self.tensors.values() if tensor.dtype in FLOATS), torch.float32)

    @property
    def fingerprint(self) -> str:
        """A hash of the configuration, of all names, shapes and types, of the time of each file, and of samples of its contents."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        digest.update(json.dumps(sorted((key, *attrs.astuple(tensor)) for key, tensor in self.tensors.items())).encode())
        for name in sorted({tensor.file for tensor in self.tensors.values()}):
            digest.update(str((self.folder / name).stat().st_mtime_ns).encode())
            with open(self.folder / name, "rb") as file:
                size = file.seek(0, 2)
                for sample in range(SAMPLES):
                    file.seek(sample * max(0, size - SAMPLE_BYTES) // max(1, SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()


def _read_index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, or None if there is no index but one file."""
    try:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        if (folder / SINGLE).is_file() and SINGLE not in index.values():
            raise ValueError(f"the folder also has {SINGLE}, which from_pretrained reads instead; remove the file that is not wanted")
        if (
            not isinstance(index, dict)
            or not index
            or not all(isinstance(name, str) and Path(name).name == name for name in index.values())
        ):
            raise ValueError("its weight_map does not name files")
    except FileNotFoundError:
        if (folder / SINGLE).is_file():
            return None
        raise FileNotFoundError(
            f"{folder} has neither {INDEX} nor {SINGLE}; save the model with model.save_pretrained(folder), which writes safetensors files"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} cannot be read: {type(error).__name__}: {error}; download it again") from None
    return dict(index)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """What the header of a safetensors file lists, by key.

    Raises:
        OSError: the file is missing.
        ValueError: it is damaged.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from blockprune.hf.checkpoint_folder import stored_tensors
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"w": torch.ones(2)}, f"{folder}/a.safetensors")
        ...     stored_tensors(Path(f"{folder}/a.safetensors"))
        {'w': StoredTensor(file='a.safetensors', shape=(2,), dtype='F32')}
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which the checkpoint's index names; download it again")
    try:
        with safe_open(path, framework="pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
            return {key: StoredTensor(path.name, tuple(part.get_shape()), part.get_dtype()) for key, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is truncated: {error}; download it again") from None


@attrs.frozen(eq=False)
class Skeleton:
    """A model without weights, and where they are in its checkpoint.

    Args:
        model: its parameters are on the meta device; its buffers have their values.
        checkpoint: the folder.
        names: the name in the model of each key of the checkpoint. A tied tensor has the first of its names, and what the model does not
            have the name that its key gives it.
        keys: the key of each parameter, by its name in the model.
        refs: the places of the parameters in the model, by name.
        dtypes: of the loaded parameters, by name.
        device: of the loaded parameters.

    Example:
        >>> import tempfile, transformers
        >>> from blockprune.hf.checkpoint_folder import Checkpoint, Skeleton
        >>> sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
        ...     skeleton = Skeleton.of(Checkpoint.open(folder))
        ...     with skeleton.loaded(["model.norm.weight"]):
        ...         skeleton.model.model.norm.weight.device, skeleton.model.lm_head.weight.device
        (device(type='cpu'), device(type='meta'))
    """

    model: Any
    checkpoint: Checkpoint
    names: Mapping[str, str]
    keys: Mapping[str, str]
    refs: Mapping[str, Sequence[ParameterRef]]
    dtypes: Mapping[str, torch.dtype]
    device: torch.device

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, model_class: Any = None, device: torch.device | str = "cpu") -> "Skeleton":
        """Make the model that the configuration describes, in the dtype in which ``from_pretrained(folder, dtype="auto")`` loads it.

        Raises:
            ValueError: a quantized checkpoint, or that of a masked or exported model; one that lacks a parameter of the model, or has it in
                another shape; an unknown class.
        """
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
        _check_plain(checkpoint.folder, getattr(config, "quantization_config", None))
        model_class = model_class or _model_class(checkpoint.folder, config)
        dtype = getattr(config, "dtype", None) or checkpoint.dtype
        model = _empty_model(model_class, config, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        refs = parameter_refs(model)
        first_names = {ref.name: name for name, shared in refs.items() for ref in shared}
        renamed = model_keys(model, checkpoint.tensors, [*model.state_dict(), *first_names])
        stored = {name: key for key, name in renamed.items()}
        keys = {name: stored[ref.name] for name, shared in refs.items() for ref in reversed(shared) if ref.name in stored}
        names = {key: first_names.get(name, name) for key, name in renamed.items()}
        _check_complete(checkpoint, model, refs, keys)
        _check_layers(checkpoint, model, names)
        patterns = float32_patterns(model, model.dtype)
        dtypes = {name: torch.float32 if patterns(name) else ref.stored.dtype for name, (ref, *_) in refs.items()}
        skeleton = cls(model, checkpoint, names, keys, refs, dtypes, torch.device(device))
        skeleton._load_buffers()
        return skeleton

    @contextlib.contextmanager
    def loaded(self, names: Iterable[str]) -> Iterator[None]:
        """The model with these parameters loaded, which are dropped afterwards."""
        names = list(names)
        empty = {name: self.refs[name][0].stored for name in names}
        try:
            for name in names:
                self._set(name, nn.Parameter(self.read(name), requires_grad=empty[name].requires_grad))
            yield
        finally:
            for name in names:
                self._set(name, empty[name])

    def read(self, name: str) -> Tensor:
        """A parameter, as ``from_pretrained`` would load it."""
        return self.checkpoint.read(self.keys[name]).to(self.device, self.dtypes[name])

    def load_layer(self, order: Sequence[Layer], layer: Layer | None) -> contextlib.AbstractContextManager[None]:
        """The model with the parameters of one layer loaded, or with None those outside of all layers."""
        if layer:
            return self.loaded(layer.local_names)
        inside = {name for other in order for name in other.local_names}
        return self.loaded(name for name in self.refs if name not in inside)

    def check_ties(self) -> None:
        """Raise a ValueError if the checkpoint has different values for names that the model ties."""
        keys_of: dict[str, list[str]] = {}
        for key, name in self.names.items():
            keys_of.setdefault(name, []).append(key)
        for first, *others in keys_of.values():
            for other in others:
                if not torch.equal(self.checkpoint.read(first), self.checkpoint.read(other)):
                    raise ValueError(
                        f"{self.checkpoint.folder}: the model ties {first} and {other}, but their values differ; set tie_word_embeddings "
                        "to false in config.json, or remove the tensor that is not used"
                    )

    def _set(self, name: str, parameter: Tensor) -> None:
        for ref in self.refs[name]:
            setattr(ref.owner, ref.attr, parameter)

    def _load_buffers(self) -> None:
        """Load the buffers that the checkpoint has; the model's constructor has made the others."""
        keys = {name: key for key, name in self.names.items()}
        for prefix, module in self.model.named_modules():
            for attr, buffer in module.named_buffers(recurse=False):
                name = f"{prefix}.{attr}" if prefix else attr
                value = self.checkpoint.read(keys[name]).to(buffer.dtype) if name in keys else buffer
                setattr(module, attr, value.to(self.device))


def _check_plain(folder: Path, quantization: Any) -> None:
    """Raise a ValueError if config.json says that the weights are not plain tensors."""
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else getattr(quantization, "quant_method", None)
    if method == QUANT_METHOD:
        raise ValueError(
            f"{folder} holds a masked or exported model, as its save_pretrained wrote it (quant_method {method!r} in config.json); write "
            "plain weights into another folder and prune that: model = from_pretrained(folder) after `import blockprune.hf`, then "
            "bp.finalize(model).save_pretrained(other) if it is masked, or bp.export.dense(model).save_pretrained(other) if it is exported"
        )
    raise ValueError(f"{folder} holds quantized weights (quantization_config in config.json); prune it before")


def _model_class(folder: Path, config: Any) -> Any:
    name = next(iter(config.architectures or ()), None)
    model_class = getattr(transformers, name, None) if name else None
    if model_class is None:
        raise ValueError(
            f"{folder}: config.json names the architecture {name!r}, which is no class of transformers; give "
            "model_class=, such as transformers.AutoModelForCausalLM or a class of your own"
        )
    return model_class


def _empty_model(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model on the meta device, whose buffers have their values."""
    make = getattr(model_class, "from_config", model_class)  # an AutoModel, or a model's own class
    before = torch.get_default_dtype()
    config.dtype = dtype
    try:
        torch.set_default_dtype(dtype)
        with init_empty_weights(include_buffers=False):
            model = make(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    return model.eval()


def _check_complete(checkpoint: Checkpoint, model: Any, refs: Mapping[str, Sequence[ParameterRef]], keys: Mapping[str, str]) -> None:
    """Raise unless the checkpoint has all parameters of the model, in their shapes."""
    what = f"{checkpoint.folder}: config.json describes a {type(model).__name__}"
    absent = [ref for name, (ref, *_) in refs.items() if name not in keys]
    if absent and all(is_stacked(ref.owner) for ref in absent):
        raise ValueError(
            f"{what} with {absent[0].name} {absent[0].shape}, which transformers stacks of the tensors of its experts; such a model cannot "
            "be pruned from folder to folder, so load it and prune it in memory: model = bp.as_linears(from_pretrained(folder)), then "
            "recipe(model, sparsity)"
        )
    if missing := [f"{ref.name} {ref.shape}" for ref in absent]:
        raise ValueError(
            f"{what} with {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}, which no file has; give the right config.json or "
            "model_class=. If transformers makes them of other tensors, convert the folder first: "
            "from_pretrained(folder).save_pretrained(other)"
        )
    for name, (ref, *_) in refs.items():
        if checkpoint.tensors[keys[name]].shape != ref.shape:
            tensor = checkpoint.tensors[keys[name]]
            raise ValueError(
                f"{what} with {name} {ref.shape}, but {tensor.file} has {keys[name]} {tensor.shape}; give the right config.json"
            )


def _check_layers(checkpoint: Checkpoint, model: Any, names: Mapping[str, str]) -> None:
    """Raise if the checkpoint has a module of a list that ends before it in the model, which nothing would prune."""
    modules = dict(model.named_modules())
    for key, name in names.items():
        parts = name.split(".")
        for depth, child in enumerate(parts):
            parent = modules.get(".".join(parts[:depth]))
            if isinstance(parent, nn.ModuleList) and child not in dict(parent.named_children()):
                raise ValueError(
                    f"{checkpoint.folder}: {checkpoint.tensors[key].file} has {key}, but config.json describes a {type(model).__name__} "
                    f"with {len(parent)} {parts[depth - 1]}; give the right config.json"
                )
