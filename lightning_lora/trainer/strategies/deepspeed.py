"""DeepSpeed ZeRO, stages 1 to 3: what it shards, under which names, and its float32 masters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.fingerprint import END, Fingerprint, Sample, chosen_names, samples
from lightning_lora.layers import LoRALayer, TokenAdapter, base_parameter
from lightning_lora.names import listed
from lightning_lora.sharding import gathered
from lightning_lora.state import end_names
from lightning_lora.trainer.strategies.base import (
    GradientNote,
    Key,
    Layout,
    original_param_groups,
    refuse_reading_across,
)


class DeepSpeedLayout(Layout):
    """ZeRO shards the optimizer state (stage 1), gradients (2) and parameters (3).

    It replaces the optimizer by one that holds flat float32 masters, so the configured parameters are remembered here,
    and single ones are read and written by DeepSpeed's own functions.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self._config: dict[str, Any] = cast(DeepSpeedStrategy, strategy).config or {}
        zero = self._config.get("zero_optimization") or {}
        self._stage = int(zero.get("stage", 0))
        self.divides_weights = self._stage == 3
        if self._stage not in (1, 2, 3):
            raise MisconfigurationException(
                f"LoRACallback supports DeepSpeedStrategy only in ZeRO stages 1, 2 and 3, not in stage {self._stage}: "
                "without ZeRO it shards nothing; use strategy='ddp'."
            )
        if (precision := strategy.precision_plugin.precision) != "32-true":
            rank_zero_info(
                f"LoRA: with precision={precision!r} DeepSpeed computes with adapters in that precision too. It keeps "
                "float32 masters of them, which are trained and saved."
            )

    @override
    def check_fit(self, *, with_diagnostics: bool, with_schedule: bool) -> None:
        if (own := self._config.get("optimizer")) is not None:
            raise MisconfigurationException(
                f"DeepSpeedStrategy(config={{'optimizer': {own!r}}}): with it Lightning never calls "
                "configure_optimizers, where LoRACallback gives the adapters and their learning rates to optimizers. "
                "Remove 'optimizer' from the config, and return one from configure_optimizers."
            )
        if with_diagnostics:
            raise MisconfigurationException(
                "diagnostics_every_n_steps: DeepSpeed removes gradients as soon as they are computed, and its stage "
                "3 shards the factors. Leave it out and look at checkpoints with lightning_lora.analysis.analyze, or "
                "use DDP or ModelParallelStrategy (FSDP2)."
            )
        if with_schedule:
            raise MisconfigurationException(
                "rank_schedule: DeepSpeed removes gradients as soon as they are computed, and steps copies of the "
                "factors of its own. Use DDP or ModelParallelStrategy (FSDP2), or train at a fixed rank and call "
                "truncate_adapter."
            )

    @override
    def attached(self, module: LightningModule) -> None:
        if on_meta := [name for name, parameter in module.named_parameters() if parameter.is_meta]:
            raise MisconfigurationException(
                f"DeepSpeedStrategy does not allocate parameters built on the meta device: {listed(on_meta)}. Build "
                "the module with memory; in configure_model, stage 3 shards each layer as soon as it is built."
            )
        if self.divides_weights:
            refuse_reading_across(module, "DeepSpeedStrategy(stage=3)", "stage 2")
            self.base = _gathered_fingerprint(module)

    @override
    def configured(self, module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
        if not all(groups):
            raise MisconfigurationException(
                f"{sum(not group for group in groups)} of the {len(groups)} parameter groups that configure_optimizers "
                "returned hold frozen parameters only. DeepSpeed drops such groups, and the remaining groups would "
                "get the wrong learning rates from your schedulers. Leave them out: [group for group in groups if "
                "any(p.requires_grad for p in group['params'])]."
            )
        self.original_parameters = [list(group) for group in groups]
        adapters = AdaptedModel(module).adapters.values()
        self.noted_gradients = {id(p): GradientNote(p) for adapter in adapters for p in adapter.parameters()}

    @override
    def gather(self, values: Mapping[Key, Any], name_of: Callable[[Key], str]) -> dict[Key, Any]:
        # A float32 parameter equals its master.
        masters = {key: value for key, value in values.items() if _has_master(value) and value.dtype != torch.float}
        found = {key: _functions().safe_get_full_fp32_param(value) for key, value in masters.items()}
        with gathered(values.values()):
            found |= {key: value.detach().clone() for key, value in values.items() if key not in masters}
        return {key: found[key] for key in values}

    @override
    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Fill the trained tensors at once, and the base with one tensor gathered at a time."""
        wanted = {name: tensor for name, tensor in tensors.items() if name in values}
        trained = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
        for some in (trained, *({name: tensor} for name, tensor in wanted.items() if name not in trained)):
            with gathered(some.values(), to_write=True):
                super().fill(some, values)
        for name, tensor in trained.items():
            if _has_master(tensor):
                _functions().safe_set_full_fp32_param(tensor, values[name].to(tensor.device))

    @override
    def shape(self, name: str, parameter: Tensor) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    @override
    def gathered_layer(self, layer: LoRALayer) -> AbstractContextManager[object]:
        return gathered(layer.parameters(), to_write=True)

    @override
    def optimizer_state(self, module: nn.Module, optimizer: Any) -> dict[str, Any]:
        place, entries = self._places(optimizer), dict[int, dict[str, Any]]()
        for flat, members in _flats(optimizer):
            _link(optimizer, flat, members)
            for key, value in optimizer.optimizer.state.get(flat, {}).items():
                for parameter in members:
                    if isinstance(value, Tensor) and value.shape == flat.shape:
                        entry = _functions().safe_get_full_optimizer_state(parameter, key)
                    else:  # a copy, or optimizers that load it would count steps for all in one tensor
                        entry = value.clone() if isinstance(value, Tensor) else value
                    entries.setdefault(place[id(parameter)], {})[key] = entry
        groups = [
            {**group, "params": [place[id(parameter)] for parameter in group["params"]]}
            for group in original_param_groups(self, optimizer)
        ]
        return {"state": {index: entries[index] for index in sorted(entries)}, "param_groups": groups}

    @override
    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any], names: list[str]) -> None:
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        place, inner = self._places(optimizer), optimizer.optimizer
        for flat, members in _flats(optimizer):
            entries = {parameter: state["state"].get(place[id(parameter)], {}) for parameter in members}
            for entry in entries.values():
                inner.state[flat].update({key: _like(value, flat) for key, value in entry.items()})
            _link(optimizer, flat, members)
            for parameter, entry in entries.items():
                for key, value in entry.items():
                    if isinstance(value, Tensor) and value.ndim:
                        _functions().safe_set_full_optimizer_state(parameter, value.to(flat.device), key)

    def _places(self, optimizer: Any) -> dict[int, int]:
        """Return the position of each parameter in the optimizer, by its identity."""
        parameters = (p for group in original_param_groups(self, optimizer) for p in group["params"])
        return {id(parameter): index for index, parameter in enumerate(parameters)}


def gathered_parameters(module: nn.Module) -> AbstractContextManager[object]:
    """Gather trained tensors sharded by ZeRO-3 inside the block; changes persist."""
    model = AdaptedModel(module)
    tokens = [
        base_parameter(layer, adapter.parameter)  # its rows are compared with the trained ones
        for layer in model.layers.values()
        for adapter in layer.adapters().values()
        if isinstance(adapter, TokenAdapter)
    ]
    return gathered([*model.trained.values(), *tokens], to_write=True)


def _gathered_fingerprint(module: nn.Module) -> Fingerprint:
    """Return the fingerprint of a base that may be sharded, with one weight gathered at a time."""
    base, found = AdaptedModel(module).base, dict[str, Sample]()
    for name in [*chosen_names(base), *end_names(module)]:
        with gathered([base[own] for own in (name.removesuffix(END),) if own in base]):
            found |= samples(base, [name])
    return found


def _functions() -> Any:
    return importlib.import_module("deepspeed.utils")


def _flats(optimizer: Any) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """Yield each vector that this process's part of ZeRO's optimizer steps, with the parameters that are in it."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        yield from zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    else:
        yield from zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)


def _link(optimizer: Any, flat: Tensor, members: list[nn.Parameter]) -> None:
    """Let DeepSpeed's functions find the parameters' parts of the state of a vector.

    It does so after the first step, but for the first group alone, since it steps one group after another.
    """
    state = optimizer.optimizer.state
    if hasattr(optimizer, "bit16_groups") and flat in state:
        _functions().lazy_init_hp_params_optimizer_state(members, flat, state)


def _has_master(tensor: Tensor) -> bool:
    """Return whether ZeRO's optimizer holds a float32 copy of a parameter, from which it makes the parameter anew."""
    if not tensor.requires_grad:
        return False
    return getattr(tensor, "_z3_optimizer", None) is not None or hasattr(tensor, "_hp_mapping")


def _like(value: Any, flat: Tensor) -> Any:
    """Return what stands at the place of a parameter's entry in the entry of the vector that the parameter is in."""
    if not isinstance(value, Tensor):
        return value
    return torch.zeros_like(flat) if value.ndim else value.clone()
