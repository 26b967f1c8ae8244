"""Convert a checkpoint of the original from a folder or file, a Hub repository, or an S3 bucket."""

import logging
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch

from tahoex1_hf.common.dtypes import dtype_name
from tahoex1_hf.hub.download import SAME_SIZE, download_snapshot
from tahoex1_hf.original.convert import MAX_SHARD_SIZE, convert_into, open_original
from tahoex1_hf.original.files import (
    COLLATOR_CONFIG,
    DRUG_FINGERPRINTS,
    DRUG_TABLE,
    MODEL_CONFIG,
    PICKLE,
    SAFETENSORS,
    SHARDED_METADATA,
    VOCAB,
)
from tahoex1_hf.original.finished import finished_conversion
from tahoex1_hf.original.verify import MANIFEST, Verification
from tahoex1_hf.original.writing import workspace

logger = logging.getLogger(__name__)

WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "float64")

_SMALL_FILES = (MODEL_CONFIG, COLLATOR_CONFIG, VOCAB, DRUG_TABLE, DRUG_FINGERPRINTS)


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    size: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Verification:
    """Convert a checkpoint of the original into a folder that the Auto classes load.

    Args:
        source: A folder in the original's layout (or one that holds several, as `<size>-model/`), a Composer `*.pt` or
            the folder of a sharded Composer checkpoint, with the settings beside it; the id of a Hub repository; or
            `s3://bucket/prefix` (needs the extra `s3`).
        destination: Folder to make.
        size: Name of one of several sizes, for instance `70m`.
        revision: Branch, tag or commit of a Hub repository.
        dtype: Type of the converted tensors, or its name; by default the original's.
        max_shard_size: Largest size of one file of weights, in bytes.

    Returns:
        The verification. If `destination` holds the conversion of exactly this checkpoint already, nothing is done.

    Raises:
        FileExistsError: If `destination` exists and is neither an empty folder nor that conversion.
        FileNotFoundError: If a repository, bucket, size or file does not exist; the message lists the sizes that do.
        PermissionError: If the repository or bucket may not be read.
        ConnectionError: If the network or the server does not answer.
        ValueError: If the checkpoint cannot be converted without guessing, or is damaged.
    """
    destination = Path(destination)
    if isinstance(dtype, str):
        dtype = cast(torch.dtype, getattr(torch, dtype_name(dtype, WEIGHT_DTYPES)))
    if (destination / MANIFEST).is_file():
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as temporary:
            found, _ = _fetch(source, size, revision, Path(temporary) / "download")
            checkpoint = open_original(found)
            done = finished_conversion(destination, checkpoint.files, dtype or checkpoint.dtype)
        if done is not None:
            return done
    with workspace(destination) as folder:
        found, label = _fetch(source, size, revision, folder / "download")
        _, verification = convert_into(
            found, folder / "result", dtype=dtype, max_shard_size=max_shard_size, label=label
        )
    return verification


def _fetch(source: str | Path, size: str | None, revision: str | None, download: Path) -> tuple[Path, str]:
    """Return the folder of the files, which are fetched if they are remote, and their origin for the manifest."""
    name = str(source)
    is_s3 = name.startswith("s3://")
    if revision is not None and (is_s3 or Path(source).exists()):
        raise ValueError(f"revision={revision!r} is for Hub repositories, and {name} is not one.")
    if is_s3:
        label = _fetch_s3(name, size, download)
        return download, label
    path = Path(source)
    if path.exists():
        if path.is_dir() and not (path / SHARDED_METADATA).is_file():
            configs = [p.relative_to(path).as_posix() for p in path.glob(f"**/{MODEL_CONFIG}")]
            path = path / choose_size(configs, size, name)
        return path, path.resolve().name
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise FileNotFoundError(f"{name} is neither a folder or file, nor a Hub repository (owner/name), nor s3://.")
    snapshot = download_snapshot(name, size, revision, {})
    configs = [p.relative_to(snapshot).as_posix() for p in snapshot.glob(f"**/{MODEL_CONFIG}")]
    folder = choose_size(configs, size, f"The Hub repository {name}")
    if size is None and folder:  # there is only one size, whose weights were not asked for
        snapshot = download_snapshot(name, folder, revision, {})
    return snapshot / folder, f"https://huggingface.co/{name}/tree/{snapshot.name}/{folder}".rstrip("/")


def choose_size(configs: Iterable[str], size: str | None, source: str) -> str:
    """Return the folder of a size, "" for the root.

    Args:
        configs: Path of every `model_config.yml`, from the root of the source.
        size: `70m`, `1b` (or `1.3b`), `3b`, or the name of a folder; None for the only one there is.
        source: Name of the source in errors.

    Raises:
        FileNotFoundError: If there is no such size, or `size` is None and there are several; the message lists them.
    """
    folders = {config.removesuffix(MODEL_CONFIG).rstrip("/") for config in configs}
    names = {folder.removesuffix("-model"): folder for folder in sorted(folders) if folder.count("/") == 0}
    if size is None and ("" in folders or len(names) == 1):
        return names[""] if "" in folders else next(iter(names.values()))
    if size is not None:
        wanted = size.removesuffix("-model")
        for name in (wanted, SAME_SIZE.get(wanted)):
            if name in names:
                return names[name]
    there = ", ".join(sorted(name for name in names if name))
    if not names:
        raise FileNotFoundError(f"{source} has no {MODEL_CONFIG}: it holds no checkpoint of the original.")
    if not there:
        raise FileNotFoundError(f"{source} has no size {size!r}; its only checkpoint is at its root: leave size out.")
    problem = f"has no size {size!r}" if size is not None else "holds several sizes"
    raise FileNotFoundError(f"{source} {problem}; the sizes are: {there}. Pass one of them as size.")


def _fetch_s3(url: str, size: str | None, download: Path) -> str:
    """Fetch the files of one size, and return their address."""
    try:
        import s3fs  # noqa: F401
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise ImportError(f"Reading {url} needs s3fs: pip install 'tahoex1_hf[s3]'.") from error
    root = url.removeprefix("s3://").strip("/")
    try:
        files, filesystem = _list_s3(root)
        configs = [name for name in files if name.rsplit("/", 1)[-1] == MODEL_CONFIG]
        folder = choose_size(configs, size, url)
        prefix = f"{folder}/" if folder else ""
        inside = {name.removeprefix(prefix): name for name in files if name.startswith(prefix)}
        download.mkdir()
        for name in _needed(inside, url):
            target = download / name
            target.parent.mkdir(parents=True, exist_ok=True)
            logger.info("Fetching s3://%s/%s", root, inside[name])
            filesystem.get_file(f"{root}/{inside[name]}", str(target))
            if target.stat().st_size != files[inside[name]]:
                raise ConnectionError(f"s3://{root}/{inside[name]} arrived incomplete: try again.")
    except FileNotFoundError as error:
        shutil.rmtree(download, ignore_errors=True)
        if "bucket" in str(error).lower() and "does not exist" in str(error).lower():
            raise FileNotFoundError(f"There is no S3 bucket {root.split('/')[0]}: check the address {url}.") from error
        raise
    except PermissionError as error:
        raise PermissionError(f"{url} may not be read with your AWS credentials, nor without: {error}") from error
    except (BotoCoreError, ClientError) as error:
        raise ConnectionError(f"{url} could not be reached: {error}") from error
    return f"s3://{root}/{folder}".rstrip("/")


def _list_s3(root: str) -> tuple[dict[str, int], Any]:
    """Return the size of every object below a prefix, and the file system, signed where there are credentials."""
    import botocore.session
    import s3fs

    signed = botocore.session.get_session().get_credentials() is not None
    for anonymous in (False, True) if signed else (True,):
        filesystem = s3fs.S3FileSystem(anon=anonymous, skip_instance_cache=True, use_listings_cache=False)
        try:
            found = filesystem.find(root, detail=True)
        except PermissionError:
            if anonymous:
                raise
            continue  # a public bucket may refuse credentials, but be open without
        if not found:
            bucket = root.split("/")[0]
            filesystem.ls(bucket)  # raises where there is no such bucket
            raise FileNotFoundError(f"s3://{root} holds no file: check the address.")
        return {name.removeprefix(root).lstrip("/"): entry["size"] for name, entry in found.items()}, filesystem
    raise AssertionError("unreachable")


def _needed(names: Iterable[str], source: str) -> list[str]:
    """Choose the files to fetch from a checkpoint's folder: the settings, and the weights in one format."""
    here = {name for name in names if name.count("/") <= 1 and ".." not in name.split("/")}
    small = [name for name in _SMALL_FILES if name in here]
    for name in (SAFETENSORS, PICKLE):
        if name in here:
            return [*small, name]
    pickles = sorted(name for name in here if name.endswith(".pt") and "/" not in name)
    sharded = sorted(name.removesuffix(SHARDED_METADATA) for name in here if name.endswith(SHARDED_METADATA))
    if len(pickles) == 1 and not sharded:
        return [*small, *pickles]
    if len(sharded) == 1 and not pickles:
        folder = sharded[0]
        pieces = {name for name in here if name.startswith(folder) and name.endswith((SHARDED_METADATA, ".distcp"))}
        return [*small, *sorted(pieces)]
    if pickles or sharded:
        raise FileNotFoundError(
            f"{source} holds several checkpoints ({', '.join(pickles + sharded)}): leave only one."
        )
    raise FileNotFoundError(f"{source} has no weights: neither {SAFETENSORS} nor {PICKLE}, nor a sharded checkpoint.")
