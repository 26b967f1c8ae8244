# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Calculate memory and time of a training step on many GPUs, from the rate that was measured on one.

Memory comes from `memory_model`, whose formulas are tested. Time comes from a roofline model, whose assumptions
`Assumptions` lists.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks import memory_model as memory
from benchmarks.memory_model import Precision, States, Strategy
from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.training.flops import embedding_flops, training_flops
from tahoex1_hf.training.microbatches import largest_microbatch


@dataclass(frozen=True)
class Hardware:
    """Memory and rates of a device, from its data sheet.

    Args:
        memory: Bytes.
        peak: FLOP/s of dense bfloat16 products.
        memory_rate: Bytes/s of the device's memory.
        machine_link: Bytes/s in one direction between devices of a machine.
        network: Bytes/s in one direction between machines, per device.
        per_machine: Number of devices in a machine.
    """

    memory: float = 80e9
    peak: float = 989e12
    memory_rate: float = 3.35e12
    machine_link: float = 450e9
    network: float = 50e9
    per_machine: int = 8


H100 = Hardware()


@dataclass(frozen=True)
class Assumptions:
    """Quantities that the time depends on. All but the first were not measured.

    Args:
        matrix_share: Share of the peak at which matrix products and attention run (see the function `matrix_share`).
        passes: Number of times that each byte kept for the backward pass crosses the device's memory in a step: it is
            written and read in the forward pass and read in the backward pass, and its gradient crosses once.
        links: Share of a link's rate that collectives reach.
        overlap: Share of the computing time behind which communication can hide.
        reserved: Bytes of the device that the driver and the communication library take.
    """

    matrix_share: float
    passes: float = 4.0
    links: float = 0.8
    overlap: float = 0.8
    reserved: float = 3e9


def matrix_share(
    utilisation: float, config: TahoeX1Config, length: int, cells: int, hardware: Hardware = H100, passes: float = 4.0
) -> float:
    """Return the share of the peak at which products run, from the utilisation of a whole step that was measured.

    A step computes products, moves what is kept and the weights, and runs the optimizer, one after the other. What
    remains of its seconds without the others is the products'.

    Args:
        utilisation: Model FLOP utilisation of a step of one microbatch on one device, with compiled layers.
        config: Configuration of the model.
        length: Number of tokens of a cell.
        cells: Cells of the step.
        hardware: Device on which it was measured.
        passes: See `Assumptions`.

    Raises:
        ValueError: If moving the data alone would take longer than the step.
    """
    flops = training_flops(config, np.full(cells, length))
    seconds = flops / (utilisation * hardware.peak) - _optimizer_seconds(config, 1, hardware)
    seconds -= _traffic_seconds(config, memory.GPU_COMPILED, cells * length, length, 1, passes, hardware)
    if seconds <= 0 or flops / seconds > hardware.peak:
        raise ValueError(
            f"utilisation={utilisation}: with passes={passes} no rate of matrix products up to the peak explains it."
        )
    return float(flops / (seconds * hardware.peak))


@dataclass(frozen=True)
class Plan:
    """A training step on a number of devices.

    Args:
        devices: Number of devices.
        strategy: Way in which they share the work.
        checkpointing: Whether layers are computed again in the backward pass.
        cells: Cells of a step on each device.
        microbatch: Cells of a pass.
        states: Bytes of weights, gradients and optimizer on each device.
        pass_bytes: Bytes of a pass over a microbatch.
        flops: Floating-point operations of the model on each device.
        compute: Seconds of the passes.
        waiting: Seconds in which a device waits for others, without the time that is hidden.
        optimizer: Seconds of the optimizer's step.
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
        """Seconds of the step."""
        return self.compute + self.waiting + self.optimizer

    @property
    def utilisation(self) -> float:
        """Model FLOP utilisation; recomputation by checkpointing does not count."""
        return self.flops / (self.seconds * self.peak)

    @property
    def rate(self) -> float:
        """Cells per second on all devices together."""
        return self.cells * self.devices / self.seconds

    @property
    def bytes(self) -> float:
        """Bytes of memory on each device."""
        return self.states.total + self.pass_bytes

    def device_hours(self, cells: float) -> float:
        """Return the device hours that a number of cells takes."""
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
    """Plan a step.

    Args:
        config: Configuration of the model.
        length: Number of tokens of every cell.
        global_batch: Cells of a step. Cells that cannot be shared evenly are left out, as recipes must do, too.
        devices: Number of devices; whole machines where there are several.
        strategy: Way in which the devices share the work.
        assumptions: Assumptions on rates.
        checkpointing: Whether layers are computed again in the backward pass.
        hardware: Memory and rates of a device.

    Returns:
        The plan; None if it does not fit into memory, or the strategy is impossible with this number of devices.

    Raises:
        ValueError: If there are more devices than cells.
    """
    if not 1 <= devices <= global_batch:
        raise ValueError(f"devices={devices}: a step of {global_batch} cells has work for 1 to {global_batch}.")
    if not _is_possible(strategy, devices, hardware):
        return None
    precision, cells = precision_of(strategy), global_batch // devices
    shards = {"one": 1, "ddp": 1, "fsdp2": devices, "hsdp": hardware.per_machine}[strategy]

    def needed(number: int) -> float:
        return memory.microbatch_bytes(config, precision, length, number, checkpointing=checkpointing)

    available = hardware.memory - assumptions.reserved
    try:
        for accumulate in (False, True):
            states = memory.states(config, precision, strategy, shards, accumulate=accumulate)
            microbatch = largest_microbatch(needed, available - states.total, cells)
            if microbatch == cells:
                break
    except MemoryError:
        return None
    passes = -(-cells // microbatch)
    compute = _compute_seconds(config, precision, length, cells, passes, assumptions, hardware, checkpointing)
    per_pass, per_step = _communication_seconds(config, strategy, devices, assumptions, hardware)
    hidden = assumptions.overlap * compute / passes
    # Gradients travel in the last backward pass; with DDP that is two thirds of the time that can hide them.
    last = hidden * 2 / 3 if strategy == "ddp" else hidden
    waiting = (passes - 1) * max(0.0, per_pass - hidden) + max(0.0, per_pass + per_step - last)
    optimizer = _optimizer_seconds(config, shards, hardware)
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


def _is_possible(strategy: Strategy, devices: int, hardware: Hardware) -> bool:
    """Return whether a strategy is possible with a number of devices."""
    machines, rest = divmod(devices, hardware.per_machine)
    return {"one": devices == 1, "ddp": devices > 1, "fsdp2": devices > 1, "hsdp": machines > 1 and not rest}[strategy]


def plans(
    config: TahoeX1Config,
    length: int,
    global_batch: int,
    devices: int,
    assumptions: Assumptions,
    hardware: Hardware = H100,
) -> Iterator[Plan]:
    """Plan a step in every way that fits into memory, with the arguments of `plan_step`."""
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


def precision_of(strategy: Strategy) -> Precision:
    """Return the types of a strategy on GPUs. Recipes compile layers unless they are sharded."""
    return memory.GPU_FSDP2 if strategy in ("fsdp2", "hsdp") else memory.GPU_COMPILED


def _optimizer_seconds(config: TahoeX1Config, shards: int, hardware: Hardware) -> float:
    """Return the seconds of clipping and AdamW, which move what they read and write.

    Clipping reads gradients twice and writes them; AdamW reads them, and reads and writes weight and two moments.
    """
    return (3 + 7) * 4 * memory.count_parameters(config).total / shards / hardware.memory_rate


def _traffic_seconds(
    config: TahoeX1Config,
    precision: Precision,
    tokens: int,
    length: int,
    microbatches: int,
    passes: float,
    hardware: Hardware,
) -> float:
    """Return the seconds in which activations and weights cross the device's memory.

    Every microbatch reads the weights for outputs and for gradients of inputs, and writes the weights' gradients.
    """
    traffic = passes * tokens * memory.kept_per_token(config, precision, length)
    traffic += microbatches * 3 * precision.product * memory.count_parameters(config).total
    return traffic / hardware.memory_rate


def _compute_seconds(
    config: TahoeX1Config,
    precision: Precision,
    length: int,
    cells: int,
    passes: int,
    assumptions: Assumptions,
    hardware: Hardware,
    checkpointing: bool,
) -> float:
    """Return the seconds of products and of memory traffic, one after the other, for a device's cells of a step."""
    lengths = np.full(cells, length)
    flops = training_flops(config, lengths)
    crossings = assumptions.passes
    if checkpointing:  # a second forward pass, which writes and reads the values that it keeps
        flops += embedding_flops(config, lengths)
        crossings += 2
    moving = _traffic_seconds(config, precision, cells * length, length, passes, crossings, hardware)
    return float(flops / (assumptions.matrix_share * hardware.peak)) + moving


def _communication_seconds(
    config: TahoeX1Config, strategy: Strategy, devices: int, assumptions: Assumptions, hardware: Hardware
) -> tuple[float, float]:
    """Return the seconds of communication in each pass, and the further seconds once per step.

    In a ring each of n devices passes on (n - 1) / n of the gathered or reduced bytes, in an all-reduce twice that.
    A ring over machines enters and leaves each machine through all its network cards together.
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
