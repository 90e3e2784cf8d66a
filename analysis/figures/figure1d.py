"""Figure 1(d): accuracy against the throughput that a precision buys."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator

from analysis.figures._results import MODEL_OF_PAPER, PAPER_AXIS, entry_at, finish, percent_of
from analysis.report import paper, roofline, style
from analysis.report.cells import Results
from analysis.report.document import tokens
from analysis.report.lines import lines
from analysis.report.names import BF16, REFERENCE_PRECISION

NAME = "figure1d"
ARTIFACT = "figure1"
NEEDS = "reference"

METHODS = {"Baseline": BF16, "FT": BF16, "PTQ": REFERENCE_PRECISION, "QAT": REFERENCE_PRECISION,
           "ReQAT-TQS": REFERENCE_PRECISION}  # fmt: skip
"""Method -> precision, of the paper's five points."""
OUTPUT_TOKENS = 8192
"""Of the modelled requests: the length at which the paper's Figure 6 has the speedups of its Figure 1(d)."""
_WORDS = {"Baseline": "BF16 base", "FT": "BF16 FT", "ReQAT-TQS": "ReQAT"}
_LINE = 9.0  # points of the page from one name to the next


def build(results: Results, model: str) -> Figure:
    """Figure 1(d): accuracy against speedup over BF16, at the claim budget; the paper's beside it.

    Accuracies are the tier's. No model here has both its accuracy measured and a GPU to be timed on, so speedups are
    those of the roofline model of Figure 6, for the paper's model and GPU: where on the axis a method stands is
    modelled, how high is measured.
    """
    all_lines = lines(results.of(ARTIFACT, model=model))
    claim = results.plan.tier.claim_total(model)
    found = {method: entry_at(all_lines, at, method, claim) for method, at in METHODS.items()}
    used = [e for e in found.values() if e is not None]
    fig = style.figure(3.0)
    left, right = fig.subplots(1, 2)
    modelled = {BF16: 1.0, REFERENCE_PRECISION: speedup()}
    for method, entry in found.items():
        if entry is not None:
            value, lo, hi = percent_of(results, entry)
            _point(left, modelled[METHODS[method]], method, value, lo, hi)
    read = {(r.precision, r.method): r.value for r in paper.read_off("figure1d")}
    for method, at in METHODS.items():
        x = read[at, method.removesuffix("-TQS")]
        total = {} if method in ("Baseline", "PTQ") else {"total_tokens": f"{claim * paper.QAT_TOKENS // 10**6}M"}
        printed = paper.value("table1", precision=at, method=method, **total)
        if printed is not None:
            _point(right, x, method, printed, printed, printed)
    for ax in (left, right):
        ax.set_xlim(0.6, 1.35 * modelled[REFERENCE_PRECISION])
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.margins(y=0.12)
        _apart(ax)
    left.set_xlabel("speedup over BF16, modelled")
    right.set_xlabel("speedup over BF16, read off")
    left.set_ylabel("accuracy (%)")
    right.set_ylabel(PAPER_AXIS)
    style.panel(left, "d", f"Accuracy measured: {model}")
    style.panel(right, "", f"Paper: {MODEL_OF_PAPER} on B200, {REFERENCE_PRECISION}", theirs=True)
    total_tokens = next((e.total_tokens for e in used if e.total_tokens), None)
    notes = [
        f"Quantized: {REFERENCE_PRECISION}; trained on {tokens(total_tokens)} tokens.",
        f"Speedup: not of {model} and not measured, but the roofline model of Figure 6 for {MODEL_OF_PAPER} on a B200, "
        f"{roofline.REQUESTS} requests of {OUTPUT_TOKENS:,} tokens; it knows no difference between quantized methods. "
        "Its error is in figure6-error, what this machine decodes in throughput-decode.",
        f"Paper: accuracies of its Table 1 at {tokens(claim * paper.QAT_TOKENS)} tokens.",
    ]
    return finish(fig, results, used, *notes)


def speedup() -> float:
    """Modelled throughput of the paper's model at W4A4KV4 on a B200, relative to BF16."""
    return roofline.ratio(roofline.QWEN_14B, roofline.W4A4KV4, roofline.B200, roofline.REQUESTS, OUTPUT_TOKENS)


def _point(ax: Axes, x: float, method: str, value: float, lo: float, hi: float) -> None:
    """A method as a point with its interval, if it has one, and its name beside it."""
    error = [[value - lo], [hi - value]]
    look = style.line(method)
    look |= {"ls": "none", "markersize": 1.3 * look["markersize"]}
    ax.errorbar([x], [value], yerr=error, label=method, **look)
    ax.annotate(_WORDS.get(method, method), (x, value), (7, 0), textcoords="offset points", va="center", fontsize=7.5)


def _apart(ax: Axes) -> None:
    """Move names down that would be printed over the name of a higher point at the same speedup."""
    low, high = ax.get_ylim()
    point = (high - low) / (72 * ax.bbox.height / ax.figure.dpi)  # of the page, in percent of accuracy
    above: dict[float, float] = {}
    for name in sorted((t for t in ax.texts if isinstance(t, Annotation)), key=lambda t: -t.xy[1]):
        x, y = round(name.xy[0], 1), name.xy[1] / point
        place = min(y, above.get(x, y + _LINE) - _LINE)
        name.set_position((7, place - y))
        above[x] = place
