"""A table as a value, and its three written forms.

A `Table` holds two things made from the same records: `data`, one tidy row a number at full precision (this is the CSV,
for machines and for whoever wants to check), and `columns` with `sections`, the rounded text that people read (Markdown
and LaTeX). Text is Unicode throughout ("−", "±", "Δ"); only the LaTeX writer knows about escaping. Nothing here depends
on the time, the machine or a random state, so the same records give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from reqat.config.files import write_file

MINUS = "\u2212"
EMPTY = "\u2013"  # en dash: this cell does not exist in the design (a missing result is an error, not a dash)
PACKAGES = "booktabs,adjustbox"  # what the LaTeX needs in the preamble


@dataclass(frozen=True)
class Text:
    """What stands in one cell."""

    text: str = EMPTY
    bold: bool = False
    detail: str = ""  # an interval or a p-value: after the number in Markdown, small and under it in LaTeX


@dataclass(frozen=True)
class Column:
    """A column; neighbours with the same `group` share a spanning header."""

    name: str
    group: str = ""
    align: str = "r"  # LaTeX and Markdown alignment: l | c | r


@dataclass(frozen=True)
class Table:
    """A finished table. Raises ValueError if a row has not exactly one cell a column."""

    name: str  # file stem: "table1"
    title: str
    caption: str  # how to read it, one paragraph
    footer: tuple[str, ...]  # tier, n, seeds, arithmetic, commit
    columns: tuple[Column, ...]
    sections: tuple[tuple[tuple[Text, ...], ...], ...]  # groups of rows, a rule between groups
    data: pd.DataFrame = field(repr=False)  # tidy, full precision

    def __post_init__(self) -> None:
        for section in self.sections:
            for row in section:
                if len(row) != len(self.columns):
                    raise ValueError(
                        f"{self.name}: a row of {len(row)} cells under {len(self.columns)} columns: "
                        f"{[c.text for c in row]}"
                    )

    # -- CSV ---------------------------------------------------------------------------------------------------------
    def csv(self) -> str:
        """The tidy data; floats by their shortest exact representation, missing values empty."""
        return self.data.to_csv(index=False, lineterminator="\n")

    # -- Markdown ----------------------------------------------------------------------------------------------------
    def markdown(self) -> str:
        """A pipe table under its title, the caption above and the footer below."""
        rule = {"l": ":---", "c": ":---:", "r": "---:"}
        lines = [f"# {_md(self.title)}", "", _md(self.caption), ""]
        lines.append("| " + " | ".join(_md(f"{c.group}: {c.name}" if c.group else c.name) for c in self.columns) + " |")
        lines.append("|" + "|".join(rule[c.align] for c in self.columns) + "|")
        for section in self.sections:
            for row in section:
                lines.append("| " + " | ".join(_md_cell(c) for c in row) + " |")
        lines += ["", *(f"- {_md(note)}" for note in self.footer), ""]
        return "\n".join(lines)

    # -- LaTeX -------------------------------------------------------------------------------------------------------
    def latex(self) -> str:
        r"""A `table*` with booktabs rules, shrunk to the text width if it is wider; `\label{tab:<name>}`."""
        spec = "".join(c.align for c in self.columns)
        lines = [
            f"% {self.name}: written by `reqat report`; needs \\usepackage{{{PACKAGES}}}",
            r"\begin{table*}[t]",
            r"\centering",
            r"\footnotesize",
            r"\setlength{\tabcolsep}{3.5pt}",
            rf"\caption{{\textbf{{{_tex(self.title)}.}} {_tex(self.caption)}}}",
            rf"\label{{tab:{self.name}}}",
            r"\begin{adjustbox}{max width=\textwidth}",
            rf"\begin{{tabular}}{{@{{}}{spec}@{{}}}}",
            r"\toprule",
        ]
        groups = self._groups()
        if any(name for name, _, _ in groups):
            lines.append(" & ".join(rf"\multicolumn{{{n}}}{{c}}{{{_tex(name)}}}" for name, _, n in groups) + r" \\")
            lines.append(" ".join(rf"\cmidrule(lr){{{start + 1}-{start + n}}}" for name, start, n in groups if name))
        lines += [" & ".join(_tex(c.name) for c in self.columns) + r" \\", r"\midrule"]
        for i, section in enumerate(self.sections):
            if i:
                lines.append(r"\midrule")
            for row in section:
                cells = (_tex_cell(c, column.align) for c, column in zip(row, self.columns, strict=True))
                lines.append(" & ".join(cells) + r" \\")
        lines += [
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{adjustbox}",
            "",
            r"\vspace{3pt}\begin{minipage}{\textwidth}\scriptsize",
            " ".join(_tex(n) for n in self.footer),
            r"\end{minipage}",
            r"\end{table*}",
            "",
        ]
        return "\n".join(lines)

    def _groups(self) -> list[tuple[str, int, int]]:
        """(name, first column, width) of each run of columns with one group; ungrouped columns stand alone."""
        out: list[tuple[str, int, int]] = []
        for i, column in enumerate(self.columns):
            if out and column.group and out[-1][0] == column.group:
                name, start, width = out[-1]
                out[-1] = (name, start, width + 1)
            else:
                out.append((column.group, i, 1))
        return out

    # -- files -------------------------------------------------------------------------------------------------------
    def write(self, folder: Path) -> list[Path]:
        """Write `<name>.csv`, `.md` and `.tex` into `folder` (made if needed); each appears whole or not at all."""
        paths = []
        for suffix, text in (("csv", self.csv()), ("md", self.markdown()), ("tex", self.latex())):
            path = folder / f"{self.name}.{suffix}"
            write_file(path, text)
            paths.append(path)
        return paths


# -- how numbers read ------------------------------------------------------------------------------------------------
def number(value: float, digits: int = 1, *, sign: bool = False) -> str:
    """`-1.25` -> "−1.2" (a real minus; a rounded zero carries no sign); NaN is the design's dash."""
    if math.isnan(value):
        return EMPTY
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def percent(fraction: float, digits: int = 1, *, sign: bool = False) -> str:
    """A fraction as percent (or a difference of fractions as percentage points), without the unit."""
    return number(100 * fraction, digits, sign=sign)


def interval(lo: float, hi: float, *, sign: bool = False) -> str:
    """`[60.1, 64.3]`: both ends in percent; a dash where nothing is known of them (NaN)."""
    if math.isnan(lo) or math.isnan(hi):
        return EMPTY
    return f"[{percent(lo, sign=sign)}, {percent(hi, sign=sign)}]"


def p_value(p: float) -> str:
    """`0.0123` -> "0.012", `0.0002` -> "<0.001"."""
    if math.isnan(p):
        return EMPTY
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def tokens(n: int | None) -> str:
    """`140_000_000` -> "140M", `1_500_000` -> "1.5M", `786_432` -> "786K"; None (no training) -> "0"."""
    if not n:
        return "0"
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            # Three significant digits name a budget; the exact number stands in the CSV.
            return f"{n / size:.3g}{unit}" if n < 999.5 * size else f"{n / size:.0f}{unit}"
    return str(n)


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    MINUS: "$-$",
    "\u00b1": r"$\pm$",
    "\u0394": r"$\Delta$",
    "\u00b5": r"$\mu$",
    "\u03b1": r"$\alpha$",
    "\u03b2": r"$\beta$",
    "\u03bb": r"$\lambda$",
    "\u00d7": r"$\times$",
    EMPTY: "--",
    "\u2265": r"$\ge$",
    "\u2264": r"$\le$",
    "\u2192": r"$\to$",
    "\u2713": r"$\checkmark$",
    "\u2020": r"$\dagger$",
}


def _tex(text: str) -> str:
    """Plain text as LaTeX. Raises ValueError on a character that plain LaTeX would not set."""
    out = []
    for char in text:
        if char not in _TEX and not (" " <= char <= "~"):
            raise ValueError(f"no LaTeX for {char!r} in {text!r}; add it to the table in analysis/report/document.py")
        out.append(_TEX.get(char, char))
    return "".join(out)


def _tex_cell(cell: Text, align: str) -> str:
    text = rf"\textbf{{{_tex(cell.text)}}}" if cell.bold else _tex(cell.text)
    return rf"\shortstack[{align}]{{{text}\\[-1pt]{{\tiny {_tex(cell.detail)}}}}}" if cell.detail else text


def _md_cell(cell: Text) -> str:
    text = f"**{_md(cell.text)}**" if cell.bold else _md(cell.text)
    return f"{text} {_md(cell.detail)}" if cell.detail else text


def _md(text: str) -> str:
    """Plain text inside a Markdown pipe table: only the pipe and what would start emphasis or a tag need care."""
    for char in "\\|*_<":
        text = text.replace(char, "\\" + char)
    return text


def best(values: Sequence[float | None], digits: int = 1) -> list[bool]:
    """Which entries to print bold: those that equal the largest *as printed*, if two or more compete and differ."""
    shown = [None if v is None or math.isnan(v) else round(v, digits) for v in values]
    competing = {v for v in shown if v is not None}
    return [len(competing) > 1 and v == max(competing) for v in shown]
