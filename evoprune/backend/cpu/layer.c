/* Quantized linear layers for CPUs with AVX2, and a whole decoder layer as one call.

   Reading the weights evicts everything else from the CPU's caches, so each call of PyTorch takes several times as long as usual. A
   layer makes about 40 of them. The results of a row depend neither on the other rows nor on the number of threads. */

#include "library.h"
#include <math.h>
#include <string.h>

/* Changes whenever a function's parameters or a structure change. See `LAYOUT` in compiled.py. */
const int evoprune_layout = 3;

typedef struct {
    const void *weights; /* 8-bit weights, or 4-bit weights in chunks */
    const float *scale;  /* of each output with 8-bit weights, otherwise NULL */
    const float *bias;   /* of each output, or NULL */
    const float *wide;   /* weights of the large inputs, [larges][outputs], which are zero in `weights` */
    const int64_t *large;
    int64_t larges, length, outputs;
} Linear;

typedef struct {
    Linear q, k, v, o, gate, up, down;
    const float *before, *after, *q_norm, *k_norm; /* weights of the norms; the latter two are NULL if there are none */
    int64_t dim;                                   /* of a head */
    float eps;
} Layer;

/* y = linear(x), with `stride` numbers from one row of y to the next. */
static void apply(const Linear *linear, const float *x, float *y, int64_t stride, int64_t rows, void *room, int threads)
{
    int64_t length = linear->length;
    if (linear->scale)
        evoprune_row_product(x, linear->weights, linear->scale, y, rows, length, linear->outputs, stride, threads);
    else { /* rows are rounded, so a large input would cost the others in its block precision */
        const float *from = x;
        float *rest = room;
        if (linear->larges) {
            from = memcpy(rest, x, rows * length * sizeof(float));
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < linear->larges; i++)
                    rest[r * length + linear->large[i]] = 0;
        }
        evoprune_row_product4(from, linear->weights, y, rest + rows * length, rows, length, linear->outputs, stride, threads);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *restrict to = y + r * stride;
        if (linear->bias)
            for (int64_t n = 0; n < linear->outputs; n++)
                to[n] += linear->bias[n];
        for (int64_t i = 0; i < linear->larges; i++) {
            const float *wide = linear->wide + i * linear->outputs, factor = x[r * length + linear->large[i]];
            for (int64_t n = 0; n < linear->outputs; n++)
                to[n] += factor * wide[n];
        }
    }
}

void evoprune_linear(const Linear *linear, const float *x, float *y, void *room, int64_t rows, int threads)
{
    apply(linear, x, y, linear->outputs, rows, room, threads);
}

/* RMS norm of one row. */
static void norm(const float *x, const float *weight, float *y, int64_t length, float eps)
{
    float sums[8] = {0}, sum = 0;
    for (int64_t i = 0; i < length; i += 8)
        for (int j = 0; j < 8; j++)
            sums[j] += x[i + j] * x[i + j];
    for (int j = 0; j < 8; j++)
        sum += sums[j];
    float factor = 1 / sqrtf(sum / length + eps);
    for (int64_t i = 0; i < length; i++)
        y[i] = x[i] * factor * weight[i];
}

/* Rotary embedding of one head, in place. */
static void rotate(float *x, const float *cos, const float *sin, int64_t dim)
{
    int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * cos[i] + second * sin[i];
        x[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

/* Write one head to place `at` of a tensor in float32 or bf16. */
static void put(const float *x, void *y, int64_t at, int64_t dim, int bf16)
{
    if (!bf16) {
        memcpy((float *)y + at, x, dim * sizeof(float));
        return;
    }
    uint16_t *to = (uint16_t *)y + at;
    for (int64_t i = 0; i < dim; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        uint32_t nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        to[i] = x[i] == x[i] ? nearest : 0x7FC0; /* NaN */
    }
}

/* Compute the layer's output, y, for new columns, and write their keys and values to the last places of the cache.

   x, y: [rows][hidden]. cos, sin: [rows][dim]; the first half of the sines is negated. bias: added to the scores of each column in
   the cache, or NULL. room: working memory (see `_room_bytes` in layer.py). */
void evoprune_layer(const Layer *layer, const float *x, const float *cos, const float *sin, const Columns *cache, const float *bias,
                    float *y, float *room, int64_t rows, int threads)
{
    int64_t hidden = layer->q.length, inner = layer->gate.outputs, dim = layer->dim;
    int64_t outputs = layer->q.outputs, heads = outputs / dim, shared = layer->k.outputs;
    float *normed = room, *q = normed + rows * hidden, *k = q + rows * outputs, *v = k + rows * shared, *seen = v + rows * shared;
    float *scores = seen + rows * outputs, *gate = scores + rows * heads * cache->count, *up = gate + rows * inner;
    float *rest = up + rows * inner;
    for (int64_t r = 0; r < rows; r++)
        norm(x + r * hidden, layer->before, normed + r * hidden, hidden, layer->eps);
    apply(&layer->q, normed, q, outputs, rows, rest, threads);
    apply(&layer->k, normed, k, shared, rows, rest, threads);
    apply(&layer->v, normed, v, shared, rows, rest, threads);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t at = r * outputs; at < (r + 1) * outputs; at += dim) {
            if (layer->q_norm)
                norm(q + at, layer->q_norm, q + at, dim, layer->eps);
            rotate(q + at, cos + r * dim, sin + r * dim, dim);
        }
        for (int64_t at = 0; at < shared; at += dim) {
            float *from = k + r * shared + at;
            int64_t to = at / dim * cache->stride + (cache->count - rows + r) * dim;
            if (layer->k_norm)
                norm(from, layer->k_norm, from, dim, layer->eps);
            rotate(from, cos + r * dim, sin + r * dim, dim);
            put(from, cache->keys, to, dim, cache->bf16);
            put(v + r * shared + at, cache->values, to, dim, cache->bf16);
        }
    }
    evoprune_attend(q, cache, bias, scores, seen, rows, heads, dim, threads);
    apply(&layer->o, seen, y, hidden, rows, rest, threads);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = r * hidden; i < (r + 1) * hidden; i++)
            y[i] += x[i];
        norm(y + r * hidden, layer->after, normed + r * hidden, hidden, layer->eps);
    }
    apply(&layer->gate, normed, gate, inner, rows, rest, threads);
    apply(&layer->up, normed, up, inner, rows, rest, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows * inner; i++)
        gate[i] *= up[i] / (1 + expf(-gate[i]));
    apply(&layer->down, gate, normed, hidden, rows, rest, threads);
    for (int64_t i = 0; i < rows * hidden; i++)
        y[i] += normed[i];
}
