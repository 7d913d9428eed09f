"""Look inside an adapter: what it learned, in which layers, at which rank; and what a budget allows.

The numeric primitives are in ``spectrum``, the pictures in ``plots``, the pages in ``reports``.
"""

from __future__ import annotations

from lightning_lora.analysis.adapters import AdapterMatrix, read_matrices
from lightning_lora.analysis.budget import BudgetPlan, adapter_size, plan_budget
from lightning_lora.analysis.comparison import AdapterComparison, compare, layer_similarity
from lightning_lora.analysis.components import Loadings, loadings
from lightning_lora.analysis.memory import MemoryForecast, forecast_memory
from lightning_lora.analysis.summary import AdapterAnalysis, analyze, findings, suggest_ranks

__all__ = [
    "AdapterAnalysis",
    "AdapterComparison",
    "AdapterMatrix",
    "BudgetPlan",
    "Loadings",
    "MemoryForecast",
    "adapter_size",
    "analyze",
    "compare",
    "findings",
    "forecast_memory",
    "layer_similarity",
    "loadings",
    "plan_budget",
    "read_matrices",
    "suggest_ranks",
]
