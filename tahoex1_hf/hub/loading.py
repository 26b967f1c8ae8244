"""Find a model: a converted folder, a Hub repository, or either in the original program's layout.

The Auto classes need a `config.json` and a tokenizer that the original's layout lacks. They are written once, into a
cache beside the Hub's, with a link to the weights, which are loaded where they are. In this way the command, and
`from_pretrained` of the package's classes, read the checkpoints that are published today.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tahoex1_hf.common.reading import reading
from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.hub.download import SAME_SIZE, download_snapshot, hub_has, is_repo_id, read_sizes_file
from tahoex1_hf.hub.translated import VERSION, translated
from tahoex1_hf.hub.whole_weights import load_whole
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1Model
from tahoex1_hf.original.files import MODEL_CONFIG, VOCAB, is_original_folder
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

_HUB_OPTIONS = ("cache_dir", "token", "local_files_only")


def load_model_and_tokenizer(
    model: str | Path, *, size: str | None = None, revision: str | None = None
) -> tuple[TahoeX1Model, TahoeX1Tokenizer]:
    """Load a model for embedding, and its tokenizer, from wherever `find_model` finds it."""
    folder = find_model(model, size=size, revision=revision)
    return load_folder(folder, TahoeX1Model), load_tokenizer(folder)


def load_folder(folder: Path, model_class: Any, optional: Sequence[str] = (), **options: Any) -> Any:
    """Load a model from a folder that `find_model` found, and make sure of its weights.

    The arguments and errors are those of `load_whole`; errors of the configuration name its file, too.
    """
    with reading(folder / "config.json"):
        TahoeX1Config.from_pretrained(folder)
    return load_whole(folder, model_class, optional, **options)


def load_tokenizer(folder: Path, **changes: Any) -> TahoeX1Tokenizer:
    """Load the tokenizer of a folder, with errors that name its files; `changes` are settings of the tokenizer."""
    if not (folder / VOCAB).is_file():
        raise FileNotFoundError(f"{folder} has no {VOCAB}, the vocabulary of the tokenizer: copy it there, too.")
    with reading(folder / "tokenizer_config.json", folder / VOCAB):
        tokenizer: TahoeX1Tokenizer = TahoeX1Tokenizer.from_pretrained(folder, **changes)
    return tokenizer


def find_model(model: str | Path, *, size: str | None = None, revision: str | None = None, **hub: Any) -> Path:
    """Find the folder that the Auto classes load; for a checkpoint of the original, make it in the cache first.

    Args:
        model: A folder, or the id of a Hub repository.
        size: Name of one of several sizes, for instance `70m`, whose sub-folder is `<size>` or `<size>-model`.
        revision: Branch, tag or commit of a Hub repository.
        **hub: `cache_dir`, `token` and `local_files_only` of huggingface_hub.

    Raises:
        FileNotFoundError: If there is no model; the message lists the sizes that there are.
        PermissionError: For a repository that is gated.
        ConnectionError: If a repository can be neither reached nor found in the cache.
    """
    if Path(model).exists():
        folder = _size_folder(Path(model), size, str(model))
        return translated(folder) if is_original_folder(folder) else folder
    if not is_repo_id(str(model)):
        raise FileNotFoundError(f"model {str(model)!r} is neither a folder nor a Hub repository (owner/name).")
    snapshot = download_snapshot(str(model), size, revision, hub)
    folder = _size_folder(snapshot, size, str(model))
    if not is_original_folder(folder):
        return folder
    name = "--".join(["models", *str(model).split("/"), *folder.relative_to(snapshot).parts])
    # Like a snapshot of the Hub's own cache, so that the commit can be read from the path.
    return translated(folder, Path(f"{name}--v{VERSION}") / "snapshots" / snapshot.name)


def locate_checkpoint(name: Any, marker: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the folder for `from_pretrained` to load instead of a checkpoint in the original's layout.

    Args:
        name: Folder or Hub repository that `from_pretrained` was called with.
        marker: File without which transformers cannot load; where it is there, nothing is changed.
        options: Keyword arguments that `from_pretrained` was called with.

    Returns:
        The folder to load, and the keyword arguments for it.

    Raises:
        OSError: As for `find_model`.
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
    elif not is_repo_id(str(name)) or hub_has(str(name), f"{size}/{marker}" if size else marker, revision, hub):
        return name, options
    else:
        root = download_snapshot(str(name), size, revision, hub)
    if not _model_files(root):
        adapter = (root / (size or "") / "adapter_config.json").is_file()
        if marker == "config.json" and not adapter and options.get("config") is None:
            # Without this, transformers would continue with the default configuration.
            raise FileNotFoundError(f"{name} has neither config.json nor {MODEL_CONFIG}: it holds no Tahoe-x1 model.")
        return name, options
    folder = find_model(path if path.exists() else str(name), size=size, revision=revision, **hub)
    return str(folder), {key: value for key, value in options.items() if key not in ("subfolder", "revision")}


def _size_folder(root: Path, size: str | None, model: str) -> Path:
    model_folders = {path.parent for path in _model_files(root)}
    names = {folder.name.removesuffix("-model"): folder for folder in sorted(model_folders) if folder != root}
    names |= {name: root / folder for name, folder in read_sizes_file(root).items()}
    if size is None and root in model_folders:
        return root
    if size is not None:
        for name in (size, size.removesuffix("-model")):
            for candidate in (name, SAME_SIZE.get(name)):
                if candidate in names and names[candidate] in model_folders:
                    return names[candidate]
        if root / size in model_folders:
            return root / size
    wanted = f"size {size!r}" if size is not None else "model at its root"
    if names:
        there = f"it has the sizes {', '.join(sorted(names))}: pass one of them as size (from_pretrained: subfolder)"
    else:
        at_root = root in model_folders
        there = (
            "its only model is at its root: leave the size out"
            if at_root
            else f"it holds no model at all, neither config.json nor {MODEL_CONFIG}"
        )
    raise FileNotFoundError(f"{model} has no {wanted}; {there}.")


def _model_files(root: Path) -> list[Path]:
    return [path for name in ("config.json", MODEL_CONFIG) for path in (*root.glob(name), *root.glob(f"*/{name}"))]
