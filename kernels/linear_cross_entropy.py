"""
The output head and its loss, in chunks of rows; and per-token log-prob and entropy for RL (report 2.1, 3.3.1).

    z = x W^T      nll_i = logsumexp(z_i) - z_i[target_i]      loss = sum_i w_i nll_i
    dz_iv = w_i (softmax(z_i)_v - [v = target_i])      dx = dz W      dW = dz^T x

with w_i = 1, and 0 where the target is -100. With V = 151,680 the logits of 8,192 tokens are 4.6 GiB in fp32 and eager
cross entropy peaks near 13.9 GiB. Here the logits of 2,048 rows are in memory at a time: they are made, reduced to nll,
overwritten by their own gradient and multiplied into dx and dW before the next rows start. The backward pass only
scales dx and dW. The products are cuBLAS's; one Triton program takes one row, reading it twice. Chunks are this large
because each one reads and writes all of dW (2.5 GB).

Logits are fp32 even for bf16 inputs, since the matrix unit has them in fp32 anyway and a rounded logit of 20 is off by
0.06; the bf16 gradient then takes the first half of its own row's memory.

For RL the weight of a token is known only later, so logprob_entropy keeps the log-sum-exp and makes the logits again in
backward: four products in all, never a [N, V] tensor.

    log p = z_t - lse      H = -sum_v p_v log p_v      d log p / dz_v = [v = t] - p_v

The entropy carries no gradient: the report's objective has no entropy term (section 3.3.1).
"""
import torch
from torch import Tensor

import kernels
from kernels import acc_type, jit, next_pow2, tl

IGNORE = -100                                           # target value that carries no loss
CPU_ROWS = 512                                          # rows at a time on a CPU: 512 x 1024 fp32 stay in its cache


# ---- cross entropy --------------------------------------------------------------------------------------------------

def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk: int = 2048) -> Tensor:
    """
    Sum over tokens of -log softmax(x weight^T)[target], a scalar in nats, fp32 (fp64 for fp64 input).

    x [N, D], weight [V, D], targets int64 [N], where -100 carries no loss. chunk: rows of logits in memory at a time,
    at most 512 on a CPU. ValueError on shapes that do not fit.

    By hand: logits (0, ln 3), target 1: p = 3/4, loss = ln 4/3 = 0.2877.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(f"linear_cross_entropy: x [N, D], weight [V, D], targets [N] expected, got {tuple(x.shape)}, "
                         f"{tuple(weight.shape)}, {tuple(targets.shape)}")
    grad = torch.is_grad_enabled()
    op = loss_op if (x.device.type, x.dtype) in kernels.TRITON else LossWithoutRegistry.apply
    return op(x, weight, targets, min(chunk, CPU_ROWS) if x.device.type == "cpu" else chunk,
              grad and x.requires_grad, grad and weight.requires_grad)[0]


def _loss(x: Tensor, weight: Tensor, targets: Tensor, chunk: int, want_dx: bool,
          want_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> the loss, dx [N, D] and dw [V, D] of a loss whose own gradient is 1; those not wanted are empty."""
    N = x.shape[0]
    nll = torch.empty(N, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    dx = torch.empty_like(x) if want_dx else x.new_empty(0)
    dw = torch.zeros_like(weight) if want_dw else x.new_empty(0)
    for i in range(0, N, chunk):
        s = slice(i, i + chunk)
        z = logits(x[s], weight)                        # [chunk, V]
        nll[s], dz = cross_entropy_(z, targets[s], x.dtype if want_dx or want_dw else None)
        # dx = dz weight, dweight += dz^T x
        if want_dx:
            torch.mm(dz, weight, out=dx[s])
        if want_dw:
            dw.addmm_(dz.T, x[s])
        del z, dz                                       # before the next chunk's logits are allocated
    return torch.dot(torch.ones_like(nll), nll), dx, dw     # not nll.sum(): it adds in another order, to other digits


loss_op = torch.library.custom_op("nanomimo::linear_cross_entropy", _loss, mutates_args=())


@loss_op.register_fake
def _(x, weight, targets, chunk, want_dx, want_dw):
    dx = torch.empty_like(x) if want_dx else x.new_empty(0)
    dw = torch.empty_like(weight) if want_dw else x.new_empty(0)
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)), dx, dw


def _save_loss(ctx, inputs, output):
    _, dx, dw = output
    ctx.save_for_backward(dx, dw)
    ctx.mark_non_differentiable(dx, dw)


def _backward_loss(ctx, g, *_):
    dx, dw = ctx.saved_tensors
    need = ctx.needs_input_grad
    return dx * g.to(dx.dtype) if need[0] else None, dw * g.to(dw.dtype) if need[1] else None, None, None, None, None


loss_op.register_autograd(_backward_loss, setup_context=_save_loss)


class LossWithoutRegistry(torch.autograd.Function):
    """The same three functions where no kernel runs: the first call of a registered operator costs a second."""
    forward, setup_context, backward = staticmethod(_loss), staticmethod(_save_loss), staticmethod(_backward_loss)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, D], weight [V, D] -> z [n, V], fp32 also from bf16 inputs (fp64 from fp64)."""
    if x.dtype in (torch.float32, torch.float64):
        return x @ weight.T
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def cross_entropy_(z: Tensor, targets: Tensor, grad: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """z [n, V] -> (nll [n], dz [n, V] in z's memory). grad: the dtype of dz, None if it is not wanted."""
    dtype = grad or z.dtype
    if (z.device.type, z.dtype) in kernels.TRITON:
        nll, dz = torch.empty(len(z), dtype=z.dtype, device=z.device), _inside(z, dtype)
        loss_kernel[(z.shape[0],)](z, dz, targets, nll, z.shape[1], z.stride(0), dz.stride(0), GRAD=grad is not None,
                                   **_options(z))
        return nll, dz
    valid, t = targets != IGNORE, targets.clamp_min(0)[:, None]
    zt, m = z.gather(1, t), z.amax(-1, keepdim=True)    # [n, 1] each
    total = z.sub_(m).exp_().sum(-1, keepdim=True)      # z is exp(z - m) now: one exponential a logit, not two
    nll = torch.where(valid, (m + total.log() - zt)[:, 0], 0.0)
    if grad is None:
        return nll, z
    w = valid.to(z.dtype)[:, None]
    z.mul_(w / total).scatter_add_(1, t, -w)
    return nll, z.to(dtype)


# ---- log-prob and entropy -------------------------------------------------------------------------------------------

def logprob_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk: int = 2048) -> tuple[Tensor, Tensor]:
    """
    log p(target) [N] and the entropy in nats [N] of softmax(x weight^T), both fp32 (fp64 for fp64 input); log p carries
    a gradient, the entropy none.

    x [N, D], weight [V, D], targets int64 [N]; -100 gives log p = 0 without gradient. chunk: rows of logits in memory
    at a time, at most 512 on a CPU. ValueError on shapes that do not fit.

    By hand: logits (0, ln 3), target 0: log p = ln 1/4, H = 1/4 ln 4 + 3/4 ln 4/3 = 0.5623.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(f"logprob_entropy: x [N, D], weight [V, D], targets [N] expected, got {tuple(x.shape)}, "
                         f"{tuple(weight.shape)}, {tuple(targets.shape)}")
    op = logprob_op if (x.device.type, x.dtype) in kernels.TRITON else LogprobWithoutRegistry.apply
    return op(x, weight, targets, min(chunk, CPU_ROWS) if x.device.type == "cpu" else chunk)[:2]


def _logprob(x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> log p, entropy, log-sum-exp, each [N]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = tuple(torch.empty(x.shape[0], dtype=dtype, device=x.device) for _ in range(3))
    for i in range(0, x.shape[0], chunk):
        s = slice(i, i + chunk)
        for whole, part in zip(out, logprob_(logits(x[s], weight), targets[s]), strict=True):
            whole[s] = part
    return out


logprob_op = torch.library.custom_op("nanomimo::logprob_entropy", _logprob, mutates_args=())


@logprob_op.register_fake
def _(x, weight, targets, chunk):
    return tuple(x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(3))


def _logprob_grad(x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, dlogp: Tensor,
                  chunk: int) -> tuple[Tensor, Tensor]:
    """lse, dlogp [N] -> dx [N, D], dw [V, D]: dz = dlogp (onehot(target) - softmax(z)), in z's memory."""
    dx, dw = torch.empty_like(x), torch.zeros_like(weight)
    for i in range(0, x.shape[0], chunk):
        s = slice(i, i + chunk)
        z, t, g = logits(x[s], weight), targets[s], dlogp[s].contiguous()
        if (z.device.type, z.dtype) in kernels.TRITON:
            dz = _inside(z, x.dtype)
            logprob_grad_kernel[(z.shape[0],)](z, dz, t, lse[s], g, z.shape[1], z.stride(0), dz.stride(0),
                                               **_options(z))
        else:
            g = torch.where(t != IGNORE, g, 0.0)[:, None]
            z.sub_(lse[s][:, None]).exp_().mul_(-g)
            dz = z.scatter_add_(1, t.clamp_min(0)[:, None], g).to(x.dtype)
        torch.mm(dz, weight, out=dx[s])
        dw.addmm_(dz.T, x[s])
        del z, dz                                       # before the next chunk's logits are allocated
    return dx, dw


logprob_backward_op = torch.library.custom_op("nanomimo::logprob_backward", _logprob_grad, mutates_args=())


@logprob_backward_op.register_fake
def _(x, weight, targets, lse, dlogp, chunk):
    return torch.empty_like(x), torch.empty_like(weight)


def _save_logprob(ctx, inputs, output):
    x, weight, targets, ctx.chunk = inputs
    ctx.save_for_backward(x, weight, targets, output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward_logprob(ctx, dlogp, *_):
    x, weight, targets, lse = ctx.saved_tensors
    grad = logprob_backward_op if (x.device.type, x.dtype) in kernels.TRITON else _logprob_grad
    return *grad(x, weight, targets, lse, dlogp, ctx.chunk), None, None


logprob_op.register_autograd(_backward_logprob, setup_context=_save_logprob)


class LogprobWithoutRegistry(torch.autograd.Function):
    """The same three functions where no kernel runs: the first call of a registered operator costs a second."""
    forward, setup_context = staticmethod(_logprob), staticmethod(_save_logprob)
    backward = staticmethod(_backward_logprob)


def logprob_(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z [n, V], overwritten by the torch path -> log p(target), entropy and log-sum-exp of softmax(z), each [n]."""
    if (z.device.type, z.dtype) in kernels.TRITON:
        out = tuple(torch.empty(z.shape[0], dtype=z.dtype, device=z.device) for _ in range(3))
        logprob_kernel[(z.shape[0],)](z, targets, *out, z.shape[1], z.stride(0), **_options(z))
        return out
    m = z.amax(-1, keepdim=True)
    e = z.sub_(m).exp()
    total = e.sum(-1)
    log_total = total.log()
    logp = z.gather(1, targets.clamp_min(0)[:, None])[:, 0] - log_total
    # H = -sum_v p_v log p_v = log l - e / l, as in the kernel: relative to the maximum
    entropy = log_total - torch.linalg.vecdot(e, z) / total
    return torch.where(targets != IGNORE, logp, 0.0), entropy, m[:, 0] + log_total


# ---- Triton ---------------------------------------------------------------------------------------------------------

CONFIGS = [(4096, 8), (8192, 16), (2048, 4)]            # (columns per step, warps): 16 fp32 values a thread


def _options(z: Tensor) -> dict:
    """Options of a launch over rows of z [n, V]."""
    BV, warps = CONFIGS[0]
    return dict(BV=min(BV, next_pow2(z.shape[1])), ACC=acc_type(z), num_warps=warps)


def _inside(z: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, V] of another dtype in z's own memory: each row at the start of z's row, as cuBLAS reads it."""
    return z if z.dtype == dtype else z.view(dtype)[:, :z.shape[1]]


@jit
def combine(m, l, e, top, ENTROPY: tl.constexpr):
    """Sums taken relative to the maximum m, restated relative to top >= m; empty sums (m = -inf) stay 0."""
    down = tl.where(l > 0, m - top, 0.0)
    if ENTROPY:
        e = (e + l * down) * tl.exp(down)
    return top, l * tl.exp(down), e


@jit
def row_stats(z, V, BV: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr):
    """One pass over a row: m = max z, l = sum exp(z - m), e = sum exp(z - m) (z - m)."""
    col = tl.arange(0, BV)
    m = tl.full([BV], float("-inf"), ACC)
    l = tl.zeros([BV], ACC)
    e = tl.zeros([BV], ACC)
    # every lane keeps its own running maximum, so the loop has no reduction across the program
    for j in tl.range(0, V, BV):
        x = tl.load(z + j + col, mask=j + col < V, other=float("-inf")).to(ACC)
        m, l, e = combine(m, l, e, tl.maximum(m, x), ENTROPY)
        p = tl.where(x > float("-inf"), tl.exp(x - m), 0.0)
        l += p
        if ENTROPY:
            e += tl.where(p > 0, p * (x - m), 0.0)
    top = tl.max(m, 0)
    m, l, e = combine(m, l, e, top, ENTROPY)
    return top, tl.sum(l, 0), tl.sum(e, 0)


@jit
def loss_kernel(z, g, targets, nll, V, stride_z, stride_g, GRAD: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr):
    """One program: one row of logits z -> its nll and, in g (the same memory), its gradient."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride_z
    g += row * stride_g
    target = tl.load(targets + row)
    safe_target = tl.where(target < 0, 0, target)
    m, l, _ = row_stats(z, V, BV, False, ACC)
    lse = m + tl.log(l)
    zt = tl.load(z + safe_target).to(ACC)
    tl.store(nll + row, tl.where(target < 0, 0.0, lse - zt))
    if GRAD:
        # dz_v = w (softmax(z)_v - [v = target]), written over z. In bf16 the gradient's row is half as long as the row
        # whose memory it takes: block j lands on blocks <= j, which every lane has read at the barrier
        w = tl.where(target < 0, 0.0, 1.0).to(ACC)
        col = tl.arange(0, BV)
        for j in tl.range(0, V, BV):
            x = tl.load(z + j + col, mask=j + col < V, other=float("-inf")).to(ACC)
            tl.debug_barrier()
            d = w * (tl.exp(x - lse) - tl.where(j + col == target, 1.0, 0.0))
            tl.store(g + j + col, d.to(g.dtype.element_ty), mask=j + col < V)


@jit
def logprob_kernel(z, targets, logp, entropy, lse_out, V, stride_z, BV: tl.constexpr, ACC: tl.constexpr):
    """One program: one row of logits z -> log p of its target, its entropy and its log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride_z
    target = tl.load(targets + row)
    m, l, e = row_stats(z, V, BV, True, ACC)
    lse = m + tl.log(l)
    zt = tl.load(z + tl.where(target < 0, 0, target)).to(ACC)
    tl.store(logp + row, tl.where(target < 0, 0.0, zt - lse))
    # H = -sum_v p_v log p_v = log l - e / l ; relative to the maximum, so that a small H keeps its digits
    tl.store(entropy + row, tl.log(l) - e / l)
    tl.store(lse_out + row, lse)


@jit
def logprob_grad_kernel(z, g, targets, lse, dlogp, V, stride_z, stride_g, BV: tl.constexpr, ACC: tl.constexpr):
    """One program: one row of logits z -> dlogp dlog p/dz in g, the same memory."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride_z
    g += row * stride_g
    target = tl.load(targets + row)
    lse_r = tl.load(lse + row)
    d = tl.where(target < 0, 0.0, tl.load(dlogp + row)).to(ACC)
    col = tl.arange(0, BV)
    for j in tl.range(0, V, BV):
        x = tl.load(z + j + col, mask=j + col < V, other=float("-inf")).to(ACC)
        tl.debug_barrier()
        dz = d * (tl.where(j + col == target, 1.0, 0.0) - tl.exp(x - lse_r))
        tl.store(g + j + col, dz.to(g.dtype.element_ty), mask=j + col < V)
