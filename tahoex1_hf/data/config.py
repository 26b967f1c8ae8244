# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of `tahoex1 prepare`: typed, strict (an unknown key is an error), read from YAML.

`recipes/` has a commented file for every kind of source; `tahoex1 recipes` prints them.
"""

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.common.recipes import check_text, read_recipe

Config = TypeVar("Config", bound=BaseModel)


class Strict(BaseModel):
    """Base of all parts of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def write(self, path: Path) -> None:
        """Write all settings as YAML, including those at their defaults; the file appears whole or not at all."""
        with WholeFile(path) as partial:
            partial.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


class JoinConfig(Strict):
    """A table whose columns are added to the cells' metadata, one row per key."""

    file: str
    """CSV (`.csv`, `.csv.gz`, `.tsv`) or Parquet."""
    key: str
    """Column of the cells and of the table whose values must be equal."""
    columns: list[str] = Field(min_length=1)
    """Columns of the table to add. `metadata` names those to be written."""


class CommonSourceConfig(Strict):
    """Settings that all kinds of sources have."""

    metadata: dict[str, str] = {}
    """Column of the dataset -> column of the source (of `obs`); `_index` is the name of the cell."""
    constants: dict[str, str] = {}
    """Column of the dataset -> the same value for all cells of this source."""
    join: list[JoinConfig] = []
    """Tables joined to the metadata, in this order."""
    filter: str | None = None
    """Cells to keep, an expression over columns of `obs`: `pass_filter == "full" and tissue in ["heart", "lung"]`."""
    min_genes: int = Field(1, ge=0)
    """Smallest number of expressed genes of the vocabulary that a cell must have."""
    min_counts: float = Field(0, ge=0)
    """Smallest sum of the counts of these genes."""
    min_known_genes: float = Field(0.5, ge=0, le=1)
    """Smallest fraction of a file's genes that must be in the vocabulary; a file below it is bad input."""
    non_integer_counts: Literal["error", "keep"] = "error"
    """Rule for files whose values are not whole numbers (log-normalised counts, or estimates)."""
    duplicate_barcodes: Literal["error", "drop", "keep"] = "error"
    """Rule for files in which the name of a cell occurs twice; `drop` keeps the first cell."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        both = sorted(set(self.metadata) & set(self.constants))
        if both:
            raise ValueError(f"metadata and constants both name {both}: take one of them out.")
        reserved = sorted({"genes", "counts"} & {*self.metadata, *self.constants})
        if reserved:
            raise ValueError(f"{reserved} cannot name metadata: the dataset has its genes and counts there.")
        if self.filter is not None:
            filter_columns(self.filter)
        return self


class _Files(CommonSourceConfig):
    paths: list[str] = Field(min_length=1)
    """Files, folders (searched for files of this kind at any depth) and globs (`**` too)."""
    gene_id_column: str | None = None
    """Column of `var` with Ensembl ids; by default they are looked for."""
    gene_symbols: str | None = None
    """Table with gene symbol and Ensembl id, for files that name genes by symbol; by default the package's."""
    species: Literal["human", "mouse"] = "human"
    """Species of the cells; genes of a mouse need `orthologs`."""
    orthologs: str | None = None
    """Table with mouse genes and their human orthologues."""


class AnnDataSource(_Files):
    """`.h5ad` files and `.zarr` stores: CSR, CSC or dense, read in chunks of cells."""

    kind: Literal["anndata"]
    layer: str | None = None
    """Layer with the counts; by default `X`, where that holds counts. `raw` takes counts and genes of `raw`."""


class TenXSource(_Files):
    """Output of Cell Ranger: `.h5` files, and folders with `matrix.mtx`, `barcodes.tsv` and `features.tsv`."""

    kind: Literal["10x"]


class Tahoe100MSource(CommonSourceConfig):
    """The Hub dataset `tahoebio/Tahoe-100M`, or Parquet or Arrow files with its columns."""

    kind: Literal["tahoe-100m"]
    paths: list[str] = Field(default=["hf://datasets/tahoebio/Tahoe-100M/data"], min_length=1)
    """Files, folders and globs, local or remote (`hf://`, `s3://`); remote files are read piece by piece."""
    gene_metadata: str = "hf://datasets/tahoebio/Tahoe-100M/metadata/gene_metadata.parquet"
    """Table of genes with the columns `token_id` and `ensembl_id`."""


class CensusSource(CommonSourceConfig):
    """A SOMA experiment, such as one organism of the CELLxGENE census."""

    kind: Literal["census"]
    uri: str | None = None
    """An experiment on disk or at `s3://`; leave it out to open the census by its version."""
    census_version: str = "2025-01-30"
    """Release of the census."""
    organism: str = "homo_sapiens"
    """Organism of the census."""
    measurement: str = "RNA"
    """Name of the measurement."""
    layer: str = "raw"
    """Name of its matrix of counts."""
    value_filter: str | None = None
    """Cells to read, in SOMA's language: `is_primary_data == True and suspension_type != "na"`."""
    var_filter: str | None = None
    """Genes to read, in SOMA's language: `n_measured_obs >= 10 and nnz >= 10`."""
    gene_id_column: str = "feature_id"
    """Column of `var` with Ensembl ids."""


class MDSSource(CommonSourceConfig):
    """The original's shards, written by mosaicml-streaming: `genes` and `expressions`, pickled."""

    kind: Literal["mds"]
    paths: list[str] = Field(min_length=1)
    """Folders with an `index.json`, local or `s3://`; folders above them are searched."""
    source_vocab: str
    """The `vocab.json` whose ids the shards hold; they are translated by name."""


SourceConfig = Annotated[
    AnnDataSource | TenXSource | Tahoe100MSource | CensusSource | MDSSource, Field(discriminator="kind")
]


class ValidationSplit(Strict):
    """The cells that are kept for validation."""

    fraction: float | None = Field(None, ge=0, lt=1)
    """Share of the cells, or of the values of `by`, chosen by the seed; by default 0.01, without `values`."""
    by: str | None = None
    """Metadata column whose values are held out whole (a cell line, a drug); by default single cells are held out."""
    values: list[str] | None = None
    """Values of `by` that are held out, instead of a share chosen by the seed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.values is not None and self.by is None:
            raise ValueError("values needs by, the column that holds these values.")
        if self.values is not None and self.fraction is not None:
            raise ValueError("values and fraction exclude each other: values are held out whole.")
        return self

    @property
    def share(self) -> float:
        """The fraction, or its default."""
        return 0.01 if self.fraction is None else self.fraction


class PrepareConfig(Strict):
    """All settings that decide the content of a prepared dataset, byte for byte."""

    sources: list[SourceConfig] = Field(min_length=1)
    """Sources of the cells."""
    output: str
    """Folder of the dataset, which is made if it does not exist; or its place in an object store, such as `s3://…`."""
    vocab: str
    """The model's `vocab.json`."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the shuffling and of the validation split."""
    validation: ValidationSplit = ValidationSplit()
    """The validation split."""
    format: Literal["arrow", "parquet"] = "arrow"
    """`arrow` trains fastest (memory-mapped); `parquet` is about half the size."""
    shard_size_mb: float = Field(250, gt=0)
    """Size of a shard, in MB of 10^6 bytes before compression."""
    piece_cells: int = Field(16384, gt=0)
    """Number of cells that a process reads at once, which bounds its memory and the work that an interruption
    loses."""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """Rule for bad files; `skip` leaves them out and lists them, with the reason, in the manifest."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        by = self.validation.by
        for number, source in enumerate(self.sources):
            if by is not None and by not in source.metadata and by not in source.constants:
                raise ValueError(f"validation.by={by!r} is neither in metadata nor in constants of sources[{number}].")
        return self


_FILTER_NODES = (
    ast.Expression,
    ast.BoolOp,
    ast.And,
    ast.Or,
    ast.UnaryOp,
    ast.Not,
    ast.USub,
    ast.Compare,
    ast.cmpop,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.List,
    ast.Tuple,
)


# A text in quotation marks, which may hold backticks of its own, or a name between backticks.
_QUOTED_NAME = re.compile(r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`([^`\n]+)`""")


def filter_columns(expression: str) -> list[str]:
    """Return the columns that a filter reads; names with blanks and the like are written between backticks.

    Raises:
        ValueError: For anything but comparisons of columns with values (calls, attributes and arithmetic are refused).
    """
    quoted: dict[str, str] = {}

    def plain(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        return quoted.setdefault(match[1], f" _quoted_name_{len(quoted)} ")

    try:
        tree = ast.parse(_QUOTED_NAME.sub(plain, expression).strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(
            f"filter={expression!r} is not an expression: {error.msg}. The name of a column with blanks stands "
            'between backticks: `cell type` == "B".'
        ) from None
    for node in ast.walk(tree):
        if not isinstance(node, _FILTER_NODES):
            raise ValueError(
                f"filter={expression!r} has a {type(node).__name__}: compare columns with values, joined by and, or "
                'and not, for example pass_filter == "full" and n_genes > 500.'
            )
    names = {place.strip(): name for name, place in quoted.items()}
    return sorted({names.get(node.id, node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)})


def validated(kind: type[Config], values: dict[str, Any], origin: str) -> Config:
    """Make a configuration from plain values.

    Raises:
        ValueError: If keys are unknown, missing or of the wrong type; the message names `origin` and all such keys.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"]) or "the configuration"
            said = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
            lines.append(f"  {where}: {said.removeprefix('Value error, ')}")
        raise ValueError(f"{origin}:\n" + "\n".join(lines)) from None


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Put `key=value` into the keys and values of a YAML file.

    Args:
        values: Keys and values of the file; changed in place and returned.
        overrides: `key=value`, with dots for keys within keys (`model.hidden_size=64`); values are YAML.

    Raises:
        ValueError: For an override that is not `key=value`.
    """
    for override in overrides:
        check_text(override, "the command line")
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is not key=value, for example seed=1.")
        *parents, name = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{override!r}: {parent} does not hold keys.")
        try:
            place[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{override!r}: the value is not YAML: {error}") from None
        if isinstance(place[name], str):
            place[name] = _number(place[name])
    return values


def _number(text: str) -> str | float:
    """Return the number that a text stands for, or the text: YAML takes 1e-4, without a point, for text."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_config(values: dict[str, Any], origin: str) -> PrepareConfig:
    """Make a configuration for `tahoex1 prepare`; errors are those of `validated`."""
    return validated(PrepareConfig, values, origin)


def read_config(path: str | Path, **changes: Any) -> PrepareConfig:
    """Read a recipe, a YAML file or the name of one of the package's; `changes` that are not None replace its keys."""
    values = read_recipe(path, "prepare")
    return parse_config({**values, **{key: value for key, value in changes.items() if value is not None}}, str(path))
