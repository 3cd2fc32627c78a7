"""
The part `kernels` of bench/gpu.py: each kernel against fp64, then beside what a user would take instead.

A check that fails, and attention of ours that does not run, are faults: the rest is measured, then the command ends
with status 1. Another library's backend that this device or torch lacks prints a line and is left out.
"""
import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels as K
from kernels import attention as A
from kernels import decode as D
from kernels import gemv as GV
from kernels import linear_cross_entropy as L
from kernels import reference
from kernels import rmsnorm as N
from kernels import rope as R
from kernels import swiglu as S
from model import MiMo, ModelConfig

# name of a row -> (unit, at least or at most, value); H200, bf16, the shapes of MiMo-7B
TARGETS = {
    "attention forward causal T=8192: ours": ("TFLOP/s", ">=", 420),      # FlashAttention-2 on Hopper: 335
    "attention backward causal T=8192: ours": ("TFLOP/s", ">=", 300),     # FlashAttention-2 on Hopper: 320
    "attention forward causal T=32768: ours": ("TFLOP/s", ">=", 420),
    "attention backward causal T=32768: ours": ("TFLOP/s", ">=", 300),
    "packed 2k documents at 32k over full causal": ("x", ">=", 8),
    "linear cross entropy T=8192 over bare products": ("x", "<=", 1.5),
    "linear cross entropy T=8192: memory beyond weights and gradients": ("GiB", "<=", 1.5),
    "logprob and entropy of logits over eager": ("x", ">=", 10),
    "decode B=1 8k Q=1": ("share", ">=", 0.6),
    "decode B=8 8k Q=1": ("share", ">=", 0.8),
    "decode B=64 8k Q=1": ("share", ">=", 0.8),
    "rmsnorm residual forward": ("share", ">=", 0.8),
    "swiglu forward": ("share", ">=", 0.8),
    "swiglu backward": ("share", ">=", 0.8),
    "rope": ("share", ">=", 0.8),
}


def attempt(run, name: str, f: Callable, ours: bool = False):
    """f(); where it fails, print why and return None. ours: it is our own kernel, so failing is a fault of the run."""
    try:
        return f()
    except (RuntimeError, NotImplementedError, ImportError, AttributeError) as e:
        reason = str(e).splitlines()[0][:80] if str(e) else type(e).__name__
        print(f"{name:66} does not run: {reason}", flush=True)
        if ours:
            run.faults.append(f"{name}: does not run: {reason}")
        return None


def exact_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Attention as the textbook writes it, in fp64; shapes of kernels.attention.attention."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    at = torch.arange(q.shape[1], device=q.device)
    see = (at[None, :] <= at[:, None]) & (at >= bounds[0][:, :, None])
    s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", s.masked_fill(~see[:, None], -torch.inf).softmax(-1), v)


@contextlib.contextmanager
def only(table: dict, key, config: tuple) -> Iterator[None]:
    """Inside the block, table[key] holds this one configuration."""
    kept, table[key] = table[key], [config]
    try:
        yield
    finally:
        table[key] = kept


def every_config(run, d: int, kinds: tuple = ("forward", "dq", "dkv")) -> Iterator[tuple]:
    """(kind, config or None, context that makes it the only one) per attention configuration; one pass on a CPU."""
    if not run.cuda:
        yield kinds[0], None, contextlib.nullcontext()
        return
    target = K.arch(run.device)
    for kind in kinds:
        for config in A.CONFIGS[kind, target, max(d, 64)]:
            yield kind, config, only(A.CONFIGS, (kind, target, max(d, 64)), config)


def check_attention(run, d: int, repeats: int = 20) -> float:
    """
    Every attention configuration of head width d against fp64 on ragged packed shapes, and the same bits `repeats`
    times. -> worst relative error; what is wrong goes to run.faults.
    """
    worst = 0.0
    B, T, H, Kv = (2, 777, 8, 2) if run.cuda else (1, 19, 2, 1)
    cuts = torch.tensor([0, 1, T // 3, T, B * T], device=run.device, dtype=torch.int32)
    for docs in (True, False):
        bounds = A.doc_bounds(cuts if docs else cuts[:1], B, T)
        q, k, v = (run.randn(B, T, n, d, grad=True) for n in (H, Kv, Kv))
        do = run.randn(B, T, H, d)
        want = exact_attention(q, k, v, bounds)
        exact = (want, *torch.autograd.grad(want, (q, k, v), do.double()))

        def ours():
            o = A.attention(q, k, v, bounds if docs else None)  # noqa: B023
            return o, *torch.autograd.grad(o, (q, k, v), do)  # noqa: B023

        for kind, config, chosen in every_config(run, d):
            name = f"attention {kind} {config} d={d} docs={docs}"
            with chosen:
                got = attempt(run, name, ours, ours=True)
                if got is None:
                    continue
                errors = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, exact, strict=True)]
                worst = max(worst, *errors)
                if not all(e <= 1e-2 for e in errors):               # nan too
                    run.faults.append(f"{name}: relative errors {errors} over 1e-2")
                if not all(torch.equal(a, g) for _ in range(repeats) for a, g in zip(ours(), got, strict=True)):
                    run.faults.append(f"{name}: runs differ")
    return worst


def check(run) -> None:
    """The defaults at the 7B's head width, then the other kernels; all configurations: tests/test_kernels_gpu.py."""
    d, kinds = (128, ("forward", "dq", "dkv")) if run.cuda else (16, ())
    with contextlib.ExitStack() as defaults:
        for kind in kinds:
            key = kind, K.arch(run.device), d
            defaults.enter_context(only(A.CONFIGS, key, A.CONFIGS[key][0]))
        run.check("attention", check_attention(run, d))
    check_others(run)
    check_decode(run)
    check_gemv(run)


def tables(run, T: int, d: int) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0 .. T-1 for head width d and base 10,000."""
    return MiMo(ModelConfig(n_layer=1, head_dim=d)).rope_at(None, torch.arange(T, device=run.device))


def check_others(run) -> None:
    """The other kernels against their own references in fp64, outputs and gradients."""
    x, r, w, up = (run.randn(*s, grad=True) for s in ((64, 512), (64, 512), (512,), (64, 512)))
    head, targets = run.randn(1003, 512, grad=True), torch.randint(0, 1003, (64,), device=run.device)
    cos, sin = tables(run, 64, 128)
    heads = lambda t: t.view(1, 64, 4, 128)
    rotate = lambda t: reference.rope(heads(t), heads(t), cos.to(t.dtype), sin.to(t.dtype))[0]
    norm = lambda x, w: reference.rmsnorm(x, w, 1e-5)
    logp = lambda x, head: (x @ head.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    cases = {
        "rmsnorm": (lambda x, w: N.rmsnorm(x, w, 1e-5), norm, (x, w)),
        "rmsnorm_residual": (lambda x, r, w: N.rmsnorm_residual(x, w, 1e-5, r)[0],
                             lambda x, r, w: norm(x + r, w), (x, r, w)),
        "swiglu": (S.swiglu, lambda g, u: F.silu(g) * u, (x, up)),
        "rope": (lambda q, k: torch.cat(R.rope(heads(q), heads(k), cos, sin)),
                 lambda q, k: torch.cat((rotate(q), rotate(k))), (x, up)),
        "linear_cross_entropy": (lambda x, head: L.linear_cross_entropy(x, head, targets, chunk=48),
                                 lambda x, head: -logp(x, head).sum(), (x, head)),
        "logprob_entropy": (lambda x, head: L.logprob_entropy(x, head, targets, chunk=48)[0], logp, (x, head)),
    }
    for name, (ours, plain, inputs) in cases.items():
        exact = [t.detach().double().requires_grad_() for t in inputs]
        got, want = ours(*inputs), plain(*exact)
        g = torch.randn_like(want)
        pairs = [(got, want), *zip(torch.autograd.grad(got, inputs, g.to(got.dtype)),
                                   torch.autograd.grad(want, exact, g), strict=True)]
        error = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
        run.check(name, error)


def check_decode(run) -> None:
    """Decode attention over a shuffled block table against its reference in fp64, one and four new tokens."""
    B, H, Kv, d, block = 3, 32, 8, 128, 16
    lengths = torch.tensor([500, 37, 4], device=run.device, dtype=torch.int32)
    table = torch.randperm(B * 32, device=run.device).view(B, 32).int()
    k, v = (run.randn(B * 32, block, Kv, d) for _ in range(2))
    worst = 0.0
    for Q in (1, 4):
        q = run.randn(B, Q, H, d)
        want = D.decode_reference(q.double(), k.double(), v.double(), table, lengths)
        got = D.decode_attention(q, k, v, table, lengths)
        worst = max(worst, ((got.double() - want).norm() / want.norm()).item())
    run.check("decode", worst)


def check_gemv(run) -> None:
    """Each form in all configurations against fp64, and one row alone with the bits that it has among 16."""
    d, ff, worst, kept = 1024, 2816, 0.0, GV.CONFIGS[:]
    x, residual, biases = run.randn(16, d), run.randn(16, d), [run.randn(d) for _ in range(3)]
    square, gate, up = (run.randn(n, d) * d**-0.5 for n in (d, ff, ff))
    wide = dict(residual=residual.double(), biases=[b.double() for b in biases], glu=True)
    f = GV.gemv if run.cuda else GV.gemv_reference                   # the kernel needs a GPU or the interpreter
    for ws, form in (([square], dict(residual=residual)), ([square] * 3, dict(biases=biases)),
                     ([gate, up], dict(glu=True))):
        want = GV.gemv_reference(x.double(), [w.double() for w in ws], **{k: wide[k] for k in form})
        for config in kept if run.cuda else kept[:1]:
            GV.CONFIGS[:] = [config]
            got = f(x, ws, **form)
            one = f(x[:1], ws, **form | ({"residual": residual[:1]} if "residual" in form else {}))
            worst = max(worst, ((got.double() - want).norm() / want.norm()).item())
            if run.cuda and not torch.equal(one, got[:1]):
                run.faults.append(f"gemv {config}: a row alone differs from the same row among 16")
    GV.CONFIGS[:] = kept
    run.check("gemv", worst)


def sides(run, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable | None]:
    """name -> forward function of ours and of the others, [B, T, H, d] in and out; None: does not run here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend):
        def f():
            with sdpa_kernel(backend):
                heads = (t.transpose(1, 2) for t in (q, k, v))
                return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
        return f

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        T = q.shape[1]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=run.device.type)
        call = torch.compile(flex_attention) if run.cuda else flex_attention
        return lambda: call(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask,
                            enable_gqa=True).transpose(1, 2)

    all_sides = {"ours": lambda: A.attention(q, k, v), "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
                 "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION)}
    if q.shape[1] <= 8192:                                           # it compiles anew for each length
        all_sides["FlexAttention"] = attempt(run, "FlexAttention", flex)
    return all_sides


def time_attention(run) -> None:
    """Forward and backward of ours, all configurations, and of the others; packed documents last."""
    H, Kv, d = (32, 8, 128) if run.cuda else (4, 2, 16)
    for T in (2048, 8192, 32768) if run.cuda else (64,):
        q, k, v = (run.randn(1, T, n, d, grad=True) for n in (H, Kv, Kv))
        do = run.randn(1, T, H, d)
        flops = 4 * H * T * T * d / 2
        name = lambda way, who: f"attention {way} causal T={T}: {who}"  # noqa: B023
        for who, f in sides(run, q, k, v).items():
            o = f and attempt(run, name("forward", who), f, ours=who == "ours")
            if o is None:
                continue
            with torch.no_grad():
                t = run.ms(f)
            share = f"{flops / t / 1e9 / run.matrix:.0%}"
            run.row(name("forward", who), flops / t / 1e9, "TFLOP/s", t, share)
            t = attempt(run, name("backward", who), lambda: run.ms(
                lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)), ours=who == "ours")  # noqa: B023
            if t:
                run.row(name("backward", who), 2.5 * flops / t / 1e9, "TFLOP/s", t,
                        f"{2.5 * flops / t / 1e9 / run.matrix:.0%}")
        if T == 8192 and run.cuda:                                   # which configuration should come first in its list
            o = A.attention(q, k, v)
            for kind, config, chosen in every_config(run, d):
                with chosen:
                    f = ((lambda: A.attention(q, k, v)) if kind == "forward" else  # noqa: B023
                         (lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)))  # noqa: B023
                    t = run.ms(f)
                    work = flops * (1 if kind == "forward" else 2.5)
                    run.row(f"configuration {kind} {config}", work / t / 1e9, "TFLOP/s", t)
    packed(run, q, k, v, do)


def packed(run, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> None:
    """2k documents in the longest row against full causal, forward and backward together."""
    T = q.shape[1]
    cuts = torch.arange(0, T + 1, max(T // 16, 1), device=run.device, dtype=torch.int32)
    bounds = A.doc_bounds(cuts, 1, T)

    def both(b):
        torch.autograd.grad(A.attention(q, k, v, b), (q, k, v), do)

    full, short = run.ms(lambda: both(None)), run.ms(lambda: both(bounds))
    run.row("packed 2k documents at 32k over full causal", full / short, "x", short, f"full {full:.2f} ms")


def time_head(run) -> None:
    """Loss and log-probs beside the bare products, eager torch and torch's own linear cross entropy."""
    T, d, V = (8192, 4096, 151_680) if run.cuda else (64, 32, 301)
    x, w = run.randn(T, d, grad=True), (run.randn(V, d) * 0.02).requires_grad_()
    targets = torch.randint(0, V, (T,), device=run.device)

    def products():                                                  # forward, dx and dW in the same chunks alone
        dw = torch.zeros_like(w)
        for i in range(0, T, 2048):
            z = x[i:i + 2048] @ w.T
            z @ w
            dw.addmm_(z.T, x[i:i + 2048])

    ours = lambda: torch.autograd.grad(L.linear_cross_entropy(x, w, targets), (x, w))
    eager = lambda: torch.autograd.grad(F.cross_entropy((x @ w.T).float(), targets, reduction="sum"), (x, w))
    torchs = lambda: torch.autograd.grad(F.linear_cross_entropy(x, w, targets, reduction="sum"), (x, w))
    with torch.no_grad():
        bare = run.ms(products)
    t = run.ms(ours)
    run.row("linear cross entropy T=8192 over bare products", t / bare, "x", t, f"products {bare:.1f} ms")
    for name, f in (("eager", eager), ("F.linear_cross_entropy", torchs)):
        t = attempt(run, f"linear cross entropy: {name}", lambda f=f: run.ms(f, reps=5))
        if t:
            run.row(f"linear cross entropy T=8192: {name} over bare products", t / bare, "x", t)
    if run.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = ours()
        beyond = torch.cuda.max_memory_allocated() - before - sum(g.numel() * g.element_size() for g in grads)
        run.row("linear cross entropy T=8192: memory beyond weights and gradients", beyond / 2**30, "GiB")
    rows = 4096 if run.cuda else 16
    z = torch.randn(rows, V, device=run.device)

    def eager_logprob():
        logp = z.log_softmax(-1)
        return logp.gather(1, targets[:rows, None]), -(logp.exp() * logp).sum(-1)

    # the torch path of logprob_ works in z's memory; the Triton kernel only reads it
    fused = (lambda: L.logprob_(z, targets[:rows])) if run.cuda else (lambda: L.logprob_(z.clone(), targets[:rows]))
    slow, t = run.ms(eager_logprob), run.ms(fused)
    run.row("logprob and entropy of logits over eager", slow / t, "x", t, f"eager {slow:.2f} ms, {rows} rows")


def time_decode(run) -> None:
    """Decode attention over 8,192 cached tokens for 1, 8 and 64 sequences, one and four new tokens."""
    H, Kv, d, T = (32, 8, 128, 8192) if run.cuda else (4, 2, 16, 64)
    for B in (1, 8, 64):
        copies = max(1, 16 // B) if run.cuda else 1             # one sequence's cache would stay in L2 between calls
        caches = [run.randn(B * T // 64, 64, Kv, d) for _ in range(2 * copies)]
        table = torch.randperm(B * T // 64, device=run.device).view(B, -1).int()
        lengths = torch.full((B,), T, device=run.device, dtype=torch.int32)
        turn = [0]
        for Q in (1, 4):
            q = run.randn(B, Q, H, d)

            def f():
                i = turn[0] = (turn[0] + 1) % copies  # noqa: B023
                return D.decode_attention(q, caches[2 * i], caches[2 * i + 1], table, lengths)  # noqa: B023

            run.bandwidth(f"decode B={B} 8k Q={Q}", f, 2 * B * T * Kv * d * caches[0].element_size())


def time_gemv(run) -> None:
    """The products of a 7B block and of lm_head for one row and four: ours, all configurations, beside cuBLAS."""
    d, ff, V, kept = *((4096, 11_008, 151_680) if run.cuda else (64, 96, 256)), GV.CONFIGS[:]
    with torch.no_grad():
        for name, N, K_, parts in (("o", d, d, 1), ("q, k, v", d, d, 3), ("gate, up", ff, d, 2), ("down", d, ff, 1),
                                   ("head", V, d, 1)):
            ws = [run.randn(n, K_) * K_**-0.5 for n in ((N, N // 4, N // 4) if parts == 3 else (N,) * parts)]
            n_bytes = sum(w.numel() * w.element_size() for w in ws)
            for M in (1, 4):
                x = run.randn(M, K_)
                run.bandwidth(f"gemv {name}, {M} rows: cuBLAS", lambda: [F.linear(x, w) for w in ws],  # noqa: B023
                              n_bytes)
                for config in kept if run.cuda else ():
                    GV.CONFIGS[:] = [config]
                    run.bandwidth(f"gemv {name}, {M} rows: {config}", lambda: GV.gemv(x, ws, glu=parts == 2),  # noqa: B023
                                  n_bytes)
                GV.CONFIGS[:] = kept


def time_elementwise(run) -> None:
    """RMSNorm, SwiGLU and RoPE beside eager torch."""
    T, d, ff = (8192, 4096, 11_008) if run.cuda else (64, 32, 48)
    size = torch.empty(0, dtype=run.dtype).element_size()
    x, r, dy = (run.randn(T, d, grad=True) for _ in range(3))
    w = run.randn(d, grad=True)
    with torch.no_grad():
        run.bandwidth("rmsnorm residual forward", lambda: N.rmsnorm_residual(x, w, 1e-5, r), 4 * T * d * size)
        run.bandwidth("rmsnorm residual forward: eager, F.rms_norm", lambda: F.rms_norm(x + r, (d,), w, 1e-5),
                      4 * T * d * size)
    y, s = N.rmsnorm_residual(x, w, 1e-5, r)
    run.bandwidth("rmsnorm residual backward",
                  lambda: torch.autograd.grad((y, s), (x, r, w), (dy, dy), retain_graph=True), 4 * T * d * size)
    gate, up, dout = (run.randn(T, ff, grad=True) for _ in range(3))
    with torch.no_grad():
        run.bandwidth("swiglu forward", lambda: S.swiglu(gate, up), 3 * T * ff * size)
        run.bandwidth("swiglu forward: eager", lambda: F.silu(gate) * up, 3 * T * ff * size)
    h = S.swiglu(gate, up)
    run.bandwidth("swiglu backward", lambda: torch.autograd.grad(h, (gate, up), dout, retain_graph=True),
                  5 * T * ff * size)
    H, Kv, dh = (32, 8, 128) if run.cuda else (2, 1, 16)
    q, k = run.randn(1, T, H, dh), run.randn(1, T, Kv, dh)
    cos, sin = tables(run, T, dh)
    n_bytes = 2 * (q.numel() + k.numel()) * size
    run.bandwidth("rope", lambda: R.rope(q, k, cos, sin), n_bytes)
    run.bandwidth("rope: eager", lambda: reference.rope(q, k, cos, sin), n_bytes)


def kernels(run) -> None:
    """The part: correctness first, then each kernel beside what a user would take instead."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        check(run)
        time_attention(run)
        time_head(run)
        time_decode(run)
        time_gemv(run)
        time_elementwise(run)
