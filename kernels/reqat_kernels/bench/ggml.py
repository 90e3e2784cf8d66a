"""ggml's matrix product, called through ctypes: the library that llama-cpp-python brings along.

ggml is llama.cpp's tensor library and holds the fastest public CPU kernels for 4-bit weights. llama-cpp-python is an
optional package of the benchmark: where it is missing, its rows are skipped with a sentence. Only functions of ggml's
public headers are called, no struct but the three numbers of ``ggml_init_params`` is touched, and a burst of products
is one graph, so that neither Python nor ctypes counts against it.

Weights are quantized by ggml's own ``ggml_quantize_chunk``; the reference multiplies what ggml's own ``to_float``
makes of them, in float64. Inputs are float32; ggml rounds them to bfloat16 (BF16 weights) or to 8 bits in blocks of 32
(Q8_0: int8, float16 scale), which the check's bound accounts for. "repacked": weights interleaved by ggml's CPU_REPACK
buffer, as llama.cpp does on loading.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reqat_kernels.bench.linear import LINEAR, check, operands, row_steps
from reqat_kernels.bench.measure import Absent, Case, Work, Wrong

# enum ggml_type, which GGUF files store and which therefore does not change
TYPES = {"F32": 0, "Q4_0": 2, "BF16": 30, "MXFP4": 39, "NVFP4": 40}
BLOCKS = {"F32": 1, "Q4_0": 32, "BF16": 1, "MXFP4": 32, "NVFP4": 64}
_GRAPH_NODES = 4096


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _TypeTraits(ctypes.Structure):
    """The head of ``struct ggml_type_traits``, up to ``to_float``."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


class Ggml:
    """ggml's functions, found by name in its libraries. Raises Absent if they are not there."""

    def __init__(self, folder: Path) -> None:
        # In the order in which they need each other, so that no search path has to be set.
        names = ["libggml-base.so", "libggml-cpu.so", "libggml.so"]
        try:
            self._libraries = [ctypes.CDLL(str(folder / n), ctypes.RTLD_GLOBAL) for n in names if (folder / n).exists()]
        except OSError as error:
            raise Absent(f"its ggml cannot be opened ({error}).") from None
        if not self._libraries:
            raise Absent("llama-cpp-python is installed, but without a shared ggml library.")
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        f = self._function
        self.init = f("ggml_init", pointer, _InitParams)
        self.free = f("ggml_free", None, pointer)
        self.new_tensor_2d = f("ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, number, number)
        self.mul_mat = f("ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.nbytes = f("ggml_nbytes", size, pointer)
        self.tensor_overhead = f("ggml_tensor_overhead", size)
        self.graph_overhead = f("ggml_graph_overhead_custom", size, size, ctypes.c_bool)
        self.new_graph = f("ggml_new_graph_custom", pointer, pointer, size, ctypes.c_bool)
        self.expand = f("ggml_build_forward_expand", None, pointer, pointer)
        self.traits = f("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), ctypes.c_int)
        self.quantize = f("ggml_quantize_chunk", size, ctypes.c_int, pointer, pointer, number, number, number, pointer)
        self.alloc = f("ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
        self.buffer_free = f("ggml_backend_buffer_free", None, pointer)
        self.set = f("ggml_backend_tensor_set", None, pointer, pointer, size, size)
        self.get = f("ggml_backend_tensor_get", None, pointer, pointer, size, size)
        self.cpu_init = f("ggml_backend_cpu_init", pointer)
        self.set_threads = f("ggml_backend_cpu_set_n_threads", None, pointer, ctypes.c_int)
        self.default_buffers = f("ggml_backend_get_default_buffer_type", pointer, pointer)
        self.supports = f("ggml_backend_supports_op", ctypes.c_bool, pointer, pointer)
        self.compute = f("ggml_backend_graph_compute", ctypes.c_int, pointer, pointer)
        self.device_of = f("ggml_backend_get_device", pointer, pointer)
        self.registry_of = f("ggml_backend_dev_backend_reg", pointer, pointer)
        self.proc = f("ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
        self.buffer_name = f("ggml_backend_buft_name", ctypes.c_char_p, pointer)
        # It tells of every repacked tensor.
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *_: None)
        f("ggml_log_set", None, pointer, pointer)(ctypes.cast(self._quiet, pointer), None)
        self.backend, self._threads = self.cpu_init(), 0

    def use_threads(self, threads: int) -> None:
        """Compute with so many threads from here on."""
        if threads != self._threads:
            self.set_threads(self.backend, threads)
            self._threads = threads

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        for library in self._libraries:
            with contextlib.suppress(AttributeError):
                found = getattr(library, name)
                found.restype, found.argtypes = result, list(arguments)
                return found
        raise Absent(f"its ggml has no function {name}: another version than this benchmark knows.")

    def repack_buffers(self) -> int | None:
        """The buffer type that interleaves weights, None where this build or CPU has none."""
        device = self.device_of(self.backend)
        address = self.proc(self.registry_of(device), b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        for i in range(16):
            if not kinds or not kinds[i]:
                return None
            if b"REPACK" in self.buffer_name(kinds[i]).upper():
                return int(kinds[i])
        return None

    def context(self, tensors: int, graphs: int = 0) -> int:
        """A context that holds descriptions of so many tensors, and no data."""
        size = self.tensor_overhead() * (tensors + 8) + graphs * self.graph_overhead(_GRAPH_NODES, False)
        return int(self.init(_InitParams(size + 2**16, None, True)))


@cache
def load() -> Ggml:
    """ggml of the installed llama-cpp-python (or of the folder in ``REQAT_GGML``). Raises Absent."""
    given = os.environ.get("REQAT_GGML")
    if given:
        return Ggml(Path(given))
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise Absent("llama-cpp-python is not installed (pip install llama-cpp-python builds it).")
    return Ggml(Path(spec.origin).parent / "lib")


class Product:
    """A ring of weights in one of ggml's types, and ``w x`` for one x."""

    def __init__(self, case: Case, type_name: str, repacked: bool) -> None:
        g = self.g = load()
        if case.K % BLOCKS[type_name]:
            raise Absent(f"{type_name} takes K in multiples of {BLOCKS[type_name]}.")
        x, w = operands(case)
        self.case, self.x, self.kind = case, x, TYPES[type_name]
        self._keep: list[Any] = []
        traits = g.traits(self.kind).contents
        if not traits.type_size or traits.blck_size != BLOCKS[type_name]:
            raise Absent(f"its ggml knows no {type_name} in blocks of {BLOCKS[type_name]}.")
        self.bytes_each = case.N * case.K // traits.blck_size * traits.type_size
        self.copies = case.copies(self.bytes_each)
        wf = w.float().contiguous()
        packed = torch.empty(self.bytes_each, dtype=torch.uint8)
        written = g.quantize(self.kind, wf.data_ptr(), packed.data_ptr(), 0, case.N, case.K, None)
        if written != self.bytes_each:
            raise Absent(f"its ggml wrote {written} bytes of {type_name}, not {self.bytes_each}.")
        self.packed, self.to_float = packed, traits.to_float
        buffers = g.default_buffers(g.backend)
        if repacked:
            buffers = g.repack_buffers()
            if buffers is None:
                raise Absent("its ggml does not repack weights on this CPU.")
        weights = g.context(self.copies)
        self.weights = [g.new_tensor_2d(weights, self.kind, case.K, case.N) for _ in range(self.copies)]
        held = g.alloc(weights, buffers)
        if not held:
            raise Absent("its ggml found no memory for the weights.")
        inputs = g.context(1)
        self.input = g.new_tensor_2d(inputs, TYPES["F32"], case.K, case.M)
        held_input = g.alloc(inputs, g.default_buffers(g.backend))
        self._held, self._contexts = [held, held_input], [weights, inputs]
        xf = x.float().contiguous()
        g.set(self.input, xf.data_ptr(), 0, xf.nbytes)
        probe = g.context(1)
        if not g.supports(g.backend, g.mul_mat(probe, self.weights[0], self.input)):
            g.free(probe)
            raise Absent(f"its ggml cannot {'repack' if repacked else 'multiply'} {type_name} on this CPU.")
        g.free(probe)
        for tensor in self.weights:
            g.set(tensor, packed.data_ptr(), 0, packed.nbytes)

    def __del__(self) -> None:
        for buffer in getattr(self, "_held", ()):
            self.g.buffer_free(buffer)
        for context in getattr(self, "_contexts", ()):
            self.g.free(context)

    def graph(self, indices: Sequence[int]) -> tuple[Callable[[], None], list[int]]:
        """One graph of a product for each of these copies: a function that computes it, and the result tensors."""
        g = self.g
        context = g.context(len(indices), graphs=1)
        outs = [g.mul_mat(context, self.weights[i], self.input) for i in indices]
        held = g.alloc(context, g.default_buffers(g.backend))
        graph = g.new_graph(context, _GRAPH_NODES, False)
        for out in outs:
            g.expand(graph, out)
        self._held.append(held)
        self._contexts.append(context)

        def compute() -> None:
            g.use_threads(torch.get_num_threads())
            if g.compute(g.backend, graph) != 0:
                raise Wrong("ggml could not compute its graph")

        return compute, outs

    def result(self) -> Tensor:
        """``y_MN`` by the last copy (every copy is the same weights)."""
        compute, (out,) = self.graph([self.copies - 1])
        compute()
        y = torch.empty(self.case.M, self.case.N, dtype=torch.float32)
        self.g.get(out, y.data_ptr(), 0, y.nbytes)
        return y

    def verify(self, exact_inputs: bool) -> None:
        """Raise Wrong if the product is not what its arithmetic allows."""
        error = None if exact_inputs else row_steps(self.x, 32)
        dense = torch.empty(self.case.N, self.case.K, dtype=torch.float32)
        self.to_float(self.packed.data_ptr(), dense.data_ptr(), dense.numel())
        check(self.result(), self.x, dense, error)

    def work(self, exact_inputs: bool) -> Work:
        """The ring as a :class:`Work`."""
        moved = self.bytes_each + 4 * self.case.M * (self.case.K + self.case.N)
        return Work(
            run=lambda i: self.graph([i])[0](),
            copies=self.copies,
            bytes_moved=moved,
            check=lambda: self.verify(exact_inputs),
            ring_bytes=self.copies * self.bytes_each,
            chain=lambda indices: self.graph(list(indices))[0],
        )


def _register(type_name: str, repacked: bool) -> None:
    def make(case: Case) -> Work:
        return Product(case, type_name, repacked).work(exact_inputs=type_name == "BF16")

    arithmetic = "BF16" if type_name == "BF16" else f"{type_name} W4A8"
    LINEAR.provider("ggml, repacked" if repacked else "ggml", format=arithmetic)(make)


for _type, _repacked in (
    ("BF16", False),
    ("Q4_0", False),
    ("Q4_0", True),
    ("MXFP4", False),
    ("MXFP4", True),
    ("NVFP4", False),
):
    _register(_type, _repacked)
