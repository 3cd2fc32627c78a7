"""
The Seamless Rollout Engine (report 3.4.1): continuous rollout, asynchronous reward, early termination; and the dynamic
sampling (3.3) and the easy data pool (3.3.2) that decide what is rolled out.

    engine.step() -> grader.submit() -> scheduler.advance(), observe(grader.poll()) -> engine.add(scheduler.launch())

No torch, no judge and no engine is imported. The Scheduler decides; it drives a real engine, or a simulated one with a
virtual clock (paper/table2.py). The RolloutThread runs the loop above in the background of the trainer:

    scheduler = Scheduler(n_prompts=len(problems), batch=32, G=8, seed=1)
    rollout = RolloutThread(scheduler, engine, grader, make_request)
    for _ in range(scheduler.step, steps):
        batch = rollout.take()        # waits for a Batch: groups, metrics, timing, version, state, note; None: stopped
        for g in batch.groups: ...    # g.task.prompt; g.samples[i], g.rewards[i], g.infos[i] for i < G
        rollout.publish(weights)      # the update is done; None if the engine shares the trained module
        ...                           # save batch.state; a resumed run calls scheduler.load_state_dict(state) first
    rollout.close()

What the thread needs of the others (rl.py gives it a reward.Grader):

    make_request(task, i, seed) -> Request with id = task.key(i); seed is a hash of run seed, step, launch and sample
    grader    submit(key, task, sample); poll() -> [(key, reward, info), ...] without waiting, in any order
    engine    add(request), step() -> finished samples, abort(id), load(weights); numbers slots, active, waiting, room
    sample    id, prompt, tokens, finish ("abort" for one that abort() ended)

In this file a step, alone, is an RL step: one batch. The engine's steps are called decode steps. An evaluation is one
step too: of a Scheduler(dynamic=False, alpha=0) over the held-out problems, by the same loop, engine and ranks.

FIRST RULE: no decision depends on when a reward arrived. So a run is bit-equal for every judge latency and any number
of judge workers. The rewards of a group enter the statistics exactly `reward_lag` decode steps after the group's last
sample finished. A reward that is early waits. One that is late makes the engine wait, but only if a decision depends on
it: where no slot is free and the step cannot end yet, decoding goes on. When nothing is left to decode they enter at
once; several at one decode step enter in launch order. What is launched, when, beside whom in the engine's batch, and
what is aborted are then functions of decode steps alone. reward_lag = 0 is a synchronous reward.
reward_lag = None takes rewards as they arrive (the report's way): then the trained batches repeat only if the engine is
batch-invariant, and the amount of aborted work varies.

SECOND RULE: launch k of a step is a pure function of (state at the start of the step, k), and the step commits only
launches 0..L, where L is the last selected one. Later launches were speculation and are undone: their prompts go back
to the front of the queue, their results change neither pool nor statistics. So no prompt is lost, and long answers are
as likely to be trained on as short ones.

SEVERAL PROCESSES, ONE SCHEDULER. Each rank has an engine, a grader and a replica of the one scheduler. After a round of
decode steps the ranks exchange their RankState (which samples finished, which rewards arrived, how many answers could
start), and every replica gets the same events in the same order. So all take the same decisions without a master. A
group goes to the rank with the most room, in slots and in KV memory; by the second rule the choice does not matter.
Prompts, launch order, pool, batches and checkpoints are global and, in exact arithmetic, the same for every number of
ranks. In a SingleProcess a round is one decode step and nothing is exchanged. No rank is ever silent for long: a round
is short, one that waits for rewards lasts a second, and a rank that is asked to stop (SIGTERM) says so in its state.

Differs from the report, which says nothing of a cap on launches, of aborted prompts, of a pool problem that is solved
again (here it stays in the pool and its group is dropped), and of reproducibility. Tables 2 and 3 and Fig. 6 remade:
python paper/table2.py, paper/table3.py, paper/fig6.py. docs/rollout.md has the numbers.
"""
import hashlib
import itertools
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from configurator import UserError

Key = tuple[int, int, int]     # (step, launch index, sample index): names a sample for the whole run
TOL = 1e-6                     # rewards closer than this are equal: a difference may be rounding
UNPARSABLE = {"no box", "no program"}    # verdicts of reward.Grader: there was nothing to grade
HEARTBEAT = 1.0                # seconds that a rank waits for its judge before it lets the other ranks hear of it


def hash64(*key: int | str | tuple) -> int:
    """64 bits that depend on `key` alone. There is no generator state, so the order of calls does not matter."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Task:
    """One launch: generate G samples for problem number `prompt`."""
    step: int                  # RL iteration
    index: int                 # launch order within the step; every decision follows it
    prompt: int                # index into the list of problems
    pool: bool                 # drawn from the easy pool

    def key(self, i: int) -> Key:
        """The name of sample i."""
        return (self.step, self.index, i)


@dataclass
class Group:
    """A launched task and its G samples, all from one prompt. It is kept or dropped whole."""
    task: Task
    cursor: tuple[int, int]    # (epoch, position) of the prompt queue after this launch
    samples: list              # by sample index: engine sample or RemoteSample, None while it is decoded
    rewards: list              # by sample index: float in [0, 1], None until it is graded
    infos: list                # by sample index: what the grader returns beside the reward
    decoding: int              # samples still in the engine
    due: int | None = None     # the clock at which its rewards enter the statistics
    applied: bool = False      # they have entered
    valid: bool = False        # it has a learning signal: its rewards differ (without dynamic sampling: always)
    rank: int = 0              # the rank whose engine generates it


@dataclass(frozen=True)
class RemoteSample:
    """What a rank knows of a sample in another rank's memory: its lengths, and how it ended."""
    prompt: range              # range(number of prompt tokens)
    tokens: range              # range(number of generated tokens)
    finish: str                # as in engine.Sample


@dataclass(frozen=True)
class RankState:
    """What happened on one rank since the last exchange."""
    steps: int = 0                                      # decode steps
    busy: int = 0                                       # slots used, summed over these steps
    finished: list = field(default_factory=list)        # [(key, sample)]
    outcomes: list = field(default_factory=list)        # [(key, reward, info)] from the judge
    room: int = 0                                       # requests that its engine could start now
    waited: float = 0.0                                 # seconds that it waited for late rewards
    aborted_tokens: int = 0                             # tokens of samples aborted at the end of a batch
    stop: bool = False                                  # this process was asked to stop (SIGTERM)
    error: str | None = None                            # why this rank ends; "" = its thread was closed


@dataclass
class Batch:
    """What take() returns: the groups of one RL step, and what is known of the step."""
    groups: list[Group]        # selected, in launch order; fewer than `batch`, or none, when the cap was reached
    metrics: dict              # numbers of the step that repeat in every run
    timing: dict               # wall-clock numbers, the only part that depends on the judge's speed
    version: int               # updates behind the weights that generated it (the behaviour policy)
    state: dict                # scheduler state after this step, for the checkpoint
    note: str = ""             # a sentence when the batch is short


class Scheduler:
    """
    Decides what is launched, when a step stops, and what is trained on. One object for the whole run.

    n_prompts    problems, numbered 0 .. n_prompts - 1; the caller keeps them
    batch        valid groups per step [paper 3.3.3: 512]
    G            samples per group
    seed         of the prompt queue, the pool's coins and the samples
    alpha        probability that a launch draws from the easy pool [paper 3.3.2: 0.1]; 0 removes solved problems
    dynamic      dynamic sampling [paper 3.3]; False: launch exactly `batch` groups and train on all of them
    reward_lag   decode steps from the end of a group to the use of its rewards; None: as they arrive (header)
    max_groups   cap on launches per step, default 8 * batch; when it is reached the step trains on what there is
    problems     a fingerprint of the problems, so that no checkpoint goes on with others of the same number; "" = none

    `step` counts the steps, `selected` is the batch once a step is over and None before. ValueError for settings out of
    range, unknown or repeated results, rewards outside [0, 1].
    """

    def __init__(self, n_prompts: int, batch: int, G: int, seed: int = 0, alpha: float = 0.1, dynamic: bool = True,
                 reward_lag: int | None = 16, max_groups: int | None = None, problems: str = ""):
        if min(n_prompts, batch, G) < 1:
            raise ValueError(f"n_prompts, batch, G = {n_prompts}, {batch}, {G} should all be at least 1")
        if dynamic and G < 2:
            raise ValueError("G = 1 has no reward range: dynamic sampling drops every group; use G >= 2")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha = {alpha} should be in [0, 1]")
        if reward_lag is not None and reward_lag < 0:
            raise ValueError(f"reward_lag = {reward_lag} should be None or >= 0")
        self.n_prompts, self.batch_size, self.G, self.seed, self.problems = n_prompts, batch, G, seed, problems
        self.alpha, self.dynamic, self.reward_lag = alpha, dynamic, reward_lag
        self.max_groups = (8 * batch if dynamic else batch) if max_groups is None else max_groups
        if self.max_groups < batch:
            raise ValueError(f"max_groups = {self.max_groups} should be at least batch = {batch}")
        # what lives across steps, and all that a checkpoint holds
        self.step = 0
        self.cursor = (0, 0)                     # (epoch, position) in that epoch's permutation of the problems
        self.pool: dict[int, None] = {}          # easy pool, oldest first (a dict keeps the order and finds fast)
        self.rate = 0.5                          # share of valid groups in the last step; 1/2 before the first
        self._permutation: tuple[int, list[int]] = (-1, [])      # (epoch, its order of the problems)
        self._begin()

    def _begin(self) -> None:
        """The state at the start of a step: nothing in flight. No checkpoint ever sees another one."""
        self.groups: list[Group] = []            # by launch index
        self.in_engine: dict[Key, Group] = {}    # samples in an engine; what is left when the step ends is aborted
        self.unapplied: list[Group] = []          # decoded, rewards not applied yet
        self.n_applied = self.n_valid = 0        # groups whose rewards were applied; valid ones among them
        self.n_prefix = self.prefix_valid = 0    # groups[:n_prefix] are all applied; valid ones among them
        self.clock = 0                           # decode steps made in this RL step
        self.busy = self.tokens = 0              # slot-steps used; tokens of the finished samples
        self.selected: list[Group] | None = None

    # ---- what to launch ---------------------------------------------------------------------------------------------

    def launch(self, free: int | None = None) -> list[Task]:
        """
        Apply the rewards that are due, end the step or go on, and return new tasks (G samples each for an engine).

        free: slots the engines have to spare, None = no limit. A launch that could not start now is better decided
        later. RuntimeError when a reward that is due() has not been observed.
        """
        due = self.due()
        if missing := [g.task.key(i) for g in due for i, r in enumerate(g.rewards) if r is None]:
            raise RuntimeError(f"{len(missing)} rewards are due but not observed, first {missing[0]}")
        for g in due:
            g.valid, g.applied = self._has_signal(g), True
            self.unapplied.remove(g)
            self.n_applied, self.n_valid = self.n_applied + 1, self.n_valid + g.valid
        while self.n_prefix < len(self.groups) and self.groups[self.n_prefix].applied:
            self.prefix_valid += self.groups[self.n_prefix].valid
            self.n_prefix += 1
        if self.selected is None and self.groups:
            self.selected = self._select()
        tasks = []
        while self.selected is None and (free is None or free > 0) and self._wanted():
            group = self._draw()
            self.groups.append(group)
            self.in_engine |= {group.task.key(i): group for i in range(self.G)}
            tasks.append(group.task)
            free = None if free is None else free - self.G
        return tasks

    def _has_signal(self, g: Group) -> bool:
        """Dynamic sampling drops pass rates 0 and 1, by range: a standard deviation is not 0 after rounding."""
        return not self.dynamic or max(g.rewards) - min(g.rewards) > TOL

    def _wanted(self) -> bool:
        """Launch one more group? Decided by the pass rates of this step, starting from the last step's."""
        if len(self.groups) >= self.max_groups:
            return False
        if not self.dynamic:
            return len(self.groups) < self.batch_size
        # Estimate p, the share of valid groups, from the oldest launches only. Short answers finish first and are
        # mostly easy, hence invalid; counting every finished group would bias p low and launch too many (waste 0.75 of
        # a batch instead of 0.16). The last step's rate p0 counts as w groups: p = (valid + w p0) / (completed + w)
        w = max(1, self.batch_size // 4)
        p = (self.prefix_valid + w * self.rate) / (self.n_prefix + w)
        # 3.4.1 (a): launch while   valid + p * running < batch
        running = len(self.groups) - self.n_applied                # decoding, or waiting for rewards
        return self.n_valid + p * running < self.batch_size

    def _select(self) -> list[Group] | None:
        """The batch, if the step is over: full, or every launch that the cap allows has completed. Else None."""
        # 3.4.1 (c): the batch is full AND every task launched before the selected ones has completed
        full = self.prefix_valid >= self.batch_size
        capped = self.n_applied == len(self.groups) >= self.max_groups
        return [g for g in self.groups if g.valid][:self.batch_size] if full or capped else None

    def _draw(self) -> Group:
        """The next launch: from the easy pool with probability alpha (3.3.2), else from the front of the queue."""
        # coin and position are hashes of the launch index, and the pool does not change within a step: this is a
        # function of (state at the start of the step, index). The 0 means nothing: it keeps earlier versions' hashes
        index = len(self.groups)
        coin = hash64(self.seed, 0, "coin", self.step, index) / 2**64
        pool = bool(self.pool) and (coin < self.alpha or len(self.pool) == self.n_prompts)
        if pool:
            prompt = list(self.pool)[hash64(self.seed, 0, "place", self.step, index) % len(self.pool)]
        while not pool:                          # the queue: a permutation per epoch, without the pool's problems
            epoch, position = self.cursor
            if position == self.n_prompts:
                epoch, position = epoch + 1, 0
            if self._permutation[0] != epoch:
                order = sorted(range(self.n_prompts), key=lambda i: hash64(self.seed, "epoch", epoch, i))
                self._permutation = (epoch, order)
            self.cursor = (epoch, position + 1)
            prompt = self._permutation[1][position]
            if prompt not in self.pool:
                break
        G = self.G
        return Group(Task(self.step, index, prompt, pool), self.cursor, [None] * G, [None] * G, [None] * G, decoding=G)

    # ---- what came back ---------------------------------------------------------------------------------------------

    def advance(self, finished: list[tuple[Key, Any]], busy: int = 0, steps: int = 1) -> None:
        """
        The engines made `steps` decode steps. finished: [(key, sample)], of which len(sample.tokens) is used; busy:
        slots used, summed over the steps.
        """
        self.clock += steps
        self.busy += busy
        for key, sample in finished:
            group = self.in_engine.pop(key, None)
            if group is None:
                raise ValueError(f"sample {key} finished twice, or was not launched in step {self.step}")
            group.samples[key[2]] = sample
            group.decoding -= 1
            self.tokens += len(sample.tokens)
            if group.decoding == 0:
                group.due = self.clock + (self.reward_lag or 0)
                self.unapplied.append(group)

    def observe(self, outcomes: list[tuple[Key, float, Any]]) -> None:
        """Rewards from the judge, [(key, reward, info)], in any order, at any time. They are only stored here."""
        for key, reward, info in outcomes:
            step, index, i = key
            if step < self.step:
                continue                         # an aborted task of an earlier step that the judge had already begun
            if step > self.step or not 0 <= index < len(self.groups) or not 0 <= i < self.G:
                raise ValueError(f"no sample {key} in step {self.step}: {len(self.groups)} launches of {self.G}")
            group = self.groups[index]
            if group.rewards[i] is not None:
                raise ValueError(f"sample {key} was rewarded twice")
            if not (math.isfinite(reward) and 0 <= reward <= 1):
                raise ValueError(f"reward of sample {key} = {reward} should be a finite number in [0, 1]")
            group.rewards[i], group.infos[i] = float(reward), info

    def due(self) -> list[Group]:
        """
        Groups whose rewards enter the statistics at the next launch(), in launch order (first rule). All of their
        rewards must be observed before it, and the engines must not step until they are.
        """
        if not self.in_engine:                   # nothing left to decode: waiting for the clock would bring nothing
            due = self.unapplied
        elif self.reward_lag is None:
            due = [g for g in self.unapplied if None not in g.rewards]
        else:
            due = [g for g in self.unapplied if g.due <= self.clock]
        return sorted(due, key=lambda g: g.task.index)

    def late(self) -> list[Group]:
        """Groups that are due() and lack rewards, in launch order; launch() has to wait for them."""
        return [g for g in self.due() if None in g.rewards]

    def blocked(self, free: int) -> bool:
        """
        Must the engines rest until the rewards of late() are there? False if launch(free) would do nothing, whatever
        these rewards are: nothing more can start, and the step could not end if all of them were valid. Then all goes
        on, and the rewards enter before the first decision that depends on them (first rule).
        """
        late = self.late()
        if not late or not self.in_engine:       # nothing left to decode: nothing to go on with
            return bool(late)
        if free > 0 and len(self.groups) < (self.max_groups if self.dynamic else self.batch_size):
            return True
        most, ready = self.prefix_valid, {g.task.index for g in self.due()}
        for g in self.groups[self.n_prefix:]:
            if not (g.applied or g.task.index in ready):
                break
            most += g.valid if g.applied else None in g.rewards or self._has_signal(g)
        return most >= self.batch_size

    # ---- the end of a step ------------------------------------------------------------------------------------------

    def batch(self, slots: int = 0, aborted_tokens: int = 0) -> tuple[list[Group], dict]:
        """
        End the step. -> (selected groups in launch order, metrics). Commits launches 0..L and undoes the rest.

        slots (of all engines) and aborted_tokens (made by samples that were aborted) are used for the metrics only.
        RuntimeError when the step is not over.
        """
        if self.selected is None:
            raise RuntimeError("the step is not over: call batch() once `selected` is there")
        short = len(self.selected) < self.batch_size
        last = len(self.groups) if short else self.selected[-1].task.index + 1
        committed = [g for g in self.groups[:last] if g.applied]    # all of them, unless an ablation selects otherwise
        metrics = self._metrics(committed, slots, aborted_tokens)
        for g in committed:
            if min(g.rewards) >= 1 - TOL:
                self.pool[g.task.prompt] = None
            else:                                # the report says nothing of a relapse: here it returns to the queue
                self.pool.pop(g.task.prompt, None)
        metrics["pool_size"] = len(self.pool)
        self.rate = max(sum(g.valid for g in committed) / len(committed), 1 / self.max_groups)
        self.cursor = self.groups[last - 1].cursor                  # undone prompts are at the front of the queue again
        selected, self.step = self.selected, self.step + 1
        self._begin()
        return selected, metrics

    def _metrics(self, committed: list[Group], slots: int, aborted_tokens: int) -> dict:
        """What docs/rollout.md explains; shares and lengths are over committed groups, trained on or not."""
        n, pooled, used = len(committed), [g for g in committed if g.task.pool], self.selected
        solved = lambda g: min(g.rewards) >= 1 - TOL
        mean = lambda xs: sum(xs) / len(xs) if len(xs) else 0.0
        samples = [s for g in committed for s in g.samples]
        infos = [info for g in committed for info in g.infos if isinstance(info, dict)]
        verdicts = Counter(v for info in infos for v in info.get("verdicts", ()))
        lengths = sorted(len(s.tokens) for s in samples)
        useful = self.busy * self.tokens / max(1, self.tokens + aborted_tokens)     # aborted work counts as idle
        return {
            "groups_launched": len(self.groups),
            "groups_used": len(used),
            "groups_undone": len(self.groups) - n,
            "groups_aborted": sum(g.decoding > 0 for g in self.groups),
            "all0": sum(max(g.rewards) <= TOL for g in committed) / n,              # too hard
            "all1": sum(map(solved, committed)) / n,                                # too easy
            "valid": sum(g.valid for g in committed) / n,
            "reward_launched": mean([r for g in committed for r in g.rewards]),
            "pass_rate": mean([info["passed"] for info in infos if "passed" in info]),
            "truncated": mean([s.finish == "length" for s in samples]),
            "unparsable": mean([bool(UNPARSABLE & set(info.get("verdicts", ()))) for info in infos]),
            "verdicts": dict(verdicts),
            "length_mean": mean(lengths),
            "length_p95": lengths[int(0.95 * (len(lengths) - 1))],
            "reward_trained": mean([r for g in used for r in g.rewards]),
            "waste": (self.n_valid - len(used)) / self.batch_size,                  # Table 2: valid beyond the batch
            "slot_idle": 1 - useful / (slots * self.clock) if slots and self.clock else 0.0,
            "engine_steps": self.clock,
            "tokens": self.tokens,
            "aborted_tokens": aborted_tokens,
            "capped": float(len(used) < self.batch_size),
            "pool_draws": len(pooled) / n,                                          # launches that drew from the pool
            "pool_hit": mean([g.valid for g in pooled]),                            # draws that gave a training group
            "pool_regressed": mean([not solved(g) for g in pooled]),                # draws that left the pool
            "epoch": committed[-1].cursor[0],
        }

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Plain values for JSON. RuntimeError within a step: what is in flight would be lost."""
        if self.groups:
            raise RuntimeError(f"step {self.step} is in flight: checkpoint after batch()")
        return {"n_prompts": self.n_prompts, "seed": self.seed, "step": self.step, "cursor": list(self.cursor),
                "pool": list(self.pool), "rate": self.rate, "problems": self.problems}

    def load_state_dict(self, state: dict) -> None:
        """
        Go on where state_dict() was taken. UserError for other problems (queue and pool name them by number) or another
        seed. A checkpoint from before there were fingerprints is taken as it is.
        """
        for name in ("n_prompts", "seed"):
            if state[name] != getattr(self, name):
                raise UserError(f"{name} = {getattr(self, name)}, but the checkpoint has {state[name]}")
        if state.get("problems") and self.problems and state["problems"] != self.problems:
            raise UserError(f"these are not the {self.n_prompts} problems that the checkpoint was trained on: ids, "
                            f"questions or their order differ (fingerprint {self.problems}, saved {state['problems']});"
                            " give the same file, or another folder for a new run")
        self.step, self.cursor = state["step"], tuple(state["cursor"])
        self.pool, self.rate = dict.fromkeys(state["pool"]), state["rate"]
        self._begin()


# ---- the loop -------------------------------------------------------------------------------------------------------

class SingleProcess:
    """
    The exchange of a process that has no others beside it. Several processes use distributed.Exchange.

    exchange(state) -> the states of all ranks, in rank order, the same list on each; a state can be pickled.
    rank, world: as in distributed.Runtime. steps: decode steps in a round; it never changes a batch.
    """
    rank, world, steps = 0, 1, 1

    def __call__(self, state: RankState) -> list[RankState]:
        return [state]


class Ended(Exception):
    """The rollout is over on all ranks: one was closed, failed or is gone. Without words it was this rank's close()."""


class Stopped(Ended):
    """A rank was asked to stop (SIGTERM): all ranks drop the step in flight."""


class Rollout:
    """
    This rank's engine, in step with those of the other ranks: the header's loop, for one step of a scheduler.

    engine, exchange  see the header and SingleProcess
    judge_timeout     seconds of silence, while rewards are waited for, after which the judge is given up
    stop              stop() -> True once this process was asked to stop
    """

    def __init__(self, engine, exchange: Callable | None = None, judge_timeout: float = 600.0,
                 stop: Callable[[], bool] = lambda: False):
        self.engine, self.exchange, self.judge_timeout = engine, exchange or SingleProcess(), judge_timeout
        self.stop, self.closed = stop, False                # closed: this rank leaves, and so ends all

    def step(self, sched: Scheduler, grader, make_request: Callable, done: Callable = lambda group: None) -> dict:
        """
        Run sched until its step is over (sched.selected is there); what still runs then is the caller's to abort. done:
        called on every rank with each group whose rewards have entered, once. -> wall-clock numbers. Raises Ended when
        any rank ends, after aborting what it had in its engine, and RuntimeError when the judge is silent.
        """
        try:
            return self._step(sched, grader, make_request, done)
        except Ended:
            for key in sched.in_engine:
                self.engine.abort(key)
            raise

    def _step(self, sched: Scheduler, grader, make_request: Callable, done: Callable) -> dict:
        engine, rank, started = self.engine, self.exchange.rank, time.perf_counter()
        judge_wait, grading, grading_max, blocked = 0.0, 0, 0, False
        while sched.selected is None:
            # 1. engine steps: one round, shorter if the engine runs dry; none while rewards hold up a decision
            steps, busy, finished = 0, 0, []
            while not blocked and steps < self.exchange.steps and engine.active + engine.waiting:
                samples = [s for s in engine.step() if s.finish != "abort"]
                steps, busy, finished = steps + 1, busy + engine.active + len(samples), finished + samples
                # 2. submit: the judge grades while the engine goes on
                for s in samples:
                    grader.submit(s.id, sched.groups[s.id[1]].task, s)
                grading += len(samples)
                grading_max = max(grading_max, grading)
            began = time.perf_counter()
            outcomes = self._wait_for_judge(sched, grader) if blocked else grader.poll()
            waited = time.perf_counter() - began if blocked else 0.0
            grading -= sum(key[0] == sched.step for key, _, _ in outcomes)
            # 3. exchange: from here on every rank knows the same and decides the same
            happened, rooms = self.meet(RankState(steps, busy, [(s.id, s) for s in finished], outcomes, engine.room,
                                                  waited, stop=self.stop()))
            judge_wait += happened.waited
            # 4. advance and observe
            sched.advance(happened.finished, happened.busy, happened.steps)
            sched.observe(happened.outcomes)
            if sched.late():
                was, blocked = blocked, sched.blocked(sum(rooms))
                self.heard = self.heard if was and not outcomes else time.perf_counter()
                continue
            # 5. launch: a group goes to the rank with the most room
            blocked, due = False, sched.due()
            for task in sched.launch(free=sum(rooms)):
                group = sched.groups[task.index]
                group.rank = rooms.index(max(rooms))
                rooms[group.rank] -= sched.G
                for key in [task.key(i) for i in range(sched.G)] if group.rank == rank else ():
                    seed = hash64(sched.seed, 0, "sample", *key) >> 1                   # 63 bits, torch's range
                    engine.add(make_request(task, key[2], seed))
            for group in due:
                done(group)
        return {"rollout_s": time.perf_counter() - started, "judge_wait_s": judge_wait,
                "judge_queue_max": grading_max}

    def _wait_for_judge(self, sched: Scheduler, grader) -> list:
        """
        The outcomes that arrive until this rank owes no late reward, or a heartbeat has passed. RuntimeError when none
        has arrived for judge_timeout seconds of waiting.
        """
        own = {g.task.key(i) for g in sched.late() if g.rank == self.exchange.rank
               for i, r in enumerate(g.rewards) if r is None}
        outcomes, end = grader.poll(), time.perf_counter() + HEARTBEAT
        while (late := own - {key for key, _, _ in outcomes}) and not self.closed and not self.stop():
            if news := grader.poll():
                outcomes, self.heard = outcomes + news, time.perf_counter()
            elif time.perf_counter() - self.heard > self.judge_timeout:
                raise RuntimeError(f"the judge owes {len(late)} rewards, first {min(late)}, and has been silent for "
                                   f"{self.judge_timeout:.0f} s")
            elif time.perf_counter() > end:
                break
            else:
                time.sleep(0.001)
        return outcomes

    def meet(self, state: RankState) -> tuple[RankState, list[int]]:
        """
        The RankStates of all ranks as one, the same on each, but with this rank's own samples in place of their
        RemoteSample; and the room of each rank. Every rank calls it equally often, to its end. A rank that has to end
        sends an `error` or `stop`, and all ranks end at this call: raises Ended.
        """
        sent = RankState(error="") if self.closed else state
        if self.exchange.world > 1:
            sent = replace(sent, finished=[(key, RemoteSample(range(len(s.prompt)), range(len(s.tokens)), s.finish))
                                           for key, s in sent.finished])
        try:
            states = self.exchange(sent)
        except Exception as e:                              # gloo: a process is gone
            raise Ended(f"the rollout of rank {self.exchange.rank} lost the other ranks: {e}") from e
        if errors := [s.error for s in states if s.error]:
            raise Ended("; ".join(errors))
        if closed := [r for r, s in enumerate(states) if s.error == ""]:
            raise Ended("" if self.closed else f"rank {closed[0]} has closed its rollout thread")
        if any(s.stop for s in states):
            raise Stopped
        finished = dict(pair for s in states for pair in s.finished) | dict(state.finished)
        # a rank whose engine ran dry made fewer steps and then waited: the time that passed is the longest round's
        return RankState(max(s.steps for s in states), sum(s.busy for s in states), sorted(finished.items()),
                         [outcome for s in states for outcome in s.outcomes], waited=max(s.waited for s in states),
                         aborted_tokens=sum(s.aborted_tokens for s in states)), [s.room for s in states]


# ---- the thread -----------------------------------------------------------------------------------------------------

class RolloutThread:
    """
    The Rollout in one background thread; the trainer takes full batches.

    scheduler, engine, grader, make_request  see the header
    max_staleness   0 (report 3.4.1: training is not asynchronous): batch k is generated by the weights after k updates,
                    and the thread rests during the update. 1 [ours, opt-in]: batch k is generated by the weights after
                    k - 1 updates, during update k. It is always k - 1, never "the newest", so this repeats too; the
                    trainer corrects for it with batch.version
    evaluation      evaluation(version) -> (a new Scheduler, grader, make_request) of the evaluation that is due with
                    these weights, or None. It is run as soon as they are loaded, before they generate a batch
    last            step after which there is none (of the run, not of this thread); None: on and on
    more            of Rollout: exchange, judge_timeout, stop. exchange joins the threads of several ranks. take() gives
                    the same batch on each, in which the samples of other ranks are RemoteSample. An error on one rank
                    ends all; so does close(), and so does stop()

    An exception in the thread is raised again by take(), evaluated() and publish(), as RuntimeError.
    """

    def __init__(self, scheduler: Scheduler, engine, grader, make_request: Callable, max_staleness: int = 0,
                 evaluation: Callable = lambda version: None, last: int | None = None, **more):
        if max_staleness not in (0, 1):
            raise ValueError(f"max_staleness = {max_staleness} should be 0 or 1")
        self.sched, self.engine, self.grader, self.make_request = scheduler, engine, grader, make_request
        self.max_staleness, self.evaluation, self.last = max_staleness, evaluation, last
        self.rollout = Rollout(engine, **more)
        self.first = self.version = scheduler.step          # weights are named by the updates behind them
        self.weights: dict[int, Any] = {}                   # published and not yet loaded, by version
        self.ready: list[Batch] = []
        self.results: list[list[Group]] = []                # of evaluations
        self.error: BaseException | None = None
        self.stopped = self.stopping = False                # it was asked to stop; it is closed, or at its end
        self.changed = threading.Condition()                # guards the seven above
        self.thread = threading.Thread(target=self._run, name="rollout", daemon=True)
        self.thread.start()

    # ---- called by the trainer --------------------------------------------------------------------------------------

    def take(self) -> Batch | None:
        """The next batch; waits until it is full, or the cap is reached. None: stop() on some rank ended the thread."""
        return self._next(self.ready)

    def evaluated(self) -> list[Group] | None:
        """All groups of the next evaluation that evaluation() has asked for, in launch order. Waits; None as take()."""
        return self._next(self.results)

    def _next(self, queue: list):
        with self.changed:
            while not (queue or self.error or self.stopping or self.stopped):
                self.changed.wait(0.1)                      # wakes now and then, so that Ctrl-C works
            if not queue:
                self._check()
            return queue.pop(0) if queue else None

    def publish(self, weights: Iterable | None = None) -> None:
        """
        One more update is done. weights: what engine.load() takes, a copy that training will not write to; None if the
        engine shares the trained module (ValueError with max_staleness = 1, where it cannot).
        """
        if weights is None and self.max_staleness:
            raise ValueError("max_staleness = 1 generates during the update: publish(a copy of the weights)")
        with self.changed:
            self._check()
            self.version += 1
            self.weights[self.version] = weights
            self.changed.notify_all()

    def close(self, timeout: float = 10.0) -> None:
        """Stop the thread and abort what runs. Returns within `timeout` seconds even if the engine or a rank hangs."""
        with self.changed:
            self.stopping = self.rollout.closed = True
            self.changed.notify_all()
        self.thread.join(timeout)
        if self.thread.is_alive():
            print(f"rollout: the thread did not end within {timeout:.0f} s; left behind", file=sys.stderr)

    def _check(self) -> None:
        """RuntimeError when the thread has failed or was closed, UserError when it has failed with one."""
        if self.error is not None:
            if isinstance(self.error, UserError):           # a line for the person who runs it
                raise UserError(self._words(self.error)) from self.error
            raise RuntimeError(self._words(self.error)) from self.error
        if self.stopping:
            raise RuntimeError("the rollout thread is closed")

    def _words(self, error: BaseException) -> str:
        exchange = self.rollout.exchange
        of_rank = f" of rank {exchange.rank}" if exchange.world > 1 else ""
        if isinstance(error, Ended):
            return str(error)
        return f"the rollout thread{of_rank} failed: {error if isinstance(error, UserError) else repr(error)}"

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Batches until the last, close(), stop() or an error; the error is kept and told to the other ranks."""
        error, loaded, stopped = None, None, False
        try:
            for step in itertools.count(self.first):
                version = max(self.first, step - self.max_staleness)        # of the weights for batch `step`
                self._load(version)
                job = self.evaluation(version) if version != loaded else None
                loaded = version
                if job:
                    self.rollout.step(*job)
                    self._hand_over(self.results, job[0].selected)
                if self.last is None or step < self.last:
                    self._hand_over(self.ready, self._batch(version))
                elif version == self.last:                  # the weights behind the last batch are evaluated too
                    break
        except Stopped:
            stopped = True
        except Ended as e:
            error = e if str(e) else None
        except BaseException as e:  # noqa: B036  it is raised again in the trainer
            error = e
            with suppress(Ended):                           # the other ranks wait for this rank's state: end them
                self.rollout.meet(RankState(error=self._words(e)))
        finally:
            with self.changed:
                self.error, self.stopped = error, stopped
                self.stopping = self.stopping or not stopped
                self.changed.notify_all()

    def _load(self, version: int) -> None:
        """Wait for the weights of this version and give them to the engine; the first ones are there."""
        with self.changed:
            while version != self.first and version not in self.weights and not self.stopping:
                self.changed.wait()
            weights = self.weights.pop(version, None)
        if version != self.first and not self.stopping:
            self.engine.load(weights)                       # None: the trainer has written them into the engine's model

    def _hand_over(self, queue: list, result: Any) -> None:
        with self.changed:
            queue.append(result)
            self.changed.notify_all()

    def _batch(self, version: int) -> Batch:
        """One step of the scheduler, from its first launch to its batch; `version` names the engine's weights."""
        sched, engine = self.sched, self.engine
        timing = self.rollout.step(sched, self.grader, self.make_request)
        # the batch is there: abort what still runs, commit the launches up to the last selected one
        partial = [sample for key in sched.in_engine if (sample := engine.abort(key))]   # None for other ranks' samples
        total, rooms = self.rollout.meet(RankState(aborted_tokens=sum(len(s.tokens) for s in partial)))
        groups, metrics = sched.batch(slots=engine.slots * len(rooms), aborted_tokens=total.aborted_tokens)
        note = ""
        if metrics["capped"]:
            note = (f"step {sched.step - 1}: {len(groups)} of {sched.batch_size} groups after the cap of "
                    f"{sched.max_groups} launches, training on what is there "
                    f"(all 0: {metrics['all0']:.0%}, all 1: {metrics['all1']:.0%})")
        return Batch(groups, metrics, timing, version, sched.state_dict(), note)
