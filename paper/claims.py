"""
The report's claims as experiments: one table, written down before the runs that decide it.

    make paper                       # all of it, two runs at a time: some ten hours on two idle cores; resumes
    make paper CLAIM=fig5            # one claim
    python paper/experiments.py --list

A Run is one command of the project and what it needs; the folders of those stand in its command as {name}. A Claim
compares arms: what is measured in each, and contrasts (this measure of one arm minus that of another), of which the
first decides. Every Run is done once per training seed, which sets the world's problems and pages, the weights and the
order of samples; Runs that claims share are done once.

Rules, fixed before the first run:
  - test problems are those of the seed's own world (11 and up), which nobody has looked at: the recipe was chosen on
    world 1, and problems that also occur in world 1's test set do not count. Whatever is chosen is chosen on the
    validation problems.
  - a claim is registered when its first run starts: its entry is copied to results/claims, with the commit. A claim
    that changed afterwards is refused; another design gets another key, and the old result stays.
  - verdict: "agrees" where the 95% interval of the deciding contrast (bootstrap over seeds and, within them, problems)
    lies on the report's side of 0 and so does every seed's difference; "disagrees" where both lie on the other side;
    otherwise "cannot be told at this size". With three seeds the bootstrap alone would be too narrow.
"""
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, eq=False)             # runs are told apart by what their whole chain of commands says
class Run:
    """
    A command as typed after `python`. {out}, {seed} and the names in `uses` are filled in; {x:answers=9000} is the
    newest checkpoint of x that saw at most so many answers.
    """
    name: str
    command: str
    uses: dict[str, "Run"] = field(default_factory=dict)


@dataclass(frozen=True)
class Contrast:
    """metric of `better` minus metric of `worse`, each "ARM" or "ARM.MEASURE"; the report expects it on side `sign`."""
    says: str
    better: str
    worse: str
    metric: str                               # experiments.py:METRICS
    sign: Literal[1, -1] = 1


@dataclass(frozen=True)
class Claim:
    key: str
    section: str                              # of the report
    says: str                                 # the claim, with the report's numbers
    arms: dict[str, dict[str, Run]]           # arm -> what is measured -> the Run whose folder holds the numbers
    contrasts: list[Contrast]                 # the first one decides
    seeds: tuple[int, ...] = (11, 12, 13)
    differs: str = ""                         # from the report's experiment


# ---- the recipe, as runs --------------------------------------------------------------------------------------------

WORLD = Run("world", "-m data.prepare --out={out} --seed={seed}")


def pretrained(world: Run = WORLD, config: str = "config/tiny.py", flags: str = "") -> Run:
    return Run("base", f"pretrain.py {config} --data={{world}}/data --out={{out}} --seed={{seed}} {flags}".strip(),
               {"world": world})


def tuned(base: Run, world: Run = WORLD, flags: str = "") -> Run:
    return Run("sft", "sft.py config/tiny_sft.py --init={base} --data={world}/sft.jsonl "
               f"--heldout={{world}}/problems/test.jsonl --out={{out}} --seed={{seed}} {flags}".strip(),
               {"base": base, "world": world})


def rated(model: Run, world: Run = WORLD) -> Run:
    """Four answers to each RL problem: pass rates, and difficulty of the tests."""
    return Run("rates", "eval.py --ckpt={model} --problems={world}/problems/rl_all.jsonl --samples=4 --temperature=1.0 "
               "--top_p=1.0 --out={out}/rates.json", {"model": model, "world": world})


def filtered(models: list[Run], world: Run = WORLD, flags: str = "") -> Run:
    """The RL problems that the last of the models does not find too easy, difficulty by the answers of all."""
    answers = ", ".join(f"'{{m{i}}}/rates_answers.jsonl'" for i in range(len(models)))
    return Run("problems", "-m data.rl_problems --problems={world}/problems/rl_all.jsonl "
               f'--answers="[{answers}]" --out={{out}}/rl.jsonl {flags}'.strip(),
               {"world": world, **{f"m{i}": rated(m, world) for i, m in enumerate(models)}})


def rl(start: Run, problems: Run, world: Run = WORLD, flags: str = "", script: str = "rl.py") -> Run:
    """config/tiny_rl.py; a checkpoint every 30 iterations stays, for the curve over the test problems."""
    return Run("rl", f"{script} config/tiny_rl.py --init={{start}} --problems={{problems}}/rl.jsonl "
               "--valid={world}/problems/valid.jsonl --out={out} --seed={seed} --save_every=30 --eval_every=30 "
               f"--keep=99 {flags}".strip(), {"start": start, "problems": problems, "world": world})


def evaluated(model: Run, at: str = "", world: Run = WORLD, flags: str = "--samples=8") -> Run:
    """Held-out test problems. at: a step's folder ("/step_00000030") or "answers=N"; "" = the end."""
    ckpt = f"{{model:{at}}}" if at.startswith("answers=") else f"{{model}}{at}"
    return Run("test", f"eval.py --ckpt={ckpt} --problems={{world}}/problems/test.jsonl --out={{out}}/eval.json "
               f"{flags}", {"model": model, "world": world})


BASE = pretrained()
SFT = tuned(BASE)
PROBLEMS = filtered([BASE, SFT])
RL = rl(SFT, PROBLEMS)
RL_ZERO = rl(BASE, PROBLEMS)


# ---- the claims -----------------------------------------------------------------------------------------------------

def table5() -> Claim:
    """README's main table."""
    return Claim(
        "table5", "3.5, Table 5",
        "RL lifts the SFT model and RL-Zero the base model, in mathematics and code: AIME24 32.9 (Base), 56.4 "
        "(RL-Zero), 58.7 (SFT), 68.2 (RL); LiveCodeBench v5 32.9, 49.1, 52.3, 57.8.",
        {"Base": {"test": evaluated(BASE, flags="--samples=16")}, "SFT": {"test": evaluated(SFT)},
         "RL-Zero": {"test": evaluated(RL_ZERO)}, "RL": {"test": evaluated(RL)}},
        [Contrast("RL above SFT", "RL.test", "SFT.test", "score"),
         Contrast("RL above SFT, maths", "RL.test", "SFT.test", "maths"),
         Contrast("RL above SFT, code", "RL.test", "SFT.test", "code"),
         Contrast("RL-Zero above Base", "RL-Zero.test", "Base.test", "score"),
         Contrast("RL-Zero above Base, maths", "RL-Zero.test", "Base.test", "maths"),
         Contrast("RL-Zero above Base, code", "RL-Zero.test", "Base.test", "code")],
        differs="The toy's recipe, as `make demo` runs it on world 1, but on one rank.")


def eq1() -> Claim:
    by_group = rl(SFT, PROBLEMS, flags="--divide_by=group")
    return Claim(
        "eq1", "3.3, Eq. 1",
        "The loss is divided by the tokens of each prompt's group (as Eq. 1 prints it), not by those of the mini-batch "
        "(as DAPO's code, and ours until now). No number is given.",
        {"batch": {"test": evaluated(RL)}, "group": {"test": evaluated(by_group)}},
        [Contrast("per group is not worse, all problems", "group.test", "batch.test", "score"),
         Contrast("maths", "group.test", "batch.test", "maths"),
         Contrast("code", "group.test", "batch.test", "code")],
        differs="The claim is ours: which of two readings to take. Per group becomes the default unless the verdict is "
                "\"disagrees\".")


def fig5() -> Claim:
    """From the base, on code that the base solves in none of four answers: a full pass is rare at the start."""
    problems = filtered([SFT, BASE], flags="--kinds=\"['code']\" --max_code_rate=0.25")
    arms = {scheme: rl(BASE, problems, flags=f"--scheme={scheme} --save_every=10") for scheme in
            ("vanilla", "strict", "soft")}
    return Claim(
        "fig5", "3.3.1, Fig. 5",
        "A reward that weighs tests by their difficulty (strict or soft) beats all or nothing (vanilla) on code: about "
        "45.9 against 42.8 on LiveCodeBench v5 after 1,200 steps, from 33.7.",
        {name: {"updates": evaluated(run), "answers": evaluated(run, "answers=17000")} for name, run in arms.items()},
        [Contrast("strict above vanilla after 90 updates, code", "strict.updates", "vanilla.updates", "code"),
         Contrast("soft above vanilla after 90 updates, code", "soft.updates", "vanilla.updates", "code"),
         Contrast("strict above vanilla after 17,000 answers, code", "strict.answers", "vanilla.answers", "code"),
         Contrast("soft above vanilla after 17,000 answers, code", "soft.answers", "vanilla.answers", "code")],
        seeds=(11, 12, 13, 14, 15, 16),
        differs="From the base, on code problems alone that the base solves in none of four answers. Scores on all "
                "test problems of kind code.")


def easy_pool() -> Claim:
    long = "--steps=300"
    arms = {"pool": rl(SFT, PROBLEMS, flags=long),
            "kept": rl(SFT, PROBLEMS, flags=f"{long} --solved=queue", script="paper/policy.py"),
            "removed": rl(SFT, PROBLEMS, flags=f"{long} --easy_alpha=0")}
    return Claim(
        "easy_pool", "3.3.2",
        "Problems that are always solved go to a pool from which a tenth of the prompts is drawn: updates are more "
        "stable than without them, and sampling costs less than with all of them in the queue.",
        {name: {"run": run, "test": evaluated(run)} for name, run in arms.items()},
        [Contrast("held-out score less unsteady with the pool than without (spread of its steps, points)", "pool.run",
                  "removed.run", "unsteady", -1),
         Contrast("gradient norm lower with the pool than without", "pool.run", "removed.run", "grad_norm", -1),
         Contrast("answers per update fewer with the pool than with all kept", "pool.run", "kept.run", "answers", -1),
         Contrast("final score, pool against removed", "pool.test", "removed.test", "score"),
         Contrast("final score, pool against kept", "pool.test", "kept.test", "score")],
        differs="300 iterations of 24 groups.")


def fig7() -> Claim:
    """Pages show the steps of half the maths problems, so that SFT on worked answers teaches what most pages lack."""
    world = Run("world", WORLD.command + " --steps_share=0.5")
    base = pretrained(world)
    light = tuned(base, world, "--steps=8")
    full = tuned(base, world, "--steps=560")
    every = Run("problems", "-c \"import shutil; shutil.copy('{world}/problems/rl_all.jsonl', '{out}/rl.jsonl')\"",
                {"world": world})
    arms = {name: (start, rl(start, every, world, "--steps=150"))
            for name, start in (("zero", base), ("light", light), ("full", full))}
    return Claim(
        "fig7", "3.6, Fig. 1 and 7",
        "RL-Zero rises faster, RL from SFT ends higher (AIME24 68.2 against 56.4); RL from a light SFT, for the format "
        "only, ends below both.",
        {name: {"start": evaluated(start, world=world), "early": evaluated(run, "/step_00000030", world),
                "end": evaluated(run, world=world)} for name, (start, run) in arms.items()},
        [Contrast("RL from full SFT above RL-Zero at the end", "full.end", "zero.end", "score"),
         Contrast("the same, maths", "full.end", "zero.end", "maths"),
         Contrast("the same, code", "full.end", "zero.end", "code"),
         Contrast("RL-Zero rises more in the first 30 iterations", "zero.early - zero.start", "full.early - full.start",
                  "score"),
         Contrast("light below RL-Zero at the end", "light.end", "zero.end", "score", -1),
         Contrast("light below full at the end", "light.end", "full.end", "score", -1)],
        differs="Pages show the steps of half the maths problems. All arms train on the same, unfiltered problems. "
                "Light SFT: some 320 samples; full: five epochs of 4,000.")


def fig8() -> Claim:
    """Batches of 48 groups, so that sixteen updates see three each; learning rate per arm chosen on valid problems."""
    def arm(updates: int, lr: str) -> Run:
        return rl(SFT, PROBLEMS, flags=f"--steps=45 --batch_size=48 --mini_batch={48 // updates} --max_groups=240 "
                                       f"--lr={lr} --eval_every=15")
    arms = {"one 3e-4": arm(1, "3e-4"), "one 1e-3": arm(1, "1e-3"),
            "sixteen 3e-5": arm(16, "3e-5"), "sixteen 1e-4": arm(16, "1e-4")}
    return Claim(
        "fig8", "3.6, Fig. 8",
        "One update per batch (on-policy, RL-0530) goes on improving where sixteen updates per batch saturate early "
        "(AIME24 80.1 against 68.2, with growing budgets).",
        {name: {"run": run, "test": evaluated(run)} for name, run in arms.items()},
        [Contrast("one update above sixteen at the same number of batches, each at its better learning rate",
                  "one 3e-4.test | one 1e-3.test", "sixteen 3e-5.test | sixteen 1e-4.test", "score"),
         Contrast("the same, maths", "one 3e-4.test | one 1e-3.test", "sixteen 3e-5.test | sixteen 1e-4.test", "maths"),
         Contrast("the same, code", "one 3e-4.test | one 1e-3.test", "sixteen 3e-5.test | sixteen 1e-4.test", "code")],
        differs="45 batches of 48 groups. Learning rates by the last held-out point on the validation problems.")


def mtp() -> Claim:
    arms = {f"{n} layers" if n != 1 else "1 layer": pretrained(flags=f"--model.n_mtp={n} --mtp_stage=None")
            for n in (0, 1, 2, 3)}
    copied = pretrained()
    measured = {name: {"run": run, "test": evaluated(run)} for name, run in arms.items()}
    accept = "--tasks=\"['mtp']\""
    measured["1 layer copied"] = {"mtp": evaluated(copied, flags=accept)}
    measured["3 layers"]["mtp"] = evaluated(arms["3 layers"], flags=accept)
    return Claim(
        "mtp", "2.2",
        "A single MTP layer is pre-trained (more bring no further improvement), then copied; acceptance of the first "
        "drafted token about 90%, of the third above 75%.",
        measured,
        [Contrast("one MTP layer improves the trunk: held-out loss, maths and code, nats", "1 layer.run",
                  "0 layers.run", "valid_loss", -1),
         Contrast("problems solved, one layer against none", "1 layer.test", "0 layers.test", "score"),
         Contrast("more layers bring no improvement: loss of three against one", "3 layers.run", "1 layer.run",
                  "valid_loss"),
         Contrast("acceptance of the third draft, copied against trained along", "1 layer copied.mtp", "3 layers.mtp",
                  "acceptance_3")],
        differs="1.3 M parameters, 2.2 M tokens.")


def three_stages() -> Claim:
    arms = {name: pretrained(config=f"paper/arms/{name}.py", world=WORLD) for name in ("three_stages", "one_mixture")}
    return Claim(
        "three_stages", "2.1",
        "Three stages (general text, then maths and code at 70%, then long context and synthetic reasoning) rather "
        "than one mixture. No number is given.",
        {name: {"run": run, "test": evaluated(run)} for name, run in arms.items()},
        [Contrast("problems solved by the base", "three_stages.test", "one_mixture.test", "score"),
         Contrast("maths", "three_stages.test", "one_mixture.test", "maths"),
         Contrast("code", "three_stages.test", "one_mixture.test", "code"),
         Contrast("held-out loss, maths and code, nats", "three_stages.run", "one_mixture.run", "valid_loss", -1)],
        differs="2.2 M tokens; both arms see every source equally often, with the same learning rates and contexts.")


def synth_epochs() -> Claim:
    """One, ten and fifty readings of 200,000, 20,000 and 4,000 tokens of synthetic reasoning."""
    worlds = {n: Run("world", f"{WORLD.command} --synth={3000 // n}") for n in (1, 10, 50)}
    arms = {n: pretrained(world, "paper/arms/synth.py") for n, world in worlds.items()}
    return Claim(
        "synth_epochs", "2.1",
        "Synthetic reasoning data can be read for very many epochs without overfitting to it.",
        {f"{n} epochs": {"run": run, "test": evaluated(run, world=worlds[n])} for n, run in arms.items()},
        [Contrast("ten epochs solve no fewer problems than one", "10 epochs.test", "1 epochs.test", "score"),
         Contrast("fifty epochs against one", "50 epochs.test", "1 epochs.test", "score"),
         Contrast("held-out loss, maths and code, nats: fifty against one", "50 epochs.run", "1 epochs.run",
                  "valid_loss", -1)],
        differs="A third of stage 3 is synthetic, and the number of its tokens is the same in all arms.")


def pipeline() -> Claim:
    worlds = {name: Run("world", WORLD.command + flag) for name, flag in (
        ("whole", ""), ("no extraction", " --without=\"['extract']\""), ("no dedup", " --without=\"['dedup']\""),
        ("no tags", " --without=\"['rebalance']\""))}
    arms = {name: pretrained(world, flags="--mtp_stage=None") for name, world in worlds.items()}
    return Claim(
        "pipeline", "2.1",
        "Better extraction, global dedup and model tags raise the density of reasoning in the data.",
        {name: {"run": run, "test": evaluated(run, world=worlds[name])} for name, run in arms.items()},
        [Contrast("with extraction above without", "whole.test", "no extraction.test", "score"),
         Contrast("with dedup above without", "whole.test", "no dedup.test", "score"),
         Contrast("with tags above without", "whole.test", "no tags.test", "score")],
        differs="On the toy's crawl. Without tags the sources are still told apart, but nothing is weighted.")


def sft_scale() -> Claim:
    arms = {n: tuned(BASE, flags=f"--steps={80 * n}") for n in (1, 12)}
    return Claim(
        "sft_scale", "3.6, Table 6",
        "Twelve times the SFT samples give a better start (AIME24 58.7 to 68.3) that RL still improves.",
        {f"SFT x{n}": {"sft": evaluated(run), "rl": evaluated(rl(run, PROBLEMS))} for n, run in arms.items()},
        [Contrast("more SFT is better before RL", "SFT x12.sft", "SFT x1.sft", "score"),
         Contrast("RL still improves the longer SFT", "SFT x12.rl", "SFT x12.sft", "score"),
         Contrast("more SFT is better after RL", "SFT x12.rl", "SFT x1.rl", "score")],
        differs="The same 4,000 samples read 0.7 and 8.5 times, not other samples.")


def fig3() -> Claim:
    """pass@k at temperature 1 of the bases at the ends of stages 1, 2 and 3."""
    long = pretrained(flags="--mtp_stage=None --keep=99")
    at = {"stage 1": "/step_00000407", "stage 2": "/step_00000797", "stage 3": ""}
    return Claim(
        "fig3", "2.4, Fig. 3",
        "The stages raise the share of problems that a base model solves at least once in k answers; the lead grows "
        "with k.",
        {name: {"test": evaluated(long, step, flags="--samples=64 --temperature=1.0 --top_p=1.0")}
         for name, step in at.items()},
        [Contrast("pass@64, stage 3 above stage 1", "stage 3.test", "stage 1.test", "pass_64"),
         Contrast("pass@64, stage 3 above stage 2", "stage 3.test", "stage 2.test", "pass_64"),
         Contrast("the lead over stage 1 grows from k = 1 to 8", "stage 3.test", "stage 1.test", "pass_8_over_1"),
         Contrast("the lead over stage 1 grows from k = 8 to 64", "stage 3.test", "stage 1.test", "pass_64_over_8")],
        differs="The report compares models, not stages.")


def fig4() -> Claim:
    """Numbers to be repeated in stages 1 and 2, long books and probes in stage 3: then probes can be learned."""
    world = Run("world", WORLD.command + " --recall=6000 --books=300")
    base = pretrained(world, "paper/arms/recall.py", "--keep=99")
    plain = pretrained(flags="--mtp_stage=None")
    probes = "--tasks=\"['probes']\" --probe_count=40"
    return Claim(
        "fig4", "2.4, Fig. 4",
        "After stage 3 the base finds needles at every depth of its long context.",
        {"stage 2": {"test": evaluated(base, "/step_00000797", world, probes)},
         "stage 3": {"test": evaluated(base, "", world, probes)},
         "stage 3, without recall documents": {"test": evaluated(plain, flags=probes)}},
        [Contrast("needle at 512 tokens, right digits, after stage 3 against before", "stage 3.test", "stage 2.test",
                  "needle_digits"),
         Contrast("needle at 512 tokens, whole numbers", "stage 3.test", "stage 2.test", "needle"),
         Contrast("with recall documents against without, right digits", "stage 3.test",
                  "stage 3, without recall documents.test", "needle_digits")],
        differs="1,024 tokens instead of 32K. Probes are learned only with documents that say numbers twice; the demo "
                "has none.")


CLAIMS: list[Claim] = [table5(), eq1(), fig5(), easy_pool(), fig7(), fig8(), mtp(), three_stages(), synth_epochs(),
                       pipeline(), sft_scale(), fig3(), fig4()]
