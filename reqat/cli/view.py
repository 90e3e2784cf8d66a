"""The verb that shows token traces: `view`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from reqat.cli import arguments
from reqat.cli.app import app


@app.command()
def view(
    folder: Annotated[Path, typer.Argument(help="Folder of token traces (tokens.parquet, traces.parquet, meta.json).")],
    out: Annotated[Path | None, typer.Option(help="The page (default: FOLDER/view.html).")] = None,
    title: Annotated[str | None, typer.Option(help="The page's heading (default: the labels).")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=arguments.MOST, help="Only the first so many problems and seeds.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="Only problems of one task family.")] = None,
    floor: Annotated[
        float,
        typer.Option(
            callback=arguments.floor, help="Leave less probable tokens out of the lists of most probable ones."
        ),
    ] = 1e-3,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave out damaged traces, each named, instead of stopping.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the page that is there.")] = False,
) -> None:
    """Write one HTML page that shows the traces of two precisions side by side; it needs no server and no network."""
    from analysis.viewer import write_page
    from analysis.viewer.page import COMFORTABLE_BYTES

    path = folder / "view.html" if out is None else out
    page = write_page(
        folder,
        path,
        overwrite=force,
        title=title,
        limit=limit,
        family=family,
        floor=floor,
        keep_going=keep_going,
        warn=lambda line: print(f"reqat: warning: {line}", file=sys.stderr),
    )
    size = len(page.text)
    print(
        f"{path}: {page.n_problems:,} problems, {page.n_traces:,} traces, {page.n_tokens:,} tokens, {size / 1e6:.1f} MB"
    )
    if size > COMFORTABLE_BYTES:
        print("reqat: warning: a page of this size opens slowly; --limit or --floor make it smaller.", file=sys.stderr)
