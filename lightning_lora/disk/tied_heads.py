"""Output layers that share their weight with the embedding, and so are not in a base's files."""

from __future__ import annotations

from lightning_lora.disk.base_folder import BaseFolder

_HEAD = "lm_head.weight"
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_OTHER_HEADS = ("ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "DoubleHeadsModel")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
OPTION = "tie_word_embeddings"


def is_tied(base: BaseFolder) -> bool:
    """Return whether loading this base ties an output layer to the embedding."""
    return bool(base.config.get(OPTION, True)) and _has_head(base, (*_CAUSAL, *_OTHER_HEADS))


def virtual_heads(base: BaseFolder) -> dict[str, str]:
    """Return the output layer that a tied model has and its files lack -> the embedding's tensor."""
    names = base.tensors
    found = [name for name in names if f".{name}".endswith(tuple(f".{each}" for each in _EMBEDDINGS))]
    if is_tied(base) and _has_head(base, _CAUSAL) and len(found) == 1 and _HEAD not in names:
        return {_HEAD: found[0]}
    return {}


def embedding_names(base: BaseFolder) -> set[str]:
    """Return the tensors of which loading makes one, where the model is tied."""
    if not is_tied(base):
        return set()
    ends = tuple(f".{each}" for each in (*_EMBEDDINGS, "shared.weight", _HEAD))
    return {name for name in base.tensors if f".{name}".endswith(ends)}


def _has_head(base: BaseFolder, kinds: tuple[str, ...]) -> bool:
    kind = base.config.get("architectures")
    return isinstance(kind, list) and any(isinstance(each, str) and each.endswith(kinds) for each in kind)
