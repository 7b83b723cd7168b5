/* Folds and combinations of stored numbers in one pass over memory, where numpy takes six.

   The operations, and how each is rounded, are those of average.py and arithmetic.py (no fused multiply-add: compiled with
   -ffp-contract=off), so the bits are the same whether this was compiled or not. Whatever is not finite is left to numpy. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDEST
#endif
#define LANES 16   /* sums of their own, so that the sum does not depend on the width of the processor's vectors */
#define PART 1024  /* numbers whose sum over the checkpoints stays in the first cache */

static inline float same32(float v) { return v; }
static inline double same64(double v) { return v; }
static inline float wide16(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}
static inline uint16_t narrow16(float v) { /* to the nearest, ties to even; v is no NaN */
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* new = old + r (x - old). Returns the sum of (x - old)^2, which is not finite if anything is not. */
#define FOLD(NAME, STORED, NUMBER, WIDE)                                                             \
    WIDEST double NAME(const STORED *x, const NUMBER *old, NUMBER *new, size_t n, NUMBER r) {        \
        NUMBER sums[LANES] = {0};                                                                    \
        size_t i = 0;                                                                                \
        for (; i + LANES <= n; i += LANES)                                                           \
            for (size_t j = 0; j < LANES; j++) {                                                     \
                NUMBER d = WIDE(x[i + j]) - old[i + j];                                              \
                new[i + j] = old[i + j] + r * d;                                                     \
                sums[j] += d * d;                                                                    \
            }                                                                                        \
        for (; i < n; i++) {                                                                         \
            NUMBER d = WIDE(x[i]) - old[i];                                                          \
            new[i] = old[i] + r * d;                                                                 \
            sums[0] += d * d;                                                                        \
        }                                                                                            \
        double sum = 0;                                                                              \
        for (size_t j = 0; j < LANES; j++) sum += sums[j];                                           \
        return sum;                                                                                  \
    }

FOLD(fold_float32, float, float, same32)
FOLD(fold_float64, double, double, same64)
FOLD(fold_bfloat16, uint16_t, float, wide16)

/* out = base - sum of w (base - x), rounded to the stored type. Returns whether all that comes out is finite. */
#define COMBINE(NAME, STORED, NUMBER, WIDE, NARROW, LIMIT)                                           \
    WIDEST int NAME(const STORED *const *x, const NUMBER *w, size_t terms, const STORED *base,       \
                    STORED *out, size_t n) {                                                         \
        NUMBER b[PART], total[PART];                                                                 \
        int bad = 0;                                                                                 \
        for (size_t at = 0; at < n; at += PART) {                                                    \
            size_t m = n - at < PART ? n - at : PART;                                                \
            for (size_t i = 0; i < m; i++) b[i] = WIDE(base[at + i]), total[i] = 0;                  \
            for (size_t k = 0; k < terms; k++) {                                                     \
                const STORED *from = x[k] + at;                                                      \
                for (size_t i = 0; i < m; i++) total[i] += (b[i] - WIDE(from[i])) * w[k];            \
            }                                                                                        \
            for (size_t i = 0; i < m; i++) {                                                         \
                NUMBER v = b[i] - total[i];                                                          \
                bad |= !(v < (NUMBER)LIMIT && v > -(NUMBER)LIMIT);                                   \
                out[at + i] = NARROW(v);                                                             \
            }                                                                                        \
        }                                                                                            \
        return !bad;                                                                                 \
    }

COMBINE(combine_float32, float, float, same32, same32, INFINITY)
COMBINE(combine_float64, double, double, same64, same64, INFINITY)
COMBINE(combine_bfloat16, uint16_t, float, wide16, narrow16, 0x1.FFp127f) /* bfloat16 rounds this to infinity */
