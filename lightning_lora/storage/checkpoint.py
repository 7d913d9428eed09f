"""The ``.ckpt`` files of a LoRACallback run: the adapter in them, clear errors, and their record without loading.

A ``.ckpt`` is read in three ways: ``read_checkpoint`` here gives the adapter to tools and to ``load_adapter``;
``AdapterCheckpoints.load_checkpoint`` in ``trainer/checkpoints.py`` reads the whole file for the Trainer; and
``plain_values`` here reads the record alone, without any tensor.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.attachment import NONE_STORED, Stored
from lightning_lora.config import LoRAConfig
from lightning_lora.fingerprint import Sample, from_plain
from lightning_lora.layers.low_rank import difference
from lightning_lora.names import join, listed, near_names, without_points
from lightning_lora.ranks.compaction import compacted
from lightning_lora.state import FORMAT_VERSION, is_extra_state, load_extra_states
from lightning_lora.storage.adapter_file import AdapterFile, StoredLayer, StoredTokens, StoredWeight, damage_named
from lightning_lora.storage.atomic import remote_address

RECORD_KEY = "lightning_lora"
_FOREIGN = re.compile(r"Unsupported global: GLOBAL ([\w.]+)")  # in the error of torch's reader, what it will not load
_OF_A_LAYER = ("A", "B", "A0", "B0", "magnitude", "bias")
SWEEP_KEY = "sweep"  # of the record: what a LoRASweep has compared, and what came out
ADDED_KEY = "added"  # of the record: names in ``state_dict`` that are of hooks, and of no use without them
OTHERS_KEY = "lightning_lora_others"  # adapters beside the trained one: name -> their tensors
SCORES_KEY = "lightning_lora_scores"  # of a rank schedule, the averages that the next decision rests on


def checked_checkpoint(
    path: object, read: Callable[[], object], source: Path | io.BytesIO | None = None
) -> dict[str, Any]:
    """Return what a reader makes of a checkpoint, and turn whatever it raises into one clear error.

    Args:
        path: What the error calls the file.
        read: The reader.
        source: What it reads, if that is not at ``path``.

    Raises:
        ValueError: The file cannot be read, or Lightning did not write it.
        FileNotFoundError: It does not exist.
    """
    try:
        _check_sums(Path(str(path)) if source is None else source)
        checkpoint = read()
    except (FileNotFoundError, PermissionError, ImportError):
        raise
    except Exception as error:  # damaged pickles raise whatever their bytes happen to mean
        # Only the Trainer can be told to execute a file, and Lightning writes archives alone.
        is_lightnings = source is None and (not Path(str(path)).is_file() or zipfile.is_zipfile(str(path)))
        if is_lightnings and (found := _FOREIGN.search(str(error))):
            raise ValueError(
                f"{str(path)!r} holds objects beyond tensors and plain values, such as {found[1]}, and "
                "reading those can execute code. Nothing was changed. If you trust the file, pass weights_only=False: "
                "trainer.test(..., weights_only=False), and likewise in fit, validate and predict. Modules among the "
                "hyper-parameters are such objects: save_hyperparameters(ignore=[...]) leaves them out of new files."
            ) from error
        raise ValueError(
            f"{str(path)!r} cannot be read as a Lightning checkpoint; it may be truncated or in another format. "
            f"Nothing was changed. The reader failed with {type(error).__name__}: {_first_sentence(error)}"
        ) from error
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict):
        return checkpoint
    if isinstance(checkpoint, dict) and any(".lora." in str(name) for name in checkpoint):
        raise ValueError(
            f"{str(path)!r} holds the tensors of an adapter alone, as adapter_state_dict returns them. Nothing was "
            "changed. Put them into a module with the same adapters by load_adapter_state_dict(module, "
            "torch.load(path)); save_adapter(module, directory) writes what load_adapter reads."
        )
    raise ValueError(f"{str(path)!r} is not a Lightning checkpoint: it has no 'state_dict'. Nothing was changed.")


def _first_sentence(error: Exception) -> str:
    """Return what went wrong, without torch's advice to load the file by executing it."""
    return str(error).partition(". ")[0].removesuffix(".") + "."


def _check_sums(file: Path | io.BytesIO) -> None:
    """Refuse a file with flipped bits: torch's reader does not compare tensors with their checksums."""
    if (isinstance(file, io.BytesIO) or file.is_file()) and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the bytes of {damaged!r} do not match their checksum")


@dataclass(frozen=True)
class CheckpointFile(AdapterFile):
    """The adapter of a ``.ckpt`` that was written under a LoRACallback.

    Attributes:
        record: The plain values saved with the tensors.
        extra_states: What ``get_extra_state`` of the module's parts has returned.
    """

    record: Mapping[str, Any]
    extra_states: Mapping[str, Any] = field(default_factory=dict)

    @property
    @override
    def adapter(self) -> str | None:
        return self.record.get("adapter")

    @property
    @override
    def adapters(self) -> Sequence[str]:
        return tuple(self.record.get("names", ()))

    @property
    @override
    def paths(self) -> set[str]:
        return {key.partition(".lora.")[0] for key in self.tensors if ".lora." in key}

    @property
    def aliases(self) -> dict[str, str]:
        """The other names of modules that the model reaches by several names -> the name that the file uses."""
        with damage_named(self.path):
            return {other: name for name, others in self.record.get("aliases", {}).items() for other in others}

    @functools.cached_property
    @override
    def base(self) -> dict[str, Sample]:
        return recorded_base(self.record)

    @functools.cached_property
    @override
    def layers(self) -> dict[str, StoredLayer]:
        with damage_named(self.path):
            records = self.record["layers"].items()
            return {name: self._layer(name, said) for name, said in records if f"{name}.lora.rows" not in self.tensors}

    @functools.cached_property
    @override
    def tokens(self) -> dict[str, StoredTokens]:
        with damage_named(self.path):
            return {
                name: StoredTokens(self.tensors[key], None, _weight(name, said), key)
                for name, said in self.record["layers"].items()
                if (key := f"{name}.lora.rows") in self.tensors
            }

    def load_extra_states(self, module: nn.Module) -> None:
        """Give the parts of a module their extra states, as far as they could be read without executing anything."""
        if unread := [name for name, state in self.extra_states.items() if _holds_placeholder(state)]:
            warnings.warn(
                f"{str(self.path)!r} holds objects beyond tensors and plain values in {listed(unread)}, which "
                "get_extra_state has returned. They were not read, and stay as they are here. If you trust the file: "
                "set_extra_state(torch.load(path, weights_only=False)['state_dict'][name]) for each.",
                stacklevel=2,
            )
        load_extra_states(module, {name: each for name, each in self.extra_states.items() if name not in unread})

    def _layer(self, name: str, said: Mapping[str, Any]) -> StoredLayer:
        """Return one update; an adapter is its layer's only one, or one of a group below the layer's ``lora``."""
        above, _, last = name.rpartition(".")
        for begin in (f"{name}.lora.", join(above, f"lora.{last}.")):
            found = {key: self.tensors[begin + key] for key in _OF_A_LAYER if begin + key in self.tensors}
            keys, rank = tuple(begin + key for key in found), said["rank"]
            if {"A", "B"} <= found.keys():
                if {"A0", "B0"} <= found.keys():
                    start = found.pop("A0"), found.pop("B0")
                    found["A"], found["B"] = difference(found["A"], found["B"], *start)
                    rank *= 2
                return StoredLayer(
                    name,
                    **found,
                    rank=rank,
                    scaling=said["scaling"],
                    weight=_weight(name, said),
                    rows=tuple(map(tuple, said.get("rows", ()))),
                    keys=keys,
                )
        raise ValueError(f"{str(self.path)!r} holds no factors of {name!r}; the file may have been edited or damaged.")


def _weight(name: str, said: Mapping[str, Any]) -> StoredWeight:
    if (kind := said.get("kind")) is None:
        kernel = tuple(said.get("kernel", ()))
        return StoredWeight(said.get("weight"), kernel=kernel, writes_kernel=said.get("writes_kernel", False))
    shape = said["shape"]
    if not (isinstance(shape, list) and 1 < len(shape) < 6 and all(type(s) is int and 0 < s < 2**31 for s in shape)):
        raise ValueError(f"The record of {name!r} holds the shape {shape!r}; the file was damaged.")
    return StoredWeight(said["weight"], kind, tuple(shape), int(said.get("order", 0)))


def read_checkpoint(
    path: str | PathLike[str], adapter: str | None = None, *, like: str | None = None, is_compact: bool = True
) -> CheckpointFile:
    """Return an adapter in a ``.ckpt``: the one of this name; by default that named ``like``, else the trained one.

    The file may be remote, at an address such as ``s3://bucket/run.ckpt``, where ModelCheckpoint writes too.

    It comes without the components that a rank schedule has left out, or, unless ``is_compact``, as it trains.

    Raises:
        ValueError: It cannot be read, or holds no adapter, or none of this name.
        FileNotFoundError: It does not exist.
    """
    source = _source(path)
    checkpoint = checked_checkpoint(path, lambda: _loaded(source), source)
    record = checkpoint.get(RECORD_KEY)
    if record is None:
        raise ValueError(_without_record(path, checkpoint.get("state_dict", {})))
    _check_record(record, path)
    theirs = added_names(record)
    checkpoint["state_dict"] = {n: each for n, each in checkpoint["state_dict"].items() if n not in theirs}
    state: Mapping[str, Any] = checkpoint["state_dict"]
    with damage_named(path):
        if adapter is None and like in record.get("names", ()):
            adapter = like
        if adapter is not None or "others" in record:
            record, state = _one_of(path, adapter, record, checkpoint)
        if is_compact:
            record, state = compacted(record, state)
        entries = record["adapters"]
        options = entries[0]["config"] if len(entries) == 1 else {"adapters": list(entries)}
    extra = {name: each for name, each in checkpoint["state_dict"].items() if is_extra_state(name)}
    tensors = {
        n: each for n, each in state.items() if isinstance(each, Tensor) and n not in extra
    }  # metrics hold others
    return CheckpointFile(Path(path), tensors, options, record["merges"], record, extra)


def _without_record(path: str | PathLike[str], state: Mapping[str, Any]) -> str:
    if any(".lora." in str(name) for name in state):
        return (
            f"{str(path)!r} holds the weights of an adapter, but not its options: the fit that wrote it had no "
            "LoRACallback. Attach an adapter with the same options, attach(model, LoRAConfig(...)), then call "
            "model.load_state_dict(torch.load(path)['state_dict'])."
        )
    return f"{str(path)!r} holds no adapter: it was not written under a LoRACallback."


def _one_of(
    path: object, name: str | None, record: Mapping[str, Any], checkpoint: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the record of one of several adapters, as if it were the only one, and its tensors."""
    trained, names = record.get("adapter"), record.get("names", [])
    name = str(trained) if name is None else name
    name = without_points(name) if name not in names else name
    if name not in names:
        near = near_names(name, names, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        there = f"It holds {listed([*map(repr, names)])}; {trained!r} is the trained one."
        if not names:
            there = "It holds a single one, without a name: leave adapter out."
        raise ValueError(f"{str(path)!r} holds no adapter {name!r}.{hint} {there} Nothing was changed.")
    if name == trained:
        return record, checkpoint["state_dict"]
    state = checkpoint[OTHERS_KEY][name]
    base = {key: value for key, value in record.get("base", {}).items() if key not in state}  # it has its own there
    return {**record, **record["others"][name], "adapter": name, "base": base}, state


def _check_record(record: Any, path: object) -> None:
    """Refuse a record that this version cannot read.

    Raises:
        ValueError: It is of a newer format, or incomplete.
    """
    version = record.get("format_version", 0) if isinstance(record, dict) else 0
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format version {record['format_version']}; this lightning_lora reads up to "
            f"{FORMAT_VERSION}. Upgrade lightning_lora."
        )
    if not isinstance(record, dict) or not {"adapters", "layers", "merges"} <= record.keys():
        raise ValueError(
            f"The record of the adapter in {str(path)!r} is incomplete; the file may have been edited or damaged."
        )


def recorded_base(record: Mapping[str, Any]) -> dict[str, Sample]:
    """Return the fingerprint of the base that an adapter was trained on; empty if its record has none.

    Raises:
        ValueError: It is damaged.
    """
    return from_plain(record.get("base", {}))


def added_names(record: Any) -> set[str]:
    """Return the names of what hooks have added to the state of a checkpoint; only they know what it means."""
    names = record.get(ADDED_KEY) if isinstance(record, dict) else None
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def saved_options(record: Mapping[str, Any] | None) -> tuple[LoRAConfig, int] | None:
    """Return the config and the seed of an adapter that was attached to the whole module, or None."""
    try:
        [entry] = record["adapters"] if record is not None else []
        return (LoRAConfig.from_dict(entry["config"]), int(entry["seed"])) if entry["root"] == "" else None
    except (KeyError, TypeError, ValueError):
        return None


def saved_request(record: Mapping[str, Any] | None) -> tuple[LoRAConfig | None, dict[str, Any]]:
    """Return the config that was asked for, if its ranks were decided later; and what the data said."""
    with suppress(KeyError, TypeError, ValueError):
        [entry] = record["adapters"] if record is not None else []
        asked = LoRAConfig.from_dict(entry["asked"]) if "asked" in entry else None
        return asked, dict(entry.get("calibration", {}))
    return None, {}


def plain_record(path: str | PathLike[str]) -> dict[str, Any]:
    """Return the record in a file without reading a tensor; empty if there is none."""
    if remote_address(path) is None and not Path(path).is_file():
        return {}
    with _opened(path) as stream:
        found = plain_values(stream).get(RECORD_KEY)
    return found if isinstance(found, dict) else {}


def stored_adapters(record: Mapping[str, Any] | None) -> tuple[str | None, Stored]:
    """Return which adapter was trained, and the entries of all in their order; None and nothing if there is but one."""
    if record is None or "others" not in record:
        return None, NONE_STORED
    with suppress(KeyError, TypeError, ValueError):  # damage: loading the file gives the error
        trained, others = record["adapter"], record["others"]
        entries = {name: (record if name == trained else others[name])["adapters"] for name in record["names"]}
        if trained in entries and all(isinstance(each["root"], str) for own in entries.values() for each in own):
            return trained, entries
    return None, NONE_STORED


def own_name(record: Mapping[str, Any] | None) -> str | None:
    """Return the name that the adapter of a record had in its module; None if the record does not say it."""
    name = None if record is None else record.get("adapter", record.get("name"))
    return name if isinstance(name, str) else None


def adapters_in(path: Path) -> tuple[str | None, Stored]:
    """Return the same of a file, without reading a tensor; None and nothing if it is no checkpoint."""
    return stored_adapters(plain_record(path))


# --- without running code of the file, whatever objects it holds


@contextmanager
def _opened(path: str | PathLike[str]) -> Iterator[IO[bytes]]:
    if (address := remote_address(path)) is None:
        with Path(path).open("rb") as stream:
            yield stream
    else:
        import fsspec  # type: ignore[import-untyped]  # torch and Lightning need it

        try:
            with fsspec.open(address, "rb") as stream:
                yield stream
        except ImportError as error:
            raise ValueError(f"{address!r} cannot be read here: {error}.") from error


def _source(path: str | PathLike[str]) -> Path | io.BytesIO:
    """Return a file that exists; a remote one in memory, since reading it in small steps would take long."""
    is_remote = remote_address(path) is not None
    with suppress(FileNotFoundError):
        if is_remote:
            with _opened(path) as stream:
                return io.BytesIO(stream.read())
        if Path(path).exists():
            return Path(path)
    directory = "PEFT directory on a local disk" if is_remote else "PEFT directory"
    raise FileNotFoundError(f"{str(path)!r} does not exist; name a {directory}, or the .ckpt of a LoRACallback run.")


def _loaded(source: Path | io.BytesIO) -> Any:
    """Load a checkpoint; hyper-parameters of any class, which no adapter needs, become placeholders."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        with io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else source.open("rb") as file:
            start = file.read(4)
        if start != b"PK\x03\x04":  # Lightning writes no other format; torch's readers of older ones do more
            raise
    if isinstance(source, io.BytesIO):
        source.seek(0)
    reader = SimpleNamespace(__name__="pickle", Unpickler=_TensorUnpickler)
    content = torch.load(source, map_location="cpu", weights_only=False, pickle_module=reader)
    if _holds_placeholder(content.get(RECORD_KEY)):
        raise pickle.UnpicklingError(f"Its record, {RECORD_KEY!r}, holds objects beyond tensors and plain values.")
    return content


def plain_values(stream: IO[bytes]) -> dict[str, Any]:
    """Return the numbers, texts, lists and dicts that a checkpoint holds, under their keys.

    Only the index of the file is read, whatever the size of its tensors. Objects of any class become placeholders.

    The result is empty if ``torch.save`` did not write the file, or it is damaged: loading it gives the error.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            [index] = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            content = _PlainUnpickler(io.BytesIO(archive.read(index))).load()
    except Exception:  # damaged pickles raise whatever their bytes happen to mean
        return {}
    return content if isinstance(content, dict) else {}


class _Placeholder:
    """A placeholder for a class or function and for what it makes; it accepts all that pickle does to fill one."""

    def __new__(cls, *_: object, **__: object) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __call__(self, *_: object, **__: object) -> _Placeholder:
        return self

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def add(self, value: object) -> None: ...


def _holds_placeholder(value: object) -> bool:
    """Return whether something in a value could not be read."""
    if isinstance(value, Mapping):
        return _holds_placeholder([*value.keys(), *value.values()])
    if isinstance(value, (list, tuple, set)):
        return any(map(_holds_placeholder, value))
    return isinstance(value, _Placeholder) or callable(value)  # what the file names is a class or a function, too


class _InertUnpickler(pickle.Unpickler):
    """Imports nothing, and calls nothing but what is known.

    Attributes:
        known: What the file may call, by its name.
    """

    known: ClassVar[Mapping[str, Callable[..., Any]]] = {}

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (known := self.known.get(f"{module}.{name}")) is not None:
            # What a file gets hold of, it can set attributes of: that reaches no further than a partial made for it.
            return functools.partial(known)
        # Of a nested class, pickle asks getattr for the class, and makes an object of the answer.
        return (lambda *_: _Placeholder) if name == "getattr" else _Placeholder


class _TensorUnpickler(_InertUnpickler):
    known: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
        "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    }


class _PlainUnpickler(_InertUnpickler):
    @override
    def persistent_load(self, pid: object) -> None: ...
