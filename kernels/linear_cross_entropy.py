"""
The output head and its loss, in chunks of rows; and per-token log-prob and entropy for RL (report 2.1,
3.3.1).

    z = x W^T      nll_i = logsumexp(z_i) - z_i[target_i]      loss = sum_i w_i nll_i
    dz_iv = w_i (softmax(z_i)_v - [v = target_i])      dx = dz W      dW = dz^T x

With V = 151,680 the logits of 8,192 tokens are 4.6 GiB in fp32 and eager cross entropy peaks near 13.9 GiB.
Here 2,048 rows are in flight: their logits are made, reduced to nll, overwritten by their own gradient and
multiplied into dx and dW before the next rows start. The backward pass only scales dx and dW. The products
are cuBLAS's; one Triton program takes one row, reading it twice. Chunks are this large because each re-reads
and writes dW (2.5 GB).

Logits are fp32 even for bf16 inputs, since the matrix unit has them in fp32 anyway and a rounded logit of 20
is off by 0.06; the bf16 gradient then takes the first half of its own row's memory.

For RL the weight of a token is known only later, so logprob_entropy keeps the log-sum-exp and makes the
logits again in backward: four products in all, never a [N, V] tensor.
    log p = z_t - lse      H = -sum_v p_v log p_v      d log p / dz_v = [v = t] - p_v           z = x W^T /
    temperature
The entropy carries no gradient: the report's objective has no entropy term (section 3.3.1).
"""
import torch

from kernels import acc_type, jit, next_pow2, tl, use_triton, wide

IGNORE = -100  # target value that carries no loss


@jit
def combine(m, l, e, top, ENTROPY: tl.constexpr):
    """Sums taken relative to the maximum m, restated relative to top >= m; empty sums (m = -inf) stay 0."""
    down = tl.where(l > 0, m - top, 0.0)
    if ENTROPY:
        e = (e + l * down) * tl.exp(down)
    return top, l * tl.exp(down), e


@jit
def row_stats(z, V, SCALE: tl.constexpr, BV: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr):
    """One pass over a row of x = z SCALE: m = max x, l = sum exp(x - m), e = sum exp(x - m) (x - m)."""
    col = tl.arange(0, BV)
    m = tl.full([BV], float("-inf"), ACC)
    l = tl.zeros([BV], ACC)
    e = tl.zeros([BV], ACC)
    # every lane keeps its own running maximum, so the loop has no reduction across the program
    for j in tl.range(0, V, BV):
        x = tl.load(z + j + col, mask=j + col < V, other=float("-inf")).to(ACC) * SCALE
        m, l, e = combine(m, l, e, tl.maximum(m, x), ENTROPY)
        p = tl.where(x > float("-inf"), tl.exp(x - m), 0.0)
        l += p
        if ENTROPY:
            e += tl.where(p > 0, p * (x - m), 0.0)
    top = tl.max(m, 0)
    m, l, e = combine(m, l, e, top, ENTROPY)
    return top, tl.sum(l, 0), tl.sum(e, 0)


@jit
def loss_kernel(z, g, targets, weights, nll, V, stride_z, stride_g, GRAD: tl.constexpr, BV: tl.constexpr,
                ACC: tl.constexpr):
    """One program: one row of logits z -> its nll and, in g (the same memory), its gradient."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride_z
    g += row * stride_g
    target = tl.load(targets + row)
    safe_target = tl.where(target < 0, 0, target)
    m, l, _ = row_stats(z, V, 1.0, BV, False, ACC)
    lse = m + tl.log(l)
    zt = tl.load(z + safe_target).to(ACC)
    tl.store(nll + row, tl.where(target < 0, 0.0, lse - zt))
    if GRAD:
        # dz_v = w (softmax(z)_v - [v = target]), written over z. In bf16 the gradient's row is half as long
        # as the row whose memory it takes: block j lands on blocks <= j, which every lane has read at the
        # barrier
        w = tl.where(target < 0, 0.0, tl.load(weights + row)).to(ACC)
        col = tl.arange(0, BV)
        for j in tl.range(0, V, BV):
            x = tl.load(z + j + col, mask=j + col < V, other=float("-inf")).to(ACC)
            tl.debug_barrier()
            d = w * (tl.exp(x - lse) - tl.where(j + col == target, 1.0, 0.0))
            tl.store(g + j + col, d.to(g.dtype.element_ty), mask=j + col < V)


@jit
def logprob_kernel(z, targets, logp, entropy, lse_out, V, stride_z, SCALE: tl.constexpr, BV: tl.constexpr,
                   ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z += row * stride_z
    target = tl.load(targets + row)
    m, l, e = row_stats(z, V, SCALE, BV, True, ACC)
    lse = m + tl.log(l)
    zt = tl.load(z + tl.where(target < 0, 0, target)).to(ACC) * SCALE
    tl.store(logp + row, tl.where(target < 0, 0.0, zt - lse))
    # H = -sum_v p_v log p_v = log l - e / l ; relative to the maximum, so that a small H keeps its digits
    tl.store(entropy + row, tl.log(l) - e / l)
    tl.store(lse_out + row, lse)


@jit
def logprob_grad_kernel(z, g, targets, lse, dlogp, V, stride_z, stride_g, SCALE: tl.constexpr,
                        BV: tl.constexpr, ACC: tl.constexpr):
    """One program: one row of logits z -> dlogp dlog p/dz (z before temperature) in g, the same memory."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride_z
    g += row * stride_g
    target = tl.load(targets + row)
    lse_r = tl.load(lse + row)
    d = tl.where(target < 0, 0.0, tl.load(dlogp + row)).to(ACC) * SCALE
    col = tl.arange(0, BV)
    for j in tl.range(0, V, BV):
        x = tl.load(z + j + col, mask=j + col < V, other=float("-inf")).to(ACC) * SCALE
        tl.debug_barrier()
        dz = d * (tl.where(j + col == target, 1.0, 0.0) - tl.exp(x - lse_r))
        tl.store(g + j + col, dz.to(g.dtype.element_ty), mask=j + col < V)


CONFIGS = [(4096, 8), (8192, 16), (2048, 4)]  # (columns per step, warps): 16 fp32 values a thread


def _options(z):
    BV, warps = CONFIGS[0]
    return dict(BV=min(BV, next_pow2(z.shape[1])), ACC=acc_type(z), num_warps=warps)


def _inside(z, dtype):
    """[rows, V] of another dtype in z's own memory: each row at the start of z's row, as cuBLAS reads it."""
    return z if z.dtype == dtype else z.view(dtype)[:, :z.shape[1]]


def logits(x, weight):
    """x [n, D], weight [V, D] -> z [n, V], fp32 also from bf16 inputs."""
    if x.dtype in (torch.float32, torch.float64):
        return x @ weight.T
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def cross_entropy_(z, targets, w, grad):
    """z [n, V] -> (nll [n], dz [n, V] in z's memory). grad: the dtype of dz, None if it is not wanted."""
    dtype = grad or z.dtype
    if use_triton(z):
        nll, dz = torch.empty_like(w), _inside(z, dtype)
        loss_kernel[(z.shape[0],)](z, dz, targets, w, nll, z.shape[1], z.stride(0), dz.stride(0),
                                   GRAD=grad is not None, **_options(z))
        return nll, dz
    valid, t = targets != IGNORE, targets.clamp_min(0)[:, None]
    zt, m, total = _exp_(z, t)                         # z is exp(z - m) now: one exponential a logit, not two
    nll = torch.where(valid, (m + total.log() - zt)[:, 0], 0.0)
    if grad is None:
        return nll, z
    w = torch.where(valid, w, 0.0)[:, None]
    z.mul_(w / total).scatter_add_(1, t, -w)
    return nll, z.to(dtype)


def _exp_(z, t):
    """z [n, V] becomes exp(z - m), m its row maximum. -> z at t, m, sum of the new z, each [n, 1]."""
    zt, m = z.gather(1, t), z.amax(-1, keepdim=True)
    return zt, m, z.sub_(m).exp_().sum(-1, keepdim=True)


def logprob_(z, targets, temperature):
    """z [n, V] -> log p(target), entropy and log-sum-exp of softmax(z / temperature), each [n]."""
    if use_triton(z):
        out = [torch.empty(z.shape[0], dtype=z.dtype, device=z.device) for _ in range(3)]
        logprob_kernel[(z.shape[0],)](z, targets, *out, z.shape[1], z.stride(0), SCALE=1.0 / temperature,
                                      **_options(z))
        return out
    z = z.mul_(1.0 / temperature) if temperature != 1.0 else z
    m = z.amax(-1, keepdim=True)
    e = z.sub_(m).exp()
    total = e.sum(-1)
    log_total = total.log()
    logp = z.gather(1, targets.clamp_min(0)[:, None])[:, 0] - log_total
    # H = -sum_v p_v log p_v = log l - e / l, as in the kernel: relative to the maximum
    entropy = log_total - torch.linalg.vecdot(e, z) / total
    return torch.where(targets != IGNORE, logp, 0.0), entropy, m[:, 0] + log_total


def logprob_grad_(z, targets, lse, dlogp, temperature, dtype):
    """dz = dlogp (onehot(target) - softmax(z / temperature)) / temperature, over z's memory."""
    if use_triton(z):
        dz = _inside(z, dtype)
        logprob_grad_kernel[(z.shape[0],)](z, dz, targets, lse, dlogp, z.shape[1], z.stride(0), dz.stride(0),
                                           SCALE=1.0 / temperature, **_options(z))
        return dz
    g = torch.where(targets != IGNORE, dlogp, 0.0)[:, None] / temperature
    z = z.mul_(1.0 / temperature) if temperature != 1.0 else z
    z.sub_(lse[:, None]).exp_().mul_(-g)
    return z.scatter_add_(1, targets.clamp_min(0)[:, None], g).to(dtype)


def _loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, w: torch.Tensor, chunk: int,
          want_dx: bool, want_dw: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    N = x.shape[0]
    nll = torch.empty(N, dtype=w.dtype, device=x.device)
    dx = torch.empty_like(x) if want_dx else x.new_empty(0)
    dw = torch.zeros_like(weight) if want_dw else x.new_empty(0)
    for i in range(0, N, chunk):
        s = slice(i, i + chunk)
        z = logits(x[s], weight)  # [chunk, V]
        nll[s], dz = cross_entropy_(z, targets[s], w[s], x.dtype if want_dx or want_dw else None)
        # dx = dz weight, dweight += dz^T x
        if want_dx:
            torch.mm(dz, weight, out=dx[s])
        if want_dw:
            dw.addmm_(dz.T, x[s])
        del z, dz  # before the next chunk's logits are allocated
    return torch.dot(w, nll), nll, dx, dw


loss_op = torch.library.custom_op("nanomimo::linear_cross_entropy", _loss, mutates_args=())


@loss_op.register_fake
def _(x, weight, targets, w, chunk, want_dx, want_dw):
    dx = torch.empty_like(x) if want_dx else x.new_empty(0)
    dw = torch.empty_like(weight) if want_dw else x.new_empty(0)
    return w.new_empty(()), w.new_empty(x.shape[0]), dx, dw


def _save(ctx, inputs, output):
    _, nll, dx, dw = output
    ctx.save_for_backward(nll, dx, dw)
    ctx.mark_non_differentiable(nll, dx, dw)


def _backward(ctx, g, *_):
    nll, dx, dw = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (dx * g.to(dx.dtype) if need[0] else None, dw * g.to(dw.dtype) if need[1] else None, None,
            nll * g if need[3] else None, None, None, None)


loss_op.register_autograd(_backward, setup_context=_save)


class LossOnCPU(torch.autograd.Function):
    """The same three functions without the operator registry, whose first call costs a second of imports."""
    forward, setup_context, backward = staticmethod(_loss), staticmethod(_save), staticmethod(_backward)


def _rows(chunk, x):
    return min(chunk, 512) if x.device.type == "cpu" else chunk  # 512 x 1024 fp32 stay in a CPU's cache


def _check(name, x, weight, targets):
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(f"{name}: x [N, D], weight [V, D], targets [N] expected, got {tuple(x.shape)}, "
                         f"{tuple(weight.shape)}, {tuple(targets.shape)}")


def linear_cross_entropy(x, weight, targets, mask_or_weights=None, chunk=2048):
    """
    Sum over tokens of w * -log softmax(x weight^T)[target], a scalar in fp32 (fp64 for fp64 input).

    x [N, D], weight [V, D], targets int64 [N] with -100 ignored, mask_or_weights [N] (bool or numbers; they
    may carry a gradient too). chunk: rows of logits in memory at a time. ValueError on shapes that do not
    fit.

    By hand: logits (0, ln 3), target 1: p = 3/4, loss = ln 4/3 = 0.2877; with weight 2: 0.5754.
    """
    _check("linear_cross_entropy", x, weight, targets)
    if mask_or_weights is None:
        w = torch.ones(x.shape[0], dtype=wide(x), device=x.device)
    else:
        w = mask_or_weights.to(wide(x))
    grad = torch.is_grad_enabled()
    dx, dw = grad and x.requires_grad, grad and weight.requires_grad
    op = loss_op if use_triton(x) else LossOnCPU.apply
    return op(x, weight, targets, w, _rows(chunk, x), dx, dw)[0]


def _logprob(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float,
             chunk: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = tuple(torch.empty(x.shape[0], dtype=wide(x), device=x.device) for _ in range(3))
    for i in range(0, x.shape[0], chunk):
        s = slice(i, i + chunk)
        for whole, part in zip(out, logprob_(logits(x[s], weight), targets[s], temperature), strict=True):
            whole[s] = part
    return out


logprob_op = torch.library.custom_op("nanomimo::logprob_entropy", _logprob, mutates_args=())


@logprob_op.register_fake
def _(x, weight, targets, temperature, chunk):
    return tuple(x.new_empty(x.shape[0], dtype=wide(x)) for _ in range(3))


def _logprob_grad(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor,
                  dlogp: torch.Tensor, temperature: float, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dw = torch.empty_like(x), torch.zeros_like(weight)
    for i in range(0, x.shape[0], chunk):
        s = slice(i, i + chunk)
        z = logits(x[s], weight)
        dz = logprob_grad_(z, targets[s], lse[s], dlogp[s].contiguous(), temperature, x.dtype)
        torch.mm(dz, weight, out=dx[s])
        dw.addmm_(dz.T, x[s])
        del z, dz
    return dx, dw


logprob_backward_op = torch.library.custom_op("nanomimo::logprob_backward", _logprob_grad, mutates_args=())


@logprob_backward_op.register_fake
def _(x, weight, targets, lse, dlogp, temperature, chunk):
    return torch.empty_like(x), torch.empty_like(weight)


def _save_logprob(ctx, inputs, output):
    x, weight, targets, ctx.temperature, ctx.chunk = inputs
    ctx.save_for_backward(x, weight, targets, output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward_logprob(ctx, dlogp, *_):
    x, weight, targets, lse = ctx.saved_tensors
    grad = logprob_backward_op if use_triton(x) else _logprob_grad
    return *grad(x, weight, targets, lse, dlogp, ctx.temperature, ctx.chunk), None, None, None


logprob_op.register_autograd(_backward_logprob, setup_context=_save_logprob)


class LogprobOnCPU(torch.autograd.Function):
    forward, setup_context = staticmethod(_logprob), staticmethod(_save_logprob)
    backward = staticmethod(_backward_logprob)


def logprob_entropy(x, weight, targets, temperature=1.0, chunk=2048):
    """
    (log p(target) [N], entropy in nats [N]) of softmax(x weight^T / temperature), fp32; logp is
    differentiable.

    Targets of -100 give log p = 0 without gradient. ValueError on shapes that do not fit.

    By hand: logits (0, ln 3), target 0: log p = ln 1/4, H = 1/4 ln 4 + 3/4 ln 4/3 = 0.5623.
    """
    _check("logprob_entropy", x, weight, targets)
    op = logprob_op if use_triton(x) else LogprobOnCPU.apply
    return op(x, weight, targets, float(temperature), _rows(chunk, x))[:2]
