# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Fetch models from the Hugging Face Hub: only the files that one size needs, with errors that say what to do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from tahoex1_hf.original.files import (
    COLLATOR_CONFIG,
    DRUG_FINGERPRINTS,
    MODEL_CONFIG,
    PICKLE,
    is_original_folder,
)

SIZES_FILE = "sizes.json"  # in an exported repository: the sub-folder of each size, "" for the root
SAME_SIZE = {"1b": "1.3b", "1.3b": "1b"}  # both names are in use


def is_repo_id(name: str) -> bool:
    """Return whether a name can be that of a Hub repository, `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def read_sizes_file(root: Path) -> dict[str, str]:
    """Return the sub-folder of each size of an exported repository, or an empty mapping for any other folder."""
    path = root / SIZES_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def hub_has(repo_id: str, filename: str, revision: str | None, hub: Mapping[str, Any]) -> bool:
    """Return whether a repository has a file, and fetch it if so.

    Without a network the cache decides.
    """
    cached = try_to_load_from_cache(repo_id, filename, cache_dir=hub.get("cache_dir"), revision=revision)
    if isinstance(cached, str):
        return True
    try:
        hf_hub_download(repo_id, filename, revision=revision, **hub)
    except EntryNotFoundError:
        return False
    except (HfHubHTTPError, OfflineModeIsEnabled, PermissionError) as error:
        raise _hub_error(repo_id, revision, error) from error
    return True


def download_snapshot(repo_id: str, size: str | None, revision: str | None, hub: Mapping[str, Any]) -> Path:
    """Fetch only the files that one size of a Hub repository needs, converted or in the original's layout.

    Args:
        repo_id: The repository, `owner/name`.
        size: Name of the size or of its sub-folder; None for the model at the root.
        revision: Branch, tag or commit.
        hub: Options of huggingface_hub: `cache_dir`, `token` and `local_files_only`.

    Returns:
        The folder of the snapshot in the cache.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: As for `find_model`.
    """
    sizes = [] if size is None else [size, size.removesuffix("-model")]
    sizes += [SAME_SIZE[name] for name in sizes if name in SAME_SIZE]
    folders = [""] if size is None else [f"{name}{suffix}/" for name in sizes for suffix in ("", "-model")]
    names = (COLLATOR_CONFIG, DRUG_FINGERPRINTS, "*.json", "model*.safetensors")
    # The small files of every size come along, so that an error can name the sizes that there are.
    small = ["*config.json", f"*{MODEL_CONFIG}", SIZES_FILE]
    of_size: dict[str, Any] = {"allow_patterns": [f"{folder}{name}" for folder in folders for name in names] + small}
    # fnmatch's * crosses folders: for the root, keep the weights of the sub-folders out.
    of_root: dict[str, Any] = {
        "allow_patterns": [*names, *small],
        "ignore_patterns": ["*/*.safetensors"],
    }
    wanted = of_root if size is None else of_size
    try:
        snapshot = Path(snapshot_download(repo_id, revision=revision, **wanted, **hub))
        if size is not None and "" in {read_sizes_file(snapshot).get(name) for name in sizes}:
            snapshot = Path(snapshot_download(repo_id, revision=revision, **of_root, **hub))
        there = [folder for folder in folders if is_original_folder(snapshot / folder)]
        pickles = [f"{folder}{PICKLE}" for folder in there if not any((snapshot / folder).glob("*.safetensors"))]
        if pickles:  # the original's pickles are fetched only where there are no safetensors
            snapshot_download(repo_id, revision=revision, allow_patterns=pickles, **hub)
        return snapshot
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, PermissionError) as error:
        raise _hub_error(repo_id, revision, error) from error


def _hub_error(repo_id: str, revision: str | None, error: Exception) -> OSError:
    """Return an error that says what went wrong and what to do about it."""
    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"The Hub repository {repo_id} is gated: ask for access at {page}, then log in (hf auth login)."
        )
    if isinstance(error, PermissionError):
        return PermissionError(
            f"The Hub repository {repo_id} is not in the cache, or not all of it, and may not be written there "
            f"({error}): set HF_HUB_CACHE to a folder of your own, or have its owner fetch the repository."
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"The Hub has no repository {repo_id} that you may see: check the name, and log in (hf auth login) if it "
            "is private."
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"The Hub repository {repo_id} has no revision {revision!r}: see {page}.")
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        offline = " (HF_HUB_OFFLINE is set)" if constants.is_offline_mode() else ""
        return ConnectionError(
            f"The Hub repository {repo_id} could not be reached{offline} and is not in the cache, or not all of it "
            f"({constants.HF_HUB_CACHE}): fetch it where there is a network (hf download {repo_id}), or name a folder."
        )
    return ConnectionError(f"The Hub could not give {repo_id} now: {error}")
