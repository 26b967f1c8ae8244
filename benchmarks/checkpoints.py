"""Measure how long a step waits for a checkpoint of shards (FSDP2), written at once or in the background.

    python -m benchmarks checkpoints [--tiny] [--rounds 3]

Two gloo processes on this machine train the 70M shape, and save once in a run, by turns in both ways. What counts is
the time for which the training stands still; beside it, how much slower its steps are while shards are written.
"""

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import torch.distributed as dist
import typer
from transformers import TrainerCallback

from benchmarks.child import python
from benchmarks.train import make_batch, packed
from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining
from tahoex1_hf.runs.checkpoints import COMPLETE
from tahoex1_hf.training.config import read_pretrain_config
from tahoex1_hf.training.pretraining import training_arguments
from tahoex1_hf.training.stream import StepBatches
from tahoex1_hf.training.trainer import PretrainingTrainer

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "TahoeX1Layer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "OMP_NUM_THREADS": "1",
}
STEPS, SAVED = 12, 4  # the steps of a run, and the one after which it saves; the end of a run saves too, unmeasured
SIZES: dict[str, Any] = {"vocab_size": 62720, "hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 12}
TINY: dict[str, Any] = {"vocab_size": 2000, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


class Times(TrainerCallback):
    """The same cells at every step, and when each step ended.

    Attributes:
        ends: Second at which each step ended, and at which the next could begin, in the order of the steps.
    """

    def __init__(self, cells: dict[str, Any]):
        self.cells, self.max_steps, self.steps_per_epoch = cells, STEPS, STEPS
        self.begins: list[float] = []
        self.ends: list[float] = []
        self.dataset: list[int] = []
        self.done = lambda: 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Any:
        for _ in range(STEPS):
            yield self.cells

    def identity(self) -> dict[str, Any]:
        """Return an empty identity, since this run is never resumed."""
        return {}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Note when a step began."""
        self.begins.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note when a step ended."""
        self.ends.append(time.perf_counter())


class Timed(PretrainingTrainer):
    """A trainer that notes how long it stood still for its first checkpoint, and when that was whole."""

    stall = whole = 0.0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.stall:  # the one at the end of the run
            self.wait_for_saves()
            return
        dist.barrier()
        start = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self.stall = time.perf_counter() - start
        sealed = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / COMPLETE

        def watch() -> None:
            while not sealed.is_file():
                time.sleep(0.02)
            self.whole = time.perf_counter() - start

        self.watcher = threading.Thread(target=watch, daemon=True)
        self.watcher.start()


def one_run(folder: Path, background: bool, tiny: bool) -> dict[str, Any]:
    """Train in both processes, and return the times of this one."""
    sizes = TINY if tiny else SIZES
    torch.manual_seed(0)
    model = TahoeX1ForPreTraining(TahoeX1Config(**sizes))
    cells = packed(make_batch(np.full(2, 64 if tiny else 256), sizes["vocab_size"]))
    cells["labels"] = cells["labels"].masked_fill(~cells["target_mask"], -100.0)
    options = [f"output_dir={folder}", "eval_cells=0", f"save_steps={SAVED}", 'precision="no"', "logging_steps=100"]
    times = Times(cells)
    arguments = training_arguments(read_pretrain_config("debug", options), STEPS)
    stream = cast(StepBatches, times)  # which has what a trainer asks of one
    trainer = Timed(model, arguments, stream, microbatch_size=2, background_saves=background, callbacks=[times])
    trainer.run()
    trainer.watcher.join()
    steps = [end - begin for begin, end in zip(times.begins, times.ends, strict=True)]
    whole_at = times.ends[SAVED - 1] + trainer.whole
    during = [s for s, begin in zip(steps[SAVED:], times.begins[SAVED:], strict=True) if begin < whole_at]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "what": f"checkpoint, {'in the background' if background else 'at once'}",
        "mb": round(size / 1e6, 1),
        "stall_s": round(trainer.stall, 2),
        "whole_after_s": round(trainer.whole, 2),
        "step_s": round(statistics.median(steps[1:SAVED]), 2),
        "steps_while_writing": len(during),
        "step_while_writing_s": round(statistics.median(during), 2) if during else None,
    }


def work(folder: Path, rounds: int, tiny: bool) -> None:
    """Make all runs in this process, one of two; the first writes what it saw."""
    for number in range(rounds):
        for background in (False, True):
            row = one_run(folder / f"{number}-{background}", background, tiny)
            if dist.get_rank() == 0:
                with (folder / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(row | {"load": round(os.getloadavg()[0], 1)}) + "\n")
            dist.barrier()


def main(
    output: Annotated[Path, typer.Option(help="File for the rows.")] = Path(__file__).parent
    / "results"
    / "checkpoints.jsonl",
    rounds: Annotated[int, typer.Option(min=1, help="Number of runs of each way.")] = 3,
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny sizes, to see that it works.")] = False,
) -> None:
    """Measure for how long a checkpoint stops the training of two processes with FSDP2."""
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        arguments = ["-m", "benchmarks.checkpoints", folder, str(rounds), *(["--tiny"] if tiny else [])]
        python(*launcher, *arguments, environment=SHARDED).checked()
        text = (Path(folder) / "rows.jsonl").read_text()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), "--tiny" in sys.argv)
