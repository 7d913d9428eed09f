"""What PEFT and vLLM can hold of what was adapted: each reason against it in half a sentence."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from lightning_lora.layers import Adapter, LoRALayer, ParameterAdapter, WeightLoRALayer, base_parameter
from lightning_lora.layers.conv import ConvAdapter, ConvTransposeAdapter
from lightning_lora.layers.embedding import EmbeddingAdapter
from lightning_lora.layers.linear import LinearAdapter


def peft_obstacle(
    module: nn.Module, adapter: type[Adapter], parameter: str, *, use_dora: bool, lora_bias: bool
) -> str | None:
    """Return why PEFT has no adapter that computes the same for this layer, or None."""
    if issubclass(adapter, ConvTransposeAdapter):
        return "PEFT has no adapter for transposed convolutions"
    if issubclass(adapter, ConvAdapter):
        return _of_convolution(module, adapter)
    if issubclass(adapter, EmbeddingAdapter):
        if _reads_weight(module, adapter) and not hasattr(module, "embed_scale"):
            return "it has a forward of its own, which PEFT's adapter for embeddings does not know"
        return "PEFT's adapter for embeddings has no bias (lora_bias)" if lora_bias else None
    if issubclass(adapter, ParameterAdapter):
        return _of_parameter(module, parameter, use_dora=use_dora, lora_bias=lora_bias)
    return "PEFT does not combine lora_bias with DoRA" if use_dora and lora_bias else None


def _of_convolution(module: nn.Module, adapter: type[Adapter]) -> str | None:
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if module.groups > 1:
        return f"groups={module.groups}: PEFT's factors mix the groups and are no update of the kernel"
    if any(step > 1 for step in module.dilation):
        return f"dilation={module.dilation}: PEFT's adapter leaves it out"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}: PEFT's adapter pads with zeros"
    if _reads_weight(module, adapter):
        return "it has a forward of its own, which PEFT's adapter for convolutions does not know"
    return None


def _of_parameter(module: nn.Module, parameter: str, *, use_dora: bool, lora_bias: bool) -> str | None:
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.EmbeddingBag)):
        return f"PEFT has no adapter for {_base_class(module).__name__}"
    is_attention = isinstance(module, nn.MultiheadAttention)
    if is_attention and parameter != "in_proj_weight":
        return "PEFT adapts attention only if query, key and value have the same size"
    what = "attention" if is_attention else "parameters"
    if use_dora or lora_bias:
        return f"PEFT has no {'DoRA' if use_dora else 'lora_bias'} for {what}"
    weight = base_parameter(module, parameter)
    if weight.ndim > 3:
        return f"PEFT adapts parameters of two or three dimensions, not of {weight.ndim}"
    if weight.ndim == 3 and weight.shape[0] == 1 and getattr(module, "is_transposed", False):
        return "PEFT reads a transposed stack of one expert as a matrix of another shape"
    return None


def _reads_weight(module: nn.Module, adapter: type[Adapter]) -> bool:
    return isinstance(module, WeightLoRALayer) if isinstance(module, LoRALayer) else adapter.needs_weight(module)


def _base_class(module: nn.Module) -> type[nn.Module]:
    return module.base_class if isinstance(module, LoRALayer) else type(module)


def vllm_obstacle(
    module: nn.Module, adapter: type[Adapter], parameter: str, *, use_dora: bool, lora_bias: bool, like_default: bool
) -> str | None:
    """Return why vLLM would refuse this layer or compute something else with it, or None."""
    if use_dora:
        return "no DoRA"
    if lora_bias:
        return "no bias in lora_B"
    is_stack = issubclass(adapter, ParameterAdapter) and base_parameter(module, parameter).ndim == 3
    if not (is_stack or issubclass(adapter, (LinearAdapter, EmbeddingAdapter))):
        return f"no adapter for {_base_class(module).__name__}"
    if not like_default:
        return "ignores patterns: save with uniform_rank=True"
    return None


def name_problems(
    name: str, aliases: Collection[str], *, option: str, all_names: Collection[str], targets: Collection[str]
) -> Iterator[str]:
    """Yield why PEFT would not understand a name as meant.

    Args:
        name: The module.
        aliases: All its names.
        option: What names it: ``"target_modules"``, or an option whose entries PEFT matches with the ends of names.
        all_names: The names of all modules.
        targets: The names of the adapted layers.
    """
    if len(aliases) > 1:
        yield f"the model reaches it by {len(aliases)} names ({', '.join(aliases)}), and PEFT would replace the first"
    if option == "target_modules":
        return
    others = [other for other in all_names if other.endswith(name) and other != name]
    if others:
        yield f"PEFT lets {option} match the ends of names, and {others[0]!r} ends so too"
    # PEFT leaves such layers out of target_modules.
    if option == "modules_to_save" and any(f".{name}." in f".{target}." for target in targets):
        yield "layers inside of it, or of its name, are adapted, and PEFT would leave them out"
