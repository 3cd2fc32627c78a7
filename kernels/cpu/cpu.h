// Vectors of floats for decode_cpu.c and train_cpu.c: GCC's and clang's vector extension, no intrinsics, so that one
// source serves AVX-512, AVX2, SSE and NEON. kernels/cpu/__init__.py compiles it with -O3 -march=native
// -ffp-contract=fast (a b + c is one instruction with one rounding, in every loop alike) and without -ffast-math: sums
// keep their order, NaN and -inf their meaning.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ALL(x) {ALL4(x), ALL4(x), ALL4(x), ALL4(x)}
#elif defined(__AVX__)
#define LANES 8
#define ALL(x) {ALL4(x), ALL4(x)}
#else
#define LANES 4                                     // NEON, SSE
#define ALL(x) {ALL4(x)}
#endif
#define NV (16 / LANES)                             // vectors in 16 floats
#define ALL4(x) x, x, x, x
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const anywhere *)p; }
INLINE vec all(float x) { return (vec)ALL(x); }      // one load that fills a vector
// bf16 is the upper half of an fp32: widening is exact
INLINE vec widen(const uint16_t *p) {
    return (vec)(__builtin_convertvector(*(const halves *)p, uvec) << 16);
}
INLINE void store(float *p, vec v) { *(anywhere *)p = v; }
INLINE vec pick(ivec where, vec a, vec b) { return (vec)(((ivec)a & where) | ((ivec)b & ~where)); }

// e^x for x <= 0, relative error below 2e-7 (tests/test_cpu_decode.py); 0 below -87, NaN for NaN. x = n ln 2 + r, and
// e^r by the polynomial of Cephes' expf; adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
INLINE vec exp_negative(vec x) {
    const vec zero = {0};
    vec big = zero + 12582912.0f, shifted = x * 1.44269504088896341f + big, n = shifted - big;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec scale = (vec)(((ivec)shifted << 23) + 0x3f800000);          // 2^n
    return pick(x < -87.0f, zero, p * scale);
}

INLINE float sum_of(vec v) {
    float total = v[0];
    for (int i = 1; i < LANES; i++) total += v[i];
    return total;
}
