"""What `tools/amx_emulated.py` does before an emulator runs: the order of modules; another source is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools import amx_emulated


def test_modules_come_after_those_that_they_stand_on(tmp_path: Path) -> None:
    lines = ("a/sd_mod.ko: b/scsi-mod.ko b/crc.ko", "b/scsi-mod.ko: c/common.ko", "b/crc.ko:", "c/common.ko:")
    (tmp_path / "modules.dep").write_text("".join(f"{line}\n" for line in lines))
    found = list(amx_emulated.in_order(tmp_path, "sd_mod"))
    assert found[-1] == "a/sd_mod.ko" and set(found) == {line.split(":")[0] for line in lines}
    assert found.index("c/common.ko") < found.index("b/scsi-mod.ko")
    with pytest.raises(SystemExit, match="no module ext4"):
        list(amx_emulated.in_order(tmp_path, "ext4"))


def test_another_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cpu.h").write_text("struct msr { Bit64u ia32_xss; };\n")
    (tmp_path / "init.cc").write_text("nothing to mend\n")
    with pytest.raises(SystemExit, match=r"init\.cc: .*is not in it"):
        amx_emulated.mend(tmp_path)
    assert "ia32_xss; Bit64u ia32_xfd" in (tmp_path / "cpu.h").read_text()


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no clone of Bochs"):
        amx_emulated.make(tmp_path, tmp_path / "work")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    (tmp_path / "bochs").mkdir()
    (tmp_path / "bochs" / "configure").touch()
    for folder, says in ((tmp_path / "a b", "spaces"), (tmp_path, "exists")):
        with pytest.raises(SystemExit, match=says):
            amx_emulated.make(tmp_path, folder)
    with pytest.raises(SystemExit, match="not made"):
        amx_emulated.run(tmp_path, [], 1)
