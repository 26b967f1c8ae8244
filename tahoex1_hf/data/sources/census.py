# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Cells of a SOMA experiment, such as one organism of the CELLxGENE census."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells.genes import GeneOptions, matched_genes
from tahoex1_hf.cells.readers.base import CHUNK_ELEMENTS, INDEX, BadInput, gene_rows
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.data.sources.base import FileReport, SourceReader
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch, GeneRows

if TYPE_CHECKING:
    import pandas as pd

    from tahoex1_hf.data.config import CensusSource
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

JOINID, OBSERVATION, DATASET = "soma_joinid", "observation_joinid", "dataset_id"

_INSTALL = "pip install 'tahoex1_hf[census]'"
# Number of cells that are asked for at once, which bounds the metadata in memory.
_QUERY_CELLS = 16384
# TileDB's buffer per column (its own default is 1 GB): about CHUNK_ELEMENTS elements of 8 bytes.
_BUFFER_BYTES = 2**25

# Experiments that a forked process inherits from its parent. It must not close them: that needs the parent's threads.
_INHERITED: list[Any] = []

# TileDB's contexts, by process, kind and buffer. A forked process makes its own, and none is closed before the process
# ends: a context holds pools of threads, and TileDB has crashed (signal 11, in one of them) where they came and went.
_CONTEXTS: dict[tuple[int, str, int], Any] = {}


class CensusExperiment(SourceReader):
    """One experiment, as one file: its address, or `census:RELEASE/ORGANISM`.

    The cells are those that `value_filter` keeps, in the order of their `soma_joinid`. The name of a cell is its
    `observation_joinid`, after the `dataset_id` where there is one, since only both together identify a cell of the
    census; in an experiment without `observation_joinid` the name is the `soma_joinid`.
    """

    config: "CensusSource"

    def __init__(self, config: "CensusSource", tokenizer: "TahoeX1Tokenizer", spool: Path) -> None:
        """Take the settings, as `SourceReader` does, and open nothing."""
        super().__init__(config, tokenizer, spool)
        self._experiment: tuple[int, _Experiment] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave what TileDB has open in this process."""
        return {**self.__dict__, "_experiment": None}

    def list_files(self) -> list[str]:
        """Return the experiment's address."""
        return [self.config.uri or f"census:{self.config.census_version}/{self.config.organism}"]

    def inspect(self, path: str) -> FileReport:
        """Count the cells that `value_filter` keeps, and match the genes that `var_filter` keeps."""
        with _soma_errors(self.config):
            experiment = self._opened()
            cells, match = experiment.cells, experiment.genes.match
            if not len(cells):
                filtered = f"value_filter={self.config.value_filter!r} keeps none of its cells"
                raise BadInput(f"{filtered if self.config.value_filter else 'it has no cells'}.")
            return FileReport(
                num_cells=len(cells),
                fingerprint=experiment.fingerprint,
                num_genes=match.num_genes,
                num_genes_known=int((match.token_ids >= 0).sum()),
                unknown_genes=list(match.unknown_examples),
            )

    def read(self, path: str, start: int, stop: int, columns: Sequence[str]) -> Iterator[GeneRows]:
        """Yield cells `start` to `stop` of those that `value_filter` keeps."""
        with _soma_errors(self.config):
            experiment = self._opened()
            if not 0 <= start <= stop <= len(experiment.cells):
                raise ValueError(f"cells {start} to {stop} of an experiment with {len(experiment.cells)}.")
            for first in range(start, stop, _QUERY_CELLS):
                cells = np.asarray(experiment.cells[first : min(first + _QUERY_CELLS, stop)])
                metadata = experiment.metadata(cells, columns)
                done = 0
                for matrix in experiment.matrices(cells):
                    size = matrix.shape[0]
                    part = metadata.iloc[done : done + size].reset_index(drop=True)
                    rows, unknown = gene_rows(matrix, experiment.genes.match, first + done, self.tokenizer)
                    yield rows._replace(first_cell=first + done, obs=part, unknown_counts=unknown)
                    done += size

    def _opened(self) -> "_Experiment":
        """Open the experiment, once in every process: TileDB's threads do not live on in a forked one."""
        if self._experiment is None or self._experiment[0] != os.getpid():
            if self._experiment is not None:
                _INHERITED.append(self._experiment)
            self._experiment = (os.getpid(), _Experiment(self.config, self.tokenizer, self.spool_folder))
        return self._experiment[1]


@dataclass(frozen=True)
class _Genes:
    """Genes that `var_filter` keeps.

    Attributes:
        joinids: Rising `soma_joinid` of the genes.
        match: Tokens of the genes.
        are_all: Whether these are all genes of the experiment.
    """

    joinids: np.ndarray
    match: GeneMatch
    are_all: bool


class _Experiment:
    """An open experiment."""

    def __init__(self, config: "CensusSource", tokenizer: "TahoeX1Tokenizer", spool: Path) -> None:
        self.config, self.tokenizer, self.spool_folder = config, tokenizer, spool
        self.experiment = _open(config)
        self.obs = self.experiment.obs
        measurement = _member(self.experiment.ms, config.measurement, "measurement")
        self.var, self.matrix = measurement.var, _member(measurement.X, config.layer, "layer")
        if self.matrix.soma_type != "SOMASparseNDArray":
            raise BadInput(f"layer={config.layer!r} is a {self.matrix.soma_type}: only sparse matrices are read.")

    @cached_property
    def fingerprint(self) -> str:
        """Text that changes when the experiment does, as a release of the census never does."""
        parts = [self.obs.count, self.var.count, self.matrix.nnz, self.obs.schema, self.var.schema]
        for array in (self.obs, self.var, self.matrix):
            folder = Path(array.uri.removeprefix("file://")) / "__fragments"
            if folder.is_dir():  # on this machine: the names are unique to each time of writing
                parts += sorted(entry.name for entry in folder.iterdir())
        name = self.config.uri or f"{self.config.census_version}/{self.config.organism}"
        return hashlib.sha256("\0".join([name, *map(str, parts)]).encode()).hexdigest()[:32]

    @cached_property
    def cells(self) -> np.ndarray:
        """Rising `soma_joinid` of the cells that `value_filter` keeps, mapped from a file that the processes share.

        There may be 60 million, and finding them takes the whole column that they are filtered by.
        """
        key = hashlib.sha256(f"{self.fingerprint}\0{self.config.value_filter}".encode()).hexdigest()[:24]
        path = self.spool_folder / f"census-{key}.npy"
        if not path.exists():
            tables = self.obs.read(column_names=[JOINID], value_filter=self.config.value_filter)
            found = [table[JOINID].to_numpy() for table in tables]
            joinids = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *found]))
            self.spool_folder.mkdir(parents=True, exist_ok=True)
            # Several processes may write it: each replaces it with the same content.
            with WholeFile(path) as partial, partial.open("wb") as file:
                np.save(file, joinids)
        return np.load(path, mmap_mode="r", allow_pickle=False)

    @cached_property
    def genes(self) -> _Genes:
        """The genes that `var_filter` keeps, and their tokens."""
        column = self.config.gene_id_column
        if column not in self.var.keys():
            raise BadInput(f"gene_id_column={column!r} is not a column of var; there are {_names(self.var)}.")
        table = self.var.read(column_names=[JOINID, column], value_filter=self.config.var_filter).concat().to_pandas()
        if not len(table):
            raise BadInput(f"var_filter={self.config.var_filter!r} keeps none of its genes.")
        table = table.sort_values(JOINID)
        match = matched_genes(
            self.tokenizer,
            table[column].astype(str).tolist(),
            GeneOptions(min_known_genes=self.config.min_known_genes),
        )
        return _Genes(table[JOINID].to_numpy(), match, len(table) == self.var.count)

    def metadata(self, cells: np.ndarray, columns: Sequence[str]) -> "pd.DataFrame":
        """Return columns of obs, with one row per cell."""
        import pandas as pd

        wanted = [name for name in columns if name != INDEX]
        missing = [name for name in wanted if name not in self.obs.keys()]
        if missing:
            raise BadInput(f"obs has no columns {missing}, only {_names(self.obs)}.")
        index = [name for name in (DATASET, OBSERVATION) if name in self.obs.keys()]
        if OBSERVATION not in index:
            index = [JOINID]
        needed = list(dict.fromkeys([JOINID, *wanted, *(index if INDEX in columns else ())]))
        if needed == [JOINID]:
            table = pd.DataFrame({JOINID: cells})
        else:
            table = self.obs.read(coords=(cells,), column_names=needed).concat().to_pandas()
            table = table.set_index(JOINID, drop=False).loc[cells].reset_index(drop=True)
        if INDEX in columns:
            table[INDEX] = table[index[0]].astype(str)
            for name in index[1:]:
                table[INDEX] += ":" + table[name].astype(str)
        return table[list(columns)]

    def matrices(self, cells: np.ndarray) -> Iterator[Any]:
        """Yield the counts of the cells as CSR matrices, each of consecutive cells.

        TileDB gives the elements in the order of the cells, a buffer at a time. A matrix gets the cells that are
        complete; the cell of the last element read so far, and those after it, may still get elements.
        """
        genes = self.genes
        coords = (cells, slice(None) if genes.are_all else genes.joinids)
        held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        done = 0  # cells given so far
        for table in self.matrix.read(coords, result_order="row-major").tables():
            if not table.num_rows:
                continue
            rows = np.searchsorted(cells, table["soma_dim_0"].to_numpy())
            held.append((rows, table["soma_dim_1"].to_numpy(), table["soma_data"].to_numpy()))
            if sum(len(part[0]) for part in held) < CHUNK_ELEMENTS:
                continue
            together = tuple(np.concatenate(parts) for parts in zip(*held, strict=True))
            complete = int(together[0][-1])  # the cell of the last element may have more elements in the next table
            if complete > done:
                cut = int(np.searchsorted(together[0], complete))
                yield from self._bounded(tuple(part[:cut] for part in together), done, complete)
                held, done = [tuple(part[cut:] for part in together)], complete  # type: ignore[list-item]
        empty = (np.zeros(0, dtype=np.int64),) * 2 + (np.zeros(0, dtype=np.float32),)
        together = tuple(np.concatenate(parts) for parts in zip(*held, strict=True)) if held else empty
        yield from self._bounded(together, done, len(cells))

    def _bounded(self, elements: tuple[np.ndarray, ...], start: int, stop: int) -> Iterator[Any]:
        """Yield CSR matrices of cells `start` to `stop`, each of at most `CHUNK_ELEMENTS` elements or of one cell."""
        from scipy.sparse import csr_matrix

        rows, joinids, values = elements
        genes = self.genes
        columns = np.searchsorted(genes.joinids, joinids)
        if not np.array_equal(genes.joinids[np.minimum(columns, len(genes.joinids) - 1)], joinids):
            raise BadInput(f"layer={self.config.layer!r} has counts of genes that var does not list.")
        offsets = np.searchsorted(rows, np.arange(start, stop + 1))
        while start < stop:
            begin = len(offsets) - 1 - (stop - start)
            end = int(np.searchsorted(offsets, offsets[begin] + CHUNK_ELEMENTS, side="right")) - 1
            end = max(min(end, len(offsets) - 1), begin + 1)
            cut = slice(offsets[begin], offsets[end])
            shape = (end - begin, len(genes.joinids))
            yield csr_matrix((values[cut], columns[cut], offsets[begin : end + 1] - offsets[begin]), shape=shape)
            start += end - begin


def _open(config: "CensusSource") -> Any:
    """Open the experiment with the context of this process, since a forked one would share TileDB's default one."""
    if config.uri is not None:
        try:
            import tiledbsoma
        except ImportError as error:
            raise ImportError(f"SOMA experiments need tiledbsoma: {_INSTALL}.") from error
        context = _context("experiment", tiledbsoma.SOMATileDBContext)
        return tiledbsoma.Experiment.open(config.uri, context=context)
    try:
        import cellxgene_census
    except ImportError as error:
        raise ImportError(f"The census needs cellxgene-census: {_INSTALL}.") from error
    try:
        context = _context("census", cellxgene_census.get_default_soma_context)
        census = cellxgene_census.open_soma(census_version=config.census_version, context=context)
    except ValueError as error:
        raise BadInput(f"census_version={config.census_version!r} cannot be opened: {error}") from None
    return _member(census["census_data"], config.organism, "organism")


def _context(kind: str, make: Callable[..., Any]) -> Any:
    """Return this process's context of a kind, made by `make(tiledb_config=...)` when it is first asked for."""
    key = (os.getpid(), kind, _BUFFER_BYTES)
    if key not in _CONTEXTS:
        _CONTEXTS[key] = make(tiledb_config={"soma.init_buffer_bytes": _BUFFER_BYTES})
    return _CONTEXTS[key]


def _member(collection: Any, name: str, what: str) -> Any:
    if name not in collection:
        raise BadInput(f"{what}={name!r} is not there, only {sorted(collection)}.")
    return collection[name]


def _names(frame: Any) -> list[str]:
    return sorted(frame.keys())


# Parts of TileDB's messages on filters.
_FILTER_ERRORS = ("QueryCondition", "query_condition", "does not exist in schema")


@contextmanager
def _soma_errors(config: "CensusSource") -> Iterator[None]:
    """Turn TileDB's errors about the experiment or the filters into BadInput.

    TileDB does not tell a broken connection from a broken file. For a remote experiment the connection is assumed to
    be broken, so that a moment without network does not leave the experiment out for good.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("tiledbsoma", "tiledb"):
            raise
        said = str(error).split("\n\nAt:")[0].strip()
        filters = {"value_filter": config.value_filter, "var_filter": config.var_filter}
        given = ", ".join(f"{name}={value!r}" for name, value in filters.items() if value)
        if given and any(sign in said for sign in _FILTER_ERRORS):
            raise BadInput(f"{given} cannot be applied: {said}") from None
        if type(error).__name__ == "DoesNotExistError":
            raise BadInput(f"it is not a SOMA experiment, or does not exist: {said}") from None
        if config.uri is None or ("://" in config.uri and not config.uri.startswith("file://")):
            raise ConnectionError(f"{config.uri or 'the census'} could not be read: {said}. Try again.") from error
        raise BadInput(f"it cannot be read: {said}. Fetch or write it again.") from None
