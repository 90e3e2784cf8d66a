"""The one thing that pyproject.toml cannot say: the native library of reqat_kernels, built if there is a compiler.

It is a plain shared library that Python opens through ctypes, so it needs neither torch's nor Python's headers, and
one file serves every CPU of an architecture: each kernel chooses its instruction set when it runs. Without a C++
compiler the installation goes on and the kernels fall back to PyTorch (`reqat doctor` says which).
"""

import runpy

from setuptools import Extension, setup

NATIVE = "kernels/reqat_kernels/native"
FINGERPRINT = runpy.run_path(f"{NATIVE}/fingerprint.py")["fingerprint"]()
FILES = [f"{NATIVE}/{path.name}" for path in runpy.run_path(f"{NATIVE}/fingerprint.py")["sources"]()]

# No contraction of a * b + c: the kernels round exactly where the reference does. Nobody reads the flags of
# floating-point exceptions (no-trapping-math), so loops with a choice in them may vectorize; no value changes.
ROUNDING = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

setup(
    ext_modules=[
        Extension(
            "reqat_kernels._native",
            sources=[file for file in FILES if file.endswith(".cpp")],
            depends=[file for file in FILES if file.endswith(".h")],
            define_macros=[("REQAT_FINGERPRINT", FINGERPRINT)],
            language="c++",
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fopenmp", *ROUNDING],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
