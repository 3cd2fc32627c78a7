// The training kernels in fp32 on a CPU: RMSNorm, SwiGLU, RoPE and causal attention, forward and backward. train.py
// calls them; the formulas are in kernels/rmsnorm.py, swiglu.py, rope.py and attention.py. The matrix products with
// weights, where MKL is at its best, stay torch's.
//
// Why C: with heads of 16 channels and documents of a hundred tokens torch's attention spends most of its time between
// its products, and each of its elementwise operations is a pass over memory. Here a document's keys stay in the L1
// cache while its queries are computed, and a row is read once.
//
// All tensors are contiguous; D, F and d are multiples of 16. One thread; sums run in a fixed order, and a document's
// bits do not depend on what is packed beside it.
#include "cpu.h"

// ---- RMSNorm -------------------------------------------------------------------------------------------------------

// y = s r w with s = x + residual (residual 0: s = x, not written), r = 1 / sqrt(mean(s^2) + eps); N rows of D
void norm_forward(int64_t N, int64_t D, float eps, const float *x, const float *residual, const float *w, float *s,
                  float *y, float *r) {
    for (int64_t n = 0; n < N; n++, x += D, y += D) {
        vec squares[NV] = {{0}};
        for (int64_t i = 0; i < D; i += 16)
            for (int v = 0; v < NV; v++) {
                vec t = load(x + i + LANES * v);
                if (residual) store(s + i + LANES * v, t = t + load(residual + i + LANES * v));
                squares[v] += t * t;
            }
        for (int v = 1; v < NV; v++) squares[0] += squares[v];
        r[n] = 1.0f / sqrtf(sum_of(squares[0]) / D + eps);
        const float *from = residual ? s : x;
        for (int64_t i = 0; i < D; i += LANES) store(y + i, load(from + i) * r[n] * load(w + i));
        if (residual) residual += D, s += D;
    }
}

// dx = ds + r (dy w - h mean(dy w h)), dw = sum of dy h, with h = s r; ds, or 0, is the gradient of s from elsewhere.
// dw [2,D]: the result, and behind it the sum of the last 64 rows at most: a single sum over all rows would round more
void norm_backward(int64_t N, int64_t D, const float *s, const float *w, const float *r, const float *dy,
                   const float *ds, float *dx, float *dw) {
    float *partial = dw + D;
    memset(dw, 0, 2 * D * sizeof(float));
    for (int64_t n = 0; n < N; n++, s += D, dy += D, dx += D) {
        vec dot[NV] = {{0}};
        for (int64_t i = 0; i < D; i += 16)
            for (int v = 0; v < NV; v++) {
                vec t = load(dy + i + LANES * v) * (load(s + i + LANES * v) * r[n]);    // dy h
                store(partial + i + LANES * v, load(partial + i + LANES * v) + t);
                dot[v] += t * load(w + i + LANES * v);
            }
        for (int v = 1; v < NV; v++) dot[0] += dot[v];
        float mean = sum_of(dot[0]) / D;
        for (int64_t i = 0; i < D; i += LANES) {
            vec d = (load(dy + i) * load(w + i) - load(s + i) * r[n] * mean) * r[n];
            store(dx + i, ds ? d + load(ds + i) : d);
        }
        if (ds) ds += D;
        if (n % 64 == 63 || n == N - 1)
            for (int64_t i = 0; i < D; i++) dw[i] += partial[i], partial[i] = 0;
    }
}

// ---- SwiGLU --------------------------------------------------------------------------------------------------------

INLINE vec sigmoid(vec g) {
    const vec zero = {0};
    vec e = exp_negative(pick(g < zero, g, -g));                    // e^-|g| never overflows
    return pick(g < zero, e, zero + 1.0f) / (e + 1.0f);
}

void swiglu_forward(int64_t n, const float *gate, const float *up, float *y) {
    for (int64_t i = 0; i < n; i += LANES) {
        vec g = load(gate + i);
        store(y + i, g * sigmoid(g) * load(up + i));
    }
}

void swiglu_backward(int64_t n, const float *gate, const float *up, const float *dy, float *dgate, float *dup) {
    for (int64_t i = 0; i < n; i += LANES) {
        vec g = load(gate + i), d = load(dy + i), sig = sigmoid(g);
        store(dgate + i, d * load(up + i) * sig * (g * (1.0f - sig) + 1.0f));
        store(dup + i, d * g * sig);
    }
}

// ---- RoPE ----------------------------------------------------------------------------------------------------------

// x [N,heads,d] -> y, rotated by the angles of cos, sin [N,d]; sign -1 rotates back, which is the backward pass
void rope(int64_t N, int64_t heads, int64_t d, const float *x, const float *cos, const float *sin, float sign,
          float *y) {
    for (int64_t n = 0; n < N; n++, cos += d, sin += d)
        for (int64_t h = 0; h < heads; h++, x += d, y += d)
            for (int64_t i = 0, j = d / 2; i < d / 2; i++, j++) {
                float a = x[i], b = x[j], s = sign * sin[i];
                y[i] = a * cos[i] - b * s;
                y[j] = b * cos[i] + a * s;
            }
}

// ---- attention -----------------------------------------------------------------------------------------------------

// The G query heads of n tokens that share a key/value head are n G rows, row r belonging to token r / G. Sixteen rows
// at a time stand side by side in the lanes: their scores are s[key][16], so the maximum, the sum and the mask of a row
// are operations between vectors, never inside one. Every product reads the scores in this form, along one axis or the
// other.

typedef struct {
    int64_t B, T, H, K, d;
    float scale;
    const int32_t *bounds;                          // [2,B,T]: first token and end of each token's document, or 0: none
    const float *q, *k, *v;                         // [B,T,H or K,d]
    float *o, *max, *total;                         // [B,T,H,d]; each row's largest score and sum of e^(s - max):
                                                    // [K][B T G + 16]
    const float *dout;                              // this and the next line: backward only
    float *dq, *dk, *dv;
} Attention;

#define ROWS (LANES == 16 ? 8 : 4)                  // rows of a product that are kept in registers
static int64_t up8(int64_t n) { return (n + 7) / 8 * 8; }

// y[m][16] (+)= sum_k x[m * along + k * step] w[k][16], m < M, a multiple of 8; rows of w and y are ldw and ldy apart
INLINE void product(int64_t M, int64_t K, const float *x, int64_t along, int64_t step, const float *w, int64_t ldw,
                    const int add, float *y, int64_t ldy) {
    for (int64_t m = 0; m < M; m += ROWS, x += ROWS * along, y += ROWS * ldy) {
        vec sum[ROWS][NV];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < NV; v++) sum[r][v] = add ? load(y + r * ldy + LANES * v) : (vec){0};
        for (int64_t k = 0; k < K; k++) {
            vec column[NV];
            for (int v = 0; v < NV; v++) column[v] = load(w + k * ldw + LANES * v);
            for (int r = 0; r < ROWS; r++) {
                vec each = all(x[r * along + k * step]);
                for (int v = 0; v < NV; v++) sum[r][v] += each * column[v];
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < NV; v++) store(y + r * ldy + LANES * v, sum[r][v]);
    }
}

// scores of L keys and 16 rows, s[L][16] = keys [L][d] rows^T, the rows given as [d][16]
INLINE void scores(int64_t L, int64_t d, const float *keys, const float *rows, float *s) {
    product(L, d, keys, d, 1, rows, 16, 0, s, 16);
}
// out[16][d] = s^T x for x [L][d]
INLINE void down(int64_t L, int64_t d, const float *s, const float *x, float *out) {
    for (int64_t c = 0; c < d; c += 16) product(16, L, s, 1, 16, x + c, d, 0, out + c, d);
}
// out[L][d] += s rows for rows [16][d]
INLINE void across(int64_t L, int64_t d, const float *s, const float *rows, float *out) {
    for (int64_t c = 0; c < d; c += 16) product(L, 16, s, 16, 1, rows + c, d, 1, out + c, d);
}

// n rows of d floats, `stride` apart -> x [L,d], the last L - n rows zero
INLINE void gather(int64_t n, int64_t L, int64_t d, const float *from, int64_t stride, float *x) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < d; c += LANES) store(x + i * d + c, load(from + i * stride + c));
    memset(x + n * d, 0, (L - n) * d * sizeof(float));
}

// rows r0 .. r0+15 of R, row r at `from` + r / G * stride + r % G * d, times scale -> x [16,d] and xt [d,16]
INLINE void gather16(int64_t r0, int64_t R, int64_t G, int64_t d, float scale, const float *from, int64_t stride,
                     float *x, float *xt) {
    int64_t token = r0 / G, g = r0 % G;
    for (int64_t r = 0; r < 16; r++, x += d, g + 1 < G ? g++ : (g = 0, token++))
        for (int64_t c = 0; c < d; c += LANES) {
            vec t = r0 + r < R ? load(from + token * stride + g * d + c) * scale : (vec){0};
            store(x + c, t);
            for (int i = 0; i < LANES; i++) xt[(c + i) * 16 + r] = t[i];
        }
}

// the reverse: x [16,d] -> the rows r0 .. r0+15 of R at `to`
INLINE void scatter16(int64_t r0, int64_t R, int64_t G, int64_t d, const float *x, int64_t stride, float *to) {
    int64_t token = r0 / G, g = r0 % G;
    for (int64_t r = r0; r < r0 + 16 && r < R; r++, x += d, g + 1 < G ? g++ : (g = 0, token++))
        for (int64_t c = 0; c < d; c += LANES) store(to + token * stride + g * d + c, load(x + c));
}

// the last token that each of the rows r0 .. r0+15 sees
INLINE void last_seen(int64_t r0, int64_t G, ivec *last) {
    int64_t token = r0 / G, g = r0 % G;
    for (int r = 0; r < 16; r++, g + 1 < G ? g++ : (g = 0, token++)) ((int32_t *)last)[r] = token;
}

// one document, tokens t0 .. t0+n-1 of the batch, for one key/value head; scratch: attention_floats() floats
INLINE void forward(const Attention *x, const int64_t d, int64_t t0, int64_t n, int64_t head, float *scratch) {
    int64_t G = x->H / x->K, R = n * G, qs = x->H * d, ks = x->K * d, most = up8(n);
    int64_t at = t0 * qs + head * G * d, row = head * (x->B * x->T * G + 16) + t0 * G;
    float *keys = scratch, *values = keys + most * d, *s = values + most * d, *q = s + most * 16, *qt = q + 16 * d;
    gather(n, most, d, x->k + t0 * ks + head * d, ks, keys);
    gather(n, most, d, x->v + t0 * ks + head * d, ks, values);
    for (int64_t r0 = 0; r0 < R; r0 += 16) {
        int64_t all_see = r0 / G, tokens = (r0 + 15) / G + 1, L = up8(tokens < n ? tokens : n);
        ivec last[NV];
        vec max[NV], total[NV], none = all(-INFINITY);
        gather16(r0, R, G, d, x->scale, x->q + at, qs, q, qt);
        scores(L, d, keys, qt, s);
        last_seen(r0, G, last);
        for (int v = 0; v < NV; v++) max[v] = none, total[v] = (vec){0};
        for (int64_t j = 0; j < L; j++)
            for (int v = 0; v < NV; v++) {
                vec t = load(s + j * 16 + LANES * v);
                if (j > all_see) store(s + j * 16 + LANES * v, t = pick(last[v] >= (int32_t)j, t, none));
                max[v] = pick(t <= max[v], max[v], t);                      // NaN reaches o through the sum
            }
        for (int64_t j = 0; j < L; j++)
            for (int v = 0; v < NV; v++) {
                vec e = exp_negative(load(s + j * 16 + LANES * v) - max[v]);
                store(s + j * 16 + LANES * v, e);
                total[v] += e;
            }
        for (int v = 0; v < NV; v++) {
            store(x->max + row + r0 + LANES * v, max[v]);
            store(x->total + row + r0 + LANES * v, total[v]);
        }
        down(L, d, s, values, q);
        for (int64_t r = 0; r < 16; r++)
            for (int64_t c = 0; c < d; c += LANES) store(q + r * d + c, load(q + r * d + c) / x->total[row + r0 + r]);
        scatter16(r0, R, G, d, q, qs, x->o + at);
    }
}

// p = e^(s - max) / total    dv = p^T do    dp = do v^T    ds = p (dp - sum of p dp)
// dq = scale ds k            dk = scale ds^T q
INLINE void backward(const Attention *x, const int64_t d, int64_t t0, int64_t n, int64_t head, float *scratch) {
    int64_t G = x->H / x->K, R = n * G, qs = x->H * d, ks = x->K * d, most = up8(n);
    int64_t at = t0 * qs + head * G * d, row = head * (x->B * x->T * G + 16) + t0 * G;
    float *keys = scratch, *values = keys + most * d, *dk = values + most * d, *dv = dk + most * d, *s = dv + most * d;
    float *ds = s + most * 16, *q = ds + most * 16, *qt = q + 16 * d, *g = qt + 16 * d, *gt = g + 16 * d;
    gather(n, most, d, x->k + t0 * ks + head * d, ks, keys);
    gather(n, most, d, x->v + t0 * ks + head * d, ks, values);
    memset(dk, 0, 2 * most * d * sizeof(float));
    for (int64_t r0 = 0; r0 < R; r0 += 16) {
        int64_t all_see = r0 / G, tokens = (r0 + 15) / G + 1, L = up8(tokens < n ? tokens : n);
        ivec last[NV];
        vec delta[NV], max[NV], total[NV];
        gather16(r0, R, G, d, 1, x->dout + at, qs, g, gt);
        last_seen(r0, G, last);
        for (int v = 0; v < NV; v++) {
            delta[v] = (vec){0};
            max[v] = load(x->max + row + r0 + LANES * v);
            total[v] = 1.0f / load(x->total + row + r0 + LANES * v);
        }
        for (int64_t r = R - r0; r < 16; r++)                               // lanes behind the last row have loaded
            ((float *)max)[r] = 0, ((float *)total)[r] = 0;                 // numbers of the next document: clear them
        gather16(r0, R, G, d, x->scale, x->q + at, qs, q, qt);
        scores(L, d, keys, qt, s);
        scores(L, d, values, gt, ds);
        for (int64_t j = 0; j < L; j++)
            for (int v = 0; v < NV; v++) {
                vec t = load(s + j * 16 + LANES * v) - max[v];
                if (j > all_see) t = pick(last[v] >= (int32_t)j, t, all(-INFINITY));
                vec p = exp_negative(t) * total[v];
                store(s + j * 16 + LANES * v, p);
                delta[v] += p * load(ds + j * 16 + LANES * v);
            }
        for (int64_t i = 0; i < L * 16; i += 16)
            for (int v = 0; v < NV; v++)
                store(ds + i + LANES * v, load(s + i + LANES * v) * (load(ds + i + LANES * v) - delta[v]));
        across(L, d, s, g, dv);
        across(L, d, ds, q, dk);                                            // q is scaled already
        down(L, d, ds, keys, q);
        for (int64_t i = 0; i < 16 * d; i += LANES) store(q + i, load(q + i) * x->scale);
        scatter16(r0, R, G, d, q, qs, x->dq + at);
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < d; c += LANES) {
            store(x->dk + (t0 + i) * ks + head * d + c, load(dk + i * d + c));
            store(x->dv + (t0 + i) * ks + head * d + c, load(dv + i * d + c));
        }
}

// floats of `scratch` for documents of up to T tokens
int64_t attention_floats(int64_t T, int64_t d) { return up8(T) * (4 * d + 32) + 64 * d; }

// each document of the batch and each key/value head; 16, the toy's head width, is a constant for the compiler.
// Returns 1, and stops, at a document whose bounds cannot be
#define EACH(pass)                                                                                                     \
    for (int64_t t = 0, end; t < x->B * x->T; t = end) {                                                               \
        end = x->bounds ? t / x->T * x->T + x->bounds[x->B * x->T + t] : t + x->T;                                     \
        if (end <= t || end > t / x->T * x->T + x->T) return 1;                                                        \
        for (int64_t head = 0; head < x->K; head++) {                                                                  \
            if (x->d == 16) pass(x, 16, t, end - t, head, scratch);                                                    \
            else pass(x, x->d, t, end - t, head, scratch);                                                             \
        }                                                                                                              \
    }                                                                                                                  \
    return 0;

int64_t attention_forward(const Attention *x, float *scratch) { EACH(forward) }
int64_t attention_backward(const Attention *x, float *scratch) { EACH(backward) }
