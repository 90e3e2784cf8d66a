"""`reqat export` on a folder: what it writes, says and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedModel

from reqat.cli.main import main
from reqat.data import build_tokenizer
from reqat.models import save_model
from reqat.records import record

TEXT = "How many legs have 7 cats? So 4 + 4 = 8."


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["export", *arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_export(tiny: Callable[..., PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = build_tokenizer([TEXT])
    save_model(tiny(vocab_size=len(tokenizer)), tokenizer, tmp_path / "m")
    (tmp_path / "text.txt").write_text(TEXT * 40)
    model, out = ("--model", str(tmp_path / "m")), ("--out", str(tmp_path / "out"))
    asked = (*model, *out, "--format", "compressed-tensors", "--precision", "NVFP4-W4A4")
    code, _, err = run(capsys, *asked)
    assert code == 2 and "--calibration" in err and not (tmp_path / "out").exists()
    data = ("--calibration", str(tmp_path / "text.txt"), "--sequences", "2", "--sequence-tokens", "16")
    code, said, err = run(capsys, *asked, *data)
    assert code == 0 and "14 layers" in said and err == ""
    found = record.verify(tmp_path / "out")
    assert found["kind"] == "export" and found["config"]["precision"].startswith("NVFP4-W4A4")
    assert "tokenizer.json" in found["outputs"]
    assert "model.layers.0.mlp.up_proj.input_global_scale" in load_file(tmp_path / "out" / "model.safetensors")
    code, _, err = run(capsys, *asked, *data)
    assert code == 2 and "--force" in err
    again = (*model, *out, "--format", "gguf", "--precision", "MXFP4-W4A16", "--skip", "*.layers.1.*", "--force")
    code, said, err = run(capsys, *again)
    assert code == 0 and "7 layers" in said and err.count("reqat: warning: gguf: ") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.gguf", "record.json", "reqat.json"]
    assert json.loads((tmp_path / "out" / "reqat.json").read_text())["skip"] == ["*.layers.1.*"]


def test_a_precision_that_a_format_cannot_say_is_refused_before_the_model_is_read(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_tokenizer([TEXT])
    save_model(tiny(vocab_size=len(tokenizer)), tokenizer, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"damaged")
    asked = ("--model", str(tmp_path / "m"), "--out", str(tmp_path / "out"), "--format", "gguf", "--precision")
    for precision in ("AMXFP4-W4A16", "BF16"):
        code, _, err = run(capsys, *asked, precision)
        assert code == 2 and precision in err and "model.safetensors" not in err
    code, _, err = run(capsys, *asked, "MXFP4-W4A16")
    assert code == 2 and "model.safetensors" in err, "this one is only known from the weights"
