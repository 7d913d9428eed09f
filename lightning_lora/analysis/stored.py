"""The matrices of an adapter on disk, with the weights of a base on disk: one weight in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from lightning_lora.analysis.matrices import AdapterMatrix, adapters_with_layers, matrices_of_adapter
from lightning_lora.disk.adapter_fit import Fitted, fit_adapter
from lightning_lora.disk.base_folder import BaseFolder, open_base
from lightning_lora.names import join, listed
from lightning_lora.storage.safetensors import StoredTensor

_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def stored_matrices(
    adapter: str | PathLike[str],
    base: str | PathLike[str],
    *,
    tokens: bool = False,
    progress: Callable[[int, int], None] | None = None,
    check_base: bool = True,
) -> Iterator[AdapterMatrix]:
    """Return an iterator over the updates of an adapter; each matrix holds its weight until the next is asked for.

    The adapter is put on a skeleton of the base, as ``lightning-lora merge`` does, so that both read it alike.

    Args:
        adapter: A PEFT directory, or the ``.ckpt`` of a LoRACallback run.
        base: A model's folder, or one file of safetensors.
        tokens: Whether trained rows of embeddings are among them.
        progress: Called with the adapters done and their number.

        check_base: Refuse a base of other values than those that the adapter was trained on.

    Raises:
        ValueError: The files do not fit each other, or the base is quantized. Nothing was yielded yet.
        FileNotFoundError: One is not there.
    """
    folder = open_base(Path(base))
    fitted = fit_adapter(Path(adapter), folder, check_base=check_base)
    weights = _stored_weights(fitted, folder)
    return _matrices(fitted.root, weights, tokens, progress or (lambda _done, _all: None))


def _matrices(
    root: nn.Module, weights: Mapping[str, StoredTensor], tokens: bool, progress: Callable[[int, int], None]
) -> Iterator[AdapterMatrix]:
    paths = {id(module): path for path, module in root.named_modules()}
    adapters = adapters_with_layers(root)
    for done, (name, (adapter, layer)) in enumerate(adapters.items()):
        progress(done, len(adapters))
        stored = weights[join(paths[id(layer)], adapter.parameter)]
        with _weight_in_place(layer, adapter.parameter, stored):
            yield from matrices_of_adapter(name, adapter, layer, tokens=tokens)
    progress(len(adapters), len(adapters))


def _stored_weights(fitted: Fitted, base: BaseFolder) -> dict[str, StoredTensor]:
    """Return where the weight of each adapter lies, by its name in the skeleton."""
    tensors, sources = base.tensors, base.tied_heads
    called = fitted.names | {name: sources[mine] for name, mine in fitted.heads.items()}
    paths = {id(module): path for path, module in fitted.root.named_modules()}
    names = [join(paths[id(layer)], each.parameter) for each, layer in adapters_with_layers(fitted.root).values()]
    if missing := [name for name in names if called.get(name) not in tensors]:
        raise ValueError(f"The base holds no {listed(missing)}, which the adapter updates.")
    found = {name: tensors[called[name]] for name in names}
    if quantized := [name for name, tensor in found.items() if tensor.dtype not in _WIDE]:
        raise ValueError(f"The base is quantized ({listed(quantized)}); give the unquantized one.")
    return found


@contextmanager
def _weight_in_place(layer: nn.Module, key: str, stored: StoredTensor) -> Iterator[None]:
    """Let a layer of the skeleton have its real weight, for a while."""
    before = layer._parameters[key]
    layer._parameters[key] = nn.Parameter(stored.read(), requires_grad=False)
    try:
        yield
    finally:
        layer._parameters[key] = before
