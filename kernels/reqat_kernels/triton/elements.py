"""Device functions: float32 to FP4 and E4M3 codes and back, and the rules for block scales, bit-equal to reqat.formats.

One trick does all the rounding. A small float with m mantissa bits is evenly spaced within a binade, by 2^(e - m);
below its smallest normal exponent the spacing stays. Adding M = 2^(23 - m) * 2^e to a magnitude makes the adder round
it to that spacing, ties to even, and *the low bits of the sum are the count of spacings*:
with n = bits(a + M) - bits(M),

    code = n + (e - emin) * 2^m          E2M1: m 1, emin 0    E1M2: m 2, emin 1    E4M3: m 3, emin -6

and a carry into the next binade comes out right by itself. There is no table, no comparison chain, and no conversion
instruction: the interpreter's casts are wrong (f32 to bf16 truncates, f32 to E4M3 does not tie to even), sm_80 has no
E4M3 and sm_90 no E2M1 conversion, so integer arithmetic is also what runs everywhere alike.

Divisions are ``tl.div_rn``: a plain ``/`` is an approximation on a GPU and the reference's is IEEE's. Kernels that
promise bits are launched with ``enable_fp_fusion=False``, so that no ``a * b + c`` loses a rounding.

Non-finite input: the codes are garbage; callers check (see quantize.py). Zeros: a negative zero keeps its sign in the
code; both zero codes decode to +0.0.
"""

from __future__ import annotations

from reqat_kernels.triton.runtime import tl, triton

# Everything here is called from kernels only; x, a, s, ... are blocks of any shape.


@triton.jit
def float_bits(x):
    """The bits of float32 ``x`` as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def bits_float(bits):
    """The float32 whose bits are int32 ``bits``."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_float32(x):
    """float16, bfloat16 or float32 ``x`` as float32, exactly (bfloat16 by a shift)."""
    if x.dtype == tl.bfloat16:
        x = bits_float(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return x.to(tl.float32)


@triton.jit
def round_to_bfloat16(x):
    """float32 ``x`` rounded to a bfloat16, ties to even, still as float32. NaN stays NaN, overflow becomes infinity."""
    bits = float_bits(x)
    rounded = bits_float((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)
    return tl.where(x == x, rounded, x)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 ``x`` as ``dtype``, rounded to nearest even in the interpreter too."""
    if dtype == tl.bfloat16:  # by its bits: the interpreter's conversion also loses subnormals
        return (float_bits(round_to_bfloat16(x)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _count(a, m: tl.constexpr, emin: tl.constexpr):
    """The code (int32) of a magnitude ``a`` >= 0 in a float of ``m`` mantissa bits; ``a`` must be in range."""
    exponent = tl.maximum((float_bits(a) >> 23) - 127, emin)
    magic = (exponent + (150 - m)) << 23  # the bits of 2^(exponent + 23 - m)
    return float_bits(a + bits_float(magic)) - magic + ((exponent - emin) << m)


@triton.jit
def encode_e2m1(y):
    """E2M1 codes (int32, 0..15) of float32 ``y``: nearest even, saturating at 6, the sign of zero kept."""
    bits = float_bits(y)
    a = tl.minimum(bits_float(bits & 0x7FFFFFFF), 6.0)
    return _count(a, 1, 0) | ((bits >> 28) & 8)


@triton.jit
def encode_e1m2(y):
    """E1M2 codes (int32, 0..15) of float32 ``y``: nearest even, saturating at 3.5, the sign of zero kept."""
    bits = float_bits(y)
    a = tl.minimum(bits_float(bits & 0x7FFFFFFF), 3.5)
    return _count(a, 2, 1) | ((bits >> 28) & 8)


@triton.jit
def encode_element(y, E1M2: tl.constexpr):
    """:func:`encode_e1m2` or :func:`encode_e2m1`."""
    if E1M2:
        return encode_e1m2(y)
    else:
        return encode_e2m1(y)


@triton.jit
def decode_e2m1(code):
    """float32 values of E2M1 codes (any integer type, 0..15)."""
    code = code.to(tl.int32)
    index = code & 7
    a = tl.where(index < 2, index.to(tl.float32) * 0.5, bits_float((index + 252) << 22))
    return tl.where(code > 8, -a, a)


@triton.jit
def decode_e1m2(code):
    """float32 values of E1M2 codes (any integer type, 0..15)."""
    code = code.to(tl.int32)
    a = (code & 7).to(tl.float32) * 0.5
    return tl.where(code > 8, -a, a)


@triton.jit
def decode_element(code, E1M2: tl.constexpr):
    """:func:`decode_e1m2` or :func:`decode_e2m1`."""
    if E1M2:
        return decode_e1m2(code)
    else:
        return decode_e2m1(code)


@triton.jit
def decode_element_fp16(code, E1M2: tl.constexpr):
    """float16 values of codes (int16, 0..15), in three integer operations and a multiplication; code 8 becomes -0.0.

    The three low bits, moved to the top of float16's mantissa, are the element up to a power of two: E2M1's exponent
    field is float16's, zero and subnormal included, and E1M2's numbers are evenly spaced.
    """
    if E1M2:
        # 1024 + n is exact in float16, and its mantissa is n.
        a = (((code & 7) | 0x6400).to(tl.float16, bitcast=True) - 1024.0) * 0.5
        return tl.where(code < 8, a, -a)
    else:
        bits = ((code & 7) << 9) | ((code & 8) << 12)
        return bits.to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def encode_e4m3(x):
    """E4M3 bits (int32, 0..255) of float32 ``x``: nearest even, saturating at 448, subnormals included."""
    bits = float_bits(x)
    a = tl.minimum(bits_float(bits & 0x7FFFFFFF), 448.0)
    return _count(a, 3, -6) | ((bits >> 24) & 128)


@triton.jit
def decode_e4m3(code):
    """float32 values of E4M3 bits (any integer type, 0..255). The two NaN codes, never stored, decode to +-480."""
    code = code.to(tl.int32)
    index = code & 127
    a = tl.where(index < 8, index.to(tl.float32) * 0.001953125, bits_float((index + 960) << 20))  # 2^-9, (120 << 3)
    return tl.where(code > 128, -a, a)


@triton.jit
def decode_e8m0(code):
    """float32 ``2^(code - 127)`` of E8M0 bytes (any integer type, 0..254); 0 is the subnormal 2^-127."""
    return bits_float(tl.maximum(code.to(tl.int32) << 23, 0x400000))


@triton.jit
def encode_e8m0(amax, RULE: tl.constexpr, E1M2: tl.constexpr):
    """E8M0 bytes (int32, 0..254) of float32 block maxima, by ``rceil``, ``floor`` or ``even`` (see reqat.formats)."""
    if RULE == "rceil":
        quotient = tl.div_rn(amax, 3.5 if E1M2 else 6.0)
        # Below 2^-126 bits are no exponents. Up to 2^-127 the answer is 0; from there on the carry does the rest.
        bits = float_bits(tl.where(quotient > 5.877471754111438e-39, quotient, 0.0))
        return (bits + 0x7FFFFF) >> 23
    else:
        bits = float_bits(amax)
        if RULE == "even":  # carry where the element's own rounding would: mantissa 1.75 (E2M1), 1.875 (E1M2)
            bits += 1 << (20 if E1M2 else 21)
        return tl.maximum((bits >> 23) - (1 if E1M2 else 2), 0)


@triton.jit
def nvfp4_global_scale(amax, E1M2: tl.constexpr, RULE: tl.constexpr):
    """``g`` of a tensor's or row's amax: ``448 * emax * (1 / amax)`` in two roundings, 1 for amax 0, finite.

    Under ``reciprocal`` ``1 / (amax / (448 * emax))``.
    """
    TOP: tl.constexpr = 1568.0 if E1M2 else 2688.0
    t = tl.where(amax == 0, TOP, amax)
    g = tl.div_rn(1.0, tl.div_rn(t, TOP)) if RULE == "reciprocal" else tl.div_rn(1.0, t) * TOP
    return tl.where(amax == 0, 1.0, tl.minimum(g, 3.4028234663852886e38))


@triton.jit
def nvfp4_scale_bits(amax, g, E1M2: tl.constexpr, RULE: tl.constexpr):
    """E4M3 bits (int32) of block scales for float32 block maxima and ``g``; a zero scale is stored as 0.125.

    RULE: ``divide``: ``(amax / emax) * g``; ``multiply``: ``amax * (g / emax)``; ``reciprocal``:
    ``(amax / emax) / (1 / g)``, at least 2^-6.
    """
    EMAX: tl.constexpr = 3.5 if E1M2 else 6.0
    if RULE == "multiply":
        t = amax * tl.div_rn(g, EMAX)
    elif RULE == "reciprocal":
        t = tl.maximum(tl.div_rn(tl.div_rn(amax, EMAX), tl.div_rn(1.0, g)), 0.015625)
    else:
        t = tl.div_rn(amax, EMAX) * g
    code = encode_e4m3(t)
    return tl.where(code == 0, 32, code)  # 32 is 0.125


@triton.jit
def nvfp4_effective_scale(s, g, RULE: tl.constexpr):
    """What a code is multiplied by, float32: ``s / g``; under ``reciprocal`` ``s * (1 / g)``."""
    if RULE == "reciprocal":
        return s * tl.div_rn(1.0, g)
    else:
        return tl.div_rn(s, g)


@triton.jit
def divide_by_scale(x, s, g, RULE: tl.constexpr):
    """``x / (s / g)``, or under ``reciprocal`` ``x * (g / s)``; float32 blocks that broadcast."""
    if RULE == "reciprocal":
        kept = tl.minimum(tl.div_rn(1.0, tl.div_rn(1.0, g)), 3.4028234663852886e38)
        return x * tl.minimum(tl.div_rn(kept, s), 3.4028234663852886e38)
    else:
        return tl.div_rn(x, tl.div_rn(s, g))


@triton.jit
def block_maxima(x, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Largest magnitude of each block of float32 ``x`` [ROWS, BLOCKS * BLOCK]: float32 [ROWS, BLOCKS].

    Compared as integers, whose order is that of the magnitudes, with infinity and NaN above all numbers.
    """
    magnitude = tl.reshape(float_bits(x) & 0x7FFFFFFF, (ROWS, BLOCKS, BLOCK))
    return bits_float(tl.max(magnitude, axis=2))


@triton.jit
def pack_pairs(code, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Codes (int32) [ROWS, 2 * BYTES] to uint8 [ROWS, BYTES]; the low nibble is the even column."""
    low, high = tl.split(tl.reshape(code, (ROWS, BYTES, 2)))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def unpack_pairs(packed, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """uint8 [ROWS, BYTES] to codes (uint8) [ROWS, 2 * BYTES]: the way back of :func:`pack_pairs`."""
    return tl.reshape(tl.join(packed & 0xF, packed >> 4), (ROWS, 2 * BYTES))


@triton.jit
def spread(s, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """One number a block, [ROWS, BLOCKS], repeated for each element: [ROWS, BLOCKS * BLOCK]."""
    wide = tl.broadcast_to(tl.expand_dims(s, 2), (ROWS, BLOCKS, BLOCK))
    return tl.reshape(wide, (ROWS, BLOCKS * BLOCK))


@triton.jit
def hadamard_butterfly(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Each group of SIZE float32 columns of ``x`` [ROWS, GROUPS * SIZE] times the normalized Sylvester Hadamard matrix.

    log2(SIZE) stages of sums and differences, neighbours first, then one multiplication by 1 / sqrt(SIZE); the order is
    fixed, so every device gives the same bits. A stage pairs the lowest bit of the index and moves it to the top, so
    all stages look alike and the last one leaves the natural order.
    """
    STAGES: tl.constexpr = (SIZE > 1) + (SIZE > 2) + (SIZE > 4) + (SIZE > 8) + (SIZE > 16) + (SIZE > 32) + (SIZE > 64)
    for _ in tl.static_range(STAGES):
        even, odd = tl.split(tl.reshape(x, (ROWS, GROUPS, SIZE // 2, 2)))
        x = tl.permute(tl.join(even + odd, even - odd), (0, 1, 3, 2))
    return tl.reshape(x, (ROWS, GROUPS * SIZE)) * (1.0 / SIZE**0.5)
