/* Folds and combinations of stored numbers in one pass over memory, where numpy takes six.

   The operations, and how each is rounded, are those of average.py and arithmetic.py (no fused multiply-add: compiled with
   -ffp-contract=off), so the bits are the same whether this was compiled or not. Whatever is not finite is left to numpy. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) && defined(__GNUC__)
#define STREAMS 1
#include <immintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDEST
#endif
#define LANES 16   /* sums of their own, so that the sum does not depend on the width of the processor's vectors */
#define PART 1024  /* numbers whose sum over the checkpoints stays in the first cache */
#define TURN 16384 /* numbers of one average, before the next one: `x` stays in the second cache, and memory sees long runs */
#define MOST 16    /* averages whose sums are under way at once */

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

/* new = old + r (x - old), for each of several averages. sums: of (x - old)^2, not finite if anything is not.
   With `made`, which is the same, stays in the cache and is where the checksum is taken, `new` goes past it where that is
   possible: `x` and the others stay. Without, as for a single one, that is no gain. */
#define FOLD(NAME, STORED, NUMBER, WIDE, PAST)                                                       \
    WIDEST static void NAME##_here(const STORED *restrict x, const NUMBER *restrict old,             \
                                   NUMBER *restrict new, size_t n, NUMBER r, NUMBER *restrict sums) {\
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
    }                                                                                                \
    void NAME(const STORED *x, const NUMBER *const *old, NUMBER *const *new, NUMBER *const *made,    \
              const NUMBER *r, double *sums, size_t averages, size_t n) {                            \
        for (size_t from = 0; from < averages; from += MOST) {                                       \
            size_t to = averages - from < MOST ? averages : from + MOST;                             \
            NUMBER lanes[MOST][LANES] = {{0}};                                                       \
            for (size_t at = 0; at < n; at += TURN)                                                  \
                for (size_t k = from; k < to; k++) {                                                 \
                    size_t m = n - at < TURN ? n - at : TURN, done = 0;                              \
                    if (made) {                                                                      \
                        PAST(x + at, old[k] + at, new[k] + at, made[k] + at, m, r[k], lanes[k - from]) \
                    }                                                                                \
                    NAME##_here(x + at + done, old[k] + at + done, new[k] + at + done, m - done,     \
                                r[k], lanes[k - from]);                                              \
                    if (made) memcpy(made[k] + at + done, new[k] + at + done, (m - done) * sizeof(NUMBER)); \
                }                                                                                    \
            for (size_t k = from; k < to; k++) {                                                     \
                sums[k] = 0;                                                                         \
                for (size_t j = 0; j < LANES; j++) sums[k] += lanes[k - from][j];                    \
            }                                                                                        \
        }                                                                                            \
    }

#ifdef STREAMS
#define AHEAD 512 /* numbers: memory is asked for `old` so much before it is needed */
#define WIDE8_float(at) _mm256_loadu_ps(at)
#define WIDE8_uint16_t(at) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(at))), 16))

/* The same with stores that go past the cache. Returns how many numbers it did: whole lanes. */
#define FOLD_PAST(STORED)                                                                            \
    __attribute__((target("avx2"))) static size_t past_##STORED(                                     \
        const STORED *x, const float *old, float *new, float *made, size_t n, float r, float *sums) {\
        __m256 rate = _mm256_set1_ps(r), s[2] = {_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8)};  \
        size_t i = 0;                                                                                \
        for (; i + LANES <= n; i += LANES) {                                                         \
            _mm_prefetch((const char *)(old + i) + AHEAD * sizeof(float), _MM_HINT_T0);              \
            for (size_t j = 0; j < 2; j++) {                                                         \
                __m256 a = _mm256_loadu_ps(old + i + 8 * j), d = _mm256_sub_ps(WIDE8_##STORED(x + i + 8 * j), a); \
                __m256 v = _mm256_add_ps(a, _mm256_mul_ps(rate, d));                                 \
                _mm256_storeu_ps(made + i + 8 * j, v);                                               \
                _mm256_stream_ps(new + i + 8 * j, v);                                                \
                s[j] = _mm256_add_ps(s[j], _mm256_mul_ps(d, d));                                     \
            }                                                                                        \
        }                                                                                            \
        _mm256_storeu_ps(sums, s[0]), _mm256_storeu_ps(sums + 8, s[1]);                              \
        _mm_sfence();                                                                                \
        return i;                                                                                    \
    }
FOLD_PAST(float)
FOLD_PAST(uint16_t)
#define PAST(STORED)                                                                                 \
    if ((uintptr_t)(new[k] + at) % 32 == 0 && __builtin_cpu_supports("avx2")) done = past_##STORED
#define PAST_FLOAT(...) PAST(float)(__VA_ARGS__);
#define PAST_UINT16(...) PAST(uint16_t)(__VA_ARGS__);
#else
#define PAST_FLOAT(...)
#define PAST_UINT16(...)
#endif
#define NEVER(...)

FOLD(fold_float32, float, float, same32, PAST_FLOAT)
FOLD(fold_float64, double, double, same64, NEVER)
FOLD(fold_bfloat16, uint16_t, float, wide16, PAST_UINT16)

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
