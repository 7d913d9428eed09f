"""Calibration inside ``fit``: the Trainer's own batches through ``training_step``, leaving no trace in the training."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.connectors import data_connector
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_lora.calibration.calibrate import calibrate
from lightning_lora.calibration.report import CalibrationReport
from lightning_lora.config import STARTS_FROM_DATA
from lightning_lora.probe import RandomState
from lightning_lora.trainer.lightning_patches import with_twins

OWN_STEP = "calibration_step"  # of a module: what runs instead of training_step, such as for manual optimization
OWN_MASK = "calibration_mask"  # of a module: which tokens of a batch count


def calibrate_fit(
    trainer: Trainer, module: LightningModule, start: str, batches: int, part: Callable[[Any], Any] | None = None
) -> CalibrationReport:
    """Compute the starts that the adapters wait for.

    Args:
        trainer: A Trainer whose strategy has placed the module.
        module: The module.
        start: Name of the start.
        batches: How many batches it looks at.
        part: Returns the adapter's own part of a batch, or None if it has none in it; by default, all of it is.

    Raises:
        MisconfigurationException: The start cannot be computed in this fit; the message says what to do.
    """
    try:
        if start not in STARTS_FROM_DATA:
            return calibrate(module)
        _check(trainer, module, start)
        mask = getattr(module, OWN_MASK, None)
        with _training_batches(trainer, batches) as found:
            own = found if part is None else (each for each in map(part, found) if each is not None)
            return calibrate(module, own, _step_of(trainer, module), mask=mask)
    except ValueError as error:
        raise MisconfigurationException(f"LoRACallback: {error}") from error
    except RuntimeError as error:
        raise MisconfigurationException(
            f"LoRACallback: init={start!r} cannot be computed: {error}\nIt runs training_step before training, in "
            f"evaluation mode. If that is the reason, define {OWN_STEP}(self, batch, batch_idx), which returns a loss "
            "and leaves the adapted layers in evaluation mode."
        ) from error


class _StepError(RuntimeError):
    """The module's own step failed."""


def check_ranks_can_change(init_from: str | None) -> None:
    """Refuse ranks from data where another option needs them before the data are there."""
    if init_from is not None:
        raise MisconfigurationException(
            "LoRACallback: ranks from data (rank='auto', rho) do not go with init_from, which needs the ranks earlier. "
            "Call lightning_lora.attach and calibrate before the fit, or give a number for rank."
        )


@contextmanager
def before_optimizers(*, is_needed: bool) -> Iterator[None]:
    """Let a calibration fail inside the block, such as a step that reads its optimizers, unless it ``is_needed`` now.

    Raises:
        MisconfigurationException: It failed, and ranks must be known before there are optimizers.
    """
    try:
        yield
    except MisconfigurationException as error:
        if is_needed and isinstance(error.__cause__, _StepError):
            raise MisconfigurationException(
                "LoRACallback: the step failed while the ranks were looked for, which is before there are optimizers "
                f"({error.__cause__}). Define {OWN_STEP}(self, batch, batch_idx) that returns a loss."
            ) from error
        if is_needed:
            raise
    except Exception:  # of data that are not ready yet
        if is_needed:
            raise


def _check(trainer: Trainer, module: LightningModule, start: str) -> None:
    strategy = trainer.strategy
    divides = not isinstance(strategy, with_twins(SingleDeviceStrategy, DDPStrategy))
    if divides or isinstance(strategy, with_twins(DeepSpeedStrategy)):  # a DDPStrategy with copies of the weights
        raise MisconfigurationException(
            f"LoRACallback: init={start!r} cannot look at data under {type(strategy).__name__}, which divides the "
            "weights or keeps copies of what trains. Calibrate on one device: attach, "
            "lightning_lora.calibrate(model, batches) and save_adapter; then train with init_from=that directory and "
            "init='kaiming'."
        )
    if not (module.automatic_optimization or hasattr(module, OWN_STEP)):
        raise MisconfigurationException(
            f"LoRACallback: init={start!r} calls training_step without optimizers, and that of {type(module).__name__} "
            f"optimizes manually. Define {OWN_STEP}(self, batch, batch_idx) that returns a loss."
        )


def _step_of(trainer: Trainer, module: LightningModule) -> Callable[[Any], Any]:
    """Return what runs the module on a batch as in training."""
    step = getattr(module, OWN_STEP, module.training_step)
    takes_number = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    number = iter(range(sys.maxsize))

    def run(batch: Any) -> Any:
        with untouched(module), trainer.precision_plugin.train_step_context():
            try:
                return step(batch, next(number)) if takes_number else step(batch)
            except (RuntimeError, MisconfigurationException):
                raise
            except Exception as error:
                name = getattr(step, "__name__", OWN_STEP)
                raise _StepError(f"{type(error).__name__} in {name}: {error}") from error

    return run


# --- the data


@contextmanager
def _training_batches(trainer: Trainer, count: int) -> Iterator[Iterator[Any]]:
    """Yield training batches on the module's device; the training will get the same ones as if nobody had looked."""
    if isinstance(trainer.limit_train_batches, int):  # a share of the data is more than a start looks at
        count = min(count, trainer.limit_train_batches)
    with ExitStack() as undo:
        undo.enter_context(RandomState())
        loader = _requested(trainer)
        for each in loader.flattened:
            _check_rereadable(each)
            undo.enter_context(_loader_kept(each))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when training sets up its data
            loader.flattened = [
                data_connector._process_dataloader(trainer, TrainerFn.FITTING, RunningStage.TRAINING, each)
                for each in loader.flattened
            ]
        yield _with_progress(map(_on_device(trainer), islice(iter(loader), count)), trainer, count)


def _requested(trainer: Trainer) -> CombinedLoader:
    """Return the training data as a loop would request them, in an object of its own."""
    found = trainer.fit_loop._data_source.dataloader()
    return copy.copy(found) if isinstance(found, CombinedLoader) else CombinedLoader(found, "max_size_cycle")


def _with_progress(batches: Iterator[Any], trainer: Trainer, count: int) -> Iterator[Any]:
    if trainer.progress_bar_callback is None or not trainer.is_global_zero:
        return batches
    return iter(Tqdm(batches, total=count, desc="LoRA: calibrating", leave=False, file=sys.stdout))


def _check_rereadable(loader: Any) -> None:
    dataset = getattr(loader, "dataset", None)
    streams = [loader, dataset]
    if isinstance(dataset, IterableDataset):
        streams += vars(dataset).values()
    if stream := next((each for each in streams if hasattr(each, "__next__")), None):
        raise ValueError(
            f"the training data are read from a {type(stream).__name__}, which goes on where it was: the training "
            "would miss the batches that the start looks at. Open it in the dataset's __iter__, or call "
            "lightning_lora.calibrate(model, batches) with other batches before the fit."
        )


def _on_device(trainer: Trainer) -> Callable[[Any], Any]:
    module: Any = trainer.lightning_module

    def moved(found: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(found[0])
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return moved


@contextmanager
def _loader_kept(loader: Any) -> Iterator[None]:
    """Put back what iterating over a loader changes: its samplers, its dataset, their generators, its workers."""
    parts = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset"))]
    parts.append(getattr(parts[2], "sampler", None))
    kept = [(vars(part), dict(vars(part)), _states(vars(part))) for part in parts if hasattr(part, "__dict__")]
    try:
        yield
    finally:
        for own, before, states in kept:
            own.clear()
            own.update(before)
            for restore in states:
                restore()


def _states(attributes: dict[str, Any]) -> list[Callable[[], object]]:
    """Return functions that put the random generators among some attributes back."""
    found: list[Callable[[], object]] = []
    for value in attributes.values():
        if isinstance(value, torch.Generator):
            found.append(_call_with(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            found.append(_call_with(value.setstate, value.getstate()))
        elif hasattr(value, "bit_generator"):  # numpy's
            generator, state = value.bit_generator, copy.deepcopy(value.bit_generator.state)
            found.append(_call_with(type(generator).state.__set__, generator, state))
        elif hasattr(value, "set_state") and hasattr(value, "get_state"):
            found.append(_call_with(value.set_state, value.get_state()))
    return found


def _call_with(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


# --- the module


@contextmanager
def untouched(module: LightningModule) -> Iterator[None]:
    """Mute logging, and put back what steps keep on the module: lists of outputs, counters, states of metrics."""
    kept = [(vars(part), {name: _copied(value) for name, value in vars(part).items()}) for part in module.modules()]
    vars(module)["log"] = vars(module)["log_dict"] = lambda *_, **__: None
    try:
        yield
    finally:
        for own, before in kept:
            for name in own.keys() - before.keys():
                del own[name]
            for name, (value, content) in before.items():
                own[name] = value
                if content is not None:
                    _refill(value, content)


def _copied(value: Any) -> tuple[Any, Any]:
    """Return a value, and a copy of its content if steps may change that in place."""
    if type(value) in (list, dict, set, deque):
        return value, copy.copy(value)
    if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) and value.is_leaf:
        return value, value.detach().clone()
    return value, None


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(content)
        return
    value.clear()
    (value.update if isinstance(value, (dict, set)) else value.extend)(content)
