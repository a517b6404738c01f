/* Quantized linear layers for CPUs with AVX2, and a whole decoder layer as one call.

   Reading the weights evicts everything else from the CPU's caches, so each call of PyTorch takes several times as long as usual. A
   layer makes about 40 of them. The results of a row depend neither on the other rows nor on the number of threads. */

#include "library.h"
#include <math.h>
#include <string.h>

/* Changes whenever a function's parameters or a structure change. See `LAYOUT` in compiled.py. */
const int evoprune_layout = 5;

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
    int64_t rotated;                               /* leading features of a head that the rotary embedding rotates */
    int gated;                                     /* whether each head of `q` has as many features more, the output's gate */
    float eps;
} Layer;

typedef struct {
    Linear qkv, z, out, gate, up, down;
    const float *before, *after;          /* weights of the norms */
    const float *a, *b;                   /* weights of the decay and of the write gate, [heads][hidden] */
    const float *rate, *offset;           /* of the decay of each head */
    const float *scale;                   /* weight of the output's norm, [value_dim] */
    const float *conv;                    /* [kernel][channels] */
    int64_t kernel, key_heads, heads, key_dim, value_dim;
    float eps;
} DeltaLayer;

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

/* The MLP: add its output for the hidden states in y to y. room: `hidden + 2 * inner` numbers for each row, and `rest`. */
static void mlp(const Linear *gate, const Linear *up, const Linear *down, const float *weight, float eps, float *y, float *room,
                int64_t rows, int threads)
{
    int64_t hidden = gate->length, inner = gate->outputs;
    float *normed = room, *first = normed + rows * hidden, *second = first + rows * inner, *rest = second + rows * inner;
    for (int64_t r = 0; r < rows; r++)
        norm(y + r * hidden, weight, normed + r * hidden, hidden, eps);
    apply(gate, normed, first, inner, rows, rest, threads);
    apply(up, normed, second, inner, rows, rest, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows * inner; i++)
        first[i] *= second[i] / (1 + expf(-first[i]));
    apply(down, first, normed, hidden, rows, rest, threads);
    for (int64_t i = 0; i < rows * hidden; i++)
        y[i] += normed[i];
}

/* Compute the layer's output, y, for new columns, and write their keys and values to the last places of the cache.

   x, y: [rows][hidden]. cos, sin: [rows][rotated]; the first half of the sines is negated. bias: added to the scores of each column
   in the cache, or NULL. room: working memory (see `_room_bytes` in layer.py). */
void evoprune_layer(const Layer *layer, const float *x, const float *cos, const float *sin, const Columns *cache, const float *bias,
                    float *y, float *room, int64_t rows, int threads)
{
    int64_t hidden = layer->q.length, dim = layer->dim, turn = layer->rotated;
    int64_t outputs = layer->o.length, heads = outputs / dim, shared = layer->k.outputs, width = layer->q.outputs / heads;
    float *normed = room, *asked = normed + rows * hidden, *q = layer->gated ? asked + rows * layer->q.outputs : asked;
    float *k = q + rows * outputs, *v = k + rows * shared, *seen = v + rows * shared, *scores = seen + rows * outputs;
    float *rest = scores + rows * heads * cache->count;
    for (int64_t r = 0; r < rows; r++)
        norm(x + r * hidden, layer->before, normed + r * hidden, hidden, layer->eps);
    apply(&layer->q, normed, asked, layer->q.outputs, rows, rest, threads);
    apply(&layer->k, normed, k, shared, rows, rest, threads);
    apply(&layer->v, normed, v, shared, rows, rest, threads);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t h = r * heads; h < (r + 1) * heads; h++) {
            float *to = q + h * dim;
            if (layer->gated)
                memcpy(to, asked + h * width, dim * sizeof(float));
            if (layer->q_norm)
                norm(to, layer->q_norm, to, dim, layer->eps);
            rotate(to, cos + r * turn, sin + r * turn, turn);
        }
        for (int64_t at = 0; at < shared; at += dim) {
            float *from = k + r * shared + at;
            int64_t to = at / dim * cache->stride + (cache->count - rows + r) * dim;
            if (layer->k_norm)
                norm(from, layer->k_norm, from, dim, layer->eps);
            rotate(from, cos + r * turn, sin + r * turn, turn);
            put(from, cache->keys, to, dim, cache->bf16);
            put(v + r * shared + at, cache->values, to, dim, cache->bf16);
        }
    }
    evoprune_attend(q, cache, bias, scores, seen, rows, heads, dim, threads);
    for (int64_t h = 0; layer->gated && h < rows * heads; h++)
        for (int64_t i = 0; i < dim; i++)
            seen[h * dim + i] /= 1 + expf(-asked[h * width + dim + i]);
    apply(&layer->o, seen, y, hidden, rows, rest, threads);
    for (int64_t i = 0; i < rows * hidden; i++)
        y[i] += x[i];
    mlp(&layer->gate, &layer->up, &layer->down, layer->after, layer->eps, y, room, rows, threads);
}

/* --- Gated DeltaNets (arXiv 2412.06464) --- */

/* The product of two vectors. `length` is a multiple of 8. */
static float dot(const float *x, const float *y, int64_t length)
{
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < length; i += 8)
        sum = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i), sum);
    return total(sum);
}

#define WIDE 8 /* vectors of values that are read together, so that their part of the state fits into the CPU's fastest cache */

/* Read a column of one head, for `count` vectors of 8 values, a constant. The state is [keys][values].

   v: the column's values. before, after: the state before and after the column. y: what the query reads from the new state. */
static inline __attribute__((always_inline)) void recur(
    int count, const float *q, const float *k, const float *v, float decay, float beta, const float *before, float *after, float *y,
    int64_t keys, int64_t values)
{
    __m256 write[WIDE], seen[WIDE], rate = _mm256_set1_ps(decay);
    for (int j = 0; j < count; j++)
        write[j] = seen[j] = _mm256_setzero_ps();
    for (int64_t i = 0; i < keys; i++) {
        __m256 key = _mm256_broadcast_ss(k + i);
        for (int j = 0; j < count; j++)
            write[j] = _mm256_fmadd_ps(key, _mm256_loadu_ps(before + i * values + 8 * j), write[j]);
    }
    for (int j = 0; j < count; j++) {
        __m256 error = _mm256_fnmadd_ps(rate, write[j], _mm256_loadu_ps(v + 8 * j));
        write[j] = _mm256_mul_ps(error, _mm256_set1_ps(beta));
    }
    for (int64_t i = 0; i < keys; i++) {
        __m256 key = _mm256_broadcast_ss(k + i), query = _mm256_broadcast_ss(q + i);
        for (int j = 0; j < count; j++) {
            int64_t at = i * values + 8 * j;
            __m256 state = _mm256_fmadd_ps(key, write[j], _mm256_mul_ps(rate, _mm256_loadu_ps(before + at)));
            _mm256_storeu_ps(after + at, state);
            seen[j] = _mm256_fmadd_ps(query, state, seen[j]);
        }
    }
    for (int j = 0; j < count; j++)
        _mm256_storeu_ps(y + 8 * j, seen[j]);
}

/* Read columns one after another with all heads, replacing the state, [heads][keys][values].

   q, k: [rows][key_heads][keys]. v, y: [rows][heads][values]. decay, beta: [rows][heads]. `values` is a multiple of 8. */
void evoprune_delta_rule(const float *q, const float *k, const float *v, const float *decay, const float *beta, float *state, float *y,
                         int64_t rows, int64_t key_heads, int64_t heads, int64_t keys, int64_t values, int threads)
{
    int64_t parts = (values + 8 * WIDE - 1) / (8 * WIDE), group = heads / key_heads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < heads * parts; i++) { /* a part of a head's state stays in the CPU's fastest cache */
        int64_t h = i / parts, at = i % parts * 8 * WIDE;
        float *part = state + h * keys * values + at;
        for (int64_t r = 0; r < rows; r++) {
            const float *query = q + (r * key_heads + h / group) * keys, *key = k + (r * key_heads + h / group) * keys;
            float rate = decay[r * heads + h], write = beta[r * heads + h];
            int64_t here = (r * heads + h) * values + at;
            if (at + 8 * WIDE <= values)
                recur(WIDE, query, key, v + here, rate, write, part, part, y + here, keys, values);
            else
                for (int64_t j = 0; at + j < values; j += 8)
                    recur(1, query, key, v + here + j, rate, write, part + j, part + j, y + here + j, keys, values);
        }
    }
}

/* Scale a vector to a length of `length`. */
static void scale_to(const float *x, float *y, int64_t count, float length)
{
    float factor = length / sqrtf(dot(x, x, count) + 1e-6f);
    for (int64_t i = 0; i < count; i++)
        y[i] = x[i] * factor;
}

/* Read the columns with one head.

   normed: [rows][hidden], the layer's input. mixed: [rows][channels], queries, keys, and values. z: [rows][heads][value_dim]. room:
   two vectors of keys. y: [rows][heads][value_dim]. See evoprune_delta_layer for the states. */
static void read_head(const DeltaLayer *layer, int64_t h, const float *normed, const float *mixed, const float *z, const float *before,
                      float *after, float *room, float *y, int64_t rows)
{
    int64_t hidden = layer->qkv.length, channels = layer->qkv.outputs, keys = layer->key_dim, values = layer->value_dim;
    int64_t from = h / (layer->heads / layer->key_heads) * keys, all = layer->key_heads * keys, size = keys * values;
    float *q = room, *k = room + keys;
    for (int64_t r = 0; r < rows; r++) {
        const float *x = normed + r * hidden, *given = mixed + r * channels, *v = given + 2 * all + h * values;
        float a = dot(x, layer->a + h * hidden, hidden) + layer->offset[h], b = dot(x, layer->b + h * hidden, hidden);
        float decay = expf(layer->rate[h] * (a > 20 ? a : log1pf(expf(a)))), beta = 1 / (1 + expf(-b));
        float *seen = y + (r * layer->heads + h) * values, *next = after + (r * layer->heads + h) * size;
        const float *last = r ? next - layer->heads * size : before + h * size;
        scale_to(given + from, q, keys, 1 / sqrtf(keys));
        scale_to(given + all + from, k, keys, 1);
        int64_t at = 0;
        for (; at + 8 * WIDE <= values; at += 8 * WIDE)
            recur(WIDE, q, k, v + at, decay, beta, last + at, next + at, seen + at, keys, values);
        for (; at < values; at += 8)
            recur(1, q, k, v + at, decay, beta, last + at, next + at, seen + at, keys, values);
        norm(seen, layer->scale, seen, values, layer->eps);
        const float *gate = z + (r * layer->heads + h) * values;
        for (int64_t i = 0; i < values; i++)
            seen[i] *= gate[i] / (1 + expf(-gate[i]));
    }
}

/* Compute the output, y, of a layer with a Gated DeltaNet for new columns.

   x, y: [rows][hidden]. inputs: [kernel - 1 + rows][channels], the inputs of the convolution, starting with those of the last columns;
   those of the new ones are written. before: the recurrent state, [heads][key_dim][value_dim]. after: that after each column. room:
   working memory (see `_room_bytes` in layer.py). */
void evoprune_delta_layer(const DeltaLayer *layer, const float *x, float *inputs, const float *before, float *after, float *y,
                          float *room, int64_t rows, int threads)
{
    int64_t hidden = layer->qkv.length, channels = layer->qkv.outputs, size = layer->z.outputs, kernel = layer->kernel;
    float *normed = room, *mixed = normed + rows * hidden, *z = mixed + rows * channels, *seen = z + rows * size;
    float *heads = seen + rows * size, *rest = heads + 2 * layer->heads * layer->key_dim;
    for (int64_t r = 0; r < rows; r++)
        norm(x + r * hidden, layer->before, normed + r * hidden, hidden, layer->eps);
    apply(&layer->qkv, normed, inputs + (kernel - 1) * channels, channels, rows, rest, threads);
    apply(&layer->z, normed, z, size, rows, rest, threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t r = 0; r < rows; r++) {
                float sum = 0;
                for (int64_t i = 0; i < kernel; i++)
                    sum += layer->conv[i * channels + c] * inputs[(r + i) * channels + c];
                mixed[r * channels + c] = sum / (1 + expf(-sum));
            }
#pragma omp for schedule(static)
        for (int64_t h = 0; h < layer->heads; h++)
            read_head(layer, h, normed, mixed, z, before, after, heads + 2 * h * layer->key_dim, seen, rows);
    }
    apply(&layer->out, seen, y, hidden, rows, rest, threads);
    for (int64_t i = 0; i < rows * hidden; i++)
        y[i] += x[i];
    mlp(&layer->gate, &layer->up, &layer->down, layer->after, layer->eps, y, room, rows, threads);
}
