"""The names of ``lightning_lora.analysis``."""

from __future__ import annotations

import inspect

import pytest

from lightning_lora import analysis


@pytest.mark.parametrize("name", analysis.__all__)
def test_every_name_exists_and_is_documented(name: str):
    thing = getattr(analysis, name)
    assert thing.__module__.startswith("lightning_lora.analysis.")
    assert vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__


def test_the_plots_are_left_to_whoever_asks_for_them():
    assert not [name for name in analysis.__all__ if name.startswith("plot_")]
