"""The Seamless Rollout Engine (report 3.4.1): continuous rollout, asynchronous reward, early termination; and
the dynamic sampling (3.3) and easy data pool (3.3.2) that decide what is rolled out. No torch, no judge, no
engine is imported: the scheduler drives a real engine, or a fake one with a virtual clock, alike.

    sched = Scheduler(n_prompts=len(problems), batch=32, G=8, seed=1)
    rollout = RolloutThread(sched, engine, judge, make_request)
    for _ in range(sched.step, steps):
        batch = rollout.take()        # blocks; Batch(groups, metrics, timing, version, state, note)
        for g in batch.groups: ...    # g.task.prompt, g.samples[i], g.rewards[i], g.infos[i], i < G; the list
                                      # may be short or even empty (cap reached; batch.note says so)
        rollout.publish(weights)      # the update is done; None if the engine shares the trained module
        ...                           # save batch.state; to resume, sched.load_state_dict(state) comes first
    rollout.close()

    make_request(task, i, seed) -> Request with id = task.key(i); seed = hash(run seed, step, launch, sample)
    judge: submit(key, task, sample); poll() -> [(key, reward, info), ...], non-blocking, in any order
    engine: add(request), step() -> finished samples, abort(id), load(weights); counts slots, active, waiting
    sample: id, prompt, tokens, finish ("abort" for one that abort() cut)

THE RULE that makes a run bit-equal for every judge latency and any number of judge workers: no decision looks
at when a reward arrived. The rewards of a group are applied when the engine has made exactly `reward_lag`
steps after the group's last sample finished: not sooner, though they may be there; not later, for the engine
waits for them. When nothing is left to decode they are applied at once; several at one step are applied in
launch order. So what is launched, when, beside whom in the engine's batch, and what is aborted are functions
of decode steps alone. reward_lag = 0 is a synchronous reward. None applies rewards as they come (the report's
way): then the trained batches are the same only if the engine is batch-invariant, and aborted work varies.

THE SECOND RULE: launch k of a step is a pure function of (state at the start of the step, k), and the step
commits only launches 0..L, L the last selected one. Later launches were speculation and are undone: their
prompts go back to the front of the queue (the cursor steps back), their results touch neither pool nor
statistics. Hence no prompt is lost, and long answers are not selected against.

SEVERAL PROCESSES, ONE SCHEDULER. Each rank has an engine and a judge, and a replica of the one scheduler. After a
round of decode steps the ranks exchange what happened (which samples ended, the rewards that came), and every
replica is told the same, in the same order: so all take the same decisions, and there is no master. A launch goes
to the rank with the fewest samples; by the second rule it does not matter which. So prompts, launch order, pool,
batches and checkpoints are global, and in exact arithmetic the same for every number of ranks. SingleProcess, a round is
one step and nothing is exchanged.

Differs from the report: it is silent on a cap, on aborted prompts, on a pool problem that is solved again
(here it stays, its group is dropped), and on reproducibility. Tables 2 and 3: python paper/table2.py.
"""

import hashlib
import math
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

Key = tuple[int, int, int]  # (step, launch index, sample index): names a sample for ever, whatever its text


def hash64(*key) -> int:
    """64 bits that depend on `key` (ints and strings) alone: no generator state, so no order effects."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Task:
    """One prompt group to generate: G samples of problem number `prompt`."""

    step: int  # RL iteration
    index: int  # launch order within the step; everything is decided by it
    prompt: int  # index into the list of problems
    pool: bool  # drawn from the easy pool

    def key(self, i: int) -> Key:
        return (self.step, self.index, i)


@dataclass
class Group:
    """What is known of a launched task. A group has exactly G members and is kept or dropped whole."""

    task: Task
    cursor: tuple[int, int]  # (epoch, position) of the prompt queue after this launch
    samples: list  # engine samples, by sample index; None while decoding
    rewards: list  # float in [0, 1]; None until graded
    infos: list  # whatever the judge adapter says beside the reward
    decoding: int  # members still in the engine
    due: int | None = None  # the clock at which its rewards are applied
    applied: bool = False  # its rewards have entered the statistics
    valid: bool = False  # has a learning signal: reward range > tol (without dynamic sampling: all)
    rank: int = 0  # whose engine generates it


@dataclass(frozen=True)
class RemoteSample:
    """What a rank knows of a sample in another rank's memory: its sizes, and how it ended."""

    prompt: range
    tokens: range
    finish: str


@dataclass
class Batch:
    groups: list[Group]  # selected, in launch order; fewer than `batch` only when the cap was reached
    metrics: dict  # deterministic numbers of the step
    timing: dict  # wall-clock numbers of the step: the only part that depends on the judge's speed
    version: int  # updates behind the weights that generated it (behaviour policy)
    state: dict  # scheduler state after this step, for the checkpoint
    note: str = ""  # says so when the batch is short


class Scheduler:
    """Decides what is launched, when a step stops, and what is trained on. One object for the whole run.

    n_prompts   problems, numbered 0..n_prompts-1; the caller keeps them
    batch       valid groups per step (report 3.3.3: 512)
    G           samples per group
    alpha       probability that a launch draws from the easy pool (report: 0.1); 0: solved problems are gone
                for good; None: no pool, they stay in the ordinary queue
    dynamic     False: launch exactly `batch` groups and train on all of them
    launch      "continuous": on demand, by the step's pass rates; "wave": `batch` groups at a time
    stop        "fifo": report 3.4.1 (c);  "drain": wait for all that was launched;
                "first": the first to finish, wrong on purpose (prefers short answers), for comparison only
    reward_lag  decode steps from the end of a group to the use of its rewards; None: as they come (header)
    max_groups  cap on launches per step, default 8 * batch: then the step trains on what is there
    rate        expected share of valid groups before anything is known; later the last step's share
    Raises ValueError for settings out of range, unknown or repeated results, rewards outside [0, 1].
    """

    def __init__(self, n_prompts: int, batch: int, G: int, seed: int = 0, alpha: float | None = 0.1,
                 dynamic: bool = True, launch: str = "continuous", stop: str = "fifo",
                 reward_lag: int | None = 16, max_groups: int | None = None, tol: float = 1e-6,
                 rate: float = 0.5):
        if min(n_prompts, batch, G) < 1:
            raise ValueError(f"n_prompts, batch, G = {n_prompts}, {batch}, {G} should all be at least 1")
        if dynamic and G < 2:
            raise ValueError("G = 1 has no reward range: dynamic sampling drops every group; use G >= 2")
        if launch not in ("continuous", "wave") or stop not in ("fifo", "drain", "first"):
            raise ValueError(f"launch={launch!r}, stop={stop!r} should be continuous|wave, fifo|drain|first")
        if alpha is not None and not 0 <= alpha <= 1 or not 0 < rate <= 1:
            raise ValueError(f"alpha = {alpha} should be None or in [0, 1]; rate = {rate} in (0, 1]")
        if reward_lag is not None and reward_lag < 0:
            raise ValueError(f"reward_lag = {reward_lag} should be None or >= 0")
        self.n_prompts, self.batch_size, self.G, self.seed = n_prompts, batch, G, seed
        self.alpha, self.dynamic, self.launch_mode, self.stop_mode = alpha, dynamic, launch, stop
        self.reward_lag, self.tol = reward_lag, tol
        self.max_groups = (8 * batch if dynamic else batch) if max_groups is None else max_groups
        if self.max_groups < batch:
            raise ValueError(f"max_groups = {self.max_groups} should be at least batch = {batch}")
        # all that lives across steps, and all that a checkpoint holds
        self.step = 0
        self.cursor = (0, 0)  # (epoch, position) in that epoch's permutation of the problems
        self.pool: dict[int, None] = {}  # easy pool, in order of arrival (a dict keeps the order, finds fast)
        self.rate = rate
        self._perm: tuple[int, list[int]] = (-1, [])
        self._begin()

    def _begin(self):
        """Nothing in flight: the only state a checkpoint ever sees."""
        self.groups: list[Group] = []  # by launch index
        self.decoding = 0  # samples in the engine, or engines
        self.ungraded: list[Group] = []  # decoded, rewards not applied yet
        self.order: list[int] = []  # launch indices in the order in which they were applied
        self.head = 0  # groups[:head] have all completed: the front of first-in-first-out
        self.n_valid = self.head_valid = 0  # valid groups applied so far; those among groups[:head]
        self.clock = 0  # engine steps made in this RL step
        self.busy = self.tokens = 0  # slot-steps used; tokens of the finished samples
        self.selected: list[Group] | None = None  # the batch, once the step is over

    # ---- what to launch --------------------------------------------------------------------------

    def _next_prompt(self) -> int:
        """The front of the prompt queue: a seeded permutation per epoch, without the pool's problems."""
        while True:
            epoch, position = self.cursor
            if position == self.n_prompts:
                epoch, position = epoch + 1, 0
            if self._perm[0] != epoch:
                ids = sorted(range(self.n_prompts), key=lambda i: hash64(self.seed, "epoch", epoch, i))
                self._perm = (epoch, ids)
            self.cursor = (epoch, position + 1)
            if (prompt := self._perm[1][position]) not in self.pool:
                return prompt

    def _draw(self) -> Group:
        # 3.3.2: with probability alpha a rollout draws from the pool. Coin and place are hashes of the launch
        # index, and the pool does not change within a step: a function of (state at step start, index)
        index = len(self.groups)
        coin = hash64(self.seed, 0, "coin", self.step, index) / 2**64  # the 0 only keeps old runs repeatable
        pool = bool(self.pool) and (coin < self.alpha or len(self.pool) == self.n_prompts)
        if pool:
            place = hash64(self.seed, 0, "place", self.step, index) % len(self.pool)
            prompt = list(self.pool)[place]
        else:
            prompt = self._next_prompt()
        task, G = Task(self.step, index, prompt, pool), self.G
        return Group(task, self.cursor, [None] * G, [None] * G, [None] * G, decoding=G)

    def _wanted(self) -> bool:
        """Launch one more? Decided by the pass rates of this step, starting from the last step's."""
        running = len(self.groups) - len(self.order)  # decoding, or waiting for rewards
        if len(self.groups) >= self.max_groups or self.selected is not None:
            return False
        if not self.dynamic:
            return len(self.groups) < self.batch_size
        if self.launch_mode == "wave":
            wave_open = len(self.groups) % self.batch_size != 0  # `free` may cut a wave into several calls
            return wave_open or (running == 0 and self.n_valid < self.batch_size)
        # p from the launch-ordered prefix alone: of all completed groups, the short come first, and short is
        # easy is not valid, so that estimate is too low and over-launches (waste 0.75 of a batch, not 0.16).
        # p = (valid + w p0) / (completed + w): last step's rate p0 counts as w groups
        w = max(1, self.batch_size // 4)
        p = (self.head_valid + w * self.rate) / (self.head + w)
        # 3.4.1 (a): launch only if   valid + p * running < batch
        return self.n_valid + p * running < self.batch_size

    def launch(self, free: int | None = None) -> list[Task]:
        """Apply the rewards that are due, stop or go on, return new tasks (G samples each for the engine).

        free: sample slots the engine has to spare; a launch that could not start yet is better decided later.
        RuntimeError while rewards are missing()."""
        self._apply()
        self._maybe_stop()
        tasks = []
        while (free is None or free > 0) and self._wanted():
            self.groups.append(self._draw())
            self.decoding += self.G
            tasks.append(self.groups[-1].task)
            free = None if free is None else free - self.G
        return tasks

    def sample_seed(self, key: Key) -> int:
        """Seed of one sample's generator, independent of scheduling and of the sample's neighbours."""
        return hash64(self.seed, 0, "sample", *key) >> 1  # 63 bits, torch's range

    # ---- what came back --------------------------------------------------------------------------

    def advance(self, finished: list, busy: int = 0, steps: int = 1):
        """The engine made one step, or several ones between two decisions.

        finished: [(key, sample)], any object with a sized .tokens; busy: slot-steps used, over all steps."""
        self.clock += steps
        self.busy += busy
        for key, sample in finished:
            group, i = self._find(key)
            if group.samples[i] is not None:
                raise ValueError(f"sample {key} finished twice")
            group.samples[i] = sample
            group.decoding -= 1
            self.decoding -= 1
            self.tokens += len(sample.tokens)
            if group.decoding == 0:
                group.due = self.clock + (self.reward_lag or 0)
                self.ungraded.append(group)

    def observe(self, outcomes: list):
        """Rewards from the judge, [(key, reward, info)], in any order, at any time: only filed here."""
        for key, reward, info in outcomes:
            if key[0] < self.step:
                continue  # an aborted task of an earlier step that the judge had already begun
            group, i = self._find(key)
            if group.rewards[i] is not None:
                raise ValueError(f"sample {key} was rewarded twice")
            if not (math.isfinite(reward) and 0 <= reward <= 1):
                raise ValueError(f"reward of sample {key} = {reward} should be a finite number in [0, 1]")
            group.rewards[i], group.infos[i] = float(reward), info

    def _find(self, key: Key) -> tuple[Group, int]:
        step, index, i = key
        if step != self.step or not 0 <= index < len(self.groups) or not 0 <= i < self.G:
            raise ValueError(f"no sample {key} in step {self.step}: {len(self.groups)} launches of {self.G}")
        return self.groups[index], i

    def _ripe(self) -> list[Group]:
        """Groups whose rewards must enter the statistics now, in launch order."""
        if self.decoding == 0:  # the clock stands still: waiting longer would tell nothing
            ripe = self.ungraded
        elif self.reward_lag is None:
            ripe = [g for g in self.ungraded if None not in g.rewards]
        else:
            ripe = [g for g in self.ungraded if g.due <= self.clock]
        return sorted(ripe, key=lambda g: g.task.index)

    def missing(self) -> list[Key]:
        """Rewards to be observed before the next launch(): the engine must not step until this is empty."""
        return [g.task.key(i) for g in self._ripe() for i in range(self.G) if g.rewards[i] is None]

    def _apply(self):
        if missing := self.missing():
            raise RuntimeError(f"{len(missing)} rewards are due but not observed, first {missing[0]}")
        for g in self._ripe():
            # dynamic sampling drops pass rates 0 and 1: by range, for std == 0 fails by rounding
            g.valid = not self.dynamic or max(g.rewards) - min(g.rewards) > self.tol
            g.applied = True
            self.order.append(g.task.index)
            self.ungraded.remove(g)
            self.n_valid += g.valid
        while self.head < len(self.groups) and self.groups[self.head].applied:
            self.head_valid += self.groups[self.head].valid
            self.head += 1

    # ---- when to stop ----------------------------------------------------------------------------

    def _maybe_stop(self):
        if self.selected is not None or not self.groups:
            return
        quiet = len(self.order) == len(self.groups)  # nothing running, nothing ungraded
        full = self.n_valid >= self.batch_size
        if self.stop_mode == "fifo":
            # 3.4.1 (c): the batch is full AND every task launched before the selected ones has completed
            stop = self.head_valid >= self.batch_size
        else:
            stop = full and (quiet or self.stop_mode == "first")
        if stop or quiet and len(self.groups) >= self.max_groups:
            order = self.order if self.stop_mode == "first" else range(len(self.groups))
            valid = [self.groups[k] for k in order if self.groups[k].valid]
            self.selected = sorted(valid[: self.batch_size], key=lambda g: g.task.index)

    def done(self) -> bool:
        """The step is over: abort what aborts() names, then batch()."""
        return self.selected is not None

    def aborts(self) -> list[Key]:
        """Samples still in the engine: to be aborted once the step is done."""
        return [g.task.key(i) for g in self.groups for i in range(self.G) if g.samples[i] is None]

    def batch(self, slots: int = 0, aborted_tokens: int = 0) -> tuple[list[Group], dict]:
        """End the step: (selected groups in launch order, metrics). Commits launches 0..L, undoes the rest.

        slots of the engine and tokens of the aborted samples are only for the metrics."""
        if self.selected is None:
            raise RuntimeError("the step is not over: call batch() once done()")
        short = len(self.selected) < self.batch_size
        last = len(self.groups) if short else self.selected[-1].task.index + 1
        kept = [g for g in self.groups[:last] if g.applied]  # all of groups[:last], but for stop="first"
        metrics = self._metrics(kept, slots, aborted_tokens)
        for g in kept if self.alpha is not None else []:
            solved = min(g.rewards) >= 1 - self.tol
            if solved:
                self.pool[g.task.prompt] = None
            else:  # 3.3.2 says nothing of a relapse: here it goes back to the ordinary queue
                self.pool.pop(g.task.prompt, None)
        metrics["pool_size"] = len(self.pool)
        self.rate = max(sum(g.valid for g in kept) / len(kept), 1 / self.max_groups)
        self.cursor = self.groups[last - 1].cursor  # aborted prompts are the front of the queue again
        selected, self.step = self.selected, self.step + 1
        self._begin()
        return selected, metrics

    def _metrics(self, kept: list[Group], slots: int, aborted_tokens: int) -> dict:
        n, pooled = len(kept), [g for g in kept if g.task.pool]
        mean = lambda xs: sum(xs) / len(xs) if len(xs) else 0.0
        full = lambda g: min(g.rewards) >= 1 - self.tol
        used = self.selected or []
        useful = self.busy * self.tokens / max(1, self.tokens + aborted_tokens)  # aborted work counts as idle
        return {
            "groups_launched": len(self.groups),
            "groups_used": len(used),
            "groups_undone": len(self.groups) - n,
            "groups_aborted": sum(g.decoding > 0 for g in self.groups),
            "all0": sum(max(g.rewards) <= self.tol for g in kept) / n,  # too hard
            "all1": sum(map(full, kept)) / n,  # too easy
            "valid": sum(g.valid for g in kept) / n,
            "reward_launched": mean([r for g in kept for r in g.rewards]),  # over all that counts
            "pass_rate": mean([info["passed"] for g in kept for info in g.infos if info and "passed" in info]),
            "reward_trained": mean([r for g in used for r in g.rewards]),
            "waste": (self.n_valid - len(used)) / self.batch_size,  # Table 2: valid beyond the batch / batch
            "slot_idle": 1 - useful / (slots * self.clock) if slots and self.clock else 0.0,
            "engine_steps": self.clock,
            "tokens": self.tokens,
            "aborted_tokens": aborted_tokens,
            "capped": float(len(used) < self.batch_size),
            "pool_draws": len(pooled) / n,  # share of launches that drew from the pool
            "pool_hit": mean([g.valid for g in pooled]),  # draws that gave a training group
            "pool_regressed": mean([not full(g) for g in pooled]),  # draws that left the pool
            "epoch": kept[-1].cursor[0],
        }

    # ---- resume ----------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """JSON-able; only between steps (else RuntimeError), so nothing is in flight that could be lost."""
        if self.groups:
            raise RuntimeError(f"step {self.step} is in flight: checkpoint after batch()")
        return {"n_prompts": self.n_prompts, "seed": self.seed, "step": self.step,
                "cursor": list(self.cursor), "pool": list(self.pool), "rate": self.rate}

    def load_state_dict(self, state: dict):
        for name in ("n_prompts", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name} = {getattr(self, name)}, but the checkpoint has {state[name]}")
        self.step, self.cursor = state["step"], tuple(state["cursor"])
        self.pool, self.rate = dict.fromkeys(state["pool"]), state["rate"]
        self._begin()


class SingleProcess:
    """The exchange of a process without others. distributed.Exchange is the one between processes.

    exchange(state) -> the state of all ranks, by rank, the same on each; they are compact and can be pickled.
    steps: decode steps between two exchanges, the same on all ranks; its size never changes a batch."""

    rank, world, steps = 0, 1, 1

    def __call__(self, state) -> list:
        return [state]


class Ended(Exception):
    """The rollout is over on all ranks: one of them was closed, failed or is gone. Empty: it was this one's close()."""


class RolloutThread:
    """engine.step() -> judge.submit() -> scheduler.observe(judge.poll()) -> engine.add(scheduler.launch()),
    in one background thread; the trainer takes full batches.

    max_staleness 0 (report 3.4.1: not asynchronous training): batch k is generated by version k, the weights
    after k updates; the thread rests during the update. max_staleness 1 (ours, opt-in): batch k is generated
    by version k-1, during the update that makes version k; exactly k-1, never "the newest", so this too is
    reproducible. The trainer weighs by batch.version. What the thread raises comes out of take() and
    publish(); a judge that says nothing for judge_timeout seconds while rewards are due is such an error.

    exchange (SingleProcess) joins the threads of several ranks. take() then gives the same batch on each; of a group's
    samples those of other ranks (group.rank) are RemoteSample. What one rank's thread raises, all raise; to close()
    one is to end all.
    """

    def __init__(self, scheduler: Scheduler, engine, judge, make_request, max_staleness: int = 0,
                 judge_timeout: float = 600.0, exchange=None):
        if max_staleness not in (0, 1):
            raise ValueError(f"max_staleness = {max_staleness} should be 0 or 1")
        self.sched, self.engine, self.judge, self.make_request = scheduler, engine, judge, make_request
        self.max_staleness, self.judge_timeout = max_staleness, judge_timeout
        self.exchange = exchange or SingleProcess()
        self.first = self.version = scheduler.step  # weights are named by the updates behind them
        self.weights = {}  # published and not yet loaded, by version
        self.ready: list[Batch] = []
        self.error: BaseException | None = None
        self.stopping = False
        self.changed = threading.Condition()  # guards the five above
        self.thread = threading.Thread(target=self._run, name="rollout", daemon=True)
        self.thread.start()

    # ---- the trainer's side ----------------------------------------------------------------------

    def take(self) -> Batch:
        """The next batch; blocks until it is full (or the cap is reached)."""
        with self.changed:
            while not self.ready:
                self._check()
                self.changed.wait(0.1)  # wakes now and then, so that Ctrl-C works
            return self.ready.pop(0)

    def publish(self, weights=None):
        """One more update is done. weights: for engine.load(), a snapshot that training will not write to;
        None if the engine shares the trained module (ValueError with max_staleness = 1, which cannot)."""
        if weights is None and self.max_staleness:
            raise ValueError("max_staleness = 1 generates during the update: publish(a copy of the weights)")
        with self.changed:
            self._check()
            self.version += 1
            self.weights[self.version] = weights
            self.changed.notify_all()

    def close(self, timeout: float = 10.0):
        """Stop the thread, aborting what runs. Returns within `timeout` seconds even if the engine hangs, or
        another rank that does not close()."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self.thread.join(timeout)
        if self.thread.is_alive():
            print(f"rollout: the thread did not end within {timeout:.0f} s; left behind", file=sys.stderr)

    def _check(self):
        if self.error is not None:
            raise RuntimeError(self._says(self.error)) from self.error
        if self.stopping:
            raise RuntimeError("the rollout thread is closed")

    def _says(self, error: BaseException) -> str:
        of_rank = f" of rank {self.exchange.rank}" if self.exchange.world > 1 else ""
        return str(error) if isinstance(error, Ended) else f"the rollout thread{of_rank} failed: {error!r}"

    # ---- the thread's side -----------------------------------------------------------------------

    def _run(self):
        error = None
        try:
            self._work()
        except Ended as e:
            error = e if str(e) else None
            for key in self._mine(self.sched.aborts()):
                self.engine.abort(key)
        except BaseException as e:  # noqa: B036  it is raised again in the trainer
            error = e
            with suppress(Ended):  # instead of the state that the other ranks wait for: there it ends them
                self._share(self._says(e))
        finally:
            with self.changed:
                self.error = error
                self.changed.notify_all()

    def _work(self):
        while True:
            wanted = max(self.first, self.sched.step - self.max_staleness)  # the version for this batch
            with self.changed:
                while wanted != self.first and wanted not in self.weights and not self.stopping:
                    self.changed.wait()
                weights = self.weights.pop(wanted, None)
            if weights is not None and not self.stopping:
                self.engine.load(weights)
                weights = None  # a copy of the model: do not keep it while generating
            batch = self._one_batch(wanted)
            with self.changed:
                self.ready.append(batch)
                self.changed.notify_all()

    def _share(self, state) -> list:
        """The state of every rank, by rank. Every thread calls this equally often, to its end: a rank that has
        to end puts in None (closed) or a str (why), and all ranks end at this call with Ended."""
        try:
            shared = self.exchange(None if self.stopping else state)
        except Exception as e:  # gloo: a process is gone
            raise Ended(f"the rollout thread of rank {self.exchange.rank} lost the other ranks: {e}") from e
        if why := [part for part in shared if isinstance(part, str)]:
            raise Ended("; ".join(why))
        if None in shared:
            raise Ended("" if self.stopping else f"rank {shared.index(None)} has closed its rollout thread")
        return shared

    def _mine(self, keys: list[Key]) -> list[Key]:
        return [key for key in keys if self.sched.groups[key[1]].rank == self.exchange.rank]

    def _one_batch(self, version: int) -> Batch:
        """One step of the scheduler, start to end."""
        sched, engine, world, started = self.sched, self.engine, self.exchange.world, time.perf_counter()
        judge_wait, queue, queue_max = 0.0, 0, 0
        load = [0] * world  # samples in each rank's engine
        steps, busy, ended = 0, 0, []  # this rank's last round
        while True:
            outcomes = self.judge.poll()
            queue -= sum(key[0] == sched.step for key, _, _ in outcomes)
            brief = [(s.id, RemoteSample(range(len(s.prompt)), range(len(s.tokens)), s.finish)) for s in ended]
            shared = self._share((steps, busy, brief, outcomes))
            finished = dict(pair for part in shared for pair in part[2]) | {s.id: s for s in ended}
            # a rank whose engine ran dry made fewer steps and waited: the others' steps are the time that passed
            sched.advance(sorted(finished.items(), key=lambda pair: pair[0]),
                          busy=sum(part[1] for part in shared), steps=max(part[0] for part in shared))
            for rank, part in enumerate(shared):
                load[rank] -= len(part[2])
                sched.observe(part[3])
            if sched.missing():  # the rule: the engines wait for rewards that are due
                waited = time.perf_counter()
                queue -= self._wait_for_judge()
                judge_wait += time.perf_counter() - waited
            for task in sched.launch(free=sum(max(0, engine.slots - n) for n in load)):
                group = sched.groups[task.index]
                group.rank = load.index(min(load))  # the least loaded, by state that all ranks share
                load[group.rank] += sched.G
                for key in self._mine([task.key(i) for i in range(sched.G)]):
                    engine.add(self.make_request(task, key[2], sched.sample_seed(key)))
            if sched.done():
                break
            steps, busy, ended = 0, 0, []
            while steps < self.exchange.steps and engine.active + engine.waiting:
                samples = [s for s in engine.step() if s.finish != "abort"]
                for s in samples:
                    self.judge.submit(s.id, sched.groups[s.id[1]].task, s)
                queue += len(samples)
                queue_max = max(queue_max, queue)
                steps, busy, ended = steps + 1, busy + engine.active + len(samples), ended + samples
        partial = [engine.abort(key) for key in self._mine(sched.aborts())]
        aborted_tokens = sum(self._share(sum(len(s.tokens) for s in partial if s is not None)))
        groups, metrics = sched.batch(slots=engine.slots * world, aborted_tokens=aborted_tokens)
        note = ""
        if metrics["capped"]:
            note = (f"step {sched.step - 1}: {len(groups)} of {sched.batch_size} groups after the cap of "
                    f"{sched.max_groups} launches, training on what is there "
                    f"(all 0: {metrics['all0']:.0%}, all 1: {metrics['all1']:.0%})")
        seconds = time.perf_counter() - started
        timing = {"rollout_s": seconds, "judge_wait_s": judge_wait, "judge_queue_max": queue_max}
        return Batch(groups, metrics, timing, version, sched.state_dict(), note)

    def _wait_for_judge(self) -> int:
        """Wait for the rewards of this rank's samples that are due, share them; returns how many came here."""
        due, came, deadline = set(self._mine(self.sched.missing())), [], time.perf_counter() + self.judge_timeout
        while due and not self.stopping:
            outcomes = self.judge.poll()
            came += outcomes
            due -= {key for key, _, _ in outcomes}
            if not outcomes:
                if time.perf_counter() > deadline:
                    raise RuntimeError(f"the judge owes {len(due)} rewards, first {min(due)}, for "
                                       f"{self.judge_timeout:.0f} s")
                time.sleep(0.001)
        for outcomes in self._share(came):
            self.sched.observe(outcomes)
        return sum(key[0] == self.sched.step for key, _, _ in came)
