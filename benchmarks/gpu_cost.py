"""Second piece of the GPU check: what embedding and training cost, beside what the GPU multiplies and copies."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import gpu_command, memory_model
from benchmarks.gpu_measuring import Check, RandomCells, cell_lengths, stand_in_tokenizer
from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining, TahoeX1Model
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.observed_attention_tahoe_x1 import PackedAttention
from tahoex1_hf.training.flops import embedding_flops, training_flops
from tahoex1_hf.training.pretraining import compile_layers

TINY: dict[str, Any] = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES: dict[str, dict[str, Any]] = {
    "70M": {},
    "1.3B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16},
    "3B": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 20},
}
PEAK = 989e12  # FLOP/s in bfloat16 of an H100, by its data sheet
BATCHES = 3  # that training takes in turn
STEPS = 4  # between two waits for the GPU: a run waits for the norm of the gradients alone
OF_A_PROFILE = 14  # kernels that a profile lists


def check(run: Check) -> None:
    """Measure everything, the most important first."""
    ceilings(run)
    gpu_command.check(run, TINY if run.tiny else {})
    same = [20] * 12 if run.tiny else [1024] * 2048
    embed(run, "70M", "1,024 tokens, without cuDNN", same, cudnn=False)
    embed(run, "70M", "1,024 tokens", same, profiled=True)
    embed(run, "70M", "64 to 2,048 tokens", _mixed(run, 2048, 900, 64, 2048))
    embed(run, "3B", "565 to 2,048 tokens", _mixed(run, 256, 1300, 565, 2048))
    for size, cells in (("70M", 64), ("1.3B", 24)):
        equal = [30] * 3 if run.tiny else [1024] * cells
        train(run, size, "observed_or_self", equal, profiled=size == "70M")
        train(run, size, "observed_or_self", _mixed(run, cells, 800, 64, 1024))
        train(run, size, "full", equal)
    train(run, "1.3B", "observed_or_self", [30] * 3 if run.tiny else [1024] * 8)
    train(run, "70M", "observed_or_self", [30] * 3 if run.tiny else [1024] * 64, compiled=False)
    attention(run)
    train(run, "70M", "observed_or_self", [30] * 3 if run.tiny else [1024] * 64, checkpointing=True)


def _mixed(run: Check, number: int, middle: float, low: int, high: int) -> list[int]:
    return cell_lengths(6, 20, 5, 40) if run.tiny else cell_lengths(number, middle, low, high)


def ceilings(run: Check) -> None:
    """Measure what the GPU copies, and what it multiplies in the shapes of the models."""
    number = 2**29 if run.on_gpu else 2**16
    source = torch.randn(number, device=run.device)
    target = torch.empty_like(source)
    run.row("copy", tb_per_s=8 * number / run.median_seconds(lambda: target.copy_(source)) / 1e12)
    tokens = 65536 if run.on_gpu else 256
    for rows, width, outputs in ((8192, 8192, 8192), (tokens, 512, 2048), (tokens, 2048, 8192), (tokens, 2560, 10240)):
        rows, width, outputs = (
            (min(size, 256) for size in (rows, width, outputs)) if run.tiny else (rows, width, outputs)
        )
        left = torch.randn(rows, width, device=run.device, dtype=torch.bfloat16)
        right = torch.randn(width, outputs, device=run.device, dtype=torch.bfloat16)
        seconds = run.median_seconds(lambda: left @ right, budget=0.2)  # noqa: B023 - called at once
        run.row(f"product {rows} x {width} x {outputs}", tflops=2 * rows * width * outputs / seconds / 1e12)


def embed(run: Check, size: str, kind: str, lengths: list[int], *, profiled: bool = False, cudnn: bool = True) -> None:
    """Measure `CellEncoder`, with all that it does on the host."""
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    name = f"embed {size}, {kind}"
    if not run.has_time(name):
        return
    with run.attempt(name):
        config = TahoeX1Config(**TINY if run.tiny else SIZES[size])
        with run.device:
            model = TahoeX1Model(config).eval()
        encoder = CellEncoder(
            model, stand_in_tokenizer(config.vocab_size), device=run.device, dtype="bfloat16", sole_user=True
        )
        cells = RandomCells(lengths, config.vocab_size).encoded()
        start = time.perf_counter()
        encoder.embed(RandomCells(lengths[:16], config.vocab_size, seed=1).encoded())
        first = time.perf_counter() - start
        encoder.embed(cells)
        run.peak_gb()
        start = time.perf_counter()
        encoder.embed(cells)
        seconds = time.perf_counter() - start
        run.row(
            name, cells_per_s=len(lengths) / seconds, peak_gb=run.peak_gb(), first_call_s=first,
            mfu=embedding_flops(config, np.array(lengths)) / seconds / PEAK,
        )  # fmt: skip
        if profiled:
            some = RandomCells(lengths[:256], config.vocab_size, seed=2).encoded()
            profile(run, name, lambda: encoder.embed(some))


def train(
    run: Check,
    size: str,
    style: str,
    lengths: list[int],
    *,
    checkpointing: bool = False,
    compiled: bool = True,
    profiled: bool = False,
) -> None:
    """Measure steps of one microbatch: both passes, clipping and AdamW, with compiled layers as the recipes say."""
    kind = "equal" if len(set(lengths)) == 1 else "ragged"
    name = f"train {size} {style}, {len(lengths)} cells of {kind} lengths"
    name += ", checkpointing" * checkpointing + ", not compiled" * (not compiled)
    if not run.has_time(name):
        return
    with run.attempt(name):
        step, config = training_step(run, size, style, lengths, checkpointing, compiled)
        start = time.perf_counter()
        losses = [step() for _ in range(BATCHES)]
        run.wait()
        first = time.perf_counter() - start
        run.peak_gb()
        seconds = run.median_seconds(lambda: losses.extend(step() for _ in range(STEPS)), budget=1.0) / STEPS
        before = losses[(len(losses) - 1) % BATCHES]  # of the same batch as the last
        precision = memory_model.GPU_COMPILED if compiled else memory_model.GPU_AUTOCAST
        planned = memory_model.peak_bytes(config, precision, sum(lengths), max(lengths), checkpointing=checkpointing)
        run.row(
            name, cells_per_s=len(lengths) / seconds, step_ms=seconds * 1e3, peak_gb=run.peak_gb(),
            planned_gb=planned / 1e9, first_3_steps_s=first, ok=float(losses[-1]) < float(before),
            mfu=training_flops(config, np.array(lengths)) / seconds / PEAK,
        )  # fmt: skip
        if profiled:
            profile(run, name, step)


def training_step(
    run: Check, size: str, style: Any, lengths: list[int], checkpointing: bool, compiled: bool
) -> tuple[Callable[[], torch.Tensor], TahoeX1Config]:
    """Return a function that trains by one step and returns the loss, and the model's configuration."""
    config = TahoeX1Config(**TINY if run.tiny else SIZES[size], attention_mask_style=style)
    torch.manual_seed(0)
    with run.device:
        model = TahoeX1ForPreTraining(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled and run.on_gpu:
        compile_layers(model)
    orders = [np.random.default_rng(seed).permutation(lengths).tolist() for seed in range(BATCHES)]
    batches = itertools.cycle(
        [RandomCells(order, config.vocab_size, seed).packed(run.device) for seed, order in enumerate(orders)]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=run.on_gpu)

    def step() -> torch.Tensor:
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            loss: torch.Tensor = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, config


def attention(run: Check) -> None:
    """Measure attention alone, forward and backward, in the ways of packed rows and beside torch's on dense cells."""
    for heads, width, cells, length in (
        (8, 64, 256, 256),
        (8, 64, 64, 1024),
        (16, 128, 32, 1024),
        (16, 128, 16, 2048),
    ):
        heads, width, cells, length = (2, 16, 3, 40) if run.tiny else (heads, width, cells, length)
        name = f"attention, {cells} cells of {length}, {heads} heads of {width}"
        if not run.has_time(name):
            return
        with run.attempt(name):
            run.row(name, **_attention_ms(run, heads, width, RandomCells([length] * cells, 200)))


def _attention_ms(run: Check, heads: int, width: int, cells: RandomCells) -> dict[str, float]:
    number, length = len(cells.lengths), cells.lengths[0]
    shape = (number * length, heads, width)
    tensors = [torch.randn(shape, device=run.device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    gradient = torch.randn(shape, device=run.device, dtype=torch.bfloat16)
    bounds = torch.from_numpy(cells.offsets)
    observed = torch.from_numpy(~cells.targets)[None]
    count = {"num_targets": int(cells.targets.sum())}
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in tensors)
    dense = [tensor.view(number, length, heads, width).transpose(1, 2) for tensor in tensors]
    full = PackedAttention.make(bounds, length, None, run.device, flash=run.on_gpu)
    seen = PackedAttention.make(bounds, length, observed, run.device, flash=run.on_gpu, **count)
    masked = PackedAttention.make(bounds, length, observed, run.device)

    def by_cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(dense[0], dense[1], dense[2]).transpose(1, 2)

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "full_ms": lambda: full(query, key, value, width**-0.5)[0],
        "observed_keys_ms": lambda: seen(query, key, value, width**-0.5)[0],
        "masked_ms": lambda: masked(query, key, value, width**-0.5)[0],
    }
    ways |= {"cudnn_dense_ms": by_cudnn} if run.on_gpu else {}

    def both(way: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(way().reshape(shape), tensors, gradient)

    return {name: 1e3 * run.median_seconds(both(way), budget=0.2) for name, way in ways.items()}


def profile(run: Check, name: str, work: Callable[[], object]) -> None:
    """List the kernels that take most of the GPU's time."""
    if not run.on_gpu:
        return
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    run.wait()
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        run.wait()
    kernels = [event for event in seen.key_averages() if event.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels) / 1e3
    run.row(f"profile of {name}", gpu_ms=total, kernels=sum(event.count for event in kernels))
    for event in kernels[:OF_A_PROFILE]:
        run.row(f"  {event.key[:68]}", ms=event.self_device_time_total / 1e3, calls=event.count)
