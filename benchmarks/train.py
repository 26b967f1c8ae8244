"""Measure a step of pretraining (forward, backward, clipping, AdamW) beside the reference with the same weights.

Both take the same batch. There are two references: one with attention written out, as in the original's torch path,
and one with torch's fused kernel. Trainer's loop is measured beside the bare step, too.

    python -m benchmarks.train reference|packed|... [--quick]

makes two steps and measures nothing; the suite runs it as a process to see how much memory a step takes.
"""

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import StrEnum
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import TrainerCallback

from benchmarks import reference
from benchmarks.child import python
from benchmarks.embedding import random_model, reference_shape
from benchmarks.measuring import Row, Series, Suite, Task, in_turn, progress, timed
from tahoex1_hf import TahoeX1ForPreTraining
from tahoex1_hf.inference.encoder import choose_dtype
from tahoex1_hf.training.config import read_pretrain_config
from tahoex1_hf.training.flops import training_flops
from tahoex1_hf.training.pretraining import training_arguments
from tahoex1_hf.training.trainer import PretrainingTrainer

CELLS, TARGETS = 4, 0.5

Loss = Callable[[], torch.Tensor]


class Way(StrEnum):
    """A way of making a step."""

    reference = "reference"
    fused = "reference_fused"
    packed = "packed"
    bfloat16 = "packed_bfloat16"


OURS = (Way.packed, Way.bfloat16)


def make_batch(lengths: np.ndarray, vocab_size: int) -> dict[str, torch.Tensor]:
    """Return a padded batch of cells of given lengths; half of the genes are targets."""
    rng = np.random.default_rng(0)
    shape = (len(lengths), int(lengths.max()))
    ids = np.full(shape, reference.PAD_ID)
    values = np.full(shape, reference.PAD_VALUE, dtype=np.float32)
    targets = np.zeros(shape, dtype=bool)
    for row, length in enumerate(lengths):
        ids[row, 0] = reference.CLS_ID
        ids[row, 1:length] = rng.choice(np.arange(3, vocab_size), length - 1, replace=False)
        values[row, 1:length] = rng.integers(1, 51, length - 1)
        targets[row, 1 + rng.permutation(length - 1)[: int(TARGETS * (length - 1))]] = True
    # Labels near zero are as large as a prediction, so that a wrong prediction shows in the loss.
    labels = (torch.tensor(values) - 25.5) / 14.4
    return {
        "input_ids": torch.tensor(ids),
        "expression_values": torch.tensor(values).masked_fill(torch.tensor(targets), -1.0),
        "attention_mask": torch.tensor(ids != reference.PAD_ID),
        "target_mask": torch.tensor(targets),
        "labels": labels,
    }


def packed(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the same cells packed, one after another in one row."""
    valid = batch["attention_mask"]
    arguments: dict[str, Any] = {
        name: tensor[valid].unsqueeze(0) for name, tensor in batch.items() if name != "attention_mask"
    }
    lengths = valid.sum(1)
    boundaries = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    longest = int(lengths.max())
    arguments |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    return arguments | {"max_length_q": longest, "max_length_k": longest}


class Trainer:
    """A model that makes steps on one batch."""

    def __init__(self, model: torch.nn.Module, loss: Loss):
        self.model, self.loss = model, loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=1e-5)

    def step(self) -> None:
        """Make a step."""
        self.model.train()
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rate(self) -> float:
        """Return the cells per second of one step."""
        start = time.perf_counter()
        self.step()
        return CELLS / (time.perf_counter() - start)

    def first_step(self) -> dict[str, float]:
        """Make a step without dropout, whose random numbers differ between padded and packed cells.

        Returns:
            The loss and the norm of its gradient.
        """
        self.model.eval()
        loss = self.loss()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()  # makes the optimizer's state
        self.optimizer.zero_grad()
        return {"loss": loss.item(), "gradient norm": norm.item()}


def make_trainer(way: Way, model: TahoeX1ForPreTraining, batch: dict[str, torch.Tensor]) -> Trainer:
    """Return a trainer that makes steps in one way, from the same weights."""
    if way in (Way.reference, Way.fused):
        shape = replace(reference_shape(model.config), fused=way == Way.fused)
        theirs = reference.training_reference(shape, model.state_dict())
        inputs = [batch[name] for name in ("input_ids", "expression_values", "target_mask", "labels")]
        return Trainer(theirs, lambda: theirs(*inputs))
    ours = copy.deepcopy(model)
    arguments = packed(batch)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=way == Way.bfloat16):
            return ours(**arguments).loss

    return Trainer(ours, loss)


def ways() -> list[Way]:
    """Return all ways, with bfloat16 only where the CPU has instructions for it."""
    fast = choose_dtype("auto", torch.device("cpu")) == torch.bfloat16
    return [way for way in Way if fast or way != Way.bfloat16]


def kinds_of_cells(suite: Suite) -> dict[str, np.ndarray]:
    """Return the tokens of each cell, `<cls>` included, by kind."""
    most = suite.pick(1024, 256)
    ragged = np.random.default_rng(0).integers(suite.pick(200, 50), most + 1, CELLS)
    return {f"{CELLS} cells of {most:,} tokens": np.full(CELLS, most),
            f"{CELLS} ragged cells, mean {ragged.mean():.0f} tokens": ragged}  # fmt: skip


def make_model(suite: Suite) -> TahoeX1ForPreTraining:
    """Return a model with the attention mask of the 70M model's training."""
    vocab_size = suite.pick(62720, 4096)
    return random_model(
        TahoeX1ForPreTraining, suite.config(attention_mask_style="observed_or_self", vocab_size=vocab_size)
    )


def measure(suite: Suite) -> list[Row]:
    """Return the rows of this part."""
    model = make_model(suite)
    rows: list[Row] = []
    for kind, lengths in kinds_of_cells(suite).items():
        batch = make_batch(lengths, model.config.vocab_size)
        trainers = {way.value: make_trainer(way, model, batch) for way in ways()}
        found = {name: trainer.first_step() for name, trainer in trainers.items()}
        differences = {name: largest_difference(found[name], found["reference"]) for name in found}
        assert all(differences[n] < (0.05 if n == Way.bfloat16 else 1e-4) for n in found), f"results differ: {found}"
        gflop = {"useful": training_flops(model.config, lengths) / CELLS / 1e9}
        kinds = {name: "bfloat16" if name == Way.bfloat16 else "float32" for name in trainers}
        tasks = {n: Task(trainer.rate, suite.limits[f"matmul {kinds[n]}"], gflop) for n, trainer in trainers.items()}
        series = in_turn(tasks, suite.rounds)
        for way in (way for way in trainers if way in OURS):
            remark = f"loss and gradient norm within {differences[way]:.0e} of the reference's"
            details = {"first_step": found, "shape": suite.shape_name}
            for name, against in (("", Way.reference), (", beside fused attention", Way.fused)):
                row = Row("training", f"{kind}, {way}{name}", "cells/s", series[way], series[against], remark)
                rows.append(replace(row, details=details))
    return [*rows, *loop(suite), *peaks_of_memory(suite)]


def loop(suite: Suite) -> list[Row]:
    """Measure steps of Trainer and bare steps on the same cells by turns, and the time to the first step."""
    model, steps = make_model(suite), 4
    batch = make_batch(next(iter(kinds_of_cells(suite).values())), model.config.vocab_size)
    bare, cells = make_trainer(Way.packed, model, batch), packed(batch)
    cells["labels"] = cells["labels"].masked_fill(~cells["target_mask"], -100.0)
    bare.step()
    config = read_pretrain_config("debug", [f"output_dir={suite.folder}", "eval_cells=0", "logging_steps=1"])
    turns: Any = Turns(bare, cells, steps)
    arguments = training_arguments(config, steps)
    trainer = PretrainingTrainer(model, arguments, turns, microbatch_size=CELLS, callbacks=[turns])
    setattr(trainer, "_save_checkpoint", lambda *_: None)  # noqa: B010 - a checkpoint would count as part of the step's time
    progress("  loop")
    turns.begun = time.perf_counter()
    trainer.train()
    rows = {"Trainer's loop, a step": slice(1, None), "from train() to the end of the first step": slice(1)}
    return [
        Row("training", name, "s", Series(turns.loop[part]), Series(turns.bare[part]), "beside the bare step",
            smaller_is_better=True)
        for name, part in rows.items()
    ]  # fmt: skip


class Turns(TrainerCallback):
    """Batches with the same cells at every step, and a callback that makes a bare step after each and times both."""

    def __init__(self, bare: Trainer, cells: dict[str, Any], steps: int):
        self.make_bare_step, self.cells, self.max_steps, self.steps_per_epoch = bare.step, cells, steps, steps
        self.begun = 0.0
        self.loop: list[float] = []
        self.bare: list[float] = []
        self.dataset: list[int] = []
        self.done: Callable[[], int] = lambda: 0

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.max_steps):
            yield self.cells

    def identity(self) -> dict[str, Any]:
        """Return an empty identity, since this run is never resumed."""
        return {}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time of Trainer's step, and make a bare step."""
        self.loop.append(time.perf_counter() - self.begun)
        self.bare.append(timed(self.make_bare_step))
        self.begun = time.perf_counter()


def largest_difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Return the largest relative difference."""
    return max(abs(ours[name] / theirs[name] - 1) for name in theirs)


def peaks_of_memory(suite: Suite) -> list[Row]:
    """Return the peak memory of two steps on the longer cells, each way in its own process."""
    progress("  memory")
    quick = ["--quick"] if suite.quick else []
    with ThreadPoolExecutor(suite.pick(1, len(Way))) as pool:  # the full size does not fit into memory three times
        runs = {way: pool.submit(python, "-m", "benchmarks.train", way.value, *quick) for way in ways()}
    peaks = {way: Series([run.result().checked().peak_mb]) for way, run in runs.items()}
    return [
        Row("training", f"peak memory, {way.value}", "MB", peaks[way], peaks[Way.reference], smaller_is_better=True)
        for way in OURS
        if way in peaks
    ]


def main(way: Way, quick: Annotated[bool, typer.Option("--quick", help="Small sizes.")] = False) -> None:
    """Make two steps."""
    suite = Suite(rounds=1, quick=quick)
    model = make_model(suite)
    batch = make_batch(next(iter(kinds_of_cells(suite).values())), model.config.vocab_size)
    trainer = make_trainer(way, model, batch)
    del model  # the trainer has a copy
    for _ in range(2):
        trainer.step()


if __name__ == "__main__":
    typer.run(main)
