"""Every private API of ``torch.distributed.fsdp`` that blockprune uses, for modules on which ``fully_shard`` was called.

As in `_compat`, each docstring ends with the first version that has the API.
"""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

__all__ = ["end_fsdp_forwards", "follow_fsdp_parameters", "is_fsdp_managed"]


def is_fsdp_managed(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module or on one around it (torch 2.4)."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def end_fsdp_forwards(sharded: Sequence[nn.Module]) -> None:
    """Let modules on which ``fully_shard`` was called, and whose forward an error has ended, be as after a forward (torch 2.6)."""
    for state in (cast(Any, module)._get_fsdp_state() for module in sharded):
        if state._training_state.name == "FORWARD":
            state._state_ctx.iter_forward_root = None
            for part in (state, *_fsdp_groups(state)):
                part._training_state = type(part._training_state).IDLE


def _fsdp_groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)  # torch before 2.12 has one or None
    return list(groups or filter(None, [state._fsdp_param_group]))


def follow_fsdp_parameters(model: nn.Module, sharded: Sequence[nn.Module]) -> None:
    """Let the modules on which ``fully_shard`` was called find their parameters where these are in the model (torch 2.6).

    They put a whole parameter into its module before a forward, and the shard afterwards.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules() if sharded else ():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, name))
    for state in (cast(Any, module)._get_fsdp_state() for module in sharded):
        for group in _fsdp_groups(state):
            for parameter in group.fsdp_params:
                modules, names = zip(*places[id(parameter.sharded_param)], strict=True)
                info = parameter._module_info
                info.module, info.shared_modules = modules[0], list(modules[1:])
                info.param_name, info.shared_param_names = names[0], list(names[1:])
            hooks = group._module_to_pre_save_state_dict_hook_handle, group._module_to_pre_load_state_dict_hook_handle
            if any(hooks):  # they let a state dict have the shards
                for handle in [handle for handles in hooks for handle in handles.values()]:
                    handle.remove()
                for handles in hooks:
                    handles.clear()
                group._register_state_dict_hooks()
