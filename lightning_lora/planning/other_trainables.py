"""Parts of the base that train besides the adapters: modules in full, biases, and rows of embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_lora.layers import (
    AdapterSpec,
    LinearAdapter,
    LoRALayer,
    TokenAdapter,
    adapter_type,
    base_weight,
    weight_readers,
)
from lightning_lora.names import first_match, is_below, is_glob, join, listed, matches, selected
from lightning_lora.planning.obstacles import instance_obstacle
from lightning_lora.planning.plan import Plan, PlannedLayer, sizes_once
from lightning_lora.sharding import is_sharded

_TOKENS = "trainable_token_indices"


def heads(plan: Plan) -> list[str]:
    """Return the names of output layers that an adapter does not suit, because they are small, or likely new.

    These are linear layers of which the rank exceeds a dimension, so that an adapter would be the larger one, and what
    transformers models for a task have beside their base model, apart from the output embedding. The model's structure
    alone decides, so that a checkpoint finds the same heads; ranks that the data are yet to choose count as the usual.
    """
    found, config = list[str](), plan.config
    for name, part in plan.modules.items():
        adapter = adapter_type(part)
        if adapter is not None and issubclass(adapter, LinearAdapter):
            rank = first_match(config.rank_pattern, plan.names[name], config.expected_rank)
            if name and not isinstance(part, LoRALayer) and rank > min(adapter.matrix_shape(part)):
                found.append(name)
        elif isinstance(getattr(part, prefix := getattr(part, "base_model_prefix", None) or "-", None), nn.Module):
            embedding = getattr(part, "get_output_embeddings", lambda: None)()
            for key, child in part._modules.items():
                parts = set(child.modules()) if child is not None and key != prefix else ()
                if parts and embedding not in parts and any(each._parameters for each in parts):
                    found.append(join(name, key))
    excluded = [name for name, names in plan.names.items() if selected(config.exclude_modules, names)]
    tied = {name.rpartition(".")[0] for name in plan.tied}
    return [name for name in found if name in plan.names and not is_below(name, excluded) and name not in tied]


def plan_saved_modules(plan: Plan) -> Iterator[str]:
    """Plan the modules of ``modules_to_save`` and yield the problems."""
    for name, module in plan.modules.items():
        entry = selected(plan.config.modules_to_save, plan.names[name])
        if entry is None or is_below(name, plan.saved):
            continue
        if any(True for _ in module.parameters()) or (not is_glob(entry) and module.state_dict()):
            plan.saved[name] = module
    for name, module in plan.saved.items():
        for key, _ in module.named_parameters():
            full = join(name, key)
            if outside := [other for other in plan.tied.get(full, ()) if not is_below(other, plan.saved)]:
                yield (
                    f"modules_to_save: {full!r} is tied to {outside}, which would change with it. Name the modules on "
                    "both sides, or untie them."
                )


def plan_biases(plan: Plan) -> Iterator[str]:
    """Plan the biases to train and yield the problems.

    A bias is a parameter whose own name says so, as in PEFT: ``bias``, ``in_proj_bias``, ``bias_ih_l0``.
    """
    bias, adapted = plan.config.bias, {id(layer.module) for layer in plan.layers}
    found = {
        join(name, key): parameter
        for name, part in plan.modules.items()
        if (bias == "all" or id(part) in adapted) and not is_below(name, plan.saved)
        for key, parameter in part._parameters.items()
        if parameter is not None and "bias" in key
    }
    plan.biases |= sizes_once({name: [parameter] for name, parameter in found.items()})
    if on_meta := [name for name, parameter in found.items() if parameter.is_meta]:
        yield (
            f"bias={bias!r}: {listed(on_meta)} are on the meta device and have no values for detach to put "
            "back; attach after the weights are loaded."
        )
    if not plan.biases and plan.layers:
        where = "The model has" if bias == "all" else "The adapted layers have"
        yield f"bias={bias!r}: {where} no bias to train. Use bias='none'."
    for name in plan.biases:
        if outside := [other for other in plan.tied.get(name, ()) if other not in plan.biases]:
            yield f"bias={bias!r}: {name!r} is tied to {outside}, which would change with it."


# --- rows of embeddings


def plan_token_rows(plan: Plan) -> Iterator[str]:
    """Plan the rows of ``trainable_token_indices`` and yield the problems."""
    wanted = plan.config.trainable_token_indices
    embeddings = [name for name, part in plan.modules.items() if isinstance(part, nn.Embedding)]
    if not isinstance(wanted, Mapping):
        inputs = _input_embeddings(plan)
        if len(inputs) != 1:
            what = f"several embeddings ({listed(inputs)})" if inputs else "no embedding"
            yield f"{_TOKENS}: the model has {what}; write {{name: tokens}} to choose one."
            return
        wanted = {inputs[0]: wanted}
    for entry, tokens in wanted.items():
        chosen = [name for name, names in plan.names.items() if any(matches(entry, alias) for alias in names)]
        for name in chosen:
            if name in embeddings:
                yield from _plan_embedding(plan, name, tokens)
            elif not is_glob(entry):
                yield f"{_TOKENS}: {name!r} is a {type(plan.modules[name]).__name__}, not an nn.Embedding."
        if not chosen:
            yield f"{_TOKENS}={entry!r} matched no module. Embeddings are {listed(embeddings)}."


def _input_embeddings(plan: Plan) -> list[str]:
    """Return the input embeddings that transformers models in a model declare, else every ``nn.Embedding``.

    Of models inside models, such as an encoder in its parent, the outermost counts.
    """
    found: list[nn.Module] = []
    inner: set[int] = set()
    for part in plan.modules.values():
        if id(part) not in inner and hasattr(type(part), "get_input_embeddings"):
            inner |= {id(below) for below in part.modules()}
            found.append(part.get_input_embeddings())  # type: ignore[operator]
    declared = [name for name, part in plan.modules.items() if isinstance(part, nn.Embedding) and part in found]
    return declared or [name for name, part in plan.modules.items() if isinstance(part, nn.Embedding)]


def _plan_embedding(plan: Plan, name: str, tokens: Sequence[int]) -> Iterator[str]:
    module = plan.modules[name]
    assert isinstance(module, nn.Embedding)
    sharing = plan.tied.get(join(name, "weight"), ())
    owners = [other.rpartition(".") for other in sharing]
    followers = {owner: plan.modules[owner] for owner, _, key in owners if key == "weight" and owner}
    weight, others = base_weight(module), set(sharing) - {join(follower, "weight") for follower in followers}
    if reason := (
        _taken(plan, (name, *followers))
        or (others and f"its weight is also used as {listed(sorted(others))}, which would not see the trained rows")
        or _of_weight(weight)
        or _of_tokens(module, tokens)
        or next(filter(None, map(instance_obstacle, (module, *followers.values()))), None)
    ):
        yield f"{_TOKENS}: {name!r} cannot train tokens: {reason}."
        return
    dtype = weight.dtype if weight.dtype == torch.float64 else getattr(torch, plan.config.adapter_dtype)
    spec = AdapterSpec(len(tokens), 1.0, 0.0, "", dtype, 0, rows=tuple(range(t, t + 1) for t in tokens))
    readers = weight_readers(list(plan.modules.values()))
    in_weight = {each: id(each) in readers or TokenAdapter.needs_weight(each) for each in (module, *followers.values())}
    layer = PlannedLayer((name,), module, _TOKENS, TokenAdapter, "weight")
    layer.in_weight, layer.followers = in_weight.pop(module), in_weight
    layer.spec, layer.key, layer.label, layer.size = spec, "", name, len(tokens) * weight.shape[1]
    plan.layers.append(layer)


def _taken(plan: Plan, names: Sequence[str]) -> str | None:
    if taken := sorted({layer.names[0] for layer in plan.layers} & {*names}):
        return f"another target option already adapts {listed(taken)}; each layer can have only one"
    if below := [name for name in names if is_below(name, plan.saved)]:
        return f"modules_to_save already trains {listed(below)} in full"
    return None


def _of_weight(weight: Tensor) -> str | None:
    if is_sharded(weight):
        return "its weight is sharded by tensor parallelism"
    if weight.is_meta:
        return "its weight is on the meta device and has no values yet; attach after the weights are loaded"
    return None


def _of_tokens(module: nn.Embedding, tokens: Sequence[int]) -> str | None:
    if outside := [token for token in tokens if token >= module.num_embeddings]:
        return f"it has {module.num_embeddings} tokens, and {outside} are out of range"
    if module.padding_idx in tokens:
        return f"token {module.padding_idx} is its padding_idx, which gets no gradient"
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} rescales the frozen weight in place; set it to None"
    return None
