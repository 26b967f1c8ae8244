"""Write the tables of docs/scaling.md: `python -m benchmarks.scaling_plan`.

They are computed, from the rates of one H100 that docs/benchmarks/gpu-cost.jsonl holds.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import memory_model as memory
from benchmarks import scaling_simulation
from benchmarks.pages import read_gpu
from benchmarks.scaling_model import H100, Assumptions, Hardware, Plan, matrix_share, plan_step, plans, precision_of
from tahoex1_hf import TahoeX1Config
from tahoex1_hf.training.config import read_pretrain_config
from tahoex1_hf.training.flops import training_flops

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
RECIPES = ROOT / "tahoex1_hf" / "training" / "recipes"

EPOCH = 266e6  # cells, from the original's paper
PRICE = 2.5  # dollars for an hour of a GPU; an assumption: prices range from about half to twice as much
# Measured steps whose utilisation the models are planned with, by width: the size, and its cells of 1,024 tokens.
MEASURED = {512: ("70M", 64), 2048: ("1.3B", 24)}
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
NAMES = {"one": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2", "hsdp": "HSDP"}
SIMPLER_WITHIN = 1.10  # a simpler plan is chosen if it takes at most this many times as long as the fastest


@dataclass(frozen=True)
class Model:
    """A model to plan for, and the cells of a step."""

    name: str
    config: TahoeX1Config
    global_batch: int
    context: int


@cache
def models() -> tuple[Model, ...]:
    """Return the models of the recipes, and a larger one of our own."""
    found = []
    for name, recipe in (("70M", "70m"), ("1.3B", "1_3b"), ("3B", "3b-stage1")):
        settings = read_pretrain_config(RECIPES / f"{recipe}.yaml")
        # The 3B recipe has its drugs (378 rows, with fingerprints of 2,048 bits) in files that are not here.
        drugs: dict[str, Any] = {"num_drugs": 378, "drug_token_id": 2} if settings.drug_table else {}
        config = TahoeX1Config(**settings.model, **drugs)
        found.append(Model(name, config, settings.global_batch_size, settings.context_length))
    shape: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 48, "num_attention_heads": 32}
    largest = found[-1]
    config = TahoeX1Config(**{**largest.config.to_diff_dict(), **shape, "num_key_value_heads": 32,
                              "intermediate_size": 4 * 4096})  # fmt: skip
    return (*found, replace(largest, name="10B", config=config))


def measured(width: int, style: str) -> tuple[float, int]:
    """Return the utilisation of a step on one H100, and its cells, of the model of this width with this attention."""
    size, cells = MEASURED[width]
    return read_gpu()[f"train {size} {style}, {cells} cells of equal lengths"]["mfu"], cells


@cache
def assumptions(width: int, style: str) -> Assumptions:
    """Return the assumptions for a width and an attention: products run as in the widest measured that is no wider."""
    nearest = max(known for known in MEASURED if known <= width)
    config = next(each.config for each in models() if each.config.hidden_size == nearest)
    utilisation, cells = measured(nearest, style)
    return Assumptions(matrix_share(utilisation, config, 1024, cells))


def assumed(model: Model) -> Assumptions:
    """Return the assumptions for a model."""
    return assumptions(model.config.hidden_size, model.config.attention_mask_style)


def chosen(found: Iterable[Plan], hardware: Hardware = H100) -> Plan | None:
    """Return the simplest plan that is hardly slower than the fastest and leaves half of the memory to the cells."""
    candidates = sorted(found, key=lambda plan: plan.seconds)
    if not candidates:
        return None
    order = list(NAMES)
    good = [
        plan
        for plan in candidates
        if plan.seconds <= SIMPLER_WITHIN * candidates[0].seconds and plan.states.total <= hardware.memory / 2
    ]
    return min(good, key=lambda plan: order.index(plan.strategy), default=candidates[0])


def table(header: list[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def gigabytes(value: float) -> str:
    """Return bytes as text in GB of 1e9 bytes."""
    return f"{value / 1e9:.1f}"


def shapes() -> str:
    """Return the table of parameters, operations and bytes kept, model by model."""
    rows = []
    for model in models():
        c, p = model.config, memory.count_parameters(model.config)
        flops = training_flops(c, np.array([model.context])) / model.context
        gpu = [memory.kept_per_token(c, precision_of(s), model.context) / 1e3 for s in ("ddp", "fsdp2")]
        less = memory.kept_per_token(c, precision_of("fsdp2"), model.context, checkpointing=True) / 1e3
        rows.append(
            [model.name, c.hidden_size, c.num_hidden_layers, c.num_attention_heads, f"{p.total:,}",
             f"{flops / 1e9:.2f}", *(f"{kept:,.0f}" for kept in gpu), f"{less:,.0f}", f"{model.global_batch:,}"]
        )  # fmt: skip
    header = ["model", "width", "layers", "heads", "parameters", "GFLOP per token", "kept, one GPU or DDP (kB)",
              "FSDP2", "FSDP2, checkpointing", "cells of a step"]  # fmt: skip
    return table(header, rows)


def by_devices(model: Model) -> tuple[str, str]:
    """Return the tables of memory and of time of the chosen plan for every number of devices."""
    sizes, times = [], []
    for devices in DEVICES:
        plan = chosen(plans(model.config, model.context, model.global_batch, devices, assumed(model)))
        if plan is None:
            sizes.append([devices, "does not fit", *[""] * 8])
            times.append([devices, "does not fit", *[""] * 8])
            continue
        name = NAMES[plan.strategy] + (", checkpointing" if plan.checkpointing else "")
        s = plan.states
        parts = (s.weights, s.gradients, s.moments, s.copies, plan.pass_bytes, plan.bytes)
        passes = -(-plan.cells // plan.microbatch)
        sizes.append([devices, name, plan.cells, f"{plan.microbatch} x {passes}", *map(gigabytes, parts)])
        hours = plan.device_hours(EPOCH)
        alone = plan_step(
            model.config,
            model.context,
            model.global_batch,
            devices,
            plan.strategy,
            replace(assumed(model), overlap=0.0),
            checkpointing=plan.checkpointing,
        )
        if alone is None:
            raise ValueError("Overlap has nothing to do with memory.")
        times.append(
            [devices, name, f"{plan.seconds:.3g}", f"{plan.optimizer:.1g}", f"{alone.waiting:.2g}",
             f"{100 * plan.utilisation:.0f} %", f"{100 * alone.utilisation:.0f} %", f"{plan.rate:,.0f}",
             f"{hours / devices:,.1f}", f"{hours:,.0f} / {hours * PRICE:,.0f}"]
        )  # fmt: skip
    first = ["GPUs", "parallelism", "cells per GPU and step", "microbatch x passes", "weights", "gradients", "AdamW",
             "copies and gathered", "activations", "sum (GB)"]  # fmt: skip
    second = ["GPUs", "parallelism", "step (s)", "of which optimizer", "communication", "MFU", "MFU, nothing hidden",
              "cells/s", "hours per epoch", "GPU hours / dollars per epoch"]  # fmt: skip
    return table(first, sizes), table(second, times)


def strategies(devices: int) -> str:
    """Return the table of all plans that fit on a number of devices, to judge the choice by."""
    rows = []
    for model in models():
        for plan in plans(model.config, model.context, model.global_batch, devices, assumed(model)):
            yes = "yes" if plan.checkpointing else "no"
            rows.append([model.name, NAMES[plan.strategy], yes, plan.microbatch, gigabytes(plan.states.total),
                         gigabytes(plan.bytes), f"{100 * plan.utilisation:.0f} %"])  # fmt: skip
    header = ["model", "parallelism", "checkpointing", "microbatch", "weights to gathered (GB)", "sum (GB)", "MFU"]
    return table(header, rows)


def contexts(devices: int) -> str:
    """Return the table of an epoch with cells of 1,024 and of 2,048 tokens."""
    rows = []
    for model in models():
        for context in (1024, 2048):
            plan = chosen(plans(model.config, context, model.global_batch, devices, assumed(model)))
            if plan is None:
                raise ValueError(f"{model.name} does not fit on {devices} devices.")
            hours = plan.device_hours(EPOCH)
            rows.append([model.name, f"{context:,}", NAMES[plan.strategy], plan.microbatch,
                         f"{100 * plan.utilisation:.0f} %", f"{plan.rate:,.0f}", f"{hours / devices:,.1f}",
                         f"{hours:,.0f}", f"{hours * PRICE:,.0f}"])  # fmt: skip
    header = ["model", "tokens of a cell", "parallelism", "microbatch", "MFU", "cells/s", "hours", "GPU hours",
              "dollars"]  # fmt: skip
    return table(header, rows)


def networks(devices: int) -> str:
    """Return the table that compares FSDP2 and HSDP on slower networks."""
    rows = []
    for gigabits in (400, 200, 100, 50, 25):
        hardware = replace(H100, network=gigabits / 8 * 1e9)
        cells = []
        for model in models()[1:]:
            for strategy in ("fsdp2", "hsdp"):
                plan = plan_step(model.config, model.context, model.global_batch, devices, strategy, assumed(model),
                                 hardware=hardware)  # fmt: skip
                cells.append("does not fit" if plan is None else f"{100 * plan.utilisation:.0f} %")
        rows.append([gigabits, *cells])
    header = [f"{m.name}, {NAMES[s]}" for m in models()[1:] for s in ("fsdp2", "hsdp")]
    return table(["Gb/s per GPU", *header], rows)


def used() -> str:
    """Return the table of the assumptions."""
    a = assumed(models()[0])

    def shares(style: str) -> str:
        found = [(measured(width, style)[0], assumptions(width, style).matrix_share) for width in MEASURED]
        return " and ".join(f"{100 * whole:.0f} % (products {100 * share:.0f} %)" for whole, share in found)

    rows = [
        ["memory of a GPU", f"{gigabytes(H100.memory)} GB, of which {gigabytes(a.reserved)} GB for driver and NCCL"],
        ["bfloat16 products, data sheet", f"{H100.peak / 1e12:.0f} TFLOP/s"],
        ["memory traffic, data sheet", f"{H100.memory_rate / 1e12:.2f} TB/s"],
        ["NVLink in one direction, data sheet", f"{H100.machine_link / 1e9:.0f} GB/s per GPU"],
        ["network", f"{H100.network * 8 / 1e9:.0f} Gb/s per GPU, {H100.per_machine} GPUs in a machine"],
        ["model FLOP utilisation of 70M and 1.3B, measured on one H100, masked", shares("observed_or_self")],
        ["the same with full attention, for 3B and 10B", shares("full")],
        ["times that a kept byte crosses the GPU's memory", f"{a.passes:.0f}"],
        ["share of a link's rate that is reached", f"{100 * a.links:.0f} %"],
        ["share of computing behind which communication hides", f"{100 * a.overlap:.0f} %"],
        ["price of a GPU hour", f"{PRICE:.2f} dollars"],
        ["cells of an epoch", f"{EPOCH / 1e6:.0f} million, each of the whole context"],
    ]
    return table(["assumption", "value"], rows)


def tables() -> dict[str, str]:
    """Return all tables of the document, by their names in it."""
    found = {"assumptions": used(), "shapes": shapes(), "strategies": strategies(64), "contexts": contexts(64),
             "networks": networks(64)}  # fmt: skip
    for model in models():
        found[f"memory {model.name}"], found[f"time {model.name}"] = by_devices(model)
    found |= {name: table(header, rows) for name, (header, rows) in scaling_simulation.tables().items()}
    return found


def filled(document: str) -> str:
    """Return the document with new tables between `<!-- table NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: For a table that the document lacks, or that no function makes.
    """
    made = tables()
    names = re.findall(r"<!-- table (.+?) -->", document)
    if sorted(names) != sorted(made):
        raise ValueError(f"docs/scaling.md has tables {sorted(names)}, made are {sorted(made)}.")
    for name, text in made.items():
        mark = f"<!-- table {name} -->"
        whole = f"{mark}\n\n{text}\n\n<!-- end -->"
        place = rf"{re.escape(mark)}.*?<!-- end -->"
        # A backslash is no reference to a group.
        document = re.sub(place, whole.replace("\\", r"\\"), document, flags=re.DOTALL)
    return document


def draw(path: Path) -> None:
    """Draw the hours of an epoch by number of devices, and the parts of the memory on each of 64 devices."""
    from benchmarks.charts import STYLE, plt

    colors = ("#9ecae1", "#4292c6", "#1f6fb4", "#08306b")
    parts = {"weights": "#08306b", "gradients": "#1f6fb4", "AdamW": "#9ecae1", "copies and gathered": "#9a9a9a",
             "activations": "#f0a030"}  # fmt: skip
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.6), layout="constrained")
        bars: list[tuple[str, Plan]] = []
        for model, color in zip(models(), colors, strict=True):
            arguments = (model.config, model.context, model.global_batch)
            found = {n: chosen(plans(*arguments, n, assumed(model))) for n in DEVICES}
            hours = {n: plan.device_hours(EPOCH) / n for n, plan in found.items() if plan is not None}
            left.plot(list(hours), list(hours.values()), marker="o", color=color, label=model.name)
            left.annotate(
                model.name, (DEVICES[-1], hours[DEVICES[-1]]), (7, 0), textcoords="offset points", va="center"
            )
            for strategy in ("ddp", "fsdp2"):
                plan = plan_step(*arguments, 64, strategy, assumed(model))
                if plan is not None:
                    bars.append((f"{model.name}, {NAMES[strategy]}", plan))
        left.set_xscale("log", base=2)
        left.set_yscale("log")
        left.set_xticks(DEVICES, [str(n) for n in DEVICES])
        left.set_yticks([0.1, 1, 10, 100, 1000], ["6 minutes", "1", "10", "100", "1,000"])
        left.set_xlabel("H100s")
        left.set_ylabel("hours")
        left.set_title("An epoch of 266 million cells of 1,024 tokens")
        place = range(len(bars))
        start = np.zeros(len(bars))
        for number, (part, color) in enumerate(parts.items()):
            sizes = [
                (p.states.weights, p.states.gradients, p.states.moments, p.states.copies, p.pass_bytes)[number] / 1e9
                for _, p in bars
            ]
            right.barh(place, sizes, left=start, color=color, height=0.62, label=part)
            start += sizes
        right.axvline(H100.memory / 1e9, color="black", linewidth=0.8)
        right.set_yticks(place, [f"{name}, microbatch {plan.microbatch}" for name, plan in bars])
        right.invert_yaxis()
        right.set_xlabel("GB on each GPU (line: what it has)")
        right.set_title("Memory on 64 H100s, without checkpointing", pad=24)
        right.legend(ncols=5, frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(-0.3, 1.0), columnspacing=1)
        figure.suptitle("Computed, from the rate of one H100 (docs/scaling.md)", fontsize=10, x=0.01, ha="left")
        figure.savefig(path, dpi=130)
        plt.close(figure)


if __name__ == "__main__":
    draw(DOCUMENT.with_suffix(".png"))
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
