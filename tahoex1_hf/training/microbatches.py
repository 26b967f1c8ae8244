# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A process's cells of a step, taken in parts that fit into memory."""

import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

Batch = dict[str, Any]

# Of the memory that is left: allocators fragment, and cells of other lengths need other temporary arrays.
_USABLE = 0.85


def microbatches(batch: Batch, cells: int) -> Iterator[Batch]:
    """Parts of a batch, of so many cells each (the last of fewer), as views of its tensors.

    Padded parts are cut to their own longest cell; packed parts are cut at the boundaries of cells.

    Args:
        batch: what `CellCollator` makes, padded `(cells, length)` or packed `(1, tokens)`.
        cells: most cells of a part.
    """
    if "cu_seq_lens_q" not in batch:
        for start in range(0, len(batch["input_ids"]), cells):
            part = {name: tensor[start : start + cells] for name, tensor in batch.items()}
            longest = int(part["attention_mask"].any(0).nonzero().max()) + 1
            yield {name: tensor[:, :longest] if tensor.ndim == 2 else tensor for name, tensor in part.items()}
        return
    boundaries = batch["cu_seq_lens_q"].tolist()
    for start in range(0, len(boundaries) - 1, cells):
        edges = batch["cu_seq_lens_q"][start : start + cells + 1]
        low, high = boundaries[start], boundaries[min(start + cells, len(boundaries) - 1)]
        inside = boundaries[start : start + cells + 1]
        longest = max(b - a for a, b in pairwise(inside))
        part = {
            name: value[:, low:high] for name, value in batch.items() if torch.is_tensor(value) and value.ndim == 2
        }
        if "drug_ids" in batch:
            part["drug_ids"] = batch["drug_ids"][start : start + cells]
        part |= {"cu_seq_lens_q": edges - low, "cu_seq_lens_k": edges - low}
        yield part | {"max_length_q": longest, "max_length_k": longest}


def num_cells(batch: Batch) -> int:
    """Cells of a batch."""
    return len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else len(batch["input_ids"])


def longest_cells(context_length: int, cells: int, *, packed: bool, vocab_size: int, drugs: bool) -> Batch:
    """A batch of cells as long as they can be: what needs the most memory."""
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
    return batch


def largest_microbatch(measure: Callable[[int], float], limit: float, most: int) -> int:
    """The most cells of which a forward and backward pass fits into memory.

    The need grows in proportion to the cells, so two measurements tell how many fit; the largest is then measured
    too, and made smaller while it is found not to fit. Nothing needs to run out of memory for this, which processes
    that wait for each other could not survive.

    Args:
        measure: bytes needed by a pass over so many cells; infinite where it ran out of memory.
        limit: bytes that there are.
        most: cells of a step of this process.

    Raises:
        MemoryError: where a single cell does not fit.
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
    """Measures what a forward and backward pass needs, beyond what is there already.

    On a GPU the allocator says; elsewhere the tensors are counted that operations make and that are alive together.
    (What hooks on saved tensors see is not enough: checkpointed layers keep their inputs past them.)
    """

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, run: Callable[[], None]) -> float:
        """Bytes; infinite where the device ran out of memory."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            try:
                run()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                return float("inf")
            return torch.cuda.max_memory_allocated(self.device) - before
        # Compiled code would be out of sight, and what dynamo meets under a mode it never compiles again.
        with torch.compiler.set_stance("force_eager"), AliveTensors() as alive:
            run()
        return alive.most

    def available(self, optimizer_bytes: float, processes: int) -> float:
        """Bytes that are left for a pass, once the optimizer has its state.

        Args:
            optimizer_bytes: of the state still to be made.
            processes: on this machine, which share its memory where there is no GPU.
        """
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return free + cached - optimizer_bytes
        import psutil

        # Half of it: what kernels take for themselves is not counted above, and a laptop does other things too.
        return psutil.virtual_memory().available / 2 / processes - optimizer_bytes


class AliveTensors(TorchDispatchMode):
    """Counts, while it is entered, the bytes of the tensors that operations made and that are still there.

    `most`: at the worst moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0.0
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count."""
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given:  # else a view, or changed in place
                self._made[storage._cdata] = weakref.ref(storage)
        # Asked each time, as FSDP empties the storages of weights that are not in use.
        alive = [(key, found.nbytes()) for key, made in self._made.items() if (found := made()) is not None]
        self._made = {key: self._made[key] for key, _ in alive}
        self.most = max(self.most, float(sum(size for _, size in alive)))
        return result


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value):
            yield value.untyped_storage()
