"""Direct convolution of INT8 and INT4 operands on a CPU, and the space of its schedules.

The knobs have their counterparts in the search space for tensor cores (arXiv 2202.06819; TVM's template): register
tiles stand for warp tiles, a band of rows for the tile of a thread block, passes over the channels for the chunk,
packing and layout for themselves. The program is ``conv.cpp``; a candidate's tile is a template parameter, so each is
compiled (:func:`compile_tile`), and one whose sums do not fit the registers does not compile.

Inputs are unsigned and weights signed, both of ``bits`` bits: [H, W, C] and [F, kernel, kernel, C], uint8 and int8.
Sums are exact; the result [H', W', F] is what the next layer reads: max(0, round(sum * scale)) of as many bits, in
float32 and to the nearest even number, so that every schedule on every CPU gives the same bytes. The batch is one
image. The border is zero and half a kernel wide.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from reqat_kernels.isas import ISAS
from reqat_kernels.native.library import library
from reqat_kernels.schedules.tables import digest_of

KNOBS: dict[str, tuple[int, ...]] = {
    "rows": (1, 2, 4, 7, 14),  # pixels of a register tile
    "cols": (1, 2, 4),  # groups of 16 filters of a register tile
    "unroll": (1, 4),  # steps of the reduction that are written out
    "band": (1, 4, 0),  # output rows that are finished before the next ones; 0: all
    "passes": (1, 4),  # parts that the channels are divided into; sums wait in memory between them
    "pack": (0, 1, 2),  # input read where it lies; copied one band at a time; copied ahead
    "layout": (0, 1),  # the copy: pixels of all channels; divided by passes (not without a copy)
    "finish": (0, 1),  # sums are rounded and packed in registers; in a second sweep over a band
}
"""Values of each knob; their product is the space. See ``conv.cpp``."""
COMPILED = ("rows", "cols", "unroll")
"""Knobs that the compiler reads."""
_READ = ("band", "passes", "pack", "layout", "finish")  # those that the program reads, in the order of conv.cpp

TARGETS = ("portable", "avx2", "avx512")
"""Instruction sets that ``conv.cpp`` is written for, from the least on."""

_FOLDER = Path(__file__).resolve().parent
SOURCES = (_FOLDER / "conv.cpp", *(_FOLDER.parent / "native" / f"common.{suffix}" for suffix in ("cpp", "h")))
"""What a candidate is compiled from."""
_LANES, _STEP_BYTES = 16, 4  # conv.cpp
_FLAGS = ("-std=c++17", "-O3", "-g0", "-shared", "-fPIC", "-w")
_DONE, _NO_INSTRUCTIONS, _NOT_APPLICABLE, _OUT_OF_MEMORY = range(4)
_NAME = re.compile(r"int([48])-(\d+)x\2-(\d+)-(\d+)-(\d+)(?:-stride(\d+))?")


class Impossible(ValueError):
    """A candidate that does not compile, or does not apply to its convolution. Its speed is 0."""


@dataclass(frozen=True)
class Convolution:
    """A convolution of one square image. ``size``: its height and width.

    Raises ValueError for sizes that no schedule takes.
    """

    size: int
    channels: int
    filters: int
    kernel: int
    bits: int = 8
    stride: int = 1

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.kernel % 2 == 0 or min(self.size, self.stride, self.kernel) < 1:
            raise ValueError(f"{self}: 4 or 8 bits, an odd kernel, and sizes from 1 on are taken")
        if min(self.channels, self.filters) < 1 or self.channels % 8 or self.filters % _LANES:
            raise ValueError(f"{self}: channels come in eights and filters in sixteens")

    @classmethod
    def named(cls, name: str) -> Convolution:
        """The convolution of a name like ``int8-3x3-56-64-64`` (size, channels, filters) or ``...-stride2``.

        Raises ValueError for another text.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"{name!r} names no convolution; int8-3x3-56-64-64 does (size, channels, filters)")
        bits, kernel, size, channels, filters = (int(found[i]) for i in range(1, 6))
        return cls(size, channels, filters, kernel, bits, int(found[6] or 1))

    @property
    def name(self) -> str:
        """The name that :meth:`named` reads."""
        stride = f"-stride{self.stride}" if self.stride > 1 else ""
        kernel = f"{self.kernel}x{self.kernel}"
        return f"int{self.bits}-{kernel}-{self.size}-{self.channels}-{self.filters}{stride}"

    @property
    def out_size(self) -> int:
        """Height and width of the result."""
        return (self.size - 1) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-adds, the border's zeros included."""
        return self.out_size**2 * self.filters * self.kernel**2 * self.channels

    @cached_property
    def operands(self) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
        """Random input and weights of the whole range of their bits; the same ones every time."""
        random = np.random.default_rng(self.macs)
        x = random.integers(0, 2**self.bits, (self.size, self.size, self.channels), dtype=np.uint8)
        half = 2 ** (self.bits - 1)
        w_shape = (self.filters, self.kernel, self.kernel, self.channels)
        return x, random.integers(-half, half, w_shape, dtype=np.int8)

    @cached_property
    def sums(self) -> NDArray[np.int32]:
        """[H', W', F], as torch computes them in float64, where they are exact."""
        x, w = (torch.from_numpy(a).double() for a in self.operands)
        y = F.conv2d(x.permute(2, 0, 1)[None], w.permute(0, 3, 1, 2), stride=self.stride, padding=self.kernel // 2)
        return y[0].permute(1, 2, 0).to(torch.int32).numpy()

    @cached_property
    def scale(self) -> np.float32:
        """Of the sums, so that results use their range: its top is three standard deviations."""
        return np.float32((2**self.bits - 1) / (3 * self.sums.std()))

    @cached_property
    def expected(self) -> NDArray[np.uint8]:
        """The result as bytes [H', W', F * bits / 8]."""
        y = np.rint(self.sums.astype(np.float32) * self.scale).clip(0, 2**self.bits - 1).astype(np.uint8)
        return y if self.bits == 8 else nibbles(y)


def compiler() -> str:
    """The C++ compiler: ``CXX``, or g++. Raises FileNotFoundError if there is none."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise FileNotFoundError("no C++ compiler: install g++, or name one in CXX (GCC 11 or newer)")
    return found


def instruction_set() -> str:
    """What candidates are compiled for on this machine: the best of ``TARGETS`` up to what native kernels use here."""
    native = library()
    used = ISAS[: 1 if native is None else native.reqat_isa() + 1]
    return [isa for isa in TARGETS if isa in used][-1]


def compile_tile(values: Mapping[str, int], isa: str, folder: Path, *, optimize: str = "-O3") -> Path:
    """The library of a candidate's tile for an instruction set of ``TARGETS``, in ``folder``; compiled once.

    Raises Impossible where it does not compile, FileNotFoundError without a compiler.
    """
    name = "-".join(f"{knob}{values[knob]}" for knob in COMPILED)
    path = folder / f"{isa}-{name}{optimize}-{digest_of(SOURCES)}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    macros = [f"-DREQAT_{knob.upper()}={int(values[knob])}" for knob in COMPILED]
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    command = [compiler(), *_FLAGS, optimize, *macros, f"-DREQAT_CONV_ISA={ISAS.index(isa)}", str(SOURCES[0])]
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise Impossible(f"{name} does not compile for {isa}: {(errors or done.stderr.splitlines())[0][-200:]}")
    unfinished.replace(path)
    return path


class _Problem(ctypes.Structure):
    _fields_ = [
        (field, ctypes.c_int32)
        for field in ("height", "width", "channels", "filters", "kernel", "stride", "padding", "bits")
    ] + [("scale", ctypes.c_float)]


class _Schedule(ctypes.Structure):
    _fields_ = [(field, ctypes.c_int32) for field in _READ]


class Candidate:
    """A convolution by one schedule, its operands packed: calling it computes :attr:`y`.

    Packing the weights is not part of a call (they are constant); whatever is done to the input is. Raises
    Impossible where the schedule does not apply or the CPU lacks the instructions.
    """

    def __init__(self, conv: Convolution, values: Mapping[str, int], compiled: Path) -> None:
        check(conv, values)
        x, w = conv.operands
        self._x = np.ascontiguousarray(x if conv.bits == 8 else nibbles(x))
        self._w = packed_weight(w, conv.bits, values["cols"], values["passes"])
        self.y = np.empty((conv.out_size, conv.out_size, conv.filters * conv.bits // 8), np.uint8)
        sizes = (conv.size, conv.size, conv.channels, conv.filters, conv.kernel, conv.stride, conv.kernel // 2)
        self._problem = _Problem(*sizes, conv.bits, conv.scale)
        self._schedule = _Schedule(*(values[knob] for knob in _READ))
        call = ctypes.CDLL(str(compiled)).reqat_conv
        call.argtypes = [ctypes.POINTER(_Problem), ctypes.POINTER(_Schedule), *[ctypes.c_void_p] * 3]
        pointers = (self._x.ctypes.data, self._w.ctypes.data, self.y.ctypes.data)
        self._call, self._arguments = call, (ctypes.byref(self._problem), ctypes.byref(self._schedule), *pointers)

    def __call__(self) -> NDArray[np.uint8]:
        """Compute. Raises Impossible if the program refuses, MemoryError."""
        answer = self._call(*self._arguments)
        if answer == _OUT_OF_MEMORY:
            raise MemoryError("no memory for the packed input")
        if answer != _DONE:
            raise Impossible("this CPU lacks the instructions" if answer == _NO_INSTRUCTIONS else "does not apply")
        return self.y


def check(conv: Convolution, values: Mapping[str, int]) -> None:
    """Raise Impossible where a schedule does not apply to a convolution, ValueError for an unknown knob or value."""
    for knob, known in KNOBS.items():
        if values.get(knob) not in known:
            raise ValueError(f"{knob}={values.get(knob)!r}: the knob has the values {', '.join(map(str, known))}")
    if values["pack"] == 0 and values["layout"] != 0:
        raise Impossible("an input that is read where it lies keeps its layout")
    if conv.filters % (_LANES * values["cols"]):
        raise Impossible(f"{conv.filters} filters are no multiple of {_LANES * values['cols']}")
    if conv.channels % (values["passes"] * 8 * _STEP_BYTES // conv.bits):
        raise Impossible(f"{conv.channels} channels do not divide into {values['passes']} passes")


def nibbles(a: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Numbers of 4 bits [..., C], C whole eights, two a byte [..., C / 2]: of eight the first four are low nibbles."""
    eights = (a.astype(np.int16) & 0xF).astype(np.uint8).reshape(*a.shape[:-1], -1, 2, _STEP_BYTES)
    return (eights[..., 0, :] | eights[..., 1, :] << np.uint8(4)).reshape(*a.shape[:-1], -1).astype(np.uint8)


def packed_weight(w: NDArray[np.int8], bits: int, cols: int, passes: int) -> NDArray[np.uint8]:
    """Weights [F, kernel, kernel, C] in the order in which the program reads them (``conv.cpp``)."""
    bytes_ = nibbles(w) if bits == 4 else w.view(np.uint8)
    filters, taps = len(w), w.shape[1] * w.shape[2]
    split = bytes_.reshape(filters // (cols * _LANES), cols, _LANES, taps, passes, -1, _STEP_BYTES)
    #                      0: tile                    1     2       3     4       5   6
    return np.ascontiguousarray(split.transpose(0, 4, 3, 5, 1, 2, 6)).reshape(-1)


def settings_of(conv: Convolution) -> dict[str, int]:
    """The convolution's sizes, for a record."""
    return {**asdict(conv), "macs": conv.macs}
