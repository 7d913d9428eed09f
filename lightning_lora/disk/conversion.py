"""Checkpoints become PEFT directories and back, from their files alone: no model is built, and no code of one run."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.config import LoRAConfig
from lightning_lora.disk.bare_skeleton import attach_bare, fill, skeleton_of_checkpoint, skeleton_of_peft
from lightning_lora.fingerprint import fingerprint, to_plain
from lightning_lora.layers import all_adapters
from lightning_lora.names import join
from lightning_lora.peft_format.config import anchored
from lightning_lora.peft_format.directory import read_directory
from lightning_lora.peft_format.files import exported, write_export
from lightning_lora.peft_format.importing import Import, import_state, make_import
from lightning_lora.peft_format.names import PREFIX
from lightning_lora.state import describe, mismatches
from lightning_lora.storage.atomic import replace_file
from lightning_lora.storage.checkpoint import RECORD_KEY, read_checkpoint, recorded_base


def export_checkpoint(
    checkpoint: Path,
    directory: Path,
    *,
    root: str | None = None,
    base_model_name_or_path: str | None = None,
    uniform_rank: bool = False,
) -> list[str]:
    """Write the adapter of a ``.ckpt`` as a PEFT directory, as ``save_adapter`` of the loaded model would.

    Args:
        checkpoint: The file of a LoRACallback run.
        directory: Where to write; an adapter that is there is replaced.
        root: Name of the model inside the LightningModule, to which the names in the directory are relative; if left
            out the one child that holds everything, or ``""``.
        base_model_name_or_path: What to record as the base model.
        uniform_rank: As in ``save_adapter``.

    Returns:
        The names of the layers.

    Raises:
        ValueError: The file does not tell enough, or PEFT cannot express the adapter. Nothing was written.
    """
    file = read_checkpoint(checkpoint)
    record, state = file.record, file.tensors
    with _sense_of(checkpoint):
        skeleton = skeleton_of_checkpoint(record, state)
        root = _common_root(AdaptedModel(skeleton).trained) if root is None else root
        export = exported(skeleton, root)
    export.is_partial, before = True, f"{root}." if root else ""
    base = {n.removeprefix(before): each for n, each in recorded_base(record).items() if n.startswith(before)}
    write_export(export, directory, base_model_name_or_path, base, uniform_rank=uniform_rank)
    return sorted(layer.name for layer in export.layers)


def _common_root(names: Mapping[str, Tensor]) -> str:
    """Return the child that holds everything, unless it is itself a layer."""
    paths = {name.partition(".lora.")[0] if ".lora." in name else name.rpartition(".")[0] for name in names}
    first = {path.partition(".")[0] for path in paths}
    return first.pop() if len(first) == 1 and all("." in path for path in paths) else ""


def import_directory(directory: Path, checkpoint: Path, *, root: str = "model") -> list[str]:
    """Write a PEFT directory as a ``.ckpt`` that ``load_adapter`` and ``trainer.test(ckpt_path=...)`` take.

    Args:
        directory: The directory, written by PEFT or by ``save_adapter``.
        checkpoint: The file to write; it must not exist.
        root: Name of the model inside the LightningModule, which comes before all names; ``""`` if it is the module.

    Returns:
        The names of the layers.

    Raises:
        ValueError: The files do not tell enough, or use what has no equal here. Nothing was written.
        FileNotFoundError: They are not there.
    """
    if checkpoint.exists():
        raise ValueError(f"{str(checkpoint)!r} exists already. Name a new file.")
    file = read_directory(directory)
    options, tensors = file.config, file.tensors
    with _sense_of(directory):
        is_transposed = file.options.get("fan_in_fan_out") is True
        skeleton = skeleton_of_peft(options, tensors, root, is_transposed=is_transposed)
        part = skeleton.get_submodule(root)
        content = make_import(part, file)
        base = {join(root, name): sample for name, sample in file.base.items()}
        base |= fingerprint(_repeated(part, root, content, tensors))
        attach_bare(skeleton, _with_full_names(content, root))
        state = import_state(part, content, AdaptedModel(skeleton).trained, all_adapters(part))
        if problems := mismatches(AdaptedModel(skeleton).trained, state):
            raise ValueError("; ".join(problems))
        fill(skeleton, state)
    record = describe(skeleton) | {"base": to_plain(base), "optimizers": []}
    content_of_file = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": _lightning_version(),
        "state_dict": {name: tensor.detach() for name, tensor in AdaptedModel(skeleton).trained.items()},
        RECORD_KEY: record,
    }
    replace_file(checkpoint, lambda place: torch.save(content_of_file, place))
    return sorted(all_adapters(skeleton))


def _repeated(part: nn.Module, root: str, content: Import, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the frozen base that a file repeats, as PEFT does with embeddings."""
    keys = {key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in tensors}
    return {join(root, n): p for n, p in part.named_parameters() if n in keys and n not in content.values}


def _with_full_names(content: Import, root: str) -> LoRAConfig:
    """Return the config with names that mean the same in a model of which nothing else is known.

    What is tied to what is unknown too: as PEFT does, the update is of the named layer alone.
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


def _lightning_version() -> str:
    try:
        return importlib.metadata.version("lightning")
    except importlib.metadata.PackageNotFoundError:
        return "2.6.0"  # the oldest that the package takes


@contextmanager
def _sense_of(path: Path) -> Iterator[None]:
    """Turn what nonsense in a file raises into one clear error."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"The adapter in {str(path)!r} makes no sense; the file was changed or damaged: "
            f"{type(error).__name__}: {error}"
        ) from error
