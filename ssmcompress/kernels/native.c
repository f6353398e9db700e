// Mamba kernels for the CPU: causal convolution, selective scan (both with backward) and single-token updates.
//
// Work is cut into tasks of one batch row and LANES channels. Channels lie innermost, so every inner loop runs over
// LANES independent recurrences and vectorises whatever the state size. A task writes only its own outputs; sums over
// tasks are left to the caller, so results do not depend on the number of threads or on timing.
//
// Layout is channels last. Arithmetic is float32; sequences are float32 or bfloat16 in memory.

#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

// LANES, SPAN, MAX_TAPS and MAX_STATES come from native.py, which sizes the buffers.

static const float LOG2E = 1.44269504f, LN2 = 0.693147181f, PAD = -1e4f;

// A sequence [batch, time, channel] or its gradient; strides in elements, channels contiguous.
typedef struct {
    void *data;
    int64_t batch, time;
} rows;

typedef struct {
    int64_t batch, length, width, size, bf16, threads;
    rows u, dt, B, C, z, y;                // z.data may be null
    const float *A, *D, *dt_bias, *initial;  // [width, size], [width], [width], [batch, width, size]; all but A may be null
    float *final;                          // [batch, width, size]
    float *saved;                          // states before each span, [task, span, size, LANES]; null without backward
    // backward only
    rows grad_y, grad_u, grad_dt, grad_z;
    const float *grad_final;                     // may be null
    float *grad_initial, *grad_A;                // [batch, width, size]
    float *grad_D, *grad_dt_bias;                // [batch, width]
    float *grad_B, *grad_C;                      // [task, length, size]
    float *scratch;                              // [thread, 2 SPAN + 4, size, LANES]
} scan_job;

typedef struct {
    int64_t batch, length, width, taps, silu, bf16, threads;
    rows x, left, y;              // left holds the taps - 1 rows before x; null means zeros
    const float *weight, *bias;   // [width, taps], [width] or null
    rows grad_y, grad_x, grad_left;
    float *grad_weight, *grad_bias;  // [batch, width, taps], [batch, width]
} conv_job;

typedef struct {
    int64_t batch, heads, width, size, groups, bf16, threads;
    rows x, dt, B, C, y;  // "time" is the head of x and y, the group of B and C
    const float *A, *D, *dt_bias;
    float *state;  // [batch, heads, width, size]
    float low, high;
} ssd_job;

// ---- arithmetic --------------------------------------------------------------------------------------------------

// 2^x to 1.2e-7: exactly 1 at 0, 0 below 2^-127 and infinite from 2^128; NaN stays NaN.
static inline float exp2_fast(float x) {
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
    x = -127.f > x ? -127.f : x;
    x = 128.f < x ? 128.f : x;
    float shifted = x + magic, f = x - (shifted - magic);
    float p = 0.00015353362f;
    p = p * f + 0.0013398874f;
    p = p * f + 0.009618437f;
    p = p * f + 0.055503324f;
    p = p * f + 0.24022648f;
    p = p * f + 0.6931472f;
    p = p * f + 1.f;
    uint32_t bits, exponent;
    memcpy(&bits, &p, 4);
    memcpy(&exponent, &shifted, 4);
    bits += exponent << 23;
    memcpy(&p, &bits, 4);
    return p;
}

static inline float sigmoid(float x) { return 1.f / (1.f + exp2_fast(-x * LOG2E)); }

// max(x, 0) + log(1 + e^-|x|), the logarithm as 2 artanh(e / (2 + e)), accurate also where e is tiny; 0 at PAD.
static inline float softplus(float x) {
    float e = exp2_fast((x < 0.f ? x : -x) * LOG2E);
    float s = e / (2.f + e), q = s * s;
    float series = 0.2802446f;
    series = series * q + 0.27999142f;
    series = series * q + 0.400217f;
    series = series * q + 0.6666641f;
    return (x < 0.f ? 0.f : x) + s * (2.f + q * series);
}

// ---- memory ------------------------------------------------------------------------------------------------------

static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

// Reads `count` channels from `first` of one row, zeros for the rest of the `lanes`.
static inline void load(float *restrict to, rows from, int64_t b, int64_t t, int64_t first, int64_t count, int64_t lanes,
                        int64_t bf16) {
    int64_t at = b * from.batch + t * from.time + first;
    if (count < lanes) memset(to, 0, (size_t)lanes * sizeof *to);
    if (bf16) {
        const uint16_t *source = (const uint16_t *)from.data + at;
        for (int64_t i = 0; i < count; i++) to[i] = from_bf16(source[i]);
    } else {
        memcpy(to, (const float *)from.data + at, (size_t)count * sizeof *to);
    }
}

static inline void store(rows to, const float *restrict from, int64_t b, int64_t t, int64_t first, int64_t count,
                         int64_t bf16) {
    int64_t at = b * to.batch + t * to.time + first;
    if (bf16) {
        uint16_t *target = (uint16_t *)to.data + at;
        for (int64_t i = 0; i < count; i++) target[i] = to_bf16(from[i]);
    } else {
        memcpy((float *)to.data + at, from, (size_t)count * sizeof *from);
    }
}

// [count, size] in memory to [size, LANES] in the task, scaled; null and missing lanes give zeros.
static inline void gather(float (*restrict to)[LANES], const float *from, int64_t count, int64_t size, float scale) {
    memset(to, 0, (size_t)size * sizeof *to);
    if (!from) return;
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; n < size; n++) to[n][i] = from[i * size + n] * scale;
}

static inline void scatter(float *to, float (*restrict from)[LANES], int64_t count, int64_t size) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; n < size; n++) to[i * size + n] = from[n][i];
}

// ---- tasks -------------------------------------------------------------------------------------------------------

static inline int64_t blocks(int64_t width) { return (width + LANES - 1) / LANES; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Runs the tasks on all threads. Denormals are flushed meanwhile: decaying states and gradients end there, and each
// operation on one costs a hundred ordinary ones.
static void run(void (*task)(const void *, int64_t), const void *job, int64_t tasks, int64_t threads) {
#pragma omp parallel num_threads((int)threads) if (threads > 1 && tasks > 1)
    {
#ifdef __SSE__
        unsigned mode = _mm_getcsr();
        _mm_setcsr(mode | 0x8040);
#endif
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) task(job, i);
#ifdef __SSE__
        _mm_setcsr(mode);
#endif
    }
}

// ---- causal convolution ------------------------------------------------------------------------------------------

typedef struct {
    int64_t b, first, count;
    float weight[MAX_TAPS][LANES], bias[1][LANES], x[MAX_TAPS - 1 + SPAN][LANES];
} conv_block;

static void conv_open(conv_block *k, const conv_job *job, int64_t task) {
    k->b = task / blocks(job->width);
    k->first = task % blocks(job->width) * LANES;
    k->count = smaller(LANES, job->width - k->first);
    gather(k->weight, job->weight + k->first * job->taps, k->count, job->taps, 1.f);
    gather(k->bias, job->bias ? job->bias + k->first : 0, k->count, 1, 1.f);
    memset(k->x, 0, sizeof k->x);
    for (int64_t t = 0; job->left.data && t < job->taps - 1; t++)
        load(k->x[t], job->left, k->b, t, k->first, k->count, LANES, job->bf16);
}

// Loads a span behind the taps - 1 rows kept from before, and returns its length.
static int64_t conv_span(conv_block *k, const conv_job *job, int64_t start) {
    int64_t count = smaller(SPAN, job->length - start);
    for (int64_t s = 0; s < count; s++)
        load(k->x[job->taps - 1 + s], job->x, k->b, start + s, k->first, k->count, LANES, job->bf16);
    return count;
}

static inline void conv_sum(float *restrict y, const conv_block *k, int64_t taps, int64_t s) {
    memcpy(y, k->bias[0], sizeof k->bias[0]);
    for (int64_t j = 0; j < taps; j++)
        for (int64_t i = 0; i < LANES; i++) y[i] += k->x[s + j][i] * k->weight[j][i];
}

static void conv_forward(const void *data, int64_t task) {
    const conv_job *job = data;
    conv_block k;
    conv_open(&k, job, task);
    for (int64_t start = 0; start < job->length; start += SPAN) {
        int64_t count = conv_span(&k, job, start);
        for (int64_t s = 0; s < count; s++) {
            float y[LANES];
            conv_sum(y, &k, job->taps, s);
            if (job->silu)
                for (int64_t i = 0; i < LANES; i++) y[i] *= sigmoid(y[i]);
            store(job->y, y, k.b, start + s, k.first, k.count, job->bf16);
        }
        memmove(k.x[0], k.x[SPAN], (size_t)(job->taps - 1) * sizeof k.x[0]);
    }
}

static void conv_backward(const void *data, int64_t task) {
    const conv_job *job = data;
    const int64_t taps = job->taps, past = taps - 1;
    conv_block k;
    float grad_x[MAX_TAPS - 1 + SPAN][LANES] = {0}, grad_weight[MAX_TAPS][LANES] = {0}, grad_bias[1][LANES] = {0};
    conv_open(&k, job, task);
    for (int64_t start = 0; start < job->length + past; start += SPAN) {
        int64_t count = start < job->length ? conv_span(&k, job, start) : 0;
        for (int64_t s = 0; s < count; s++) {
            float y[LANES], g[LANES];
            load(g, job->grad_y, k.b, start + s, k.first, k.count, LANES, job->bf16);
            if (job->silu) {
                conv_sum(y, &k, taps, s);
                for (int64_t i = 0; i < LANES; i++) {
                    float gate = sigmoid(y[i]);
                    g[i] *= gate * (1.f + y[i] * (1.f - gate));
                }
            }
            for (int64_t i = 0; i < LANES; i++) grad_bias[0][i] += g[i];
            for (int64_t j = 0; j < taps; j++)
                for (int64_t i = 0; i < LANES; i++) {
                    grad_weight[j][i] += g[i] * k.x[s + j][i];
                    grad_x[s + j][i] += g[i] * k.weight[j][i];
                }
        }
        // no later row reaches the first SPAN sums; row 0 stands for the first row of left
        for (int64_t s = 0, row = start; s < SPAN && row < job->length + past; s++, row++)
            if (row >= past)
                store(job->grad_x, grad_x[s], k.b, row - past, k.first, k.count, job->bf16);
            else if (job->grad_left.data)
                store(job->grad_left, grad_x[s], k.b, row, k.first, k.count, job->bf16);
        memmove(k.x[0], k.x[SPAN], (size_t)past * sizeof k.x[0]);
        memmove(grad_x[0], grad_x[SPAN], (size_t)past * sizeof grad_x[0]);
        memset(grad_x[past], 0, SPAN * sizeof grad_x[0]);
    }
    int64_t channel = k.b * job->width + k.first;
    scatter(job->grad_weight + channel * taps, grad_weight, k.count, taps);
    scatter(job->grad_bias + channel, grad_bias, k.count, 1);
}

void ssm_conv_forward(const conv_job *job) { run(conv_forward, job, job->batch * blocks(job->width), job->threads); }
void ssm_conv_backward(const conv_job *job) { run(conv_backward, job, job->batch * blocks(job->width), job->threads); }

// ---- selective scan ----------------------------------------------------------------------------------------------

typedef struct {
    int64_t b, first, count;
    float D[1][LANES], dt_bias[1][LANES];
} scan_block;

// What one token brings: raw is dt + dt_bias, delta its softplus, inflow delta u.
typedef struct {
    float u[LANES], raw[LANES], delta[LANES], inflow[LANES], B[MAX_STATES], C[MAX_STATES];
} token;

static void scan_open(scan_block *k, const scan_job *job, int64_t task) {
    k->b = task / blocks(job->width);
    k->first = task % blocks(job->width) * LANES;
    k->count = smaller(LANES, job->width - k->first);
    gather(k->D, job->D ? job->D + k->first : 0, k->count, 1, 1.f);
    gather(k->dt_bias, job->dt_bias ? job->dt_bias + k->first : 0, k->count, 1, 1.f);
}

static inline void read_token(token *restrict x, const scan_block *restrict k, const scan_job *job, int64_t t) {
    load(x->u, job->u, k->b, t, k->first, k->count, LANES, job->bf16);
    load(x->raw, job->dt, k->b, t, k->first, k->count, LANES, job->bf16);
    load(x->B, job->B, k->b, t, 0, job->size, 0, job->bf16);
    load(x->C, job->C, k->b, t, 0, job->size, 0, job->bf16);
    for (int64_t i = 0; i < LANES; i++) {
        x->raw[i] += k->dt_bias[0][i];
        x->delta[i] = softplus(x->raw[i]);
        x->inflow[i] = x->delta[i] * x->u[i];
    }
}

static void scan_forward(const void *data, int64_t task) {
    const scan_job *job = data;
    const int64_t size = job->size, states = size * LANES;
    const int64_t spans = (job->length + SPAN - 1) / SPAN;
    scan_block k;
    token x;
    float A[MAX_STATES][LANES], h[MAX_STATES][LANES];
    scan_open(&k, job, task);
    int64_t channel = (k.b * job->width + k.first) * size;
    gather(A, job->A + k.first * size, k.count, size, LOG2E);
    gather(h, job->initial ? job->initial + channel : 0, k.count, size, 1.f);
    for (int64_t t = 0; t < job->length; t++) {
        if (job->saved && t % SPAN == 0)
            memcpy(job->saved + (task * spans + t / SPAN) * states, h, (size_t)states * sizeof(float));
        read_token(&x, &k, job, t);
        float y[LANES];
        for (int64_t i = 0; i < LANES; i++) y[i] = k.D[0][i] * x.u[i];
        for (int64_t n = 0; n < size; n++)
            for (int64_t i = 0; i < LANES; i++) {
                h[n][i] = exp2_fast(x.delta[i] * A[n][i]) * h[n][i] + x.inflow[i] * x.B[n];
                y[i] += h[n][i] * x.C[n];
            }
        if (job->z.data) {
            float z[LANES];
            load(z, job->z, k.b, t, k.first, k.count, LANES, job->bf16);
            for (int64_t i = 0; i < LANES; i++) y[i] *= z[i] * sigmoid(z[i]);
        }
        store(job->y, y, k.b, t, k.first, k.count, job->bf16);
    }
    scatter(job->final + channel, h, k.count, size);
}

static void scan_backward(const void *data, int64_t task) {
    const scan_job *job = data;
    const int64_t size = job->size, spans = (job->length + SPAN - 1) / SPAN;
    typedef float plane[LANES];
    plane *scratch = (plane *)job->scratch + (int64_t)omp_get_thread_num() * (2 * SPAN + 4) * size;
    plane *A = scratch, *grad_A = A + size, *grad_h = grad_A + size;
    plane *decay = grad_h + size, *h = decay + SPAN * size;  // h[s] is the state before token s of the span
    scan_block k;
    token x[SPAN];
    float grad_D[1][LANES] = {0}, grad_dt_bias[1][LANES] = {0};
    scan_open(&k, job, task);
    int64_t channel = k.b * job->width + k.first;
    gather(A, job->A + k.first * size, k.count, size, LOG2E);
    gather(grad_h, job->grad_final ? job->grad_final + channel * size : 0, k.count, size, 1.f);
    memset(grad_A, 0, (size_t)size * sizeof *grad_A);
    for (int64_t span = spans - 1; span >= 0; span--) {
        int64_t start = span * SPAN, count = smaller(SPAN, job->length - start);
        memcpy(h, (plane *)job->saved + (task * spans + span) * size, (size_t)size * sizeof *h);
        for (int64_t s = 0; s < count; s++) {
            read_token(&x[s], &k, job, start + s);
            for (int64_t n = 0; n < size; n++) {
                float *restrict a = decay[s * size + n], *restrict after = h[(s + 1) * size + n];
                const float *restrict before = h[s * size + n];
                for (int64_t i = 0; i < LANES; i++) {
                    a[i] = exp2_fast(x[s].delta[i] * A[n][i]);
                    after[i] = a[i] * before[i] + x[s].inflow[i] * x[s].B[n];
                }
            }
        }
        for (int64_t s = count - 1; s >= 0; s--) {
            const token *now = &x[s];
            float g[LANES], grad_u[LANES], grad_delta[LANES] = {0}, inflow[LANES] = {0};
            load(g, job->grad_y, k.b, start + s, k.first, k.count, LANES, job->bf16);
            if (job->z.data) {
                float z[LANES], y[LANES];
                load(z, job->z, k.b, start + s, k.first, k.count, LANES, job->bf16);
                for (int64_t i = 0; i < LANES; i++) y[i] = k.D[0][i] * now->u[i];
                for (int64_t n = 0; n < size; n++)
                    for (int64_t i = 0; i < LANES; i++) y[i] += h[(s + 1) * size + n][i] * now->C[n];
                for (int64_t i = 0; i < LANES; i++) {
                    float gate = sigmoid(z[i]), slope = gate * (1.f + z[i] * (1.f - gate));
                    y[i] *= g[i] * slope;
                    g[i] *= z[i] * gate;
                }
                store(job->grad_z, y, k.b, start + s, k.first, k.count, job->bf16);
            }
            float *grad_B = job->grad_B + (task * job->length + start + s) * size;
            float *grad_C = job->grad_C + (task * job->length + start + s) * size;
            for (int64_t n = 0; n < size; n++) {
                const float *restrict a = decay[s * size + n], *restrict rate = A[n];
                const float *restrict before = h[s * size + n], *restrict after = h[(s + 1) * size + n];
                float *restrict carried = grad_h[n], *restrict to_A = grad_A[n];
                float to_B = 0.f, to_C = 0.f;
#pragma omp simd reduction(+ : to_B, to_C)
                for (int64_t i = 0; i < LANES; i++) {
                    float through = carried[i] + g[i] * now->C[n], back = through * a[i], exponent = back * before[i];
                    to_C += g[i] * after[i];
                    to_B += through * now->inflow[i];
                    inflow[i] += through * now->B[n];
                    grad_delta[i] += exponent * rate[i];
                    to_A[i] += exponent * now->delta[i];
                    carried[i] = back;
                }
                grad_B[n] = to_B;
                grad_C[n] = to_C;
            }
            for (int64_t i = 0; i < LANES; i++) {
                grad_u[i] = g[i] * k.D[0][i] + inflow[i] * now->delta[i];
                grad_D[0][i] += g[i] * now->u[i];
                grad_delta[i] = (grad_delta[i] * LN2 + inflow[i] * now->u[i]) * sigmoid(now->raw[i]);
                grad_dt_bias[0][i] += grad_delta[i];
            }
            store(job->grad_u, grad_u, k.b, start + s, k.first, k.count, job->bf16);
            store(job->grad_dt, grad_delta, k.b, start + s, k.first, k.count, job->bf16);
        }
    }
    scatter(job->grad_A + channel * size, grad_A, k.count, size);
    scatter(job->grad_initial + channel * size, grad_h, k.count, size);
    scatter(job->grad_D + channel, grad_D, k.count, 1);
    scatter(job->grad_dt_bias + channel, grad_dt_bias, k.count, 1);
}

void ssm_scan_forward(const scan_job *job) { run(scan_forward, job, job->batch * blocks(job->width), job->threads); }
void ssm_scan_backward(const scan_job *job) { run(scan_backward, job, job->batch * blocks(job->width), job->threads); }

// One token: states are read and written once where they lie, so here the inner loops run over the states.
static void scan_step(const void *data, int64_t task) {
    const scan_job *job = data;
    scan_block k;
    token x;
    scan_open(&k, job, task);
    read_token(&x, &k, job, 0);
    float y[LANES];
    for (int64_t i = 0; i < k.count; i++) {
        const float *restrict A = job->A + (k.first + i) * job->size;
        float *restrict h = job->final + (k.b * job->width + k.first + i) * job->size;
        const float rate = x.delta[i] * LOG2E, inflow = x.inflow[i];
        float sum = k.D[0][i] * x.u[i];
#pragma omp simd reduction(+ : sum)
        for (int64_t n = 0; n < job->size; n++) {
            h[n] = exp2_fast(rate * A[n]) * h[n] + inflow * x.B[n];
            sum += h[n] * x.C[n];
        }
        y[i] = sum;
    }
    if (job->z.data) {
        float z[LANES];
        load(z, job->z, k.b, 0, k.first, k.count, LANES, job->bf16);
        for (int64_t i = 0; i < k.count; i++) y[i] *= z[i] * sigmoid(z[i]);
    }
    store(job->y, y, k.b, 0, k.first, k.count, job->bf16);
}

void ssm_scan_step(const scan_job *job) { run(scan_step, job, job->batch * blocks(job->width), job->threads); }

// ---- Mamba-2 step ------------------------------------------------------------------------------------------------

static void ssd_step(const void *data, int64_t task) {
    const ssd_job *job = data;
    const int64_t b = task / job->heads, head = task % job->heads, group = head / (job->heads / job->groups);
    float B[MAX_STATES], C[MAX_STATES], dt;
    load(B, job->B, b, group, 0, job->size, 0, job->bf16);
    load(C, job->C, b, group, 0, job->size, 0, job->bf16);
    load(&dt, job->dt, b, 0, head, 1, 0, job->bf16);
    float delta = softplus(dt + (job->dt_bias ? job->dt_bias[head] : 0.f));
    if (dt > PAD) delta = delta < job->low ? job->low : delta > job->high ? job->high : delta;
    const float decay = exp2_fast(delta * job->A[head] * LOG2E), skip = job->D ? job->D[head] : 0.f;
    for (int64_t first = 0; first < job->width; first += LANES) {
        int64_t count = smaller(LANES, job->width - first);
        float x[LANES], y[LANES];
        load(x, job->x, b, head, first, count, 0, job->bf16);
        for (int64_t i = 0; i < count; i++) {
            float *restrict h = job->state + (task * job->width + first + i) * job->size;
            float sum = skip * x[i], inflow = delta * x[i];
#pragma omp simd reduction(+ : sum)
            for (int64_t n = 0; n < job->size; n++) {
                h[n] = decay * h[n] + inflow * B[n];
                sum += h[n] * C[n];
            }
            y[i] = sum;
        }
        store(job->y, y, b, head, first, count, job->bf16);
    }
}

void ssm_ssd_step(const ssd_job *job) { run(ssd_step, job, job->batch * job->heads, job->threads); }
