"""Finding a model: a converted folder, a Hub repository, or either in the original program's layout."""

import hashlib
import logging
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from tahoex1_hf.modeling_tahoe_x1 import TahoeX1Model
from tahoex1_hf.original_checkpoints import (
    COLLATOR_CONFIG,
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

_ORIGINAL_FILES = (MODEL_CONFIG, COLLATOR_CONFIG, VOCAB, SAFETENSORS, PICKLE, DRUG_TABLE)


def load_model_and_tokenizer(
    model: str | Path, *, size: str | None = None, revision: str | None = None
) -> tuple[TahoeX1Model, TahoeX1Tokenizer]:
    """Load a model for embedding, and its tokenizer, from wherever `find_model` finds it."""
    folder = find_model(model, size=size, revision=revision)
    return TahoeX1Model.from_pretrained(folder), TahoeX1Tokenizer.from_pretrained(folder)


def find_model(model: str | Path, *, size: str | None = None, revision: str | None = None) -> Path:
    """Find the folder that the Auto classes load, converting a checkpoint of the original into the cache first.

    Args:
        model: a folder, or the id of a Hub repository.
        size: which of several sizes, for instance `70m`: its sub-folder is `<size>` or `<size>-model`.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        FileNotFoundError: where there is no model; the message lists the sizes that there are.
        ConnectionError: where a repository can be neither reached nor found in the cache.
    """
    root = Path(model)
    if not root.exists():
        if str(model).count("/") != 1 or str(model).startswith((".", "~", "/")):
            raise FileNotFoundError(f"model {str(model)!r} is neither a folder nor a Hub repository (owner/name).")
        root = _download(str(model), size, revision)
    folder = _size_folder(root, size, str(model))
    return _converted(folder) if is_original_folder(folder) else folder


def _size_folder(root: Path, size: str | None, model: str) -> Path:
    sizes = sorted({path.parent.name.removesuffix("-model") for path in _model_files(root) if path.parent != root})
    if size is not None:
        for folder in (root / size, root / f"{size}-model"):
            if any(path.parent == folder for path in _model_files(root)):
                return folder
    elif any(path.parent == root for path in _model_files(root)):
        return root
    wanted = f"size {size!r}" if size is not None else "model at its root"
    there = f"it has the sizes {', '.join(sizes)}: pass one of them as size" if sizes else "it has no model at all"
    raise FileNotFoundError(f"{model} has no {wanted}; {there}.")


def _model_files(root: Path) -> list[Path]:
    return [path for name in ("config.json", MODEL_CONFIG) for path in (*root.glob(name), *root.glob(f"*/{name}"))]


def _download(repo_id: str, size: str | None, revision: str | None) -> Path:
    folders = [""] if size is None else [f"{size}/", f"{size}-model/"]
    names = (*_ORIGINAL_FILES, "*.json", "model*.safetensors")
    # The small files of every size come along, so that an error can name the sizes that there are.
    patterns = [f"{folder}{name}" for folder in folders for name in names] + ["*config.json", f"*{MODEL_CONFIG}"]
    # fnmatch's * crosses folders: without a size, keep the weights of the others out.
    ignored = ["*/*.safetensors", f"*/{PICKLE}"] if size is None else None
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"The Hub repository {repo_id} could not be reached and is not in the cache ({constants.HF_HUB_CACHE})."
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"The Hub repository {repo_id} could not be read: {error}") from error


def _converted(folder: Path) -> Path:
    """Convert a checkpoint of the original once, into the Hugging Face cache; two processes may ask at once."""
    # Files of a Hub snapshot are links to content-named blobs; size and time tell local files apart.
    stats = [(path.resolve(), path.stat()) for path in sorted(folder.iterdir()) if path.name in _ORIGINAL_FILES]
    text = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    cache = Path(constants.HF_HOME) / "tahoex1_hf" / "converted"
    destination = cache / f"{folder.name}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{destination.name}.lock"):
        if not destination.exists():
            logger.info("Converting %s into %s", folder, destination)
            convert_original_folder(folder, destination)
    return destination
