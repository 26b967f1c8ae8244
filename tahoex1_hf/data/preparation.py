# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Prepare a training dataset: inspect files, read them in pieces (`pieces.py`), and gather these (`shards.py`).

Intermediate files lie in `OUTPUT/.prepare` and appear there whole or not at all, so that a run that was stopped in any
way resumes where it was; the folder is removed at the end. The output, a folder or a prefix in an object store,
depends on the configuration, the vocabulary and the files, but not on the number of processes, nor on a cluster's
losses.
"""

import json
import logging
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from tahoex1_hf.cells.fingerprint import agrees
from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.cells.readers.unreadable import as_bad_input
from tahoex1_hf.common.cluster import ClusterOptions, connected
from tahoex1_hf.common.folders import Folder
from tahoex1_hf.common.locks import RunLock
from tahoex1_hf.data.columns import MAX_CATEGORIES, check_joins, common_type
from tahoex1_hf.data.config import PrepareConfig
from tahoex1_hf.data.manifest import FileOutcome, build_manifest, dataset_card
from tahoex1_hf.data.on_cluster import ClusterWorkers
from tahoex1_hf.data.output_folder import DATA, LOCK, MANIFEST, WORK_FOLDER, claim
from tahoex1_hf.data.piece_folder import PieceFolder, piece_folder
from tahoex1_hf.data.pieces import DROP_RULES, SPLITS, PieceRange, make_batches, piece_ranges
from tahoex1_hf.data.shards import DatasetSchema, ShardRecord, file_sha256, load_record, save_record, write_shard
from tahoex1_hf.data.sources.base import FileReport, SourceReader
from tahoex1_hf.data.workers import LocalWorkers, Workers, use_one_thread
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

_PLAN, _PIECES = "plan.json", "pieces.json"  # files of the work folder


@dataclass(frozen=True)
class Job:
    """The settings that every worker process needs."""

    config_json: str
    spool: str | None  # folder for counts sorted by cell; None if each process has its own

    @property
    def config(self) -> PrepareConfig:
        """The configuration."""
        return _parsed(self.config_json)

    @property
    def output(self) -> Folder:
        """The folder of the dataset."""
        return Folder(self.config.output)

    @property
    def work(self) -> Folder:
        """The folder of intermediate files."""
        return self.output.child(WORK_FOLDER)


@lru_cache(maxsize=4)
def _parsed(config_json: str) -> PrepareConfig:
    return PrepareConfig.model_validate_json(config_json)


class InputFile(NamedTuple):
    """A file of a source; files are numbered across all sources."""

    number: int
    source: int
    path: str


class _InspectTask(NamedTuple):
    job: Job
    file: InputFile


class _Inspected(NamedTuple):
    report: FileReport | None
    duplicates: np.ndarray
    reason: str


class _PieceTask(NamedTuple):
    job: Job
    file: InputFile
    piece: PieceRange
    duplicates: np.ndarray
    by_gene: bool


class _ShardTask(NamedTuple):
    job: Job
    split: str
    number: int
    num_shards: int
    schema: DatasetSchema


@lru_cache(maxsize=1)
def _open_sources(job: Job) -> list[SourceReader]:
    """Open the sources, once per process."""
    config = job.config
    tokenizer = TahoeX1Tokenizer(config.vocab)
    spool = Path(job.spool or _own_spool().name)
    return [_open_source(source, tokenizer, spool) for source in config.sources]


@lru_cache(maxsize=1)
def _own_spool() -> "tempfile.TemporaryDirectory[str]":
    """Make a folder that is removed with this process."""
    return tempfile.TemporaryDirectory(prefix="tahoex1-by-cell-")


@lru_cache(maxsize=1)
def _pieces_at(job: Job) -> PieceFolder:
    """Return the folder of the pieces, which keeps in memory what it has read of them, once per process."""
    return piece_folder(job.work.child("pieces"))


def _open_source(config: Any, tokenizer: TahoeX1Tokenizer, spool: Path) -> SourceReader:
    # Each kind needs libraries that the others do not.
    if config.kind == "census":
        from tahoex1_hf.data.sources.census import CensusExperiment

        return CensusExperiment(config, tokenizer, spool)
    if config.kind == "mds":
        from tahoex1_hf.data.sources.mds import MDSFiles

        return MDSFiles(config, tokenizer, spool)
    from tahoex1_hf.data.sources.opened import OpenedFiles

    return OpenedFiles(config, tokenizer, spool)


def prepare(
    config: PrepareConfig,
    num_proc: int = 1,
    overwrite: bool = False,
    full_paths: bool = False,
    cluster: ClusterOptions | None = None,
) -> dict[str, Any]:
    """Write a training dataset, or resume one that an earlier run left unfinished.

    Args:
        config: Configuration of the dataset.
        num_proc: Number of processes; it changes only the time.
        overwrite: Whether to begin anew where `config.output` holds another dataset, or the remains of another run.
        full_paths: Whether the manifest names the files by their whole paths, and not by their base names.
        cluster: Ray cluster whose workers do the work, in place of processes of this machine; it changes only the
            time. All its machines must see the inputs and the output.

    Returns:
        The manifest, which is also `OUTPUT/manifest.json`.

    Raises:
        ValueError: For input that cannot be used (see `on_bad_file`), and for an output folder with something else.
        FileNotFoundError: For a path that does not exist.
        ImportError: If `cluster` is given and Ray is not installed.
        ClusterError: If the cluster cannot be reached, or is lost; the same call resumes the run.
    """
    if num_proc < 1:
        raise ValueError(f"num_proc={num_proc}: pass at least 1.")
    if cluster is not None and num_proc > 1:
        raise ValueError(
            f"num_proc={num_proc} (--num-proc) is for this machine: leave it out beside a cluster (--ray)."
        )
    output = Folder(config.output)
    output.make()
    lock = RunLock(output.place(LOCK) if output.is_local else None, f"output={config.output!r}", "output")
    with lock, ExitStack() as stack:
        workers: Workers = LocalWorkers(num_proc)
        spool: str | None = f"{output.child(WORK_FOLDER).location}/by_cell"
        if not output.is_local:  # processes of this machine share a folder; each of a cluster's has its own
            spool = None
            if cluster is None:
                spool = stack.enter_context(tempfile.TemporaryDirectory(prefix="tahoex1-by-cell-"))
        if cluster is not None:
            workers = ClusterWorkers(stack.enter_context(connected(cluster)), config.output, _begin_worker)
        stack.callback(_forget)
        return _prepare_locked(Job(config.model_dump_json(), spool), workers, overwrite, full_paths)


def _forget() -> None:
    """Forget what an earlier run in this process has opened, since when files may have changed."""
    for cached in (_open_sources, _own_spool, _pieces_at, _pieces_of):
        cached.cache_clear()


def _begin_worker() -> None:
    use_one_thread()
    _forget()


def _prepare_locked(job: Job, workers: Workers, overwrite: bool, full_paths: bool) -> dict[str, Any]:
    _forget()
    config, output, identity = job.config, job.output, _identity(job.config)
    finished = claim(output, identity, overwrite)
    if finished is not None:
        logger.info("%s is complete: nothing to do (--overwrite makes it anew).", output.location)
        return finished
    for folder in (job.work.child("pieces"), job.work.child("shards"), output.child(DATA)):
        folder.make()
    for source in config.sources:
        check_joins(source.join)
    files = _list_files(job)
    inspected = _inspect(job, files, workers)
    outcomes = _read_pieces(job, files, inspected, workers)
    pieces = [name for outcome in outcomes for name in outcome.pieces]
    if not any(outcome.cells_kept for outcome in outcomes):
        named = [path for source in config.sources for path in getattr(source, "paths", ())]
        raise ValueError(
            f"no cell of {', '.join(named) or 'the sources'} is left: {_why_none(outcomes)}. Look at the filters and "
            "the files."
        )
    schema = _common_schema(config, _pieces_at(job), pieces)
    shards = _gather(job, pieces, outcomes, schema, workers)
    manifest = build_manifest(identity, outcomes, schema, shards, full_paths)
    output.write_file("vocab.json", Path(config.vocab).read_bytes())
    output.write_file("README.md", dataset_card(manifest).encode())
    _write_json(output, MANIFEST, manifest)
    job.work.remove()
    return manifest


def _identity(config: PrepareConfig) -> dict[str, Any]:
    """Return the settings that decide the content, apart from the files themselves."""
    configuration = config.model_dump(mode="json", exclude={"output"})
    for source in configuration["sources"]:  # keys at their defaults that earlier versions did not write
        if source.get("species") == "human":
            del source["species"], source["orthologs"]
    return {"configuration": configuration, "vocab_sha256": file_sha256(Path(config.vocab))}


def _list_files(job: Job) -> list[InputFile]:
    paths = [(number, path) for number, source in enumerate(_open_sources(job)) for path in source.list_files()]
    return [InputFile(n, source, path) for n, (source, path) in enumerate(paths)]


# First: look at every file ------------------------------------------------------------------------


def inspect_file(task: _InspectTask) -> _Inspected:
    """Report on a file, or say why it is bad."""
    source = _open_sources(task.job)[task.file.source]
    nothing = np.zeros(0, dtype=np.int64)
    try:
        rule = source.config.duplicate_barcodes
        with as_bad_input():
            report = source.inspect(task.file.path)
            names = None if rule == "keep" else source.cell_names(task.file.path)
        if names is None:
            return _Inspected(report, nothing, "")
        repeated = np.flatnonzero(pd.Index(names, dtype=object).duplicated())
        if rule == "error" and len(repeated):
            raise BadInput(
                f"{len(repeated)} cells have the name of another, the first {names[repeated[0]]!r}. Set "
                "duplicate_barcodes: drop (keeps the first of each) or keep."
            )
        return _Inspected(report, repeated, "")
    except BadInput as error:
        return _Inspected(None, nothing, str(error))


def _inspect(job: Job, files: list[InputFile], workers: Workers) -> list[_Inspected]:
    tasks = [_InspectTask(job, file) for file in files]
    results = {task.file.number: seen for task, seen in workers.run(inspect_file, tasks, "inspecting files")}
    inspected = [results[file.number] for file in files]
    bad = [(file.path, seen.reason) for file, seen in zip(files, inspected, strict=True) if seen.report is None]
    _stop_or_skip(job.config, bad)
    reports = [None if seen.report is None else seen.report.to_dict() for seen in inspected]
    plan = [{"path": file.path, "report": report} for file, report in zip(files, reports, strict=True)]
    if job.work.size(_PLAN) is not None:
        before = json.loads(job.work.read_file(_PLAN))
        changed = [new["path"] for new, old in zip(plan, before, strict=False) if not _same_plan(old, new)]
        if changed or len(before) != len(plan):
            raise ValueError(
                f"the input has changed since this dataset was begun ({(changed or ['another number of files'])[0]}): "
                "restore it, or begin anew with --overwrite."
            )
    _write_json(job.work, _PLAN, plan)
    return inspected


def _same_plan(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether a file is still the one that was inspected."""
    old, new = before["report"], now["report"]
    if old is None or new is None or before["path"] != now["path"]:
        return before == now
    others = (old.keys() & new.keys()) - {"fingerprint"}  # a later version may report more
    return agrees(old["fingerprint"], new["fingerprint"]) and all(old[name] == new[name] for name in others)


def _check_unchanged(job: Job, files: list[InputFile], inspected: list[_Inspected], bad: dict[int, str]) -> None:
    """Raise ValueError for a file that is no longer the one that was inspected, now that all are read."""
    for file, seen in zip(files, inspected, strict=True):
        if seen.report is None or file.number in bad:
            continue
        now = _open_sources(job)[file.source].fingerprint_now(file.path)
        if now is not None and not agrees(seen.report.fingerprint, now):
            raise ValueError(
                f"{file.path} has changed while it was read: begin anew with --overwrite, with the file as it is to "
                "be."
            )


def _stop_or_skip(config: PrepareConfig, bad: list[tuple[str, str]]) -> None:
    if bad and config.on_bad_file == "stop":
        lines = "\n".join(f"  {path}: {reason}" for path, reason in bad)
        raise ValueError(f"{len(bad)} files cannot be used (on_bad_file: skip leaves them out):\n{lines}")
    for path, reason in bad:
        logger.warning("%s is skipped: %s", path, reason)


# Second: pieces -----------------------------------------------------------------------------------


def spool_file(task: _InspectTask) -> str:
    """Sort a file by cell; return why it cannot be sorted, or an empty text."""
    try:
        with as_bad_input():
            _open_sources(task.job)[task.file.source].spool(task.file.path, task.job.config.piece_cells)
    except BadInput as error:
        return str(error)
    return ""


def make_piece(task: _PieceTask) -> str:
    """Write a piece; return why it cannot be read, or an empty text."""
    source = _open_sources(task.job)[task.file.source]
    config = task.job.config
    try:
        if task.by_gene and task.job.spool is None:
            with as_bad_input():
                source.spool(task.file.path, config.piece_cells)  # once in each process
        batches, statistics = make_batches(
            task.piece, source, source.config, config.validation, config.seed, task.duplicates
        )
    except BadInput as error:
        return str(error)
    _pieces_at(task.job).write(task.piece.name, batches, statistics)
    return ""


def _read_pieces(job: Job, files: list[InputFile], inspected: list[_Inspected], workers: Workers) -> list[FileOutcome]:
    config = job.config
    bad = {file.number: seen.reason for file, seen in zip(files, inspected, strict=True) if seen.report is None}
    by_gene = [file for file, seen in zip(files, inspected, strict=True) if seen.report and seen.report.by_gene]
    spool_tasks = [_InspectTask(job, file) for file in by_gene if job.spool is not None]
    for task, reason in workers.run(spool_file, spool_tasks, "sorting by cell") if spool_tasks else ():
        _note_bad(config, bad, task.file, reason)
    tasks, finished, there = [], 0, _pieces_at(job).finished()
    for file, seen in zip(files, inspected, strict=True):
        if seen.report is None or file.number in bad:
            continue
        for piece in piece_ranges(file.number, file.path, seen.report.num_cells, config.piece_cells):
            if piece.name in there:
                finished += 1
            else:
                tasks.append(_PieceTask(job, file, piece, seen.duplicates, seen.report.by_gene))
    cells = sum(task.piece.stop - task.piece.start for task in tasks)
    together = max(1, config.piece_cells * len(tasks) // max(1, cells))
    for piece_task, reason in workers.run(make_piece, tasks, "reading cells", finished, together):
        _note_bad(config, bad, piece_task.file, reason)
    _check_unchanged(job, files, inspected, bad)
    return _outcomes(job, files, inspected, bad)


def _note_bad(config: PrepareConfig, bad: dict[int, str], file: InputFile, reason: str) -> None:
    if reason and file.number not in bad:
        bad[file.number] = reason
        _stop_or_skip(config, [(file.path, reason)])


def _outcomes(job: Job, files: list[InputFile], inspected: list[_Inspected], bad: dict[int, str]) -> list[FileOutcome]:
    outcomes = [
        FileOutcome(file.source, file.path, seen.report, bad.get(file.number))
        for file, seen in zip(files, inspected, strict=True)
    ]
    pieces = [
        (outcome, piece.name)
        for file, outcome in zip(files, outcomes, strict=True)
        if outcome.reason is None and outcome.report is not None
        for piece in piece_ranges(file.number, file.path, outcome.report.num_cells, job.config.piece_cells)
    ]
    summaries = _pieces_at(job).summaries([name for _, name in pieces])
    for (outcome, name), summary in zip(pieces, summaries, strict=True):
        outcome.add(name, summary.statistics)
    return outcomes


def _why_none(outcomes: list[FileOutcome]) -> str:
    total = {rule: sum(outcome.statistics.dropped[rule] for outcome in outcomes) for rule in DROP_RULES}
    dropped = ", ".join(f"{rule} dropped {count}" for rule, count in total.items() if count)
    return f"{sum(outcome.reason is not None for outcome in outcomes)} files were skipped; {dropped or 'none read'}"


# Third: shards ------------------------------------------------------------------------------------


def _common_schema(config: PrepareConfig, folder: PieceFolder, pieces: list[str]) -> DatasetSchema:
    names = list(dict.fromkeys(name for source in config.sources for name in (*source.metadata, *source.constants)))
    kinds: dict[str, list[pa.DataType]] = {name: [] for name in names}
    values: dict[str, set[str] | None] = {name: set() for name in names}
    narrow, genes = True, "uint16"
    for piece, (statistics, schema) in zip(pieces, folder.summaries(pieces), strict=True):
        if not statistics.cells_in - sum(statistics.dropped.values()):
            continue  # a piece without cells has columns without a type
        narrow &= pa.types.is_uint16(schema.field("counts").type.value_type)
        genes = str(schema.field("genes").type.value_type)
        for name in set(names) & set(schema.names):
            kinds[name].append(schema.field(name).type)
            known = values[name]
            if known is not None:
                folder.add_values(known, piece, name)
                values[name] = known if len(known) <= MAX_CATEGORIES else None  # too many for a dictionary
    columns = {name: common_type(kinds[name]) for name in names}
    categories = {
        name: sorted(found)
        for name, found in values.items()
        if found is not None and pa.types.is_dictionary(columns[name])
    }
    return DatasetSchema(genes, "uint16" if narrow else "float32", columns, categories)


@lru_cache(maxsize=1)
def _pieces_of(job: Job) -> list[str]:
    """Read the names of all pieces, once per process, since there may be tens of thousands."""
    names: list[str] = json.loads(job.work.read_file(_PIECES))
    return names


def make_shard(task: _ShardTask) -> ShardRecord:
    """Write a shard, unless it is there already, and return its record."""
    job, output = task.job, task.job.output
    name = f"{task.split}-{task.number:05d}-of-{task.num_shards:05d}.{job.config.format}"
    records = job.work.child("shards")
    record = load_record(records, f"{name}.json", output)
    if record is None:
        batches = _pieces_at(job).key_range(_pieces_of(job), task.split, task.number, task.num_shards)
        record = write_shard(output.child(DATA), name, batches, task.schema, job.config.format)
        save_record(records, f"{name}.json", record)
    return record


def _gather(
    job: Job, pieces: list[str], outcomes: list[FileOutcome], schema: DatasetSchema, workers: Workers
) -> dict[str, list[ShardRecord]]:
    bytes_per_gene = np.dtype(schema.genes).itemsize + np.dtype(schema.counts).itemsize
    _write_json(job.work, _PIECES, pieces)
    tasks = []
    for split in SPLITS:
        genes = sum(outcome.statistics.genes[split] for outcome in outcomes)
        cells = sum(outcome.statistics.cells[split] for outcome in outcomes)
        size = genes * bytes_per_gene + cells * (8 + 8 * len(schema.columns))
        num_shards = max(1, round(size / (job.config.shard_size_mb * 1e6))) if cells else 0
        num_shards = min(num_shards, cells)
        tasks += [_ShardTask(job, split, n, num_shards, schema) for n in range(num_shards)]
    records: dict[str, dict[int, ShardRecord]] = {split: {} for split in SPLITS}
    for task, record in workers.run(make_shard, tasks, "writing shards"):
        records[task.split][task.number] = record
    kept = {Path(record.file).name for shards in records.values() for record in shards.values()}
    data = job.output.child(DATA)
    for name in data.names():  # left by a run that was stopped
        if name not in kept:
            data.delete(name)
    return {split: [shards[n] for n in sorted(shards)] for split, shards in records.items()}


def _write_json(folder: Folder, name: str, value: Any) -> None:
    folder.write_file(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
