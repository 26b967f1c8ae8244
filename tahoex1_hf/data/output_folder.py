# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The output folder of `prepare`: whose dataset it holds, and how it is emptied.

A kill at any moment leaves a folder that the next run understands: the manifest, which says that a dataset is
complete, is written last and removed first. In an object store it is the same.
"""

import json
from typing import Any

from tahoex1_hf.common.digests import json_digest
from tahoex1_hf.common.folders import Folder
from tahoex1_hf.common.names import public_name
from tahoex1_hf.common.reading import reading

WORK_FOLDER = ".prepare"
DATA = "data"
MANIFEST = "manifest.json"
LOCK = ".prepare.lock"
_IDENTITY = "identity.json"
_PATHS = ("paths", "vocab", "file", "gene_symbols", "gene_metadata", "source_vocab")  # settings that name files
_REMOVING = ".prepare.removing"  # is there while the folder is emptied


def claim(output: Folder, identity: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
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
    work = output.child(WORK_FOLDER)
    if output.size(_REMOVING) is not None:  # a run was killed while it emptied the folder
        _empty(output)
    manifest, begun = _read(output, MANIFEST), _read(work, _IDENTITY)
    found = begun if manifest is None else manifest
    if found is not None and overwrite:
        _empty(output)
    elif found is not None:
        _check_same(output, found, identity)
        if manifest is not None and _has_all_shards(output, manifest):
            work.remove()  # the run was killed when all was done but this
            return manifest
        output.delete(MANIFEST)
    else:
        _check_empty(output)
    work.make()
    work.write_file(_IDENTITY, json.dumps(identity, indent=1).encode())
    return None


def _read(folder: Folder, name: str) -> dict[str, Any] | None:
    if folder.size(name) is None:
        return None
    path, content = f"{folder.location}/{name}", folder.read_file(name)
    with reading(path):
        found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not describe a dataset: remove it, or name another folder.")
    return found


def _check_same(output: Folder, found: dict[str, Any], identity: dict[str, Any]) -> None:
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
        f"output={output.location!r} holds a dataset made with other settings ({', '.join(different)}): "
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


def _has_all_shards(output: Folder, manifest: dict[str, Any]) -> bool:
    """Return whether all shards are there, with the size that the manifest names."""
    with reading(f"{output.location}/{MANIFEST}"):
        shards = [shard for part in manifest["splits"].values() for shard in part["shards"]]
        expected = {str(shard["file"]): shard["bytes"] for shard in shards}
    sizes = {f"{DATA}/{name}": size for name, size in output.child(DATA).sizes().items()}
    return all(sizes.get(name) == size for name, size in expected.items())


def _check_empty(output: Folder) -> None:
    """Remove what a run left that was killed before it noted what it is; raise ValueError for anything else."""
    strangers = [name for name in output.names() if name not in (LOCK, WORK_FOLDER)]
    if strangers == [DATA] and WORK_FOLDER in output.names() and not output.child(DATA).names():
        strangers = []
    if strangers:
        raise ValueError(f"output={output.location!r} is not empty ({strangers[:3]}): name a new folder.")
    output.child(WORK_FOLDER).remove()


def _empty(output: Folder) -> None:
    """Remove a dataset, manifest first, so that its remains are never taken for a whole one."""
    output.write_file(_REMOVING, b"")
    output.sync()
    for name in (MANIFEST, "README.md", "vocab.json"):
        output.delete(name)
    output.sync()
    for name in (DATA, WORK_FOLDER):
        output.child(name).remove()
    output.delete(_REMOVING)
