// The forward pass for generation on a CPU, in plain C (report 2.2): sums in fp32, weights in fp32 or bf16. decode.py
// packs the weights and calls it.
//
// Why C: a token through a small model is 50 microseconds of arithmetic, and a few hundred calls into torch cost ten
// times that. Here prefill, decode and draft are one call each, allocate nothing, and do not hold Python's lock: the
// trainer's thread runs on while the rollout thread is in here.
//
// A ROW'S BITS DEPEND ON THAT ROW ALONE. Every sum adds its terms one after the other, in an order that the model's
// shape and the row's own position fix. Vectors lie across outputs, never along a sum whose length or alignment the
// other rows could change. So a sequence gets the same bits in a batch of 1, 7 or 64, prefilled in chunks or at once,
// verified four tokens at a time or decoded one by one. tests/test_cpu_decode.py checks all of it against model.py.
//
// Everything is laid out in pieces of 16 x 16 floats, so that ONE product serves the weights, q k^T and p v:
//
//     weights W [out,in]   panels of 16 outputs, input by input:   w[out/16][in][16]
//     block of KV cache    16 columns (tokens) at a time:          of each KV head keys k[d][16], then values
//                                                                  v[d/16][16 tokens][16]
//
// Widths that are no multiple of 16 (D, d, F, V) are padded with zeros, which change no sum (decode.py).
#include "cpu.h"

#define MAX_ROWS 48                                 // rows that go through a whole block together: fits the L2 cache

// ---- one product for everything ------------------------------------------------------------------------------------

// y[r][16 p + j] = base[r][16 p + j] + sum_k x[r][k] w[p][k][j] for R rows and P panels. The compiler knows R and P:
// R * P * NV sums are in flight at once, in registers. k runs in pieces of 16, `piece` floats apart. ahead: prefetch
// the weights this many floats behind those in use, 0 = no prefetch. more: the sums go on from those that y holds.
// half: w is bf16, widened to fp32 in registers, so the numbers are those of a copy in fp32.
INLINE void tile(const int R, const int P, int K, const float *x, long ldx, const int half, const void *w, long piece,
                 long panel, const int ahead, int more, const float *base, long ldb, float *y, long ldy) {
    vec sum[6][4][NV];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) sum[r][p][v] = more ? load(y + r * ldy + 16 * p + LANES * v) : (vec){0};
    const float *w32 = w;
    const uint16_t *w16 = w;
    for (int k = 0; k < K; k += 16, w32 += piece, w16 += piece) {
#pragma GCC unroll 2
        for (int i = 0; i < 16; i++) {
            vec column[4][NV];
#pragma GCC unroll 4
            for (int p = 0; p < P; p++)
                if (ahead && P <= 2 && half && i % 2 == 0) __builtin_prefetch(w16 + p * panel + ahead + 16 * i);
                else if (ahead && P <= 2 && !half) __builtin_prefetch(w32 + p * panel + ahead + 16 * i);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++)
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) {
                    long at = p * panel + 16 * i + LANES * v;
                    column[p][v] = half ? widen(w16 + at) : load(w32 + at);
                }
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                vec each = all(x[r * ldx + k + i]);
#pragma GCC unroll 4
                for (int p = 0; p < P; p++)
#pragma GCC unroll 4
                    for (int v = 0; v < NV; v++) sum[r][p][v] += each * column[p][v];
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                long at = 16 * p + LANES * v;
                store(y + r * ldy + at, base ? load(base + r * ldb + at) + sum[r][p][v] : sum[r][p][v]);
            }
}

// y [M,16 panels] = base + x [M,K] w. base: 0, a bias (ldb 0) or y itself (a residual). A panel of weights stays in the
// cache while all rows are multiplied with it. Several panels at once keep enough sums in flight, and use a number of x
// for two products; from 3 rows on their sums and columns would need more than AVX2's 16 registers.
INLINE void product(int M, int K, int panels, const float *x, long ldx, const int half, const void *w, long piece,
                    long panel, const int ahead, int more, const float *base, long ldb, float *y, long ldy) {
    int wide = M == 1 ? 4 : M == 2 || NV == 1 ? 2 : 1;
    for (int p = 0; p < panels; p += wide) {
        if (p + wide > panels) wide = 1;
        for (int r = 0, blocks = (M + 5) / 6; blocks; blocks--) {
            int R = (M - r + blocks - 1) / blocks;                  // M in nearly equal blocks of at most 6
#define TILE(rows, many) tile(rows, many, K, x + r * ldx, ldx, half, (const char *)w + p * panel * (half ? 2 : 4), \
                              piece, panel, ahead, more, base ? base + r * ldb + 16 * p : 0, ldb, y + r * ldy + 16 * p, ldy)
#define ONE_OR_TWO(rows) case rows: if (wide == 2 && (NV == 1 || rows <= 2)) TILE(rows, 2); else TILE(rows, 1); break
            if (wide == 4) TILE(1, 4);
            else switch (R) {
                ONE_OR_TWO(1); ONE_OR_TWO(2); ONE_OR_TWO(3); ONE_OR_TWO(4); ONE_OR_TWO(5); ONE_OR_TWO(6);
            }
            r += R;
        }
    }
}

// W is packed: its pieces lie one behind the other, and so do all weights, in the order in which they are read. With
// one or two panels at a time the processor's own prefetch is too short when the weights come from memory: help it.
static void linear(int half, int M, int in, int out, const float *x, const void *w, const float *base, long ldb,
                   float *y) {
    if (half) product(M, in, out / 16, x, in, 1, w, 256, 16L * in, 8192, 0, base, ldb, y, out);
    else product(M, in, out / 16, x, in, 0, w, 256, 16L * in, 4096, 0, base, ldb, y, out);
}

// ---- the small functions -------------------------------------------------------------------------------------------

// y = x / sqrt(mean(x^2) + eps) * gain, over `width` floats: D channels, then zeros
static void rmsnorm(const float *x, const float *gain, int D, int width, float eps, float *y) {
    vec squares[4] = {{0}};
    for (int i = 0; i < width; i += 16)
        for (int v = 0; v < NV; v++) squares[v] += load(x + i + LANES * v) * load(x + i + LANES * v);
    float mean = sum_of(squares[0] + squares[1] + (squares[2] + squares[3])) / D;
    float scale = 1.0f / sqrtf(mean + eps);
    for (int i = 0; i < width; i += LANES) store(y + i, load(x + i) * scale * load(gain + i));
}

// RoPE: (x1 cos - x2 sin, x2 cos + x1 sin) for the pairs (i, i + d/2), times `scale`
static void rotate(float *x, const float *cos, const float *sin, int d, float scale) {
    float *x1 = x, *x2 = x + d / 2;
    for (int i = 0; i < d / 2; i++) {
        float a = x1[i], b = x2[i];
        x1[i] = (a * cos[i] - b * sin[i]) * scale;
        x2[i] = (b * cos[i] + a * sin[i]) * scale;
    }
}

static float largest(const float *s, int L) {       // of L floats, L a multiple of 16
    vec most[NV];
    for (int v = 0; v < NV; v++) most[v] = load(s + LANES * v);
    for (int i = 16; i < L; i += 16)
        for (int v = 0; v < NV; v++) {
            vec x = load(s + i + LANES * v);
            most[v] = pick(x > most[v], x, most[v]);
        }
    float max = most[0][0];
    for (int v = 0; v < NV; v++)
        for (int i = 0; i < LANES; i++) max = most[v][i] > max ? most[v][i] : max;
    return max;
}

// s [L] -> e^(s - max) in place for the first n, 0 for the rest. -> their sum. L, a multiple of 16, depends on n alone.
static float softmax(float *s, int n, int L) {
    for (int i = n; i < L; i++) s[i] = -INFINITY;
    float max = largest(s, L);
    vec total[NV] = {{0}};
    for (int i = 0; i < L; i += 16)
        for (int v = 0; v < NV; v++) {
            vec e = exp_negative(load(s + i + LANES * v) - max);
            store(s + i + LANES * v, e);
            total[v] += e;
        }
    for (int v = 1; v < NV; v++) total[0] += total[v];
    return sum_of(total[0]);
}

// ---- a block of the trunk, or of an MTP layer ----------------------------------------------------------------------

typedef struct {                                    // of model.ModelConfig; widths ending in p are padded to 16
    int32_t D, Dp, d, dp, H, K, Fp, V, Vp, C;       // C: columns (tokens) of a row of the state
    int32_t draft_V;                                // drafts are among the first draft_V ids
    int32_t block;                                  // columns of a block of the KV cache, a multiple of 16
    int32_t half;                                   // 1: matrices and embedding are bf16, 0: fp32
    float eps;
} Shape;

typedef struct {                                    // one block: matrices are packed; gains, biases fp32; no bias: 0
    const float *norm1, *norm2, *q_bias, *kv_bias;
    const void *q, *kv, *o, *gate_up, *down;
} Block;

typedef struct {                                    // what an MTP layer has beside its block
    const float *hidden_norm, *token_norm, *final_norm;
    const void *input_proj;
} Mtp;

typedef struct {
    Shape s;
    int64_t n_layer, n_draft, n_mtp;                // blocks and caches: n_layer of the trunk, then n_mtp MTP layers
    const Block *blocks;
    float *const *caches;
    const Mtp *mtp;
    const float *norm, *cos, *sin;                  // cos, sin [C,d] of every position
    const void *embedding, *lm_head;
    float *scratch;                                 // scratch_floats()
} Model;

typedef struct {                                    // runner.ForwardContext: N = B Q tokens, Q of each of B sequences
    int64_t Q;                                      // token r belongs to sequence r / Q,
    const int64_t *positions, *columns;             // sees the columns up to positions[r], and fills columns[r]
    const int32_t *table;                           // [B,C / block], the blocks of each sequence
} Context;

int64_t scratch_floats(const Shape *s) {
    long rows = MAX_ROWS * (2L * s->Dp + (long)s->dp * (2 * s->H + 2 * s->K) + 2L * s->Fp);
    return rows + (long)s->H / s->K * s->C + 3L * s->Vp;
}

// The block of the KV cache that holds this column of token r's sequence.
static float *block_of(const Shape *s, float *cache, const Context *ctx, int r, int64_t column) {
    int64_t b = ctx->table[r / ctx->Q * (s->C / s->block) + column / s->block];
    return cache + b * s->block * s->K * 2 * s->dp;
}

// Keys and values kv [K][2][dp] of token r into the cache.
static void append(const Shape *s, float *cache, const Context *ctx, int r, const float *kv) {
    int64_t column = ctx->columns[r], j = column % 16;
    float *key = block_of(s, cache, ctx, r, column) + column % s->block / 16 * s->K * 32 * s->dp;
    for (int k = 0; k < s->K; k++, kv += 2 * s->dp, key += 32 * s->dp) {
        for (int i = 0; i < s->dp; i++) key[16 * i + j] = kv[i];
        for (int i = 0; i < s->dp; i += 16) memcpy(key + 16 * s->dp + 16 * i + 16 * j, kv + s->dp + i, 64);
    }
}

// o = softmax(q k^T) v for token r, q [H][dp] rotated and scaled; the G query heads of one KV head are G rows. Block by
// block; the sums over values go on from one block to the next, in the order of the text.
static void attend(const Shape *s, float *cache, const Context *ctx, int r, const float *q, float *o, float *scores) {
    int G = s->H / s->K, n = ctx->positions[r] + 1, L = (n + 15) / 16 * 16, dp = s->dp, size = s->block;
    long piece = s->K * 32L * dp;                                   // from 16 columns to the next 16
    for (int k = 0; k < s->K; k++, q += G * dp, o += G * dp) {
        for (int c = 0; c < L; c += size) {
            const float *keys = block_of(s, cache, ctx, r, c) + k * 32L * dp;
            product(G, dp, (L - c < size ? L - c : size) / 16, q, dp, 0, keys, 256, piece, 0, 0, 0, 0, scores + c, s->C);
        }
        float total[G];
        for (int g = 0; g < G; g++) total[g] = softmax(scores + (long)g * s->C, n, L);
        for (int c = 0; c < L; c += size) {
            const float *values = block_of(s, cache, ctx, r, c) + k * 32L * dp + 16 * dp;
            product(G, L - c < size ? L - c : size, dp / 16, scores + c, s->C, 0, values, piece, 256, 0, c > 0, 0, 0, o,
                    dp);
        }
        for (int g = 0; g < G; g++)
            for (int i = 0; i < dp; i += LANES) store(o + g * dp + i, load(o + g * dp + i) / total[g]);
    }
}

// Block.forward of model.py for x [N,Dp], in place. emit: which rows need an output: 1 all, Q only the last of each
// sequence (compacted to the front of x), 0 none (fill the KV cache only). Keys and values are stored for all rows.
static void block(const Model *m, int64_t layer, const Context *ctx, int N, int emit, float *x) {
    const Shape *s = &m->s;
    const Block *w = m->blocks + layer;
    const float *cos = m->cos, *sin = m->sin;
    int Dp = s->Dp, dp = s->dp, H = s->H, K = s->K, n_out = 0;
    float *cache = m->caches[layer], *normed = m->scratch, *q = normed + MAX_ROWS * 2 * Dp;
    float *o = q + MAX_ROWS * H * dp, *kv = o + MAX_ROWS * H * dp;
    float *gate_up = kv + MAX_ROWS * 2 * K * dp, *scores = gate_up + MAX_ROWS * 2 * s->Fp;
    for (int first = 0; first < N; first += MAX_ROWS) {
        int M = N - first < MAX_ROWS ? N - first : MAX_ROWS, emitted = 0;
        for (int i = 0; i < M; i++) rmsnorm(x + (long)(first + i) * Dp, w->norm1, s->D, Dp, s->eps, normed + i * Dp);
        linear(s->half, M, Dp, 2 * K * dp, normed, w->kv, w->kv_bias, 0, kv);
        float *xm = x + (long)n_out * Dp;                           // never overtakes the rows still to come
        for (int i = 0; i < M; i++) {
            if (!emit || (first + i + 1) % emit) continue;
            if (emit > 1) {
                memmove(normed + emitted * Dp, normed + i * Dp, Dp * sizeof(float));
                memmove(xm + emitted * Dp, x + (long)(first + i) * Dp, Dp * sizeof(float));
            }
            emitted++;
        }
        linear(s->half, emitted, Dp, H * dp, normed, w->q, w->q_bias, 0, q);
        for (int i = 0, j = 0; i < M; i++) {                        // in order: a token sees those before it
            int r = first + i, emits = emit && (r + 1) % emit == 0;
            int64_t p = ctx->positions[r] * s->d;
            for (int k = 0; k < K; k++) rotate(kv + (2 * K * i + 2 * k) * dp, cos + p, sin + p, s->d, 1);
            append(s, cache, ctx, r, kv + 2 * K * dp * i);
            if (!emits) continue;
            for (int h = 0; h < H; h++) rotate(q + (j * H + h) * dp, cos + p, sin + p, s->d, 1 / sqrtf(s->d));
            attend(s, cache, ctx, r, q + j * H * dp, o + j * H * dp, scores);
            j++;
        }
        if (!emitted) continue;
        linear(s->half, emitted, H * dp, Dp, o, w->o, xm, Dp, xm);           // x += o W_o
        for (int j = 0; j < emitted; j++) rmsnorm(xm + j * Dp, w->norm2, s->D, Dp, s->eps, normed + j * Dp);
        linear(s->half, emitted, Dp, 2 * s->Fp, normed, w->gate_up, 0, 0, gate_up);
        for (int j = 0; j < emitted; j++) {                         // silu(gate) up, packed to [emitted,Fp]
            const float *gate = gate_up + (long)j * 2 * s->Fp, *up = gate + s->Fp;
            float *y = gate_up + (long)j * s->Fp;                   // never overtakes gate and up of later rows
            for (int i = 0; i < s->Fp; i += LANES) {
                vec g = load(gate + i), u = load(up + i), e = exp_negative(pick(g > 0, -g, g));
                store(y + i, g * pick(g > 0, (vec){0} + 1, e) / (e + 1.0f) * u);
            }
        }
        linear(s->half, emitted, s->Fp, Dp, gate_up, w->down, xm, Dp, xm);   // x += (silu(gate) up) W_down
        n_out += emitted;
    }
}

static void copy_row(const Shape *s, const float *from, float *x) {
    memcpy(x, from, s->D * sizeof(float));
    memset(x + s->D, 0, (s->Dp - s->D) * sizeof(float));
}

static void embed(const Model *m, int64_t id, float *x) {           // the embedding of one token
    const Shape *s = &m->s;
    if (!s->half) return copy_row(s, (const float *)m->embedding + id * s->D, x);
    const uint16_t *from = (const uint16_t *)m->embedding + id * s->D;
    for (int i = 0; i < s->D; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(x + i, &bits, 4);
    }
    memset(x + s->D, 0, (s->Dp - s->D) * sizeof(float));
}

// ---- trunk, MTP layers, lm_head ------------------------------------------------------------------------------------

// ids [N] through all blocks -> x [N,Dp], the state before the final norm. fill: fill the KV cache only.
void trunk(const Model *m, const Context *ctx, int64_t N, const int64_t *ids, int64_t fill, float *x) {
    for (int r = 0; r < N; r++) embed(m, ids[r], x + (long)r * m->s.Dp);
    for (int i = 0; i < m->n_layer; i++) block(m, i, ctx, N, !(fill && i == m->n_layer - 1), x);
}

// MTP layer k: x = W [RMSNorm(h) ; RMSNorm(emb(ahead))], then its block. h [N,D]: the trunk's state before the final
// norm. emit as in block().
void mtp(const Model *m, int64_t k, const Context *ctx, int64_t N, const float *h, const int64_t *ahead, int64_t emit,
         float *x) {
    const Shape *s = &m->s;
    const Mtp *w = m->mtp + k;
    int Dp = s->Dp;
    for (int first = 0; first < N; first += MAX_ROWS) {
        int M = N - first < MAX_ROWS ? N - first : MAX_ROWS;
        for (int i = 0; i < M; i++) {
            float *both = m->scratch + (long)i * 2 * Dp, *row = x + (long)(first + i) * Dp;
            copy_row(s, h + (long)(first + i) * s->D, row);
            rmsnorm(row, w->hidden_norm, s->D, Dp, s->eps, both);
            embed(m, ahead[first + i], row);
            rmsnorm(row, w->token_norm, s->D, Dp, s->eps, both + Dp);
        }
        linear(s->half, M, 2 * Dp, Dp, m->scratch, w->input_proj, 0, 0, x + (long)first * Dp);
    }
    block(m, m->n_layer + k, ctx, N, emit, x);
}

// logits [N,V rounded up to 16] = the first V rows of lm_head(RMSNorm(x)), x [N,Dp], and -inf behind them; layer: whose
// norm, -1 = the trunk's, k = MTP layer k's.
void head(const Model *m, int64_t layer, int64_t N, int64_t V, const float *x, float *logits) {
    const Shape *s = &m->s;
    const float *norm = layer < 0 ? m->norm : m->mtp[layer].final_norm;
    long Vp = (V + 15) / 16 * 16;
    for (int first = 0; first < N; first += MAX_ROWS) {
        int M = N - first < MAX_ROWS ? N - first : MAX_ROWS;
        for (int i = 0; i < M; i++)
            rmsnorm(x + (long)(first + i) * s->Dp, norm, s->D, s->Dp, s->eps, m->scratch + (long)i * s->Dp);
        linear(s->half, M, s->Dp, Vp, m->scratch, m->lm_head, 0, 0, logits + first * Vp);
    }
    for (int i = 0; i < N; i++)
        for (int j = V; j < Vp; j++) logits[i * Vp + j] = -INFINITY;
}

// The first of the largest of V logits, with -inf up to a multiple of 16 behind them. 0 if all are NaN.
static int argmax(int V, const float *logits) {
    float max = largest(logits, (V + 15) / 16 * 16);
    for (int i = 0; i < V; i++)
        if (logits[i] == max) return i;
    return 0;
}

// ---- sampling a token: sampling.py for one row ---------------------------------------------------------------------

typedef struct { float p; int32_t id; } Candidate;

static int more_likely(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return x->p != y->p ? (x->p < y->p) - (x->p > y->p) : x->id - y->id;
}

// e [V], probabilities times total: everything outside top-k and top-p is set to 0 (sampling.top_p_filter). -> the new
// total. Sorts only the tokens above a threshold, which is lowered until they have the mass top_p or are top_k tokens.
static float top_p_filter(int V, float *e, Candidate *found, float total, float top_p, int64_t top_k) {
    int n = 0;
    for (float floor = 0.0625f; ; floor *= 0.0625f) {
        float mass = 0, limit = floor > 1e-12f ? floor * total : 0;
        n = 0;
        for (int i = 0; i < V; i++) found[n] = (Candidate){e[i], i}, n += e[i] >= limit;    // no branch to mispredict
        for (int i = 0; i < n; i++) mass += found[i].p;
        if (limit == 0 || mass >= top_p * 1.0001f * total || (top_k && n >= top_k)) break;
    }
    qsort(found, n, sizeof(Candidate), more_likely);
    float kept = 0;
    memset(e, 0, V * sizeof(float));
    for (int rank = 0; rank < n; rank++) {
        if (rank && (kept >= top_p * total || (top_k && rank >= top_k))) break;
        kept += found[rank].p;
        e[found[rank].id] = found[rank].p;
    }
    return kept;
}

static float sum16(const float *e) {
    vec sum = load(e);
    for (int v = 1; v < NV; v++) sum += load(e + LANES * v);
    return sum_of(sum);
}

#define BROKEN (-(1LL << 62))                       // runner.BROKEN

static int all_finite(int V, const float *x) {      // 0 if one of x [V] is NaN or infinite: its exponent is all ones
    uint32_t odd = 0, bits;
    for (int i = 0; i < V; i++) {
        memcpy(&bits, x + i, 4);
        odd |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return !odd;
}

// The first id whose cumulated probability exceeds u; at temperature 0 the most likely. -> id; its log-prob in *logp,
// which is NaN where a logit is NaN or infinite.
static int sample_token(const Model *m, const float *logits, float u, float temperature, float top_p, int64_t top_k,
                        float *logp) {
    int V = m->s.V, Vp = m->s.Vp, id = 0;
    float *e = m->scratch + scratch_floats(&m->s) - 3L * Vp;        // [Vp], behind it [V] candidates
    for (int i = 0; i < V; i++) e[i] = temperature > 0 ? logits[i] / temperature : logits[i];
    if (!all_finite(V, e)) {
        if (!all_finite(V, logits)) {
            *logp = NAN;
            return 0;
        }
        float max = largest(logits, Vp);                            // the temperature alone is so low: this keeps
        for (int i = 0; i < V; i++) e[i] = (logits[i] - max) / temperature;   // the largest at 0
    }
    if (temperature == 0) id = argmax(V, logits);
    float total = softmax(e, V, Vp), sum = 0, piece = 0, before = 0;
    if (temperature > 0) {
        if (top_p < 1 || top_k > 0) total = top_p_filter(V, e, (Candidate *)(e + Vp), total, top_p, top_k);
        for (int i = 0; i < Vp; i += 16) sum += sum16(e + i);       // in the order of the search below: same bits
        float target = u * sum;                                     // below sum, for u <= 1 - 2^-24
        for (; id < Vp - 16 && !(before + (piece = sum16(e + id)) > target); id += 16) before += piece;
        int first = id, end = V - first < 16 ? V : first + 16;      // 16 at a time, then one by one
        while (!((before += e[id]) > target) && id < end - 1) id++;
        while (id > first && !(e[id] > 0)) id--;                    // rounding found none: the last possible one
    }
    *logp = logf(e[id] / total);
    return id;
}

// ---- what decode.py calls: the methods of runner.TorchRunner of the same names --------------------------------------

typedef struct {                                    // TorchRunner.new_state, one row per sequence; decode.py's buffers
    int64_t ring, n_stops, most_drafts;
    int64_t *tokens;                                // [S,C]
    float *logp, *u;                                // [S,C]
    int64_t *n, *limit, *stop;                      // [S], [S], [S,n_stops]
    float *temperature, *top_p;                     // [S]
    int64_t *top_k;                                 // [S]
    int32_t *table;                                 // [S,C / block]
    float *h;                                       // [S,ring,D], the trunk state of position p at p % ring
    int64_t *verified, *accepted;                   // [S,most_drafts]
    uint8_t *ended;                                 // [S], written by decode()
    int64_t *positions, *columns, *ids;             // of the tokens of one forward
    float *x, *states, *logits;
} State;

static uint64_t splitmix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

// u [n]: the random numbers of a request's first n tokens, those of sampling.uniform.
void uniform(int64_t seed, int64_t n, float *u) {
    for (int64_t i = 0; i < n; i++) u[i] = (splitmix(splitmix(seed) + (i + 1) * 0x9E3779B97F4A7C15u) >> 40) * 0x1p-24f;
}

// Chunked prefill: T more tokens of the B prompts in rows first .. first + B - 1, behind the n - 1 that are in the KV
// cache: through the trunk, and as keys and values of the MTP layers. end [B]: tokens of each in the cache afterwards,
// without the padding.
void prefill(const Model *m, const State *t, int64_t first, int64_t B, int64_t T, const int64_t *end) {
    int64_t N = B * T, C = m->s.C, D = m->s.D;
    const int64_t *tokens = t->tokens + first * C, *n = t->n + first;
    for (int i = 0; i < N; i++) {
        int64_t p = n[i / T] - 1 + i % T;
        t->positions[i] = p < C ? p : C - 1;
        t->ids[i] = tokens[i / T * C + t->positions[i]];
    }
    Context ctx = {T, t->positions, t->positions, t->table + first * (C / m->s.block)};
    trunk(m, &ctx, N, t->ids, m->n_draft == 0, t->x);
    if (m->n_draft == 0) return;
    for (int i = 0; i < N; i++) memcpy(t->states + i * D, t->x + (long)i * m->s.Dp, D * sizeof(float));
    for (int k = 0; k < m->n_draft && k < m->n_mtp; k++) {      // position p of layer k takes x_{p+k+1} where it exists
        for (int i = 0; i < N; i++) {
            int64_t ahead = t->positions[i] + k + 1;
            t->ids[i] = tokens[i / T * C + (ahead < C ? ahead : C - 1)];
        }
        mtp(m, k, &ctx, N, t->states, t->ids, 0, t->x);
    }
    for (int r = 0; r < B; r++)                     // the last real states of each prompt into its ring
        for (int64_t p = end[r] - t->ring > n[r] - 1 ? end[r] - t->ring : n[r] - 1; p < end[r]; p++)
            memcpy(t->h + ((first + r) * t->ring + p % t->ring) * D, t->states + (r * T + p - n[r] + 1) * D,
                   D * sizeof(float));
}

// Verify, accept and commit, for each of the first R rows: its last committed token and its drafts through the trunk;
// tokens are sampled for as long as the drafts equal them. -> most tokens that a row has committed. ended[r] = 1 where
// a sequence has ended, their number in *n_ended.
int64_t decode(const Model *m, const State *t, int64_t R, int64_t *n_ended) {
    int64_t Q = m->n_draft + 1, C = m->s.C, most = 0, D = m->s.D;
    for (int r = 0; r < R; r++)
        for (int q = 0; q < Q; q++) {
            t->positions[r * Q + q] = t->n[r] - 1 + q;
            t->ids[r * Q + q] = t->tokens[r * C + t->n[r] - 1 + q];
        }
    Context ctx = {Q, t->positions, t->positions, t->table};
    trunk(m, &ctx, R * Q, t->ids, 0, t->x);
    head(m, -1, R * Q, m->s.V, t->x, t->logits);
    *n_ended = 0;
    for (int r = 0; r < R; r++) {
        int64_t n = t->n[r], n_committed = 0, *tokens = t->tokens + r * C, accepted = 1;
        for (int q = 0; q < Q && m->n_draft; q++)
            memcpy(t->h + (r * t->ring + (n - 1 + q) % t->ring) * D, t->x + (r * Q + q) * m->s.Dp, D * sizeof(float));
        t->ended[r] = 0;
        while (accepted && !t->ended[r]) {
            int64_t q = n_committed++, target = r * C + n + q;
            int id = sample_token(m, t->logits + (r * Q + q) * m->s.Vp, t->u[target], t->temperature[r], t->top_p[r],
                                  t->top_k[r], t->logp + target);
            accepted = q < m->n_draft && tokens[n + q] == id;   // draft q exists and equals the sampled token
            if (q < m->n_draft && n > 1) {                          // after a prompt of one token there are no drafts
                t->verified[r * t->most_drafts + q]++;
                t->accepted[r * t->most_drafts + q] += accepted;
            }
            tokens[n + q] = id;
            t->ended[r] = n + n_committed >= t->limit[r] || isnan(t->logp[target]);
            for (int i = 0; i < t->n_stops; i++) t->ended[r] |= t->stop[r * t->n_stops + i] == id;
        }
        t->n[r] = n + n_committed;
        *n_ended += t->ended[r];
        most = n_committed > most ? n_committed : most;
    }
    return most;
}

// New drafts for rows first .. first + B - 1, over the window that TorchRunner.draft explains: layer k reads the trunk
// states of positions n-1-W .. n-2 from the ring and writes the draft of x_{n+k}. Further drafts than layers: the first
// layer again, one position further on, on its own normed state.
void draft(const Model *m, const State *t, int64_t first, int64_t B, int64_t E) {
    int64_t W = E > m->n_draft ? E : m->n_draft, C = m->s.C, D = m->s.D;
    for (int r = 0; r < B; r++)
        for (int w = 0; w < W; w++) {
            int64_t row = first + r, p = t->n[row] - 1 + w - W, real = p > 0 ? p : 0, i = r * W + w;
            t->positions[i] = real;
            t->columns[i] = p < 0 ? C - 1 : real;           // before the text begins: into a column that no text reaches
            memcpy(t->states + i * D, t->h + (row * t->ring + real % t->ring) * D, D * sizeof(float));
        }
    Context ctx = {W, t->positions, t->columns, t->table + first * (C / m->s.block)};
    for (int k = 0; k < m->n_draft; k++) {
        int layer = k < m->n_mtp ? k : 0, ahead = layer + 1;
        for (int r = 0; r < B && k >= m->n_mtp; r++) {
            rmsnorm(t->x + r * m->s.Dp, m->mtp->final_norm, D, m->s.Dp, m->s.eps, m->scratch);
            for (int i = 0; i < D; i++) t->states[r * D + i] = m->scratch[i] / m->norm[i];
            t->positions[r] = t->columns[r] = t->n[first + r] - 2 + k;
            ctx.Q = W = 1;
        }
        for (int i = 0; i < B * W; i++) t->ids[i] = t->tokens[(first + i / W) * C + t->positions[i] + ahead];
        mtp(m, layer, &ctx, B * W, t->states, t->ids, W, t->x);
        head(m, layer, B, m->s.draft_V, t->x, t->logits);
        for (int r = 0; r < B; r++) {
            int64_t target = (first + r) * C + t->n[first + r] + k;
            const float *logits = t->logits + r * ((m->s.draft_V + 15L) / 16 * 16);
            t->tokens[target] = argmax(m->s.draft_V, logits);
            if (!all_finite(m->s.draft_V, logits))                  // no number: Engine.retire says so
                t->accepted[(first + r) * t->most_drafts + k] = BROKEN;
        }
    }
}
