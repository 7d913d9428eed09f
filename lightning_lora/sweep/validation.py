"""Validation of every adapter of a sweep that trains: Lightning's own loop, once for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer import call
from torch import Tensor

from lightning_lora.named_adapters import active_adapter
from lightning_lora.probe import RandomState
from lightning_lora.switching import set_adapter, using
from lightning_lora.trainer.buffers import own_buffers
from lightning_lora.trainer.lightning_patches import overrides

_TABLES = {"_callback_metrics": "callback", "_logged_metrics": "log", "_progress_bar_metrics": "pbar"}
Metrics = dict[str, dict[str, Any]]  # table of the logger connector -> name -> value
Seen = Mapping[str, Mapping[str, Any]]  # adapter -> what callbacks see


class Validation:
    """Runs the validation loop once for each adapter; each metric gets the adapter's name as its ending.

    The module's own hooks run for each adapter, with its values in place. Those of callbacks run once:
    ``on_validation_start`` before the first pass, and ``on_validation_end`` after the last, when the results of all are
    known.

    Args:
        trainer: The Trainer.
        module: Its module.
        live: Gives the adapters to validate.
        judge: Is given their metrics; returns the adapter to leave in place.
        own_values: Has an adapter's metrics and plain attributes in place, as its own passes have left them.
        is_mean: Whether a metric without an ending is the mean of all adapters' instead of that adapter's.

    Attributes:
        adapter: The one that is validated now.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        live: Callable[[], Sequence[str]],
        judge: Callable[[Seen], str],
        own_values: Callable[[str], AbstractContextManager[None]],
        *,
        is_mean: bool,
    ) -> None:
        self.trainer, self.module, self.live, self.judge, self.is_mean = trainer, module, live, judge, is_mean
        self.own_values = own_values
        self.adapter: str | None = None
        self._latest: dict[str, Metrics] = {}

    def run(self, run: Callable[[], Any]) -> Any:
        """Run the loop for every adapter; called in place of its own ``run``."""
        names, outputs = list(self.live()), None
        try:
            if self.trainer.sanity_checking:
                self.adapter = active_adapter(self.module)
                return run()
            for name in names:
                set_adapter(self.module, name)
                self.adapter = name
                is_last = name == names[-1]
                with ExitStack() as stack:
                    if not is_last:  # all draw the same, and training goes on as after one pass
                        stack.enter_context(RandomState())
                    stack.enter_context(self._one_pass(is_first=name == names[0], others=names if is_last else ()))
                    outputs = run()
        finally:
            self.adapter = None
        return outputs

    @contextmanager
    def _one_pass(self, *, is_first: bool, others: Sequence[str]) -> Iterator[None]:
        """Change the loop for one pass.

        Args:
            is_first: Whether it is the first one.
            others: Every adapter that was validated, if it is the last one.
        """
        loop, connector = self.trainer.fit_loop.epoch_loop.val_loop, self.trainer._logger_connector
        log_metrics, store = connector.log_metrics, connector.update_eval_epoch_metrics
        name = self.adapter
        assert name is not None
        self._latest[name] = latest = {table: dict[str, Any]() for table in _TABLES}

        def keep() -> Any:  # after each loader, and at the end
            metrics: Any = connector.metrics
            for table, kind in _TABLES.items():
                latest[table] |= _copied(metrics[kind])
            return store()

        def renamed(metrics: Mapping[str, Any], step: int | None = None) -> None:
            ending = "" if self.adapter is None else f"/{self.adapter}"
            log_metrics({key if key == "step" else f"{key}{ending}": each for key, each in metrics.items()}, step)

        def begin() -> None:
            if is_first:
                call._call_callback_hooks(self.trainer, "on_validation_start")
                call._call_strategy_hook(self.trainer, "on_validation_start")
            own.enter_context(self._own(name))
            call._call_lightning_module_hook(self.trainer, "on_validation_start")

        def finish() -> None:
            own.close()
            connector.reset_results()  # or they would come up again in the next pass, and beside what is published
            if others:
                self.adapter = None
                self._finish(others)

        with ExitStack() as stack, ExitStack() as own:
            stack.enter_context(_replaced(loop, "_on_evaluation_start", begin))
            stack.enter_context(_replaced(loop, "_on_evaluation_end", finish))
            stack.enter_context(_replaced(connector, "log_metrics", renamed))
            stack.enter_context(_replaced(connector, "update_eval_epoch_metrics", keep))
            yield

    @contextmanager
    def _own(self, name: str) -> Iterator[None]:
        """Have what belongs to an adapter in place, and let what changes be its own."""
        with own_buffers(self.module, name), self.own_values(name):
            yield

    def _finish(self, names: Sequence[str]) -> None:
        """Judge all adapters, and run the hooks for the end of the validation, in Lightning's order."""
        connector = self.trainer._logger_connector
        best = self.judge({name: self._latest[name]["_callback_metrics"] for name in names})
        self._publish(names, best)
        set_adapter(self.module, best)
        call._call_callback_hooks(self.trainer, "on_validation_end")
        for name in names if overrides(self.module, "on_validation_end") else ():
            with using(self.module, name), self._own(name), ExitStack() as shown:
                for table in _TABLES:
                    shown.enter_context(_replaced(connector, table, self._latest[name][table]))
                call._call_lightning_module_hook(self.trainer, "on_validation_end")
        call._call_strategy_hook(self.trainer, "on_validation_end")
        connector.reset_results()

    def _publish(self, names: Sequence[str], best: str) -> None:
        """Put the metrics of all where callbacks, loggers and the progress bar look for them."""
        connector = self.trainer._logger_connector
        for kind in _TABLES:
            table, shown = getattr(connector, kind), self._shown(kind, names, best)
            table.update(shown)
            if kind != "_progress_bar_metrics":
                table.update(
                    {f"{key}/{name}": each for name in names for key, each in self._latest[name][kind].items()}
                )
            if kind == "_logged_metrics":
                connector.log_metrics(shown)

    def _shown(self, kind: str, names: Sequence[str], best: str) -> dict[str, Any]:
        """Return the metrics without an ending."""
        if not self.is_mean:
            return self._latest[best if best in self._latest else names[0]][kind]
        keys = {key: None for name in names for key in self._latest[name][kind]}
        values = {key: [own[key] for name in names if key in (own := self._latest[name][kind])] for key in keys}
        return {key: sum(each) / len(each) for key, each in values.items()}


def _copied(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: each.detach().clone() if isinstance(each, Tensor) else each for key, each in metrics.items()}


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
