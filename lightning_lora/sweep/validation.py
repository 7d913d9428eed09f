"""Validation of every adapter of a sweep that trains: Lightning's own loop, once for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lora.named_adapters import active_adapter
from lightning_lora.probe import RandomState
from lightning_lora.switching import set_adapter
from lightning_lora.trainer.buffers import own_buffers

_TABLES = {"_callback_metrics": "callback", "_logged_metrics": "log", "_progress_bar_metrics": "pbar"}
Metrics = dict[str, dict[str, Any]]  # table of the logger connector -> name -> value
Seen = Mapping[str, Mapping[str, Any]]  # adapter -> what callbacks see


class Validation:
    """Runs the validation loop once for each adapter; each metric gets the adapter's name as its ending.

    ``on_validation_start`` is called before the first pass, and ``on_validation_end`` after the last, when the results
    of all are known.

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
        end, log_metrics, store = loop._on_evaluation_end, connector.log_metrics, connector.update_eval_epoch_metrics
        assert self.adapter is not None
        self._latest[self.adapter] = latest = {table: dict[str, Any]() for table in _TABLES}

        def keep() -> Any:  # after each loader, and at the end
            metrics: Any = connector.metrics
            for table, kind in _TABLES.items():
                latest[table] |= _copied(metrics[kind])
            return store()

        def renamed(metrics: Mapping[str, Any], step: int | None = None) -> None:
            ending = "" if self.adapter is None else f"/{self.adapter}"
            log_metrics({key if key == "step" else f"{key}{ending}": each for key, each in metrics.items()}, step)

        def finish(*args: Any, **kwargs: Any) -> None:
            own.close()
            if not others:
                connector.reset_results()
                return
            self.adapter = None
            connector.reset_results()  # or they would come up again beside what is published
            best = self.judge({name: self._latest[name]["_callback_metrics"] for name in others})
            self._publish(others, best)
            set_adapter(self.module, best)
            end(*args, **kwargs)

        with ExitStack() as stack, ExitStack() as own:
            own.enter_context(own_buffers(self.module, self.adapter))
            own.enter_context(self.own_values(self.adapter))
            stack.enter_context(_replaced(loop, "_on_evaluation_end", finish))
            stack.enter_context(_replaced(connector, "log_metrics", renamed))
            stack.enter_context(_replaced(connector, "update_eval_epoch_metrics", keep))
            if not is_first:
                stack.enter_context(_replaced(loop, "_on_evaluation_start", _nothing))
            yield

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


def _nothing(*_: Any, **__: Any) -> None: ...


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
