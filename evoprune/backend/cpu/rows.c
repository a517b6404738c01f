/* The product of a few rows with 8-bit weights, for CPUs with AVX2: y[r][n] = scale[n] * sum of x[r][k] * weights[n][k].

   A single row takes as long as reading the weights. PyTorch's product reads four rows of weights at the same time, which is slower,
   because the CPU prefetches memory best if it is read in order. The order of a sum depends neither on the number of rows nor on the
   number of threads.

   Without a compiler, evoprune is installed without the compiled library, and uses PyTorch's product (see rows.py). */

#include <immintrin.h>
#include <stdint.h>

#define AHEAD 1024 /* bytes between the weights in use and those to load into the cache */
#define MOST 4     /* rows that share a pass through the weights */

static inline float total(__m256 v)
{
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

static inline __m256 floats(const int8_t *weights)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)weights)));
}

/* Multiply `rows` rows, a constant, by one row of weights. `length` is a multiple of 16. */
static inline __attribute__((always_inline)) void products(
    int rows, const float *x, const int8_t *weights, float scale, float *y, int64_t length, int64_t outputs)
{
    __m256 even[MOST], odd[MOST];
    for (int r = 0; r < rows; r++)
        even[r] = odd[r] = _mm256_setzero_ps();
    for (int64_t k = 0; k < length; k += 16) {
        __m256 first = floats(weights + k), second = floats(weights + k + 8);
        _mm_prefetch((const char *)weights + k + AHEAD, _MM_HINT_T0);
        for (int r = 0; r < rows; r++) {
            even[r] = _mm256_fmadd_ps(first, _mm256_loadu_ps(x + r * length + k), even[r]);
            odd[r] = _mm256_fmadd_ps(second, _mm256_loadu_ps(x + r * length + k + 8), odd[r]);
        }
    }
    for (int r = 0; r < rows; r++)
        y[r * outputs] = scale * total(_mm256_add_ps(even[r], odd[r]));
}

void evoprune_row_product(
    const float *x, const int8_t *weights, const float *scale, float *y, int64_t rows, int64_t length, int64_t outputs, int threads)
{
    for (int64_t done = 0; done < rows; done += MOST, x += MOST * length, y += MOST * outputs) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t n = 0; n < outputs; n++) {
            const int8_t *row = weights + n * length;
            switch (rows - done) {
            case 1: products(1, x, row, scale[n], y + n, length, outputs); break;
            case 2: products(2, x, row, scale[n], y + n, length, outputs); break;
            case 3: products(3, x, row, scale[n], y + n, length, outputs); break;
            default: products(MOST, x, row, scale[n], y + n, length, outputs);
            }
        }
    }
}
