"""The one thing that pyproject.toml cannot say: the native library of reqat_kernels, built if there is a compiler.

It is a plain shared library that Python opens through ctypes, so it needs neither torch's nor Python's headers, and
one file serves every CPU of an architecture: each kernel chooses its instruction set when it runs. Without a C++
compiler the installation goes on and the kernels fall back to PyTorch (`reqat doctor` says which).
"""

import glob

from setuptools import Extension, setup

NATIVE = "kernels/reqat_kernels/native"

setup(
    ext_modules=[
        Extension(
            "reqat_kernels._native",
            sources=sorted(glob.glob(f"{NATIVE}/*.cpp")),
            depends=sorted(glob.glob(f"{NATIVE}/*.h")),
            language="c++",
            # No contraction of a * b + c: the kernels round exactly where the reference does.
            extra_compile_args="-std=c++17 -O3 -g0 -fopenmp -ffp-contract=off -fno-math-errno".split(),
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
