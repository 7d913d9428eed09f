"""The matrices of adapters in files: checkpoints of a LoRACallback run, and PEFT directories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from lightning_lora.analysis.matrices import AdapterMatrix, frozen_matrix, matrices, refuse_folded, token_rows
from lightning_lora.analysis.places import in_order
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import TokenAdapter
from lightning_lora.names import join, listed, module_names
from lightning_lora.peft_format.config import LAST_KNOWN_PEFT, TIMES_PEFT_ADDS_OUT_PROJ, PeftConfig
from lightning_lora.peft_format.directory import keys_by_path, read_directory
from lightning_lora.peft_format.importing import make_import
from lightning_lora.peft_format.loading import matching_root
from lightning_lora.planning.plan import PlannedLayer
from lightning_lora.planning.planner import make_plan
from lightning_lora.state import check_not_merged
from lightning_lora.storage.checkpoint import read_checkpoint

_WRAPPER = ".base_layer"
_ATTENTION_OUTPUT = f"{_WRAPPER}.out_proj"


# --- checkpoints


def matrices_of_checkpoint(
    path: str | PathLike[str], base: nn.Module | None, *, tokens: bool = False
) -> list[AdapterMatrix]:
    """Return the updates in a checkpoint of a LoRACallback run.

    Args:
        path: The file.
        base: A model of the trained kind, for the weights; it is left as it is.
        tokens: Whether trained rows of embeddings are among them.

    Raises:
        ValueError: The file is no such checkpoint, or the base another model.
        RuntimeError: Other adapters were merged into the base than into the one that was trained.
    """
    record, state = read_checkpoint(path)
    weights = {} if base is None else _weights_by_record(base, record)
    use_dora = any(LoRAConfig.from_dict(entry["config"]).use_dora for entry in record["adapters"])
    found: list[AdapterMatrix] = []
    for label, layer in record["layers"].items():
        if (rows := state.get(f"{label}.lora.rows")) is not None:
            found += token_rows(label, rows, weights.get(label)) if tokens else ()
            continue
        place = _place(label, state, path)
        dora = use_dora and f"{place}.magnitude" in state
        factors = state[f"{place}.A"], state[f"{place}.B"]
        found += matrices(label, *factors, layer["scaling"], weights.get(label), is_rescaled=dora)
    return found


def _place(label: str, state: Mapping[str, Tensor], path: object) -> str:
    """Return where a checkpoint keeps the factors of an adapter: of a layer's one, or of one in a group."""
    layer, _, key = label.rpartition(".")
    for place in (join(label, "lora"), f"{join(layer, 'lora')}.{key}"):
        if f"{place}.A" in state and f"{place}.B" in state:
            return place
    raise ValueError(f"{str(path)!r} holds no factors of {label!r}; the file was changed or damaged.")


def _weights_by_record(base: nn.Module, record: Mapping[str, Any]) -> dict[str, Tensor | None]:
    check_not_merged(base, record["merges"])
    modules, found = module_names(base), dict[str, Tensor | None]()
    for entry in record["adapters"]:
        root = entry["root"]
        if root not in modules:
            raise ValueError(f"The adapter was attached to {root!r}, which {type(base).__name__} does not have.")
        weights = _planned_weights(modules[root][0], LoRAConfig.from_dict(entry["config"]))
        found |= {join(root, label): weight for label, weight in weights.items()}
    _check_known(record["layers"], found, base)
    return found


# --- PEFT directories


def matrices_of_directory(
    directory: str | PathLike[str], base: nn.Module | None, *, tokens: bool = False
) -> list[AdapterMatrix]:
    """Return the updates in a PEFT directory.

    Args:
        directory: The directory.
        base: The base model or a module that holds it, for the weights and for what the files alone do not say: which
            parameter of a module is which. It is left as it is.
        tokens: Whether trained rows of embeddings are among them.

    Raises:
        ValueError: The files cannot be read, do not fit the base, or need one to be understood.
        FileNotFoundError: They are not there.
    """
    file = read_directory(directory)
    if base is None:
        return list(_Directory(file.config, file.tensors).matrices())
    check_not_merged(base, {})
    root = matching_root(base, file.paths)
    prefix = next(name for name, (part, _) in module_names(base).items() if part is root)
    content = make_import(root, file)
    weights = _planned_weights(root, content.config)
    _check_known([layer.label for layer in content.layers], weights, base)
    found: list[AdapterMatrix] = []
    for layer in content.layers:
        f, name = layer.factors, join(prefix, layer.label)
        found += matrices(name, f.A, f.B, f.scaling, weights[layer.label], is_rescaled=f.magnitude is not None)
    for label, (_, rows) in content.tokens.items() if tokens else ():
        found += token_rows(join(prefix, label), rows, weights[label])
    return found


class _Directory:
    """A directory read without its model; what only the model can tell is refused."""

    def __init__(self, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.tensors = tensors
        self.by_path = keys_by_path(list(self.tensors))
        if config.target_parameters and (config.rank_pattern or config.alpha_pattern):
            raise ValueError(
                "This directory adapts parameters by name, with patterns of ranks or alphas: which parameter is which "
                "only the model can tell. Give it as base."
            )

    def matrices(self) -> Iterator[AdapterMatrix]:
        for path in sorted(self.by_path, key=in_order):
            A, B = self._factor(path, "A"), self._factor(path, "B")
            label, target = self._label(path), self._target(path)
            rank = self.config.rank_of(target)
            if self.config.target_parameters and A.shape[0] > rank and A.shape[0] % rank == 0:
                experts = A.shape[0] // rank
                A, B = A.reshape(experts, rank, -1), B.reshape(B.shape[0], rank, experts).permute(2, 0, 1)
            dora = f"{path}.lora_magnitude_vector" in self.tensors
            yield from matrices(label, A, B, self._scaling(path, target), is_rescaled=dora)

    def _factor(self, path: str, letter: str) -> Tensor:
        names = (f"{path}.lora_{letter}.weight", f"{path}.lora_embedding_{letter}")
        found = next((self.tensors[name] for name in names if name in self.tensors), None)
        if found is None or found.ndim < 2:
            raise ValueError(f"{path}: the file has no factor {letter} of two or more dimensions.")
        return found.flatten(1)

    def _target(self, path: str) -> str:
        """Return the name that patterns mean: for both projections of attention it is the attention's."""
        return path.partition(_WRAPPER)[0]

    def _label(self, path: str) -> str:
        if f"{path}{_ATTENTION_OUTPUT}" in self.by_path:
            return f"{path}.in_proj_weight"
        return path.replace(_ATTENTION_OUTPUT, ".out_proj")

    def _scaling(self, path: str, target: str) -> float:
        if not path.endswith(_ATTENTION_OUTPUT):
            return self.config.scaling_of(target)
        if self.config.peft_version > LAST_KNOWN_PEFT:
            raise ValueError(f"{path}: whether the PEFT that wrote this adds the update once or twice is unknown.")
        return TIMES_PEFT_ADDS_OUT_PROJ * self.config.scaling_of(target)


# --- the weights


def _planned_weights(root: nn.Module, config: LoRAConfig) -> dict[str, Tensor | None]:
    """Return the frozen matrices that this config would adapt, by the adapters' names."""
    refuse_folded(root)
    return {layer.label: _planned_weight(layer) for layer in make_plan(root, module_names(root), config, 0).layers}


def _planned_weight(layer: PlannedLayer) -> Tensor | None:
    if issubclass(layer.adapter, TokenAdapter):
        return frozen_matrix(layer.adapter(layer.module, layer.spec, layer.parameter), layer.module)
    # The smallest adapter of the kind, never attached: only it knows how the kind stores its weight.
    small = layer.spec._replace(rank=1, use_dora=False, lora_bias=False)
    return frozen_matrix(layer.adapter(layer.module, small, layer.parameter), layer.module)


def _check_known(labels: Any, weights: Mapping[str, Any], base: nn.Module) -> None:
    if unknown := [label for label in labels if label not in weights]:
        raise ValueError(f"{type(base).__name__} is another model than the adapter's: it has no {listed(unknown)}.")
