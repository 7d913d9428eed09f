"""DeepSpeed's ZeRO, stages 1 to 3: what it divides, under which names, and its float32 masters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.fingerprint import Fingerprint, Sample, chosen_names, samples
from lightning_lora.layers import TokenAdapter, all_adapters, base_parameter, lora_layers
from lightning_lora.names import listed
from lightning_lora.sharding import anywhere, gathered
from lightning_lora.state import adapter_tensors, base_tensors
from lightning_lora.surgery import merge
from lightning_lora.trainer.process_slices import Key
from lightning_lora.trainer.strategies.base import Layout, refuse_reading_across


class DeepSpeedLayout(Layout):
    """ZeRO divides the optimizer's state (stage 1), gradients (2) and parameters (3).

    It replaces the optimizer by one that holds flat float32 masters, so the parameters that were configured are
    remembered here, and reads and writes of single ones go through DeepSpeed's own functions for that.
    """

    _groups: list[list[nn.Parameter]]  # the parameters of each group, as they were configured
    _reached: set[int]  # the parameters that a gradient has reached

    @override
    def prepare(self) -> None:
        if self._stage() not in (1, 2, 3):
            raise NotImplementedError(
                f"LoRACallback supports DeepSpeedStrategy in its ZeRO stages 1, 2 and 3, not in stage {self._stage()}: "
                "without ZeRO it divides nothing; use strategy='ddp'."
            )
        if (precision := self.strategy.precision_plugin.precision) != "32-true":
            rank_zero_info(
                f"LoRA: with precision={precision!r} DeepSpeed computes with adapters in that precision too. It keeps "
                "float32 masters of them, which are what is trained and saved."
            )

    @override
    def attached(self, module: LightningModule) -> None:
        if on_meta := [name for name, parameter in module.named_parameters() if parameter.is_meta]:
            raise NotImplementedError(
                f"DeepSpeedStrategy gives no memory to what was built on the meta device: {listed(on_meta)}. Build the "
                "module with memory; in configure_model stage 3 divides each layer as soon as it is built."
            )
        if self._stage() == 3:
            refuse_reading_across(module, "DeepSpeedStrategy(stage=3)", "stage 2")
            self._base = _gathered_fingerprint(module)

    @override
    def refused_training(self) -> str | None:
        if (own := self._config.get("optimizer")) is None:
            return None
        return (
            f"DeepSpeedStrategy(config={{'optimizer': {own!r}}}): with it Lightning calls no "
            "configure_optimizers, where LoRACallback gives optimizers the adapters and their rates. Leave 'optimizer' "
            "out of the config, and return one from configure_optimizers."
        )

    @override
    def refused_diagnostics(self) -> str | None:
        return (
            "diagnostics_every_n_steps: DeepSpeed takes gradients away as soon as they are there, and its stage 3 has "
            "the factors in parts. Leave it out and look at checkpoints with lightning_lora.analysis.analyze, or use "
            "DDP or ModelParallelStrategy (FSDP2)."
        )

    @property
    @override
    def divides_weights(self) -> bool:
        return self._stage() == 3

    @override
    def gather(self, tensors: Mapping[Key, Tensor], name_of: Callable[[Key], str]) -> dict[Key, Tensor]:
        # In float32 a parameter is what its master is.
        masters = {
            key: tensor for key, tensor in tensors.items() if _has_master(tensor) and tensor.dtype != torch.float
        }
        found = {key: _functions().safe_get_full_fp32_param(tensor) for key, tensor in masters.items()}
        with gathered(tensors.values()):
            found |= {key: tensor.detach().clone() for key, tensor in tensors.items() if key not in masters}
        return {key: found[key] for key in tensors}

    @override
    def at_hand(self) -> AbstractContextManager[object]:
        tokens = [
            base_parameter(layer, adapter.parameter)  # with which their rows are compared
            for layer in lora_layers(self.module).values()
            for adapter in layer.adapters().values()
            if isinstance(adapter, TokenAdapter)
        ]
        return gathered([*adapter_tensors(self.module).values(), *tokens], to_write=True)

    @override
    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        with gathered(tensors.values(), to_write=True):
            super().fill(tensors, values)
        for name, tensor in tensors.items():
            if name in values and _has_master(tensor):
                _functions().safe_set_full_fp32_param(tensor, values[name].to(tensor.device))

    @override
    def fill_base(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.fill({name: tensor}, values)

    @override
    def shape(self, name: str, parameter: Tensor) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    @override
    def merge(self) -> None:
        merge(self.module, whole=lambda layer: gathered(layer.parameters(), to_write=True))

    # --- optimizers

    @override
    def configured(self, module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
        if not all(groups):
            raise NotImplementedError(
                f"{sum(not group for group in groups)} of the {len(groups)} parameter groups that configure_optimizers "
                "returned hold frozen parameters only. DeepSpeed drops such groups, and schedulers would give the "
                "others their learning rates. Leave them out: [group for group in groups if any(p.requires_grad for "
                "p in group['params'])]."
            )
        self._groups = [list(group) for group in groups]
        self._watch(module)

    @override
    def as_configured(self, optimizers: Sequence[Any]) -> Sequence[Any]:
        if not optimizers:
            return optimizers
        return [
            SimpleNamespace(
                param_groups=[
                    {**group, "params": params}
                    for group, params in zip(optimizer.param_groups, self._groups, strict=True)
                ]
            )
            for optimizer in optimizers
        ]

    @override
    def reached(self) -> set[str]:
        adapters = all_adapters(self.module)
        flags = [any(id(p) in self._reached for p in adapter.parameters()) for adapter in adapters.values()]
        agreed = anywhere(flags, self.strategy.root_device)
        return {name for name, is_reached in zip(adapters, agreed, strict=True) if is_reached}

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
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
            for group in self.as_configured([optimizer])[0].param_groups
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

    # --- parts

    @property
    def _config(self) -> dict[str, Any]:
        return cast(DeepSpeedStrategy, self.strategy).config or {}

    def _stage(self) -> int:
        return int(self._config.get("zero_optimization", {}).get("stage", 0))

    def _places(self, optimizer: Any) -> dict[int, int]:
        """Return the position of each parameter in the optimizer, by its identity."""
        groups = self.as_configured([optimizer])[0].param_groups
        return {id(p): index for index, p in enumerate(p for group in groups for p in group["params"])}

    def _watch(self, module: LightningModule) -> None:
        """Note which adapters' parameters get a gradient: DeepSpeed takes gradients away as soon as they are there."""
        self._reached = set()
        for adapter in all_adapters(module).values():
            for parameter in adapter.parameters():
                _Watch(parameter, self._reached)


class _Watch:
    """Notes the first gradient of a parameter that is not zero, and goes away."""

    def __init__(self, parameter: nn.Parameter, reached: set[int]) -> None:
        self.reached = reached
        self.hook = parameter.register_post_accumulate_grad_hook(self.note)  # type: ignore[no-untyped-call]

    def note(self, parameter: Tensor) -> None:
        if parameter.grad is not None and bool(torch.any(parameter.grad != 0)):
            self.reached.add(id(parameter))
            self.hook.remove()


def _gathered_fingerprint(module: nn.Module) -> Fingerprint:
    """Return the fingerprint of a base that may be divided already, with one weight at a time gathered."""
    base, found = base_tensors(module), dict[str, Sample]()
    for name in chosen_names(base):
        with gathered([base[name]]):
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
