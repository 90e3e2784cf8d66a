// How far ahead the products read weights; prefetch.py measures what is best and sets it.

#include <atomic>

#include "common.h"
#include "gemm.h"

namespace reqat {
namespace {

constexpr int GROUPS = 4;  // passes of 1, 2, 4 and 8 rows

constexpr int64_t packed(Ahead ahead) { return int64_t(ahead.far) << 32 | ahead.near; }

// One row of x keeps pace with memory and wants it plain; more rows leave gaps, in which the second cache is filled.
// Atomic because another thread may be multiplying while a schedule is set; both halves change together.
constexpr int64_t PLAIN = packed({4096, 0}), DEEP = packed({512, 8192});
std::atomic<int64_t> schedules[2][GROUPS] = {{PLAIN, DEEP, DEEP, DEEP}, {PLAIN, PLAIN, PLAIN, PLAIN}};

int group_of(int rows) { return rows == 1 ? 0 : rows == 2 ? 1 : rows == 4 ? 2 : 3; }

}  // namespace

Ahead ahead_of(Path path, int rows) {
    const int64_t both = schedules[path][group_of(rows)].load(std::memory_order_relaxed);
    return {int32_t(both), int32_t(both >> 32)};
}

}  // namespace reqat

// `path`: 0 integers, 1 bfloat16; `rows`: 1, 2, 4 or 8; distances in bytes, 0 <= near, far < 2^20. prefetch.py checks.
REQAT_API void reqat_set_ahead(int path, int rows, int near, int far) {
    reqat::schedules[path][reqat::group_of(rows)].store(reqat::packed({near, far}), std::memory_order_relaxed);
}

REQAT_API void reqat_get_ahead(int path, int rows, int* out) {
    const reqat::Ahead ahead = reqat::ahead_of(reqat::Path(path), rows);
    out[0] = ahead.near;
    out[1] = ahead.far;
}
