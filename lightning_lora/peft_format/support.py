"""What PEFT and vLLM can hold of what was adapted: each reason against it in half a sentence."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from lightning_lora.layers import Adapter


def vllm_obstacle(
    module: nn.Module, adapter: type[Adapter], *, use_dora: bool, lora_bias: bool, like_default: bool
) -> str | None:
    """Return why vLLM would refuse this layer or compute something else with it, or None."""
    if use_dora:
        return "no DoRA"
    if lora_bias:
        return "no bias in lora_B"
    if not adapter.vllm_takes:
        return f"no adapter for {getattr(module, 'base_class', type(module)).__name__}"
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
