"""Measure attention on a CPU: cell by cell beside padded buckets; in training, to observed keys alone beside masks."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measuring import Row, Suite, Task, in_turn
from tahoex1_hf.observed_attention_tahoe_x1 import ObservedKeys, PackedAttention

HEADS, WIDTH, BUCKET = 8, 64, 8  # the 70M shape has such heads


def query_key_value(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random queries, keys and values, with heads before tokens; `shape` has them after."""
    query, key, value = (torch.randn(shape).transpose(1, 2) for _ in range(3))
    return query, key, value


class Cells:
    """Queries, keys and values of cells one after another, the longest first."""

    def __init__(self, low: int, high: int, number: int) -> None:
        rng = np.random.default_rng(0)
        self.lengths = torch.from_numpy(np.sort(rng.integers(low, high + 1, number))[::-1].copy())
        self.bounds = [0, *self.lengths.cumsum(0).tolist()]
        torch.manual_seed(0)
        self.qkv = query_key_value((1, self.bounds[-1], HEADS, WIDTH))
        self.packed = PackedAttention.make(torch.tensor(self.bounds), None, None, torch.device("cpu"))

    def by_cell(self) -> torch.Tensor:
        """Return our attention's output, `(tokens, heads, width)`."""
        query, key, value = self.qkv
        return self.packed(query, key, value, WIDTH**-0.5)[0][0]

    def in_buckets(self) -> torch.Tensor:
        """Return the same by padded batches of neighbours; padding and unpadding are part of the work."""
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
            query, key, value = padded
            attended = scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None, :])
            output[rows] = attended.transpose(1, 2)[valid]
        return output


class HiddenGenes:
    """Cells of one length, half of whose genes are to be predicted: each token sees the others and itself."""

    def __init__(self, length: int, number: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        shape = (1, number * length, HEADS, WIDTH)
        self.qkv = tuple(tensor.to(dtype).requires_grad_() for tensor in query_key_value(shape))
        self.gradient = torch.randn(shape).to(dtype)
        observed = torch.rand(number, length) < 0.5
        observed[:, 0] = True
        keys = ObservedKeys.make([length] * number, observed.flatten())
        assert keys is not None
        mask = observed[:, None, None, :] | torch.eye(length, dtype=torch.bool)
        boundaries = torch.arange(number + 1) * length
        self.attentions = {
            "observed_keys": PackedAttention(boundaries, [(number, length)], seen=[keys]),
            "masks": PackedAttention(boundaries, [(number, length)], seen=[mask]),
        }

    def forward_and_backward(self, name: str) -> list[torch.Tensor]:
        """Return the output, and the gradients of queries, keys and values, by one of the attentions."""
        query, key, value = self.qkv
        output = self.attentions[name](query, key, value, WIDTH**-0.5)[0]
        return [output.detach(), *torch.autograd.grad(output, self.qkv, self.gradient)]


def rate(work: Callable[[], Any], cells: int) -> float:
    """Return the cells per second of some work on `cells` cells, over at least a tenth of a second."""
    number, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.1:
        work()
        number += 1
    return number * cells / (time.perf_counter() - start)


def beside(
    suite: Suite, name: str, cells: int, ours: Callable[[], Any], theirs: Callable[[], Any], remark: str
) -> Row:
    """Return a row for two ways of doing the same to some cells, measured in turn."""
    tasks = {"theirs": Task(partial(rate, theirs, cells)), "ours": Task(partial(rate, ours, cells))}
    series = in_turn(tasks, 5 * suite.rounds)
    return Row("attention", name, "cells/s", series["ours"], series["theirs"], f"reference: {remark}")


def measure(suite: Suite) -> list[Row]:
    """Return the rows of this part."""
    return [*_measure_buckets(suite), *_measure_observed(suite)]


@torch.inference_mode()
def _measure_buckets(suite: Suite) -> list[Row]:
    rows = []
    for low, high, number in suite.pick(
        [(20, 40, 256), (60, 120, 64), (200, 400, 32), (512, 1024, 16), (1024, 2048, 16)], [(20, 40, 32)]
    ):
        cells = Cells(low, high, number)
        difference = float((cells.by_cell() - cells.in_buckets()).abs().max())
        assert difference < 1e-4, f"attention in buckets differs from that cell by cell by {difference}"
        remark = f"padded buckets of {BUCKET}; max difference {difference:.0e}"
        name = f"cell by cell, {low:,} to {high:,} tokens"
        rows.append(beside(suite, name, number, cells.by_cell, cells.in_buckets, remark))
    return rows


def _measure_observed(suite: Suite) -> list[Row]:
    rows = []
    for length, number in suite.pick([(128, 32), (256, 16), (512, 8), (1024, 4), (2048, 2)], [(256, 2)]):
        for dtype in (torch.float32, torch.bfloat16):
            cells = HiddenGenes(length, number, dtype)
            ours, theirs = (partial(cells.forward_and_backward, name) for name in ("observed_keys", "masks"))
            pairs = zip(ours(), theirs(), strict=True)
            difference = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
            assert difference < (1e-4 if dtype == torch.float32 else 0.1), f"observed keys differ by {difference}"
            remark = f"masks; forward and backward; max difference {difference:.0e}"
            name = f"half hidden, {length:,} tokens, {str(dtype).removeprefix('torch.')}"
            rows.append(beside(suite, name, number, ours, theirs, remark))
    return rows
