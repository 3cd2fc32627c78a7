// The forward pass for generation in fp32 on a CPU, in plain C (report 2.2; fast.py packs the weights and calls).
//
// Why C: a token through a small model is 50 microseconds of arithmetic, and a few hundred calls into torch cost
// ten times that. Here a forward is one call, with nothing allocated, and without Python's lock: the trainer's
// thread runs on while the rollout thread is in here.
//
// A ROW'S BITS DEPEND ON THAT ROW ALONE. Every sum runs over its terms one after the other, in an order that the
// model's shape and the row's own position fix; vectors lie across outputs, never along a sum whose length or
// alignment the company could change. So a sequence gets the same bits in a batch of 1, 7 or 64, read in chunks or
// at once, verified four tokens at a time or decoded one by one. tests/test_native.py holds all of it against
// model.py.
//
// Everything is laid out in pieces of 16 x 16 floats, so that ONE product serves the weights, q k^T and p v:
//
//     weights W [out,in]   panel of 16 outputs, then input:      w[out/16][in][16]
//     cache of a row       16 columns (tokens) at a time:        of each KV head keys k[d][16], then values
//                                                                v[d/16][16 tokens][16]
//
// Widths that are no multiple of 16 (D, d, F, V) are padded with zeros, which change no sum: fast.py.
#include "cpu.h"

#define MOST 48                                     // rows taken through a whole block at a time: fits the L2 cache

// ---- one product for everything -------------------------------------------------------------------------------------

// y[r][16 p + j] = base[r][16 p + j] + sum_k x[r][k] w[p][k][j] for R rows and P panels, R and P known to the compiler:
// R * P * NV sums are in flight at once, in registers. k runs in pieces of 16, `piece` floats apart. ahead: so many floats
// behind those in use are fetched meanwhile, 0: none.
INLINE void tile(const int R, const int P, int K, const float *x, long ldx, const float *w, long piece, long panel,
                 const int ahead, const float *base, long ldb, float *y, long ldy) {
    vec sum[6][4][NV];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) sum[r][p][v] = (vec){0};
    for (int k = 0; k < K; k += 16, w += piece) {
#pragma GCC unroll 2
        for (int i = 0; i < 16; i++) {
            vec column[4][NV];
#pragma GCC unroll 4
            for (int p = 0; p < P; p++)
                if (ahead && P <= 2) __builtin_prefetch(w + p * panel + ahead + 16 * i);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++)
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) column[p][v] = load(w + p * panel + 16 * i + LANES * v);
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
// L1 cache while all rows pass; 1 to 3 rows take several panels at once, to have enough sums in flight, but not 3 rows
// with narrow vectors: their sums and columns would need 17 of AVX2's 16 registers.
INLINE void product(int M, int K, int panels, const float *x, long ldx, const float *w, long piece, long panel,
                    const int ahead, const float *base, long ldb, float *y, long ldy) {
    int wide = M == 1 ? 4 : M == 2 || (M == 3 && NV == 1) ? 2 : 1;
    for (int p = 0; p < panels; p += wide) {
        if (p + wide > panels) wide = 1;
        for (int r = 0, blocks = (M + 5) / 6; blocks; blocks--) {
            int R = (M - r + blocks - 1) / blocks;                  // M in nearly equal blocks of at most 6
#define TILE(rows, many) tile(rows, many, K, x + r * ldx, ldx, w + p * panel, piece, panel, ahead, \
                              base ? base + r * ldb + 16 * p : 0, ldb, y + r * ldy + 16 * p, ldy)
            if (wide == 4) TILE(1, 4);
            else if (wide == 2) { if (R == 1) TILE(1, 2); else if (R == 2) TILE(2, 2); else TILE(3, 2); }
            else if (R == 1) TILE(1, 1);
            else if (R == 2) TILE(2, 1);
            else if (R == 3) TILE(3, 1);
            else if (R == 4) TILE(4, 1);
            else if (R == 5) TILE(5, 1);
            else TILE(6, 1);
            r += R;
        }
    }
}

// W packed: its pieces lie one behind the other, and so do all weights, in the order in which they are read (fast.py).
// Where few rows pass one or two panels, the processor itself fetches too little ahead once they come from memory.
static void linear(int M, int in, int out, const float *x, const float *w, const float *base, long ldb, float *y) {
    product(M, in, out / 16, x, in, w, 256, 16L * in, 4096, base, ldb, y, out);
}

// ---- the small functions --------------------------------------------------------------------------------------------

// y = x / sqrt(mean(x^2) + eps) * gain, over `width` floats of which D count
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

static float largest(const float *s, int L) {        // of L floats, L a multiple of 16
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

// s [L] -> e^(s - max) in place, for the first n; the rest 0. -> their sum. L, a multiple of 16, depends on n alone.
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

// ---- a block of the trunk, or of an MTP layer -----------------------------------------------------------------------

typedef struct {                                    // one shape for all functions; widths ending in p are padded to 16
    int32_t D, Dp, d, dp, H, K, Fp, V, Vp, C;       // C: columns (tokens) of a cache row, a multiple of 16
    float eps;
} Shape;

typedef struct {                                    // packed weights of one block; gains and biases as they are
    const float *norm1, *q, *q_bias, *kv, *kv_bias, *o, *norm2, *gate_up, *down;
} Block;

typedef struct {                                    // what an MTP layer has besides its block
    const float *input_proj, *hidden_norm, *token_norm, *final_norm;
} Entry;

typedef struct {
    Shape s;
    int64_t n_layer, n_draft;                       // trunk blocks, then MTP layers: n_layer + n_draft blocks and caches
    const Block *blocks;
    float *const *caches;
    const Entry *mtp;
    const float *embedding, *norm, *lm_head, *cos, *sin;            // cos, sin [C,d] of every position
    float *scratch;                                 // scratch_floats()
} Model;

typedef struct {                                    // where N = B Q tokens stand, Q of each of B sequences, in order
    int64_t first, Q;                               // token r belongs to row first + r / Q of the cache,
    const int64_t *position, *column;               // sees the columns up to position[r], and fills column[r]
} Plan;

int64_t scratch_floats(const Shape *s) {
    long rows = MOST * (2L * s->Dp + (long)s->dp * (2 * s->H + 2 * s->K) + 2L * s->Fp);
    return rows + (long)s->H / s->K * s->C + 3L * s->Vp;
}

// the cache of token r's row; pieces of 16 columns lie one behind the other, so that what is in use is in one place
static float *row_of(const Shape *s, float *cache, const Plan *at, int r) {
    return cache + (at->first + r / at->Q) * s->C * s->K * 2 * s->dp;
}

// keys and values kv [K][2][dp] of token r into the cache of its row
static void append(const Shape *s, float *cache, const Plan *at, int r, const float *kv) {
    int64_t column = at->column[r], j = column % 16;
    float *key = row_of(s, cache, at, r) + column / 16 * s->K * 32 * s->dp;
    for (int k = 0; k < s->K; k++, kv += 2 * s->dp, key += 32 * s->dp) {
        for (int i = 0; i < s->dp; i++) key[16 * i + j] = kv[i];
        for (int i = 0; i < s->dp; i += 16) memcpy(key + 16 * s->dp + 16 * i + 16 * j, kv + s->dp + i, 64);
    }
}

// o = softmax(q k^T) v for token r, q [H][dp] rotated and scaled; the G query heads of a KV head are G rows
static void attend(const Shape *s, float *cache, const Plan *at, int r, const float *q, float *o, float *scores) {
    int G = s->H / s->K, n = at->position[r] + 1, L = (n + 15) / 16 * 16, dp = s->dp;
    const float *keys = row_of(s, cache, at, r);
    long piece = s->K * 32L * dp;                                   // from 16 columns to the next 16
    for (int k = 0; k < s->K; k++, q += G * dp, o += G * dp, keys += 32 * dp) {
        product(G, dp, L / 16, q, dp, keys, 256, piece, 0, 0, 0, scores, s->C);
        float total[G];
        for (int g = 0; g < G; g++) total[g] = softmax(scores + (long)g * s->C, n, L);
        product(G, L, dp / 16, scores, s->C, keys + 16 * dp, piece, 256, 0, 0, 0, o, dp);
        for (int g = 0; g < G; g++)
            for (int i = 0; i < dp; i += LANES) store(o + g * dp + i, load(o + g * dp + i) / total[g]);
    }
}

// Block.forward of model.py for x [N,Dp], in place. every: 1 = all rows are wanted; Q = the last of each sequence, moved
// to the front of x; 0 = none. Keys and values are stored for all.
static void block(const Model *m, int64_t layer, const Plan *at, int N, int every, float *x) {
    const Shape *s = &m->s;
    const Block *w = m->blocks + layer;
    const float *cos = m->cos, *sin = m->sin;
    int Dp = s->Dp, dp = s->dp, H = s->H, K = s->K, wanted = 0;
    float *cache = m->caches[layer], *normed = m->scratch, *q = normed + MOST * 2 * Dp, *o = q + MOST * H * dp, *kv = o + MOST * H * dp;
    float *gate_up = kv + MOST * 2 * K * dp, *scores = gate_up + MOST * 2 * s->Fp;
    for (int first = 0; first < N; first += MOST) {
        int M = N - first < MOST ? N - first : MOST, some = 0;
        for (int i = 0; i < M; i++) rmsnorm(x + (long)(first + i) * Dp, w->norm1, s->D, Dp, s->eps, normed + i * Dp);
        linear(M, Dp, 2 * K * dp, normed, w->kv, w->kv_bias, 0, kv);
        float *xm = x + (long)wanted * Dp;                          // never overtakes the rows still to come
        for (int i = 0; i < M; i++) {
            if (!every || (first + i + 1) % every) continue;
            if (every > 1) {
                memmove(normed + some * Dp, normed + i * Dp, Dp * sizeof(float));
                memmove(xm + some * Dp, x + (long)(first + i) * Dp, Dp * sizeof(float));
            }
            some++;
        }
        linear(some, Dp, H * dp, normed, w->q, w->q_bias, 0, q);
        for (int i = 0, j = 0; i < M; i++) {                        // in order: a token sees those before it
            int r = first + i, here = every && (r + 1) % every == 0;
            int64_t p = at->position[r] * s->d;
            for (int k = 0; k < K; k++) rotate(kv + (2 * K * i + 2 * k) * dp, cos + p, sin + p, s->d, 1);
            append(s, cache, at, r, kv + 2 * K * dp * i);
            if (!here) continue;
            for (int h = 0; h < H; h++) rotate(q + (j * H + h) * dp, cos + p, sin + p, s->d, 1 / sqrtf(s->d));
            attend(s, cache, at, r, q + j * H * dp, o + j * H * dp, scores);
            j++;
        }
        if (!some) continue;
        linear(some, H * dp, Dp, o, w->o, xm, Dp, xm);                 // x += o W_o
        for (int j = 0; j < some; j++) rmsnorm(xm + j * Dp, w->norm2, s->D, Dp, s->eps, normed + j * Dp);
        linear(some, Dp, 2 * s->Fp, normed, w->gate_up, 0, 0, gate_up);
        for (int j = 0; j < some; j++) {                               // silu(gate) up, packed to [some,Fp]
            const float *gate = gate_up + (long)j * 2 * s->Fp, *up = gate + s->Fp;
            float *y = gate_up + (long)j * s->Fp;                   // never overtakes gate and up of later rows
            for (int i = 0; i < s->Fp; i += LANES) {
                vec g = load(gate + i), u = load(up + i), e = exp_negative(pick(g > 0, -g, g));
                store(y + i, g * pick(g > 0, (vec){0} + 1, e) / (e + 1.0f) * u);
            }
        }
        linear(some, s->Fp, Dp, gate_up, w->down, xm, Dp, xm);         // x += (silu(gate) up) W_down
        wanted += some;
    }
}

static void copy_row(const Shape *s, const float *from, float *x) {
    memcpy(x, from, s->D * sizeof(float));
    memset(x + s->D, 0, (s->Dp - s->D) * sizeof(float));
}

// ---- what fast.py calls: the forward --------------------------------------------------------------------------------

// ids [N] through all blocks -> x [N,Dp], the state before the final norm. fill: only the caches are to be filled.
void trunk(const Model *m, const Plan *at, int64_t N, const int64_t *ids, int64_t fill, float *x) {
    for (int r = 0; r < N; r++) copy_row(&m->s, m->embedding + ids[r] * m->s.D, x + (long)r * m->s.Dp);
    for (int i = 0; i < m->n_layer; i++) block(m, i, at, N, !(fill && i == m->n_layer - 1), x);
}

// MTP layer k: x = W [RMSNorm(h) ; RMSNorm(emb(ahead))], then its block. h [N,D], the trunk's state before the final norm.
// every as in block().
void mtp(const Model *m, int64_t k, const Plan *at, int64_t N, const float *h, const int64_t *ahead, int64_t every,
         float *x) {
    const Shape *s = &m->s;
    const Entry *w = m->mtp + k;
    int Dp = s->Dp;
    for (int first = 0; first < N; first += MOST) {
        int M = N - first < MOST ? N - first : MOST;
        for (int i = 0; i < M; i++) {
            float *both = m->scratch + (long)i * 2 * Dp, *row = x + (long)(first + i) * Dp;
            copy_row(s, h + (long)(first + i) * s->D, row);
            rmsnorm(row, w->hidden_norm, s->D, Dp, s->eps, both);
            copy_row(s, m->embedding + ahead[first + i] * s->D, row);
            rmsnorm(row, w->token_norm, s->D, Dp, s->eps, both + Dp);
        }
        linear(M, 2 * Dp, Dp, m->scratch, w->input_proj, 0, 0, x + (long)first * Dp);
    }
    block(m, m->n_layer + k, at, N, every, x);
}

// logits [N,Vp] = lm_head(RMSNorm(x)), x [N,Dp]; layer: whose norm, -1 = the trunk's, k = MTP layer k's
void head(const Model *m, int64_t layer, int64_t N, const float *x, float *logits) {
    const Shape *s = &m->s;
    const float *norm = layer < 0 ? m->norm : m->mtp[layer].final_norm;
    for (int first = 0; first < N; first += MOST) {
        int M = N - first < MOST ? N - first : MOST;
        for (int i = 0; i < M; i++)
            rmsnorm(x + (long)(first + i) * s->Dp, norm, s->D, s->Dp, s->eps, m->scratch + (long)i * s->Dp);
        linear(M, s->Dp, s->Vp, m->scratch, m->lm_head, 0, 0, logits + (long)first * s->Vp);
    }
}

// The first of the largest logits [Vp]; the padding is made -inf. 0 if all are NaN.
static int argmax(const Shape *s, float *logits) {
    for (int i = s->V; i < s->Vp; i++) logits[i] = -INFINITY;
    float max = largest(logits, s->Vp);
    for (int i = 0; i < s->V; i++)
        if (logits[i] == max) return i;
    return 0;
}

// for the test: y [n] = exp_negative(x), n a multiple of 16
void exp_of(int64_t n, const float *x, float *y) {
    for (int i = 0; i < n; i += LANES) store(y + i, exp_negative(load(x + i)));
}

// ---- drawing a token: draw.py for one row ---------------------------------------------------------------------------

typedef struct { float p; int32_t id; } Candidate;

static int more_likely(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return x->p != y->p ? (x->p < y->p) - (x->p > y->p) : x->id - y->id;
}

// e [V], probabilities times total: all outside top-k and top-p set to 0 (draw.py, top_p_filter). -> the new total.
// Sorts only what can be kept: the tokens above a threshold that is lowered until they have the mass or the number.
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

// The first id whose cumulated probability exceeds u; temperature 0: the most likely. -> id, and its log-probability.
static int sample_token(const Model *m, const float *logits, float u, float temperature, float top_p, int64_t top_k,
                float *logp) {
    int V = m->s.V, Vp = m->s.Vp, id = 0;
    float *e = m->scratch + scratch_floats(&m->s) - 3L * Vp;        // [Vp], behind it [V] candidates
    for (int i = 0; i < V; i++) e[i] = temperature > 0 ? logits[i] / temperature : logits[i];
    if (temperature == 0) id = argmax(&m->s, e);
    float total = softmax(e, V, Vp), sum = 0, piece = 0, before = 0;
    if (temperature > 0) {
        if (top_p < 1 || top_k > 0) total = top_p_filter(V, e, (Candidate *)(e + Vp), total, top_p, top_k);
        for (int i = 0; i < Vp; i += 16) sum += sum16(e + i);       // in the order of the search, to the same bits
        float target = u * sum;                                     // below sum, for u <= 1 - 2^-24
        for (; id < Vp - 16 && !(before + (piece = sum16(e + id)) > target); id += 16) before += piece;
        int first = id, end = V - first < 16 ? V : first + 16;      // 16 at a time, then one by one
        while (!((before += e[id]) > target) && id < end - 1) id++;
        while (id > first && !(e[id] > 0)) id--;                    // if rounding left none: the last that has a chance
    }
    *logp = logf(e[id] / total);
    return id;
}

// ---- what fast.py calls: the engine's methods of the same names -----------------------------------------------------

typedef struct {                                    // the engine's state, one row a sequence: new_state() in engine.py
    int64_t columns, ring, stops;
    int64_t *tokens;                                // [S,columns]
    float *logp, *u;                                // [S,columns]
    int64_t *n, *limit, *stop;                      // [S], [S], [S,stops]
    float *temperature, *top_p;
    int64_t *top_k;
    float *h;                                       // [S,ring,D]
    int64_t *drafted, *accepted;                    // [S,n_draft]
    uint8_t *ended;                                 // [S], decode()'s answer
    int64_t *position, *column, *ids;               // room for the tokens of one forward
    float *x, *states, *logits;
} State;

static uint64_t splitmix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

// u [n]: the random numbers of a request's first n tokens, those of draw.py
void uniform(int64_t seed, int64_t n, float *u) {
    for (int64_t i = 0; i < n; i++) u[i] = (splitmix(splitmix(seed) + (i + 1) * 0x9E3779B97F4A7C15u) >> 40) * 0x1p-24f;
}

// T more tokens of the B prompts in rows first .. first + B - 1, behind the n - 1 that are in the caches: through the
// trunk, and as keys and values of the MTP layers. end [B]: how many tokens of each are read after this, padding left out.
void prefill_chunk(const Model *m, const State *t, int64_t first, int64_t B, int64_t T, const int64_t *end) {
    int64_t N = B * T, C = t->columns, D = m->s.D;
    const int64_t *tokens = t->tokens + first * C, *n = t->n + first;
    for (int i = 0; i < N; i++) {
        int64_t place = n[i / T] - 1 + i % T;
        t->position[i] = place < C ? place : C - 1;
        t->ids[i] = tokens[i / T * C + t->position[i]];
    }
    Plan at = {first, T, t->position, t->position};
    trunk(m, &at, N, t->ids, m->n_draft == 0, t->x);
    if (m->n_draft == 0) return;
    for (int i = 0; i < N; i++) memcpy(t->states + i * D, t->x + (long)i * m->s.Dp, D * sizeof(float));
    for (int k = 0; k < m->n_draft; k++) {                          // slot p of layer k takes x_{p+k+1}, where known
        for (int i = 0; i < N; i++) {
            int64_t ahead = t->position[i] + k + 1;
            t->ids[i] = tokens[i / T * C + (ahead < C ? ahead : C - 1)];
        }
        mtp(m, k, &at, N, t->states, t->ids, 0, t->x);
    }
    for (int r = 0; r < B; r++)                                     // the last states of each, not of its padding
        for (int64_t p = end[r] - t->ring > n[r] - 1 ? end[r] - t->ring : n[r] - 1; p < end[r]; p++)
            memcpy(t->h + ((first + r) * t->ring + p % t->ring) * D, t->states + (r * T + p - n[r] + 1) * D,
                   D * sizeof(float));
}

// Each of the first R rows: its last certain token and its drafts through the trunk, tokens drawn for as long as the
// drafts are right. -> most tokens a row has gained; ended[r] = 1 where a row has ended, their number in *done.
int64_t decode(const Model *m, const State *t, int64_t R, int64_t *done) {
    int64_t Q = m->n_draft + 1, most = 0, D = m->s.D;
    for (int r = 0; r < R; r++)
        for (int q = 0; q < Q; q++) {
            t->position[r * Q + q] = t->n[r] - 1 + q;
            t->ids[r * Q + q] = t->tokens[r * t->columns + t->n[r] - 1 + q];
        }
    Plan at = {0, Q, t->position, t->position};
    trunk(m, &at, R * Q, t->ids, 0, t->x);
    head(m, -1, R * Q, t->x, t->logits);
    *done = 0;
    for (int r = 0; r < R; r++) {
        int64_t n = t->n[r], gain = 0, *tokens = t->tokens + r * t->columns, right = 1;
        for (int q = 0; q < Q && m->n_draft; q++)
            memcpy(t->h + (r * t->ring + (n - 1 + q) % t->ring) * D, t->x + (r * Q + q) * m->s.Dp, D * sizeof(float));
        t->ended[r] = 0;
        while (right && !t->ended[r]) {
            int64_t q = gain++, place = r * t->columns + n + q;
            int id = sample_token(m, t->logits + (r * Q + q) * m->s.Vp, t->u[place], t->temperature[r], t->top_p[r],
                          t->top_k[r], t->logp + place);
            right = q < m->n_draft && tokens[n + q] == id;          // a draft counts while it is the token drawn
            if (q < m->n_draft && n > 1) {                          // after a prompt of one token there was none
                t->drafted[r * m->n_draft + q]++;
                t->accepted[r * m->n_draft + q] += right;
            }
            tokens[n + q] = id;
            t->ended[r] = n + gain >= t->limit[r];
            for (int i = 0; i < t->stops; i++) t->ended[r] |= t->stop[r * t->stops + i] == id;
        }
        t->n[r] = n + gain;
        *done += t->ended[r];
        most = gain > most ? gain : most;
    }
    return most;
}

// New drafts for rows first .. first + B - 1, over the window that Engine.draft explains: layer k reads the true states
// of slots n-1-W .. n-2 from the ring and writes draft x_{n+k}.
void draft(const Model *m, const State *t, int64_t first, int64_t B, int64_t E) {
    int64_t W = E > m->n_draft ? E : m->n_draft, D = m->s.D;
    for (int r = 0; r < B; r++)
        for (int w = 0; w < W; w++) {
            int64_t row = first + r, slot = t->n[row] - 1 + w - W, real = slot > 0 ? slot : 0, i = r * W + w;
            t->position[i] = real;
            t->column[i] = slot < 0 ? m->s.C - 1 : real;            // before the text begins: into the scrap column
            memcpy(t->states + i * D, t->h + (row * t->ring + real % t->ring) * D, D * sizeof(float));
        }
    Plan at = {first, W, t->position, t->column};
    for (int k = 0; k < m->n_draft; k++) {
        for (int i = 0; i < B * W; i++) t->ids[i] = t->tokens[(first + i / W) * t->columns + t->position[i] + k + 1];
        mtp(m, k, &at, B * W, t->states, t->ids, W, t->x);
        head(m, k, B, t->x, t->logits);
        for (int r = 0; r < B; r++) {
            int64_t place = (first + r) * t->columns + t->n[first + r] + k;
            t->tokens[place] = argmax(&m->s, t->logits + (long)r * m->s.Vp);
        }
    }
}
