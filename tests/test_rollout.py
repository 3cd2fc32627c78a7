"""
The rollout engine: what is launched, when a step stops, what is trained on, and that no judge changes it.

The engine is fake, and on purpose NOT batch-invariant: an answer depends on which other answers were in the batch at
every step, as it does in floating point. So equal answers mean that the batches of all decode steps were equal.
"""
import json
import pickle
import random
import threading
import time
from dataclasses import dataclass

import pytest

from paper.table2 import Ablation
from rollout import RemoteSample, RolloutThread, Scheduler, Task, hash64


def scheduler(*args, rate=0.5, **flags):
    """A scheduler whose last step had this share of valid groups."""
    sched = Scheduler(*args, **flags)
    sched.rate = rate
    return sched


def no_pool(*args, rate=0.5, **flags):
    """The same without an easy pool: what a test computes by hand does not lose prompts to it."""
    return Ablation(*args, rate=rate, **flags)


def missing(sched):
    """Rewards that are due and not observed."""
    return [g.task.key(i) for g in sched.due() for i, r in enumerate(g.rewards) if r is None]


@dataclass
class Answer:
    id: tuple
    tokens: range
    finish: str
    luck: int  # what the "model" said: depends on the seed, the prompt and, if wanted, on the neighbours
    prompt: tuple = ()


class FakeEngine:
    """`slots` slots, one token a step each; length(prompt, seed) in tokens. Not invariant: neighbours count."""

    memory = 10**9  # answers that the KV cache holds

    def __init__(self, slots, length, invariant=True):
        self.slots, self.length, self.invariant = slots, length, invariant
        self.queue, self.running, self.log, self.steps, self.weights = [], {}, [], 0, None
        self.longest_queue = 0  # samples that would not start at the next step

    active = property(lambda self: len(self.running))
    waiting = property(lambda self: len(self.queue))
    room = property(lambda self: max(0, min(self.slots, self.memory) - self.active - self.waiting))

    def add(self, request):
        self.queue.append(request)
        self.longest_queue = max(self.longest_queue, len(self.queue) + len(self.running) - self.slots)
        self.log.append((self.steps, "add", request))

    def step(self):
        self.steps += 1
        while self.queue and len(self.running) < self.slots:
            key, prompt, seed = self.queue.pop(0)
            self.running[key] = [0, self.length(prompt, seed), hash64(prompt, seed, self.weights)]
        together = hash64(*sorted(self.running)) if not self.invariant else 0
        done = []
        for key, sample in list(self.running.items()):
            sample[0] += 1
            sample[2] = hash64(sample[2], together)
            if sample[0] == sample[1]:
                done.append(Answer(key, range(sample[0]), "stop", sample[2]))
                del self.running[key]
        return done

    def abort(self, key):
        self.log.append((self.steps, "abort", key))
        self.queue = [r for r in self.queue if r[0] != key]
        if key in self.running:
            made, _, luck = self.running.pop(key)
            return Answer(key, range(made), "abort", luck)
        return None

    def load(self, weights):
        self.weights = weights
        self.log.append((self.steps, "load", weights))


def request(task, i, seed):
    return (task.key(i), task.prompt, seed)


def grade(task, sample):
    """A third of the prompts is always solved, a third never, the rest now and then."""
    return (1.0, 0.0, float(sample.luck % 2))[task.prompt % 3]


class ShuffledJudge:
    """Keeps verdicts for a random number of polls, then answers in random order, at most `workers` a poll."""

    def __init__(self, seed, workers=10**9, patience=0.7):
        self.random, self.workers, self.patience, self.inbox = random.Random(seed), workers, patience, []

    def submit(self, key, task, sample):
        self.inbox.append((key, grade(task, sample), f"graded {key}"))

    def poll(self):
        if self.random.random() < self.patience:
            return []
        self.random.shuffle(self.inbox)
        n = min(self.workers, self.random.randint(0, len(self.inbox)))
        out, self.inbox = self.inbox[:n], self.inbox[n:]
        return out


class ThreadedJudge:
    """A real pool: `workers` threads that sleep for a random while. Its timing is the machine's, not ours."""

    def __init__(self, workers, seed):
        self.todo, self.done, self.lock, self.random = [], [], threading.Condition(), random.Random(seed)
        self.open = True
        for _ in range(workers):
            threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        while True:
            with self.lock:
                while self.open and not self.todo:
                    self.lock.wait()
                if not self.open:
                    return
                key, task, sample = self.todo.pop(self.random.randrange(len(self.todo)))
                nap = self.random.random() * 0.001
            time.sleep(nap)
            with self.lock:
                self.done.append((key, grade(task, sample), f"graded {key}"))

    def submit(self, key, task, sample):
        with self.lock:
            self.todo.append((key, task, sample))
            self.lock.notify()

    def poll(self):
        with self.lock:
            out, self.done = self.done, []
            return out

    def close(self):
        with self.lock:
            self.open = False
            self.lock.notify_all()


def lengths(prompt, seed):
    return 1 + hash64("length", prompt, seed) % 40


def train(judge, steps=6, engine=None, state=None, **flags):
    """`steps` RL steps through the thread. -> (everything that must be equal, engine log)."""
    sched = Scheduler(**{"n_prompts": 60, "batch": 6, "G": 4, "seed": 5, "reward_lag": 8, **flags})
    if state is not None:
        sched.load_state_dict(state)
    engine = engine or FakeEngine(20, lengths, invariant=False)
    rollout, out = RolloutThread(sched, engine, judge, request), []
    for _ in range(steps):
        batch = rollout.take()
        what = [(g.task, g.rewards, g.infos, [(s.id, len(s.tokens), s.luck) for s in g.samples])
                for g in batch.groups]
        out.append((what, batch.metrics, batch.state, batch.version, batch.note))
        rollout.publish(("weights", batch.version + 1))
    rollout.close()
    return out, engine.log


def play(sched, length, reward, free=None, give_up=10**6):
    """One step without a thread: length(task, i) steps, reward(task, i), no delay. -> (groups, metrics)."""
    running, clock = {}, 0
    while True:
        if late := missing(sched):
            sched.observe([(k, reward(sched.groups[k[1]].task, k[2]), None) for k in late])
        for task in sched.launch(free):
            running |= {task.key(i): clock + length(task, i) for i in range(sched.G)}
        if sched.selected is not None:
            return sched.batch()
        clock += 1
        assert clock < give_up
        ended = [k for k, end in running.items() if end == clock]
        answer = lambda k: Answer(k, range(length(sched.groups[k[1]].task, k[2])), "stop", 0)
        sched.advance([(k, answer(k)) for k in ended], len(running))
        for k in ended:
            del running[k]
            if sched.reward_lag is None:
                sched.observe([(k, reward(sched.groups[k[1]].task, k[2]), None)])


# ---- reproducibility ------------------------------------------------------------------------------------------------


def test_no_judge_latency_and_no_worker_count_changes_anything():
    """Launched tasks and their moment, aborts, rewards, batches, metrics, pool, cursor: all equal, to the bit."""
    want = train(ShuffledJudge(0, patience=0.0))
    assert any(entry[1] == "abort" for entry in want[1]), "the scenario should abort something"
    assert want[0][-1][2]["pool"], "and fill the pool"
    for seed in range(1, 7):
        got = train(ShuffledJudge(seed, workers=1 + seed % 3, patience=seed / 7))
        assert got == want
    for workers in (1, 8):
        judge = ThreadedJudge(workers, seed=workers)
        assert train(judge) == want
        judge.close()


def test_rewards_as_they_come_change_no_batch_if_the_engine_is_batch_invariant():
    """reward_lag = None: the second rule alone keeps batches, pool, cursor and rate; only waste may differ."""
    keep = lambda out: [(groups, state) for groups, _, state, _, _ in out]
    runs = [train(ShuffledJudge(s, 1 + s, s / 6), reward_lag=lag, engine=FakeEngine(slots, lengths))[0]
            for s, lag, slots in ((0, None, 20), (3, None, 20), (5, None, 7), (1, 8, 20), (2, 0, 100))]
    assert all(keep(run) == keep(runs[0]) for run in runs)
    assert len({run[2][1]["groups_launched"] for run in runs}) > 1, "the runs should speculate differently"


def test_resume_is_bit_exact():
    """Six steps = three, JSON, new objects, three more; and the pool was not empty."""
    whole, _ = train(ShuffledJudge(0))
    state = json.loads(json.dumps(whole[2][2]))
    assert state["pool"] and state["cursor"] != [0, 0]
    engine = FakeEngine(20, lengths, invariant=False)
    engine.weights = ("weights", 3)
    rest, _ = train(ShuffledJudge(9), steps=3, engine=engine, state=state)
    for a, b in zip(whole[3:], rest, strict=True):
        assert a == b


def test_metrics_count_every_launched_answer():
    """All answers cut: nothing is trained on, and the log still says why."""
    sched = Scheduler(9, 1, 2, max_groups=1, reward_lag=0)
    sched.launch()
    keys = [(0, 0, i) for i in range(2)]
    sched.advance([(k, Answer(k, range(3 + i), ("length", "stop")[i], 0)) for i, k in enumerate(keys)], 2)
    sched.observe([(k, 0.0, {"passed": False, "verdicts": [("truncated", "no box")[i]]}) for i, k in enumerate(keys)])
    sched.launch()
    groups, m = sched.batch()
    assert groups == [] and m["verdicts"] == {"truncated": 1, "no box": 1}
    assert (m["truncated"], m["unparsable"], m["length_mean"], m["pass_rate"]) == (0.5, 0.5, 3.5, 0.0)


def test_a_checkpoint_knows_its_problems():
    """Other problems of the same number are refused; a checkpoint from before fingerprints loads."""
    state = Scheduler(10, 2, 2, problems="aa").state_dict()
    Scheduler(10, 2, 2, problems="aa").load_state_dict(state)
    with pytest.raises(ValueError, match="not the 10 problems"):
        Scheduler(10, 2, 2, problems="bb").load_state_dict(state)
    Scheduler(10, 2, 2, problems="bb").load_state_dict({k: v for k, v in state.items() if k != "problems"})


def test_state_only_between_steps_and_only_for_the_same_problems():
    sched = Scheduler(10, 2, 2)
    state = sched.state_dict()
    sched.launch()
    with pytest.raises(RuntimeError, match="in flight"):
        sched.state_dict()
    with pytest.raises(ValueError, match="n_prompts = 11, but the checkpoint has 10"):
        Scheduler(11, 2, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="seed"):
        Scheduler(10, 2, 2, seed=1).load_state_dict(state)


def test_sample_seeds_differ_and_depend_on_the_name_alone():
    """Two runs with other prompts, batches, group sizes and slots give a sample of the same name the same seed."""
    def seeds(sched, slots):
        found = {}
        def ask(task, i, seed):
            found[task.key(i)] = seed
            return request(task, i, seed)
        rollout = RolloutThread(sched, FakeEngine(slots, lengths), ShuffledJudge(0, patience=0), ask)
        for _ in range(5):
            rollout.take()
            rollout.publish("v")
        rollout.close()
        return found
    a, b = seeds(Scheduler(60, 8, 4, seed=1), 12), seeds(Scheduler(99, 9, 8, seed=1), 30)
    assert len(a) > 150 and len(set(a.values())) == len(a) and all(0 <= seed < 2**63 for seed in a.values())
    both = a.keys() & b.keys()
    assert len(both) > 100 and all(a[key] == b[key] for key in both)
    other = seeds(Scheduler(60, 8, 4, seed=2), 12)
    assert all(a[key] != other[key] for key in a.keys() & other.keys())


# ---- several ranks --------------------------------------------------------------------------------------------------


class Together:
    """Exchanges of `world` threads in one process; like processes, they share no object."""

    def __init__(self, world, steps):
        self.world, self.steps, self.parts = world, steps, [None] * world
        self.barrier = threading.Barrier(world, timeout=10)

    def of(self, rank):
        return OfRank(self, rank)


class OfRank:
    def __init__(self, all, rank):
        self.all, self.rank, self.world, self.steps = all, rank, all.world, all.steps

    def __call__(self, state):
        self.all.parts[self.rank] = pickle.dumps(state)
        self.all.barrier.wait()
        shared = [pickle.loads(part) for part in self.all.parts]
        self.all.barrier.wait()
        return shared


def ranks(world, rounds, judge, invariant=True, **flags):
    """Rollout threads of `world` ranks, 20 slots in all. judge(rank). -> (engines, threads)."""
    together = Together(world, rounds)
    engines = [FakeEngine(20 // world, lengths, invariant) for _ in range(world)]
    flags = {"n_prompts": 60, "batch": 6, "G": 4, "seed": 5, "reward_lag": 8, **flags}
    return engines, [RolloutThread(Scheduler(**flags), engine, judge(r), request, exchange=together.of(r))
                     for r, engine in enumerate(engines)]


def train_ranks(world, rounds, judge, steps=6, **how):
    """-> (what every rank must see alike: tasks, rewards, infos, lengths, state, metrics, note), engines)."""
    engines, threads = ranks(world, rounds, judge, **how)
    out, luck = [[] for _ in threads], {}
    for step in range(steps):
        for rank, thread in enumerate(threads):
            batch = thread.take()
            out[rank].append(([(g.task, g.rewards, g.infos, [(len(s.tokens), s.finish) for s in g.samples])
                               for g in batch.groups], batch.state, batch.metrics, batch.note))
            for g in batch.groups:
                assert all(isinstance(s, RemoteSample) == (g.rank != rank) for s in g.samples)
                luck |= {s.id: s.luck for s in g.samples if g.rank == rank}
        for thread in threads:
            thread.publish(("weights", step + 1))
    close_all(threads)
    assert all(seen == out[0] for seen in out), "the ranks disagree"
    return out[0], luck, engines


def close_all(threads):
    """As processes do: each closes its own, at about the same time."""
    closing = [threading.Thread(target=t.close) for t in threads]
    for t in closing:
        t.start()
    for t in closing:
        t.join()
    assert not any(t.thread.is_alive() for t in threads)


@pytest.mark.parametrize("max_groups", [None, 8])
def test_any_number_of_ranks_makes_the_same_batches(max_groups):
    """
    One launch order: tasks, rewards, answers, pool, cursor and pass rate are those of one rank, though the ranks make
    different numbers of decode steps. 3 and 4 divide neither the batch nor the cap; under a cap of 8 some are short.
    """
    keep = lambda out: [(groups, state, note) for groups, state, _, note in out]
    want, luck, _ = train_ranks(1, 1, lambda r: ShuffledJudge(0, patience=0.0), max_groups=max_groups)
    assert want[-1][1]["pool"] and any(note for *_, note in want) == (max_groups == 8)
    for world, rounds in ((2, 1), (2, 8), (3, 8), (4, 5)):
        got, same, engines = train_ranks(world, rounds, lambda r: ShuffledJudge(r, 1 + r, r / 5), max_groups=max_groups)
        assert keep(got) == keep(want) and same == luck
        assert rounds == 1 or len({e.steps for e in engines}) > 1
        assert all(m["tokens"] >= sum(n for g in groups for n, _ in g[3]) for groups, _, m, _ in got)


@pytest.mark.parametrize("lag", [8, 0])
def test_no_ranks_judge_changes_anything(lag):
    """Answers depend on their neighbours, so each rank's every decode step is the same for slow and fast judges."""
    runs = []
    for seed in range(3):
        out, luck, _ = train_ranks(2, 8, lambda r, seed=seed: ShuffledJudge(seed + r, patience=(seed + r) / 4),
                                   invariant=False, reward_lag=lag)
        runs.append((out, luck))
    assert runs[0] == runs[1] == runs[2]


def test_rewards_as_they_come_are_the_same_news_on_every_rank():
    train_ranks(3, 4, lambda r: ShuffledJudge(r, patience=r / 3), reward_lag=None)


def test_a_launch_goes_to_the_rank_with_the_most_room():
    """
    By hand: two ranks of two slots, three groups of two. Launches 0 and 1 fill both; launch 0 takes 60 steps, launch 1
    takes 3, then rank 1 waits for the end of the round of 8; launch 2 joins it and takes 10. The eighth round ends
    after 4 steps, when rank 0 has nothing left: 60 in all. Busy 2 * (60 + 3 + 10) of 4 * 60 slot-steps.
    """
    together, threads = Together(2, 8), []
    for r in range(2):
        sched = no_pool(9, 3, 2, rate=1.0, reward_lag=0)
        order = sorted(range(9), key=lambda i: hash64(0, "epoch", 0, i))[:3]
        length = lambda prompt, seed, order=order: dict(zip(order, (60, 3, 10), strict=True))[prompt]
        judge = ShuffledJudge(0, patience=0)
        judge.submit = lambda key, task, s, judge=judge: judge.inbox.append((key, float(key[2]), None))
        threads.append(RolloutThread(sched, FakeEngine(2, length), judge, request, exchange=together.of(r)))
    for thread in threads:
        batch = thread.take()
        assert [g.rank for g in batch.groups] == [0, 1, 1]
        assert batch.metrics["engine_steps"] == 60
        assert batch.metrics["slot_idle"] == pytest.approx(1 - 2 * 73 / (4 * 60))
    assert threads[0].engine.steps == 60 and threads[1].engine.steps == 13
    close_all(threads)


@pytest.mark.parametrize("where", ["step", "add", "load", "submit", "poll", "reward"])
def test_what_one_rank_raises_all_raise(where):
    """In the middle of a round, between two, in the wait for rewards: nobody is left waiting, all name rank 1."""
    engines, threads = ranks(3, 8, lambda r: ShuffledJudge(r, patience=0.5))
    fail_at = engines[1] if where in ("step", "add", "load") else threads[1].grader
    for thread in threads:
        thread.take()
    if where == "reward":
        fail_at.submit = lambda key, task, sample: fail_at.inbox.append((key, float("nan"), None))
    else:
        setattr(fail_at, where, fail)
    for thread in threads:
        thread.publish("v1")
    message = "should be a finite number" if where == "reward" else "rank 1 failed: ZeroDivisionError"
    for thread in threads:
        with pytest.raises(RuntimeError, match=message):
            thread.take()
    for thread in threads:
        thread.close(timeout=1)
        assert not thread.thread.is_alive()


def test_memory_decides_where_a_group_goes():
    """
    By hand: rank 0 has 8 slots and memory for 2 answers, rank 1 for 8; groups of 2. Room 2 + 8 starts five groups: rank
    1 leads with 8, 6, 4, and at 2 : 2 the first rank wins, then rank 1 again.
    """
    together, threads = Together(2, 4), []
    for r in range(2):
        engine = FakeEngine(8, lambda prompt, seed: 5)
        engine.memory = (2, 8)[r]
        sched = no_pool(30, 5, 2, rate=1.0, reward_lag=0)
        judge = ShuffledJudge(0, patience=0)
        judge.submit = lambda key, task, s, judge=judge: judge.inbox.append((key, float(key[2]), None))
        threads.append(RolloutThread(sched, engine, judge, request, exchange=together.of(r)))
    for thread in threads:
        assert [g.rank for g in thread.take().groups] == [1, 1, 1, 0, 1]
    close_all(threads)


class LateJudge:
    """Keeps the reward of the first answer until the engine has made `until` steps; the others come at once."""

    def __init__(self, until):
        self.until, self.inbox, self.held, self.engine = until, [], None, None

    def submit(self, key, task, sample):
        self.inbox.append((key, float(key[2]), None))

    def poll(self):
        if self.held is None and self.inbox:
            self.held = self.inbox.pop(0)
        out, self.inbox = self.inbox, []
        if self.held and self.engine.steps >= self.until:
            out, self.held = [*out, self.held], ()
        return out


def test_a_late_reward_stops_no_engine_while_nothing_depends_on_it():
    """
    By hand: 4 slots, groups of 2, batch 3, lag 2; launch 0 takes 5 steps, its reward is due at 7; launch 1 takes 30,
    launch 2 runs from 5 to 35. At 7 no slot is free and three valid groups are far, so nothing can be decided: the
    engine decodes on, and a reward that comes at step 20 changes nothing. One that would come at step 60 holds it up at
    30, where slots are free and launch 3 may be wanted (here for ever, so that the judge is given up).
    """
    def run(until):
        judge, sched = LateJudge(until), no_pool(9, 3, 2, rate=1.0, reward_lag=2)
        sched.blocked = lambda free: Scheduler.blocked(sched, free)          # the recipe's, not the ablation's
        order = sorted(range(9), key=lambda i: hash64(0, "epoch", 0, i))
        judge.engine = engine = FakeEngine(4, lambda prompt, seed: 5 if prompt == order[0] else 30)
        rollout = RolloutThread(sched, engine, judge, request, judge_timeout=0.2)
        try:
            return engine, rollout.take()
        finally:
            rollout.close()
    engine, batch = run(until=20)
    assert engine.steps == batch.metrics["engine_steps"] == 35 and batch.timing["judge_wait_s"] == 0
    assert run(until=0)[1].metrics == batch.metrics, "as with a judge that is never late"
    with pytest.raises(RuntimeError, match="silent for"):
        run(until=60)


def test_a_slow_judge_is_not_a_silent_one():
    """judge_timeout counts silence: 24 rewards that are due at once come one each 0.05 s, 1.2 s in all, limit 0.4 s."""
    class Slow(ShuffledJudge):
        last = 0.0
        def poll(self):
            if time.monotonic() < self.last + 0.05 or not self.inbox:
                return []
            self.last = time.monotonic()
            return [self.inbox.pop(0)]
    _, rollout = start(FakeEngine(24, lambda *_: 3), Slow(0), judge_timeout=0.4)
    assert rollout.take().timing["judge_wait_s"] > 0.4
    rollout.close()


def test_a_silent_judge_of_one_rank_ends_all():
    _, threads = ranks(2, 8, lambda r: ShuffledJudge(r, patience=1.1 * r))
    threads[1].rollout.judge_timeout = 0.05
    for thread in threads:
        with pytest.raises(RuntimeError, match="rank 1 failed: .*the judge owes"):
            thread.take()
    close_all(threads)


@pytest.mark.parametrize("when", ["at once", "resting", "one rests"])
def test_to_close_one_rank_is_to_end_all(when):
    engines, threads = ranks(3, 8, lambda r: ShuffledJudge(r, patience=0.5))
    if when != "at once":
        for thread in threads:
            thread.take()
    if when == "one rests":                   # the others have begun the next batch and wait for rank 2
        for thread in threads[:2]:
            thread.publish("v1")
        wait_until(lambda: threads[0].rollout.exchange.all.barrier.n_waiting == 2)
        threads[2].close()
        for thread in threads[:2]:
            with pytest.raises(RuntimeError, match="rank 2 has closed its rollout thread"):
                thread.take()
    close_all(threads)
    assert all(engine.active == engine.waiting == 0 for engine in engines)


def test_a_rank_that_is_gone_ends_the_others():
    _, threads = ranks(2, 8, lambda r: ShuffledJudge(r))
    for thread in threads:
        thread.take()
    threads[0].publish("v1")
    threads[0].rollout.exchange.all.barrier.abort()   # gloo raises, too
    with pytest.raises(RuntimeError, match="rank 0 lost the other ranks"):
        threads[0].take()
    close_all(threads)


# ---- first in, first out --------------------------------------------------------------------------------------------


def outcome(task, i):
    return float(hash64("outcome", task.prompt, i) % 4 < task.prompt % 5)  # pass rates 0, 1/4 .. 1


def is_valid(task, G):
    return len({outcome(task, i) for i in range(G)}) > 1


@pytest.mark.parametrize("seed", range(8))
def test_fifo_is_the_first_valid_groups_in_launch_order(seed):
    """Brute force: walk the prompt queue by hand, take the first `batch` valid prompts. Lengths never matter."""
    rng = random.Random(seed)
    n, batch, G = 200, rng.randint(2, 9), rng.randint(2, 5)
    lag, free = rng.choice([None, 0, 3, 50]), rng.choice([None, G, 3 * G])
    sched = no_pool(n, batch, G, seed=seed, reward_lag=lag)
    queue = sorted(range(n), key=lambda i: hash64(seed, "epoch", 0, i))
    for step in range(3):
        want, taken = [], 0
        while len(want) < batch:
            task = Task(step, taken, queue[taken], False)
            want += [task] if is_valid(task, G) else []
            taken += 1
        length = lambda task, i: 1 + hash64("l", seed, task.step, task.index, i) % 300
        groups, metrics = play(sched, length, outcome, free)
        assert [g.task for g in groups] == want
        assert metrics["groups_launched"] - metrics["groups_undone"] == taken
        queue = queue[taken:]  # aborted and surplus prompts come first next time: none lost, none twice


def test_every_prompt_of_an_epoch_is_used_once():
    """By hand: 20 prompts, no pool; whatever is aborted, the committed prompts are one permutation an epoch."""
    sched, seen = no_pool(20, 3, 2, seed=3), []
    while len(seen) < 40:
        launched = []
        draw = sched._draw
        sched._draw = lambda draw=draw, launched=launched: launched.append(draw()) or launched[-1]
        _, metrics = play(sched, lambda task, i: 1 + hash64(task, i) % 50, outcome)
        del sched._draw
        seen += [g.task.prompt for g in launched[: len(launched) - metrics["groups_undone"]]]
    assert sorted(seen[:20]) == sorted(seen[20:40]) == list(range(20)) and seen[:20] != seen[20:40]


def test_fifo_does_not_prefer_short_answers_but_first_finished_does():
    """
    Groups of even prompts take 10 steps, of odd ones 100: half of an unbiased batch is odd. The launches are generous
    (the last step's rate is said to be 0.2, it is 0.5), or nobody would have a choice.
    """
    share = {}
    for stop in ("fifo", "drain", "first"):
        sched, odd = no_pool(100_000, 20, 2, seed=1, stop=stop), []
        for _ in range(20):
            sched.rate = 0.2
            length = lambda task, i: 100 if task.prompt % 2 else 10
            reward = lambda task, i: float(i == 0 and task.prompt // 2 % 2)
            groups, _ = play(sched, length, reward, free=None)
            odd += [g.task.prompt % 2 for g in groups]
        share[stop] = sum(odd) / len(odd)
    # 400 groups: standard deviation 0.025
    assert abs(share["fifo"] - 0.5) < 0.1 and share["fifo"] == share["drain"] and share["first"] < 0.05


def test_stop_waits_for_the_older_and_aborts_the_younger():
    """
    By hand: batch 1, two launches (rate 0.5), both valid; launch 0 takes 9 steps, launch 1 takes 2.

    First-finished would stop at step 2 with launch 1. FIFO stops at step 9 with launch 0 and undoes launch 1, which is
    one valid group beyond a batch of one: waste 1. The next step starts from the rate 1: one launch.
    """
    sched = no_pool(10, 1, 2, reward_lag=0)
    groups, metrics = play(sched, lambda task, i: 9 if task.index == 0 else 2, lambda task, i: float(i))
    assert [g.task.index for g in groups] == [0]
    assert (metrics["groups_launched"], metrics["groups_undone"], metrics["engine_steps"]) == (2, 1, 9)
    assert metrics["waste"] == 1.0
    groups, metrics = play(sched, lambda task, i: 2 if task.index == 0 else 9, lambda task, i: float(i))
    assert [g.task.index for g in groups] == [0] and metrics["groups_launched"] == 1


# ---- launching ------------------------------------------------------------------------------------------------------


def test_continuous_launch_by_hand():
    """
    batch 4, last rate p0 = 0.5, weight w = 4 // 4 = 1, reward_lag 0.

    Start: 0 + 0.5 r < 4 launches until r = 8. Launch 1 comes back invalid; launch 0 is out, so the prefix is empty, p
    stays 0.5, 0 + 0.5 * 7 < 4: one more. Launch 0 comes back valid: the prefix is 2 long, p = (1 + 0.5) / (2 + 1) =
    0.5, 1 + 0.5 * 7 >= 4: none. Launch 2 invalid: p = 1.5 / 4 = 0.375, 1 + 0.375 * 6 < 4 until r = 8: two more. Launch
    3 invalid: p = 1.5 / 5 = 0.3, until r = 10: three more.
    """
    sched = Scheduler(100, 4, 2, reward_lag=0)
    assert len(sched.launch()) == 8
    def end(index, rewards):
        key = lambda i: (0, index, i)
        sched.advance([(key(i), Answer(key(i), range(1), "stop", 0)) for i in range(2)], 16)
        sched.observe([(key(i), rewards[i], None) for i in range(2)])
        return [t.index for t in sched.launch()]
    assert end(1, (0, 0)) == [8]
    assert end(0, (0, 1)) == []
    assert end(2, (1, 1)) == [9, 10]
    assert end(3, (1, 1)) == [11, 12, 13]


def test_rewards_wait_for_the_lag_but_not_when_nothing_is_left_to_decode():
    """
    batch 1, one launch of 5 steps, reward_lag 100: over after 5 steps. Two launches of 5 and 50 steps, the first
    invalid, the second valid: its reward ends the step at 50, though the first one's would be due at 105.
    """
    sched = scheduler(9, 1, 2, rate=1.0, reward_lag=100)
    assert play(sched, lambda t, i: 5, lambda t, i: float(i))[1]["engine_steps"] == 5
    sched.rate = 0.5
    _, metrics = play(sched, lambda t, i: (5, 50)[t.index], lambda t, i: float(i * t.index))
    assert metrics["engine_steps"] == 50
    # lag 10: launch 0's failure is known at 15: p = 1/4, launches 2, 3, 4 begin. That of launch 1 is known at
    # 60: p = 1/6, three more. Launch 2 ends at 115, is known to be valid at 125, and some are still running
    sched = no_pool(9, 1, 2, reward_lag=10)
    length = lambda t, i: (5, 50)[t.index] if t.index < 2 else 100
    _, metrics = play(sched, length, lambda t, i: 0.0 if t.index < 2 else float(i))
    assert metrics["groups_launched"] == 8 and metrics["engine_steps"] == 125


def test_groups_that_end_together_are_applied_in_launch_order():
    """first-finished, three valid groups end at the same step, listed youngest first: the oldest is taken."""
    sched = no_pool(9, 1, 2, rate=0.3, reward_lag=0, stop="first")
    sched.launch()
    keys = [(0, k, i) for k in (2, 1, 0) for i in (0, 1)]
    sched.advance([(k, Answer(k, range(1), "stop", 0)) for k in keys], 8)
    sched.observe([(k, float(k[2]), None) for k in keys])
    sched.launch()
    assert [g.task.index for g in sched.batch()[0]] == [0]


def test_free_slots_limit_launches_to_groups_that_can_start():
    sched = Scheduler(100, 8, 4)
    assert [len(sched.launch(free)) for free in (9, 0, -2)] == [3, 0, 0]
    assert len(sched.launch()) == 13  # 16 in all


def test_the_thread_launches_only_what_can_start():
    """18 slots, groups of 4: at most 3 samples of the last group wait for a slot."""
    engine = FakeEngine(18, lengths)
    train(ShuffledJudge(0), steps=3, engine=engine, batch=20)
    assert 0 < engine.longest_queue <= 3


def test_aborted_samples_may_also_come_out_of_step():
    """An engine whose abort() returns nothing and whose next step() hands out the stumps."""
    class Late(FakeEngine):
        stumps = ()
        def abort(self, key):
            self.stumps = (*self.stumps, s) if (s := super().abort(key)) else self.stumps
        def step(self):
            stumps, self.stumps = self.stumps, ()
            return [*super().step(), *stumps]
    late, _ = train(ShuffledJudge(0), engine=Late(20, lengths))
    want, _ = train(ShuffledJudge(0), engine=FakeEngine(20, lengths))
    keep = lambda out: [(groups, state) for groups, _, state, _, _ in out]
    assert keep(late) == keep(want)


def test_waves_by_hand():
    """batch 3, every second launch valid: nothing is launched before all of a wave is graded."""
    sched = no_pool(99, 3, 2, launch="wave", stop="drain", reward_lag=0)
    sizes = []
    real = sched.launch
    sched.launch = lambda free=None: [sizes.append(len(t)) or t for t in [real(free)]][0]
    groups, metrics = play(sched, lambda t, i: 1 + t.index, lambda t, i: float(i == 0 and t.index % 2))
    # valid: launches 1, 3, 5: two waves of three
    assert [n for n in sizes if n] == [3, 3] and [g.task.index for g in groups] == [1, 3, 5]
    assert metrics["engine_steps"] == 3 + 6 and metrics["waste"] == 0 and metrics["valid"] == 0.5


def test_without_dynamic_sampling_the_batch_is_what_was_launched():
    sched = Scheduler(50, 5, 1, dynamic=False)  # G = 1 is allowed here
    groups, metrics = play(sched, lambda t, i: 3, lambda t, i: 0.0)
    assert len(groups) == 5 == metrics["groups_launched"] and metrics["all0"] == 1.0 and not metrics["capped"]


@pytest.mark.parametrize("rewards, valid", [
    ((0, 0, 0, 0), False), ((1, 1, 1, 1), False), ((0, 0, 0, 1), True), ((0.25, 0.25, 0.5, 0.25), True),
    ((0.3, 0.3 + 1e-8, 0.3 - 1e-8, 0.3), False),  # std > 0 by rounding, and the mean lies inside (0, 1)
])
def test_dynamic_sampling_is_by_range(rewards, valid):
    sched = Scheduler(50, 1, 4, max_groups=1)
    groups, metrics = play(sched, lambda t, i: 1, lambda t, i: rewards[i])
    assert len(groups) == valid and metrics["valid"] == valid and metrics["capped"] == (not valid)


def test_cap_ends_a_hopeless_step_and_says_so():
    """No prompt is ever solved: 8 * batch launches, an empty batch, a note, and the next step still starts."""
    engine = FakeEngine(20, lengths)
    sched = Scheduler(60, 3, 2, seed=5)
    judge = ShuffledJudge(0)
    judge.submit = lambda key, task, sample: judge.inbox.append((key, 0.0, None))
    rollout = RolloutThread(sched, engine, judge, request)
    for step in range(2):
        batch = rollout.take()
        assert batch.groups == [] and batch.metrics["capped"] == 1 and batch.metrics["groups_launched"] == 24
        assert batch.note.startswith(f"step {step}: 0 of 3 groups after the cap of 24 launches")
        rollout.publish()
    rollout.close()
    assert batch.state["cursor"] == [0, 48] and batch.state["rate"] > 0


# ---- easy pool ------------------------------------------------------------------------------------------------------


def pool_run(alpha, reward, steps=1, n=40, batch=4, **flags):
    pool = {} if alpha is None else {"alpha": alpha}
    sched = (no_pool if alpha is None else Scheduler)(n, batch, 2, seed=2, max_groups=4 * batch, **pool, **flags)
    metrics = []
    for _ in range(steps):
        metrics.append(play(sched, lambda t, i: 1 + hash64(t, i) % 9, reward)[1])
    return sched, metrics


def test_solved_problems_go_to_the_pool_and_out_of_the_queue():
    """Prompts below 20 of 40 are always solved: in the end the pool is these, and only it serves them."""
    solved = lambda t, i: 1.0 if t.prompt < 20 else float(i)
    sched, metrics = pool_run(0.1, solved, steps=30)
    assert sorted(sched.pool) == list(range(20))
    sched.launch()
    assert all(g.task.pool == (g.task.prompt < 20) for g in sched.groups)
    assert all(m["pool_regressed"] == 0 and m["pool_hit"] == 0 for m in metrics)
    # alpha = 0 removes them outright; without a pool they stay in the queue
    sched, metrics = pool_run(0.0, solved, steps=30)
    assert sorted(sched.pool) == list(range(20)) and all(m["pool_draws"] == 0 for m in metrics)
    sched, metrics = pool_run(None, solved, steps=30)
    assert not sched.pool and abs(sum(m["all1"] for m in metrics) / 30 - 0.5) < 0.2


def test_a_launch_draws_from_the_pool_with_probability_alpha():
    """4,000 coins at alpha = 0.1: 400 expected, standard deviation 19."""
    sched = scheduler(10_000, 4000, 2, rate=1.0, alpha=0.1)
    sched.pool = dict.fromkeys(range(50))
    draws = [t.prompt for t in sched.launch() if t.pool]
    assert abs(len(draws) - 400) < 5 * 19 and set(draws) == set(range(50))
    assert not any(t.prompt < 50 for t in (g.task for g in sched.groups) if not t.pool)


def test_a_relapse_leaves_the_pool_and_counts():
    """
    Pool {0, 1}, alpha = 1: prompt 0 is still solved and stays; prompt 1 is now solved half the time: a hit (it gives a
    training group), a regression, and back in the ordinary queue.
    """
    sched = scheduler(20, 1, 2, alpha=1.0, rate=0.25, reward_lag=0)
    sched.pool = dict.fromkeys((0, 1))
    groups, m = play(sched, lambda t, i: 1, lambda t, i: 1.0 if t.prompt == 0 else float(i))
    assert [g.task.prompt for g in groups] == [1] and groups[0].task.pool
    assert list(sched.pool) == [0] and m["pool_size"] == 1 and m["pool_draws"] == 1
    n = groups[0].task.index + 1  # launches that count
    assert m["pool_hit"] == m["pool_regressed"] == pytest.approx(1 / n)


def test_results_of_undone_launches_touch_nothing():
    """
    batch 1: launch 0 is valid but slow, launch 1 was solved meanwhile. It is undone: not in the pool, and the next
    step's first prompt.
    """
    sched = Scheduler(20, 1, 2, reward_lag=0)
    tasks = sched.launch()
    sched._begin()
    sched.cursor = (0, 0)
    _, m = play(sched, lambda t, i: 9 - 8 * t.index, lambda t, i: float(i) if t.index == 0 else 1.0)
    assert m["groups_undone"] >= 1 and not sched.pool
    assert sched.launch()[0].prompt == tasks[1].prompt


def test_everything_solved_does_not_hang():
    """When the pool holds every problem, launches draw from it whatever alpha is."""
    sched, metrics = pool_run(0.0, lambda t, i: 1.0, steps=6, n=10)
    assert len(sched.pool) == 10 and metrics[-1]["pool_draws"] == 1 and metrics[-1]["capped"] == 1


# ---- numbers and errors ---------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    """
    Two slots, G = 2, batch 1, two launches. Launch 0 (all 0, dropped) takes 2 and 2 steps, launch 1 (valid) 3 and 1.
    Busy 2 + 2 + 2 + 1 + 1 = 8 of 2 * 5 slot-steps: idle 0.2. Tokens 2 + 2 + 3 + 1 = 8. Pass rate launched 1/4, trained
    1/2. Were there 8 aborted tokens beside, half of the busy ones would count: idle 0.6.
    """
    for aborted, idle in ((0, 0.2), (8, 0.6)):
        sched = scheduler(9, 1, 2, rate=1.0, reward_lag=0, max_groups=2)
        for index in (0, 1):
            assert [t.index for t in sched.launch()] == [index]
            if index == 0:
                sched.advance([], 2)
                finished = [((0, 0, i), Answer(None, range(2), "stop", 0)) for i in (0, 1)]
                sched.advance(finished, 2)
                sched.observe([((0, 0, i), 0.0, None) for i in (0, 1)])
            else:
                sched.advance([((0, 1, 1), Answer(None, range(1), "stop", 0))], 2)
                sched.advance([((0, 1, 0), Answer(None, range(3), "stop", 0))], 2, steps=2)
                sched.observe([((0, 1, i), float(i), None) for i in (0, 1)])
        assert sched.launch() == [] and sched.selected is not None and not sched.in_engine
        _, m = sched.batch(slots=2, aborted_tokens=aborted)
        assert m["slot_idle"] == pytest.approx(idle) and m["tokens"] == 8 and m["engine_steps"] == 5
        assert (m["reward_launched"], m["reward_trained"], m["waste"]) == (0.25, 0.5, 0)
        assert (m["all0"], m["all1"], m["valid"], m["groups_used"]) == (0.5, 0, 0.5, 1)


@pytest.mark.parametrize("flags", [
    dict(batch=0), dict(G=1), dict(launch="eager"), dict(stop="now"), dict(alpha=1.5), dict(reward_lag=-1),
    dict(max_groups=1), dict(rate=0.0),
])
def test_settings_out_of_range(flags):
    """What only the ablation has (launch, stop, rate) is refused there."""
    made = Ablation if {"launch", "stop", "rate"} & set(flags) else Scheduler
    with pytest.raises(ValueError):
        made(**{"n_prompts": 9, "batch": 2, "G": 2, **flags})


def test_bad_results_are_errors_not_zeros():
    sched = Scheduler(9, 2, 2, reward_lag=0)
    sched.launch()
    key = (0, 0, 0)
    for reward in (float("nan"), float("inf"), -0.1, 1.1):
        with pytest.raises(ValueError, match="finite number in"):
            sched.observe([(key, reward, None)])
    sched.observe([(key, 1.0, None)])
    with pytest.raises(ValueError, match="twice"):
        sched.observe([(key, 1.0, None)])
    for unknown in ((1, 0, 0), (0, 99, 0), (0, 0, 2), (0, -1, 0)):
        with pytest.raises(ValueError, match="no sample"):
            sched.observe([(unknown, 1.0, None)])
    sched.observe([((-1, 7, 7), 0.5, None)])  # a late verdict on an aborted task of an earlier step
    sample = Answer(key, range(1), "stop", 0)
    sched.advance([(key, sample), ((0, 0, 1), sample)], 8)
    with pytest.raises(ValueError, match="finished twice"):
        sched.advance([(key, sample)], 8)
    with pytest.raises(RuntimeError, match=r"1 rewards are due but not observed, first \(0, 0, 1\)"):
        sched.launch()
    with pytest.raises(RuntimeError, match="not over"):
        sched.batch()


# ---- the thread -----------------------------------------------------------------------------------------------------


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.001)


def start(engine=None, judge=None, make_request=request, **more):
    sched = Scheduler(60, 4, 2, seed=1, reward_lag=4)
    engine, judge = engine or FakeEngine(12, lengths), judge or ShuffledJudge(0, patience=0)
    return engine, RolloutThread(sched, engine, judge, make_request, **more)


def test_staleness_0_rests_during_the_update_and_uses_the_newest_weights():
    engine, rollout = start()
    for k in range(4):
        batch = rollout.take()
        assert batch.version == k and engine.weights == (None if k == 0 else f"v{k}")
        steps = engine.steps
        time.sleep(0.01)  # the "update"
        assert engine.steps == steps and engine.active == engine.waiting == 0 and not rollout.ready
        rollout.publish(f"v{k + 1}")
    rollout.close()


@pytest.mark.parametrize("trainer", ["fast", "slow"])
def test_staleness_1_uses_exactly_the_weights_of_one_update_ago(trainer):
    engine, rollout = start(max_staleness=1)
    versions = []
    for k in range(5):
        batch = rollout.take()
        versions.append(batch.version)
        if trainer == "slow":
            wait_until(lambda: rollout.ready)  # the next batch is generated during this update
        rollout.publish(f"v{k + 1}")
    with pytest.raises(ValueError, match="max_staleness = 1"):
        rollout.publish(None)
    rollout.close()
    assert versions == [0, 0, 1, 2, 3]
    loads = [w for _, what, w in engine.log if what == "load"]
    assert loads == [f"v{k}" for k in range(1, len(loads) + 1)]


def fail(*_args, **_kwargs):
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("where", ["step", "add", "load", "submit", "poll", "make_request"])
def test_what_the_thread_raises_reaches_the_trainer(where):
    engine, judge = FakeEngine(12, lengths), ShuffledJudge(0, patience=0)
    if where in ("step", "add", "load"):
        setattr(engine, where, fail)
    elif where != "make_request":
        setattr(judge, where, fail)
    engine, rollout = start(engine, judge, fail if where == "make_request" else request)
    with pytest.raises(RuntimeError, match="the rollout thread failed: ZeroDivisionError") as error:
        for _ in range(3):
            rollout.take()
            rollout.publish("v")
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    with pytest.raises(RuntimeError, match="failed"):
        rollout.publish("v")
    rollout.close()
    assert not rollout.thread.is_alive()


def test_a_silent_judge_is_an_error_after_its_timeout():
    _, rollout = start(judge=ShuffledJudge(0, patience=1.1), judge_timeout=0.05)
    with pytest.raises(RuntimeError, match="the judge owes .* rewards, first"):
        rollout.take()
    rollout.close()


@pytest.mark.parametrize("when", ["at once", "resting", "decoding", "waiting for the judge"])
def test_close_ends_the_thread_and_empties_the_engine(when):
    if when == "decoding":
        engine, rollout = start(FakeEngine(12, lambda *_: 10**9))
        wait_until(lambda: engine.steps > 5)
    elif when == "waiting for the judge":
        engine, rollout = start(judge=ShuffledJudge(0, patience=1.1))
        wait_until(lambda: engine.steps > 3)
    else:
        engine, rollout = start()
        if when == "resting":
            rollout.take()
    rollout.close()
    assert not rollout.thread.is_alive() and engine.active == engine.waiting == 0
    with pytest.raises(RuntimeError, match="closed"):
        while True:
            rollout.take()
    rollout.close()  # twice is fine


def test_close_does_not_wait_for_an_engine_that_hangs():
    hang, engine = threading.Event(), FakeEngine(12, lengths)
    engine.step = hang.wait
    _, rollout = start(engine)
    rollout.close(timeout=0.05)
    assert rollout.thread.is_alive()
    hang.set()


# ---- evaluation, and SIGTERM -----------------------------------------------------------------------------------------


def evaluations(at, samples=3, seen=None):
    """evaluation() of a RolloutThread: 7 held-out problems at these versions. seen: keys it has asked for."""
    def ask(task, i, seed):
        (seen if seen is not None else set()).add(task.key(i))
        return (task.key(i), 100 + task.prompt, hash64("held", task.prompt, i))
    return lambda version: (Scheduler(7, 7, samples, alpha=0.0, dynamic=False, reward_lag=None),
                            ShuffledJudge(version), ask) if version in at else None


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_evaluation_sees_the_weights_it_is_named_after(staleness):
    """Due at 0, 2 and 3 of 3 updates: all problems, in launch order; batches are those of a run without evaluations."""
    def run(at):
        engine, rollout = start(max_staleness=staleness, evaluation=evaluations(at), last=3)
        got, batches, at_load = [], [], {}
        load, engine.load = engine.load, lambda w: (at_load.setdefault(w, engine.steps), load(w))
        for k in range(4):
            if k in at:
                got.append([(g.task.prompt, len(g.samples), [s.luck for s in g.samples]) for g in rollout.evaluated()])
            if k < 3:
                batch = rollout.take()
                batches.append(([(g.task, [s.luck for s in g.samples]) for g in batch.groups], batch.metrics))
                rollout.publish(f"v{k + 1}")
        rollout.close()
        assert not rollout.thread.is_alive() and engine.active == engine.waiting == 0
        return got, batches
    got, batches = run((0, 2, 3))
    assert batches == run(())[1]
    for k, found in zip((0, 2, 3), got, strict=True):
        weights = None if k == 0 else f"v{k}"
        assert sorted(p for p, *_ in found) == list(range(7)) and all(n == 3 for _, n, _ in found)
        for p, _, luck in found:                            # what these weights say to this problem, in any company
            for i, said in enumerate(luck):
                value = hash64(100 + p, hash64("held", p, i), weights)
                for _ in range(lengths(100 + p, hash64("held", p, i))):
                    value = hash64(value, 0)
                assert said == value


def together_with_evaluation(world, at=(0, 1), **more):
    together = Together(world, 8)
    engines = [FakeEngine(20 // world, lengths) for _ in range(world)]
    return engines, [RolloutThread(Scheduler(60, 4, 2, seed=1, reward_lag=4), engine, ShuffledJudge(r), request,
                                   evaluation=evaluations(at), last=2, exchange=together.of(r),
                                   **{k: v(r) for k, v in more.items()}) for r, engine in enumerate(engines)]


def test_an_evaluation_is_shared_by_all_ranks_and_known_on_each():
    def what(groups):
        return [(g.task.prompt, g.rewards, [len(s.tokens) for s in g.samples]) for g in groups]
    (_, (alone,)), (_, threads) = together_with_evaluation(1), together_with_evaluation(3)
    want = what(alone.evaluated())
    for thread in threads:
        groups = thread.evaluated()
        assert what(groups) == want and {g.rank for g in groups} == {0, 1, 2}
    close_all([alone])
    close_all(threads)


@pytest.mark.parametrize("where", ["step", "submit"])
def test_an_error_in_an_evaluation_ends_all_ranks(where):
    together = Together(2, 8)
    threads = []
    for r in range(2):
        engine = FakeEngine(10, lengths)
        sched, judge, ask = evaluations((0,))(0)
        if r == 1:
            setattr(engine if where == "step" else judge, where, fail)
        threads.append(RolloutThread(Scheduler(60, 4, 2, seed=1), engine, ShuffledJudge(r), request,
                                     evaluation=lambda v, job=(sched, judge, ask): job, exchange=together.of(r)))
    for thread in threads:
        with pytest.raises(RuntimeError, match="rank 1 failed: ZeroDivisionError"):
            thread.evaluated()
    close_all(threads)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("when", ["rollout", "evaluation", "judge"])
def test_a_stop_on_one_rank_is_obeyed_by_all_at_the_next_round(world, when):
    """In a batch, an evaluation, or while a silent judge is waited for: all are told, nothing is left in an engine."""
    signal = threading.Event()
    engines, threads = together_with_evaluation(world, at=(0,) if when == "evaluation" else (),
                                                stop=lambda r: (lambda: r == world - 1 and signal.is_set()))
    for engine, thread in zip(engines, threads, strict=True):
        if when == "judge":
            thread.grader.poll = list
        else:
            engine.length = lambda *_: 10**9
    wait_until(lambda: all(e.steps > 5 for e in engines))
    signal.set()
    for engine, thread in zip(engines, threads, strict=True):
        assert (thread.evaluated() if when == "evaluation" else thread.take()) is None
        thread.thread.join(5)
        assert not thread.thread.is_alive() and engine.active == engine.waiting == 0
        thread.publish("v1")                                # the trainer may be in an update: no error
    close_all(threads)


# ---- the simulation behind Tables 2 and 3 ---------------------------------------------------------------------------


def test_virtual_clock_speedups_and_bias():
    """A small world: each mechanism of Table 2 in its place, and only first-finished shortens answers."""
    from paper.table2 import ROWS, World, table

    world = World(slots=1024, batch=32, workers=16, n_prompts=4000)
    rows = {r["method"]: r for r in table(world, 2, ROWS)}
    full, naive = rows["+ early termination"], rows["naive dynamic sampling"]
    assert naive["rollout"] == 1 < rows["+ continuous rollout"]["rollout"] < rows["+ async reward"]["rollout"]
    assert rows["+ async reward"]["rollout"] < full["rollout"] < rows["w/o dynamic sampling"]["rollout"]
    assert full["idle"] < naive["idle"]
    assert rows["bit-equal: reward_lag 64"]["rollout"] > 0.95 * full["rollout"]
    assert full["length_vs_true"] == naive["length_vs_true"]
    assert rows["first finished (biased)"]["length_vs_true"] < full["length_vs_true"] - 0.03


# ---- the real engine ------------------------------------------------------------------------------------------------


def test_with_the_real_engine_too():
    """Tokens and log-probs of two RL steps, new weights between: equal for a prompt and a slow judge."""
    import mtp
    from engine import Engine, Request
    from model import ModelConfig

    cfg = ModelConfig(vocab_size=64, n_layer=1, d_model=32, n_head=2, n_kv_head=1, head_dim=16, d_ff=64)
    models = [mtp.build(cfg) for _ in range(2)]
    for seed, m in enumerate(models):
        m.init_weights(seed)
    weights = [m.state_dict() for m in models]

    def run(judge):
        model = mtp.build(cfg)
        model.load_state_dict(weights[0])
        engine = Engine(model, slots=10, max_len=48)
        judge.submit = lambda key, task, s: judge.inbox.append((key, float(sum(s.tokens) % 3 == 0), None))
        ask = lambda task, i, seed: Request(task.key(i), [1 + task.prompt, 2], 24, stop=(0, 1, 2), seed=seed)
        rollout, out = RolloutThread(Scheduler(40, 4, 4, seed=1), engine, judge, ask), []
        for version in (1, 0):
            batch = rollout.take()
            groups = [(g.task, g.rewards, [(s.tokens, s.logprobs) for s in g.samples]) for g in batch.groups]
            out.append((groups, batch.metrics, batch.state))
            rollout.publish(weights[version])
        rollout.close()
        return out

    fast = run(ShuffledJudge(0, patience=0.0))
    assert fast == run(ShuffledJudge(4, workers=2, patience=0.9))
    assert fast[0][1]["groups_used"] == 4 and 0 < fast[0][1]["slot_idle"] < 1
