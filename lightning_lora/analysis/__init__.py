"""Look inside an adapter: what it learned, in which layers, with which rank; and what a budget buys."""

from __future__ import annotations

from lightning_lora.analysis.adapters import read_matrices
from lightning_lora.analysis.budget import BudgetPlan, Choice, adapter_size, plan_budget
from lightning_lora.analysis.comparison import (
    AdapterComparison,
    KindSimilarity,
    LayerComparison,
    Overlap,
    compare,
    layer_similarity,
    update_cosine,
)
from lightning_lora.analysis.intruders import Intruders, intruder_dimensions
from lightning_lora.analysis.matrices import AdapterMatrix
from lightning_lora.analysis.memory import MemoryForecast, MemoryUse, forecast_memory
from lightning_lora.analysis.relation import Relation, own_projection, projection, random_projection, relate
from lightning_lora.analysis.similarity import (
    UpdateSimilarity,
    above_baseline,
    random_baseline,
    subspace_similarity,
    update_similarity,
)
from lightning_lora.analysis.spectrum import (
    ThinSVD,
    effective_rank,
    energy_rank,
    numerical_rank,
    stable_rank,
    thin_svd,
    update_norm,
)
from lightning_lora.analysis.suggestions import RankSuggestion, findings, suggest_ranks
from lightning_lora.analysis.summary import AdapterAnalysis, LayerAnalysis, analyze

__all__ = [
    "AdapterAnalysis",
    "AdapterComparison",
    "AdapterMatrix",
    "BudgetPlan",
    "Choice",
    "Intruders",
    "KindSimilarity",
    "LayerAnalysis",
    "LayerComparison",
    "MemoryForecast",
    "MemoryUse",
    "Overlap",
    "RankSuggestion",
    "Relation",
    "ThinSVD",
    "UpdateSimilarity",
    "above_baseline",
    "adapter_size",
    "analyze",
    "compare",
    "effective_rank",
    "energy_rank",
    "findings",
    "forecast_memory",
    "intruder_dimensions",
    "layer_similarity",
    "numerical_rank",
    "own_projection",
    "plan_budget",
    "projection",
    "random_baseline",
    "random_projection",
    "read_matrices",
    "relate",
    "stable_rank",
    "subspace_similarity",
    "suggest_ranks",
    "thin_svd",
    "update_cosine",
    "update_norm",
    "update_similarity",
]
