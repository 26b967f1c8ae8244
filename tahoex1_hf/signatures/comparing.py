# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Compare the shifts of drugs, line by line: which are alike, whether by more than chance, and in how many lines."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tahoex1_hf.signatures.screen import Condition
from tahoex1_hf.signatures.shifts import BOTH, Halves, Shifts, cosine, p_values, unit

LINE_P = 0.05  # largest p value of a line that agrees


@dataclass(frozen=True, eq=False)
class Library:
    """Signatures that others are compared with.

    Attributes:
        drugs: Drug and dose of each, `(signatures,)`.
        lines: Line of each, `(signatures,)`.
        shifts: Shifts, `(signatures, width)`.
    """

    drugs: np.ndarray
    lines: np.ndarray
    shifts: np.ndarray
    names: list[str] = field(init=False)
    numbers: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        names, numbers = np.unique(self.drugs.astype(str), return_inverse=True)
        object.__setattr__(self, "names", names.tolist())
        object.__setattr__(self, "numbers", numbers)
        object.__setattr__(self, "shifts", unit(np.asarray(self.shifts, dtype=np.float64)).astype(np.float32))

    def weights(self, line: str) -> np.ndarray:
        """Return how the similarities of a drug's signatures are averaged for a line.

        Those of the same line count; a drug that was not given to that line counts by all its lines.

        Returns:
            `(drugs, signatures)`, whose rows sum to 1.
        """
        found = np.zeros((len(self.names), len(self.numbers)))
        same = self.lines == line
        found[self.numbers[same], np.flatnonzero(same)] = 1
        without = np.flatnonzero(~found.any(axis=1))
        other = np.isin(self.numbers, without)
        found[self.numbers[other], np.flatnonzero(other)] = 1
        return found / found.sum(axis=1, keepdims=True)


@dataclass(frozen=True, eq=False)
class Compared:
    """A drug beside all drugs of a library.

    Attributes:
        similarity: Mean cosine over its lines, `(drugs,)`.
        p: Share of permutations in which it is as large, `(drugs,)`.
        agree: Number of lines in which the drug is similar, p at most 0.05, `(drugs,)`.
        p_effect: Share of permutations in which the shift is as long in the mean over the lines, `()`.
    """

    similarity: np.ndarray
    p: np.ndarray
    agree: np.ndarray
    p_effect: np.ndarray


def compare(
    shifts: Shifts, conditions: Sequence[Condition], numbers: Sequence[int], controls: Halves, library: Library,
    permutations: int,
) -> Compared:  # fmt: skip
    """Compare a drug with a library, against permutations of which cells are the drug's.

    Args:
        shifts: Shifts of the drug's screen.
        conditions: The drug in each of its lines.
        numbers: Numbers of these conditions, which decide the permutations.
        controls: Halves of the controls; the library's must be others.
        library: Signatures.
        permutations: Number of permutations.
    """
    size = len(library.names)
    similarity, null = np.zeros(size), np.zeros((permutations, size))
    length, null_length = 0.0, np.zeros(permutations)
    agree = np.zeros(size, dtype=np.int64)
    for condition, number in zip(conditions, numbers, strict=True):
        weights = library.weights(condition.line)
        own = shifts.shift(condition, BOTH, controls)
        mine = weights @ cosine(own[None], library.shifts)[0]
        null_shifts = shifts.null_shifts(condition, controls, permutations, number)
        theirs = cosine(null_shifts, library.shifts) @ weights.T
        agree += p_values(mine, theirs) <= LINE_P
        similarity += mine / len(conditions)
        null += theirs / len(conditions)
        length += float(np.linalg.norm(own))
        null_length += np.linalg.norm(null_shifts, axis=1)
    p_effect = p_values(np.array([length]), null_length[:, None])[0]
    return Compared(similarity, p_values(similarity, null), agree, np.asarray(p_effect))
