"""Reasons why a config does not fit a model: layers that cannot be adapted, and entries that match nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter

from torch import Tensor, nn

from lightning_lora.config import ALL_CONV, ALL_LINEAR, EVERYTHING, FAMILIES, LoRAConfig
from lightning_lora.layers import (
    SUPPORTED,
    LinearAdapter,
    LoRALayer,
    adapter_type,
    base_parameter,
    family_of,
    taken_names,
    weight_readers,
)
from lightning_lora.names import (
    any_below,
    is_below,
    is_glob,
    join,
    listed,
    matches_pattern,
    near_names,
    selected,
    sweeps,
    unmatched,
)
from lightning_lora.planning.plan import Plan, PlannedLayer
from lightning_lora.sharding import is_sharded

TOO_SMALL = "the highest rank of its weight"
EXCLUDED = "in exclude_modules"
UNKNOWN_MATRIX = (
    "held by no layer of a known kind; name it in target_parameters, or call register_adapter for its class"
)


def _by_pattern(_: int) -> str:
    return "lower it with rank_pattern"


_how_to_lower: ContextVar[Callable[[int], str]] = ContextVar("_how_to_lower", default=_by_pattern)


@contextmanager
def lowered_by(remedy: Callable[[int], str]) -> Iterator[None]:
    """Have messages about layers too small for the rank say this inside the block, where ``rank_pattern`` is refused.

    Args:
        remedy: Says, from the highest rank of a weight, what to do.
    """
    token = _how_to_lower.set(remedy)
    try:
        yield
    finally:
        _how_to_lower.reset(token)


class Obstacles:
    """Reasons why layers of supported kinds cannot be adapted in one model.

    Attributes:
        readers: Identities of layers whose weight the parent reads instead of calling them -> the parent's class.
        is_common: Whether all parameters are ordinary ones, in floating point.
    """

    def __init__(self, plan: Plan) -> None:
        config, modules, parameters = plan.config, plan.modules.values(), plan.parameters.values()
        self.config, self.tied, self.readers = config, plan.tied, weight_readers(modules)
        precisions = set(map(attrgetter("dtype"), parameters))  # far fewer than parameters, as are the classes
        is_ordinary = set(map(type, parameters)) <= {nn.Parameter}
        self.is_common = is_ordinary and all(map(attrgetter("is_floating_point"), precisions))
        self._asks_for_more = bool(config.dropout or config.lora_bias or config.use_dora) or not self.is_common
        self._heads = _output_embeddings(modules) if config.families else set[int]()

    def of(self, layer: PlannedLayer, rank: int, shape: tuple[int, int]) -> str | None:
        """Return why an adapter cannot be made, or None."""
        module = layer.module
        if isinstance(module, LoRALayer):
            # The layer was judged when it was adapted, but parts may have been left out, and all but chosen tokens.
            there = module.adapters().values() if not layer.key else [module.adapters().get(layer.key)]
            if any(isinstance(each, layer.adapter) for each in there):
                return None
        elif reason := layer.adapter.obstacle(module) or instance_obstacle(module):
            return reason
        if self.tied and (reason := self._of_tie(layer)):
            return reason
        if id(module) in self._heads and layer.pattern in FAMILIES:
            return "output embedding of a transformers model"
        if rank > shape[0] or rank > shape[1]:
            whole = "" if layer.key else ", or use modules_to_save"  # which takes no part of a layer
            remedy = _how_to_lower.get()(min(shape))
            return f"rank {rank} is above {min(shape)}, {TOO_SMALL}; {remedy}{whole}"
        if self._asks_for_more:
            return self._of_options(layer)
        return None

    def _of_tie(self, layer: PlannedLayer) -> str | None:
        others, named = self.tied.get(join(layer.names[0], layer.parameter)), layer.pattern not in FAMILIES
        if not others or (named and self.config.untie_weights):
            return None
        remedy = "; untie_weights=True gives it a copy of its own" if named else ""
        return f"its weight is tied to {', '.join(map(repr, others))}, which would change with it{remedy}"

    def _of_options(self, layer: PlannedLayer) -> str | None:
        """Return why an option beyond plain LoRA, or an uncommon kind of weight, does not work here, or None."""
        module, adapter, config = layer.module, layer.adapter, self.config
        weight, carried = base_parameter(module, layer.parameter), self.carried_by_weight(layer)
        if carried and not weight.is_floating_point():
            return f"{carried}; that needs a floating-point weight, not {weight.dtype}"
        if is_sharded(weight):
            where = "its weight is sharded by tensor parallelism, under which"
            if carried or not (isinstance(module, nn.Linear) and adapter.takes_bias):
                return f"{where} only a plain nn.Linear can be adapted"
            if config.use_dora or config.lora_bias:
                return f"{where} use_dora and lora_bias are not supported"
        if carried and config.dropout and adapter.drops_input:
            return f"{carried}; that needs dropout=0"
        if weight.is_complex() and config.dropout and adapter.drops_input:
            return "torch has no dropout for complex inputs; that needs dropout=0"
        if config.lora_bias and not adapter.takes_bias:
            return f"lora_bias does not apply to a {getattr(module, 'base_class', type(module)).__name__}"
        if carried and config.lora_bias:
            return f"{carried}; that needs lora_bias=False"
        return _obstacle_to_dora(layer, weight) if config.use_dora else None

    def carried_by_weight(self, layer: PlannedLayer) -> str | None:
        """Return why the weight must carry the update, or None where the update is added to the output."""
        if reader := self.readers.get(id(layer.module)):
            return f"its parent, a {reader}, reads the weight, which must carry the update"
        if layer.adapter.needs_weight(layer.module) and not self._may_be_added(layer):
            return f"a {type(layer.module).__name__} has its own forward, so its weight must carry the update"
        return None

    def _may_be_added(self, layer: PlannedLayer) -> bool:
        """Return whether an option needs the update beside the layer, and a trial shows that it may be there."""
        asked = (self.config.dropout and layer.adapter.drops_input) or self.config.lora_bias
        return bool(asked) and issubclass(layer.adapter, LinearAdapter) and layer.adapter.adds_to_output(layer.module)


def wider_targets(config: LoRAConfig, missing: Iterable[str]) -> str | list[str] | None:
    """Return ``target_modules`` with the words for families of layers that it misses."""
    more = [word for word in FAMILIES if word in {*missing}.difference(config.families)]
    if EVERYTHING in config.families or not more:
        return None  # what is missing was left out for a reason
    if EVERYTHING in more:
        return EVERYTHING
    names = () if isinstance(config.named_targets, str) else config.named_targets
    wider = [*config.families, *names, *more]
    return wider if len(wider) > 1 else wider[0]


def other_kinds(plan: Plan) -> str:
    """Return a sentence about the layers that more words of ``target_modules`` would reach, or nothing."""
    config, others = plan.config, dict[str, str]()
    for name, part in plan.modules.items():
        kind, names = adapter_type(part), plan.names[name]
        if kind is None or isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if family_of(kind, part) not in config.families and not any_below(
            names, [*plan.saved, *config.exclude_modules]
        ):
            others[name] = family_of(kind, part)
    wider = wider_targets(config, others.values()) if config.families else None
    if wider is None:
        return ""
    return f" Adapters fit {listed(list(others))}, too: set target_modules={wider!r}."


def _obstacle_to_dora(layer: PlannedLayer, weight: Tensor) -> str | None:
    if not layer.adapter.has_output_rows or isinstance(layer.module, nn.EmbeddingBag):
        kind = type(layer.module).__name__
        return f"use_dora needs a row for each output, and {layer.parameter!r} of a {kind} has none"
    if weight.is_meta:
        return "use_dora starts from the weights' norms, and this one is on the meta device; attach later"
    if not weight.is_floating_point():
        return f"use_dora needs a floating-point weight, not {weight.dtype}"
    return None


def instance_obstacle(module: nn.Module) -> str | None:
    """Return why this instance cannot be an adapted layer, whatever its class, or None."""
    if "forward" in vars(module):
        return (
            "its forward was replaced on the instance, so an adapter would never run; attach before that is done, such "
            "as by accelerate's hooks"
        )
    if not isinstance(module, LoRALayer) and (taken := taken_names(module)):
        return f"it already has attributes named {sorted(taken)}, which an adapted layer needs"
    return None


def _output_embeddings(modules: Collection[nn.Module]) -> set[int]:
    """Return the identities of the output embeddings that transformers models among the modules declare."""
    found = set[int]()
    for kind in set(map(type, modules)):  # far fewer than modules
        if hasattr(kind, "get_output_embeddings"):
            heads = [part.get_output_embeddings() for part in modules if type(part) is kind]  # type: ignore[operator]
            found |= {id(head) for head in heads if isinstance(head, nn.Module)}
    return found


def adapters_of_peft(plan: Plan) -> Iterator[str]:
    """Yield a problem if the model carries adapters of PEFT, whose factors would be adapted or frozen."""
    kinds = set(map(type, plan.modules.values()))
    theirs = {kind for kind in kinds if any(base.__module__.startswith("peft.") for base in kind.__mro__)}
    exclude = plan.config.exclude_modules
    left_alone = {name for name, names in plan.names.items() if selected(exclude, names)} if theirs and exclude else ()
    parts = plan.modules.items() if theirs else ()
    found = [name for name, part in parts if type(part) in theirs and not is_below(name, left_alone)]
    if found:
        yield (
            f"{plan.root} already carries adapters of PEFT, in {len(found)} modules such as {found[-1]!r}. Merge them "
            "with PEFT's merge_and_unload() or remove them with unload() first. To continue their training, begin "
            "with the bare model and their directory: LoRACallback(init_from=...), or load_adapter without a Trainer. "
            "exclude_modules leaves them as they are."
        )


# --- entries that reach nothing


def missed_entries(plan: Plan) -> Iterator[str]:
    """Yield a problem for every entry of the config that reached nothing."""
    config, everything = plan.config, list(plan.names.values())
    yield from _missed_targets(plan)
    for option, entries in (
        ("exclude_modules", config.exclude_modules),
        ("modules_to_save", config.modules_to_save),
        ("target_slices", tuple(config.target_slices)),
    ):
        for entry in unmatched(entries, everything) if entries else ():
            yield _miss(plan, option, entry, everything)
    if config.target_parameters:
        parameters = _names_of_parameters(plan)
        for entry in unmatched(config.target_parameters, parameters):
            yield _miss(plan, "target_parameters", entry, parameters)
    if config.modules_to_save:
        yield from _empty_saves(plan)
    if config.rank_pattern or config.alpha_pattern:
        yield from _missed_patterns(plan)


def _names_of_parameters(plan: Plan) -> list[list[str]]:
    return [[join(n, key) for n in plan.names[p]] for p, m in plan.modules.items() for key in m._parameters]


def _missed_targets(plan: Plan) -> Iterator[str]:
    config, targets = plan.config, plan.config.named_targets
    if not targets and {*config.families} <= {layer.pattern for layer in plan.layers}:
        return  # spares looking at every module once more
    everything = list(plan.names.values())
    # The default is no request if other targets are given.
    is_default = config.target_modules == ALL_LINEAR and (config.target_parameters or config.trainable_token_indices)
    kinds = ((adapter_type(module), module) for module in plan.modules.values())
    there = set() if is_default else {family_of(adapter, module) for adapter, module in kinds if adapter is not None}
    for word in () if is_default else config.families:
        if word not in there and not (word == EVERYTHING and there):
            what = {ALL_LINEAR: "linear layer", ALL_CONV: "convolution"}.get(word, f"layer of these kinds: {SUPPORTED}")
            matrices = [name for name, reason in plan.left_out.items() if reason == UNKNOWN_MATRIX]
            others = f" Its matrices are {listed(matrices)}; name them in target_parameters." if matrices else ""
            yield f"target_modules={word!r}: {plan.root} has no {what}.{others}"
    adaptable = [plan.names[name] for name, module in plan.modules.items() if adapter_type(module)]
    unknown = unmatched(targets, everything)
    for entry in unmatched(targets, adaptable):
        if entry in unknown:
            yield _miss(plan, "target_modules", entry, everything, [names[0] for names in adaptable])
        elif sweeps(targets, entry):
            yield f"target_modules={entry!r} matched no layer of a supported kind: {SUPPORTED}."


def _missed_patterns(plan: Plan) -> Iterator[str]:
    reached = [layer.label for layer in plan.layers]
    covered = {*reached, *plan.left_out}
    layers = {layer.names[0] for layer in plan.layers} | (plan.left_out.keys() & plan.names.keys())
    covered |= {alias for name in layers for alias in plan.names[name]}
    for option, patterns in (("rank_pattern", plan.config.rank_pattern), ("alpha_pattern", plan.config.alpha_pattern)):
        for key in patterns:
            if not any(matches_pattern(key, name) for name in covered):
                yield _miss(plan, option, key, [(name,) for name in reached])


def _empty_saves(plan: Plan) -> Iterator[str]:
    """An entry may match modules with nothing to save, but must match at least one that has something."""
    for entry in plan.config.modules_to_save:
        found = [name for name, names in plan.names.items() if selected((entry,), names)]
        if not found or any(is_below(name, plan.saved) for name in found):
            continue
        if is_glob(entry):
            yield f"modules_to_save={entry!r} matched no module with parameters: {listed(found)}."
        for name in () if is_glob(entry) else found:
            kind = type(plan.modules[name]).__name__
            yield f"modules_to_save: {name!r} is a {kind} with no parameters or buffers to save."


def _miss(plan: Plan, option: str, entry: str, pool: Sequence[Sequence[str]], layers: Sequence[str] = ()) -> str:
    words = FAMILIES if option == "target_modules" else ()
    near = near_names(entry, (*(name for names in pool for name in names), *words))
    hint = f" Closest names: {', '.join(map(repr, near))}." if near else ""
    if layers and not near:
        hint = f" Its layers are {listed(layers)}."
    if option == "target_modules" and plan.config.target_modules == entry:
        hint += " A string is one regular expression over full names; pass names as a list."
    parameters = (name for names in _names_of_parameters(plan) for name in names)
    full = [name for name in parameters if f".{name}".endswith(f".{entry}")]
    if option == "modules_to_save" and full:
        hint = f" {full[0]!r} is a parameter, and modules_to_save takes modules: put it into one of its own."
    if option == "target_modules" and full:
        hint = f" {full[0]!r} is a parameter: name its layer, or name the parameter in target_parameters."
    what = {"rank_pattern": "adapted layer", "alpha_pattern": "adapted layer", "target_parameters": "parameter"}
    return f"{option}={entry!r} matched no {what.get(option, 'module')} of {plan.root}.{hint}"
