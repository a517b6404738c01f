/* What the files of the compiled library share. */

#include <immintrin.h>
#include <stdint.h>

static inline float total(__m256 v)
{
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

/* --- rows.c: x is [rows][length] and y is [rows][outputs], with `stride` numbers from one row of y to the next --- */

#define BLOCK 32                               /* weights in a block of 4-bit weights */
#define BLOCKS 8                               /* blocks in a chunk */
#define CHUNK (BLOCKS * (BLOCK / 2 + 2))       /* bytes of a chunk */
#define CHUNKS(length) (((length) + BLOCK * BLOCKS - 1) / (BLOCK * BLOCKS))
#define ROOM4(length) (CHUNKS(length) * BLOCKS * (BLOCK + 8)) /* bytes of working memory for each row with 4-bit weights */

/* 8-bit weights, [outputs][length], and the scale of each output. `length` is a multiple of 16. */
void evoprune_row_product(const float *x, const int8_t *weights, const float *scale, float *y, int64_t rows, int64_t length,
                          int64_t outputs, int64_t stride, int threads);

/* 4-bit weights in chunks, [outputs][CHUNKS(length)]. `room` is working memory, ROOM4(length) bytes for each row. */
void evoprune_row_product4(const float *x, const uint8_t *weights, float *y, void *room, int64_t rows, int64_t length, int64_t outputs,
                           int64_t stride, int threads);

/* Unpack 4-bit weights to 8 bits: weights[n][k] is about scale[n] * whole[n][k]. `length` is a multiple of 32. */
void evoprune_unpack4(const uint8_t *weights, const float *scale, int8_t *whole, int64_t length, int64_t outputs, int threads);

/* --- attention.c --- */

/* A layer's keys and values in the KV cache, [heads][count][dim], with `stride` numbers from one head to the next. */
typedef struct {
    void *keys, *values;
    int64_t heads, count, stride;
    int bf16; /* whether they are in bf16 rather than in float32 */
} Columns;

/* Attention from the last `rows` columns. queries, y: [rows][heads][dim]. bias: for each column, or NULL. scores: working memory,
   `heads * count` numbers for each row. `dim` is a multiple of 8. */
void evoprune_attend(const float *queries, const Columns *cache, const float *bias, float *scores, float *y, int64_t rows,
                     int64_t heads, int64_t dim, int threads);
