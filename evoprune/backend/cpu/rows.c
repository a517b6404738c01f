/* Products of a few rows with 8-bit and 4-bit weights, for CPUs with AVX2: y[r][n] is the sum of x[r][k] * weights[n][k].

   A single row takes as long as reading the weights. PyTorch's products read several rows of weights at the same time, which is
   slower, because the CPU prefetches memory best if it is read in order. The order of a sum depends neither on the number of rows
   nor on the number of threads.

   Without a compiler, evoprune is installed without the compiled library (see compiled.py). */

#include "library.h"

#define AHEAD 1024 /* bytes between the weights in use and those to load into the cache */
#define LONG 8192  /* a row of this length is multiplied by two rows of weights at a time */
#define MOST 4     /* rows that share a pass through the weights */

/* --- 8 bits: one scale for each row of weights --- */

static inline __m256 floats(const int8_t *weights)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)weights)));
}

/* Multiply `rows` rows, a constant, by one row of weights. `length` is a multiple of 16. */
static inline __attribute__((always_inline)) void products(
    int rows, const float *x, const int8_t *weights, float scale, float *y, int64_t length, int64_t stride)
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
        y[r * stride] = scale * total(_mm256_add_ps(even[r], odd[r]));
}

/* Multiply one row by two rows of weights. A long row doesn't fit into the CPU's fastest cache, so it should be read only once. */
static void pair(const float *x, const int8_t *weights, const float *scale, float *y, int64_t length)
{
    const int8_t *other = weights + length;
    __m256 even[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, odd[2] = {even[0], even[0]};
    for (int64_t k = 0; k < length; k += 16) {
        __m256 first = _mm256_loadu_ps(x + k), second = _mm256_loadu_ps(x + k + 8);
        _mm_prefetch((const char *)weights + k + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)other + k + AHEAD, _MM_HINT_T0);
        even[0] = _mm256_fmadd_ps(floats(weights + k), first, even[0]);
        odd[0] = _mm256_fmadd_ps(floats(weights + k + 8), second, odd[0]);
        even[1] = _mm256_fmadd_ps(floats(other + k), first, even[1]);
        odd[1] = _mm256_fmadd_ps(floats(other + k + 8), second, odd[1]);
    }
    for (int i = 0; i < 2; i++)
        y[i] = scale[i] * total(_mm256_add_ps(even[i], odd[i]));
}

void evoprune_row_product(const float *x, const int8_t *weights, const float *scale, float *y, int64_t rows, int64_t length,
                          int64_t outputs, int64_t stride, int threads)
{
    if (rows == 1 && length >= LONG && outputs % 2 == 0) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t n = 0; n < outputs; n += 2)
            pair(x, weights + n * length, scale + n, y + n, length);
        return;
    }
    for (int64_t done = 0; done < rows; done += MOST, x += MOST * length, y += MOST * stride) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t n = 0; n < outputs; n++) {
            const int8_t *row = weights + n * length;
            switch (rows - done) {
            case 1: products(1, x, row, scale[n], y + n, length, stride); break;
            case 2: products(2, x, row, scale[n], y + n, length, stride); break;
            case 3: products(3, x, row, scale[n], y + n, length, stride); break;
            default: products(MOST, x, row, scale[n], y + n, length, stride);
            }
        }
    }
}

/* --- 4 bits: one scale for each block of 32 weights (four_bits.py describes the layout) --- */

/* The halves of 32 bytes: two blocks of weights. */
static inline void halves(const uint8_t *chunk, int pair, __m256i blocks[2])
{
    const __m256i low = _mm256_set1_epi8(15);
    __m256i both = _mm256_loadu_si256((const __m256i *)(chunk + pair * BLOCK));
    blocks[0] = _mm256_and_si256(both, low);
    blocks[1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
}

static inline __m256 scales(const uint8_t *chunk)
{
    __m128i bf16 = _mm_loadu_si128((const __m128i *)(chunk + BLOCKS * BLOCK / 2));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}

/* Round 16 numbers to bytes. */
static inline __m128i bytes(__m256 first, __m256 second)
{
    __m256i whole = _mm256_packs_epi32(_mm256_cvtps_epi32(first), _mm256_cvtps_epi32(second));
    whole = _mm256_permute4x64_epi64(whole, 0xD8);
    return _mm_packs_epi16(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
}

/* The sums of four neighboring products of 32 unsigned and 32 signed bytes. */
static inline __m256i quads(__m256i plain, const int8_t *with_sign)
{
    __m256i pairs = _mm256_maddubs_epi16(plain, _mm256_loadu_si256((const __m256i *)with_sign));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

/* Round a row to 8 bits in blocks. `shifts` make up for the 8 that each weight has too much. */
static void round_blocks(const float *x, int8_t *whole, float *steps, float *shifts, int64_t length, int64_t blocks)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t b = 0; b < blocks; b++, x += BLOCK, whole += BLOCK, length -= BLOCK) {
        float last[BLOCK] = {0};
        for (int64_t i = 0; length < BLOCK && i < length; i++)
            last[i] = x[i];
        const float *from = length < BLOCK ? last : x;
        __m256 v[4], largest = _mm256_set1_ps(1e-30f), invalid = _mm256_setzero_ps();
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(from + 8 * i);
            invalid = _mm256_add_ps(invalid, _mm256_sub_ps(v[i], v[i])); /* NaN if a number is NaN or infinite, otherwise 0 */
            largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, v[i]));
        }
        largest = _mm256_max_ps(largest, _mm256_permute2f128_ps(largest, largest, 1));
        largest = _mm256_max_ps(largest, _mm256_shuffle_ps(largest, largest, 0x4E));
        largest = _mm256_max_ps(largest, _mm256_shuffle_ps(largest, largest, 0xB1));
        __m256 factor = _mm256_div_ps(_mm256_set1_ps(127), largest);
        for (int i = 0; i < 4; i += 2)
            _mm_storeu_si128((__m128i *)(whole + 8 * i), bytes(_mm256_mul_ps(v[i], factor), _mm256_mul_ps(v[i + 1], factor)));
        steps[b] = _mm256_cvtss_f32(largest) / 127 + total(invalid);
        shifts[b] = -8 * steps[b] * total(_mm256_cvtepi32_ps(quads(_mm256_set1_epi8(1), whole)));
    }
}

/* Multiply `rows` rows, a constant, by one row of weights. */
static inline __attribute__((always_inline)) void products4(
    int rows, const int8_t *x, const float *steps, const float *shifts, const uint8_t *chunk, float *y, int64_t blocks, int64_t stride)
{
    __m256 sum[MOST], shift[MOST];
    for (int r = 0; r < rows; r++)
        sum[r] = shift[r] = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; b += BLOCKS, chunk += CHUNK) {
        __m256 scale = scales(chunk);
        float step[MOST][BLOCKS];
        for (int r = 0; r < rows; r++) {
            _mm256_storeu_ps(step[r], _mm256_mul_ps(scale, _mm256_loadu_ps(steps + r * blocks + b)));
            shift[r] = _mm256_fmadd_ps(scale, _mm256_loadu_ps(shifts + r * blocks + b), shift[r]);
        }
        _mm_prefetch((const char *)chunk + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)chunk + AHEAD + 64, _MM_HINT_T0);
        for (int pair = 0; pair < BLOCKS / 2; pair++) {
            __m256i weights[2];
            halves(chunk, pair, weights);
            for (int i = 0; i < 2; i++)
                for (int r = 0; r < rows; r++) {
                    int block = 2 * pair + i;
                    __m256i four = quads(weights[i], x + (r * blocks + b + block) * BLOCK);
                    sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(four), _mm256_broadcast_ss(&step[r][block]), sum[r]);
                }
        }
    }
    for (int r = 0; r < rows; r++)
        y[r * stride] = total(_mm256_add_ps(sum[r], shift[r]));
}

void evoprune_row_product4(const float *x, const uint8_t *weights, float *y, void *room, int64_t rows, int64_t length, int64_t outputs,
                           int64_t stride, int threads)
{
    int64_t chunks = CHUNKS(length), blocks = chunks * BLOCKS;
    float *steps = room, *shifts = steps + rows * blocks;
    int8_t *whole = (int8_t *)(shifts + rows * blocks);
    for (int64_t r = 0; r < rows; r++)
        round_blocks(x + r * length, whole + r * blocks * BLOCK, steps + r * blocks, shifts + r * blocks, length, blocks);
    for (int64_t done = 0; done < rows; done += MOST, y += MOST * stride) {
        const int8_t *some = whole + done * blocks * BLOCK;
        const float *step = steps + done * blocks, *shift = shifts + done * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t n = 0; n < outputs; n++) {
            const uint8_t *row = weights + n * chunks * CHUNK;
            switch (rows - done) {
            case 1: products4(1, some, step, shift, row, y + n, blocks, stride); break;
            case 2: products4(2, some, step, shift, row, y + n, blocks, stride); break;
            case 3: products4(3, some, step, shift, row, y + n, blocks, stride); break;
            default: products4(MOST, some, step, shift, row, y + n, blocks, stride);
            }
        }
    }
}

void evoprune_unpack4(const uint8_t *weights, const float *scale, int8_t *whole, int64_t length, int64_t outputs, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < outputs; n++) {
        const uint8_t *chunk = weights + n * CHUNKS(length) * CHUNK;
        float step[BLOCKS];
        for (int64_t b = 0; b < length / BLOCK; b++) {
            int block = b % BLOCKS;
            if (block == 0)
                _mm256_storeu_ps(step, scales(chunk));
            __m256 factor = _mm256_set1_ps(step[block] / scale[n]);
            __m256 below = _mm256_mul_ps(factor, _mm256_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1));
            __m256 above = _mm256_mul_ps(factor, _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7));
            __m256i table = _mm256_broadcastsi128_si256(bytes(below, above)), both[2];
            halves(chunk, block / 2, both);
            _mm256_storeu_si256((__m256i *)(whole + n * length + b * BLOCK), _mm256_shuffle_epi8(table, both[block % 2]));
            if (block == BLOCKS - 1)
                chunk += CHUNK;
        }
    }
}
