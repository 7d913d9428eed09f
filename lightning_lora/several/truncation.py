"""An adapter cut to the best approximation of lower rank in each layer, in a module or on disk."""

from __future__ import annotations

from contextlib import ExitStack
from os import PathLike

from torch import nn

from lightning_lora.adapted_model import AdaptedModel, Root, in_turn
from lightning_lora.attachment import requested
from lightning_lora.named_adapters import adapter_names, recorded
from lightning_lora.names import listed
from lightning_lora.several.combination import Cut, add, write_sum
from lightning_lora.several.sum_as_adapter import CombinedLayer, attach_sum, state_of_sum
from lightning_lora.several.summand import summand_of_module
from lightning_lora.sharding import is_divided, is_fully_sharded, is_sharded
from lightning_lora.state import copy_adapter_state
from lightning_lora.switching import replacing

_CALLER = "truncate_adapter"


@in_turn
def truncate_adapter(module: nn.Module, *, energy: float | None = None, rank: int | None = None) -> list[CombinedLayer]:
    """Replace a module's adapter by its best approximation of lower rank in each layer.

    Layers may differ in rank afterwards, and those whose update is zero are no longer adapted. What trains in full,
    such as heads, biases and token rows, keeps its values. An adapter of ``init="pissa"`` and others, whose update has
    up to twice its rank, becomes one of the usual form. Factors are in float32 at least. All that trains are new
    parameters, so make optimizers anew; a fit with the same options as before goes on from here.

    Args:
        module: A module with one adapter, which is neither merged nor disabled now.
        energy: The share in ``(0, 1]`` of each layer's squared norm to keep: the relative error of a layer is at most
            ``sqrt(1 - energy)``.
        rank: How many singular values of each layer to keep. Set this or ``energy``.

    Returns:
        For each layer the ranks before (``stacked``) and after, and the relative error of the cut.

    Raises:
        TypeError: An option is not a number.
        ValueError: An option is invalid; or the module has no adapter, several, or one that uses DoRA, holds NaN or is
            zero in every layer. Nothing was changed.
        RuntimeError: A Trainer is running with the module, it is wrapped for several processes, or its adapter is
            merged, disabled or waiting for its start. Nothing was changed.

    Source:
        Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    cut = _cut(_CALLER, energy, rank)
    root = _only_root(module)
    _refuse_in_use(module)
    summand = summand_of_module(root.module, "the adapter", 1.0, _CALLER)
    layers = add([summand], cut)
    with replacing(module, _CALLER), ExitStack() as undo:
        attach_sum(root.module, layers, [summand], _CALLER, undo, is_exact=False)
        model = AdaptedModel(root.module)
        copy_adapter_state(model, state_of_sum(model, layers, [summand]))
        # A fit with the options that the adapter was made with goes on, as if data had decided the ranks.
        model.roots[0].attachment.asked = root.attachment.asked or root.attachment.config
        undo.pop_all()
    return [layer.summary for layer in layers.values()]


def truncate_file(
    path: str | PathLike[str],
    out: str | PathLike[str],
    *,
    energy: float | None = None,
    rank: int | None = None,
    overwrite: bool = False,
) -> list[CombinedLayer]:
    """Write the best approximation of an adapter on disk as a PEFT directory; else as ``truncate_adapter``.

    Raises:
        ValueError: As in ``truncate_adapter`` and ``combine_adapters``. Nothing was written.
        FileNotFoundError: There is no such file.
    """
    return write_sum([path], [1.0], out, _cut("truncate", energy, rank), overwrite=overwrite)


def _cut(caller: str, energy: float | None, rank: int | None) -> Cut:
    if energy is None and rank is None:
        raise ValueError(
            f"{caller}: set energy, the share of each layer's squared norm to keep, such as 0.99; or rank, how many "
            "singular values to keep."
        )
    return Cut(caller, "svd", rank, energy, alone=True)


def _only_root(module: nn.Module) -> Root:
    """Return where the only adapter of a module was attached.

    Raises:
        ValueError: There are several adapters, none, or one that belongs to a module above.
    """
    if len(names := adapter_names(module)) > 1:
        first = names[0]
        raise ValueError(
            f"{_CALLER}: there are several adapters, {listed([*map(repr, names)])}. Add a smaller one beside them by "
            f"combine(module, {{{first!r}: 1.0}}, name={first + '_small'!r}, method='svd', energy=0.99), and remove "
            f"the other by remove_adapter(module, {first!r}) if it is not needed."
        )
    model = AdaptedModel(module)
    model.check_adapted(_CALLER)
    model.check_not_part()
    if len(model.roots) > 1:
        raise ValueError(
            f"{_CALLER}: {listed([root.name for root in model.roots])} were attached to one by one. Call this for each "
            "of them."
        )
    [root] = model.roots
    if root.attachment.name is not None and recorded(module) is None:
        raise ValueError(
            f"{_CALLER}: the adapter {root.attachment.name!r} of this {type(module).__name__} belongs to a module "
            "above it; call this with the one that it was added to."
        )
    return root


def _refuse_in_use(module: nn.Module) -> None:
    """Raise if something holds the factors that are about to be replaced, or they cannot be read here.

    Raises:
        RuntimeError: Its message says what.
    """
    if any(requested(part) is not None for part in module.modules()):
        raise RuntimeError(
            f"{_CALLER}: a Trainer is running with this {type(module).__name__}, and its optimizer would go on with "
            "the factors of before. Call this before or after fit. Nothing was changed."
        )
    ddp = nn.parallel.DistributedDataParallel
    wrapped = [part for part in module.modules() if isinstance(part, ddp) or is_fully_sharded(part)]
    trained = AdaptedModel(module).trained
    if wrapped or any(is_sharded(tensor) or is_divided(tensor) for tensor in trained.values()):
        how = f"wrapped in {type(wrapped[0]).__name__}" if wrapped else "sharded over several processes"
        raise RuntimeError(
            f"{_CALLER}: this {type(module).__name__} is {how}. Save the adapter, and cut its file: lightning-lora "
            "truncate. Nothing was changed."
        )
