"""Export of a finished fit's adapter as a PEFT directory, wherever the module's tensors are."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.names import clean_name, join, listed
from lightning_lora.peft_format.directory import CONFIG_FILE, TENSORS_FILE
from lightning_lora.peft_format.files import exported, save_adapter
from lightning_lora.sharding import shapes_shown
from lightning_lora.storage.atomic import check_directory, remote_address
from lightning_lora.storage.checkpoint import read_checkpoint
from lightning_lora.storage.safetensors import read_file
from lightning_lora.trainer.checkpoints import trained_state
from lightning_lora.trainer.checks import AVERAGING, callbacks_of
from lightning_lora.trainer.strategies.base import Layout, module_of
from lightning_lora.trainer.strategies.deepspeed import gathered_parameters
from lightning_lora.trainer.unsaved import base_fingerprint


def export_place(directory: str | PathLike[str] | None) -> str | None:
    """Return the place that ``export_dir`` means when the run begins, for a fit may leave the current directory."""
    if directory is None or remote_address(directory) is not None:
        return None if directory is None else str(directory)
    return os.path.abspath(os.path.expanduser(directory))


def check_exportable(module: nn.Module, layout: Layout) -> None:
    """Refuse before training what could not be exported after it; every process must call this."""
    adapters = AdaptedModel(module).adapters
    sliced = [name for name, adapter in adapters.items() if adapter.spec.rows and adapter.spec.use_dora]
    if sliced and layout.divides_weights:
        raise MisconfigurationException(
            f"export_dir: PEFT's file of {listed(sliced)} (DoRA on slices) needs the norms of the whole weights, which "
            f"{type(layout.strategy).__name__} has sharded. Export the checkpoint afterwards: load_adapter(model, "
            "checkpoint), then save_adapter(model, directory)."
        )
    with gathered_parameters(module), shapes_shown(module):
        refused = exported(module).refused
    if refused:
        reasons = "\n".join(f"  - {name}: {reason}" for name, reason in refused.items())
        raise MisconfigurationException(
            f"export_dir: PEFT cannot express these adapters, so nothing could be exported after training:\n{reasons}"
        )


def check_export_dir(layout: Layout, directory: str | PathLike[str], *, overwrite: bool) -> None:
    """Refuse before training a place that could not be written after it; every process must call this."""
    problem = None
    if layout.strategy.is_global_zero:
        try:
            check_directory(Path(directory).expanduser(), marker=CONFIG_FILE, overwrite=overwrite)
        except ValueError as error:
            problem = str(error)
        except OSError as error:
            problem = f"it cannot be written ({error.strerror}). Name a directory in a place that can be."
    if (problem := layout.strategy.broadcast(problem)) is not None:
        raise MisconfigurationException(f"export_dir={str(directory)!r}: {problem}")


def check_export_place(layout: Layout, directory: str | PathLike[str], trainer: Trainer) -> None:
    """Refuse before training a place that checkpoints or logs would have filled after it; every process must call this.

    A callback that was given no folder knows it only after its ``setup``.
    """
    place, problem = Path(os.path.realpath(os.path.expanduser(directory))), None
    for writer, folder in _written(trainer) if layout.strategy.is_global_zero else ():
        if Path(os.path.realpath(folder)).is_relative_to(place):
            problem = f"{writer} writes into {folder!r}. Name a directory that only the export uses."
    if (problem := layout.strategy.broadcast(problem)) is not None:
        raise MisconfigurationException(f"export_dir={str(directory)!r}: {problem}")


def _written(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Yield the folders that callbacks and loggers write into, with what writes there."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for writer in (*callbacks, *trainer.loggers):
        for name in ("dirpath", "log_dir", "save_dir"):
            folder = getattr(writer, name, None)
            if isinstance(folder, (str, PathLike)) and str(folder):
                yield type(writer).__name__, str(folder)
                break  # what comes next lies around it


def export_best(
    layout: Layout,
    trainer: Trainer,
    directory: str | PathLike[str],
    among: Collection[str] | None = None,
    *,
    overwrite: bool = False,
) -> str | None:
    """Write the adapter of the best checkpoint, or else the module's last state; every process must call this.

    Args:
        layout: That of the strategy.
        trainer: The Trainer.
        directory: Where to write.
        among: The checkpoints of this training, if it began anew; None if earlier ones belong to it.
        overwrite: Replace an adapter that is there.

    Returns:
        The checkpoint; None without one.

    Raises:
        ValueError: As in ``export_fit``.
        RuntimeError: As in ``export_fit``.
    """
    checkpoints = trainer.checkpoint_callback
    best = getattr(checkpoints, "best_model_path", None) or None
    if best is not None and among is not None and best not in among:
        rank_zero_warn(
            f"export_dir={str(directory)!r}: the best checkpoint of {type(checkpoints).__name__}, {best!r}, is of an "
            "earlier fit, whose adapter is another one. The last state of this fit is exported instead. Give each fit "
            "that begins anew a ModelCheckpoint of its own."
        )
        best = None
    if getattr(checkpoints, "monitor", None) is None and callbacks_of(trainer, StochasticWeightAveraging):
        best = None  # not the best, but the latest, and from before the average took its place
    is_last = (best, trainer.global_step) == (
        getattr(checkpoints, "_last_checkpoint_saved", None),
        getattr(checkpoints, "_last_global_step_saved", None),
    )  # then it is the state in memory, unless that was averaged since
    is_read = best is not None and (not is_last or callbacks_of(trainer, *AVERAGING))
    export_fit(layout, directory, best if is_read else None, overwrite=overwrite)
    layout.strategy.barrier()
    return best


def export_fit(
    layout: Layout, directory: str | PathLike[str], checkpoint: str | None, *, overwrite: bool = False
) -> None:
    """Write an adapter of the trained module and read it back; the module stays as it is. Every process must call this.

    Args:
        layout: That of the strategy.
        directory: Where to write.
        checkpoint: The file to take the adapter from; if None, the module's last state.
        overwrite: Replace an adapter that is there.

    Raises:
        FileNotFoundError: The checkpoint is gone. Nothing was written.
        ValueError: It lacks tensors, or holds NaN or infinity, or PEFT cannot express it. Nothing was written.
        RuntimeError: The written files differ from the adapter.
    """
    model = AdaptedModel(module_of(layout.strategy))
    state, base = {} if checkpoint else trained_state(layout, model), base_fingerprint(layout, model)
    if not layout.strategy.is_global_zero:
        return
    if checkpoint:
        state = _read(checkpoint, directory)
        if lost := [name for name in model.trained if name not in state]:
            raise ValueError(  # or the module's own, last values would stand beside those of the checkpoint
                f"export_dir={str(directory)!r}: {checkpoint!r} lacks {listed(lost)}, which the adapter of this "
                f"{type(model.module).__name__} has. Nothing was written. Training is done: `lightning-lora export` "
                "makes a directory of any complete checkpoint, and `lightning-lora inspect` shows what is in one."
            )
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"export_dir={str(directory)!r}: training diverged; NaN or infinity in {listed(broken)}. Nothing was "
            "written."
        )
    with _replaced(model.module, {**_hidden_parameters(layout, model), **state}):
        model.have_values()
        save_adapter(model.module, directory, overwrite=overwrite, base=base)
        _verify(model.module, Path(directory).expanduser())
    model.have_values()  # with the masks of before


def _read(checkpoint: str, directory: str | PathLike[str]) -> dict[str, Tensor]:
    try:
        return dict(read_checkpoint(checkpoint, is_compact=False).tensors)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"export_dir={str(directory)!r}: {checkpoint!r}, the best checkpoint, is gone; it may be on the machine on "
            "which this run began. Nothing was written. Training is done: `lightning-lora export` makes a directory of "
            "any checkpoint."
        ) from error


def _hidden_parameters(layout: Layout, model: AdaptedModel) -> dict[str, Tensor]:
    """Return stand-ins without values for the adapted layers' own parameters, if a process does not see them whole."""
    return {
        (full := join(name, key)): torch.zeros(()).expand(layout.shape(full, parameter))
        for name, layer in (model.layers.items() if layout.divides_weights else ())
        for key, parameter in layer._parameters.items()
        if parameter is not None
    }


@contextmanager
def _replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace a module's parameters and buffers inside the block."""
    before = [
        (table, key, tensor, name)
        for path, part in module.named_modules()
        for table in (part._parameters, part._buffers)
        for key, tensor in table.items()
        if tensor is not None and (name := clean_name(join(path, key))) in tensors
    ]
    others: dict[int, Tensor] = {}  # tied ones stay tied
    for table, key, old, name in before:
        table[key] = others.setdefault(id(old), _as_kind(tensors[name], old))
    try:
        yield
    finally:
        for table, key, old, _ in before:
            table[key] = old


def _as_kind(new: Tensor, old: Tensor) -> Tensor:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _verify(module: nn.Module, directory: Path) -> None:
    wanted, (found, _) = exported(module).tensors(), read_file(directory / TENSORS_FILE)
    if wanted.keys() != found.keys() or not all(
        torch.equal(found[key], tensor.cpu()) for key, tensor in wanted.items()
    ):
        raise RuntimeError(f"The adapter in {str(directory)!r} differs from what was written; is the disk failing?")
