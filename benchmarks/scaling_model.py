# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What a training step would take on GPUs that are not here: a plan on paper, from memory and rates alone.

The memory is that of `memory`, whose formulas are tested. The time is a roofline on assumptions, which `Assumptions`
lists; nothing in it was measured on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from benchmarks import memory_model as memory
from benchmarks.memory_model import Numbers, States, Strategy
from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.training.flops import embedding_flops, training_flops
from tahoex1_hf.training.microbatches import largest_microbatch


@dataclass(frozen=True)
class Hardware:
    """Rates of a machine's data sheet, per device: bytes, FLOP/s, bytes/s (links: in one direction)."""

    memory: float = 80e9
    peak: float = 989e12
    memory_rate: float = 3.35e12
    machine_link: float = 450e9
    network: float = 50e9
    per_machine: int = 8


H100 = Hardware()


@dataclass(frozen=True)
class Assumptions:
    """What the time depends on and nobody here has measured.

    Args:
        matrix_share: share of the peak at which matrix products and attention run, see `matrix_share`.
        passes: how often each byte kept for the backward pass crosses the device's memory in a step: written and
            read in the forward pass, read in the backward pass, and its gradient once.
        links: share of a link's rate that collectives reach.
        overlap: share of the computing time behind which communication can hide.
        reserved: bytes of the device that the driver and the communication library take.
    """

    matrix_share: float
    passes: float = 4.0
    links: float = 0.8
    overlap: float = 0.8
    reserved: float = 3e9


def matrix_share(
    utilisation: float, config: TahoeX1Config, length: int, hardware: Hardware = H100, passes: float = 4.0
) -> float:
    """Share of the peak of matrix products at which computing alone has a given model FLOP utilisation.

    The published figure is of a whole step, which is more than products. This solves
    `flops / (utilisation * peak) = flops / (share * peak) + traffic / memory_rate` for the share, with the types of
    FSDP2.

    Args:
        utilisation: published.
        config: of the model that had it.
        length: tokens of a cell.
        hardware: that it had.
        passes: see `Assumptions`.

    Raises:
        ValueError: where the traffic alone takes longer.
    """
    flops = training_flops(config, np.array([length]))
    traffic = passes * length * memory.kept_per_token(config, memory.GPU_FSDP2, length)
    seconds = flops / (utilisation * hardware.peak) - traffic / hardware.memory_rate
    if seconds <= 0 or flops / seconds > hardware.peak:
        raise ValueError(
            f"utilisation={utilisation}: with passes={passes} no rate of matrix products up to the peak explains it."
        )
    return float(flops / (seconds * hardware.peak))


@dataclass(frozen=True)
class Plan:
    """A step of training on so many devices.

    Args:
        devices: all of them.
        strategy: how they share the work.
        checkpointing: whether layers are computed anew in the backward pass.
        cells: of a step, on each device.
        microbatch: cells of a pass.
        states: bytes of weights, gradients and optimizer on each device.
        pass_bytes: of a micro-batch.
        flops: of the model, on each device.
        compute: seconds of the passes.
        waiting: seconds in which a device waits for others, beyond what is hidden.
        optimizer: seconds of the optimizer's step.
        peak: FLOP/s of a device.
    """

    devices: int
    strategy: Strategy
    checkpointing: bool
    cells: int
    microbatch: int
    states: States
    pass_bytes: float
    flops: float
    compute: float
    waiting: float
    optimizer: float
    peak: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + self.waiting + self.optimizer

    @property
    def utilisation(self) -> float:
        """Model FLOP utilisation: what is computed anew does not count."""
        return self.flops / (self.seconds * self.peak)

    @property
    def rate(self) -> float:
        """Cells per second, of all devices."""
        return self.cells * self.devices / self.seconds

    @property
    def bytes(self) -> float:
        """Memory on each device."""
        return self.states.total + self.pass_bytes

    def device_hours(self, cells: float) -> float:
        """Hours of all devices together for so many cells."""
        return cells / self.rate / 3600 * self.devices


def plan_step(
    config: TahoeX1Config,
    length: int,
    global_batch: int,
    devices: int,
    strategy: Strategy,
    assumptions: Assumptions,
    *,
    checkpointing: bool = False,
    hardware: Hardware = H100,
) -> Plan | None:
    """Plan a step; None where it does not fit into memory, or the strategy is none for so many devices.

    Args:
        config: of the model.
        length: tokens of every cell.
        global_batch: cells of a step; what cannot be shared evenly is left out, as the recipes have to.
        devices: that share it; whole machines where there are several.
        strategy: how.
        assumptions: on rates.
        checkpointing: compute layers anew in the backward pass.
        hardware: of a device.

    Raises:
        ValueError: for more devices than cells.
    """
    if not 1 <= devices <= global_batch:
        raise ValueError(f"devices={devices}: a step of {global_batch} cells has work for 1 to {global_batch}.")
    machines, rest = divmod(devices, hardware.per_machine)
    possible = {
        "one": devices == 1,
        "ddp": devices > 1,
        "fsdp2": devices > 1,
        "hsdp": machines > 1 and not rest,
    }
    if not possible[strategy]:
        return None
    numbers, cells = numbers_of(config, strategy), global_batch // devices
    shards = {"one": 1, "ddp": 1, "fsdp2": devices, "hsdp": hardware.per_machine}[strategy]

    def needed(number: int) -> float:
        return memory.microbatch_bytes(config, numbers, length, number, checkpointing=checkpointing)

    for accumulate in (False, True):
        states = memory.states(config, numbers, strategy, shards, accumulate=accumulate)
        try:
            microbatch = largest_microbatch(needed, hardware.memory - assumptions.reserved - states.total, cells)
        except MemoryError:
            return None
        if microbatch == cells:
            break
    passes = -(-cells // microbatch)
    compute = _compute_seconds(config, numbers, length, cells, passes, assumptions, hardware, checkpointing)
    per_pass, per_step = _communication_seconds(config, strategy, devices, assumptions, hardware)
    hidden = assumptions.overlap * compute / passes
    # Gradients travel in the last backward pass, which with DDP is two thirds of what there is to hide behind.
    last = hidden * 2 / 3 if strategy == "ddp" else hidden
    waiting = (passes - 1) * max(0.0, per_pass - hidden) + max(0.0, per_pass + per_step - last)
    total = memory.count_parameters(config).total
    # Clipping reads gradients twice and writes them; AdamW reads them, and reads and writes weight and two moments.
    optimizer = (3 + 7) * 4 * total / shards / hardware.memory_rate
    flops = training_flops(config, np.full(cells, length))
    return Plan(
        devices,
        strategy,
        checkpointing,
        cells,
        microbatch,
        states,
        needed(microbatch),
        flops,
        compute,
        waiting,
        optimizer,
        hardware.peak,
    )


def plans(
    config: TahoeX1Config,
    length: int,
    global_batch: int,
    devices: int,
    assumptions: Assumptions,
    hardware: Hardware = H100,
) -> Iterator[Plan]:
    """All plans that fit into memory, with and without checkpointing. Arguments are those of `plan_step`."""
    strategies: tuple[Strategy, ...] = ("one", "ddp", "fsdp2", "hsdp")
    for strategy in strategies:
        for checkpointing in (False, True):
            plan = plan_step(
                config,
                length,
                global_batch,
                devices,
                strategy,
                assumptions,
                checkpointing=checkpointing,
                hardware=hardware,
            )
            if plan is not None:
                yield plan


def numbers_of(config: TahoeX1Config, strategy: Strategy) -> Numbers:
    """Types of a strategy on GPUs. `observed_or_self` needs flex attention, which may lay its output out anew."""
    numbers = memory.GPU_FSDP2 if strategy in ("fsdp2", "hsdp") else memory.GPU_AUTOCAST
    return replace(numbers, output_copied=config.attention_mask_style == "observed_or_self")


def _compute_seconds(
    config: TahoeX1Config,
    numbers: Numbers,
    length: int,
    cells: int,
    passes: int,
    assumptions: Assumptions,
    hardware: Hardware,
    checkpointing: bool,
) -> float:
    """Seconds of products and of memory traffic, one after the other, on a device's cells of a step."""
    lengths = np.full(cells, length)
    flops = training_flops(config, lengths)
    traffic = assumptions.passes * cells * length * memory.kept_per_token(config, numbers, length)
    if checkpointing:  # the forward pass a second time, which writes and reads what it keeps
        flops += embedding_flops(config, lengths)
        traffic *= 1 + 2 / assumptions.passes
    # Every pass reads the weights for outputs, for gradients of inputs, and writes their own gradients.
    traffic += passes * 3 * numbers.product * memory.count_parameters(config).total
    return float(flops / (assumptions.matrix_share * hardware.peak) + traffic / hardware.memory_rate)


def _communication_seconds(
    config: TahoeX1Config, strategy: Strategy, devices: int, assumptions: Assumptions, hardware: Hardware
) -> tuple[float, float]:
    """Seconds of the links: in each pass, and in a step once more.

    Rings: of what is gathered or reduced, a device passes on (n - 1) / n, twice that for an all-reduce. A ring over
    machines enters and leaves each by all its network cards together.
    """
    if strategy == "one":
        return 0.0, 0.0
    p = memory.count_parameters(config)
    inside = hardware.machine_link * assumptions.links
    cards = hardware.per_machine * hardware.network * assumptions.links
    ring = inside if devices <= hardware.per_machine else min(inside, cards)
    if strategy == "ddp":
        return 0.0, 2 * 4 * p.total * (devices - 1) / devices / ring
    group = devices if strategy == "fsdp2" else hardware.per_machine
    rate = ring if strategy == "fsdp2" else inside
    share = (group - 1) / group
    # Weights for the forward and the backward pass in bfloat16, the root's once; gradients in float32.
    per_pass = (2 * (2 * p.total - p.rest) + 4 * p.total) * share / rate
    if strategy == "fsdp2":
        return per_pass, 0.0
    machines = devices // hardware.per_machine
    shard = 4 * p.total / group  # added up over the passes, and exchanged with copies of it in the last
    return per_pass, 2 * shard * (machines - 1) / machines / (hardware.network * assumptions.links)
