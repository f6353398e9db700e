/* Short convolution, Mamba-1 scan and single-step update, forward and backward.
 *
 * Sixteen channels travel together as one vector; GCC's vector extensions turn that into whatever the CPU has.
 * Rows are [length, channels] with the channels contiguous, in float32 or bfloat16; state and sums are float32.
 * Every sum is taken in a fixed order, so the same input on the same number of threads gives the same bits.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define CHUNK 16 /* tokens between kept states: the backward recomputes the ones in between */
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

typedef struct {
    void *data;
    int64_t batch, row; /* strides, in elements */
} rows;

INLINE vf splat(float x) { return (vf){0} + x; }
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); }
INLINE vf smaller(vf a, vf b) { return choose(a < b, a, b); }

/* 2^k · p(r) with x = k ln 2 + r, |r| ≤ ln 2 / 2; relative error 1e-7; exactly 0 below the normal numbers. */
INLINE vf vexp(vf x) {
    vf held = smaller(larger(x, splat(-87.3f)), splat(88.3f));
    vf shifted = held * 1.44269504f + 12582912.0f; /* adding 1.5 · 2^23 rounds to an integer in the low bits */
    vf k = shifted - 12582912.0f;
    vf r = held - k * 0.693145752f - k * 1.42860677e-6f;
    vf p = splat(1.3981999e-3f);
    p = p * r + 8.3334520e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vf scaled = (vf)((vi)p + ((vi)shifted << 23));
    return choose(x < -87.3f, splat(0), scaled);
}

/* log(1 + w) for 0 ≤ w ≤ 1, as 2 artanh(w / (2 + w)). */
INLINE vf vlog1p(vf w) {
    vf s = w / (w + 2.0f), q = s * s, p = splat(2.0f / 17);
    for (int k = 15; k >= 1; k -= 2) p = p * q + 2.0f / (float)k;
    return p * s;
}

INLINE vf softplus(vf x) {
    vf size = larger(x, -x);
    return larger(x, splat(0)) + vlog1p(vexp(-size));
}

INLINE vf sigmoid(vf x) { return 1.0f / (vexp(-x) + 1.0f); }

INLINE float sum(vf x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

INLINE int lanes(int64_t width, int64_t at) { return width - at < LANES ? (int)(width - at) : LANES; }

INLINE vf load(const void *data, int64_t at, int count, int half) {
    if (half) {
        vh narrow = {0};
        if (count == LANES) memcpy(&narrow, (const uint16_t *)data + at, sizeof narrow);
        else memcpy(&narrow, (const uint16_t *)data + at, 2 * (size_t)count);
        return (vf)(__builtin_convertvector(narrow, vi) << 16);
    }
    vf wide = {0};
    if (count == LANES) memcpy(&wide, (const float *)data + at, sizeof wide);
    else memcpy(&wide, (const float *)data + at, 4 * (size_t)count);
    return wide;
}

INLINE void store(void *data, int64_t at, int count, int half, vf value) {
    if (half) {
        vi bits = (vi)value; /* round to the nearest even bfloat16 */
        vh narrow = __builtin_convertvector(((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff, vh);
        memcpy((uint16_t *)data + at, &narrow, 2 * (size_t)count);
    } else {
        memcpy((float *)data + at, &value, 4 * (size_t)count);
    }
}

/* A [channels, size] matrix of states, sixteen channels at a time, as one vector for each state. */
INLINE void gather(vf *into, const float *from, int64_t size, int count) {
    for (int64_t n = 0; n < size; n++) {
        into[n] = splat(0);
        for (int i = 0; i < count; i++) into[n][i] = from[i * size + n];
    }
}

INLINE void scatter(float *into, const vf *from, int64_t size, int count) {
    for (int64_t n = 0; n < size; n++)
        for (int i = 0; i < count; i++) into[i * size + n] = from[n][i];
}

static void *aligned(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64 + 64); }

/* ---- Mamba-1 scan ---------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t batch, length, width, size, threads, half;
    rows u, dt, z, y;         /* z.data may be null */
    const float *A;           /* [width, size], negative */
    const float *B, *C;       /* [batch, length, size], contiguous */
    const float *D, *bias;    /* [width] or null */
    const float *start;       /* [batch, width, size] or null */
    float *state;             /* [batch, width, size]: the last state */
    float *kept;              /* states before every chunk, for the backward, or null */
    rows grad_y, grad_u, grad_dt, grad_z;
    const float *grad_state;  /* [batch, width, size] */
    float *grad_A, *grad_start; /* [batch, width, size] */
    float *grad_B, *grad_C;   /* [threads, batch, length, size], contiguous */
    float *grad_D, *grad_bias; /* [batch, width] */
} scan;

INLINE int64_t blocks_of(int64_t width) { return (width + LANES - 1) / LANES; }
INLINE int64_t chunks_of(int64_t length) { return (length + CHUNK - 1) / CHUNK; }
INLINE vf *kept_at(const scan *s, int64_t b, int64_t chunk, int64_t block) {
    int64_t index = (b * chunks_of(s->length) + chunk) * blocks_of(s->width) + block;
    return (vf *)s->kept + index * s->size;
}

INLINE void forward_block(const scan *s, int64_t b, int64_t block, int half, int gated) {
    int64_t at = block * LANES, N = s->size;
    int count = lanes(s->width, at);
    vf A[N], h[N];
    gather(A, s->A + at * N, N, count);
    for (int64_t n = 0; n < N; n++) h[n] = splat(0);
    if (s->start) gather(h, s->start + (b * s->width + at) * N, N, count);
    vf D = s->D ? load(s->D, at, count, 0) : splat(0), bias = s->bias ? load(s->bias, at, count, 0) : splat(0);
    for (int64_t t = 0; t < s->length; t++) {
        if (s->kept && t % CHUNK == 0) memcpy(kept_at(s, b, t / CHUNK, block), h, sizeof(vf) * (size_t)N);
        const float *B = s->B + (b * s->length + t) * N, *C = s->C + (b * s->length + t) * N;
        vf u = load(s->u.data, b * s->u.batch + t * s->u.row + at, count, half);
        vf delta = softplus(load(s->dt.data, b * s->dt.batch + t * s->dt.row + at, count, half) + bias);
        vf y = D * u, inflow = delta * u;
        for (int64_t n = 0; n < N; n++) {
            h[n] = vexp(delta * A[n]) * h[n] + inflow * B[n];
            y += h[n] * C[n];
        }
        if (gated) {
            vf z = load(s->z.data, b * s->z.batch + t * s->z.row + at, count, half);
            y *= z * sigmoid(z);
        }
        store(s->y.data, b * s->y.batch + t * s->y.row + at, count, half, y);
    }
    scatter(s->state + (b * s->width + at) * N, h, N, count);
}

void scan_forward(const scan *s) {
    int64_t blocks = blocks_of(s->width);
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t task = 0; task < s->batch * blocks; task++) {
        int64_t b = task / blocks, block = task % blocks;
        if (s->half && s->z.data) forward_block(s, b, block, 1, 1);
        else if (s->half) forward_block(s, b, block, 1, 0);
        else if (s->z.data) forward_block(s, b, block, 0, 1);
        else forward_block(s, b, block, 0, 0);
    }
}

/* What one thread carries while it walks a row of blocks backwards in time. */
typedef struct {
    vf *grad, *grad_A, *grad_D, *grad_bias; /* of every block: what flows into the last state, sums over time */
    vf *states, *decay;                     /* of the chunk at hand: [CHUNK + 1, size], [CHUNK, size] */
    vf *grad_B, *grad_C;                    /* of the chunk at hand: [CHUNK, size], still one sum for each lane */
} backward;

/* States and decays of one chunk again, from the state kept before it. */
INLINE void replay(const scan *s, const backward *w, const vf *A, vf bias, int64_t b, int64_t chunk, int64_t block,
                   int half) {
    int64_t at = block * LANES, N = s->size, from = chunk * CHUNK;
    int count = lanes(s->width, at);
    memcpy(w->states, kept_at(s, b, chunk, block), sizeof(vf) * (size_t)N);
    for (int64_t t = from; t < s->length && t < from + CHUNK; t++) {
        const float *B = s->B + (b * s->length + t) * N;
        vf u = load(s->u.data, b * s->u.batch + t * s->u.row + at, count, half);
        vf delta = softplus(load(s->dt.data, b * s->dt.batch + t * s->dt.row + at, count, half) + bias);
        vf *before = w->states + (t - from) * N, *decay = w->decay + (t - from) * N;
        for (int64_t n = 0; n < N; n++) {
            decay[n] = vexp(delta * A[n]);
            before[N + n] = decay[n] * before[n] + delta * u * B[n];
        }
    }
}

INLINE void backward_chunk(const scan *s, const backward *w, int64_t b, int64_t chunk, int64_t block, int64_t first,
                           int half) {
    int64_t at = block * LANES, N = s->size, from = chunk * CHUNK, own = block - first;
    int64_t last = (s->length < from + CHUNK ? s->length : from + CHUNK) - 1;
    int count = lanes(s->width, at);
    vf A[N], *grad = w->grad + own * N, *grad_A = w->grad_A + own * N;
    gather(A, s->A + at * N, N, count);
    vf D = s->D ? load(s->D, at, count, 0) : splat(0), bias = s->bias ? load(s->bias, at, count, 0) : splat(0);
    replay(s, w, A, bias, b, chunk, block, half);
    for (int64_t t = last; t >= from; t--) {
        const float *B = s->B + (b * s->length + t) * N, *C = s->C + (b * s->length + t) * N;
        vf *before = w->states + (t - from) * N, *decay = w->decay + (t - from) * N;
        vf *grad_B = w->grad_B + (t - from) * N, *grad_C = w->grad_C + (t - from) * N;
        vf u = load(s->u.data, b * s->u.batch + t * s->u.row + at, count, half);
        vf dt = load(s->dt.data, b * s->dt.batch + t * s->dt.row + at, count, half) + bias;
        vf gy = load(s->grad_y.data, b * s->grad_y.batch + t * s->grad_y.row + at, count, half);
        vf delta = softplus(dt);
        if (s->z.data) {
            vf z = load(s->z.data, b * s->z.batch + t * s->z.row + at, count, half), gate = sigmoid(z), y = D * u;
            for (int64_t n = 0; n < N; n++) y += before[N + n] * C[n];
            vf slope = gate * (1.0f + z * (1.0f - gate));
            store(s->grad_z.data, b * s->grad_z.batch + t * s->grad_z.row + at, count, half, gy * y * slope);
            gy *= z * gate;
        }
        vf inflow = splat(0), grad_delta = splat(0);
        for (int64_t n = 0; n < N; n++) {
            vf g = grad[n] + gy * C[n], faded = g * decay[n], moved = faded * before[n];
            grad_C[n] += gy * before[N + n];
            grad_B[n] += g * delta * u;
            inflow += g * B[n];
            grad_delta += moved * A[n];
            grad_A[n] += moved * delta;
            grad[n] = faded;
        }
        vf grad_dt = (grad_delta + inflow * u) * sigmoid(dt);
        w->grad_D[own] += gy * u;
        w->grad_bias[own] += grad_dt;
        store(s->grad_u.data, b * s->grad_u.batch + t * s->grad_u.row + at, count, half, gy * D + inflow * delta);
        store(s->grad_dt.data, b * s->grad_dt.batch + t * s->grad_dt.row + at, count, half, grad_dt);
    }
}

/* One thread's share of one row: blocks first … end - 1, all of time, chunk after chunk from the end. */
static void backward_row(const scan *s, int64_t b, int64_t thread, int64_t first, int64_t end) {
    int64_t N = s->size, own = end - first;
    vf *space = aligned(sizeof(vf) * (size_t)(2 * own * N + 2 * own + (4 * CHUNK + 1) * N));
    backward w = {.grad = space};
    w.grad_A = w.grad + own * N;
    w.grad_D = w.grad_A + own * N;
    w.grad_bias = w.grad_D + own;
    w.states = w.grad_bias + own;
    w.decay = w.states + (CHUNK + 1) * N;
    w.grad_B = w.decay + CHUNK * N;
    w.grad_C = w.grad_B + CHUNK * N;
    memset(w.grad_A, 0, sizeof(vf) * (size_t)(own * N + 2 * own));
    for (int64_t block = first; block < end; block++) {
        int64_t at = block * LANES;
        gather(w.grad + (block - first) * N, s->grad_state + (b * s->width + at) * N, N, lanes(s->width, at));
    }
    for (int64_t chunk = chunks_of(s->length) - 1; chunk >= 0; chunk--) {
        memset(w.grad_B, 0, sizeof(vf) * (size_t)(2 * CHUNK * N));
        for (int64_t block = first; block < end; block++) {
            if (s->half) backward_chunk(s, &w, b, chunk, block, first, 1);
            else backward_chunk(s, &w, b, chunk, block, first, 0);
        }
        int64_t from = chunk * CHUNK, tokens = s->length - from < CHUNK ? s->length - from : CHUNK;
        int64_t out = ((thread * s->batch + b) * s->length + from) * N;
        for (int64_t i = 0; i < tokens * N; i++) {
            s->grad_B[out + i] = sum(w.grad_B[i]);
            s->grad_C[out + i] = sum(w.grad_C[i]);
        }
    }
    for (int64_t block = first; block < end; block++) {
        int64_t at = block * LANES, own_at = block - first;
        int count = lanes(s->width, at);
        scatter(s->grad_A + (b * s->width + at) * N, w.grad_A + own_at * N, N, count);
        scatter(s->grad_start + (b * s->width + at) * N, w.grad + own_at * N, N, count);
        store(s->grad_D, b * s->width + at, count, 0, w.grad_D[own_at]);
        store(s->grad_bias, b * s->width + at, count, 0, w.grad_bias[own_at]);
    }
    free(space);
}

void scan_backward(const scan *s) {
    int64_t blocks = blocks_of(s->width);
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t task = 0; task < s->batch * s->threads; task++) {
        int64_t b = task % s->batch, thread = task / s->batch;
        backward_row(s, b, thread, blocks * thread / s->threads, blocks * (thread + 1) / s->threads);
    }
}

/* One token: sixteen states of one channel travel together. y is [batch, width] like u, dt and z. */
void scan_step(const scan *s) {
    int half = (int)s->half;
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t task = 0; task < s->batch * blocks_of(s->width); task++) {
        int64_t b = task / blocks_of(s->width), at = task % blocks_of(s->width) * LANES, N = s->size;
        int count = lanes(s->width, at);
        vf bias = s->bias ? load(s->bias, at, count, 0) : splat(0);
        vf u = load(s->u.data, b * s->u.batch + at, count, half), y = splat(0);
        vf delta = softplus(load(s->dt.data, b * s->dt.batch + at, count, half) + bias), inflow = delta * u;
        for (int i = 0; i < count; i++) {
            float *state = s->state + (b * s->width + at + i) * N;
            vf total = splat(0);
            for (int64_t n = 0; n < N; n += LANES) {
                int part = lanes(N, n);
                vf A = load(s->A, (at + i) * N + n, part, 0), C = load(s->C, b * N + n, part, 0);
                vf h = vexp(delta[i] * A) * load(state, n, part, 0) + inflow[i] * load(s->B, b * N + n, part, 0);
                store(state, n, part, 0, h);
                total += h * C;
            }
            y[i] = sum(total);
        }
        if (s->D) y += load(s->D, at, count, 0) * u;
        if (s->z.data) {
            vf z = load(s->z.data, b * s->z.batch + at, count, half);
            y *= z * sigmoid(z);
        }
        store(s->y.data, b * s->y.batch + at, count, half, y);
    }
}

/* ---- short convolution ----------------------------------------------------------------------------------------- */

typedef struct {
    int64_t batch, length, width, kernel, threads, half, silu;
    rows x, y;
    const float *weight; /* [kernel, width] */
    const float *bias;   /* [width] or null */
    const void *left;    /* [batch, kernel - 1, width], the type of x, or null */
    rows grad_y, grad_x;
    float *grad_pre;     /* [batch, length, width] */
    float *grad_left;    /* [batch, kernel - 1, width] */
    float *grad_weight;  /* [threads, kernel, width] */
    float *grad_bias;    /* [threads, width] */
} convolution;

/* Input of token t, which may lie before the first one. */
INLINE vf input(const convolution *c, int64_t b, int64_t t, int64_t at, int count, int half) {
    if (t >= 0) return load(c->x.data, b * c->x.batch + t * c->x.row + at, count, half);
    if (!c->left) return splat(0);
    return load(c->left, (b * (c->kernel - 1) + c->kernel - 1 + t) * c->width + at, count, half);
}

INLINE vf convolve(const convolution *c, int64_t b, int64_t t, int64_t at, int count, int half) {
    vf y = c->bias ? load(c->bias, at, count, 0) : splat(0);
    for (int64_t k = 0; k < c->kernel; k++)
        y += load(c->weight, k * c->width + at, count, 0) * input(c, b, t - c->kernel + 1 + k, at, count, half);
    return y;
}

INLINE void convolve_row(const convolution *c, int64_t b, int64_t t, int half) {
    for (int64_t at = 0; at < c->width; at += LANES) {
        int count = lanes(c->width, at);
        vf y = convolve(c, b, t, at, count, half);
        store(c->y.data, b * c->y.batch + t * c->y.row + at, count, half, c->silu ? y * sigmoid(y) : y);
    }
}

void conv_forward(const convolution *c) {
#pragma omp parallel for num_threads(c->threads) schedule(static)
    for (int64_t task = 0; task < c->batch * c->length; task++) {
        if (c->half) convolve_row(c, task / c->length, task % c->length, 1);
        else convolve_row(c, task / c->length, task % c->length, 0);
    }
}

/* The gradient before the activation, and its part in weight and bias. */
INLINE void slope_row(const convolution *c, int64_t thread, int64_t b, int64_t t, int half) {
    float *grad_bias = c->grad_bias + thread * c->width;
    for (int64_t at = 0; at < c->width; at += LANES) {
        int count = lanes(c->width, at);
        vf g = load(c->grad_y.data, b * c->grad_y.batch + t * c->grad_y.row + at, count, half);
        if (c->silu) {
            vf y = convolve(c, b, t, at, count, half), gate = sigmoid(y);
            g *= gate * (1.0f + y * (1.0f - gate));
        }
        store(c->grad_pre, (b * c->length + t) * c->width + at, count, 0, g);
        store(grad_bias, at, count, 0, load(grad_bias, at, count, 0) + g);
        for (int64_t k = 0; k < c->kernel; k++) {
            float *grad_weight = c->grad_weight + (thread * c->kernel + k) * c->width;
            vf part = g * input(c, b, t - c->kernel + 1 + k, at, count, half);
            store(grad_weight, at, count, 0, load(grad_weight, at, count, 0) + part);
        }
    }
}

/* The gradient of the input of token t, or, before the first token, of what lay to the left. */
INLINE void input_row(const convolution *c, int64_t b, int64_t t, int half) {
    for (int64_t at = 0; at < c->width; at += LANES) {
        int count = lanes(c->width, at);
        vf g = splat(0);
        for (int64_t k = 0; k < c->kernel; k++) {
            int64_t out = t + c->kernel - 1 - k;
            if (out < 0 || out >= c->length) continue;
            g += load(c->weight, k * c->width + at, count, 0) *
                 load(c->grad_pre, (b * c->length + out) * c->width + at, count, 0);
        }
        if (t >= 0) store(c->grad_x.data, b * c->grad_x.batch + t * c->grad_x.row + at, count, half, g);
        else store(c->grad_left, (b * (c->kernel - 1) + c->kernel - 1 + t) * c->width + at, count, 0, g);
    }
}

void conv_backward(const convolution *c) {
    int64_t total = c->batch * c->length, reach = c->length + c->kernel - 1;
#pragma omp parallel for num_threads(c->threads) schedule(static)
    for (int64_t thread = 0; thread < c->threads; thread++)
        for (int64_t task = total * thread / c->threads; task < total * (thread + 1) / c->threads; task++) {
            if (c->half) slope_row(c, thread, task / c->length, task % c->length, 1);
            else slope_row(c, thread, task / c->length, task % c->length, 0);
        }
#pragma omp parallel for num_threads(c->threads) schedule(static)
    for (int64_t task = 0; task < c->batch * reach; task++) {
        int64_t b = task / reach, t = task % reach - (c->kernel - 1);
        if (c->half) input_row(c, b, t, 1);
        else input_row(c, b, t, 0);
    }
}
