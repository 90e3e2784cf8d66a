"""The trace viewer in a real browser: what a user clicks, points at, types and sees."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from analysis.viewer import encode, write_page
from tests.analysis.viewer import chromium
from tests.analysis.viewer import trace_folders as folders

BINARY = chromium.find()
pytestmark = pytest.mark.skipif(
    BINARY is None, reason="no Chromium on this machine: install it (apt install chromium) or name it in CHROMIUM"
)

PROBLEMS, TOKENS = 8, 60
REFERENCE, CANDIDATE = folders.LABELS
NASTY = ["</script><script>document.title='broken'</script>", "<img src=x onerror=\"document.title='broken'\">", "&lt;"]


HIDING = "12\u202e34\u200b\u2066\x07"  # turns 34 around on a page that does not guard against it
TITLES = {"nasty": "Broken</title><script>1", "hidden": f"Traces {HIDING}"}
SHOWN = "12[U+202E]34[U+200B][U+2066][U+0007]"


class Pages:
    """Folders of traces and the pages made of them."""

    def __init__(self, root: Path) -> None:
        self.folder = {
            "pairs": folders.make_folder(root / "pairs", problems=PROBLEMS, tokens=TOKENS),
            "lone": folders.make_folder(root / "lone", problems=PROBLEMS, tokens=TOKENS, pairs=False),
            "nasty": folders.make_folder(
                root / "nasty", problems=3, tokens=30, words=["<eos>", *NASTY], prompts=dict(enumerate(NASTY))
            ),
            "hidden": folders.make_folder(
                root / "hidden", problems=1, tokens=30, words=["<eos>", HIDING, "\u05d0\u05d1"], prompts={0: HIDING}
            ),
            "many": folders.make_folder(root / "many", problems=400, tokens=6),
            "three": folders.make_folder(root / "three", problems=2, tokens=20, labels=("BF16", "MXFP4", "NVFP4")),
            "empty": folders.make_folder(root / "empty", problems=1, tokens=0),
        }
        self.html = {name: folder / "view.html" for name, folder in self.folder.items()}
        for name, folder in self.folder.items():
            write_page(folder, self.html[name], title=TITLES.get(name, "Traces"))

    def rows(self, name: str, trace: int) -> list[dict[str, Any]]:
        table = pq.read_table(self.folder[name] / "tokens.parquet").to_pylist()
        return [row for row in table if row["trace"] == trace]

    def traces(self, name: str) -> list[dict[str, Any]]:
        return list(pq.read_table(self.folder[name] / "traces.parquet").to_pylist())


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    return Pages(tmp_path_factory.mktemp("viewer"))


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    with chromium.Chromium(BINARY) as browser:
        yield browser


@pytest.fixture
def browser(shared: Any, pages: Pages) -> Iterator[Any]:
    """A wide, light window with the pairs open; whatever a script complained of fails the test."""
    shared.resize(1600, 900)
    shared.prefer("light")
    shared.open(pages.html["pairs"])
    yield shared
    assert shared.errors == []


def token(column: int, position: int) -> str:
    return f'.column[data-column="{column}"] .t[data-i="{position}"]'


def at_problem(browser: Any, number: int) -> None:
    browser.wait(f"document.querySelector('#problem h2')?.innerText.startsWith('{number} /')")


def visible(id: int) -> str:
    return str(folders.WORDS[id]).replace(" ", "\u2423").replace("\n", "\u23ce")


def first_difference(pages: Pages, problem: int) -> int:
    one, other = ([row["token"] for row in pages.rows("pairs", 2 * problem + at)] for at in (0, 1))
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


# -- opening ----------------------------------------------------------------------------------------------------------


def test_opens_by_itself(browser: Any, pages: Pages) -> None:
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in browser.requests if url.startswith("file:")]) == 1
    assert browser.text("h1") == "Traces"
    assert browser.count(".column") == 2
    assert browser.count(token(0, 0).split(" ")[0] + " .t") == TOKENS
    assert browser.count(".fork:not(dialog *)") == 2
    written = browser.run("[...document.querySelectorAll('.column')].map(c => c.querySelector('.tokens').textContent)")
    for at, text in enumerate(written):
        expected = "".join(folders.WORDS[row["token"]] for row in pages.rows("pairs", at)).replace("\n", "\u23ce")
        assert text.replace("\u25c6 first divergence", "") == expected
    assert not browser.run("document.getElementById('trouble').checkVisibility()")


def test_marks_the_first_divergence(browser: Any, pages: Pages) -> None:
    position = first_difference(pages, 0)
    for column in (0, 1):
        before = f"document.querySelector('{token(column, position)}').parentNode.previousSibling.className"
        assert browser.run(before) == "fork"
    assert browser.count(".t.first") == 2


def test_colours_tokens_by_entropy(browser: Any, pages: Pages) -> None:
    edges = [0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.2]
    classes = browser.run(f"[...document.querySelectorAll('{token(1, 0).split(' ')[0]} .t')].map(t => t.className)")
    for row, found in zip(pages.rows("pairs", 1), classes, strict=True):
        entropy = row[f"entropy_{CANDIDATE}"]
        if min(abs(entropy - edge) for edge in edges) > 2e-4:  # not where storing it may round it over the edge
            assert f"h{sum(entropy >= edge for edge in edges)}" in found.split()
    assert browser.count("#legend li") == 10


# -- mouse ------------------------------------------------------------------------------------------------------------


def test_hovering_shows_what_each_precision_says(browser: Any, pages: Pages) -> None:
    assert "Point at a token" in browser.text("#inspector")
    row = pages.rows("pairs", 0)[5]
    browser.hover(token(0, 5))
    assert browser.text("#inspector .piece") == visible(row["token"])
    for at, label in enumerate((REFERENCE, CANDIDATE), 1):
        said = browser.text(f"#inspector .said section:nth-child({at})")
        assert label in said
        assert f"{row[f'entropy_{label}']:.2f} nats" in said or row[f"entropy_{label}"] < 0.1
        cells = browser.run(
            f"[...document.querySelectorAll('#inspector .said section:nth-child({at}) tr')]"
            ".map(r => [r.cells[0].innerText, r.cells[2].innerText])"
        )
        top = zip(row[f"top_{label}"], row[f"top_prob_{label}"], strict=True)
        shown = [(id, p) for id, p in top if p >= encode.FLOOR]
        assert [cell[0].removesuffix(" \u25c0") for cell in cells] == [visible(id) for id, _ in shown]
        for (_, percent), (_, p) in zip(cells, shown, strict=True):
            digits = len(percent.rstrip("%").partition(".")[2])
            # Half of the last digit, and half a step of the angle that the probability is stored as.
            stored = 100 * math.sqrt(p * (1 - p)) * math.pi / (2 * encode.PROB_STEPS) + 1e-3
            assert float(percent.rstrip("%")) == pytest.approx(100 * p, abs=0.5 * 10**-digits + stored)
    assert browser.count(".t.peer") == 1  # the same token of the other trace: they have not parted yet
    browser.hover("h1")
    assert "Point at a token" in browser.text("#inspector")
    assert browser.count(".t.peer, .t.at") == 0


def test_a_clicked_token_stays_and_can_be_linked_to(browser: Any, pages: Pages) -> None:
    browser.click(token(1, 40))
    facts = browser.text("#inspector")
    assert f"written by {CANDIDATE}" in facts
    assert browser.count(".t.peer") == 0  # after the divergence there is nothing to compare a token with
    browser.hover(token(0, 3))
    assert browser.text("#inspector") != facts
    browser.hover("h1")
    assert browser.text("#inspector") == facts
    assert browser.run("document.activeElement.dataset.i") == "40"
    assert browser.run("location.hash") == "#p0000/0/1/40"
    browser.open(pages.html["pairs"], "#p0003/0/1/7")
    assert browser.text("#problem h2") == f"4 / {PROBLEMS}"
    assert browser.text("#inspector .piece") == visible(pages.rows("pairs", 7)[7]["token"])


def test_clicking_a_row_opens_the_problem(browser: Any) -> None:
    browser.click('.row[data-place="4"]')
    at_problem(browser, 5)
    assert "p0004" in browser.text("#problem")
    assert browser.run("document.querySelector('.row[aria-selected=true]').dataset.place") == "4"
    browser.click("#previous")
    at_problem(browser, 4)
    browser.click("#next")
    at_problem(browser, 5)


def test_clicking_the_strip_goes_to_the_token(browser: Any) -> None:
    browser.click('.column[data-column="0"] .strip')
    assert abs(int(browser.run("document.activeElement.dataset.i")) - TOKENS // 2) <= 1


# -- filter, search, order --------------------------------------------------------------------------------------------


def test_filters_by_outcome_and_family(browser: Any, pages: Pages) -> None:
    traces = pages.traces("pairs")
    wanted = [
        t["problem"] for t, other in zip(traces[::2], traces[1::2], strict=True) if t["correct"] > other["correct"]
    ]
    options = browser.run("[...document.getElementById('outcome').options].map(o => o.value)")
    assert set(options) == {
        "",
        "=both right",
        "=both wrong",
        f"=only {REFERENCE} right",
        f"=only {CANDIDATE} right",
        "cut",
    }
    browser.choose("#outcome", f"=only {REFERENCE} right")
    browser.wait(f"document.getElementById('count').innerText.startsWith('{len(wanted)} of ')")
    at_problem(browser, 1)
    assert browser.count(".row") == len(wanted)
    assert wanted[0] in browser.text("#problem")
    browser.choose("#family", "=chain_sum")  # those problems are odd, and odd ones are of the other family
    browser.wait("document.getElementById('count').innerText.startsWith('0 of ')")
    browser.wait("document.getElementById('problem').innerText.includes('No problem passes')")
    browser.press("j", "n", "d", "s", "ArrowRight", "Escape")  # nothing to move in, and nothing breaks
    browser.choose("#outcome", "cut")
    browser.wait(f"document.getElementById('count').innerText.startsWith('1 of {PROBLEMS}')")


def test_searches_prompts_and_responses(browser: Any, pages: Pages) -> None:
    traces = pages.traces("pairs")
    browser.press("/")
    assert browser.run("document.activeElement.id") == "search"
    browser.type("7 + 10")
    browser.wait("document.getElementById('count').innerText.startsWith('1 of ')")
    browser.wait("document.querySelector('.prompt mark')?.innerText === '7 + 10'")
    pair = next(
        traces[0]["response"][at : at + 9].upper()
        for at in range(20, 200)
        if len({t["problem"] for t in traces if traces[0]["response"][at : at + 9].lower() in t["response"].lower()})
        == 1
        and "\n" not in traces[0]["response"][at : at + 9]
        and traces[0]["response"][at : at + 9].strip() == traces[0]["response"][at : at + 9]
    )
    browser.run("document.getElementById('search').select()")
    browser.type(pair)  # in capitals: the search does not mind
    browser.wait("document.getElementById('problem').innerText.includes('p0000')")
    browser.wait("document.querySelectorAll('.t.found').length > 0")
    found = browser.run(
        "[...document.querySelectorAll('.column[data-column=\"0\"] .t.found')].map(t => t.textContent).join('')"
    )
    assert pair.lower() in found.lower()
    browser.press("Escape")
    assert browser.run("document.activeElement === document.body")


def test_sorts(browser: Any, pages: Pages) -> None:
    def change(problem: int) -> float:
        rows = [row for at in (0, 1) for row in pages.rows("pairs", 2 * problem + at)]
        return max(abs(row[f"entropy_{CANDIDATE}"] - row[f"entropy_{REFERENCE}"]) for row in rows)

    browser.choose("#sort", "change")
    expected = sorted(range(PROBLEMS), key=lambda problem: -change(problem))
    browser.wait(f"document.querySelector('.row[data-place=\"0\"] .what').innerText.startsWith('{expected[0]} + ')")
    shown = browser.run("[...document.querySelectorAll('.row .what')].map(r => parseInt(r.innerText))")
    assert shown == expected


# -- keyboard ---------------------------------------------------------------------------------------------------------


def test_moves_between_problems(browser: Any) -> None:
    for key, expected in (("j", 2), ("ArrowDown", 3), ("k", 2), ("ArrowUp", 1), ("k", 1), ("j", 2)):
        browser.press(key)
        at_problem(browser, expected)
    assert "Problem 2 of 8" in browser.run("document.getElementById('say').textContent")


def test_moves_between_stops_and_columns(browser: Any, pages: Pages) -> None:
    parts, delta = first_difference(pages, 0), 0.5
    stops = [
        row["position"]
        for row in pages.rows("pairs", 0)
        if row["position"] == parts
        or row["top_BF16"][0] != row[f"top_{CANDIDATE}"][0]
        or abs(row[f"entropy_{CANDIDATE}"] - row["entropy_BF16"]) >= delta
    ]
    chosen = "Number(document.activeElement.dataset.i)"
    for stop in stops:
        browser.press("n")
        assert browser.run(chosen) == stop
    browser.press("n")
    assert browser.run(chosen) == stops[-1]
    assert "No further stop" in browser.run("document.getElementById('say').textContent")
    browser.press("p")
    assert browser.run(chosen) == stops[-2]
    browser.press("d")
    assert browser.run(chosen) == parts
    browser.press("s")
    assert browser.run("document.activeElement.closest('.column').dataset.column") == "1"
    assert browser.run(chosen) == parts
    browser.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert browser.run(chosen) == parts + 1
    assert browser.count(".t[tabindex='0']") == 2  # one for each column: Tab leaves it
    browser.press("Escape")
    assert browser.run("document.activeElement === document.body")
    browser.choose("#delta", "0.1")
    assert browser.count(".t.jump:not(dialog *)") > len(stops)


def test_help_theme_and_colour(browser: Any) -> None:
    browser.press("?")
    assert browser.run("document.getElementById('dialog').open")
    assert "next problem" in browser.text("#dialog") and "sample(temperature=0.6" in browser.text("#dialog")
    browser.press("j")  # belongs to the dialog while it is open
    assert browser.text("#problem h2").startswith("1 /")
    browser.press("Escape")
    assert not browser.run("document.getElementById('dialog').open")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = browser.run(paper)
    browser.press("t", "t")
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    assert browser.run(paper) != light
    browser.press("t")
    assert browser.run("document.documentElement.dataset.theme") is None
    browser.press("c")
    assert "change against BF16" in browser.text("#legend")
    assert browser.count("#problem .t[class*=' d']") == browser.count("#problem .t")
    browser.press("c")
    assert "ln p(token)" in browser.text("#legend")
    browser.press("c")
    assert browser.run("document.getElementById('colour').value") == "entropy"


# -- other folders ----------------------------------------------------------------------------------------------------


def test_a_lone_trace_has_a_column_for_each_precision(browser: Any, pages: Pages) -> None:
    browser.open(pages.html["lone"])
    assert browser.run("[...document.querySelectorAll('.column h3')].map(h => h.innerText)") == [REFERENCE, CANDIDATE]
    texts = browser.run("[...document.querySelectorAll('.tokens')].map(t => t.textContent)")
    assert texts[0] == texts[1]
    rows = pages.rows("lone", 0)
    parts = next(row["position"] for row in rows if row["top_BF16"][0] != row[f"top_{CANDIDATE}"][0])
    assert browser.run("[...document.querySelectorAll('.t.first')].map(t => Number(t.dataset.i))") == [parts, parts]
    browser.hover(token(0, TOKENS - 1))
    assert browser.count(".t.peer") == 1


def test_what_models_wrote_is_text_and_nothing_else(browser: Any, pages: Pages) -> None:
    browser.open(pages.html["nasty"])
    assert browser.run("document.title") == "Broken</title><script>1"
    assert browser.count("script") == 3 and browser.count("img") == 0
    for problem in range(3):
        assert NASTY[problem] in browser.text(".prompt")
        assert browser.run("document.querySelector('.t').textContent") in NASTY
        browser.click(token(0, 0))
        browser.press("j")
        at_problem(browser, min(problem + 2, 3))
    browser.resize(375, 812, phone=True)  # long tokens without a space break
    assert browser.run("[...document.querySelectorAll('.tokens')].every(t => t.scrollWidth <= t.clientWidth)")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("document.title") == "Broken</title><script>1"


def test_what_hides_or_turns_text_around_is_shown_by_its_number(browser: Any, pages: Pages) -> None:
    browser.open(pages.html["hidden"])
    assert browser.text(".prompt") == SHOWN
    texts = browser.run("[...document.querySelectorAll('.t')].map(t => t.textContent)")
    assert SHOWN in texts and not [text for text in texts if "\u202e" in text]
    assert "\u202e" not in browser.run("document.body.innerText + document.title")
    # Hebrew tokens keep their places: tokens of one line stand from left to right in their order.
    assert browser.run(
        "[...document.querySelectorAll('.t')].every((t, i, all) => !i || t.offsetTop !== all[i - 1].offsetTop"
        " || t.offsetLeft >= all[i - 1].offsetLeft)"
    )


def test_a_long_list_draws_only_what_is_seen(browser: Any, pages: Pages) -> None:
    browser.open(pages.html["many"])
    assert browser.count(".row") < 40
    browser.run("document.getElementById('list').scrollTop = 1e6")
    browser.wait("document.querySelector('.row[data-place=\"399\"]') !== null")
    assert browser.count(".row") < 40
    browser.click('.row[data-place="399"]')
    at_problem(browser, 400)
    browser.press("k", "k", "k")
    at_problem(browser, 397)


def test_three_precisions_and_no_tokens(browser: Any, pages: Pages) -> None:
    browser.open(pages.html["three"])
    assert browser.count(".column") == 3
    browser.hover(token(2, 3))
    assert browser.count("#inspector .said section") == 3
    browser.open(pages.html["empty"])
    assert "no tokens" in browser.text(".column")
    browser.press("ArrowRight", "n", "p", "d", "s")


def test_a_trace_that_cannot_be_unpacked_is_named(browser: Any, pages: Pages, tmp_path: Path) -> None:
    text = pages.html["pairs"].read_text()
    head, mark, rest = text.partition('id="blobs">["')
    spoiled = tmp_path / "spoiled.html"
    spoiled.write_text(head + mark + "AAAA" + rest[4:])
    browser.open(spoiled)
    assert "The traces of p0000, seed 0, cannot be unpacked" in browser.text("#trouble")
    browser.press("j")
    at_problem(browser, 2)  # the others can


# -- sizes and themes -------------------------------------------------------------------------------------------------


def pixels(png: bytes) -> tuple[int, int]:
    return struct.unpack(">II", png[16:24])  # type: ignore[return-value]


@pytest.mark.parametrize("width", [375, 768, 1600])
def test_fits_from_a_phone_to_a_wide_screen(browser: Any, pages: Pages, tmp_path: Path, width: int) -> None:
    height = 812 if width == 375 else 900
    browser.resize(width, height, phone=width < 500)
    shots = {}
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.open(pages.html["pairs"])
        browser.press("d")
        shots[scheme] = browser.screenshot(tmp_path / f"{width}-{scheme}.png")
        assert pixels(shots[scheme]) == (width, height)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        channels = json.loads(
            browser.run("getComputedStyle(document.body).backgroundColor").replace("rgb(", "[").replace(")", "]")
        )
        assert (sum(channels) > 600) == (scheme == "light")
    assert shots["light"] != shots["dark"]
    first, second = browser.run("[...document.querySelectorAll('.column')].map(c => c.getBoundingClientRect().top)")
    assert (second > first) == (width == 375)
    # The chosen token can be seen: neither the bar nor the panel covers it.
    assert browser.run(
        "(() => { const t = document.activeElement, b = t.getBoundingClientRect();"
        "return t.contains(document.elementFromPoint(b.x + b.width / 2, b.y + b.height / 2)); })()"
    )


def test_on_a_phone_the_list_folds_and_a_tap_shows_the_token(browser: Any, pages: Pages) -> None:
    browser.resize(375, 812, phone=True)
    browser.open(pages.html["pairs"])
    assert not browser.run("document.getElementById('search').checkVisibility()")
    browser.click("#fold")
    assert browser.run("document.getElementById('search').checkVisibility()")
    browser.click('.row[data-place="2"]')
    at_problem(browser, 3)
    assert not browser.run("document.getElementById('search').checkVisibility()")
    browser.click(token(1, 2))
    assert f"written by {CANDIDATE}" in browser.text("#inspector")


def test_every_control_has_a_name(browser: Any) -> None:
    tree = browser.ask("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "combobox", "searchbox", "textbox", "listbox", "option", "link"}
    nameless = [
        node
        for node in tree
        if not node["ignored"]
        and node["role"]["value"] in roles
        and not node.get("name", {}).get("value", "").strip("\u23ce ")
    ]
    assert [node for node in nameless if node["role"]["value"] != "option"] == []
    assert {"main", "navigation", "banner", "complementary", "search"} <= {node["role"]["value"] for node in tree}
