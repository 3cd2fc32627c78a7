"""
Compile every Triton kernel ahead of time, without a GPU, and print what each build costs.

    python bench/kernel_builds.py            # all kernels, targets and configurations: 172 builds, minutes on one core
    python bench/kernel_builds.py --quick    # defaults at head_dim 128, most of them for sm_90: what the tests run
    python bench/kernel_builds.py --write    # also store the table as results/kernels/triton-VERSION.csv

One line per build: registers per thread, stack bytes (register spills), shared memory bytes, warps, matrix instructions
(wgmma on sm_90, tcgen05 on sm_100, mma.sync elsewhere) and bulk-tensor (TMA) loads. Exit status 1 if a build spills,
exceeds the target's shared memory, is a tensor-core kernel without wgmma on sm_90, or got worse than the stored table
of the same triton version (more registers, stack or shared memory, fewer matrix or bulk instructions).

Sizes are those of MiMo-7B: 32 query heads on 8 KV heads of 128, D 4096, F 11008, V 151680, bfloat16.
"""
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    os.environ["NANOMIMO_TRITON"] = "1"     # define the kernels with a CPU build of torch too

import configurator  # noqa: E402
import kernels  # noqa: E402
from configurator import UserError  # noqa: E402
from kernels import attention, decode, gemv, linear_cross_entropy, rmsnorm, rope, swiglu, tl, triton  # noqa: E402

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}     # bytes a program may take [CUDA programming guide]
FIELDS = ["kernel", "target", "config", "regs", "stack", "shared", "warps", "matrix", "bulk"]
TABLES = ROOT / "results" / "kernels"

# argument types by name, shared by all kernels; every other argument is a pointer to bf16
FP32 = "lse delta part_o part_lse z nll logp entropy lse_out dlogp r r_out dw_part cos sin"
KINDS = {name: "*fp32" for name in FP32.split()}
KINDS |= {name: "*i32" for name in ("bounds", "table", "lengths")} | dict.fromkeys(("targets", "where"), "*i64")
KINDS |= {name: "i32" for name in "B T H N D V F_ Q n_table n_split per M K N0 N1".split()}
STRIDE = re.compile(r"s[qkvdcor][btsh]$|sr[bth]$|stride_")


@dataclass(frozen=True)
class Config:
    quick: bool = False         # the default configurations at head_dim 128 only
    write: bool = False         # store the table instead of comparing with it


def attention_cases() -> Iterator[tuple]:
    """(name, kernel, target, label, constants, options, needs tensor cores, in --quick) per attention configuration."""
    forms = {"forward": attention.forward_kernel, "dq": attention.dq_kernel, "dkv": attention.dkv_kernel}
    for (name, target, d), configs in attention.CONFIGS.items():
        for i, (BM, BN, warps, stages) in enumerate(configs):
            consts = dict(G=4, SCALE=d**-0.5, SCALE2=d**-0.5 * attention.LOG2E, D=d, BM=BM, BN=BN, ACC=tl.float32,
                          DOCS=True)                        # with document bounds: the heavier variant
            yield (f"attention {name}", forms[name], target, f"d{d} {BM}x{BN} w{warps} s{stages}", consts,
                   dict(num_warps=warps, num_stages=stages), True,
                   i == 0 and d == 128 and (target == 90 or name == "forward"))


def other_cases() -> Iterator[tuple]:
    """The same for all other kernels."""
    f32 = dict(ACC=tl.float32)
    for target in (80, 90, 100):
        quick = target == 90
        for i, (BN, warps, stages) in enumerate(decode.CONFIGS):
            yield ("decode split", decode.split_kernel, target, f"d128 16x{BN} w{warps} s{stages}",
                   dict(S=64, K=8, G=4, SCALE2=0.1275, D=128, ROWS=16, BN=BN, **f32),
                   dict(num_warps=warps, num_stages=stages), False, quick and i == 0)
        yield ("decode merge", decode.merge_kernel, target, "32 splits w4", dict(K=8, G=4, D=128, ROWS=16, NS=32),
               dict(num_warps=4), False, quick)
        forms = [("gemv residual", dict(PARTS=1, BIAS=False, GLU=False, RES=True)),
                 ("gemv qkv", dict(PARTS=3, BIAS=True, GLU=False, RES=False)),
                 ("gemv gate up", dict(PARTS=1, BIAS=False, GLU=True, RES=False))]
        for i, (BN, BK, warps, stages) in enumerate(gemv.CONFIGS):
            for name, form in forms:
                yield (name, gemv.gemv_kernel, target, f"{BN}x{BK} w{warps} s{stages}",
                       dict(form, EVEN=True, ROWS=gemv.ROWS, BN=BN, BK=BK, **f32),
                       dict(num_warps=warps, num_stages=stages), False, quick and i == 0)
        heads = [("loss", linear_cross_entropy.loss_kernel, dict(GRAD=True)),
                 ("logprob", linear_cross_entropy.logprob_kernel, {}),
                 ("logprob grad", linear_cross_entropy.logprob_grad_kernel, {})]
        for i, (BV, warps) in enumerate(linear_cross_entropy.CONFIGS):
            for name, kernel, more in heads:
                yield (name, kernel, target, f"{BV} w{warps}", dict(BV=BV, **more, **f32), dict(num_warps=warps), False,
                       quick and i == 0)
        warps = rmsnorm.warps_for(4096)
        yield ("rmsnorm residual", rmsnorm.norm_kernel, target, f"D4096 w{warps}",
               dict(EPS=1e-5, RES=True, BD=4096, **f32), dict(num_warps=warps), False, quick)
        yield ("rmsnorm backward", rmsnorm.norm_backward_kernel, target, f"D4096 w{warps}",
               dict(RES=True, BD=4096, **f32), dict(num_warps=warps), False, quick)
        for name, kernel in (("swiglu", swiglu.swiglu_kernel), ("swiglu backward", swiglu.swiglu_backward_kernel)):
            yield (name, kernel, target, f"{swiglu.BLOCK} w{swiglu.WARPS}", dict(BF=swiglu.BLOCK, **f32),
                   dict(num_warps=swiglu.WARPS), False, quick)
        yield ("rope", rope.rope_kernel, target, "H32 K8 d128 w4",
               dict(H=32, K=8, D=128, HEADS=32, SIGN=1.0, **f32), dict(num_warps=4), False, quick)
        yield ("rope store", rope.store_kernel, target, "H32 K8 d128 w4",
               dict(H=32, K=8, D=128, HEADS=32, **f32), dict(num_warps=4), False, quick)


def build(kernel, target: int, consts: dict, options: dict):
    """Compile one kernel for one target -> triton's compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    consts = {name: value for name, value in consts.items() if name in kernel.arg_names}
    kind = lambda name: KINDS.get(name, "i64" if STRIDE.match(name) else "*bf16")
    signature = {name: "constexpr" if name in consts else kind(name) for name in kernel.arg_names}
    # without these hints every pointer and stride counts as unaligned and the build is not the one that runs
    hints = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(signature.values()) if k != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=consts, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(compiled) -> dict[str, int]:
    """Registers, stack, shared bytes, warps, matrix and bulk instructions, read from the machine code."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        run = lambda *c: subprocess.check_output([tools / c[0], *c[1:], f.name], text=True)
        usage, code = run("cuobjdump", "--dump-resource-usage"), run("nvdisasm", "-c")
    regs, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    count = lambda pattern: len(re.findall(rf"\b(?:{pattern})\b", code))
    return dict(regs=regs, stack=stack, shared=compiled.metadata.shared, warps=compiled.metadata.num_warps,
                matrix=count("HGMMA|HMMA|UTCHMMA"), bulk=count("UTMALDG"), wgmma=count("HGMMA"))


def faults(row: dict, target: int, tensor_core: bool, stored: dict | None) -> list[str]:
    """What is wrong with one build, in words; empty when all is well. stored: its row of the table, or None."""
    found = []
    if row["stack"]:
        found.append(f"spills {row['stack']} bytes")
    if row["shared"] > SHARED_LIMIT[target]:
        found.append(f"{row['shared']} bytes of shared memory over the limit of {SHARED_LIMIT[target]}")
    if tensor_core and target == 90 and not row["wgmma"]:
        found.append("no wgmma")
    if row["regs"] < 10:
        found.append("an empty kernel: the compiler ran out of tensor memory")
    if stored:
        worse = [f for f in ("regs", "stack", "shared") if row[f] > int(stored[f])]
        worse += [f for f in ("matrix", "bulk") if row[f] < int(stored[f])]
        found += [f"{f} {stored[f]} -> {row[f]}" for f in worse]
    return found


def main(cfg: Config) -> None:
    if kernels.INTERPRET:
        raise UserError("bench/kernel_builds.py: unset TRITON_INTERPRET, an interpreter process cannot compile")
    if triton is None:
        raise UserError("bench/kernel_builds.py: triton is not installed (pip install triton, Linux x86-64)")
    path, stored = TABLES / f"triton-{triton.__version__}.csv", {}
    if path.exists() and not cfg.write:
        with path.open() as f:
            stored = {(r["kernel"], r["target"], r["config"]): r for r in csv.DictReader(f)}
    print(f"triton {triton.__version__}, compared with {path.name if stored else 'no table'}")
    line = "{kernel:17} {target:6} {config:21} {regs:>4} {stack:>5} {shared:>6} {warps:>5} {matrix:>6} {bulk:>4}"
    print(line.format(**{f: f for f in FIELDS}))
    rows, bad = [], 0
    for name, kernel, target, label, consts, options, tensor_core, in_quick in [*attention_cases(), *other_cases()]:
        if cfg.quick and not in_quick:
            continue
        key = (name, f"sm_{target}", label)
        row = dict(zip(FIELDS, key, strict=False)) | resources(build(kernel, target, consts, options))
        wrong = faults(row, target, tensor_core, stored.get(key))
        bad += bool(wrong)
        rows.append({f: row[f] for f in FIELDS})
        print(line.format(**row) + (f"  FAULT: {', '.join(wrong)}" if wrong else ""), flush=True)
    if cfg.write:
        TABLES.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as f:
            writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"wrote {path}")
    print(f"{len(rows)} builds, {bad} at fault")
    if bad:
        raise UserError(f"bench/kernel_builds.py: {bad} of {len(rows)} builds at fault, see FAULT above")


if __name__ == "__main__":
    configurator.run(main, Config)
