"""What both pieces of the GPU check share: rows that survive an interruption, cells, errors and times."""

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import progress
from tahoex1_hf.padding_tahoe_x1 import EncodedCells


@dataclass
class Check:
    """A running check.

    Attributes:
        device: Where everything runs.
        tiny: Whether sizes are tiny, to see on a CPU that all of it works; times then say nothing.
        path: File of the rows, one JSON object a line.
        seconds: Seconds after which no further measurement is begun.
    """

    device: torch.device
    tiny: bool
    path: Path
    seconds: float

    def __post_init__(self) -> None:
        self.began, self.rows, self.left = time.perf_counter(), list[dict[str, Any]](), 0

    def row(self, what: str, **values: Any) -> None:
        """Keep a result at once: a check that is cut short leaves what it found."""
        values = {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
        self.rows.append({"what": what, **values})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        progress("  " + rendered(self.rows[-1]))

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Run a measurement, and record an exception as its result."""
        self.left = torch.cuda.memory_allocated() if self.on_gpu else 0
        try:
            yield
        except Exception as error:
            self.row(what, ok=False, failed=f"{type(error).__name__}: {str(error)[:200]}")
        if self.on_gpu:
            gc.collect()  # compiled layers hold themselves, and the next peak would count them
            torch.cuda.empty_cache()

    def has_time(self, what: str) -> bool:
        """Return whether another measurement may begin; otherwise say so in its row."""
        if time.perf_counter() - self.began < self.seconds:
            return True
        self.row(what, skipped="no time left")
        return False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the GPU has done all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def peak_gb(self) -> float:
        """Return the peak of memory since the last call in GB, without what earlier ones left, and reset it."""
        if not self.on_gpu:
            return 0.0
        most = (torch.cuda.max_memory_allocated() - self.left) / 1e9
        torch.cuda.reset_peak_memory_stats()
        return most

    def median_seconds(self, work: Callable[[], object], budget: float = 0.5) -> float:
        """Return the median seconds of some repetitions, after two that do not count."""
        for _ in range(2):
            work()
        times: list[float] = []
        while not times or (sum(times) < budget and len(times) < 50 and not self.tiny):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return float(np.median(times))


def rendered(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    numbers = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
    return f"{numbers.pop('what'):72} " + " ".join(f"{name}={value}" for name, value in numbers.items())


@dataclass
class RandomCells:
    """Cells one after another, half of whose genes are targets.

    Args:
        lengths: Tokens of each cell, `<cls>` included.
        vocab_size: Number of tokens to take genes from.
        seed: Seed of the random numbers.
    """

    lengths: Sequence[int]
    vocab_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        total = sum(self.lengths)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.ids = random.integers(3, self.vocab_size, total)
        self.values = random.integers(1, 51, total).astype(np.float32)
        self.targets = random.random(total) < 0.5
        first = self.offsets[:-1]
        self.ids[first], self.values[first], self.targets[first] = 1, -2.0, False

    def packed(self, device: torch.device) -> dict[str, Any]:
        """Return one row, as the trainer gives it to the model."""
        bounds = torch.from_numpy(self.offsets.astype(np.int32)).to(device)
        row: dict[str, Any] = {name: torch.from_numpy(v)[None].to(device) for name, v in self._arrays().items()}
        row |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "num_targets": int(self.targets.sum())}
        return row | {"max_length_q": max(self.lengths), "max_length_k": max(self.lengths)}

    def padded(self) -> dict[str, torch.Tensor]:
        """Return padded rows on the CPU, with numbers in float64."""
        valid = np.arange(max(self.lengths)) < np.asarray(self.lengths)[:, None]
        batch = {"attention_mask": torch.from_numpy(valid)}
        for name, array in self._arrays().items():
            rows = np.zeros(valid.shape, np.float64 if array.dtype == np.float32 else array.dtype)
            rows[valid] = array
            batch[name] = torch.from_numpy(rows)
        return batch

    def encoded(self) -> EncodedCells:
        """Return the cells as an encoder takes them."""
        numbers = np.arange(len(self.lengths))
        return EncodedCells(self.ids, self.values, self.offsets, None, numbers, np.zeros(0, int))

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "input_ids": self.ids,
            "expression_values": self.values,
            "target_mask": self.targets,
            "labels": self.values,
        }


class Tokens(list[int]):
    """As much of a tokenizer as an encoder asks for."""

    pad_token_id, pad_value = 0, -2.0


def stand_in_tokenizer(vocab_size: int) -> Any:
    """Return a stand-in for a tokenizer with so many tokens."""
    return Tokens(range(vocab_size))


def cell_lengths(number: int, middle: float, low: int, high: int) -> list[int]:
    """Return lengths of cells as tissues have them: log-normal, the context at most."""
    drawn = np.random.default_rng(0).lognormal(np.log(middle), 0.5, number)
    return np.clip(drawn, low, high).astype(int).tolist()


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference, as a share of the exact value's; infinity where ours is not finite."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    found = float((ours - exact).norm() / exact.norm().clamp(min=1e-30))
    return found if np.isfinite(found) else float("inf")
