// What the native kernels share: choosing an instruction set, threads, and conversions that round where torch does.
//
// Every kernel is written once in portable C++ and again with intrinsics where that pays. The variants agree bit for
// bit in what they round (codes, scales, integer sums); which one runs is decided once, by `isa()`.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#define REQAT_X86 1
#define REQAT_AVX2 __attribute__((target("avx2,fma,f16c,bmi2")))
#define REQAT_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16,fma,f16c,bmi2")))
#if __has_include(<avxvnniintrin.h>)
#define REQAT_AVXVNNI __attribute__((target("avx2,fma,f16c,bmi2,avxvnni")))
#endif
// Tile instructions (tiles.h): written in assembly, which assemblers of compilers with this header know.
#if (__has_include(<amxbf16intrin.h>) && defined(__linux__)) || defined(REQAT_TILE_TWIN)
#define REQAT_AMX 1
#endif
#else
#define REQAT_X86 0
#endif

// For short loops that compilers vectorize: compiled for each instruction set, with the same bits from all of them (no
// contraction, no reordering of sums), and chosen by the loader.
#if REQAT_X86 && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__)
#define REQAT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define REQAT_CLONES
#endif

#define REQAT_API extern "C" __attribute__((visibility("default")))

namespace reqat {

// Mirrored in reqat_kernels/isas.py. Each has what those before it have, but for AVX512, which some CPUs have without
// AVXVNNI; no kernel with AVX-512 instructions uses it. So kernels ask for `isa() >= AVX512`.
enum Isa : int { PORTABLE = 0, AVX2 = 1, AVXVNNI = 2, AVX512 = 3, AMX = 4 };

// Why an instruction set cannot be used. Mirrored in isas.py.
enum Lack : int { NOTHING = 0, NO_CPU = 1, NO_STATE = 2, NO_PERMISSION = 3, NO_COMPILER = 4 };

// Looked up once for each set, when it is first asked for: AMX needs a permission of the Linux kernel, which is for the
// whole process and enlarges what signal handlers need, so nobody asks who does not want it.
Lack lack(int isa);

// The best instruction set that can be used and that reqat_limit_isa allows.
int isa();

// What entry points return where they can fail. No exception may leave them: their callers are not C++.
enum Status : int { OK = 0, NO_MEMORY = 1, NOT_FINITE = 2, BAD_GLOBAL_SCALE = 3 };

// Floating point as IEEE 754 has it for as long as this lives: to the nearest, subnormals kept. Callers may have flushed
// subnormals to zero (torch.set_flush_denormal, libraries built with -ffast-math), and so may the threads that they
// started; a block's scale of 2^-127 would then be zero. The caller's mode comes back at the end. Where the mode is the
// ordinary one already this reads a register and no more.
class FloatMode {
  public:
#if REQAT_X86
    FloatMode() {
        asm volatile("stmxcsr %0" : "=m"(before));
        // All but the six flags of exceptions: these say what has happened, not how to compute.
        if ((before & ~0x3Fu) != ORDINARY) write(ORDINARY);
    }
    ~FloatMode() {
        if ((before & ~0x3Fu) != ORDINARY) write(before);
    }

  private:
    static constexpr uint32_t ORDINARY = 0x1F80;
    static void write(uint32_t mode) { asm volatile("ldmxcsr %0" : : "m"(mode) : "memory"); }
    uint32_t before;
#elif defined(__aarch64__)
    FloatMode() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        if (before & CHANGES) write(before & ~CHANGES);
    }
    ~FloatMode() {
        if (before & CHANGES) write(before);
    }

  private:
    static constexpr uint64_t CHANGES = 0x1C80003;  // FZ, RMode, FZ16; FIZ and AH
    static void write(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
    uint64_t before;
#else
    FloatMode() {}
    ~FloatMode() {}

  private:
#endif
    FloatMode(const FloatMode&) = delete;
    FloatMode& operator=(const FloatMode&) = delete;
};

// Compute in the ordinary FloatMode. Not inlined, so that no operation moves in front of the change of mode.
template <class Function>
__attribute__((noinline)) auto computed(const Function& function) {
    return function();
}

template <class Function>
auto in_float_mode(const Function& function) {
    const FloatMode mode;
    return computed(function);
}

template <class Function>
int guarded(Function&& function) {
    try {
        return in_float_mode(function);
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (const std::length_error&) {  // more than a vector can ever hold
        return NO_MEMORY;
    }
}

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float bf16_to_float(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// E4M3 (fn, bias 7) of a non-negative scale: its bits become float32's by a shift and a change of bias. Subnormals
// come out right because the multiplication normalizes them (denormals-are-zero is off: see FloatMode).
inline float e4m3_to_float(uint8_t bits) { return bits_to_float(uint32_t(bits & 0x7F) << 20) * 0x1p120f; }

// E8M0: 2^(bits - 127); 0 is the subnormal 2^-127.
inline float e8m0_to_float(uint8_t bits) { return bits ? bits_to_float(uint32_t(bits) << 23) : 0x1p-127f; }

}  // namespace reqat
