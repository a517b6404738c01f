/* Attention from a few new columns to all columns in the KV cache, for CPUs with AVX2.

   Query heads that share keys read them together. The result of a column depends neither on the other new columns nor on the number
   of threads. */

#include "library.h"
#include <math.h>
#include <string.h>

#define TOGETHER 4 /* query heads that share a pass through keys and values */
#define PIECE 64   /* columns whose values are read several times in a row, so they stay in the CPU's fastest cache */

/* Read eight numbers in float32 or bf16. */
static inline __m256 eight(const void *from, int64_t at, int bf16)
{
    if (!bf16)
        return _mm256_loadu_ps((const float *)from + at);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* Compute some heads of one column. `heads` and `bf16` are constants. */
static inline __attribute__((always_inline)) void attend(
    int heads, int bf16, const float *queries, const void *keys, const void *values, const float *bias, float *scores, float *y,
    int64_t columns, int64_t dim)
{
    __m256 sum[TOGETHER];
    float scale = 1 / sqrtf(dim);
    for (int64_t k = 0; k < columns; k++) {
        for (int h = 0; h < heads; h++)
            sum[h] = _mm256_setzero_ps();
        for (int64_t d = 0; d < dim; d += 8) {
            __m256 key = eight(keys, k * dim + d, bf16);
            for (int h = 0; h < heads; h++)
                sum[h] = _mm256_fmadd_ps(key, _mm256_loadu_ps(queries + h * dim + d), sum[h]);
        }
        for (int h = 0; h < heads; h++)
            scores[h * columns + k] = scale * total(sum[h]) + (bias ? bias[k] : 0);
    }
    for (int h = 0; h < heads; h++) { /* softmax */
        float *score = scores + h * columns, largest = -INFINITY, all = 0;
        for (int64_t k = 0; k < columns; k++)
            largest = fmaxf(largest, score[k]);
        for (int64_t k = 0; k < columns; k++)
            all += score[k] = expf(score[k] - largest);
        for (int64_t k = 0; k < columns; k++)
            score[k] /= all;
    }
    memset(y, 0, heads * dim * sizeof(float));
    for (int64_t first = 0; first < columns; first += PIECE) {
        int64_t last = first + PIECE < columns ? first + PIECE : columns;
        for (int64_t d = 0; d < dim; d += 8) {
            for (int h = 0; h < heads; h++)
                sum[h] = _mm256_loadu_ps(y + h * dim + d);
            for (int64_t k = first; k < last; k++) {
                __m256 value = eight(values, k * dim + d, bf16);
                for (int h = 0; h < heads; h++)
                    sum[h] = _mm256_fmadd_ps(value, _mm256_broadcast_ss(scores + h * columns + k), sum[h]);
            }
            for (int h = 0; h < heads; h++)
                _mm256_storeu_ps(y + h * dim + d, sum[h]);
        }
    }
}

#define CASE(heads)                                                                             \
    case heads:                                                                                 \
        if (bf16)                                                                               \
            attend(heads, 1, queries, keys, values, bias, scores, y, columns, dim);             \
        else                                                                                    \
            attend(heads, 0, queries, keys, values, bias, scores, y, columns, dim);             \
        break;

static void attend_some(int64_t heads, int bf16, const float *queries, const void *keys, const void *values, const float *bias,
                        float *scores, float *y, int64_t columns, int64_t dim)
{
    switch (heads) {
        CASE(1)
        CASE(2)
        CASE(3)
        CASE(4)
    }
}

void evoprune_attend(const float *queries, const Columns *cache, const float *bias, float *scores, float *y, int64_t rows,
                     int64_t heads, int64_t dim, int threads)
{
    int64_t shared = heads / cache->heads, parts = (shared + TOGETHER - 1) / TOGETHER, tasks = cache->heads * parts;
    int64_t bytes = cache->stride * (cache->bf16 ? 2 : 4);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < rows * tasks; task++) {
        int64_t row = task / tasks, kv_head = task % tasks / parts, first = task % parts * TOGETHER;
        int64_t some = shared - first < TOGETHER ? shared - first : TOGETHER, head = row * heads + kv_head * shared + first;
        attend_some(some, cache->bf16, queries + head * dim, (const char *)cache->keys + kv_head * bytes,
                    (const char *)cache->values + kv_head * bytes, bias, scores + head * cache->count, y + head * dim,
                    cache->count - rows + row + 1, dim);
    }
}
