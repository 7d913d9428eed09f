"""The names of ``lightning_lora.analysis``."""

from __future__ import annotations

import inspect

import pytest

from lightning_lora import analysis

NAMES = {
    *("AdapterAnalysis", "AdapterComparison", "AdapterMatrix", "BudgetPlan", "Loadings", "MemoryForecast"),
    *("adapter_size", "analyze", "compare", "findings", "forecast_memory", "layer_similarity"),
    *("loadings", "plan_budget", "read_matrices", "suggest_ranks"),
}


def test_public_names():
    assert set(analysis.__all__) == NAMES


@pytest.mark.parametrize("name", analysis.__all__)
def test_public_names_are_documented(name: str):
    thing = getattr(analysis, name)
    assert thing.__module__.startswith("lightning_lora.analysis.")
    assert vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
