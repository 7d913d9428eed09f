"""A look into a checkpoint before it is loaded: its plain values, without tensors and without running anything."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import IO, Any

from typing_extensions import override


def plain_values(stream: IO[bytes]) -> dict[str, Any]:
    """Return the numbers, texts, lists and dicts that a checkpoint holds, under their keys.

    Only the index of the file is read, whatever the size of its tensors. What is no plain value is there as an object
    that does nothing, so that checkpoints with objects of any class can be looked into, and none is made.

    Args:
        stream: The file.

    Returns:
        An empty dict if this is no file of ``torch.save``, or a damaged one: loading it will say so.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            [index] = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            content = _PlainUnpickler(io.BytesIO(archive.read(index))).load()
    except Exception:  # damaged pickles raise whatever their bytes happen to mean
        return {}
    return content if isinstance(content, dict) else {}


class _Nothing:
    """Stands for an object of whatever class, and takes what pickle does to fill one."""

    def __new__(cls, *_: object, **__: object) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def add(self, value: object) -> None: ...


class _PlainUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> type[_Nothing]:
        return _Nothing

    @override
    def persistent_load(self, pid: object) -> None: ...
