from __future__ import annotations

import pytest

from lightning_lora.analysis.places import in_order, kind_of, place


@pytest.mark.parametrize(
    ("name", "found", "kind"),
    [
        ("h.3.attn.q", ("h.3", "attn.q"), "attn.q"),
        ("encoder.layers.2.blocks.1.fc1", ("encoder.layers.2", "blocks.1.fc1"), "blocks.1.fc1"),
        ("head", ("", "head"), "head"),
        ("body.head", ("", "body.head"), "body.head"),
        ("0.experts.up[12]", ("0", "experts.up[12]"), "experts.up"),
        ("net.0", ("", "net.0"), "net.0"),
        ("blocks.1.net.2", ("blocks.1", "net.2"), "net.2"),
    ],
)
def test_a_layer_is_somewhere_in_a_block(name: str, found: tuple[str, str], kind: str):
    assert place(name) == found
    assert kind_of(name) == kind


def test_names_are_sorted_as_people_count():
    names = ["h.10.q", "h.9.v", "h.9.q", "body", "h.1.q", "h.10.down"]
    assert sorted(names, key=in_order) == ["body", "h.1.q", "h.9.q", "h.9.v", "h.10.down", "h.10.q"]
