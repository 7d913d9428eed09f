"""LoRA for any LightningModule, and for any PyTorch module.

The public API is the names in ``__all__`` and in ``lightning_lora.analysis.__all__``. So are the adapter base
classes that ``docs/layers.md`` describes. Everything else is private.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_lora.attachment import AttachReport
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LoRALayer, lora_layers, register_adapter
from lightning_lora.modes import disabled, merged, scaled
from lightning_lora.named_adapters import active_adapter, adapter_names
from lightning_lora.names import target_names
from lightning_lora.optimizers import parameter_groups
from lightning_lora.state import adapter_state_dict, load_adapter_state_dict
from lightning_lora.surgery import attach, detach, merge
from lightning_lora.switching import remove_adapter, set_adapter, using

if TYPE_CHECKING:
    from lightning_lora.calibration.calibrate import calibrate
    from lightning_lora.callback import LoRACallback
    from lightning_lora.loading import add_adapter, load_adapter
    from lightning_lora.peft_format.files import Preflight, preflight, save_adapter
    from lightning_lora.several.combination import combine, combine_adapters
    from lightning_lora.several.routing import routed
    from lightning_lora.several.truncation import truncate_adapter
    from lightning_lora.sweep.callback import LoRASweep

__version__ = "0.1.0"

__all__ = [
    "AttachReport",
    "LoRACallback",
    "LoRAConfig",
    "LoRALayer",
    "LoRASweep",
    "Preflight",
    "active_adapter",
    "adapter_names",
    "adapter_state_dict",
    "add_adapter",
    "attach",
    "calibrate",
    "combine",
    "combine_adapters",
    "detach",
    "disabled",
    "load_adapter",
    "load_adapter_state_dict",
    "lora_layers",
    "merge",
    "merged",
    "parameter_groups",
    "preflight",
    "register_adapter",
    "remove_adapter",
    "routed",
    "save_adapter",
    "scaled",
    "set_adapter",
    "target_names",
    "truncate_adapter",
    "using",
]


# Imported at their first use: Lightning takes seconds, and the code for files a third of what everything else takes.
_IMPORTED_WHEN_USED = {
    "LoRACallback": "callback",
    "LoRASweep": "sweep.callback",
    "Preflight": "peft_format.files",
    "add_adapter": "loading",
    "calibrate": "calibration.calibrate",
    "combine": "several.combination",
    "combine_adapters": "several.combination",
    "load_adapter": "loading",
    "preflight": "peft_format.files",
    "routed": "several.routing",
    "save_adapter": "peft_format.files",
    "truncate_adapter": "several.truncation",
}


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_IMPORTED_WHEN_USED[name]}"), name)
    return globals()[name]
