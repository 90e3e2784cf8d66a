#!/usr/bin/env bash
# What this project claims of GPUs, checked and timed on one: some ten minutes of a machine with an NVIDIA GPU and Linux.
#
#   tools/gpu_check.sh [FOLDER]      default: build/gpu-check
#
# 1. tests of the Triton kernels, compiled and run on the GPU: bits equal to those of the plain references
# 2. tests of what uses them: packed models, decoding replayed from a CUDA graph without a wait of the host, and fake
#    quantization in training, bit for bit the reference's
# 3. `reqat bench --tier laptop`: the rows of the GPU beside those of the CPU, with a record that `reqat pin --what benchmark` takes
# 4. tables and Figure 6 of it
#
# FOLDER then holds tests.xml, models.xml, bench.log, machine.json, tables/ and plots/. Each step has its own limit, so that none of
# them costs the others. Exit code: 0, 1 if a step failed, 2 if there is no GPU to use. It installs nothing but the environment (`make env`).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-build/gpu-check}"
venv="${VENV:-.venv}"

if [ ! -x "$venv/bin/python" ]; then make env VENV="$venv" || exit 2; fi
python="$(cd -- "$venv/bin" && pwd)/python"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch $("$python" -c 'import torch; print(torch.__version__)') finds no NVIDIA GPU. With one (nvidia-smi lists it), torch" \
        "must be a CUDA build: make distclean env, with a package index that serves one." >&2
    exit 2
fi
mkdir -p -- "$out"
failed=0
step() { # name, seconds, log, command...
    local name="$1" limit="$2" log="$3"
    shift 3
    echo "$(date +%T) $name (at most $((limit / 60)) min)"
    if ! timeout -k 10 "$limit" "$@" > "$log" 2>&1; then
        echo "  failed; the end of $log:"
        tail -n 15 -- "$log"
        failed=1
    fi
}

"$python" - > "$out/machine.json" <<'P'
import json
from pathlib import Path
from reqat.records import provenance

print(json.dumps({**provenance.commit(Path.cwd()), **provenance.hardware(), "versions": provenance.versions()}, indent=1))
P
cat -- "$out/machine.json"
step "tests of the kernels on the GPU" 180 "$out/tests.log" \
    "$python" -m pytest -q -m "not long" -k "triton or sem_loss" --junitxml "$out/tests.xml" tests/kernels
tail -n 1 -- "$out/tests.log"
step "tests of models and training on the GPU" 120 "$out/models.log" \
    "$python" -m pytest -q -m "not long" --junitxml "$out/models.xml" \
    tests/models/test_decode_step.py tests/models/test_packed_triton.py tests/quant/test_fake_fused.py
tail -n 1 -- "$out/models.log"
step "benchmark" 420 "$out/bench.log" "$python" -m reqat.cli bench --tier laptop --current
step "tables and figures" 120 "$out/report.log" \
    "$python" -m reqat.cli report --what benchmark --tier laptop --tables "$out/tables" --plots "$out/plots" --force
[ "$failed" = 0 ] && echo "done: $out; keep the numbers with: reqat pin --what benchmark --tier laptop"
exit "$failed"
