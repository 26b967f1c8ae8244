"""Simulate embedding, preparing and pretraining on many machines; the tables are those of docs/scaling.md.

Discrete events: blocks of pieces go through stages of workers; workers are slow or lost; a store serves all at a
bounded rate; the first process hands out blocks one by one. `ray_waits.py` measures small cases, which the simulation
reproduces; what it is asked then rests on the inputs of `inputs()`, each with its source. `python -m
benchmarks.scaling_plan` writes the tables.
"""

import heapq
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np

from benchmarks import memory_model as memory
from benchmarks import ray_waits
from benchmarks.scaling_model import H100, plan_step
from tahoex1_hf.training.flops import embedding_flops


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline.

    Attributes:
        name: Name in tables.
        workers: Number of workers.
        seconds: Seconds that a worker takes for a block.
        moved: Bytes between store and worker for a block, read and written.
        factors: Factor by which each of the first workers is slower; the others are not.
        ahead: Blocks that a worker has, the one that it works on included.
    """

    name: str
    workers: int
    seconds: float
    moved: float = 0.0
    factors: tuple[float, ...] = ()
    ahead: int = 2


@dataclass(frozen=True)
class Losses:
    """Losses of workers of one stage.

    Attributes:
        stage: Number of the stage.
        restart: Seconds until a lost worker is there again.
        every: Mean seconds between two losses of a machine; infinite for none by chance.
        together: Workers that a machine has, which are lost together.
        calls: Numbers of the calls in the middle of which their worker is lost.
    """

    stage: int
    restart: float
    every: float = float("inf")
    together: int = 1
    calls: tuple[int, ...] = ()


@dataclass
class Worker:
    """A worker: its blocks, the first of which it works on while `ends` is set, and its past."""

    stage: int
    factor: float
    blocks: deque[int] = field(default_factory=deque)
    alive: bool = True
    working: bool = False
    life: int = 0
    busy: float = 0.0

    def take(self, waiting: deque[int]) -> None:
        """Take the first of the blocks that wait."""
        self.blocks.append(waiting.popleft())


@dataclass(frozen=True)
class Outcome:
    """What a simulated run took.

    Attributes:
        ends: Seconds at which blocks left the last stage, in order.
        busy: Share of the time in which each stage's workers, the store and the first process were busy, by name.
        lost: Number of losses.
        again: Number of blocks that were worked on again.
    """

    ends: list[float]
    busy: dict[str, float]
    lost: int
    again: int


class Simulation:
    """A run of blocks through stages.

    Args:
        stages: Stages, in order.
        blocks: Number of blocks.
        store: Bytes per second of the store, for all together.
        hand_out: Seconds of the first process for each block.
        losses: Losses of workers, or None.
        seed: Seed of the moments of losses.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        blocks: int,
        *,
        store: float = float("inf"),
        hand_out: float = 0.0,
        losses: Losses | None = None,
        seed: int = 0,
    ):
        self.stages, self.count, self.store, self.hand_out, self.losses = stages, blocks, store, hand_out, losses
        self.random = np.random.default_rng(seed)
        self.workers = [
            [Worker(number, stage.factors[i] if i < len(stage.factors) else 1.0) for i in range(stage.workers)]
            for number, stage in enumerate(stages)
        ]
        # Living workers of each stage by the number of their blocks; a dictionary keeps their order.
        self.loads: list[list[dict[int, Worker]]] = [
            [{id(worker): worker for worker in group}, *({} for _ in range(stage.ahead))]
            for stage, group in zip(stages, self.workers, strict=True)
        ]
        self.waiting: list[deque[int]] = [deque() for _ in stages]
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.now = self.store_free = self.store_busy = 0.0
        self.made = self.calls = self.lost = self.again = self.handed = 0
        self.ends: list[float] = []
        self.handing = False

    def at(self, time: float, event: Callable[[], None]) -> None:
        """Let something happen at a time."""
        self.made += 1
        heapq.heappush(self.events, (time, self.made, event))

    def run(self) -> Outcome:
        """Run to the end of the last block."""
        self.at(0.0, self._hand_out)
        if self.losses is not None and self.losses.every < float("inf"):
            machines = -(-self.stages[self.losses.stage].workers // self.losses.together)
            for machine in range(machines):
                self._plan_loss(machine)
        while len(self.ends) < self.count:
            self.now, _, event = heapq.heappop(self.events)
            event()
        whole = self.now
        busy = {
            stage.name: sum(worker.busy for worker in group) / (len(group) * whole)
            for stage, group in zip(self.stages, self.workers, strict=True)
        }
        busy["store"], busy["first process"] = self.store_busy / whole, self.hand_out * self.count / whole
        return Outcome(sorted(self.ends), busy, self.lost, self.again)

    def _hand_out(self) -> None:
        """Hand the next block out, unless enough wait; then the one that takes a block asks again."""
        self.handing = self.handed < self.count and len(self.waiting[0]) < 2 * self.stages[0].workers
        if self.handing:
            self.waiting[0].append(self.handed)
            self.handed += 1
            self.at(self.now + self.hand_out, self._hand_out)
            self._give(0)

    def _give(self, number: int) -> None:
        """Give waiting blocks to the workers of a stage that have fewest; the next stage's crowd holds them back."""
        waiting = self.waiting[number]
        following = number + 1 < len(self.stages)
        while waiting:
            if following and len(self.waiting[number + 1]) > 4 * self.stages[number + 1].workers:
                return
            worker = next((next(iter(group.values())) for group in self.loads[number][:-1] if group), None)
            if worker is None:
                return
            self._change(worker, partial(worker.take, waiting))
            self._work(worker)
            if number == 0 and not self.handing:
                self.handing = True
                self.at(self.now, self._hand_out)

    def _change(self, worker: Worker, change: Callable[[], object]) -> None:
        """Change the blocks or the life of a worker, and keep the order of loads."""
        self.loads[worker.stage][len(worker.blocks)].pop(id(worker), None)
        change()
        if worker.alive:
            self.loads[worker.stage][len(worker.blocks)][id(worker)] = worker

    def _work(self, worker: Worker) -> None:
        """Let a worker begin with its first block."""
        if worker.working or not worker.alive or not worker.blocks:
            return
        stage, losses = self.stages[worker.stage], self.losses
        worker.working, life = True, worker.life
        seconds = stage.seconds * worker.factor
        if losses is not None and losses.calls and worker.stage == losses.stage:
            self.calls += 1
            if self.calls in losses.calls:
                self.at(self.now + stage.seconds / 2, lambda: self._lose([worker]))
        end = self.now + seconds
        if stage.moved:
            served = stage.moved / self.store
            self.store_free = max(self.store_free, self.now) + served
            self.store_busy += served
            end = max(end, self.store_free + stage.seconds * worker.factor)
        begun = self.now
        self.at(end, lambda: self._finish(worker, life, begun, seconds))

    def _finish(self, worker: Worker, life: int, begun: float, seconds: float) -> None:
        if worker.life != life:  # it was lost meanwhile
            return
        worker.busy += seconds
        worker.working = False
        block = worker.blocks[0]
        self._change(worker, worker.blocks.popleft)
        if worker.stage + 1 < len(self.stages):
            self.waiting[worker.stage + 1].append(block)
            self._give(worker.stage + 1)
        else:
            self.ends.append(self.now)
        self._work(worker)
        for number in range(worker.stage + 1):
            self._give(number)

    def _plan_loss(self, machine: int) -> None:
        losses = self.losses
        assert losses is not None
        group = self.workers[losses.stage][machine * losses.together : (machine + 1) * losses.together]

        def lose() -> None:
            self._lose(group)
            self._plan_loss(machine)

        self.at(self.now + self.random.exponential(losses.every), lose)

    def _lose(self, group: Sequence[Worker]) -> None:
        """Lose workers, and what they were working on; they come back and begin with it again."""
        assert self.losses is not None
        self.lost += 1
        for worker in group:
            self.again += worker.working
            worker.life += 1
            worker.working = False
            self._change(worker, partial(setattr, worker, "alive", False))
            life = worker.life

            def back(worker: Worker = worker, life: int = life) -> None:
                if worker.life != life:  # it was lost again before it came
                    return
                self._change(worker, lambda: setattr(worker, "alive", True))
                self._work(worker)
                self._give(worker.stage)

            self.at(self.now + self.losses.restart, back)


# The small cases ----------------------------------------------------------------------------------------


@cache
def measured() -> dict[str, dict[str, float]]:
    """Return what was measured of the small cases, by name: `seconds`, and `restart_s` where workers died."""
    lines = map(json.loads, ray_waits.RECORD.read_text(encoding="utf-8").splitlines())
    return {line["what"]: line for line in lines}


def small_case(name: str) -> float:
    """Return the simulated seconds of a small case, from the end of the first piece to that of the last."""
    workers, slow, kills, store = ray_waits.CASES[name]
    stages = [
        Stage("read", 8, ray_waits.READ),
        Stage("model", workers, ray_waits.COMPUTE, factors=(slow,)),
        Stage("write", 8, ray_waits.WRITE, moved=store),
    ]
    losses = Losses(1, measured()[name]["restart_s"], calls=kills) if kills else None
    ends = Simulation(stages, ray_waits.PIECES, store=1.0, losses=losses).run().ends
    return ends[-1] - ends[0]


# The large ones -----------------------------------------------------------------------------------------

CELLS = 100e6
PIECE, BLOCKS = 2048, 2000  # of embedding/on_cluster.py and common/cluster.py: more pieces share a block
HOUR = 3600.0
CORES = 16  # of a machine with a GPU, for each
TOKENS = 1024
BYTES_OF_A_TOKEN = 12  # between the stages: an id of 8 bytes and a value of 4


@dataclass(frozen=True)
class Input:
    """A number that the tables rest on, and where it comes from."""

    value: float
    unit: str
    source: str


@cache
def inputs() -> dict[str, Input]:
    """Return all inputs by name."""
    from benchmarks.pages import RECORD

    rows = {row["what"]: row for row in map(json.loads, (RECORD / "gpu-cost.jsonl").read_text().splitlines())}
    gpu = "measured on one H100, docs/benchmarks/gpu-cost.jsonl"
    utilisation = rows["embed 3B, 565 to 2,048 tokens"]["mfu"]
    shapes = configurations()
    found = {
        "70M, embedding": Input(rows["embed 70M, 1,024 tokens"]["cells_per_s"], "cells/s and GPU", gpu),
    }
    for name, source in (
        ("1.3B", "assumption: the utilisation of the 3B, as this model was not measured"),
        ("3B", f"{gpu}: {utilisation:.0%} utilisation with 565 to 2,048 tokens, here at 1,024"),
    ):
        flops = embedding_flops(shapes[name], np.array([TOKENS]))
        found[f"{name}, embedding"] = Input(utilisation * H100.peak / float(flops), "cells/s and GPU", source)
    found |= {
        "reading and encoding": Input(1 / (1 / 40295 + 1 / 61924), "cells/s and core",
                                      "measured, docs/speed.md: encoding, and batches from disk, one after the other"),
        "a cell in the source": Input(4800, "bytes", "measured, docs/speed.md: heart cells as Parquet"),
        "a cell of the census as .h5ad": Input(17500, "bytes", "measured, docs/speed.md: heart cells, uncompressed"),
        "a prepared cell": Input(8700, "bytes", "measured, docs/speed.md: heart cells as Arrow"),
        "preparing": Input(5000, "cells/s and core", "assumption: it was not measured by itself"),
        "first process, a block": Input(0.023, "s", "measured, docs/how-to/ray.md, with up to 300 blocks"),
        "store": Input(5e9, "bytes/s", "assumption, for all machines together"),
        "network card of the first machine": Input(3.1e9, "bytes/s", "assumption: 25 Gb/s"),
        "between losses of a machine, spot": Input(24, "h", "assumption"),
        "between losses of a GPU, not spot": Input(50677, "h", "published for Llama 3: 419 in 54 days of 16,384 GPUs"),
        "until a lost machine is replaced": Input(300, "s", "assumption"),
        "workers at half speed": Input(0.05, "share", "assumption"),
        "slowest GPU of a training": Input(1.03, "times the mean step", "assumption"),
        "GPU": Input(2.5, "dollars an hour", "assumption"),
        "machine of 32 cores": Input(1.5, "dollars an hour", "assumption"),
    }  # fmt: skip
    return found


@cache
def configurations() -> dict[str, memory.TahoeX1Config]:
    """Return the models' configurations by name."""
    from benchmarks.scaling_plan import models

    return {model.name: model.config for model in models()}


def value(name: str) -> float:
    """Return an input's value."""
    return inputs()[name].value


def slow_workers(number: int) -> tuple[float, ...]:
    """Return the factors of the workers that are slow; of few workers none is."""
    return (2.0,) * int(number * value("workers at half speed"))


@dataclass(frozen=True)
class Line:
    """A line of the table of jobs."""

    job: str
    machines: str
    hours: float
    rate: float
    moved: float
    dollars: float
    bottleneck: str
    lost: int


def busiest(shares: dict[str, float]) -> str:
    """Return the two names that were busy for the largest shares of the time, with these."""
    order = sorted(shares, key=lambda name: -shares[name])[:2]
    return ", ".join(f"{name} {100 * shares[name]:.0f} %" for name in order if shares[name] >= 0.01)


@cache
def embedding(model: str, gpus: int) -> Line:
    """Embed a hundred million cells on GPUs of spot machines, eight in one."""
    cells = CELLS / BLOCKS
    width = 4 * configurations()[model].hidden_size
    readers = gpus * CORES // 2
    stages = [
        Stage("reading", readers, cells / value("reading and encoding"), cells * value("a cell in the source")),
        Stage("GPUs", gpus, cells / value(f"{model}, embedding"), factors=slow_workers(gpus)),
        Stage("writing", max(1, gpus * CORES // 4), cells * width / 1e9, cells * width),
    ]
    losses = Losses(1, value("until a lost machine is replaced"),
                    value("between losses of a machine, spot") * HOUR, min(8, gpus))  # fmt: skip
    # A block goes on from reading and from the GPUs as several, of 128 MB at most (`_LARGE_BLOCK_BYTES`).
    parts = np.ceil(cells * TOKENS * BYTES_OF_A_TOKEN / 2**27)
    handing = value("first process, a block") * (1 + 2 * parts) / 3  # which was measured with three stages
    run = Simulation(stages, BLOCKS, store=value("store"), hand_out=handing, losses=losses).run()
    gathering = 2 * CELLS * width / value("network card of the first machine")
    seconds = run.ends[-1] + gathering
    shares = {name: share * run.ends[-1] / seconds for name, share in run.busy.items()}
    shares["gathering by the first process"] = gathering / seconds
    moved = CELLS * (value("a cell in the source") + 3 * width)
    return Line(f"embed 100 million cells, {model}", f"{gpus} H100", seconds / HOUR, CELLS / seconds, moved,
                seconds / HOUR * gpus * value("GPU"), busiest(shares), run.lost)  # fmt: skip


@cache
def preparing(machines: int) -> Line:
    """Prepare a hundred million cells on machines of 32 cores."""
    cells, cores = CELLS / BLOCKS, 32 * machines
    stored = value("a prepared cell")
    stages = [
        Stage("reading", cores // 2, cells / value("preparing"),
              cells * (value("a cell of the census as .h5ad") + stored), slow_workers(cores // 2)),
        Stage("gathering", cores // 2, cells / value("preparing"), cells * 2 * stored, slow_workers(cores // 2)),
    ]  # fmt: skip
    losses = Losses(0, value("until a lost machine is replaced"),
                    value("between losses of a machine, spot") * HOUR, 16)  # fmt: skip
    run = Simulation(
        stages, BLOCKS, store=value("store"), hand_out=value("first process, a block"), losses=losses
    ).run()
    seconds = run.ends[-1]
    moved = CELLS * (value("a cell of the census as .h5ad") + 3 * stored)
    return Line("prepare 100 million cells", f"{machines} of 32 cores", seconds / HOUR, CELLS / seconds, moved,
                seconds / HOUR * machines * value("machine of 32 cores"), busiest(run.busy), run.lost)  # fmt: skip


@cache
def pretraining(gpus: int, spot: bool, saved: int = 500, seed: int = 0) -> Line:
    """Pretrain the 3B for an epoch: a loss throws all back to the last checkpoint."""
    from benchmarks.scaling_plan import EPOCH, assumed, models

    model = models()[2]
    plan = plan_step(model.config, model.context, model.global_batch, gpus, "fsdp2", assumed(model))
    assert plan is not None
    step = plan.seconds * value("slowest GPU of a training")
    steps, size = int(EPOCH / (plan.cells * gpus)), 12 * memory.count_parameters(model.config).total
    save = size / gpus / 10e9  # copied into the main memory at PCIe's rate, and written in the background
    machine = value("between losses of a machine, spot") if spot else value("between losses of a GPU, not spot") / 8
    random, restart = np.random.default_rng(seed), value("until a lost machine is replaced")
    done = now = lost = saves = 0.0
    events = [(random.exponential(machine * HOUR), number) for number in range(gpus // 8)]
    heapq.heapify(events)
    while done < steps:
        until = min(saved, steps - done)
        end = now + until * step + save
        if events[0][0] < end:
            moment, number = heapq.heappop(events)
            now, lost = max(now, moment) + restart, lost + 1
            heapq.heappush(events, (now + random.exponential(machine * HOUR), number))
            continue
        now, done, saves = end, done + until, saves + 1
    moved = EPOCH * value("a prepared cell") + (saves + lost) * size
    used = steps * plan.cells * gpus
    name = f"pretrain the 3B, an epoch{', spot' if spot else ''}"
    return Line(name, f"{gpus} H100", now / HOUR, used / now, moved, now / HOUR * gpus * value("GPU"),
                busiest({"GPUs": steps * plan.seconds / now}), int(lost))  # fmt: skip


def jobs() -> list[Line]:
    """Return all lines of the table."""
    return [
        *(embedding(model, gpus) for model in ("70M", "1.3B", "3B") for gpus in (1, 8, 64)),
        preparing(32),
        pretraining(64, spot=False),
        pretraining(64, spot=True),
    ]


# Tables -------------------------------------------------------------------------------------------------


def tables() -> dict[str, tuple[list[str], list[list[str]]]]:
    """Return header and rows of each table, by its name in the document."""
    small = []
    for name, line in measured().items():
        found, seconds, restart = small_case(name), line["seconds"], line.get("restart_s")
        part = f"; new workers after {restart:.1f} s" if restart else ""
        small.append([name + part, f"{seconds:.1f}", f"{found:.1f}", f"{100 * (found / seconds - 1):+.0f} %"])
    large = [
        [line.job, line.machines, f"{line.hours:,.2f}", f"{line.rate:,.0f}", f"{line.moved / 1e12:.2f}",
         f"{line.dollars / (line.rate * line.hours * HOUR / 1e6):,.3f}", line.bottleneck, str(line.lost)]
        for line in jobs()
    ]  # fmt: skip
    given = [[name, f"{each.value:,.4g}", each.unit, each.source] for name, each in inputs().items()]
    return {
        "simulated small": (["case", "measured (s)", "simulated (s)", "off by"], small),
        "simulated large": (["job", "on", "hours", "cells/s", "TB from and to the store", "dollars per million cells",
                             "busy for how much of the time", "losses"], large),
        "simulated inputs": (["input", "value", "unit", "source"], given),
    }  # fmt: skip
