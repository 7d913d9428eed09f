"""States of torchmetrics in a module, which its checkpoints hold if they are persistent, beside extra states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchmetrics import Metric

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.names import clean_name
from lightning_lora.state import load_extra_states


def _metrics(model: AdaptedModel) -> list[tuple[str, Metric]]:
    return [(name, part) for name, part in model.parts if isinstance(part, Metric)]


def metric_states(model: AdaptedModel) -> dict[str, Any]:
    """Return the persistent states of torchmetrics, without frozen weights that a metric may hold."""
    metrics = _metrics(model)
    frozen = {clean_name(name) for name, _ in model.module.named_parameters()} if metrics else set()
    return {
        key: value
        for name, metric in metrics
        for key, value in metric.state_dict(prefix=f"{name}.").items()
        if key not in frozen
    }


def load_states(model: AdaptedModel, state: Mapping[str, Any]) -> None:
    """Load what a checkpoint holds of them and of extra states; where it holds nothing, the states stay."""
    metrics = metric_states(model)  # some have extra states, which they load themselves
    load_extra_states(model.module, {name: value for name, value in state.items() if name not in metrics})
    for name, metric in _metrics(model):
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        metric.load_state_dict(own, strict=False)
