"""Embed the cells of argv[1] with a sharded model, in several processes; the first writes what it got into argv[2]."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import write_vocab
from helpers import tiny_config, tiny_model
from torch.distributed.fsdp import fully_shard

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells import encoding
from tahoex1_hf.common.processes import training_processes
from tahoex1_hf.training.evaluation import CellTypeConfig, CellTypeEvaluation, Pieces

CHUNK = 7  # cells, so that a small file has some chunks


class Watched(CellTypeEvaluation):
    """Notes the share of this process, or fails in the second one."""

    def __init__(self, file: Path, tokenizer: TahoeX1Tokenizer, fails: bool = False):
        super().__init__(CellTypeConfig(name="kinds", file=str(file), label="kind"))
        self.tokenizer, self.fails, self.share = tokenizer, fails, [-1]

    def features(self, model: torch.nn.Module, process: int, processes: int) -> Pieces:
        if self.fails and process == 1:
            raise ValueError("this process cannot read the file")
        pieces, labels = super().features(model, process, processes)
        self.share = sorted(pieces)
        return pieces, labels


def main(file: Path, output: Path) -> None:
    encoding.CHUNK_CELLS = CHUNK
    processes = training_processes()
    folder = output.parent / str(processes.process_index)
    folder.mkdir()
    tokenizer = TahoeX1Tokenizer(write_vocab(folder), context_length=32)
    model: Any = tiny_model(tiny_config(vocab_size=max(tokenizer.get_vocab().values()) + 1)).train()
    for module in (*model.tahoe.layers, model):
        fully_shard(module)
    good, bad = Watched(file, tokenizer), Watched(file, tokenizer, fails=True)
    assert bad._gathered(model) is None
    found = good._gathered(model)
    shares: list[Any] = [None] * processes.num_processes
    torch.distributed.all_gather_object(shares, good.share)
    if found is not None:
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
        np.savez(output, embeddings=found[0], labels=found[1].astype(str))
        seen = {"shares": shares, "timeout": backend.options._timeout.total_seconds(), "trains": model.training}
        output.with_suffix(".json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
