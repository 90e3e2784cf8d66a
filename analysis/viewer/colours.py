"""The page's two scales of colour, in light and in dark.

Entropy has one: from the page's own background to a deep brown (light) or a pale yellow (dark), so that lightness
alone says more or less, whatever colours an eye tells apart, and on a grey printer. The steps are fixed numbers of
nats, close together near zero where most tokens are: pages can be held against each other. Change has two arms, blue
for less and orange for more, the pair that stays apart under every common colour blindness.

Each step carries the text colour that reads on it (contrast of at least 4.5, WCAG 2 level AA; a test holds that).
"""

from __future__ import annotations

# Upper bounds of the steps in nats; the last step has none.
ENTROPY_EDGES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.2)
CHANGE_EDGES = (0.05, 0.15, 0.4, 1.0)  # of the amount, for each arm

THEMES = {
    "light": {
        "text": ("#14161a", "#ffffff"),
        "entropy": (
            "#ffffff", "#fff5d9", "#ffe9b3", "#fdd98a", "#fcc35a",
            "#f7a637", "#e58220", "#b1500b", "#87390a", "#5a2407",
        ),
        "less": ("#dcebf7", "#abd0ea", "#62a6d6", "#175f9c"),
        "more": ("#fdeacb", "#fbc882", "#ee9430", "#ac4d0a"),
    },
    "dark": {
        "text": ("#eceef2", "#101114"),
        "entropy": (
            "#15171c", "#241f18", "#352715", "#4a3113", "#654012",
            "#845216", "#b57424", "#d8953c", "#f2bb69", "#ffe3b0",
        ),
        "less": ("#172838", "#1c3f5e", "#255f92", "#74b4e8"),
        "more": ("#2f2313", "#543512", "#845216", "#eaa94e"),
    },
}  # fmt: skip


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb``, 0 to 1 (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, 1 to 21 (WCAG 2)."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def scales(theme: str) -> dict[str, tuple[str, str]]:
    """Class name -> (background, text): ``h0`` to ``h9`` for entropy, ``d-4`` to ``d4`` for change."""
    look = THEMES[theme]
    backgrounds = {f"h{step}": colour for step, colour in enumerate(look["entropy"])}
    backgrounds["d0"] = look["entropy"][0]
    for step in range(len(CHANGE_EDGES)):
        backgrounds[f"d{step + 1}"] = look["more"][step]
        backgrounds[f"d-{step + 1}"] = look["less"][step]
    return {
        name: (colour, max(look["text"], key=lambda text, colour=colour: contrast(colour, text)))  # type: ignore[misc]
        for name, colour in backgrounds.items()
    }


def css() -> str:
    """Custom properties of both themes, and a class for each step."""

    def properties(theme: str) -> str:
        return "".join(f"--{name}:{back};--{name}t:{text};" for name, (back, text) in scales(theme).items())

    rules = "\n".join(f".{name}{{background:var(--{name});color:var(--{name}t)}}" for name in scales("light"))
    return (
        f":root{{{properties('light')}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{properties('dark')}}}}}\n"
        f":root[data-theme=dark]{{{properties('dark')}}}\n{rules}\n"
    )
