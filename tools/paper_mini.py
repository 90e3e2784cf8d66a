r"""Make what tier `paper-mini` needs: a tiny Qwen2, traces, and problems with answers.

    python tools/paper_mini.py                      into models/ and data/, where tier `paper` has its own
    python tools/paper_mini.py --models M --data D  elsewhere

The model has two layers, random weights (seed 0), a byte-level tokenizer of its own and a chat template that opens
``<think>``, as R1-Distill-Qwen's does. Traces (``paper-mini-traces.jsonl``) and problems (``paper-mini.jsonl``) are
sums; a trace ends with its answer in ``\boxed{}``. Nothing that is there already is replaced.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAME = "paper-mini"
SEED = 0
TRACES, PROBLEMS = 64, 4
VOCABULARY = 320
# Of DeepSeek-R1-Distill-Qwen: the answer begins inside the reasoning.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def main() -> None:
    """Command line of this file; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from reqat.config.errors import ReqatError

    try:
        for path in make(arguments.models, arguments.data):
            print(path)
    except ReqatError as error:
        sys.exit(f"error: {error}")


def make(models: Path, data: Path) -> list[Path]:
    """Write the model's folder and the two files; returns their paths. Raises `ReqatError` for one that is there and
    is another."""
    from reqat.config.errors import ReqatError
    from reqat.models import save_model

    sums = list(_sums(TRACES + PROBLEMS))
    traces = [trace(a, b) for a, b in sums[:TRACES]]
    problems = [{"id": f"{a}+{b}", "problem": question(a, b), "answer": a + b} for a, b in sums[TRACES:]]
    made = [_write(data / f"{NAME}-traces.jsonl", traces), _write(data / f"{NAME}.jsonl", problems)]
    folder, tokenizer = models / NAME, build_tokenizer(text for row in traces for text in row.values())
    model = build_model(tokenizer)
    if not folder.exists():
        save_model(model, tokenizer, folder)
    elif not _is(folder, model):
        raise ReqatError(f"{folder} is there and is another model: remove it, or give another folder (--models).")
    return [*made, folder]


def _is(folder: Path, model: Any) -> bool:
    """Whether a folder holds the weights of ``model``."""
    import torch

    from reqat.config.errors import ReqatError
    from reqat.models import load_model

    try:
        kept = load_model(folder).state_dict()
    except (OSError, ReqatError, ValueError):
        return False
    wanted = model.state_dict()
    return kept.keys() == wanted.keys() and all(torch.equal(kept[name], wanted[name]) for name in wanted)


def question(a: int, b: int) -> str:
    """What a problem asks."""
    return f"What is {a} + {b}?"


def trace(a: int, b: int) -> dict[str, str]:
    """A problem, asked as a benchmark is, with a response that reasons and answers in a box."""
    from reqat.tasks.benchmarks import BOXED

    thought = f"<think>\n{a} + {b} = {a + b}\n</think>\n\n"
    return {"prompt": question(a, b) + BOXED, "response": f"{thought}The answer is \\boxed{{{a + b}}}."}


def _sums(n: int) -> Iterator[tuple[int, int]]:
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random(SEED).shuffle(pairs)
    yield from pairs[:n]


def build_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE with the special tokens of the template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any) -> Any:
    """A Qwen2 of two layers and 40,000 parameters, untrained, from seed 0."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(SEED)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """JSON lines; a file of the same content stays."""
    from reqat.config.errors import ReqatError
    from reqat.config.files import write_file

    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ReqatError(f"{path} is there and holds something else; move it, or name another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_file(path, text)
    return path


if __name__ == "__main__":
    main()
