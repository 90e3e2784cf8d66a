"""The colours of the page can be read, and more is always darker (or lighter, in the dark)."""

from __future__ import annotations

import pytest

from analysis.viewer import colours


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_every_step(theme: str) -> None:
    for name, (background, text) in colours.scales(theme).items():
        assert colours.contrast(background, text) >= 4.5, name


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_more_is_always_further_from_the_paper(theme: str) -> None:
    look = colours.THEMES[theme]
    for arm in (look["entropy"], (look["entropy"][0], *look["less"]), (look["entropy"][0], *look["more"])):
        lightness = [colours.luminance(colour) for colour in arm]
        assert lightness == sorted(lightness, reverse=theme == "light")
        assert len(set(lightness)) == len(arm)
    assert len(look["entropy"]) == len(colours.ENTROPY_EDGES) + 1
    assert len(look["less"]) == len(look["more"]) == len(colours.CHANGE_EDGES)
