/* The products in rows.c. x is [rows][length] and y is [rows][outputs], with `stride` numbers from one row of y to the next. */

#include <stdint.h>

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
