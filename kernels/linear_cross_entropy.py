"""Head projection and cross entropy in chunks; per-token log-prob and entropy for RL."""
import torch

IGNORE = -100


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, w, chunk):
        want = x.requires_grad or weight.requires_grad
        valid = targets != IGNORE
        w = valid.float() if w is None else torch.where(valid, w.float(), 0.0)
        safe = targets.clamp_min(0)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        nll = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if want else None
        dw = torch.zeros_like(weight) if want else None
        for i in range(0, x.shape[0], chunk):
            xs, ts, ws = x[i:i + chunk], safe[i:i + chunk, None], w[i:i + chunk]
            z = (xs @ weight.T).float()  # [chunk, V]
            lse = z.logsumexp(-1)
            nll[i:i + chunk] = lse - z.gather(1, ts)[:, 0]
            loss += torch.dot(ws, nll[i:i + chunk])
            if want:
                # dL/dz = w * (softmax(z) - onehot(target))
                z.sub_(lse[:, None]).exp_().mul_(ws[:, None])
                z.scatter_add_(1, ts, -ws[:, None])
                z = z.to(x.dtype)
                torch.mm(z, weight, out=dx[i:i + chunk])
                dw.addmm_(z.T, xs)
        ctx.save_for_backward(dx, dw, nll, valid)
        return loss

    @staticmethod
    def backward(ctx, g):
        dx, dw, nll, valid = ctx.saved_tensors
        gw = g * nll * valid if ctx.needs_input_grad[3] else None
        return dx * g.to(dx.dtype), dw * g.to(dw.dtype), None, gw, None


def linear_cross_entropy(x, weight, targets, mask_or_weights=None, chunk=2048):
    """Sum over tokens of w * -log softmax(x weight^T)[target]; fp32 scalar. Targets of -100 are ignored."""
    return LinearCrossEntropy.apply(x, weight, targets, mask_or_weights, min(chunk, 512) if x.device.type == "cpu" else chunk)


class LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, temperature, chunk):
        N = x.shape[0]
        safe = targets.clamp_min(0)
        logp, entropy, lses = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(3))
        for i in range(0, N, chunk):
            z = (x[i:i + chunk] @ weight.T).float() / temperature  # [chunk, V]
            lse = z.logsumexp(-1)
            logp[i:i + chunk] = z.gather(1, safe[i:i + chunk, None])[:, 0] - lse
            # H = lse - sum_v p_v z_v
            entropy[i:i + chunk] = lse - ((z - lse[:, None]).exp_() * z).sum(-1)
            lses[i:i + chunk] = lse
        logp = torch.where(targets != IGNORE, logp, 0.0)
        ctx.save_for_backward(x, weight, targets, lses)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, g, _):
        x, weight, targets, lses = ctx.saved_tensors
        chunk = ctx.chunk
        g = torch.where(targets != IGNORE, g, 0.0) / ctx.temperature
        safe = targets.clamp_min(0)
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        for i in range(0, x.shape[0], chunk):
            xs, gs = x[i:i + chunk], g[i:i + chunk, None]
            z = (xs @ weight.T).float() / ctx.temperature
            # dlogp/dz = onehot(target) - softmax(z)
            z.sub_(lses[i:i + chunk, None]).exp_().mul_(-gs)
            z.scatter_add_(1, safe[i:i + chunk, None], gs)
            z = z.to(x.dtype)
            torch.mm(z, weight, out=dx[i:i + chunk])
            dw.addmm_(z.T, xs)
        return dx, dw, None, None, None


def logprob_entropy(x, weight, targets, temperature=1.0, chunk=2048):
    """(log p(target) [N], entropy [N]) of softmax(x weight^T / temperature), fp32; logp is differentiable."""
    return LogprobEntropy.apply(x, weight, targets, temperature, min(chunk, 512) if x.device.type == "cpu" else chunk)
