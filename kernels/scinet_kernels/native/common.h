/* What both operators need: the product that torch's own library offers, and an exponential that never slows down. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Compiled twice: for float, and with -DSCINET_DOUBLE for double. */
#ifdef SCINET_DOUBLE
typedef double real;
#else
typedef float real;
#endif

/* BLAS `gemm`, Fortran convention, found by `native.py` in the library that torch itself multiplies with. */
typedef void (*gemm_t)(const char *, const char *, const int *, const int *, const int *, const real *, const real *,
                       const int *, const real *, const int *, const real *, real *, const int *);

/* Row-major out[m, n] = (adds ? out : 0) + op(left) op(right), where op transposes if the letter is 'T'. */
static inline void multiply(gemm_t gemm, char left_op, char right_op, int64_t m, int64_t n, int64_t k,
                            const real *left, int64_t left_stride, const real *right, int64_t right_stride,
                            int adds, real *out, int64_t out_stride)
{
    const int rows = (int)m, columns = (int)n, inner = (int)k;
    /* rows without columns (D = 0) still need a stride that BLAS accepts */
    const int lda = left_stride > 0 ? (int)left_stride : 1, ldb = right_stride > 0 ? (int)right_stride : 1;
    const int ldc = out_stride > 0 ? (int)out_stride : 1;
    const real one = 1, beta = adds ? 1 : 0;
    if (m > 0 && n > 0)
        gemm(&right_op, &left_op, &columns, &rows, &inner, &one, right, &ldb, left, &lda, &beta, out, &ldc);
}

#ifdef SCINET_DOUBLE
static inline real exponential(real x) { return exp(x); }
#else
/* exp(x) for x <= 0, within 2 units in the last place; 0 where it would be subnormal. NaN stays NaN.
   Library exponentials keep subnormal results and take a slow path for them: with a narrow bandwidth, for most pairs. */
static inline float exponential(float x)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest whole number in the last bits */
    const float shifted = x * 1.44269504f + magic;
    const float whole = shifted - magic;
    float rest = x - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    float series = 1.9875691500e-4f;
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    uint32_t bits;
    float power;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : series * power;
}
#endif
