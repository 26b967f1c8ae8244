# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Which token belongs to which cell, and attention within the cells of a packed row.

This file travels to the Hugging Face Hub beside the weights.
"""

import itertools
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from .observed_attention_tahoe_x1 import ObservedKeys

# Below, what is saved is less than what gathering the observed keys costs (benchmarks/attention.py).
SHORTEST_WITH_OBSERVED_KEYS = 256


@dataclass(frozen=True)
class CellLayout:
    """Which cell each token belongs to. Padded rows hold one cell each (`token_cells` is None), a packed row all."""

    num_cells: int
    token_cells: torch.Tensor | None = None  # (1, length) int64: cell of each token
    boundaries: torch.Tensor | None = None  # (num_cells + 1,) int64: index of each <cls> in the row, and its length

    @classmethod
    def packed(cls, cu_seq_lens: torch.Tensor, shape: torch.Size) -> "CellLayout":
        """One row of cells back to back; `cu_seq_lens` `(cells + 1,)` are their boundaries, from 0 to the length."""
        if shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q packs all cells into one row, but input_ids has {shape[0]} rows.")
        boundaries = cu_seq_lens.long()
        positions = torch.arange(shape[1], device=boundaries.device)
        token_cells = torch.searchsorted(boundaries[1:].contiguous(), positions, right=True)
        return cls(boundaries.shape[0] - 1, token_cells.unsqueeze(0), boundaries)

    def per_token(self, cell_vectors: torch.Tensor) -> torch.Tensor:
        """Give each token its cell's vector: `(cells, width)` to `(batch, length or 1, width)`."""
        if self.token_cells is None:
            return cell_vectors.unsqueeze(1)
        # Not cell_vectors[token_cells]: where two threads meet in a cell, its gradient is added up in a random order.
        return cell_vectors.index_select(0, self.token_cells[0].to(cell_vectors.device)).unsqueeze(0)

    def first(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Each cell's first token: `(batch, length, width)` to `(cells, width)`."""
        if self.boundaries is None:
            return hidden_states[:, 0].clone()  # a view would keep all tokens
        return hidden_states.flatten(0, 1).index_select(0, self.boundaries[:-1].to(hidden_states.device))

    def mean(self, hidden_states: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Mean over each cell's valid tokens, in float32: `(batch, length, width)` to `(cells, width)`."""
        values = hidden_states.flatten(0, 1).float()
        cells = self.token_cells
        if cells is None:
            cells = torch.arange(self.num_cells, device=values.device).unsqueeze(1).expand(hidden_states.shape[:2])
        cells = cells.flatten().to(values.device)
        weights = values.new_ones(len(values), 1) if valid is None else valid.flatten().unsqueeze(1).to(values)
        sums = values.new_zeros(self.num_cells, values.shape[1]).index_add(0, cells, values * weights)
        counts = values.new_zeros(self.num_cells, 1).index_add(0, cells, weights)
        return (sums / counts.clamp(min=1)).to(hidden_states.dtype)


def equal_runs(lengths: list[int]) -> list[tuple[int, int]]:
    """Neighbouring cells of equal length: (how many, length)."""
    return [(len(list(group)), length) for length, group in itertools.groupby(lengths)]


@dataclass(frozen=True, eq=False)
class PackedAttention:
    """Attention within each cell of a packed row, in torch alone: no work between cells, and none on padding.

    On CUDA all cells go through one call on a jagged tensor, unless there is a mask. Otherwise there is one call for
    each run of neighbouring cells of equal length: on two CPU cores 1.3 to 1.7 times as fast as padded buckets of
    eight cells of similar length, at 20 to 2,048 tokens a cell (benchmarks/attention.py). Where tokens see observed
    ones and themselves, long cells attend to their observed tokens alone.
    """

    boundaries: torch.Tensor  # (cells + 1,) int64
    runs: list[tuple[int, int]] | None  # neighbouring cells of equal length; None for the jagged tensor
    longest: int | None = None
    # Per run, what each token sees: `(cells, 1, length, length)` bool, or where the keys are.
    seen: list[torch.Tensor | ObservedKeys] | None = None

    @classmethod
    def make(
        cls, boundaries: torch.Tensor, longest: int | None, observed: torch.Tensor | None, device: torch.device
    ) -> "PackedAttention":
        """Prepare what all layers share.

        Args:
            boundaries: `(cells + 1,)` int64, from 0 to the length of the row.
            longest: length of the longest cell, where it is known: asking a GPU for it takes time.
            observed: `(1, length)` bool: a token sees the observed tokens of its cell and itself; None for all.
            device: of the attention.
        """
        boundaries = boundaries.to(device)
        if observed is None and device.type == "cuda":
            return cls(boundaries, None, int(boundaries.diff().max()) if longest is None else longest)
        runs = equal_runs(boundaries.diff().tolist())
        if observed is None:
            return cls(boundaries, runs)
        parts = observed[0].to(device).split([cells * length for cells, length in runs])
        seen = [_observed_or_self(part, *run) for part, run in zip(parts, runs, strict=True)]
        return cls(boundaries, runs, seen=seen)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, None]:
        """`(1, heads, length, width)`, of key and value perhaps fewer heads, to `(1, length, heads, width)`."""
        if self.runs is None:
            return self._jagged(query, key, value, scaling), None
        grouped = query.shape[1] != key.shape[1]
        sizes = [cells * length for cells, length in self.runs]
        # Not slices: the gradient of a slice is as large as the whole.
        parts = zip(*(tensor[0].split(sizes, dim=1) for tensor in (query, key, value)), strict=True)
        outputs = []
        for number, ((cells, _), (q, k, v)) in enumerate(zip(self.runs, parts, strict=True)):
            seen = None if self.seen is None else self.seen[number]
            if isinstance(seen, ObservedKeys):
                k, v = (
                    tensor.repeat_interleave(q.shape[0] // k.shape[0], dim=0) if grouped else tensor
                    for tensor in (k, v)
                )
                outputs.append(seen.attend(q, k, v, scaling).transpose(0, 1))
                continue
            q, k, v = (tensor.unflatten(1, (cells, -1)).transpose(0, 1) for tensor in (q, k, v))
            attended = scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=grouped)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).unsqueeze(0), None

    def _jagged(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                tensor[0].transpose(0, 1).contiguous(), self.boundaries, min_seqlen=1, max_seqlen=self.longest
            ).transpose(1, 2)
            for tensor in (query, *(tensor.repeat_interleave(groups, dim=1) for tensor in (key, value)))
        )
        return scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).values().unsqueeze(0)


def _observed_or_self(observed: torch.Tensor, cells: int, length: int) -> torch.Tensor | ObservedKeys:
    """What the tokens of a run see: `observed` `(cells * length,)` bool, and themselves."""
    if length >= SHORTEST_WITH_OBSERVED_KEYS:
        keys = ObservedKeys.make([length] * cells, observed)
        if keys is not None:
            return keys
    return observed.view(cells, 1, 1, length) | torch.eye(length, dtype=torch.bool, device=observed.device)
