"""What a training starts from: another adapter, whose ranks and layers may differ, or the base, anew."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapted_model import AdaptedModel, replace_buffers
from lightning_lora.attachment import Attachment
from lightning_lora.base_buffers import base_buffers, grown_buffers
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import Adapter, LowRankAdapter
from lightning_lora.loading import read_adapter
from lightning_lora.named_adapters import fill_buffers, recorded, undone_on_failure
from lightning_lora.names import join, listed
from lightning_lora.peft_format.directory import PeftFile
from lightning_lora.peft_format.importing import import_into
from lightning_lora.planning.planner import make_plan
from lightning_lora.sharding import copy_whole, is_fully_sharded, whole
from lightning_lora.state import (
    check_base_values,
    check_holds_values,
    check_not_merged,
    check_sound,
    has_base_values,
)
from lightning_lora.storage.checkpoint import CheckpointFile
from lightning_lora.switching import switched
from lightning_lora.trainer.buffers import BufferWatch
from lightning_lora.trainer.diagnostics import norm_of_updates

_STARTS = ("A0", "B0")
_FACTORS = ("A", "B", "magnitude", "bias")  # of a low-rank adapter


@dataclass
class WarmStart:
    """The initial values of a training, and how they relate to the source.

    Attributes:
        adapter: Name of the adapter in the source, if it has one.
        values: Name of a tensor of the module -> its start, whole.
        kept: Adapters that start as they are in the source.
        grown: Adapters whose ranks have grown.
        new: Adapters and tensors that are missing from the source and start afresh.
        dropped: Tensors that only the source has.
        plain: Adapters with DoRA whose source is plain LoRA.
    """

    adapter: str | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)

    @override
    def __str__(self) -> str:
        parts = {"as they were": self.kept, "of grown rank": self.grown, "new": self.new, "dropped": self.dropped}
        said = "; ".join(f"{len(names)} {what} ({listed(names)})" for what, names in parts.items() if names)
        return said if self.adapter is None else f"its adapter {self.adapter!r}: {said}"


def begin_from(
    module: nn.Module, path: str | PathLike[str] | None, buffers: BufferWatch, *, check_base: bool, is_new: bool
) -> None:
    """Start from another adapter, if one is given, and say from what training starts; arguments as ``start_from``'s."""
    if path is not None:
        start = start_from(module, path, check_base=check_base, is_new=is_new, keep=buffers.set_by_hooks)
        rank_zero_info(f"LoRA: started from {path}: {start}")
        if start.dropped:
            rank_zero_warn(
                f"init_from={str(path)!r} leaves out {listed(start.dropped)}: trained there, and not trained here. If "
                "this is not meant, choose the same layers and modules_to_save."
            )
    elif not is_new and (norm := norm_of_updates(module)):
        rank_zero_info(
            f"LoRA: continues from the adapters already attached (norm of the updates {norm:.3g}); "
            "LoRACallback(fresh=True) starts every fit anew."
        )


def check_can_restart(
    module: LightningModule, before: Attachment, config: LoRAConfig, seed: int, init_from: str | None
) -> None:
    """Find what would refuse to begin anew while the adapter of before is still there.

    Raises:
        MisconfigurationException: The module cannot be what it was before that adapter.
        ValueError: The config does not fit the module, or the file to begin from cannot be read.
    """
    problem = None
    if any(map(is_fully_sharded, module.modules())):
        problem = "its tensors are sharded by FSDP"
    elif before.report.saved and not before.starts:
        problem = f"the first values of {listed(list(before.report.saved))} were not kept; set it in the first fit, too"
    if problem is not None:
        raise MisconfigurationException(
            f"LoRACallback.fresh=True cannot restart {type(module).__name__}: {problem}. Build the module anew."
        )
    with undone_on_failure(module), switched(module, None, "LoRACallback"):
        make_plan(module, config, seed)
    if init_from is not None:
        read_adapter(init_from)


def start_from(
    module: nn.Module,
    path: str | PathLike[str],
    *,
    check_base: bool = True,
    is_new: bool = True,
    keep: Collection[str] = (),
) -> WarmStart:
    """Copy another adapter into an adapted module as far as they overlap; the update of each layer stays the same.

    If a rank has grown, the factor that starts at zero is padded with zeros and the other keeps its own start, so that
    the new part can learn. If a scaling differs, ``B`` is rescaled. If only this module uses DoRA, the magnitudes start
    at the norms of the updated rows.

    Args:
        module: An adapted module.
        path: A ``.ckpt`` of a LoRACallback run, or a PEFT directory. Of several adapters, the one with the name of the
            active one is taken, or, if there is none, the one that was trained.
        check_base: As in ``load_adapter``.
        is_new: Whether the module's adapter has not been trained yet, so that nothing of it is lost.
        keep: Buffers of the base that have their values from this run, such as statistics of its data.

    Raises:
        ValueError: The source cannot be read, shares nothing with the module, trained a tensor that is frozen here, or
            a tensor does not fit; or the module's adapter has learned something else, or lies on the meta device.
            Nothing was changed.
        RuntimeError: Another adapter was merged into this module.
    """
    model = AdaptedModel(module)
    check_holds_values(model)
    full_names = _full_names(model)
    several = recorded(module)
    file = read_adapter(path, like=several.active if several is not None else None)
    source, scalings = _content(model, file, full_names, check_base=check_base)
    start, problems = _resolved(model, source, scalings, full_names)
    start.adapter = file.adapter
    if not start.values:
        problems.append(f"it shares no tensor with this {type(module).__name__}")
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"init_from={str(path)!r} does not fit; nothing was changed:\n{lines}")
    check_sound(start.values, f"was changed by init_from={str(path)!r}")
    if not is_new and norm_of_updates(module) and not _are_there(model, start):
        raise ValueError(
            f"init_from={str(path)!r}: this {type(module).__name__} has an adapter already, which has learned "
            "something else; nothing was changed. Set fresh=True to start every fit from init_from, or leave init_from "
            "out to go on from what is there."
        )
    replace_buffers(model.module, grown_buffers(model, source))
    trained = AdaptedModel(module).trained
    for name, value in start.values.items():
        copy_whole(trained[name], value.to(trained[name].dtype))
    if isinstance(file, CheckpointFile):
        own = {
            name: each.detach().clone()
            for name, each in base_buffers(model).items()
            if name in keep and each is not None
        }
        fill_buffers(model, file.record.get("buffers", {}) | own)
        file.load_extra_states(model.module)
    for label in (*start.kept, *start.grown):
        if label in model.adapters:
            model.adapters[label].is_waiting = False
    _start_magnitudes(model, start.plain)
    return start


@torch.no_grad()
def _start_magnitudes(model: AdaptedModel, labels: Sequence[str]) -> None:
    """Give adapters with DoRA the magnitudes with which ``W + s * B @ A`` stays as it is."""
    owners = {id(adapter): layer for layer in model.layers.values() for adapter in layer.adapters().values()}
    for label in labels:
        adapter = cast(LowRankAdapter, model.adapters[label])
        copy_whole(adapter.magnitude, adapter.norms_now(owners[id(adapter)]).to(adapter.magnitude.dtype))


def _are_there(model: AdaptedModel, start: WarmStart) -> bool:
    """Return whether a module has these values already, as after an evaluation or a search before the fit."""
    now = {name: whole(model.trained[name].detach()).cpu() for name in start.values}
    return all(torch.equal(now[name], value.to(now[name].dtype)) for name, value in start.values.items())


def _content(
    model: AdaptedModel,
    file: PeftFile | CheckpointFile,
    full_names: Mapping[tuple[str, str], str],
    *,
    check_base: bool,
) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
    """Return the source's tensors under the names of this module, and the scalings of its adapters."""
    check_not_merged(model.module, file.merges, lambda: not check_base or has_base_values(model.module, file.base))
    if not isinstance(file, PeftFile):
        if check_base:
            check_base_values(model, file.base)
        return file.tensors, {name: layer["scaling"] for name, layer in file.record["layers"].items()}
    content = import_into(model.module, file, check_base=check_base)
    root_name = next(name for name, part in model.parts if part is content.root)
    source = {join(root_name, name): value for name, value in content.values.items()}
    factors = {join(root_name, layer.label): layer.factors for layer in content.layers}
    found = {(label, key): getattr(each, key) for label, each in factors.items() for key in _FACTORS}
    found |= {(join(root_name, name), "rows"): rows for name, (_, rows) in content.tokens.items()}
    source |= {
        full_names.get((label, key), f"{label}.lora.{key}"): value
        for (label, key), value in found.items()
        if value is not None
    }
    return source, {label: each.scaling for label, each in factors.items()}


def _full_names(model: AdaptedModel) -> dict[tuple[str, str], str]:
    """Return the full name of each adapter's parameters: (adapter, parameter) -> name."""
    full = {id(tensor): name for name, tensor in model.trained.items()}
    return {
        (label, key): full[id(parameter)]
        for label, adapter in model.adapters.items()
        for key, parameter in (*adapter.named_parameters(), *adapter.named_buffers())
        if id(parameter) in full
    }


def _resolved(
    model: AdaptedModel,
    source: Mapping[str, Tensor],
    scalings: Mapping[str, float],
    full_names: Mapping[tuple[str, str], str],
) -> tuple[WarmStart, list[str]]:
    """Return how each tensor that trains starts, and the problems: tensors that do not fit."""
    start, problems = WarmStart(), list[str]()
    owner_of = {name: key for key, name in full_names.items()}
    grown = grown_buffers(model, source)
    for name, tensor in model.trained.items():
        label, key = owner_of.get(name, (name, ""))
        if name not in source:
            if key in (*_STARTS, "bias") and full_names[label, "A"] in source:
                start.values[name] = torch.zeros_like(whole(tensor.detach()).cpu())  # it started from zero there
            elif key == "magnitude" and full_names[label, "A"] in source:
                start.plain.append(label)
            else:
                start.new.append(label)
            continue
        value, own = source[name].detach().cpu(), whole(tensor.detach()).cpu()
        adapter = model.adapters.get(label)
        if isinstance(adapter, LowRankAdapter):
            value = _rescaled(value, key, adapter, scalings.get(label))
        if value.shape == own.shape or name in grown:
            start.values[name] = value
            start.kept.append(label)
        elif adapter is not None and (padded := _padded(value, own, key, adapter)) is not None:
            start.values[name] = padded
            start.grown.append(label)
        elif adapter is None:
            problems.append(
                f"{name}: {tuple(value.shape)} there, {tuple(own.shape)} here. To start from the rest, such as for "
                "other labels, load the adapter into a model of its own kind, write the part without the head by "
                "save_adapter(model, directory, export_root=...), and name that directory in init_from"
            )
        else:
            problems.append(f"{name}: {tuple(value.shape)} there, {tuple(own.shape)} here")
    start.dropped = [name for name in source if name not in model.trained]
    for names in (start.kept, start.grown, start.new):
        names[:] = dict.fromkeys(names)
    start.kept = [label for label in start.kept if label not in start.grown]
    return start, [*problems, *_losses(model, source)]


def _losses(model: AdaptedModel, source: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield what of the source would be lost, without which the update of a layer is not what it was."""
    absent = [name for name in source if name not in model.trained]
    if frozen := [name for name in absent if name in model.tensors]:
        yield f"{listed(frozen)}: trained there, frozen here; train them too, with modules_to_save, bias or frozen_norm"
    if starts := [name for name in absent if name.endswith(".A0") and name.removesuffix("0") in model.trained]:
        yield (
            f"{listed(starts)}: the update there is a difference, scaling * (B @ A - B0 @ A0); use the same init, or "
            "start from what save_adapter writes, which has twice the rank"
        )
    for end, option in {".magnitude": "use_dora", ".bias": "lora_bias"}.items():
        ending = [name for name in absent if name.endswith(end)]
        if parts := [name for name in ending if f"{name.removesuffix(end)}.A" in model.trained]:
            yield f"{listed(parts)}: part of the update there; set {option} here, too"


def _rescaled(value: Tensor, key: str, adapter: LowRankAdapter, scaling: float | None) -> Tensor:
    if scaling is None or scaling == adapter.spec.scaling or key not in ("B", "B0", "bias"):
        return value
    return value * (scaling / adapter.spec.scaling)


def _padded(value: Tensor, own: Tensor, key: str, adapter: Adapter) -> Tensor | None:
    """Return a factor of a lower rank, padded with the rest of ours: zeros in the factor that starts at zero."""
    if not isinstance(adapter, LowRankAdapter) or key not in ("A", "B", *_STARTS):
        return None
    dimension = -2 if key in ("A", "A0") else -1
    others = [d for d in range(own.ndim) if d != dimension % own.ndim]
    if value.ndim != own.ndim or any(value.shape[d] != own.shape[d] for d in others):
        return None
    missing = own.shape[dimension] - value.shape[dimension]
    if missing < 0:
        return None
    rest = own.narrow(dimension, value.shape[dimension], missing)
    is_zero = getattr(adapter, key) is adapter.zero_factor()
    return torch.cat([value.to(own.dtype), torch.zeros_like(rest) if is_zero else rest], dimension)
