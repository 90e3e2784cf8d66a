"""Where results are written: what is there stays, whatever happens; a result appears whole; nothing else is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from reqat.config import files, targets
from reqat.config.errors import ReqatError
from tests.campaign.faults import IMPOSSIBLE, full_disk, no_permission, tree


def ours(folder: Path) -> Collection[str]:
    if not (folder / "mark").is_file():
        raise ReqatError("no result of ours.")
    return {"mark", "data"}


def make(target: Path, text: str = "new", **options: object) -> None:
    with targets.making(target, ours, **options) as work:  # type: ignore[arg-type]
        assert work.is_dir() and not any(work.iterdir())
        (work / "mark").touch()
        (work / "data").write_text(text)


def test_a_result_appears_whole_and_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    make(out)
    assert tree(tmp_path).keys() == {"deep", "deep/out", "deep/out/mark", "deep/out/data"}
    before = tree(tmp_path)
    with pytest.raises(ReqatError, match="--force"):
        make(out, "other")
    assert tree(tmp_path) == before
    make(out, "other", replace=True)
    assert (out / "data").read_text() == "other" and tree(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    make(tmp_path / "out", "old")
    make(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "data").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from reqat.config import files, targets
from tests.config.test_targets import make, ours
out, moment = Path(sys.argv[1]), sys.argv[2]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if moment == "working":
    with targets.making(out, ours, replace=True) as work:
        (work / "half").touch()
        die()
if moment == "between":  # two names
    files._exchange = lambda *_: False
    rename = os.rename
    os.rename = lambda a, b: die() if Path(a).name.startswith(".out.partial") else rename(a, b)
if moment == "exchanged":
    targets._dispose = die
make(out, "new", replace=True)
"""


@pytest.mark.parametrize(("moment", "expected"), [("working", "old"), ("between", "old"), ("exchanged", "new")])
def test_a_kill_leaves_the_old_or_the_new_and_the_next_run_clears_the_rest(
    tmp_path: Path, moment: str, expected: str
) -> None:
    out = tmp_path / "out"
    make(out, "old")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(out), moment], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) > 1
    with pytest.raises(ReqatError, match="--force"):
        make(out)
    assert (out / "data").read_text() == expected  # brought back where the kill came between two names
    make(out, "newest", replace=True)
    assert (out / "data").read_text() == "newest" and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    make(tmp_path / "out", "old")
    before = tree(tmp_path)
    for target in (tmp_path / "out", tmp_path / "a" / "b" / "out"):
        with (
            pytest.raises(ReqatError if isinstance(error, OSError) else error),  # type: ignore[arg-type]
            targets.making(target, ours, replace=True) as work,
        ):
            (work / "half").touch()
            raise error
        assert tree(tmp_path) == before


def test_the_second_of_two_is_refused_at_once_and_changes_nothing(tmp_path: Path) -> None:
    with targets.making(tmp_path / "out", ours) as work:
        with pytest.raises(ReqatError, match="out.*another process"):
            make(tmp_path / "out")
        (work / "mark").touch()
        (work / "data").write_text("first")
    assert (tmp_path / "out" / "data").read_text() == "first"
    make(tmp_path / "out", "second", replace=True)


def test_what_a_killed_process_held_is_free(tmp_path: Path) -> None:
    hold = (
        "import pathlib, sys, time; from reqat.config.files import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1]), 'out'): print(flush=True); time.sleep(60)"
    )
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(ReqatError, match="out.*another process"), files.exclusive(lock, "out"):
            pass
        holder.kill()
    assert lock.exists()
    with files.exclusive(lock, "out"):
        pass
    assert not lock.exists()


def test_a_link_in_the_place_of_a_working_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    partial = tmp_path / "partial" / "id"
    partial.parent.mkdir()
    for name in ("id", "id-1-0123abcd"):
        (partial.parent / name).symlink_to(tmp_path / "mine")
    before = tree(tmp_path)
    make(tmp_path / "out", partial=partial)
    assert {**before, **{name: tree(tmp_path)[name] for name in ("out", "out/mark", "out/data")}} == tree(tmp_path)


def test_in_a_place_of_our_own_files_of_others_are_kept_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "data").write_text("of a run that was cut short")
    make(out, set_aside=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "notes").write_text("mine")
    make(out, "newer", set_aside=True)
    assert (tmp_path / "out.aside-1" / "notes").read_text() == "mine" and (out / "data").read_text() == "newer"
    assert "out.aside-1" in capsys.readouterr().err


def test_what_was_made_is_kept_if_something_came_into_the_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ReqatError, match=r"out\.made-1"), targets.making(out, ours) as work:
        (work / "data").write_text("hours of work")
        out.mkdir()
        (out / "notes").write_text("mine")
    assert (tmp_path / "out.made-1" / "data").read_text() == "hours of work"
    assert (out / "notes").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_files_beside_those_of_others(tmp_path: Path) -> None:
    out = tmp_path / "paper"

    def write(text: str, *names: str, **options: bool) -> None:
        with targets.making_files(out, **options) as work:
            for name in names:
                (work / name).write_text(text)

    write("1", "a.tex", "b.tex")
    write("2", "a.tex", "b.tex")  # ours, as we left it
    assert (out / "a.tex").read_text() == "2"
    (out / "a.tex").write_text("corrected by hand")
    (out / "c.tex").write_text("mine")
    before = tree(tmp_path)
    for names, force in ((("b.tex", "a.tex"), False), (("b.tex", "c.tex"), False), (("b.tex", "c.tex"), True)):
        with pytest.raises(ReqatError, match=names[1]):
            write("3", *names, replace=force)
        assert tree(tmp_path) == before
    write("3", "a.tex", replace=True)
    assert (out / "a.tex").read_text() == "3" and (out / "c.tex").read_text() == "mine"
    write("4", "c.tex", own=True)
    assert (out / "c.tex").read_text() == "4"


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_impossible_targets(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("mine")
    before, target = tree(tmp_path), IMPOSSIBLE[kind](tmp_path)
    for call in (
        lambda: make(target),
        lambda: targets.making_file(target, targets.never).__enter__(),
        lambda: targets.making_files(target).__enter__(),
        lambda: files.write_file(target, "text"),
    ):
        with pytest.raises(ReqatError) as told:
            call()
        assert "\n" not in str(told.value) and str(tmp_path) in str(told.value) and len(str(told.value)) < 600
        assert tree(tmp_path) == before


@pytest.mark.parametrize("fault", [full_disk, no_permission])
def test_what_the_system_refuses(tmp_path: Path, fault: object) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    make(folder / "out", "old")
    before = tree(tmp_path)
    says = "ulimit" if fault is full_disk else "no permission"
    with fault(folder):  # type: ignore[operator]
        for call in (
            lambda: make(folder / "new"),
            lambda: make(folder / "out", replace=True),
            lambda: files.write_file(folder / "file", "new"),
        ):
            with pytest.raises(ReqatError, match=says):
                call()
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "x", "/a/b"), "/a/b: no space"),
        (OSError("encoder: No space left on device"), "no space"),
        (RuntimeError("I/O error: File too large (os error 27)"), "ulimit"),
        (PermissionError(13, "Permission denied", "/a\nb"), r"/a\\nb: no permission"),
        (OSError("1000 requested and 0 written"), "1000 requested.*check"),
    ],
)
def test_errors_of_the_system_are_explained(error: Exception, says: str) -> None:
    with pytest.raises(ReqatError, match=says):
        raise files.explain(error, "/some/place")
