"""Watching for code that computes with the weight of a layer whose update lies beside it."""

from __future__ import annotations

from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import nn

from lightning_lora.names import join
from lightning_lora.probe import Witness


class ReadWatch:
    """Warns, once for each layer, of code that reads its weight, which lacks the update.

    Most of such code is found in the source (``layers/readers.py``), and then the weight carries the update. The rest,
    such as a helper object or a loop over all layers, shows when it runs. It is looked for in the first batch of each
    epoch and of each validation, test and prediction, so that all other batches cost nothing.

    Args:
        module: The module; its adapters may come later.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._told, self._is_first = module, set[str](), False
        self._witness: Witness | None = None

    def begin(self, *, is_first: bool = False) -> Witness:
        """Watch from now on, and return what sees.

        Args:
            is_first: Whether this is the first batch of a training, after which layers that were never called, because
                only their weight is read, are reported with the reason that no gradient has reached them.
        """
        self.end()
        self._witness, self._is_first = Witness(self._module), is_first
        return self._witness

    def end(self) -> None:
        """Stop watching, and warn of what was seen; safe to repeat."""
        if (witness := self._witness) is None:
            return
        self.close()
        found = {name: where for name, where in witness.reads.items() if name not in self._told}
        self._told |= found.keys()
        for name, where in found.items():
            if name in witness.calls or not self._is_first:
                rank_zero_warn(
                    f"The weight of {name} is read by {where}. The adapter adds its update to what the layer's own "
                    "calls return, so what is computed with the weight there lacks it, and would have it after a "
                    f"merge. Let the weight itself carry the update: target_parameters=[{join(name, 'weight')!r}], and "
                    "leave the layer out of target_modules. If the weight is only looked at there, all is well."
                )

    def close(self) -> None:
        """Stop watching without a word."""
        if self._witness is not None:
            self._witness.close()
            self._witness = None
