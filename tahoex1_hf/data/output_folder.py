# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The output folder of `prepare`: whose dataset it holds, and how it is emptied.

A kill at any moment leaves a folder that the next run understands: the manifest, which says that a dataset is
complete, is written last and removed first.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from tahoex1_hf.common.digests import json_digest
from tahoex1_hf.common.files import sync, write_json
from tahoex1_hf.common.names import public_name
from tahoex1_hf.common.reading import reading

WORK_FOLDER = ".prepare"
MANIFEST = "manifest.json"
LOCK = ".prepare.lock"
_IDENTITY = "identity.json"
_PATHS = ("paths", "vocab", "file", "gene_symbols", "gene_metadata", "source_vocab")  # settings that name files
_REMOVING = ".prepare.removing"  # is there while the folder is emptied


def claim(output: Path, identity: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Look what the folder holds, and make it ready for the dataset.

    Args:
        output: Folder that exists, and that no other process writes to.
        identity: What decides the content of the dataset, apart from the files.
        overwrite: Whether to remove another dataset, or the remains of another run.

    Returns:
        The manifest where the folder holds this very dataset, or None where there is something left to do.

    Raises:
        ValueError: For a folder with another dataset, or with something else.
    """
    work = output / WORK_FOLDER
    if (output / _REMOVING).is_file():  # a run was killed while it emptied the folder
        _empty(output)
    manifest, begun = _read(output / MANIFEST), _read(work / _IDENTITY)
    found = begun if manifest is None else manifest
    if found is not None and overwrite:
        _empty(output)
    elif found is not None:
        _check_same(output, found, identity)
        if manifest is not None and _has_all_shards(output, manifest):
            shutil.rmtree(work, ignore_errors=True)  # the run was killed when all was done but this
            return manifest
        (output / MANIFEST).unlink(missing_ok=True)
    else:
        _check_empty(output)
    work.mkdir(exist_ok=True)
    write_json(work / _IDENTITY, identity)
    return None


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    with reading(path):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not describe a dataset: remove it, or name another folder.")
    return found


def _check_same(output: Path, found: dict[str, Any], identity: dict[str, Any]) -> None:
    if "identity_sha256" in found:
        same = found["identity_sha256"] == json_digest(identity)
    else:  # a run that is not finished, or a dataset of an earlier version
        same = all(found.get(key) == value for key, value in identity.items())
    if same:
        return
    before = found.get("configuration")
    before = without_paths(before) if isinstance(before, dict) else {}
    here = without_paths(identity["configuration"])
    different = [key for key, value in here.items() if before.get(key) != value]
    if not different:
        different = ["vocab" if found.get("vocab_sha256") != identity.get("vocab_sha256") else "paths"]
    raise ValueError(
        f"output={str(output)!r} holds a dataset made with other settings ({', '.join(different)}): "
        "name another folder, or pass --overwrite."
    )


def without_paths(settings: Any) -> Any:
    """Return settings in which files of this machine are named by their base names."""
    if isinstance(settings, dict):
        return {
            key: _name(value) if key in _PATHS else value if key == "output" else without_paths(value)
            for key, value in settings.items()
        }
    return [without_paths(value) for value in settings] if isinstance(settings, list) else settings


def _name(value: Any) -> Any:
    if isinstance(value, list):
        return [_name(each) for each in value]
    return public_name(value) if isinstance(value, str) else value


def _has_all_shards(output: Path, manifest: dict[str, Any]) -> bool:
    """Return whether all shards are there, with the size that the manifest names."""
    with reading(output / MANIFEST):
        shards = [shard for part in manifest["splits"].values() for shard in part["shards"]]
        paths = [(output / shard["file"], shard["bytes"]) for shard in shards]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _check_empty(output: Path) -> None:
    """Remove what a run left that was killed before it noted what it is; raise ValueError for anything else."""
    strangers = [entry.name for entry in output.iterdir() if entry.name not in (LOCK, WORK_FOLDER)]
    if strangers == ["data"] and (output / WORK_FOLDER).is_dir() and not any((output / "data").iterdir()):
        strangers = []
    if strangers:
        raise ValueError(f"output={str(output)!r} is not empty ({strangers[:3]}): name a new folder.")
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)


def _empty(output: Path) -> None:
    """Remove a dataset, manifest first, so that its remains are never taken for a whole one."""
    (output / _REMOVING).touch()
    sync(output)
    for name in (MANIFEST, "README.md", "vocab.json"):
        (output / name).unlink(missing_ok=True)
    sync(output)
    for name in ("data", WORK_FOLDER):
        if (output / name).is_dir():
            shutil.rmtree(output / name)
    (output / _REMOVING).unlink()
