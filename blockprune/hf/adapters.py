"""Adapters of peft that change only the kept blocks of a masked model."""

import copy
from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from blockprune.core._compat_hf import register_lora_layer
from blockprune.model.parametrization import MaskBlocks


def masked_lora_config(config: Any) -> Any:
    """A copy of a `peft.LoraConfig` whose adapters are zero in the pruned blocks of masked Linears.

    Ordinary adapters also learn in pruned blocks; merging them into a masked model then loses that part, and the outputs change. With this
    configuration ``merge_and_unload`` changes neither the outputs nor the zeros. Layers without masks get ordinary adapters.

    Args:
        config: of LoRA (Hu et al. 2106.09685), without DoRA and without biases of its own.

    Raises:
        ImportError: peft is not installed.
        ValueError: ``use_dora`` or ``lora_bias``.

    Example:
        >>> from blockprune.hf import masked_lora_config
        >>> config = masked_lora_config(peft.LoraConfig(r=8, target_modules="all-linear"))  # doctest: +SKIP
        >>> adapted = peft.get_peft_model(masked_model, config)  # doctest: +SKIP
    """
    for option in ("use_dora", "lora_bias"):
        if getattr(config, option, False):
            raise ValueError(f"{option}=True has no form that stays in the kept blocks; set it to False, or use the config as it is")
    config = copy.deepcopy(config)
    register_lora_layer(config, nn.Linear, _masked_lora())
    return config


@cache
def _masked_lora() -> type:
    try:
        from peft.tuners import lora  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ImportError('masked_lora_config uses peft; install it: pip install "blockprune[lm]"') from error

    class MaskedLora(lora.Linear):
        """LoRA whose update is zero in the pruned blocks."""

        def get_delta_weight(self, adapter: str) -> Tensor:
            update: Tensor = super().get_delta_weight(adapter)
            weights: Any = dict(self.get_base_layer().named_children()).get("parametrizations", {})
            masks = [part for part in weights["weight"] if isinstance(part, MaskBlocks)] if "weight" in weights else []
            return cast(Tensor, masks[0](update)) if masks else update

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            layer: nn.Module = self.get_base_layer()
            if kwargs.get("adapter_names") is not None:
                raise ValueError("adapter_names, several adapters in one batch, is not supported by masked_lora_config")
            out: Tensor = layer(x)
            if self.disable_adapters or self.merged:
                return out
            for name in self.active_adapters:
                if name in self.lora_A:
                    out = out + F.linear(self.lora_dropout[name](x), self.get_delta_weight(name).to(x.dtype))
            return out

    return MaskedLora
