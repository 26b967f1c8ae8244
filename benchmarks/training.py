"""A step of pretraining (forward, backward, clipping, AdamW), beside the reference with the same weights and batch.

    python -m benchmarks.training reference|padded|packed [--quick]      # one step, in a process of its own

measures nothing: it is run to see how much memory the step takes.
"""

import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import reference
from benchmarks.child import python
from benchmarks.embedding import random_model, reference_shape
from benchmarks.measuring import Row, Series, Suite, Task, in_turn, progress
from tahoex1_hf import TahoeX1ForPreTraining
from tahoex1_hf.training.flops import training_flops

CELLS, TARGETS = 4, 0.5

Loss = Callable[[], torch.Tensor]


class Way(StrEnum):
    """Of making a step."""

    reference = "reference"
    padded = "padded"
    packed = "packed"


def make_batch(lengths: np.ndarray, vocab_size: int) -> dict[str, torch.Tensor]:
    """Padded batch of cells of so many tokens, with half of the genes to be predicted."""
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
    # Labels near zero, as large as a prediction: a wrong prediction then shows in the loss.
    labels = (torch.tensor(values) - 25.5) / 14.4
    return {
        "input_ids": torch.tensor(ids),
        "expression_values": torch.tensor(values).masked_fill(torch.tensor(targets), -1.0),
        "attention_mask": torch.tensor(ids != reference.PAD_ID),
        "target_mask": torch.tensor(targets),
        "labels": labels,
    }


def packed(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same cells behind each other in one row."""
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
        """Cells per second of one step."""
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
    """One way of making the step, from the same weights."""
    if way == Way.reference:
        theirs = reference.training_reference(reference_shape(model.config), model.state_dict())
        inputs = [batch[name] for name in ("input_ids", "expression_values", "target_mask", "labels")]
        return Trainer(theirs, lambda: theirs(*inputs))
    ours = copy.deepcopy(model)
    arguments = batch if way == Way.padded else packed(batch)
    return Trainer(ours, lambda: ours(**arguments).loss)


def kinds_of_cells(suite: Suite) -> dict[str, np.ndarray]:
    """Tokens of each cell, `<cls>` included."""
    most = suite.pick(1024, 256)
    ragged = np.random.default_rng(0).integers(suite.pick(200, 50), most + 1, CELLS)
    return {f"{CELLS} cells of {most:,} tokens": np.full(CELLS, most),
            f"{CELLS} ragged cells, mean {ragged.mean():.0f} tokens": ragged}  # fmt: skip


def make_model(suite: Suite) -> TahoeX1ForPreTraining:
    """With the mask of the 70M model's training."""
    vocab_size = suite.pick(62720, 4096)
    return random_model(
        TahoeX1ForPreTraining, suite.config(attention_mask_style="observed_or_self", vocab_size=vocab_size)
    )


def measure(suite: Suite) -> list[Row]:
    """Rows of this part."""
    model = make_model(suite)
    rows: list[Row] = []
    for kind, lengths in kinds_of_cells(suite).items():
        batch = make_batch(lengths, model.config.vocab_size)
        trainers = {way.value: make_trainer(way, model, batch) for way in Way}
        found = {name: trainer.first_step() for name, trainer in trainers.items()}
        differences = {name: largest_difference(found[name], found["reference"]) for name in found}
        assert max(differences.values()) < 1e-4, f"losses or gradients differ: {found}"
        gflop = {"useful": training_flops(model.config, lengths) / CELLS / 1e9}
        limit = suite.limits["matmul float32"]
        series = in_turn({name: Task(trainer.rate, limit, gflop) for name, trainer in trainers.items()}, suite.rounds)
        for way in (Way.padded, Way.packed):
            remark = f"loss and gradient norm within {differences[way]:.0e} of the reference's"
            rows.append(
                Row("training", f"{kind}, {way.value}", "cells/s", series[way], series["reference"], remark,
                    details={"first_step": found, "shape": suite.shape_name})
            )  # fmt: skip
    return [*rows, *peaks_of_memory(suite)]


def largest_difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Relative."""
    return max(abs(ours[name] / theirs[name] - 1) for name in theirs)


def peaks_of_memory(suite: Suite) -> list[Row]:
    """Peak memory of two steps on the longer cells, each way in a process of its own."""
    progress("  memory")
    quick = ["--quick"] if suite.quick else []
    with ThreadPoolExecutor(suite.pick(1, len(Way))) as pool:  # the full size does not fit into memory three times
        runs = {way: pool.submit(python, "-m", "benchmarks.training", way.value, *quick) for way in Way}
    peaks = {way: Series([run.result().checked().peak_mb]) for way, run in runs.items()}
    return [
        Row("training", f"peak memory, {way.value}", "MB", peaks[way], peaks[Way.reference], smaller_is_better=True)
        for way in (Way.padded, Way.packed)
    ]


def main(way: Way, quick: Annotated[bool, typer.Option("--quick")] = False) -> None:
    suite = Suite(rounds=1, quick=quick)
    model = make_model(suite)
    batch = make_batch(next(iter(kinds_of_cells(suite).values())), model.config.vocab_size)
    trainer = make_trainer(way, model, batch)
    del model  # the trainer has a copy
    for _ in range(2):
        trainer.step()


if __name__ == "__main__":
    typer.run(main)
