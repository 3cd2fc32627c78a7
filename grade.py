"""
From a problem to a prompt, from a sample to a reward: what rl.py and eval.py share (report sections 3.2, 3.3.1, 3.5).

Rewards are rule-based accuracy alone: maths by reward.math_reward, code by running the tests in judge.py's sandbox and
weighing them by difficulty. No format reward, no length penalty. Grading is asynchronous: `submit` returns at once,
`poll` gives what is ready, so that decoding goes on while programs run (report 3.4.1 b).

    avg@n     mean of the pass rates over n samples a problem; reported with a bootstrap 95% interval over problems
    pass@k    1 - C(n-c, k) / C(n, k), the unbiased estimate from c correct of n (Chen et al., arXiv 2107.03374)
"""
import math
import random
import time
from concurrent.futures import Future, ThreadPoolExecutor

from data.problems import PLAIN, Problem, messages
from engine import Engine, Request
from judge import Judge
from reward import difficulty_reward, extract_program, math_reward


def prompt_ids(tokenizer, problem: Problem, chat: bool) -> list[int]:
    """The chat template for models that had SFT, the plain text form of the pre-training pages for base models."""
    if chat:
        return tokenizer.chat(messages(problem), add_generation_prompt=True)[0]
    return tokenizer.encode(PLAIN.format(question=problem.question))


def stop_ids(tokenizer, chat: bool) -> tuple[int, ...]:
    """
    Both end tokens count everywhere: a base model ends its document, a chat model its turn. A base model may also go
    on with the page's next problem: the first token of "Problem:" ends its answer, as stop words do in few-shot
    evaluation.
    """
    ends = tokenizer.eos_id, tokenizer.im_end_id
    return ends if chat else (*ends, tokenizer.encode(PLAIN)[0])


class Grader:
    """
    The judge adapter of rollout.RolloutThread: submit(key, task, sample), poll() -> [(key, reward, info)].
    problems[task.prompt] says how to grade; info = {"passed": all tests or right answer, "verdicts": per test, ...}.
    Code rewards follow `scheme`: "vanilla" (all or nothing), "strict" or "soft" (report 3.3.1).
    """
    def __init__(self, problems: list[Problem], tokenizer, judge: Judge, scheme: str = "soft"):
        self.problems, self.tokenizer, self.judge, self.scheme = problems, tokenizer, judge, scheme
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="maths")   # a hard expression must not hold up decoding
        self.maths: list[tuple[tuple, Future]] = []
        self.code: dict[tuple, Problem] = {}
        self.ready: list[tuple] = []

    def submit(self, key: tuple, task, sample) -> None:
        problem = self.problems[task.prompt]
        text = self.tokenizer.decode(sample.tokens, skip_control=True)
        if sample.finish == "length":            # no end token: a truncated answer is not an answer
            self.ready.append((key, 0.0, {"passed": False, "verdicts": ["truncated"]}))
        elif problem.kind == "maths":
            self.maths.append((key, self.pool.submit(math_reward, text, problem.answer)))
        elif (program := extract_program(text)) is None:
            self.ready.append((key, 0.0, {"passed": False, "verdicts": ["no program"]}))
        else:
            self.code[key] = problem
            self.judge.submit(key, program, list(problem.tests), problem.entry)

    def poll(self) -> list[tuple]:
        done, self.ready = self.ready, []
        for key, future in [m for m in self.maths if m[1].done()]:
            right = future.result()              # a grader that raises ends the run: never silently 0
            done.append((key, right, {"passed": right == 1.0, "verdicts": ["right" if right == 1.0 else "wrong"]}))
        self.maths = [m for m in self.maths if not m[1].done() or m[0] not in {d[0] for d in done}]
        for key, verdicts in self.judge.poll():
            problem = self.code.pop(key)
            passed = [v.status == "AC" for v in verdicts]
            reward = difficulty_reward(passed, [t.level for t in problem.tests], self.scheme)
            info = {"passed": all(passed), "verdicts": [v.status for v in verdicts]}
            done.append((key, reward, info))
        return done

    def waiting(self) -> int:
        return len(self.maths) + len(self.code) + len(self.ready)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def pass_at_k(n: int, c: int, k: int) -> float:
    """By hand: n = 4, c = 1, k = 2: 1 - C(3,2)/C(4,2) = 1 - 3/6 = 0.5."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap(values: list[float], draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean with a percentile 95% interval; resamples problems, not samples. -> (mean, low, high)."""
    import numpy as np
    x = np.asarray(values, dtype=np.float64)
    picks = np.random.Generator(np.random.PCG64(seed)).integers(0, len(x), (draws, len(x)))
    low, high = np.quantile(x[picks].mean(1), [0.025, 0.975])
    return float(x.mean()), float(low), float(high)


def solve(engine: Engine, tokenizer, judge: Judge, problems: list[Problem], *, chat: bool, n: int, max_tokens: int,
          temperature: float = 0.6, top_p: float = 0.95, seed: int = 0) -> list[list[dict]]:
    """
    n samples of every problem, graded. -> per problem, per sample {"passed", "verdicts", "text", "tokens", "finish"}.
    The seed of a sample depends on (seed, problem, number) only, so any subset of problems gives the same samples.
    """
    class Task:                                  # what Grader reads of rollout.Task
        def __init__(self, prompt): self.prompt = prompt
    grader = Grader(problems, tokenizer, judge, "vanilla")
    requests = []
    for i, problem in enumerate(problems):
        ids = prompt_ids(tokenizer, problem, chat)
        rng = random.Random(f"{seed} {problem.id}")
        requests += [Request((i, j), ids, max_tokens, temperature=temperature, top_p=top_p,
                             stop=stop_ids(tokenizer, chat), seed=rng.getrandbits(62)) for j in range(n)]
    for request in requests:
        engine.add(request)
    samples, graded = [], {}
    while len(graded) < len(requests):           # programs run while other answers are still being written
        if finished := engine.step():
            samples += finished
            for s in finished:
                grader.submit(s.id, Task(s.id[0]), s)
        graded |= {key: info for key, _, info in grader.poll()}
        if len(samples) == len(requests):
            time.sleep(0.005)                    # nothing left to decode: leave the core to the judge's workers
    grader.close()
    found = [[{}] * n for _ in problems]
    for s in samples:
        found[s.id[0]][s.id[1]] = graded[s.id] | {"text": tokenizer.decode(s.tokens, skip_control=True),
                                                  "tokens": len(s.tokens), "finish": s.finish}
    return found


def summary(found: list[list[dict]], ks: tuple[int, ...] = (1, 4, 8, 16)) -> dict[str, float]:
    """avg@n with its interval, pass@k, mean length and truncated share of what `solve` found."""
    rates = [sum(s["passed"] for s in row) / len(row) for row in found]
    n = len(found[0])
    avg, low, high = bootstrap(rates)
    every = [s for row in found for s in row]
    return {"avg": avg, "low": low, "high": high, "n": len(found), "samples": n,
            **{f"pass@{k}": sum(pass_at_k(n, sum(s["passed"] for s in row), k) for row in found) / len(found)
               for k in ks if k <= n},
            "tokens": sum(s["tokens"] for s in every) / len(every),
            "truncated": sum(s["finish"] == "length" for s in every) / len(every)}


def answer_rows(problems: list[Problem], found: list[list[dict]]) -> list[dict]:
    """Every answer with its verdicts, an object a problem, for reading and for difficulty estimation (rl_data.py)."""
    return [{"id": problem.id, "question": problem.question, "answers": row}
            for problem, row in zip(problems, found, strict=True)]
