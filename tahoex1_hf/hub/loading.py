"""Finding a model: a converted folder, a Hub repository, or either in the original program's layout.

A checkpoint in the original's layout is converted once, into a cache beside the Hub's, and loaded from there. This is
how `from_pretrained` of the package's classes, and the command, read what is published today.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
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

from tahoex1_hf.modeling_tahoe_x1 import TahoeX1Model
from tahoex1_hf.original.convert import (
    COLLATOR_CONFIG,
    DRUG_FINGERPRINTS,
    DRUG_TABLE,
    MODEL_CONFIG,
    PICKLE,
    SAFETENSORS,
    VOCAB,
    convert_original_folder,
    is_original_folder,
)
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

SIZES_FILE = "sizes.json"  # in an exported repository: size -> its sub-folder, "" for the one at the root
_ORIGINAL_FILES = (MODEL_CONFIG, COLLATOR_CONFIG, VOCAB, SAFETENSORS, PICKLE, DRUG_TABLE, DRUG_FINGERPRINTS)
SAME_SIZE = {"1b": "1.3b", "1.3b": "1b"}  # both are in use
_HUB_OPTIONS = ("cache_dir", "token", "local_files_only")
_CONVERSION = 1  # to be raised when the conversion comes to write something else


def load_model_and_tokenizer(
    model: str | Path, *, size: str | None = None, revision: str | None = None
) -> tuple[TahoeX1Model, TahoeX1Tokenizer]:
    """Load a model for embedding, and its tokenizer, from wherever `find_model` finds it."""
    folder = find_model(model, size=size, revision=revision)
    return TahoeX1Model.from_pretrained(folder), TahoeX1Tokenizer.from_pretrained(folder)


def find_model(model: str | Path, *, size: str | None = None, revision: str | None = None, **hub: Any) -> Path:
    """Find the folder that the Auto classes load, converting a checkpoint of the original into the cache first.

    Args:
        model: a folder, or the id of a Hub repository.
        size: which of several sizes, for instance `70m`: its sub-folder is `<size>` or `<size>-model`.
        revision: branch, tag or commit of a Hub repository.
        **hub: `cache_dir`, `token` and `local_files_only` of huggingface_hub.

    Raises:
        FileNotFoundError: where there is no model; the message lists the sizes that there are.
        PermissionError: for a repository that is gated.
        ConnectionError: where a repository can be neither reached nor found in the cache.
    """
    if Path(model).exists():
        folder = _size_folder(Path(model), size, str(model))
        return _converted(folder, None) if is_original_folder(folder) else folder
    if not _is_repo_id(str(model)):
        raise FileNotFoundError(f"model {str(model)!r} is neither a folder nor a Hub repository (owner/name).")
    snapshot = download_snapshot(str(model), size, revision, hub)
    folder = _size_folder(snapshot, size, str(model))
    if not is_original_folder(folder):
        return folder
    name = "--".join(["models", *str(model).split("/"), *folder.relative_to(snapshot).parts])
    # Like a snapshot of the Hub's own cache, so that the commit can be read from the path.
    return _converted(folder, Path(f"{name}--v{_CONVERSION}") / "snapshots" / snapshot.name)


def locate_checkpoint(name: Any, marker: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What `from_pretrained` is to load instead, where it is asked for a checkpoint in the original's layout.

    Args:
        name: folder or Hub repository that `from_pretrained` was called with.
        marker: file without which transformers cannot load; where it is there, nothing is changed.
        options: keyword arguments that `from_pretrained` was called with.

    Returns:
        The folder to load, and the keyword arguments for it.

    Raises:
        OSError: as `find_model`.
    """
    options, size = dict(options), options.get("subfolder") or None
    if not isinstance(name, (str, os.PathLike)):
        return name, options
    revision, hub = (
        options.get("revision"),
        {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None},
    )
    path = Path(name)
    if path.exists():
        if not path.is_dir() or (path / (size or "") / marker).is_file():
            return name, options
        root = path
    elif not _is_repo_id(str(name)) or _hub_has(str(name), f"{size}/{marker}" if size else marker, revision, hub):
        return name, options
    else:
        root = download_snapshot(str(name), size, revision, hub)
    if not _model_files(root):
        adapter = (root / (size or "") / "adapter_config.json").is_file()
        if marker == "config.json" and not adapter and options.get("config") is None:
            # Without this, transformers would go on with the default configuration.
            raise FileNotFoundError(f"{name} has neither config.json nor {MODEL_CONFIG}: it holds no Tahoe-x1 model.")
        return name, options
    folder = find_model(path if path.exists() else str(name), size=size, revision=revision, **hub)
    return str(folder), {key: value for key, value in options.items() if key not in ("subfolder", "revision")}


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _size_folder(root: Path, size: str | None, model: str) -> Path:
    at = {path.parent for path in _model_files(root)}
    names = {folder.name.removesuffix("-model"): folder for folder in sorted(at) if folder != root}
    names |= {name: root / folder for name, folder in _sizes_file(root).items()}
    if size is None and root in at:
        return root
    if size is not None:
        for name in (size, size.removesuffix("-model")):
            for candidate in (name, SAME_SIZE.get(name)):
                if candidate in names and names[candidate] in at:
                    return names[candidate]
        if root / size in at:
            return root / size
    wanted = f"size {size!r}" if size is not None else "model at its root"
    if names:
        there = f"it has the sizes {', '.join(sorted(names))}: pass one of them as size (from_pretrained: subfolder)"
    else:
        there = "its only model is at its root: leave the size out" if root in at else "it has no model at all"
    raise FileNotFoundError(f"{model} has no {wanted}; {there}.")


def _sizes_file(root: Path) -> dict[str, str]:
    path = root / SIZES_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _model_files(root: Path) -> list[Path]:
    return [path for name in ("config.json", MODEL_CONFIG) for path in (*root.glob(name), *root.glob(f"*/{name}"))]


def _hub_has(repo_id: str, filename: str, revision: str | None, hub: Mapping[str, Any]) -> bool:
    """Whether a repository has a file, as far as can be told; it is in the cache afterwards."""
    cached = try_to_load_from_cache(repo_id, filename, cache_dir=hub.get("cache_dir"), revision=revision)
    if isinstance(cached, str):
        return True
    try:
        hf_hub_download(repo_id, filename, revision=revision, **hub)
    except EntryNotFoundError:  # without a network too: then what is in the cache decides
        return False
    except (HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise _hub_error(repo_id, revision, error) from error
    return True


def download_snapshot(repo_id: str, size: str | None, revision: str | None, hub: Mapping[str, Any]) -> Path:
    """Fetch what one size of a Hub repository needs, converted or in the original's layout, and nothing more."""
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
        if size is not None and "" in {_sizes_file(snapshot).get(name) for name in sizes}:
            snapshot = Path(snapshot_download(repo_id, revision=revision, **of_root, **hub))
        there = [folder for folder in folders if is_original_folder(snapshot / folder)]
        pickles = [f"{folder}{PICKLE}" for folder in there if not any((snapshot / folder).glob("*.safetensors"))]
        if pickles:  # only where there is nothing better
            snapshot_download(repo_id, revision=revision, allow_patterns=pickles, **hub)
        return snapshot
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _hub_error(repo_id, revision, error) from error


def _hub_error(repo_id: str, revision: str | None, error: Exception) -> OSError:
    """What went wrong, in words that say what to do."""
    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"The Hub repository {repo_id} is gated: ask for access at {page}, then log in (hf auth login)."
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
            f"({constants.HF_HUB_CACHE})."
        )
    return ConnectionError(f"The Hub could not give {repo_id} now: {error}")


def _converted(folder: Path, name: Path | None) -> Path:
    """Convert a checkpoint of the original once, into the Hugging Face cache; two processes may ask at once."""
    if name is None:
        # Files of a Hub snapshot are links to content-named blobs; size and time tell local files apart.
        stats = [(path.resolve(), path.stat()) for path in sorted(folder.iterdir()) if path.name in _ORIGINAL_FILES]
        text = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
        key = hashlib.sha256(f"{_CONVERSION}\n{text}".encode()).hexdigest()[:16]
        name = Path(f"{folder.resolve().name}-{key}")
    destination = Path(constants.HF_HOME) / "tahoex1_hf" / "converted" / name
    destination.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(destination.with_name(f"{destination.name}.lock")):
        if destination.exists():
            return destination
        logger.info("Converting %s into %s", folder, destination)
        partial = destination.with_name(f".{destination.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            convert_original_folder(folder, partial / "model")
            (partial / "model").rename(destination)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} It cannot be converted without that file.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return destination
