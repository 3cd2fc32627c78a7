"""
RL on problems like the public ones: the filters of report section 3.2, the levels of the tests and three iterations of
rl.py with a policy that follows a script. Right, wrong and hostile answers come in known shares, so every reward, every
level and every dropped problem is known beforehand.
"""
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from real_like import answer, code_set, maths_set

import checkpoint
import distributed
import mtp
import rl
from configurator import UserError, load
from data import rl_problems
from data.filters import check_references, copies, reference_fault
from data.jsonl import write_jsonl
from data.problems import Problem, Test, identity, messages, read_problems, write_problems
from model import ModelConfig
from reward import difficulty_reward, nothing_learned
from tokenizer import Tokenizer

TINY = Tokenizer.load("tiny")
SHAPE = ModelConfig(vocab_size=1024, n_layer=1, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=32,
                    max_seq_len=512)
LEVELS = [0, 0, 1, 1, 2, 2]
# what the four answers to a problem are, by its number modulo 5
MATHS = (["right"] * 4, ["right", "wrong", "hostile", "right"], ["wrong", "hostile", "hostile", "cut"],
         ["hostile", "right", "cut", "wrong"], ["wrong", "wrong", "wrong", "right"])
CODE = (["right"] * 4, ["right", "wrong", "hostile", "right"], ["wrong", "hostile", "hostile", "cut"],
        ["hostile", "right", "cut", "wrong"], ["part1", "part2", "right", "hostile"])


@pytest.fixture(scope="module")
def sets():
    return maths_set(1), code_set(2)


# ---- the filters ----------------------------------------------------------------------------------------------------

def reworded(question: str) -> str:
    """The same problem with two words replaced."""
    words = question.split()
    words[1], words[-2] = "certainly", "altogether"
    return " ".join(words)


def rows(problems, kinds_of) -> list[dict]:
    """Lines of an answers file: kinds_of(problem) -> kinds of its answers."""
    found = []
    for p in problems:
        answers = []
        for i, kind in enumerate(kinds_of(p)):
            _, deserved = answer(p, kind, i)
            passes = [deserved > level for level in LEVELS]
            verdicts = [["wrong", "right"][deserved]] if p.kind == "maths" else [["WA", "AC"][ok] for ok in passes]
            answers.append({"passed": deserved == (1 if p.kind == "maths" else 3), "verdicts": verdicts})
        found.append({"id": p.id, "answers": answers})
    return found


def test_filters_and_levels_are_the_expected_ones(sets, tmp_path, capsys):
    """5 held out, 4 copies, 2 bad references, 3 golden that fail, 6 + 2 unsolved, 10 + 5 too easy; 391 others stay."""
    maths, code = sets
    heldout = maths_set(7, 5)
    leaked = [replace(p, id=identity(p.id), question=reworded(p.question)) for p in heldout]
    again = [replace(p, id=identity(p.id), question=reworded(p.question)) for p in (*maths[:2], *code[:2])]
    bad = [replace(maths[20], answer=f"3 * 4 = <<3*4=12>>12\n#### {maths[20].answer}"), replace(maths[21], answer="{1")]
    broken = [replace(p, solution=answer(p, "part2", 0)[0]) for p in code[20:23]]
    unsolved = [*maths[30:36], *(replace(p, solution="") for p in code[30:32])]
    easy = [*maths[40:50], *code[40:45]]
    special = {p.id: p for p in (*bad, *broken, *unsolved)}
    problems = [special.get(p.id, p) for p in (*maths, *code)] + leaked + again
    lost, solved = {p.id for p in unsolved}, {p.id for p in easy}
    write_problems(tmp_path / "all.jsonl", problems)
    write_problems(tmp_path / "test.jsonl", heldout)
    base = lambda p: ["right", "wrong"] if p.kind == "maths" else ["right", "part1", "wrong", "part2"]
    sft = lambda p: (["right"] * 4 if p.id in solved else ["right", "wrong"] if p.kind == "maths"
                     else ["part1", "part2", "hostile", "right"])
    strong = lambda p: ["hostile", "wrong"] if p.id in lost else ["wrong", "right"]
    answered = [p for p in problems if p not in leaked and p not in again]
    for name, kinds in (("base", base), ("sft", sft), ("strong", strong)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows([replace(p, answer="1") if p in bad else p if p.solution else
                                                      replace(p, solution=code[0].solution) for p in answered], kinds))
    words = [f"--problems={tmp_path}/all.jsonl", f"--out={tmp_path}/rl.jsonl", f"--heldout={tmp_path}/test.jsonl",
             "--dedup", "--golden"]
    files = [f"--answers=['{tmp_path}/base.jsonl', '{tmp_path}/sft.jsonl']", f"--strong={tmp_path}/strong.jsonl"]
    rl_problems.main(load(rl_problems.Config, words + files))
    found = json.loads((tmp_path / "rl_filters.json").read_text())
    assert found["dropped"] == {"held out": {"maths": 5}, "copy": {"maths": 2, "code": 2}, "reference": {"maths": 2},
                                "golden": {"code": 3}, "unsolved": {"maths": 6, "code": 2},
                                "too easy": {"maths": 10, "code": 5}}
    for reason, gone in (("held out", leaked), ("copy", again), ("reference", bad), ("golden", broken),
                         ("unsolved", unsolved), ("too easy", easy)):
        assert sorted(found["ids"][reason]) == sorted(p.id for p in gone), reason
    kept = read_problems(tmp_path / "rl.jsonl")
    assert len(kept) == found["kept"] == 400 - 28 and found["read"] == 409
    assert all([t.difficulty for t in p.tests] == LEVELS for p in kept if p.kind == "code")
    out, err = capsys.readouterr()
    assert "golden: 3 code" in out and "all.jsonl:21: problem" in err and "####" in err
    rl_problems.main(load(rl_problems.Config, [*words, *files, "--rules_only"]))
    assert len(read_problems(tmp_path / "rl.jsonl")) == 400 - 5


def test_copies_have_the_same_numbers():
    """Two words replaced: a copy. Another number: another problem, unless it shares 16 words of a held-out one."""
    a = "Ada packs 24 boxes for the market and puts 12 pens into each of them. How many pens are there?"
    b, c = a.replace("24", "25"), a.replace("packs", "fills").replace("market", "fair")
    page = f"An exercise from the book of last year, word for word: {a} Think before you write anything down."
    assert copies([a, b, c, a]) == ["", "", "copy", "copy"]
    assert copies([c, b, page, "What is 1 + 1?"], [a]) == ["held out", "held out", "held out", ""]
    words = "Describe the colour of the sky over the harbour at noon in a few short words of your own"
    assert copies([words, words + " please", "Sing."], []) == ["", "copy", ""]


def test_references_that_nobody_can_match_are_named(tmp_path, capsys):
    maths = [Problem(f"{i:02x}", "maths", f"q{i}", answer=str(i)) for i in range(100)]
    bad = [*(replace(maths[0], answer=a) for a in ("steps\n#### 5", "{x", "}{\\frac", "x" * 3000)),
           Problem("ff", "code", "q", tests=(Test("stdio", "", "1\n" * 600_000),))]
    assert all(map(reference_fault, bad))
    assert not any(map(reference_fault, [*maths[:5], *(replace(maths[0], answer=a) for a in (
        "\\frac{1}{2}", "x^2+1", "\\text{even}", "(1, 2)", "[0, \\infty)", "5 \\text{ cm}", "28\\%", "x" * 300))]))
    write_problems(tmp_path / "p.jsonl", [*maths[1:5], bad[0]])
    with pytest.raises(UserError, match=r"1 of 5 problems .* more than 5%. .*p.jsonl:5: problem 00: .*GSM8K"):
        check_references(tmp_path / "p.jsonl", [bad[0], *maths[1:5]])
    check_references(tmp_path / "p.jsonl", [bad[0], *maths[1:]])
    assert "1 of 100 problems can never be answered right" in capsys.readouterr().err


# ---- rl.py ----------------------------------------------------------------------------------------------------------

class ScriptedEngine:
    """In place of engine.Engine: the answers of the script, eight to a step."""
    scripts: dict = {}                                      # prompt -> (problem, kinds of the four answers)
    deserved: dict = {}                                     # request id -> reward

    def __init__(self, model, slots, **_):
        self.slots, self.queue = slots, []

    active = property(lambda self: min(len(self.queue), self.slots))
    waiting = property(lambda self: len(self.queue) - self.active)
    room = property(lambda self: max(0, self.slots - len(self.queue)))

    def add(self, request):
        self.queue.append(request)

    def step(self):
        done, self.queue = self.queue[:8], self.queue[8:]
        return [self.finished(request) for request in done]

    def finished(self, request):
        problem, kinds = self.scripts[tuple(request.prompt)]
        kind = kinds[request.id[2]]
        text, deserved = answer(problem, "right" if kind == "cut" else kind, request.id[2])
        if problem.kind == "code":
            deserved = difficulty_reward([deserved > level for level in LEVELS], LEVELS, "soft")
        self.deserved[request.id] = 0.0 if kind == "cut" else deserved
        tokens = TINY.encode(text) + ([] if kind == "cut" else [TINY.im_end_id])
        return SimpleNamespace(id=request.id, prompt=request.prompt, tokens=tokens, logprobs=[-1.0] * len(tokens),
                               finish="length" if kind == "cut" else "stop", verified=(), accepted=())

    def abort(self, key):
        self.queue = [request for request in self.queue if request.id != key]

    def load(self, weights):
        pass


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """rl.main on these problems with a ScriptedEngine -> (rows of metrics.jsonl, the trained batches)."""
    model = checkpoint.materialise(mtp.build(SHAPE, "meta"), distributed.setup(device="cpu"), seed=0)
    checkpoint.save(tmp_path / "sft", 1, model, tokenizer=TINY, config={}, meta={"stage": "sft", "chat": True},
                    state={"step": 1})
    rng, batches, update = torch.get_rng_state(), [], rl.update
    monkeypatch.setattr(rl, "Engine", ScriptedEngine)
    monkeypatch.setattr(rl, "update", lambda *a: batches.append(a[2].groups) or update(*a))
    monkeypatch.setattr(ScriptedEngine, "deserved", {})

    def run(problems, kinds_of, *words):
        scripts = {tuple(TINY.chat(messages(p), add_generation_prompt=True)[0]): (p, kinds_of(k, p))
                   for k, p in enumerate(problems)}
        monkeypatch.setattr(ScriptedEngine, "scripts", scripts)
        write_problems(tmp_path / "rl.jsonl", problems)
        rl.main(load(rl.Config, [f"--init={tmp_path}/sft", f"--out={tmp_path}/rl", f"--problems={tmp_path}/rl.jsonl",
                                 "--valid=", "--batch_size=16", "--mini_batch=16", "--group_size=4", "--max_groups=64",
                                 "--easy_alpha=0", "--max_new_tokens=[(0,160)]", "--slots=32", "--device=cpu", *words]))
        return [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").open()], batches
    yield run
    torch.set_rng_state(rng)


def test_three_iterations_pay_what_every_answer_deserves(sets, scripted, capsys):
    maths, code = sets
    code = [replace(p, tests=tuple(replace(t, difficulty=level) for t, level in zip(p.tests, LEVELS, strict=True)))
            for p in code]
    problems = [*maths, *code]
    random.Random(0).shuffle(problems)
    kinds_of = lambda k, p: (MATHS if p.kind == "maths" else CODE)[k % 5]
    metrics, batches = scripted(problems, kinds_of, "--steps=3")
    deserved, solved = ScriptedEngine.deserved, set()
    assert len(metrics) == len(batches) == 3
    for step, (row, groups) in enumerate(zip(metrics, batches, strict=True)):
        assert row["updates"] == 1 and row["groups_used"] == len(groups) == 16
        for g in groups:
            assert g.rewards == pytest.approx([deserved[g.task.key(i)] for i in range(4)]), problems[g.task.prompt]
            assert g.task.prompt % 5 in (1, 3, 4), "a group whose rewards are all equal was trained on"
        last = max(g.task.index for g in groups)
        launched = [[deserved[step, index, i] for i in range(4)] for index in range(last + 1)]
        share = lambda test, launched=launched: sum(map(test, launched)) / len(launched)
        assert row["all0"] == share(lambda rewards: max(rewards) == 0) > 0
        assert row["all1"] == share(lambda rewards: min(rewards) == 1) > 0
        assert row["valid"] == share(lambda rewards: max(rewards) > min(rewards))
        assert row["reward_launched"] == pytest.approx(sum(map(sum, launched)) / (4 * len(launched)))
        assert row["pass_rate"] == sum(rewards.count(1) for rewards in launched) / (4 * len(launched))
        solved |= {(step, index) for index, rewards in enumerate(launched) if min(rewards) == 1}
        assert row["pool_size"] == len(solved)              # no problem is met twice in 400
    assert "nothing was learned" not in capsys.readouterr().out


def test_a_run_that_learns_nothing_says_so(sets, scripted, capsys):
    problems = sets[0][:40]
    (row,), _ = scripted(problems, lambda k, p: ["wrong", "hostile", "wrong", "cut"], "--steps=1", "--max_groups=16")
    assert row["updates"] == 0 and row["all0"] == 1.0
    assert "nothing was learned in iteration 1 (all 0: 100%" in capsys.readouterr().out


def test_what_to_check_when_nothing_is_learned():
    row = {"step": 4, "updates": 0, "all0": 1.0, "all1": 0.0, "verdicts": {}}
    assert "max_new_tokens" in nothing_learned(row) and nothing_learned(row | {"updates": 1}) == ""
    assert "harder" in nothing_learned(row | {"all0": 0.0, "all1": 1.0})
    assert "group_size" in nothing_learned(row | {"all0": 0.5, "all1": 0.5})


def test_rl_refuses_references_that_nobody_can_match(sets, scripted):
    whole_column = [replace(p, answer=f"{p.reasoning} = {p.answer}\n#### {p.answer}") for p in sets[0][:40]]
    with pytest.raises(UserError, match="40 of 40 problems can never be answered right.*GSM8K's whole column"):
        scripted(whole_column, lambda k, p: MATHS[0], "--steps=1")
