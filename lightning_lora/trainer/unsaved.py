"""Watching what training changes and no checkpoint holds: the frozen base, and adapters beside the trained one."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import nn

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.base_buffers import unsaved_buffers
from lightning_lora.fingerprint import Fingerprint, differing_tensors, fingerprint, samples
from lightning_lora.named_adapters import active_adapter
from lightning_lora.names import listed
from lightning_lora.state import base_samples, tensors_of_others
from lightning_lora.trainer.checks import checksum
from lightning_lora.trainer.strategies.base import Layout

_BATCHES = 2  # before which a module may come that a file knows of: the first training_step is between them


class Unsaved:
    """Finds changes of what checkpoints leave out. Every process must call each method."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._base: Fingerprint | None = None  # as training began
        self._names = set[str]()  # all of the model's tensors then: a fingerprint chooses anew when some are added
        self._others: Mapping[str, object] | None = None  # checksums of adapters that are not active, as training began
        self._awaited: Fingerprint = {}  # what a file knows of the base, and the module lacked when it was loaded
        self._left = 0  # batches before which to look for it

    # --- when saving

    def begin(self, model: AdaptedModel, base: Fingerprint, *, keeps_all: bool) -> None:
        """Remember what training begins with, before its first batch."""
        self._base, self._names = base, set(model.tensors)
        self._others = None if keeps_all else self._checksums(model.module)

    def warn(self, model: AdaptedModel, base: Fingerprint) -> None:
        """Warn, once for each kind, of what a checkpoint that is saved now lacks."""
        self._warn_of_base(model, base)
        self._warn_of_others(model.module)

    def _warn_of_base(self, model: AdaptedModel, base: Fingerprint) -> None:
        """Name what has moved, such as a teacher that is a running mean, and what has come, such as a late copy."""
        if self._base is None:
            return
        moved, added = differing_tensors(self._base, base), [name for name in model.base if name not in self._names]
        done = {"changed the base": moved, "added to the base": added}
        for what, names in done.items():
            if names:
                self._base = None
                rank_zero_warn(
                    f"LoRA: code of this module has {what} since training began: {listed(names)}. Checkpoints hold "
                    "only what LoRA trains, so they will not fit the base as it was. Change these before the fit, make "
                    "new modules in __init__, setup or configure_model, or name their modules in modules_to_save, too, "
                    "which saves them with the adapter."
                )

    def _warn_of_others(self, module: nn.Module) -> None:
        if not self._others:
            return
        now = self._checksums(module)
        moved = [place for place, before in self._others.items() if place in now and now[place] != before]
        if moved:
            self._others = None
            names = dict.fromkeys(repr(place.split(".", 2)[1]) for place in moved)
            rank_zero_warn(
                f"LoRA: code of this module has changed the adapters {listed(list(names))} since training began, and "
                f"checkpoints hold only {active_adapter(module)!r}, which is trained. LoRACallback(save_adapters='all')"
                " saves them, too."
            )

    def _checksums(self, module: nn.Module) -> dict[str, object]:
        others = tensors_of_others(module)
        whole = self.layout.gather(others, lambda place: place) if others else {}
        return {place: checksum(tensor) for place, tensor in whole.items()}

    # --- when resuming

    def loaded(self, model: AdaptedModel, recorded: Fingerprint) -> None:
        """Note which tensors of a file's base the model lacks so far; only those are in ``recorded`` that must fit."""
        # Where weights cannot be read, files know nothing of what came late.
        is_readable = self.layout.base is None
        self._awaited = {name: each for name, each in recorded.items() if is_readable and name not in model.tensors}
        self._left = _BATCHES

    @property
    def awaits(self) -> bool:
        """Whether a file knows of tensors that may still come."""
        return bool(self._awaited)

    def check_late(self, model: AdaptedModel) -> None:
        """Before the first two batches, refuse what has come since the file was loaded, and begins anew."""
        awaited, self._left = self._awaited, self._left - 1
        found = samples(model.base, awaited)
        self._awaited = {name: each for name, each in awaited.items() if name not in found and self._left}
        if names := differing_tensors(awaited, found):
            raise MisconfigurationException(
                f"{listed(names)} came after the checkpoint was loaded, and with other values than when it was saved. "
                "It does not hold them, since no modules_to_save names them, so training would not go on from where it "
                "was. Make their modules in __init__, setup or configure_model, before a checkpoint is loaded; name "
                "those that train or move, such as a teacher that is a running mean, in modules_to_save, too, and "
                "train anew. check_base=False accepts these values."
            )


def base_fingerprint(layout: Layout, model: AdaptedModel) -> Fingerprint:
    """Return the fingerprint of the frozen base; every process must call this."""
    return {**(base_samples(model) if layout.base is None else layout.base), **fingerprint(unsaved_buffers(model))}
