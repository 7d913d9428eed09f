"""How a strategy spreads what is trained over its processes, and how it is brought together again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.fingerprint import Fingerprint, fingerprint, samples
from lightning_lora.layers import WeightLoRALayer, all_adapters, lora_layers
from lightning_lora.names import join, listed
from lightning_lora.optimizers import optimizer_names
from lightning_lora.sharding import laid_out_like, whole
from lightning_lora.state import adapter_tensors, base_tensors
from lightning_lora.surgery import merge
from lightning_lora.trainer.checks import reached_adapters
from lightning_lora.trainer.process_slices import Key


class Layout:
    """How a strategy spreads what is trained over its processes: whole in each, or as ``DTensor``."""

    _base: Fingerprint | None = None  # as it was when attaching, where the weights cannot be read later
    when_wrapping: Callable[[], None] | None = None  # what to do before the module wraps the first part of itself

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    @property
    def module(self) -> LightningModule:
        """The module that the strategy trains now."""
        assert self.strategy.lightning_module is not None
        return self.strategy.lightning_module

    def prepare(self) -> None:
        """Adjust the strategy before it wraps the module; called when a stage is set up.

        Raises:
            NotImplementedError: The strategy is set up in a way that cannot train adapters.
        """

    def attached(self, module: LightningModule) -> None:
        """Take note of adapters that were attached, before the strategy wraps the module.

        Raises:
            NotImplementedError: The strategy cannot train such adapters.
        """

    def is_divided(self, module: LightningModule) -> bool:  # noqa: ARG002
        """Return whether adapters of this module were taken note of and cannot be read any more."""
        return False

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the frozen base; every process must call this."""
        return fingerprint(base_tensors(self.module)) if self._base is None else self._base

    def samples(self, names: Collection[str]) -> Fingerprint:
        """Return samples of those of the named tensors that belong to the base; every process must call this."""
        if self._base is None:
            return samples(base_tensors(self.module), names)
        return {name: self._base[name] for name in names if name in self._base}

    def base_loaded(self, state: Mapping[str, Tensor]) -> None:
        """Take note that the base got other values, by their names in a whole model's state."""
        if self._base is not None:
            new = fingerprint({name: state[name] for name in base_tensors(self.module) if name in state})
            self._base = {**self._base, **new}

    def gather(
        self,
        tensors: Mapping[Key, Tensor],
        name_of: Callable[[Key], str],  # noqa: ARG002 - for strategies that hide shapes
    ) -> dict[Key, Tensor]:
        """Return the whole tensors; every process must call this.

        Args:
            tensors: What this process has.
            name_of: Gives the name of the parameter that a tensor belongs to.
        """
        return {key: whole(tensor.detach()) for key, tensor in tensors.items()}

    def agree(self, values: Mapping[Key, Any]) -> dict[Key, Any]:
        """Return the values of all processes, some of which may lack some; every process must call this."""
        return dict(values)

    def part(self, value: Tensor, name: str, like: Tensor) -> Tensor:  # noqa: ARG002
        """Return this process's part of a whole tensor that belongs to the parameter of this name."""
        return laid_out_like(value.to(like.device), like)

    @property
    def divides_weights(self) -> bool:
        """Whether a process may have a part of a frozen weight only."""
        return False

    def refused_export(self, module: LightningModule) -> str | None:
        """Return why a finished fit's adapter could not be exported here, or None."""
        sliced = [name for name, adapter in all_adapters(module).items() if adapter.spec.rows and adapter.spec.use_dora]
        if not (sliced and self.divides_weights):
            return None
        return (
            f"export_dir: PEFT's file of {listed(sliced)} (DoRA of slices) needs the norms of the whole weights, which "
            f"{type(self.strategy).__name__} has divided. Export the checkpoint afterwards: load_adapter(model, "
            "checkpoint), then save_adapter(model, directory)."
        )

    def refused_training(self) -> str | None:
        """Return why nothing can be trained as the strategy is set up, though evaluated, or None."""
        return None

    def refused_diagnostics(self) -> str | None:
        """Return why adapters cannot be measured while they train here, or None."""
        return None

    def trained(self) -> dict[str, Tensor]:
        """Return what was trained: name -> the whole tensor; every process must call this."""
        return self.gather(adapter_tensors(self.module), lambda name: name)

    def hidden_shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the adapted layers' own parameters, where a process does not see them."""
        if not self.divides_weights:
            return {}
        return {
            (full := join(name, key)): self.shape(full, parameter)
            for name, layer in lora_layers(self.module).items()
            for key, parameter in layer._parameters.items()
            if parameter is not None
        }

    def merge(self) -> None:
        """Fold the adapters into the weights for good."""
        merge(self.module)

    def at_hand(self) -> AbstractContextManager[object]:
        """Have what is trained whole for a while, where it is not; what is written to it stays."""
        return nullcontext()

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Copy whole values, which every process has, into the module's tensors of the same names."""
        for name, tensor in tensors.items():
            if name in values:
                tensor.copy_(self.part(values[name], name, tensor))

    def fill_base(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Do the same for a whole model, with little more of it in memory at a time than this process's part."""
        self.fill(tensors, values)

    def shown(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors without memory that have the shapes of the whole ones."""
        return {
            name: torch.empty(self.shape(name, tensor), dtype=tensor.dtype, device="meta")
            for name, tensor in tensors.items()
        }

    def shape(self, name: str, parameter: Tensor) -> torch.Size:  # noqa: ARG002
        """Return the shape of the whole of a parameter."""
        return parameter.shape

    # --- optimizers

    def configured(self, module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        """Take note of the optimizers, before the strategy takes them over.

        Raises:
            NotImplementedError: The strategy cannot use them as they are.
        """

    def as_configured(self, optimizers: Sequence[Any]) -> Sequence[Any]:
        """Return what has the module's own parameters in ``param_groups``: these optimizers, or stand-ins."""
        return optimizers

    def reached(self) -> set[str]:
        """Return the names of the adapters that gradients have reached, in any process; every process must call."""
        return reached_adapters(self.module, self.strategy.root_device)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state with whole tensors; every process must call this."""
        state = Strategy.optimizer_state(self.strategy, optimizer)
        names = [name for group in optimizer_names(self.module, [optimizer])[0] for name in group]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        entries: dict[int, dict[str, Any]] = cast(dict[str, Any], state).get("state", {})
        values = {(index, key): value for index, entry in entries.items() for key, value in entry.items()}
        tensors = {
            (index, key): value
            for (index, key), value in values.items()
            if isinstance(value, Tensor) and value.ndim and value.shape == parameters[index].shape
        }
        found: dict[Any, Any] = self.gather(tensors, lambda place: names[place[0]])
        found |= self.agree({place: value for place, value in values.items() if place not in tensors})
        whole_entries: dict[int, dict[str, Any]] = {}
        for index, key in sorted(found):
            whole_entries.setdefault(index, {})[key] = found[index, key]
        return {**state, "state": whole_entries} if state else {}

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any], names: list[str]) -> None:
        """Load what ``optimizer_state`` returned, anywhere, into an optimizer.

        Args:
            optimizer: One of the strategy's.
            state: Its entries are at the positions of this optimizer's parameters.
            names: The names of these parameters.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Where a process has nothing of a parameter, the optimizer never steps it and has no state for it.
        state["state"] = {index: entry for index, entry in state["state"].items() if parameters[index].numel()}
        for index, entry in state["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.shape == self.shape(names[index], parameters[index]):
                    entry[key] = self.part(value, names[index], parameters[index])
        optimizer.load_state_dict(state)
        _optimizer_to_device(optimizer, self.strategy.root_device)


def refuse_reading_across(module: LightningModule, strategy: str, instead: str) -> None:
    """Refuse adapters that one layer reads while another runs: then the strategy may have their tensors apart.

    Args:
        module: An adapted module.
        strategy: The strategy's name.
        instead: What can train them.

    Raises:
        NotImplementedError: There are such adapters.
    """
    layers = lora_layers(module)
    reasons = {
        "that the weight itself must carry": [n for n, layer in layers.items() if isinstance(layer, WeightLoRALayer)],
        "that tied layers share": [n for n, layer in layers.items() if not layer.adapters()],
    }
    for what, names in reasons.items():
        if names:
            raise NotImplementedError(
                f"{strategy} cannot train adapters {what}: {listed(names)}. Leave the layers out with "
                f"exclude_modules, or use {instead}."
            )
