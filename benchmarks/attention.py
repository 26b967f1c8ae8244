"""Attention on a CPU: cell by cell, as ours does, beside padded buckets of cells of similar length."""

import time
from functools import partial

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measuring import Row, Suite, Task, in_turn
from tahoex1_hf.packing_tahoe_x1 import PackedAttention

HEADS, WIDTH, BUCKET = 8, 64, 8  # heads and their width are those of the 70M shape


class Cells:
    """Queries, keys and values of cells behind each other, the longest first."""

    def __init__(self, low: int, high: int, number: int) -> None:
        rng = np.random.default_rng(0)
        self.lengths = torch.from_numpy(np.sort(rng.integers(low, high + 1, number))[::-1].copy())
        self.bounds = [0, *self.lengths.cumsum(0).tolist()]
        torch.manual_seed(0)
        self.qkv = tuple(torch.randn(1, self.bounds[-1], HEADS, WIDTH).transpose(1, 2) for _ in range(3))
        self.packed = PackedAttention.make(torch.tensor(self.bounds), None, None, torch.device("cpu"))

    def by_cell(self) -> torch.Tensor:
        """Ours: `(tokens, heads, width)`."""
        return self.packed(*self.qkv, WIDTH**-0.5)[0][0]

    def in_buckets(self) -> torch.Tensor:
        """The same in padded batches of neighbours; padding them and back is part of the work."""
        output = torch.empty(self.bounds[-1], HEADS, WIDTH)
        for first in range(0, len(self.lengths), BUCKET):
            lengths = self.lengths[first : first + BUCKET]
            valid = torch.arange(int(lengths.max())) < lengths[:, None]
            rows = slice(self.bounds[first], self.bounds[min(first + BUCKET, len(self.lengths))])
            padded = []
            for tensor in self.qkv:
                cells = torch.zeros(*valid.shape, HEADS, WIDTH)
                cells[valid] = tensor[0].transpose(0, 1)[rows]
                padded.append(cells.transpose(1, 2))
            attended = scaled_dot_product_attention(*padded, attn_mask=valid[:, None, None, :])
            output[rows] = attended.transpose(1, 2)[valid]
        return output

    def rate(self, name: str) -> float:
        """Cells per second, over at least a tenth of one."""
        work, number, start = getattr(self, name), 0, time.perf_counter()
        while time.perf_counter() - start < 0.1:
            work()
            number += 1
        return number * len(self.lengths) / (time.perf_counter() - start)


@torch.inference_mode()
def measure(suite: Suite) -> list[Row]:
    """Rows of this part."""
    rows = []
    for low, high, number in suite.pick(
        [(20, 40, 256), (60, 120, 64), (200, 400, 32), (512, 1024, 16), (1024, 2048, 16)], [(20, 40, 32)]
    ):
        cells = Cells(low, high, number)
        difference = float((cells.by_cell() - cells.in_buckets()).abs().max())
        assert difference < 1e-4, f"attention in buckets differs from that cell by cell by {difference}"
        names = ("in_buckets", "by_cell")
        series = in_turn({name: Task(partial(cells.rate, name)) for name in names}, 5 * suite.rounds)
        remark = f"reference: padded buckets of {BUCKET}; max difference {difference:.0e}"
        name = f"cell by cell, {low:,} to {high:,} tokens"
        rows.append(Row("attention", name, "cells/s", series["by_cell"], series["in_buckets"], remark))
    return rows
