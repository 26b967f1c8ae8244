# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Microbatches: a process's cells of a step, in parts that fit into memory."""

import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

Batch = dict[str, Any]

# Share of the free memory that is used: allocators fragment, and cells of other lengths need other temporary arrays.
_USABLE = 0.85


def microbatches(batch: Batch, cells: int) -> Iterator[Batch]:
    """Yield the parts of a batch, as views of its tensors.

    Padded parts are cut to their own longest cell; packed parts are cut at the boundaries of cells. Both look at the
    numbers, which is quick as long as the batch is not on a GPU.

    Args:
        batch: Batch of `CellCollator`, padded `(cells, length)` or packed `(1, tokens)`.
        cells: Number of cells of a part; the last part may have fewer.
    """
    if "cu_seq_lens_q" not in batch:
        for start in range(0, len(batch["input_ids"]), cells):
            part = {name: tensor[start : start + cells] for name, tensor in batch.items()}
            longest = int(part["attention_mask"].any(0).nonzero().max()) + 1
            of_tokens = {name for name, tensor in part.items() if tensor.ndim == 2} - {"cell_labels"}
            yield {name: tensor[:, :longest] if name in of_tokens else tensor for name, tensor in part.items()}
        return
    boundaries = batch["cu_seq_lens_q"].tolist()
    for start in range(0, len(boundaries) - 1, cells):
        edges = batch["cu_seq_lens_q"][start : start + cells + 1]
        low, high = boundaries[start], boundaries[min(start + cells, len(boundaries) - 1)]
        inside = boundaries[start : start + cells + 1]
        longest = max(b - a for a, b in pairwise(inside))
        part = {
            name: value[:, low:high]
            for name, value in batch.items()
            if torch.is_tensor(value) and value.ndim == 2 and name != "cell_labels"
        }
        part |= {name: batch[name][start : start + cells] for name in ("drug_ids", "cell_labels") if name in batch}
        part |= {"cu_seq_lens_q": edges - low, "cu_seq_lens_k": edges - low}
        if "target_mask" in part:
            part["num_targets"] = int(part["target_mask"].sum())
        yield part | {"max_length_q": longest, "max_length_k": longest}


def num_cells(batch: Batch) -> int:
    """Return the number of cells in a batch."""
    return len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else len(batch["input_ids"])


def longest_cells(
    context_length: int, cells: int, *, packed: bool, vocab_size: int, drugs: bool, cell_labels: bool = False
) -> Batch:
    """Return a batch of cells that fill the context, which needs the most memory.

    Args:
        context_length: Number of tokens of each cell.
        cells: Number of cells.
        packed: Whether the cells follow one another in one row.
        vocab_size: Number of tokens in the vocabulary.
        drugs: Whether each cell has a drug.
        cell_labels: Whether the expression of all genes is predicted from the cell embedding.
    """
    ids = torch.arange(cells * context_length).remainder(vocab_size - 3).add(3).view(cells, context_length)
    target_mask = torch.zeros(ids.shape, dtype=torch.bool)
    target_mask[:, 2::2] = True
    values = torch.ones(ids.shape)
    batch: Batch = {"input_ids": ids, "expression_values": values, "target_mask": target_mask}
    batch["labels"] = values.masked_fill(~target_mask, -100.0)
    if packed:
        batch = {name: tensor.view(1, -1) for name, tensor in batch.items()}
        edges = torch.arange(cells + 1, dtype=torch.int32) * context_length
        batch |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
        batch |= {"max_length_q": context_length, "max_length_k": context_length}
    else:
        batch["attention_mask"] = torch.ones(ids.shape, dtype=torch.bool)
    if drugs:
        batch["drug_ids"] = torch.zeros(cells, dtype=torch.int64)
    if cell_labels:
        batch["cell_labels"] = torch.ones(cells, vocab_size)
    return batch


def largest_microbatch(measure: Callable[[int], float], limit: float, most: int) -> int:
    """Return the largest number of cells for which a forward and backward pass fits into memory.

    The need grows in proportion to the cells, so that two measurements tell how many fit. This number is measured too,
    and made smaller until it fits. No pass has to run out of memory for this: processes that wait for each other
    would not survive it.

    Args:
        measure: Function that returns the bytes needed by a pass over a number of cells; infinity if it ran out of
            memory.
        limit: Bytes that are free.
        most: Number of cells in a step of this process.

    Raises:
        MemoryError: If a single cell does not fit.
    """
    usable = _USABLE * limit
    one = measure(1)
    if one > usable:
        raise MemoryError(
            f"A pass over one cell needs {one / 1e9:.1f} GB, and {usable / 1e9:.1f} GB are left: set "
            "activation_checkpointing=true, shorten context_length, or shard the model over more devices (FSDP)."
        )
    if most == 1:
        return 1
    two = measure(2)
    if two > usable:
        return 1
    slope = max(two - one, 1.0)
    cells = min(most, 1 + int((usable - one) / slope))
    while cells > 2 and measure(cells) > usable:
        cells = cells * 3 // 4
    # Parts of equal size: 4 + 4 + 4 rather than 5 + 5 + 2.
    return -(-most // -(-most // cells))


class PassMemory:
    """A measurement of the memory that a forward and backward pass takes on top of the memory in use.

    On a GPU the allocator reports it. Elsewhere `AliveTensors` counts the tensors that exist at the same time. (Hooks
    on saved tensors would miss the inputs that checkpointed layers keep.)

    Args:
        device: Device of the pass.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, run: Callable[[], None]) -> float:
        """Run a pass and return the bytes that it took; infinity if the device ran out of memory."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            try:
                run()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                return float("inf")
            return torch.cuda.max_memory_allocated(self.device) - before
        # The mode does not see into compiled code, and dynamo never compiles code that it has met under a mode.
        with torch.compiler.set_stance("force_eager"), AliveTensors() as alive:
            run()
        return alive.most

    def available(self, optimizer_bytes: float, processes: int) -> float:
        """Return the bytes that are left for a pass once the optimizer has its state.

        Args:
            optimizer_bytes: Bytes of the state that is still to be made.
            processes: Number of processes on this machine, which share its memory where there is no GPU.
        """
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return free + cached - optimizer_bytes
        import psutil

        # Only half of the memory, since the kernels' own memory is not counted, and a laptop does other things too.
        return psutil.virtual_memory().available / 2 / processes - optimizer_bytes


class AliveTensors(TorchDispatchMode):
    """A mode that counts the bytes of tensors which operations have made under it and which still exist.

    Attributes:
        most: Largest number of bytes at any moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0.0
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the tensors that exist after it."""
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given:  # otherwise it is a view, or was changed in place
                self._made[storage._cdata] = weakref.ref(storage)
        # Sizes are read each time, since FSDP empties the storages of weights that are not in use.
        alive = [(key, found.nbytes()) for key, made in self._made.items() if (found := made()) is not None]
        self._made = {key: self._made[key] for key, _ in alive}
        self.most = max(self.most, float(sum(size for _, size in alive)))
        return result


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value):
            yield value.untyped_storage()
