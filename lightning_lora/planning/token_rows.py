"""Which rows of which embeddings train: what ``trainable_token_indices`` means in a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import AdapterSpec, TokenAdapter, base_weight
from lightning_lora.names import input_embeddings, is_below, is_glob, join, listed, matches
from lightning_lora.planning.misses import Modules
from lightning_lora.planning.obstacles import Obstacles
from lightning_lora.planning.plan import Plan, PlannedLayer
from lightning_lora.sharding import is_sharded

_OPTION = "trainable_token_indices"


def plan_token_rows(plan: Plan, modules: Modules, config: LoRAConfig, obstacles: Obstacles) -> Iterator[str]:
    """Plan the rows that train, and yield what is wrong with the request."""
    wanted = config.trainable_token_indices
    if not wanted:
        return
    if not isinstance(wanted, Mapping):
        embeddings = input_embeddings(plan.modules.values())
        found = [name for name, (part, _) in modules.items() if part in embeddings]
        if len(found) != 1:
            what = f"are several embeddings ({listed(found)})" if found else "is no embedding"
            yield f"{_OPTION}: it is unclear which embedding is meant: there {what}. Write {{name: tokens}}."
            return
        wanted = {found[0]: wanted}
    for entry, tokens in wanted.items():
        chosen = [name for name, (_, names) in modules.items() if any(matches(entry, alias) for alias in names)]
        for name in chosen:
            if not (is_glob(entry) and not isinstance(plan.modules[name], nn.Embedding)):
                yield from _plan_embedding(plan, name, tokens, config, obstacles)
        if not chosen:
            yield f"{_OPTION}={entry!r} matched no module. Embeddings are {listed(_embeddings(plan))}."


def _plan_embedding(
    plan: Plan, name: str, tokens: Sequence[int], config: LoRAConfig, obstacles: Obstacles
) -> Iterator[str]:
    module = plan.modules[name]
    if not isinstance(module, nn.Embedding):
        yield f"{_OPTION}: {name!r} is a {type(module).__name__}, not an nn.Embedding."
        return
    weight, followers = base_weight(module), _followers(plan, name, obstacles)
    if reason := _obstacle(plan, name, module, tokens, followers, obstacles):
        yield f"{_OPTION}: {name!r} cannot train tokens: {reason}."
        return
    dtype = weight.dtype if weight.dtype == torch.float64 else getattr(torch, config.adapter_dtype)
    spec = AdapterSpec(len(tokens), 1.0, 0.0, "", dtype, 0, rows=tuple(range(t, t + 1) for t in tokens))
    plan.layers.append(
        PlannedLayer(
            name=name,
            module=module,
            pattern=_OPTION,
            adapter=TokenAdapter,
            spec=spec,
            parameter="weight",
            key="",
            in_weight=TokenAdapter.needs_weight(module),
            label=name,
            size=len(tokens) * weight.shape[1],
            followers=tuple(followers.values()),
        )
    )


def _followers(plan: Plan, name: str, obstacles: Obstacles) -> dict[str, nn.Module]:
    owners = [other.rpartition(".") for other in obstacles.tied.get(join(name, "weight"), ())]
    return {owner: plan.modules[owner] for owner, _, key in owners if key == "weight" and owner}


def _obstacle(
    plan: Plan,
    name: str,
    module: nn.Embedding,
    tokens: Sequence[int],
    followers: Mapping[str, nn.Module],
    obstacles: Obstacles,
) -> str | None:
    adapted = {layer.name for layer in plan.layers}
    if taken := sorted(adapted & {name, *followers}):
        return f"{listed(taken)} is adapted already; leave it out of the other targets"
    if below := [each for each in (name, *followers) if is_below(each, plan.saved)]:
        return f"{listed(below)} trains in full, by modules_to_save"
    others = set(obstacles.tied.get(join(name, "weight"), ())) - {join(follower, "weight") for follower in followers}
    if others:
        return f"its weight is also held as {listed(sorted(others))}, which would not see the trained rows"
    if reason := _of_weight(base_weight(module)) or _of_tokens(module, tokens):
        return reason
    return next((reason for part in (module, *followers.values()) if (reason := obstacles.of_instance(part))), None)


def _of_weight(weight: Tensor) -> str | None:
    if is_sharded(weight):
        return "its weight is divided by tensor parallelism"
    if weight.is_meta:
        return "its weight is on the meta device and has no values yet; attach when the weights are there"
    return None


def _of_tokens(module: nn.Embedding, tokens: Sequence[int]) -> str | None:
    if outside := [token for token in tokens if token >= module.num_embeddings]:
        return f"it has {module.num_embeddings} tokens, and {outside} are beyond"
    if module.padding_idx in tokens:
        return f"token {module.padding_idx} is its padding_idx, which gets no gradient"
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} rescales the frozen weight in place; set it to None"
    return None


def _embeddings(plan: Plan) -> list[str]:
    return [name for name, part in plan.modules.items() if isinstance(part, nn.Embedding)]
