// Mamba on the CPU: short convolution and selective scan with their backwards, and the single-token updates.
//
// A block is one row of the batch and LANES channels, which lie innermost: every hot loop runs over LANES independent
// recurrences and vectorises for any state size. A task, one or several of them, writes only its own outputs and sums
// over blocks are left to the caller, so neither the number of threads nor their timing changes a bit of the result.
//
// Sequences are float32 or bfloat16 in memory, channels last; all arithmetic is float32. LANES, SPAN, MAX_TAPS and
// MAX_STATES are given by native.py, which sizes the buffers.

#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#define ALIGNED __attribute__((aligned(64)))
enum { FOLD = 16 };  // partial sums kept of a sum over channels
enum { GROUP = 8 };  // at most so many blocks of channels go through a span of a scan one after another
static const float LOG2E = 1.44269504f, LN2 = 0.693147181f;

typedef float plane[LANES];

typedef struct {  // [batch, time, channel]; strides in elements, channels contiguous
    void *data;
    int64_t batch, time;
} rows;

typedef struct {
    int64_t batch, length, width, bf16, threads, taps, silu;
    rows x, left, y;             // left: the taps - 1 rows before x, or null for zeros
    const float *weight, *bias;  // [width, taps]; [width] or null
    rows grad_y, grad_x, grad_left;
    float *grad_weight, *grad_bias;  // [batch, width, taps], [batch, width]
} conv_job;

typedef struct {
    int64_t batch, length, width, bf16, threads, size;
    rows u, dt, B, C, z, y;                // z may be null
    const float *A, *D, *dt_bias, *state;  // [width, size]; [width], [width], [batch, width, size] or null
    float *last;                           // [batch, width, size]
    float *saved;                          // states before each span [block, span, size, LANES] or null
    rows grad_y, grad_u, grad_dt, grad_z;
    const float *grad_last;        // or null
    float *grad_A, *grad_state;    // [batch, width, size]
    float *grad_D, *grad_dt_bias;  // [batch, width]
    float *grad_B, *grad_C;        // [task, length, size]
    float *scratch;                // [block, 2, size, LANES] forward, [thread, 2 SPAN + 4, size, LANES] backward
} scan_job;

typedef struct {
    int64_t batch, heads, width, bf16, threads, size, groups;
    rows x, dt, B, C, y;           // "time" is the head of x and y, the group of B and C
    const float *A, *D, *dt_bias;  // [heads]; D and dt_bias may be null
    float *state;                  // [batch, heads, width, size]
    float low, high;
} ssd_job;

// ---- arithmetic ----

static inline uint32_t bits(float x) {
    uint32_t pattern;
    memcpy(&pattern, &x, sizeof x);
    return pattern;
}

static inline float real(uint32_t pattern) {
    float x;
    memcpy(&x, &pattern, sizeof x);
    return x;
}

// 2^x for x < 128, relative error 1.2e-7: exactly 1 at 0, 0 from 2^-127 down, NaN where x is NaN.
static inline float exp2_fast(float x) {
    x = -127.f > x ? -127.f : x;
    float shifted = x + 12582912.f;  // 1.5 * 2^23 leaves round(x) in the low bits
    float f = x - (shifted - 12582912.f), p = 0.00015353362f;
    p = p * f + 0.0013398874f;
    p = p * f + 0.009618437f;
    p = p * f + 0.055503324f;
    p = p * f + 0.24022648f;
    p = p * f + 0.6931472f;
    p = p * f + 1.f;
    return real(bits(p) + (bits(shifted) << 23));
}

static inline float sigmoid(float x) {
    float e = exp2_fast((x < 0.f ? x : -x) * LOG2E), s = 1.f / (1.f + e);
    return x < 0.f ? e * s : s;
}

// max(x, 0) + log(1 + e) with e = exp(-|x|); the logarithm is 2 artanh(e / (2 + e)), which keeps the digits of small e.
static inline float softplus(float x) {
    float e = exp2_fast((x < 0.f ? x : -x) * LOG2E), s = e / (2.f + e), q = s * s, series = 0.2802446f;
    series = series * q + 0.27999142f;
    series = series * q + 0.400217f;
    series = series * q + 0.6666641f;
    return (x < 0.f ? 0.f : x) + s * (2.f + q * series);
}

// ---- memory and tasks ----

typedef struct {  // channels first … first + count - 1 of batch row b
    int64_t b, first, count, bf16;
} slice;

static inline uint16_t to_bf16(float x) {
    uint16_t nearest = (uint16_t)((bits(x) + 0x7fff + (bits(x) >> 16 & 1)) >> 16);  // ties to even
    return x != x ? 0x7fc0 : nearest;
}

static inline void load(float *restrict to, rows from, slice k, int64_t t) {
    int64_t at = k.b * from.batch + t * from.time + k.first;
    if (k.bf16)
        for (int64_t i = 0; i < k.count; i++) to[i] = real((uint32_t)((const uint16_t *)from.data)[at + i] << 16);
    else if (k.count == LANES)  // a size that is known needs no call
        memcpy(to, (const float *)from.data + at, sizeof(plane));
    else
        memcpy(to, (const float *)from.data + at, (size_t)k.count * sizeof *to);
}

static inline void store(rows to, const float *restrict from, slice k, int64_t t) {
    int64_t at = k.b * to.batch + t * to.time + k.first;
    if (k.bf16)
        for (int64_t i = 0; i < k.count; i++) ((uint16_t *)to.data)[at + i] = to_bf16(from[i]);
    else if (k.count == LANES)
        memcpy((float *)to.data + at, from, sizeof(plane));
    else
        memcpy((float *)to.data + at, from, (size_t)k.count * sizeof *from);
}

// [count, size] in memory to [size, LANES] in a task; zeros for null and for missing lanes.
static inline void gather(plane *restrict to, const float *from, int64_t count, int64_t size) {
    memset(to, 0, (size_t)size * sizeof *to);
    for (int64_t i = 0; from && i < count; i++)
        for (int64_t n = 0; n < size; n++) to[n][i] = from[i * size + n];
}

static inline void scatter(float *restrict to, plane *from, int64_t count, int64_t size) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; n < size; n++) to[i * size + n] = from[n][i];
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t spans(int64_t length) { return (length + SPAN - 1) / SPAN; }
static inline int64_t blocks(int64_t width) { return (width + LANES - 1) / LANES; }

static inline slice channels(int64_t task, int64_t width, int64_t bf16) {
    int64_t first = task % blocks(width) * LANES;
    return (slice){task / blocks(width), first, smaller(LANES, width - first), bf16};
}

// Denormals are flushed while the tasks run: states and gradients that decay end as such, and one operation on a
// denormal costs as much as a hundred others.
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

// ---- causal convolution ----

typedef struct {  // x[s] is the first input of output s; taps - 1 rows stay from the span before
    plane weight[MAX_TAPS] ALIGNED, bias ALIGNED, x[MAX_TAPS - 1 + SPAN] ALIGNED;
} window;

static void conv_open(window *w, const conv_job *job, slice k) {
    memset(w->x, 0, sizeof w->x);
    gather(w->weight, job->weight + k.first * job->taps, k.count, job->taps);
    gather(&w->bias, job->bias ? job->bias + k.first : 0, k.count, 1);
    for (int64_t t = 0; job->left.data && t < job->taps - 1; t++) load(w->x[t], job->left, k, t);
}

static int64_t conv_read(window *w, const conv_job *job, slice k, int64_t start) {
    int64_t count = smaller(SPAN, job->length - start);
    for (int64_t s = 0; s < count; s++) load(w->x[job->taps - 1 + s], job->x, k, start + s);
    return count;
}

// Nothing is copied into y, here and below: wide loads of what narrow stores have just written wait for them.
static inline void conv_sum(float *restrict y, const window *w, int64_t taps, int64_t s) {
    for (int64_t i = 0; i < LANES; i++) y[i] = w->bias[i] + w->x[s][i] * w->weight[0][i];
    for (int64_t j = 1; j < taps; j++)
        for (int64_t i = 0; i < LANES; i++) y[i] += w->x[s + j][i] * w->weight[j][i];
}

// A task is a span of time and all channels: outputs depend on no other output, and rows that lie side by side in
// memory are read side by side.
static void conv_forward(const void *data, int64_t task) {
    const conv_job *job = data;
    const int64_t b = task / spans(job->length), start = task % spans(job->length) * SPAN, past = job->taps - 1;
    const int64_t count = smaller(SPAN, job->length - start);
    window w;
    for (int64_t block = 0; block < blocks(job->width); block++) {
        const slice k = channels(b * blocks(job->width) + block, job->width, job->bf16);
        if (k.count < LANES || start < past)
            conv_open(&w, job, k);
        else {
            gather(w.weight, job->weight + k.first * job->taps, k.count, job->taps);
            gather(&w.bias, job->bias ? job->bias + k.first : 0, k.count, 1);
        }
        for (int64_t t = start < past ? 0 : start - past; t < start + count; t++)
            load(w.x[t - start + past], job->x, k, t);
        for (int64_t s = 0; s < count; s++) {
            plane y ALIGNED;
            conv_sum(y, &w, job->taps, s);
            for (int64_t i = 0; job->silu && i < LANES; i++) y[i] *= sigmoid(y[i]);
            store(job->y, y, k, start + s);
        }
    }
}

static void conv_backward(const void *data, int64_t task) {
    const conv_job *job = data;
    const slice k = channels(task, job->width, job->bf16);
    const int64_t taps = job->taps, past = taps - 1, inputs = past + job->length, at = k.b * job->width + k.first;
    window w;
    plane to_x[MAX_TAPS - 1 + SPAN] ALIGNED = {0}, to_weight[MAX_TAPS] ALIGNED = {0}, to_bias ALIGNED = {0};
    conv_open(&w, job, k);
    for (int64_t start = 0; start < inputs; start += SPAN) {
        int64_t count = conv_read(&w, job, k, start);
        for (int64_t s = 0; s < count; s++) {
            plane y ALIGNED, g ALIGNED = {0};
            load(g, job->grad_y, k, start + s);
            conv_sum(y, &w, taps, s);
            for (int64_t i = 0; job->silu && i < LANES; i++) {
                float gate = sigmoid(y[i]);
                g[i] *= gate * (1.f + y[i] * (1.f - gate));
            }
            for (int64_t i = 0; i < LANES; i++) to_bias[i] += g[i];
            for (int64_t j = 0; j < taps; j++)
                for (int64_t i = 0; i < LANES; i++) {
                    to_weight[j][i] += g[i] * w.x[s + j][i];
                    to_x[s + j][i] += g[i] * w.weight[j][i];
                }
        }
        for (int64_t s = 0; s < SPAN && start + s < inputs; s++)  // no later output reaches these inputs
            if (start + s >= past)
                store(job->grad_x, to_x[s], k, start + s - past);
            else if (job->grad_left.data)
                store(job->grad_left, to_x[s], k, start + s);
        memmove(w.x[0], w.x[SPAN], (size_t)past * sizeof(plane));
        memmove(to_x[0], to_x[SPAN], (size_t)past * sizeof(plane));
        memset(to_x[past], 0, SPAN * sizeof(plane));
    }
    scatter(job->grad_weight + at * taps, to_weight, k.count, taps);
    scatter(job->grad_bias + at, &to_bias, k.count, 1);
}

void ssm_conv_forward(const conv_job *job) { run(conv_forward, job, job->batch * spans(job->length), job->threads); }
void ssm_conv_backward(const conv_job *job) { run(conv_backward, job, job->batch * blocks(job->width), job->threads); }

// ---- selective scan ----

typedef struct {  // raw = dt + dt_bias, delta = softplus(raw), inflow = delta u; y starts as D u; g: gradient of y
    plane u ALIGNED, raw ALIGNED, delta ALIGNED, inflow ALIGNED, z ALIGNED, y ALIGNED, g ALIGNED;
    float B[MAX_STATES], C[MAX_STATES];
} token;

typedef struct {
    plane D ALIGNED, dt_bias ALIGNED;
    token x[SPAN];
} reader;

static void scan_open(reader *r, const scan_job *job, slice k) {
    if (k.count < LANES) memset(r->x, 0, sizeof r->x);
    gather(&r->D, job->D ? job->D + k.first : 0, k.count, 1);
    gather(&r->dt_bias, job->dt_bias ? job->dt_bias + k.first : 0, k.count, 1);
}

// All loads before all arithmetic: the rows lie far apart, and so their cache misses overlap.
static int64_t scan_read(reader *r, const scan_job *job, slice k, int64_t start) {
    const slice states = {k.b, 0, job->size, k.bf16};
    int64_t count = smaller(SPAN, job->length - start);
    for (int64_t s = 0; s < count; s++) {
        load(r->x[s].u, job->u, k, start + s);
        load(r->x[s].raw, job->dt, k, start + s);
        load(r->x[s].B, job->B, states, start + s);
        load(r->x[s].C, job->C, states, start + s);
        if (job->z.data) load(r->x[s].z, job->z, k, start + s);
        if (job->grad_y.data) load(r->x[s].g, job->grad_y, k, start + s);
    }
    for (token *x = r->x; x < r->x + count; x++)
        for (int64_t i = 0; i < LANES; i++) {
            x->raw[i] += r->dt_bias[i];
            x->delta[i] = softplus(x->raw[i]);
            x->inflow[i] = x->delta[i] * x->u[i];
            x->y[i] = r->D[i] * x->u[i];
        }
    return count;
}

// A log2(e): exp(delta A) is then one multiplication shorter.
static inline void scan_rates(plane *A, const scan_job *job, slice k) {
    gather(A, job->A + k.first * job->size, k.count, job->size);
    for (int64_t n = 0; n < job->size; n++)
        for (int64_t i = 0; i < LANES; i++) A[n][i] *= LOG2E;
}

static void scan_span(reader *r, const scan_job *job, slice k, int64_t start, const plane *restrict A,
                      plane *restrict h) {
    int64_t count = scan_read(r, job, k, start);
    for (int64_t s = 0; s < count; s++) {
        const token *x = &r->x[s];
        plane y ALIGNED;
        for (int64_t i = 0; i < LANES; i++) y[i] = r->D[i] * x->u[i];
        for (int64_t n = 0; n < job->size; n++)
#pragma omp simd
            for (int64_t i = 0; i < LANES; i++) {
                h[n][i] = exp2_fast(x->delta[i] * A[n][i]) * h[n][i] + x->inflow[i] * x->B[n];
                y[i] += h[n][i] * x->C[n];
            }
        for (int64_t i = 0; job->z.data && i < LANES; i++) y[i] *= x->z[i] * sigmoid(x->z[i]);
        store(job->y, y, k, start + s);
    }
}

// How many blocks a task takes: as many as leave some tasks for every thread.
static int64_t group(const scan_job *job) {
    int64_t many = job->threads > 1 ? job->batch * blocks(job->width) / (4 * job->threads) : GROUP;
    return many < 1 ? 1 : smaller(many, GROUP);
}

static int64_t groups(const scan_job *job) { return (blocks(job->width) + group(job) - 1) / group(job); }

// A task is a group of blocks, span by span: rows of one span share pages of memory, whose addresses are dear.
static void scan_forward(const void *data, int64_t task) {
    const scan_job *job = data;
    const int64_t size = job->size, count = blocks(job->width), row = task / groups(job);
    const int64_t first = row * count + task % groups(job) * group(job);
    const int64_t end = smaller(first + group(job), (row + 1) * count);
    for (int64_t block = first; block < end; block++) {
        const slice k = channels(block, job->width, job->bf16);
        plane *A = (plane *)job->scratch + block * 2 * size, *h = A + size;
        scan_rates(A, job, k);
        gather(h, job->state ? job->state + (k.b * job->width + k.first) * size : 0, k.count, size);
    }
    reader r;
    for (int64_t start = 0; start < job->length; start += SPAN)
        for (int64_t block = first; block < end; block++) {
            const slice k = channels(block, job->width, job->bf16);
            plane *restrict A = (plane *)job->scratch + block * 2 * size, *restrict h = A + size;
            if (job->saved)
                memcpy((plane *)job->saved + (block * spans(job->length) + start / SPAN) * size, h, size * sizeof *h);
            scan_open(&r, job, k);
            scan_span(&r, job, k, start, A, h);
        }
    for (int64_t block = first; block < end; block++) {
        const slice k = channels(block, job->width, job->bf16);
        scatter(job->last + (k.b * job->width + k.first) * size, (plane *)job->scratch + (2 * block + 1) * size, k.count,
                size);
    }
}

// The state after a token and its decay again, and y before the gate.
static void replay(token *x, plane *A, plane *before, plane *after, plane *decay, int64_t size) {
    for (int64_t n = 0; n < size; n++)
#pragma omp simd
        for (int64_t i = 0; i < LANES; i++) {
            decay[n][i] = exp2_fast(x->delta[i] * A[n][i]);
            after[n][i] = decay[n][i] * before[n][i] + x->inflow[i] * x->B[n];
            x->y[i] += after[n][i] * x->C[n];
        }
}

// Sums each FOLD neighbours, by halving.
static inline void fold(float *restrict to, float *from, int64_t size) {
    for (int64_t count = size * FOLD / 2; count >= size; count /= 2)
#pragma omp simd
        for (int64_t m = 0; m < count; m++) from[m] = from[2 * m] + from[2 * m + 1];
    memcpy(to, from, (size_t)size * sizeof *to);
}

// Back through one token: grad_h is the gradient of the state after it, then of the state before it.
static void reverse(const token *x, plane *A, plane *before, plane *after, plane *decay, plane *grad_A, plane *grad_h,
                    float *grad_inflow, float *grad_delta, float *grad_B, float *grad_C, int64_t size) {
    float to_B[size][FOLD] ALIGNED, to_C[size][FOLD] ALIGNED;
    plane g ALIGNED, inflow ALIGNED = {0}, delta ALIGNED = {0};
    memcpy(g, x->g, sizeof g);
    for (int64_t n = 0; n < size; n++) {
        float sum_B[FOLD] ALIGNED = {0}, sum_C[FOLD] ALIGNED = {0};
        for (int64_t j = 0; j < LANES; j += FOLD)
#pragma omp simd
            for (int64_t i = j; i < j + FOLD; i++) {
                float through = grad_h[n][i] + g[i] * x->C[n], back = through * decay[n][i];
                float exponent = back * before[n][i];
                sum_C[i - j] += g[i] * after[n][i];
                sum_B[i - j] += through * x->inflow[i];
                inflow[i] += through * x->B[n];
                delta[i] += exponent * A[n][i];
                grad_A[n][i] += exponent * x->delta[i];
                grad_h[n][i] = back;
            }
        memcpy(to_B[n], sum_B, sizeof sum_B);
        memcpy(to_C[n], sum_C, sizeof sum_C);
    }
    fold(grad_B, to_B[0], size);
    fold(grad_C, to_C[0], size);
    memcpy(grad_inflow, inflow, sizeof inflow);
    for (int64_t i = 0; i < LANES; i++) grad_delta[i] = delta[i] * LN2;
}

static void scan_backward(const void *data, int64_t task) {
    const scan_job *job = data;
    const slice k = channels(task, job->width, job->bf16);
    const int64_t size = job->size, at = k.b * job->width + k.first;
    plane *A = (plane *)job->scratch + omp_get_thread_num() * (2 * SPAN + 4) * size;
    plane *to_A = A + size, *grad_h = to_A + size, *decay = grad_h + size, *h = decay + SPAN * size;
    plane to_D ALIGNED = {0}, to_bias ALIGNED = {0}, to_u ALIGNED, to_dt ALIGNED, to_z ALIGNED, inflow ALIGNED;
    reader r;
    scan_open(&r, job, k);
    scan_rates(A, job, k);
    gather(to_A, 0, 0, size);
    gather(grad_h, job->grad_last ? job->grad_last + at * size : 0, k.count, size);
    for (int64_t span = spans(job->length) - 1; span >= 0; span--) {
        int64_t start = span * SPAN, count = scan_read(&r, job, k, start);
        memcpy(h, (plane *)job->saved + (task * spans(job->length) + span) * size, (size_t)size * sizeof(plane));
        for (int64_t s = 0; s < count; s++)  // h[s * size] is the state before token s
            replay(&r.x[s], A, h + s * size, h + (s + 1) * size, decay + s * size, size);
        for (int64_t s = count - 1; s >= 0; s--) {
            token *x = &r.x[s];
            int64_t out = (task * job->length + start + s) * size;
            if (job->z.data) {
                for (int64_t i = 0; i < LANES; i++) {
                    float gate = sigmoid(x->z[i]);
                    to_z[i] = x->g[i] * x->y[i] * gate * (1.f + x->z[i] * (1.f - gate));
                    x->g[i] *= x->z[i] * gate;
                }
                store(job->grad_z, to_z, k, start + s);
            }
            reverse(x, A, h + s * size, h + (s + 1) * size, decay + s * size, to_A, grad_h, inflow, to_dt,
                    job->grad_B + out, job->grad_C + out, size);
            for (int64_t i = 0; i < LANES; i++) {
                to_u[i] = x->g[i] * r.D[i] + inflow[i] * x->delta[i];
                to_dt[i] = (to_dt[i] + inflow[i] * x->u[i]) * sigmoid(x->raw[i]);
                to_D[i] += x->g[i] * x->u[i];
                to_bias[i] += to_dt[i];
            }
            store(job->grad_u, to_u, k, start + s);
            store(job->grad_dt, to_dt, k, start + s);
        }
    }
    scatter(job->grad_A + at * size, to_A, k.count, size);
    scatter(job->grad_state + at * size, grad_h, k.count, size);
    scatter(job->grad_D + at, &to_D, k.count, 1);
    scatter(job->grad_dt_bias + at, &to_bias, k.count, 1);
}

// One token. Each state is touched once, where it lies, so here the inner loop runs over the states of a channel.
static void scan_step(const void *data, int64_t task) {
    const scan_job *job = data;
    const slice k = channels(task, job->width, job->bf16);
    plane y;
    reader r;
    scan_open(&r, job, k);
    scan_read(&r, job, k, 0);
    for (int64_t i = 0; i < k.count; i++) {
        const token *x = r.x;
        const float *A = job->A + (k.first + i) * job->size, rate = x->delta[i] * LOG2E, z = x->z[i];
        float *h = job->last + (k.b * job->width + k.first + i) * job->size, sum = x->y[i];
#pragma omp simd reduction(+ : sum)
        for (int64_t n = 0; n < job->size; n++) {
            h[n] = exp2_fast(rate * A[n]) * h[n] + x->inflow[i] * x->B[n];
            sum += h[n] * x->C[n];
        }
        y[i] = job->z.data ? sum * z * sigmoid(z) : sum;
    }
    store(job->y, y, k, 0);
}

void ssm_scan_forward(const scan_job *job) { run(scan_forward, job, job->batch * groups(job), job->threads); }
void ssm_scan_backward(const scan_job *job) { run(scan_backward, job, job->batch * blocks(job->width), job->threads); }
void ssm_scan_step(const scan_job *job) { run(scan_step, job, job->batch * blocks(job->width), job->threads); }

// ---- Mamba-2, one token ----

static void ssd_step(const void *data, int64_t task) {
    const ssd_job *job = data;
    const int64_t b = task / job->heads, head = task % job->heads, group = head / (job->heads / job->groups);
    const slice states = {b, 0, job->size, job->bf16}, own = {b, head, 1, job->bf16};
    float B[MAX_STATES], C[MAX_STATES], dt;
    load(B, job->B, states, group);
    load(C, job->C, states, group);
    load(&dt, job->dt, own, 0);
    float delta = softplus(dt + (job->dt_bias ? job->dt_bias[head] : 0.f));
    if (dt > -5e3f)  // padding keeps delta = 0 whatever the limits
        delta = delta < job->low ? job->low : delta > job->high ? job->high : delta;
    const float decay = exp2_fast(delta * job->A[head] * LOG2E), skip = job->D ? job->D[head] : 0.f;
    for (int64_t first = 0; first < job->width; first += LANES) {
        const slice k = {b, first, smaller(LANES, job->width - first), job->bf16};
        plane x, y;
        load(x, job->x, k, head);
        for (int64_t i = 0; i < k.count; i++) {
            float *h = job->state + (task * job->width + first + i) * job->size, sum = skip * x[i];
#pragma omp simd reduction(+ : sum)
            for (int64_t n = 0; n < job->size; n++) {
                h[n] = decay * h[n] + delta * x[i] * B[n];
                sum += h[n] * C[n];
            }
            y[i] = sum;
        }
        store(job->y, y, k, head);
    }
}

void ssm_ssd_step(const ssd_job *job) { run(ssd_step, job, job->batch * job->heads, job->threads); }
