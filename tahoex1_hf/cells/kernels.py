# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Compiled loops that encode cells for inference and make masked batches for training, and that release the GIL.

The result for a cell depends only on its counts and its stream of random numbers. Bins equal those of
`encoding_tahoe_x1.bin_expression`, bit for bit. A cell has only a few dozen distinct counts among thousands of genes,
so the quantiles are computed from a histogram, and the bin of each gene is looked up in a table.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

BINS, LOG1P, RAW = 0, 1, 2
NO_LABEL = -100.0
"""Label of positions that are not predicted, as elsewhere in transformers."""

_SMALL = 256  # the bins of counts below this are in a table; larger counts are rare
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_LOW8, _LOW16 = np.uint64(0xFF), np.uint64(0xFFFF)
_27, _30, _31, _32 = (np.uint64(bits) for bits in (27, 30, 31, 32))


class Settings(NamedTuple):
    """Settings for the encoding of all cells.

    Attributes:
        special_tokens: Int64 ids of the tokens at the start of each cell (`<cls>`, `<drug>`).
        pad_token: Id of the token that fills the output after a cell, up to its stop.
        pad_value: Float32 expression value of special tokens and padding.
        mask_value: Float32 expression value of targets.
        room: Largest number of genes that are kept of a cell.
        sample: Whether the genes of cells that have more are sampled; otherwise the first genes are kept.
        highest: Whether the genes with the highest counts are kept instead; only for inference.
        encoding: `BINS`, `LOG1P` or `RAW`.
        quantiles: `(num_bins - 1,)` float32, the result of `unit_quantiles(num_bins - 1)`.
        right: Whether edges equal to a count are treated as below it, like `right` of `bin_expression`.
        target_sum: Sum of a cell before the logarithm.
        mask_probabilities: Float64 shares of the genes to predict, one of which is chosen at random for each cell;
            empty for no targets.
        unexpressed: Int64 ids of all genes, to add genes that a cell does not express; empty for none.
        absent_ratio: Number of such genes per kept gene, all of them targets; 0 to fill cells up to their stop.
        num_tokens: Number of token ids, larger than every id.
    """

    special_tokens: np.ndarray
    pad_token: int
    pad_value: np.float32
    mask_value: np.float32
    room: int
    sample: bool
    highest: bool
    encoding: int
    quantiles: np.ndarray
    right: bool
    target_sum: float
    mask_probabilities: np.ndarray
    unexpressed: np.ndarray
    absent_ratio: float
    num_tokens: int


class Output(NamedTuple):
    """Flat output arrays with one element per token.

    Attributes:
        input_ids: Int64.
        expression_values: Float32.
        target_mask: Bool.
        labels: Float32, the value at targets and `NO_LABEL` elsewhere.
        attention_mask: Bool, False at padding; empty if no mask is needed.
    """

    input_ids: np.ndarray
    expression_values: np.ndarray
    target_mask: np.ndarray
    labels: np.ndarray
    attention_mask: np.ndarray


@intrinsic
def _fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """Compute a * b + c in float32 with a single rounding, like torch's `lerp`."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), build


@intrinsic
def _bits(context: Any, value: Any) -> Any:
    """Return the bits of a float32 as a uint32."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def _prefetch(context: Any, array: Any, index: Any) -> Any:
    """Start loading an element of an array into the processor's cache."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        data = context.make_array(kind)(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [address.type], ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        )
        builder.call(function, [address, number(0), number(3), number(1)])  # for reading, kept in the cache, data
        return context.get_dummy_value()

    return types.void(array, types.intp), build


@numba.njit(nogil=True, cache=True, inline="always")
def _mix(number: np.uint64) -> np.uint64:
    """Apply SplitMix64's finaliser (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195)."""
    number = (number ^ (number >> _30)) * _MIX1
    number = (number ^ (number >> _27)) * _MIX2
    return number ^ (number >> _31)


@numba.njit(nogil=True, cache=True, inline="always")
def _below(state: np.uint64, total: int) -> int:
    """Return a random number below `total` (Lemire 2019, doi:10.1145/3230636), with a bias of total / 2^32."""
    return np.int64(((_mix(state) >> _32) * np.uint64(total)) >> _32)


@numba.njit(nogil=True, cache=True)
def _choose(total: int, kept: int, targets: int, sample: bool, state: np.uint64, chosen: np.ndarray) -> np.uint64:
    """Choose `kept` of `total` genes, and `targets` of these, so that all choices are equally likely.

    First, 16 random bits per gene decide whether it is kept and whether it is a target, with nearly the right
    probability. Then single random genes are added or removed until the numbers are exact. Sets of the same size
    remain equally likely, whatever the probabilities were.

    Args:
        total: Number of genes of the cell.
        kept: Number of genes to keep.
        targets: Number of kept genes that are predicted.
        sample: Whether the kept genes are sampled; otherwise they are the first genes.
        state: State of the random number generator.
        chosen: `(total + 4,)` output array: twice the number of the gene, plus one for a target.

    Returns:
        The state after the choice.
    """
    considered = total if sample else kept
    keep_below = np.uint64(2**16 if considered == kept else kept * 2**16 // total)
    target_below = np.uint64(np.int64(keep_below) * targets // max(kept, 1))
    first = state
    place = np.uint64(0)  # unsigned here and below, so that numba leaves out the check for negative indices
    for four in range((considered + 3) // 4):
        state += _GAMMA
        bits = _mix(state)
        for lane in range(4):
            number = (bits >> np.uint64(16 * lane)) & _LOW16
            chosen[place] = np.int32(8 * four + 2 * lane) + np.int32(number < target_below)
            place += np.uint64(number < keep_below)
    count = np.int64(place)
    while count and chosen[count - 1] >> 1 >= considered:  # lanes after the last gene
        count -= 1
    while count > kept:
        state += _GAMMA
        count -= 1
        chosen[_below(state, count + 1)] = chosen[count]
    added = count
    while count < kept:
        state += _GAMMA
        gene = _below(state, total)
        number = (_mix(first + _GAMMA * np.uint64(gene // 4 + 1)) >> np.uint64(16 * (gene % 4))) & _LOW16
        fresh = number >= keep_below
        for i in range(added, count):
            fresh &= chosen[i] >> 1 != gene
        if fresh:
            state += _GAMMA
            chosen[count] = 2 * gene + np.int32(_below(state, kept) < targets)
            count += 1
    now = 0
    for i in range(kept):
        now += chosen[i] & 1
    while now != targets:
        state += _GAMMA
        place = _below(state, kept)
        if (chosen[place] & 1) == (now > targets):
            chosen[place] ^= 1
            now += 1 if now < targets else -1
    return state


@numba.njit(nogil=True, cache=True)
def _sort(values: np.ndarray) -> None:
    """Sort in place. In a function of its own, numba compiles the sort once, and not for each loop that sorts."""
    values.sort()


@numba.njit(nogil=True, cache=True)
def _distinct_counts(
    counts: np.ndarray, start: int, length: int, histogram: np.ndarray, tail: np.ndarray, values: np.ndarray,
    upto: np.ndarray,
) -> int:  # fmt: skip
    """Write the distinct whole counts in rising order, with the number of genes up to each; return their number."""
    histogram[:] = 0
    num_large = 0
    even = length & ~3
    first = np.uint64(start)
    # Most counts are 1, and an addition must wait for the previous one to the same place: hence four histograms.
    for i in range(np.uint64(0), np.uint64(even), np.uint64(4)):
        for lane in range(4):
            count = np.uint64(np.int64(counts[first + i + np.uint64(lane)]))
            if count < np.uint64(_SMALL):
                histogram[lane, count] += 1
            else:
                tail[num_large] = count
                num_large += 1
    for i in range(even, length):
        count = np.int64(counts[start + i])
        if count < _SMALL:
            histogram[0, count] += 1
        else:
            tail[num_large] = count
            num_large += 1
    rows, total = 0, 0
    for count in range(_SMALL):
        here = histogram[0, count] + histogram[1, count] + histogram[2, count] + histogram[3, count]
        if here:
            total += here
            values[rows], upto[rows] = count, total
            rows += 1
    if num_large:
        _sort(tail[:num_large])
        for i in range(num_large):
            total += 1
            if rows and values[rows - 1] == tail[i]:
                upto[rows - 1] = total
            else:
                values[rows], upto[rows] = tail[i], total
                rows += 1
    return rows


@numba.njit(nogil=True, cache=True)
def _sorted_values(counts: np.ndarray, start: int, length: int, values: np.ndarray, upto: np.ndarray) -> int:
    """Do the work of `_distinct_counts` for values that are not whole: each value gets its own row."""
    for i in range(length):
        values[i], upto[i] = counts[start + i], i + 1
    _sort(values[:length])
    return length


@numba.njit(nogil=True, cache=True)
def _quantile_edges(
    values: np.ndarray, upto: np.ndarray, length: int, quantiles: np.ndarray, edges: np.ndarray
) -> None:
    """Write the quantiles of a cell's values like `torch.quantile`: rank q * (n - 1) in float32, then `lerp`."""
    row = 0
    last = np.float32(length - 1)
    for i in range(len(quantiles)):
        rank = quantiles[i] * last
        below = np.int64(np.floor(rank))
        while upto[row] <= below:
            row += 1
        low = high = values[row]
        if np.int64(np.ceil(rank)) >= upto[row]:
            high = values[row + 1]
        weight = rank - np.float32(below)
        step = high - low
        edges[i] = _fma(weight, step, low) if weight < np.float32(0.5) else _fma(weight - np.float32(1), step, high)


@numba.njit(nogil=True, cache=True)
def _bin(value: np.float32, edges: np.ndarray, right: bool) -> np.float32:
    """Return the bin of a value: the number of edges below it plus one; with `right`, the number of edges up to it."""
    low, high = 0, len(edges)
    while low < high:
        middle = (low + high) // 2
        if edges[middle] < value or (right and edges[middle] == value):
            low = middle + 1
        else:
            high = middle
    return np.float32(low if right else low + 1)


@numba.njit(nogil=True, cache=True)
def _are_whole(counts: np.ndarray, start: int, length: int) -> bool:
    """Return whether `length` counts, beginning at `start`, are integers that float32 holds exactly."""
    whole = True
    for i in range(length):
        value = np.float64(counts[start + i])
        whole &= value == np.floor(value) and value < 2**24
    return whole


@numba.njit(nogil=True, cache=True)
def _value_rule(
    counts: np.ndarray, start: int, length: int, whole_counts: bool, settings: Settings, histogram: np.ndarray,
    tail: np.ndarray, values: np.ndarray, upto: np.ndarray, edges: np.ndarray, table: np.ndarray,
) -> tuple[bool, float]:  # fmt: skip
    """Write the edges and the bins of small counts; return whether counts are whole, and their sum for log1p."""
    whole, total = True, 0.0
    if length and settings.encoding == BINS:
        whole = whole_counts or _are_whole(counts, start, length)
        if whole:
            rows = _distinct_counts(counts, start, length, histogram, tail, values, upto)
        else:
            rows = _sorted_values(counts, start, length, values, upto)
        _quantile_edges(values, upto, length, settings.quantiles, edges)
        if whole:
            for row in range(rows):
                if values[row] >= _SMALL:
                    break
                table[np.int64(values[row])] = _bin(values[row], edges, settings.right)
    elif settings.encoding == LOG1P:
        for i in range(length):
            total += np.float64(counts[start + i])
    return whole, total


@numba.njit(nogil=True, cache=True)
def _fill_unexpressed(
    tokens: np.ndarray, candidates: np.ndarray, seen: np.ndarray, state: np.uint64, target: np.ndarray
) -> None:
    """Fill `target` with random genes that are not in `tokens`; `seen` is all False before and after."""
    for token in tokens:
        seen[token] = True
    done = 0
    while done < len(target):
        state += _GAMMA
        gene = candidates[_below(state, len(candidates))]
        if not seen[gene]:
            seen[gene] = True
            target[done] = gene
            done += 1
    for token in tokens:
        seen[token] = False
    for gene in target:
        seen[gene] = False


@numba.njit(nogil=True, cache=True)
def _write_values(
    tokens: np.ndarray, counts: np.ndarray, chosen: np.ndarray, whole: bool, total: float, settings: Settings,
    table: np.ndarray, edges: np.ndarray, input_ids: np.ndarray, values: np.ndarray,
) -> None:  # fmt: skip
    """Write the tokens and values of the chosen genes; added genes get the value 0, and have their token already."""
    length = np.uint64(len(counts))
    for i in range(len(chosen)):
        gene = np.uint64(chosen[i] >> 1)
        if gene >= length:
            values[i] = 0
            continue
        input_ids[i] = tokens[gene]
        count = counts[gene]
        if settings.encoding == BINS:
            if whole and count < _SMALL:
                values[i] = table[np.uint64(count)]
            else:
                values[i] = _bin(np.float32(count), edges, settings.right)
        elif settings.encoding == LOG1P:
            values[i] = np.log1p(np.float64(count) / (total + 1e-9) * settings.target_sum)
        else:
            values[i] = count


@numba.njit(nogil=True, cache=True)
def _hide_targets(
    chosen: np.ndarray, mask_value: np.float32, values: np.ndarray, target_mask: np.ndarray, labels: np.ndarray
) -> None:
    """Move the values of targets to the labels; the loop has no branches, so that it is vectorised."""
    for i in range(len(values)):
        target = (chosen[i] & 1) == 1
        target_mask[i] = target
        labels[i] = values[i] if target else np.float32(NO_LABEL)
        values[i] = mask_value if target else values[i]


@numba.njit(nogil=True, cache=True)
def _finish(settings: Settings, output: Output, start: int, place: int, end: int, stop: int) -> None:
    """Write the special tokens before a cell's genes, which are at `place` to `end`, and the padding after them."""
    for i in range(len(settings.special_tokens)):
        output.input_ids[start + i] = settings.special_tokens[i]
    output.input_ids[end:stop] = settings.pad_token
    output.expression_values[start:place] = settings.pad_value
    output.expression_values[end:stop] = settings.pad_value
    output.target_mask[start:place] = False
    output.target_mask[end:stop] = False
    output.labels[start:place] = NO_LABEL
    output.labels[end:stop] = NO_LABEL
    if len(output.attention_mask):
        output.attention_mask[start:end] = True
        output.attention_mask[end:stop] = False


@numba.njit(nogil=True, cache=True)
def encode_cells(
    genes: np.ndarray, gene_starts: np.ndarray, counts: np.ndarray, count_starts: np.ndarray, whole_counts: bool,
    lengths: np.ndarray, streams: np.ndarray, starts: np.ndarray, stops: np.ndarray, settings: Settings,
    output: Output,
) -> None:  # fmt: skip
    """Encode cells, and write each to its range of the flat output arrays.

    Args:
        genes: Token ids of any integer type; those of cell `i` start at `gene_starts[i]`.
        gene_starts: `(cells,)` position of each cell's first gene.
        counts: Counts above zero, uint16 or float32; those of cell `i` start at `count_starts[i]`.
        count_starts: `(cells,)` position of each cell's first count.
        whole_counts: Whether all counts are known to be integers.
        lengths: `(cells,)` number of genes of each cell.
        streams: `(cells,)` uint64 start of each cell's random numbers.
        starts: `(cells,)` position of each cell's first token in the output.
        stops: `(cells,)` position after each cell's last token, padding included.
        settings: Settings for all cells.
        output: Output arrays.
    """
    longest = 1
    for cell in range(len(lengths)):
        longest = max(longest, lengths[cell], stops[cell] - starts[cell])
    chosen = np.empty(longest + 4, np.int32)
    tokens = np.empty(longest, genes.dtype)
    histogram = np.empty((4, _SMALL), np.int32)
    tail = np.empty(longest, np.float32)
    values = np.empty(longest + _SMALL, np.float32)
    upto = np.empty(longest + _SMALL, np.int64)
    edges = np.empty(len(settings.quantiles), np.float32)
    table = np.zeros(_SMALL, np.float32)
    seen = np.zeros(settings.num_tokens if len(settings.unexpressed) else 0, np.bool_)
    for cell in range(len(lengths)):
        if cell + 1 < len(lengths):  # cells are scattered in memory: load the next one in advance
            for i in range(0, lengths[cell + 1], 64 // genes.itemsize):
                _prefetch(genes, gene_starts[cell + 1] + i)
            for i in range(0, lengths[cell + 1], 64 // counts.itemsize):
                _prefetch(counts, count_starts[cell + 1] + i)
        length, first_gene, first_count = lengths[cell], gene_starts[cell], count_starts[cell]
        start, stop, state = starts[cell], stops[cell], streams[cell]
        place = start + len(settings.special_tokens)
        kept = min(length, settings.room)
        added = np.int64(settings.absent_ratio * kept + 0.5) if settings.absent_ratio > 0 else stop - place - kept
        filled = max(min(added, len(settings.unexpressed) - length), 0)
        used = kept + filled
        choosable = kept if settings.absent_ratio > 0 else used
        targets = 0
        if len(settings.mask_probabilities):
            state += _GAMMA
            choice = _below(state, len(settings.mask_probabilities))
            targets = np.int64(settings.mask_probabilities[choice] * choosable)
        whole, total = _value_rule(
            counts, first_count, length, whole_counts, settings, histogram, tail, values, upto, edges, table
        )
        for i in range(np.uint64(length)):  # in order, so that memory is read ahead and chosen genes are in the cache
            tokens[i] = genes[np.uint64(first_gene) + i]
        # A cell that is filled up keeps all of its genes, and targets are chosen among its own and the added genes.
        # With a ratio they are chosen among its own, and all added genes are targets besides.
        state = _choose(length + choosable - kept, choosable, targets, settings.sample, state, chosen)
        chosen[choosable:used] = 2 * length + 1
        ids = output.input_ids[place : place + used]
        cell_values = output.expression_values[place : place + used]
        if filled:
            _fill_unexpressed(tokens[:length], settings.unexpressed, seen, state, ids[kept:])
        _write_values(
            tokens, counts[first_count : first_count + length], chosen[:used], whole, total, settings, table, edges,
            ids, cell_values
        )  # fmt: skip
        _hide_targets(
            chosen, settings.mask_value, cell_values, output.target_mask[place : place + used],
            output.labels[place : place + used]
        )  # fmt: skip
        _finish(settings, output, start, place, place + used, stop)


@numba.njit(nogil=True, cache=True)
def _lowest(scores: np.ndarray, total: int, room: int, histogram: np.ndarray, left: np.ndarray) -> np.uint64:
    """Return the `room`-th lowest of the scores, bit for bit: eight at a time decide which of them are left.

    numba takes 4 CPU seconds to compile `np.partition`, and 0.2 for these loops.
    """
    count = np.uint64(total)
    for i in range(count):
        left[i] = scores[i]
    shift = np.uint64(56)
    while True:
        histogram[:] = 0
        for i in range(count):
            histogram[(left[i] >> shift) & _LOW8] += 1
        bucket = np.uint64(0)
        while histogram[bucket] < room:
            room -= histogram[bucket]
            bucket += np.uint64(1)
        found = np.uint64(0)
        for i in range(count):
            score = left[i]
            left[found] = score
            found += np.uint64((score >> shift) & _LOW8 == bucket)
        if found == 1 or shift == 0:  # all that are left are equal
            return left[0]
        count = found
        shift -= np.uint64(8)


@numba.njit(nogil=True, cache=True)
def _score_genes(
    tokens: np.ndarray, counts: np.ndarray, key: np.uint64, settings: Settings, scores: np.ndarray,
    buckets: np.ndarray, left: np.ndarray,
) -> np.uint64:  # fmt: skip
    """Write the score of each gene of a cell, as in `kept_genes`, and return the highest score of the kept genes."""
    length = len(tokens)
    if settings.highest:
        for i in range(np.uint64(length)):
            scores[i] = (np.uint64(~_bits(counts[i])) << _32) | np.uint64(tokens[i])
    else:
        content = np.uint64(0)
        for i in range(np.uint64(length)):
            content += np.uint64(tokens[i]) * np.uint64(_bits(counts[i]))
        stream = _mix(key + content + _GAMMA)
        for i in range(np.uint64(length)):
            scores[i] = _mix(stream + np.uint64(tokens[i]) + _GAMMA)
    return _lowest(scores, length, settings.room, buckets, left)


@numba.njit(nogil=True, cache=True)
def encode_rows(
    offsets: np.ndarray, tokens: np.ndarray, counts: np.ndarray, key: np.uint64, settings: Settings,
    starts: np.ndarray, input_ids: np.ndarray, expression_values: np.ndarray,
) -> bool:  # fmt: skip
    """Encode cells for inference, like `TahoeX1Tokenizer.encode_rows`.

    Args:
        offsets: `(cells + 1,)` positions at which the cells begin and end.
        tokens: Genes of the cells, of any integer type, each once per cell.
        counts: Float32 counts of the genes.
        key: `mix64` of the seed of the sampling.
        settings: Settings as for training; the settings of targets are ignored.
        starts: `(cells,)` position of each cell's first token in the output.
        input_ids: Int64 output array.
        expression_values: Float32 output array.

    Returns:
        Whether all counts are whole and above zero. If not, the output must not be used.
    """
    longest = 1
    for cell in range(len(starts)):
        longest = max(longest, offsets[cell + 1] - offsets[cell])
    kept_counts = np.empty(longest, np.float32)
    histogram = np.empty((4, _SMALL), np.int32)
    tail = np.empty(longest, np.float32)
    distinct = np.empty(longest + _SMALL, np.float32)
    upto = np.empty(longest + _SMALL, np.int64)
    edges = np.empty(len(settings.quantiles), np.float32)
    table = np.zeros(_SMALL, np.float32)
    scores, left = np.empty(longest, np.uint64), np.empty(longest, np.uint64)
    buckets = np.empty(256, np.int32)
    for cell in range(len(starts)):
        cell_tokens = tokens[offsets[cell] : offsets[cell + 1]]
        cell_counts = counts[offsets[cell] : offsets[cell + 1]]
        length = len(cell_tokens)
        whole = True
        for i in range(np.uint64(length)):
            value = cell_counts[i]
            whole &= value > 0 and value < 2**24 and value == np.floor(value)
        if not whole:
            return False
        _value_rule(cell_counts, 0, length, True, settings, histogram, tail, distinct, upto, edges, table)
        kept = min(length, settings.room)
        place = starts[cell]
        for token in settings.special_tokens:
            input_ids[place] = token
            expression_values[place] = settings.pad_value
            place += 1
        ids, cell_values = input_ids[place : place + kept], expression_values[place : place + kept]
        if (settings.sample or settings.highest) and length > settings.room:
            highest = _score_genes(cell_tokens, cell_counts, key, settings, scores, buckets, left)
            chosen = np.uint64(0)
            for i in range(np.uint64(length)):
                ids[chosen], kept_counts[chosen] = cell_tokens[i], cell_counts[i]
                chosen += np.uint64(scores[i] <= highest)
                if chosen == np.uint64(kept):
                    break  # the next gene would be written after the end of the cell
            cell_counts = kept_counts
        else:
            for i in range(np.uint64(kept)):
                ids[i] = cell_tokens[i]
        if settings.encoding != BINS:
            for i in range(np.uint64(kept)):  # an assignment of slices would take 1.7 s more to compile
                cell_values[i] = cell_counts[i]
            continue
        for i in range(np.uint64(kept)):
            small = np.uint64(np.int64(cell_counts[i]))
            if small < np.uint64(_SMALL):
                cell_values[i] = table[small]
            else:
                cell_values[i] = _bin(cell_counts[i], edges, settings.right)
    return True
