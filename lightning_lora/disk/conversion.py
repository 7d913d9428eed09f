"""Conversion between checkpoints and PEFT directories, from the files alone: no model is built."""

from __future__ import annotations

import importlib.metadata
import io
import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.config import LoRAConfig
from lightning_lora.disk.skeleton import build_skeleton, fill, put
from lightning_lora.fingerprint import Fingerprint, fingerprint, to_plain
from lightning_lora.layers import adapter_of_kind
from lightning_lora.loading import read_adapter
from lightning_lora.names import is_below, join, listed, matches
from lightning_lora.peft_format.config import KNOWN_ORDER, anchored, parse_config
from lightning_lora.peft_format.directory import PeftFile, read_directory
from lightning_lora.peft_format.export import Export
from lightning_lora.peft_format.files import below, check_expressible, exported, write_export
from lightning_lora.peft_format.importing import Import, import_state, make_import
from lightning_lora.peft_format.names import PREFIX, has_many_names
from lightning_lora.state import check_sound, describe, mismatches, record_problems
from lightning_lora.storage.adapter_file import AdapterFile, StoredLayer, StoredWeight, damage_named
from lightning_lora.storage.atomic import check_new, replace_file
from lightning_lora.storage.checkpoint import RECORD_KEY, CheckpointFile, read_checkpoint
from lightning_lora.storage.safetensors import Layout
from lightning_lora.surgery import attach

_REMEDY = "Load the model, load the file into it with load_adapter, and save it from there."
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "._u", "._v", ".weight_u", ".weight_v")


def export_checkpoint(
    checkpoint: Path,
    directory: Path,
    *,
    adapter: str | None = None,
    root: str | None = None,
    base_model_name_or_path: str | None = None,
    uniform_rank: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write the adapter of a ``.ckpt`` as a PEFT directory, as ``save_adapter`` of the loaded model would.

    Names are relative to ``root``, the model inside the LightningModule: by default the one child that holds
    everything, or ``""``. Of several adapters, it is the one called ``adapter``, or the trained one. The names of the
    layers are returned.

    Raises:
        ValueError: The file does not describe the adapter well enough, or PEFT cannot express it. Nothing was written.
    """
    if checkpoint.is_dir():
        raise ValueError(f"{str(checkpoint)!r} is a directory, not a .ckpt; a PEFT directory needs no export.")
    export, base = _export_of(read_checkpoint(checkpoint, adapter), root)
    name = base_model_name_or_path
    write_export(export, directory, name, base, uniform_rank=uniform_rank, overwrite=overwrite)
    return sorted(layer.name for layer in export.layers)


def _export_of(file: CheckpointFile, root: str | None = None) -> tuple[Export, Fingerprint]:
    """Return what the PEFT directory of a checkpoint's adapter holds, and the fingerprint of its base."""
    with damage_named(file.path):
        _check_exportable(file)
        skeleton = _skeleton_of_checkpoint(file)
        trained = list(AdaptedModel(skeleton).trained)
        root = _common_root(trained, file.record.get("containers", ())) if root is None else root
        if root and not any(is_below(name, (root,)) for name in trained):
            raise ValueError(f"root={root!r} holds nothing of the adapter, which trains {listed(trained, 3)}.")
        export = exported(skeleton, root)
        export.is_partial, export.recorded_root = True, root
        for name in dict.fromkeys(file.aliases.values()):
            names = [name, *(other for other, first in file.aliases.items() if first == name)]
            export.refused[name] = has_many_names(names)
        return export, below(file.base, export.root_name)


def read_as_peft(path: Path) -> PeftFile:
    """Read an adapter as its PEFT directory holds it, also where it is a ``.ckpt``; nothing is written.

    Raises:
        ValueError: The file does not describe the adapter well enough, or PEFT cannot express it.
        FileNotFoundError: It does not exist.
    """
    file = read_adapter(path)
    if isinstance(file, PeftFile):
        return file
    export, base = _export_of(file)
    check_expressible(export)
    options = export.config(None)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in export.tensors().items()}
    config, known = parse_config(options)[0], json.dumps(to_plain(base))
    return PeftFile(path, tensors, options, {}, config, base_text=known, root=export.recorded_root)


def _check_exportable(file: CheckpointFile) -> None:
    configs = [LoRAConfig.from_dict(entry["config"]) for entry in file.record["adapters"]]
    if file.merges:
        raise ValueError(f"The adapter was trained on a base with another adapter merged into it. {_REMEDY}")
    if any(each.get("rows") for each in file.record["layers"].values()) and any(each.use_dora for each in configs):
        raise ValueError(f"DoRA on slices needs the norms of the base's other rows. {_REMEDY}")
    if any(each.frozen_norm == "track" for each in configs) and any(n.endswith(_STATISTICS) for n in file.tensors):
        raise ValueError("PEFT does not save running statistics of frozen norms (frozen_norm='track').")


def _skeleton_of_checkpoint(file: CheckpointFile) -> nn.Module:
    """Return a skeleton that carries the adapters with their values."""
    skeleton = _bare_skeleton(file)
    own = AdaptedModel(skeleton).tensors
    for entry in file.record["adapters"]:
        _attach_bare(skeleton.get_submodule(entry["root"]), LoRAConfig.from_dict(entry["config"]), entry["seed"])
    known = {name: value for name, value in file.tensors.items() if ".lora." in name or name in own}
    if problems := record_problems(skeleton, file.record) + mismatches(AdaptedModel(skeleton).trained, known):
        raise ValueError("The record and the tensors of the file contradict each other: " + "; ".join(problems))
    fill(skeleton, known)
    for root in AdaptedModel(skeleton).roots[:1]:
        root.attachment.moved |= set(file.record.get("buffers", ()))
    return skeleton


def _common_root(names: Collection[str], containers: Collection[str]) -> str:
    """Return the child that holds everything, unless it is itself a layer, or a list of modules."""
    paths = {name.partition(".lora.")[0] if ".lora." in name else name.rpartition(".")[0] for name in names}
    first = {path.partition(".")[0] for path in paths}
    is_model = len(first) == 1 and not first & {*containers} and all("." in path for path in paths)
    return first.pop() if is_model else ""


def import_directory(
    directory: Path, checkpoint: Path, *, root: str | None = None, overwrite: bool = False
) -> list[str]:
    """Write a PEFT directory as a ``.ckpt`` for ``load_adapter`` and ``trainer.test(ckpt_path=...)``.

    All names begin with ``root``, the name of the model inside the LightningModule, ``""`` if it is the module itself;
    by default the one that the directory records, else ``"model"``. The names of the layers are returned.

    Raises:
        ValueError: The files do not describe the adapter well enough, or use unsupported options. Nothing was written.
        FileNotFoundError: They do not exist.
    """
    if directory.is_file():
        raise ValueError(f"{str(directory)!r} is a file, not a PEFT directory; import writes a .ckpt from a directory.")
    check_new(checkpoint, overwrite=overwrite)
    file = read_directory(directory)
    check_sound(file.tensors, "was written")
    if root is None:
        root = "model" if file.root is None else file.root
    with damage_named(directory):
        skeleton = _bare_skeleton(file, root)
        part = skeleton.get_submodule(root)
        content = make_import(part, file)
        base = {join(root, name): sample for name, sample in file.base.items()}
        # PEFT repeats weights of the frozen base, such as embeddings.
        repeated = {key.replace(".base_layer.", ".") for key in file.tensors} - content.values.keys()
        base |= fingerprint({join(root, name): p for name, p in part.named_parameters() if name in repeated})
        _attach_bare(skeleton, _with_full_names(content, root))
        model = AdaptedModel(skeleton)
        state = import_state(content, model)
        if problems := mismatches(model.trained, state):
            raise ValueError("; ".join(problems))
        fill(skeleton, state)
    model = AdaptedModel(skeleton)
    # Where the module itself is the model, none of its children is, so that an export gives the same names again.
    containers = {} if root else {"containers": sorted({name.partition(".")[0] for name in model.trained})}
    checkpoint_content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": importlib.metadata.version("lightning"),
        "state_dict": {name: tensor.detach() for name, tensor in model.trained.items()},
        RECORD_KEY: describe(skeleton) | containers | {"base": to_plain(base), "optimizers": []},
    }
    content_in_memory = io.BytesIO()  # torch's own writer hides why a disk refuses it
    torch.save(checkpoint_content, content_in_memory)
    replace_file(checkpoint, lambda place: place.write_bytes(content_in_memory.getbuffer()))
    return sorted(model.adapters)


def _with_full_names(content: Import, root: str) -> LoRAConfig:
    """Return the config with full names, which mean the same in a model whose other modules are unknown.

    Ties are unknown too: as in PEFT, the update is of the named layer alone.
    """
    config = content.config
    patterns = {anchored(label): anchored(join(root, label)) for label in (layer.label for layer in content.layers)}
    return replace(
        config,
        untie_weights=True,
        target_modules=[join(root, layer.name) for layer in content.layers if not layer.by_parameter],
        target_parameters=[join(root, layer.label) for layer in content.layers if layer.by_parameter],
        modules_to_save=[join(root, name) for name in config.modules_to_save],
        trainable_token_indices={join(root, name): tokens for name, (tokens, _) in sorted(content.tokens.items())},
        rank_pattern={patterns[key]: value for key, value in config.rank_pattern.items()},
        alpha_pattern={patterns[key]: value for key, value in config.alpha_pattern.items()},
    )


# --- the skeleton of an adapter alone: the adapted layers, and the tensors trained in full


def _bare_skeleton(file: PeftFile | CheckpointFile, root: str = "") -> nn.Module:
    """Return a skeleton without adapters that has a place, below ``root``, for all that an adapter file brings.

    Raises:
        ValueError: The file does not describe its layers well enough.
    """
    skeleton = _skeleton_for(_weights_of(file), _wide(file), dict(_others(file)), root)
    if isinstance(file, PeftFile):  # an import compares repeated weights of the base with the model's: here, with these
        put(skeleton, {join(root, name): value for name, value in _others(file)})
    return skeleton


def imported_together(files: Sequence[PeftFile]) -> tuple[nn.Module, list[Import]]:
    """Return one bare skeleton for several adapters of a base, and the content of each, matched with it.

    Raises:
        ValueError: A file does not describe its layers well enough, or their layers differ in kind or shape.
    """
    weights, owners, others = dict[str, StoredWeight](), dict[str, PeftFile](), dict[str, Tensor]()
    wide = set().union(*map(_wide, files))
    for file in files:
        for name, weight in _weights_of(file).items():
            before = weights.get(name, weight)
            if before.kind == weight.kind == "embedding" and before.shape[1:] == weight.shape[1:]:
                weight = max(before, weight, key=lambda each: each.shape)  # trained tokens do not tell the last one
            elif (before.kind, before.shape) != (weight.kind, weight.shape):
                raise ValueError(
                    f"{name}: {str(owners[name].path)!r} adapts a weight of the kind {before.kind!r} and the shape "
                    f"{before.shape}, {str(file.path)!r} one of the kind {weight.kind!r} and the shape {weight.shape}."
                )
            weights[name] = _in_known_order(name, weight) if len(files) > 1 else weight
            owners.setdefault(name, file)
        others |= dict(_others(file))
    if len(files) > 1:
        _check_order_is_known(weights)
    skeleton, contents = _skeleton_for(weights, wide, others), []
    for file in files:
        with damage_named(file.path):
            put(skeleton, dict(_others(file)))
            contents.append(make_import(skeleton, file))
    return skeleton, contents


def _in_known_order(name: str, weight: StoredWeight) -> StoredWeight:
    key = name.rpartition(".")[2]
    return weight._replace(order=KNOWN_ORDER.index(key)) if key in KNOWN_ORDER else weight


def _check_order_is_known(weights: Mapping[str, StoredWeight]) -> None:
    """Raise if files adapt several parameters of one module, and none tells the order in which that registers them."""
    found: dict[str, set[str]] = {}
    for name, weight in weights.items():
        if weight.kind == "parameter":
            path, _, key = name.rpartition(".")
            found.setdefault(path, set()).add(key)
    if unknown := [path for path, keys in found.items() if len(keys) > 1 and not keys <= {*KNOWN_ORDER}]:
        raise ValueError(f"The files do not tell the order of the parameters of {listed(unknown)}. {_REMEDY}")


def _skeleton_for(
    weights: Mapping[str, StoredWeight], wide: Collection[str], others: Mapping[str, Tensor], root: str = ""
) -> nn.Module:
    """Return a bare skeleton with these weights, some of them in float64, and with places for the other tensors."""
    kinds = {name.rpartition(".")[0]: each.kind or "" for name, each in weights.items() if each.kind != "parameter"}
    # Modules that only hold parameters come last, and the parameters of a module as it registers them.
    ordered = sorted(weights.items(), key=lambda each: (each[0].rpartition(".")[0] not in kinds, each[1].order))
    layouts = {name: Layout(torch.float64 if name in wide else torch.float32, each.shape) for name, each in ordered}
    layouts |= {name: Layout(value.dtype, tuple(value.shape)) for name, value in others.items()}
    full = {join(root, name): layout for name, layout in layouts.items()}
    return build_skeleton(full, {join(root, name): kind for name, kind in kinds.items()})


def _weights_of(file: PeftFile | CheckpointFile) -> dict[str, StoredWeight]:
    """Return the weights that a file's adapters are for, by their names.

    Raises:
        ValueError: The file does not describe its layers well enough.
    """
    weights = {label: layer.weight for label, layer in file.layers.items()}
    weights |= {label: tokens.weight for label, tokens in file.tokens.items()}
    _check_described(file, weights)
    for label, layer in file.layers.items():
        _check_factors(label, layer)
    return {weight.name or "": weight for weight in weights.values()}


def _wide(file: PeftFile | CheckpointFile) -> set[str]:
    """Return the names of the weights with adapters in float64, which only a weight in float64 gets from ``attach``."""
    tensors = [(layer.weight.name, each) for layer in file.layers.values() for each in layer.factors.values()]
    tensors += [(tokens.weight.name, tokens.rows) for tokens in file.tokens.values()]
    return {name or "" for name, tensor in tensors if tensor.dtype == torch.float64}


def _check_described(file: AdapterFile, weights: Mapping[str, StoredWeight]) -> None:
    if isinstance(file, PeftFile) and (bare := [entry for entry in file.config.target_parameters if "." not in entry]):
        raise ValueError(f"target_parameters names {listed(bare)} without the modules that hold them. {_REMEDY}")
    if unknown := [label for label, weight in weights.items() if weight.kind is None]:
        raise ValueError(
            f"The file does not describe the layers {listed(unknown)} well enough: PEFT has no adapter for their kind, "
            "or an early version wrote the file. Load the model, load the file into it with load_adapter, and save it "
            "from there; preflight(model) says of each layer whether PEFT takes it."
        )
    for label, each in file.tokens.items():
        if not each.weight.shape or max(each.weight.shape) >= 2**31:
            raise ValueError(f"The file does not tell which tokens of {label!r} were trained.")


def _check_factors(label: str, layer: StoredLayer) -> None:
    """Raise if a weight does not fit its factors: nothing larger than the file describes is ever made."""
    kind, shape, found = layer.weight.kind, layer.weight.shape, (layer.B.shape[-2], layer.A.shape[-1])
    rows, columns = adapter_of_kind(kind or "").matrix_of(shape)
    if found[1] != columns or (found[0] != rows and not layer.rows):
        raise ValueError(f"{label}: a weight of the shape {shape} does not fit factors for {found}.")


def _others(file: PeftFile | CheckpointFile) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors besides the adapters that the model must have."""
    if isinstance(file, PeftFile):
        for name, value in file.others.items():
            if not any(part in f".{name}." for part in (".original_module.", ".modules_to_save.")):
                yield name, value
        return
    configs = [LoRAConfig.from_dict(entry["config"]) for entry in file.record["adapters"]]
    for name, value in file.others.items():
        if any(_trains(name, config) for config in configs):
            yield name, value


def _trains(name: str, config: LoRAConfig) -> bool:
    """Return whether a config trains a tensor of this name in full."""
    parts = name.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    saved = any(matches(entry, path) for entry in config.modules_to_save for path in above)
    return saved or (config.bias != "none" and "bias" in parts[-1])


def _attach_bare(module: nn.Module, config: LoRAConfig, seed: int = 0) -> None:
    """Attach to a bare skeleton, which holds nothing that a config could leave out or tie."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "These adapters are not smaller")  # too late to choose another rank
        attach(module, replace(config, exclude_modules=(), layers=(), untie_weights=False), seed=seed)
    next(root for root in AdaptedModel(module).roots if root.module is module).attachment.config = config
