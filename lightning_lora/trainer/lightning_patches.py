"""All changes that importing this package makes to Lightning, and the one to ``LoRACallback`` that goes with them.

Importing ``lightning_lora.callback`` makes each of them once, for ``lightning.pytorch`` and for its twin
``pytorch_lightning`` (the same classes under another import name):

1. ``_CheckpointConnector.restore_model`` refuses an adapter checkpoint if the module has no adapters. With
   ``strict_loading=False`` Lightning would drop the adapter silently, and no hook of ours runs without the callback.
   For the same reason, it says what a fit without the callback trains if the module has adapters.
2. ``_CheckpointConnector._select_ckpt_path`` remembers the path that it chose. Sharding strategies read the file only
   after the module is wrapped, too late to attach what the file holds.
3. ``core.saving._load_state``, the end of ``load_from_checkpoint``, refuses adapter checkpoints: it would return the
   bare base model.
4. ``_CheckpointConnector.dump_checkpoint`` lets the callback watch what the module's ``on_save_checkpoint`` takes out
   of an adapter's state; and save adapters where its ``setup`` never ran, as in the main process of ``ddp_spawn``.
5. ``sys.meta_path`` gets a finder that applies 1 to 4 to ``pytorch_lightning`` when a program imports it later.
6. Our own class, not Lightning's: ``LoRACallback.__bases__`` gains ``pytorch_lightning.Callback`` if that was imported
   before, because its command line accepts only callbacks of its own.
7. ``cli.LightningArgumentParser.error`` says which option was meant by an unknown one of ``LoRACallback``, instead of
   all the types that the parser tried. It is changed when the module is imported, which takes jsonargparse.

Changes to single objects are undone when a stage ends: wrapped methods of a module (``MethodWraps``), and what
callbacks average (``frozen_kept``). Only the methods of a strategy object that save and load stay replaced
(``checkpoints.AdapterCheckpoints``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.base_buffers import copied
from lightning_lora.layers import FrozenNorm
from lightning_lora.state import check_not_merged, has_base_values
from lightning_lora.storage.checkpoint import RECORD_KEY, plain_values, recorded_base

_IMPORT_NAMES = ("lightning.pytorch", "pytorch_lightning")
_TWINS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
_PATCHED = "_lora_patched"
_CHOSEN = "_lora_chosen"
INSTALLED = "_lora_checkpoints"  # the attribute of a strategy whose Trainer has, or had, the callback
PREPARE = "_prepare_saving"  # the method of our callbacks for a Trainer that has run nothing in this process


def install() -> None:
    """Make changes 1 to 5; safe to repeat."""
    connectors = "trainer.connectors.checkpoint_connector"
    for change in (_guard_trainers, _remember_path, _watch_saving):
        _change_both(connectors, change)
    _change_both("core.saving", _guard_loading)


def derive_from_both(callback: type[Callback]) -> None:
    """Make change 6."""
    callback.__bases__ = with_twins(Callback)


def explain_options(callback: type[Callback], check: Callable[[Collection[str]], None]) -> None:
    """Make change 7.

    Args:
        callback: The class whose options are explained, and those of its subclasses without options of their own.
        check: Raises a ``TypeError`` with the explanation if one of these names is no option.
    """

    def change(cli: ModuleType) -> None:
        parsers = cli.LightningArgumentParser
        if hasattr(parsers, "error"):  # jsonargparse is an extra
            _replace(parsers, "error", lambda original: _explaining(original, callback, check))

    for name in _IMPORT_NAMES:
        _change_when_imported(f"{name}.cli", change)


# --- the two import names


def with_twins(*kinds: type) -> tuple[type, ...]:
    """Return classes of Lightning, with their twins under the other import name if that was imported."""
    return (*kinds, *(twin for kind in kinds if (twin := _twin(kind)) is not None))


def import_name(thing: object) -> str | None:
    """Return which of the two packages the class of an object derives from, or None."""
    places = [f"{kind.__module__}." for kind in type(thing).__mro__]
    return next((name for place in places for name in _IMPORT_NAMES if place.startswith(f"{name}.")), None)


def overrides(module: LightningModule, method: str) -> bool:
    """Return whether a LightningModule defines a method of its own."""
    [parent] = [kind for kind in with_twins(LightningModule) if isinstance(module, kind)]
    return is_overridden(method, module, parent)


def _twin(kind: type) -> type | None:
    for name, other in _TWINS.items():
        if kind.__module__.startswith(f"{name}."):
            place = sys.modules.get(other + kind.__module__.removeprefix(name))
            return getattr(place, kind.__name__, None)
    return None


def _change_both(place: str, change: Callable[[ModuleType], None]) -> None:
    """Change a module of ``lightning.pytorch`` now, and its twin now or when it is imported."""
    first, second = (f"{name}.{place}" for name in _IMPORT_NAMES)
    change(importlib.import_module(first))
    _change_when_imported(second, change)


def _change_when_imported(name: str, change: Callable[[ModuleType], None]) -> None:
    if name in sys.modules:
        change(sys.modules[name])
    else:
        sys.meta_path.insert(0, _ChangeOnImport(name, change))


class _ChangeOnImport(MetaPathFinder):
    """Changes a module once, right after its import."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                self.change(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def _replace(owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace a function by the one that ``make`` builds around it, once."""
    original = getattr(owner, name)
    if not hasattr(original, _PATCHED):
        replacement = functools.wraps(original)(make(original))
        setattr(replacement, _PATCHED, True)
        setattr(owner, name, replacement)


# --- 1: Trainers without the callback


def _guard_trainers(connectors: ModuleType) -> None:
    def guarded(original: Any) -> Callable[..., Any]:
        def restore_model(connector: Any) -> None:
            module, checkpoint = connector.trainer.lightning_module, connector._loaded_checkpoint
            _say_what_trains(connector.trainer, module)
            try:
                if not overrides(module, "on_load_checkpoint"):  # which may attach
                    _refuse_without_adapters(module, checkpoint)
                    _refuse_without_callback(connector.trainer, module, checkpoint)
                original(connector)
                _refuse_without_adapters(module, checkpoint)
            except Exception:
                checkpoint.clear()  # the Trainer keeps it and would load it again in the next stage
                raise

        return restore_model

    _replace(connectors._CheckpointConnector, "restore_model", guarded)


def _say_what_trains(trainer: Trainer, module: nn.Module) -> None:
    """Say that a fit without the callback trains adapters, and not the whole model as it may seem to."""
    is_ours = hasattr(trainer.strategy, INSTALLED)
    if trainer.state.fn == "fit" and not is_ours and (layers := AdaptedModel(module).layers):
        rank_zero_info(
            f"LoRA: {len(layers)} layers of this {type(module).__name__} carry adapters, and the Trainer has no "
            "LoRACallback: only what requires gradients trains, and checkpoints hold the whole model, without the "
            "adapters' options. Add the callback to train and save the adapters. For full fine-tuning, call "
            "detach(model) first, or build the model anew."
        )


def _refuse_without_adapters(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    if RECORD_KEY not in checkpoint or AdaptedModel(module).layers:
        return
    record = checkpoint[RECORD_KEY]
    check_not_merged(module, record.get("merges", {}), lambda: has_base_values(module, recorded_base(record)))
    raise RuntimeError(
        f"This checkpoint holds an adapter, but this {type(module).__name__} has no adapters to load it into. Add "
        "LoRACallback to the Trainer's callbacks; to evaluate, LoRACallback() takes all options from the file."
    )


def _refuse_without_callback(trainer: Trainer, module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse what Lightning would copy into whichever adapters the module has, with their scalings."""
    if RECORD_KEY in checkpoint and not hasattr(trainer.strategy, INSTALLED):
        raise RuntimeError(
            f"This checkpoint holds an adapter, and the Trainer has no LoRACallback that would load it into this "
            f"{type(module).__name__}. Nothing was changed. Add LoRACallback(), which takes all options from the file; "
            "to run with the adapters that the module has, leave ckpt_path out."
        )


# --- 2: the checkpoint that a run is about to load


def _remember_path(connectors: ModuleType) -> None:
    def remembering(original: Any) -> Callable[..., Any]:
        def select(connector: Any, *args: Any, **kwargs: Any) -> Any:
            path = original(connector, *args, **kwargs)
            setattr(connector, _CHOSEN, path)
            return path

        return select

    if hasattr(connectors._CheckpointConnector, "_select_ckpt_path"):
        _replace(connectors._CheckpointConnector, "_select_ckpt_path", remembering)


def chosen_checkpoint(trainer: Trainer) -> str | None:
    """Return the path of the checkpoint that this run will load, or None; every process must call this."""
    path = trainer.strategy.broadcast(getattr(trainer._checkpoint_connector, _CHOSEN, None))
    return None if path is None else str(path)


def chosen_record(trainer: Trainer) -> Any:
    """Return the adapter's record in the checkpoint that this run will load, or None; every process must call this.

    Raises:
        FileNotFoundError: The checkpoint does not exist; Lightning would say so when adapters are attached already.
    """
    path = chosen_checkpoint(trainer)
    if path is None:
        return None
    files = get_filesystem(path)
    if not files.exists(path):
        raise FileNotFoundError(f"ckpt_path={path!r} does not exist. Nothing was changed.")
    if not files.isfile(path):
        return None  # a directory of shards
    with files.open(path, "rb") as stream:
        return plain_values(stream).get(RECORD_KEY)


# --- 3: load_from_checkpoint


def _guard_loading(saving: ModuleType) -> None:
    def guarded(original: Any) -> Callable[..., Any]:
        def load_state(cls: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if RECORD_KEY in checkpoint and hasattr(cls, "training_step"):  # not a LightningDataModule
                raise RuntimeError(
                    f"This checkpoint holds an adapter without its base model, so {cls.__name__}.load_from_checkpoint "
                    f"cannot rebuild the module. Build the base and load the adapter into it: model = "
                    f"{cls.__name__}(...); lightning_lora.load_adapter(model, path)."
                )
            return original(cls, checkpoint, *args, **kwargs)

        return load_state

    _replace(saving, "_load_state", guarded)


# --- 4: hooks while a checkpoint is made


def _watch_saving(connectors: ModuleType) -> None:
    def watching(original: Any) -> Callable[..., Any]:
        def dump_checkpoint(connector: Any, *args: Any, **kwargs: Any) -> Any:
            trainer = connector.trainer
            for callback in trainer.callbacks if INSTALLED not in vars(trainer.strategy) else ():
                if prepare := getattr(callback, PREPARE, None):
                    prepare(trainer)
            checkpoints = getattr(trainer.strategy, INSTALLED, None)
            with nullcontext() if checkpoints is None else checkpoints.watching_hooks():
                return original(connector, *args, **kwargs)

        return dump_checkpoint

    _replace(connectors._CheckpointConnector, "dump_checkpoint", watching)


# --- 7: command lines

_UNKNOWN = re.compile(r"unrecognized|ambiguous|not accept")
_OF_CLASS = re.compile(r"class_path '([\w.]+)':\s*(?:Option '|unrecognized arguments: --)(\w+)")


def _explaining(
    original: Any, callback: type[Callback], check: Callable[[Collection[str]], None]
) -> Callable[..., Any]:
    def error(parser: Any, message: str, *args: Any, **kwargs: Any) -> Any:
        if _UNKNOWN.search(message):
            subcommands = (getattr(each, "subcommand_parser", None) for each in (*args, *kwargs.values()))
            try:
                check(set(_named_options((parser, *subcommands), message, callback)))
            except TypeError as explanation:
                message = str(explanation)
        return original(parser, message, *args, **kwargs)

    return error


def _named_options(parsers: Sequence[Any], message: str, callback: type[Callback]) -> Iterator[str]:
    """Yield the options of the callback that a message of parsers is about."""

    def takes_them(kind: Any) -> bool:
        return isinstance(kind, type) and issubclass(kind, callback) and kind.__init__ is callback.__init__

    for path, option in _OF_CLASS.findall(message):
        place, _, name = path.rpartition(".")
        if takes_them(getattr(sys.modules.get(place), name, None)):
            yield option
    for parser in parsers:
        for key in getattr(parser, "callback_keys", ()):  # of add_lightning_class_args
            if takes_them(getattr(parser.groups.get(key), "group_class", None)):
                yield from re.findall(rf"\b{re.escape(key)}\.(\w+)", message)


# --- methods of one module


class _Wrapped:
    """A wrapped method of one object; a copy of the object, or what is unpickled, has the method itself again."""

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        method = getattr(owner, name)
        functools.update_wrapper(self, method)  # keeps Lightning's is_overridden right
        self._owner, self._name, self._method, self._call = owner, name, method, call

    @property
    def __code__(self) -> Any:  # which Lightning compares with that of its own methods
        return _Wrapped.__call__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._method, *args, **kwargs)

    @override
    def __reduce__(self) -> Any:
        is_of_class = getattr(self._method, "__func__", None) is getattr(type(self._owner), self._name, None)
        # The copy has no attributes yet at that moment, so this is its class's.
        return (getattr, (self._owner, self._name)) if is_of_class else (_same, (self._method,))


def _same(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


class MethodWraps:
    """Wraps methods of modules and strategies until ``remove`` is called."""

    def __init__(self) -> None:
        self._wrapped: list[tuple[Any, str]] = []

    def after(self, module: Any, name: str, afterwards: Callable[[Any], None]) -> None:
        """Call ``afterwards(result)`` after each run of this method of the module."""

        def call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            afterwards(result)
            return result

        self.around(module, name, call)

    def around(self, module: Any, name: str, call: Callable[..., Any]) -> None:
        """Have ``call(method, *args, **kwargs)`` run in place of this method of the module."""
        setattr(module, name, _Wrapped(module, name, call))
        self._wrapped.append((module, name))

    def remove(self) -> None:
        """Restore every method."""
        for module, name in reversed(self._wrapped):
            wrapper = vars(module).pop(name, None)
            method = getattr(wrapper, "__wrapped__", None)
            if method is not None and getattr(method, "__func__", method) is not getattr(type(module), name, None):
                setattr(module, name, method)  # it was set on the instance before, as LightningCLI does
        self._wrapped.clear()


# --- averages of one callback


@contextmanager
def frozen_kept(averaging: Iterable[Callback]) -> Iterator[None]:
    """Make callbacks that average a module leave alone all that is frozen.

    Otherwise an average such as ``0.999 * a + 0.001 * b`` would change frozen weights by roundings, step after step:
    what is equal in the module and its average stays. And StochasticWeightAveraging would reset the statistics of
    frozen norms, to compute them anew in train mode, which these are never in.
    """
    averaging, wraps = list(averaging), MethodWraps()
    for callback in averaging:
        if isinstance(callback, with_twins(StochasticWeightAveraging)):
            wraps.around(callback, "pl_module_contains_batch_norm", _has_moving_statistics)
            wraps.around(callback, "reset_batch_norm_and_save_state", _reset_moving_statistics)
    holders = [each for callback in averaging for each in (callback, getattr(callback, "_average_model", None))]
    before = []
    for holder in holders:
        for name, exact in _AVERAGES.items() if isinstance(holder, (Callback, AveragedModel)) else ():
            if (average := vars(holder).get(name)) is not None:
                before.append((holder, name, average))
                setattr(holder, name, functools.partial(exact, average))
    try:
        yield
    finally:
        wraps.remove()
        for holder, name, average in before:
            setattr(holder, name, average)


def _has_moving_statistics(_: Callable[..., bool], module: LightningModule) -> bool:
    return any(isinstance(part, _BatchNorm) and not isinstance(part, FrozenNorm) for part in module.modules())


def _reset_moving_statistics(reset: Callable[..., None], module: LightningModule) -> None:
    held = [(part, part._buffers) for part in module.modules() if isinstance(part, FrozenNorm)]
    for part, buffers in held:
        vars(part)["_buffers"] = {name: copied(buffer) for name, buffer in buffers.items()}
    try:
        reset(module)
    finally:
        for part, buffers in held:
            vars(part)["_buffers"] = buffers


def _average(average: Callable[..., Tensor], one: Tensor, other: Tensor, count: Any) -> Tensor:
    return torch.where(one == other, other, average(one, other, count))


def _average_all(average: Callable[..., Any], ones: Sequence[Tensor], others: Sequence[Tensor], count: Any) -> None:
    equal = [one == other for one, other in zip(ones, others, strict=True)]
    average(ones, others, count)
    for one, other, same in zip(ones, others, equal, strict=True):
        one.copy_(torch.where(same, other, one))


# Where StochasticWeightAveraging (the first) and the model of WeightAveraging keep what forms their averages.
_AVERAGES: dict[str, Callable[..., Any]] = {"_avg_fn": _average, "avg_fn": _average, "multi_avg_fn": _average_all}
