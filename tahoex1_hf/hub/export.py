# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Publish converted checkpoints: build the folder of a Hub repository, check that it loads, and upload it.

One size lies at the root, the others in sub-folders (`subfolder=`). The code lies only at the root, where transformers
looks for it whatever the sub-folder.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from tahoex1_hf.common.weight_files import SINGLE, weight_files
from tahoex1_hf.configuration_tahoe_x1 import (
    AUTO_MAP,
    CODE_FILES,
    CUSTOM_PIPELINES,
    TOKENIZER_AUTO_MAP,
    TahoeX1Config,
    copy_code,
)
from tahoex1_hf.hub.cards.rendering import card_text
from tahoex1_hf.hub.download import SIZES_FILE
from tahoex1_hf.hub.isolated_load import compare_isolated_load
from tahoex1_hf.original.tensor_names import check_tensors, our_shapes
from tahoex1_hf.original.verify import MANIFEST, weights_file
from tahoex1_hf.original.weights import open_weights

logger = logging.getLogger(__name__)

LICENSE = Path(__file__).with_name("LICENSE")
CONFIG, TOKENIZER_CONFIG, VOCAB = "config.json", "tokenizer_config.json", "vocab.json"
RUN_STATUS = "run_status.json"
_FILES_OF_A_RUN = {RUN_STATUS, "trainer_state.json"}  # files that users of the model do not need


@dataclass(frozen=True)
class ExportedRepository:
    """A folder that is ready to be uploaded.

    Args:
        folder: The repository.
        differences: Largest difference between the embeddings without and with the package, by size.
        has_card: Whether there is a README.md at the root.
    """

    folder: Path
    differences: dict[str, float]
    has_card: bool

    @property
    def files(self) -> list[Path]:
        """All files of the repository, sorted."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def export_repository(
    converted: Sequence[str | Path],
    destination: str | Path,
    *,
    default: str | None = None,
    card: str | Path | None = None,
    repo_id: str | None = None,
) -> ExportedRepository:
    """Build the folder of a Hub repository from converted checkpoints, with a model card for each size.

    The result is loaded in a process without this package, through every Auto class, and its embeddings are compared
    with the package's, before it is moved to `destination`. Nothing is uploaded: see `push_repository`.

    Args:
        converted: Converted folders, or `NAME=FOLDER`, as for `size_names`.
        destination: Folder to build; an earlier export there is replaced.
        default: Name of the size at the root; by default the first one.
        card: Facts (`.yaml`) or a ready README (`.md`) of the size at the root. By default, and for the other sizes,
            the card of the released size of that name, or the README.md in the converted folder.
        repo_id: Hub repository that the folder is for. Its cards name it, and the size at the root must have a card.

    Raises:
        FileExistsError: If `destination` holds something other than an earlier export.
        FileNotFoundError: If a converted folder lacks a file.
        ValueError: If a folder, a name or a card cannot be used.
        RuntimeError: If the export does not load without the package, or gives other numbers.
    """
    sizes = size_names([str(folder) for folder in converted])
    default = default or next(iter(sizes))
    own_card = None if card is None else Path(card)
    cards = {}
    for name, folder in sizes.items():
        check_converted(folder)
        at_root = name == default
        text = card_text(
            name, folder, own_card if at_root else None, subfolder="" if at_root else name, repo_id=repo_id
        )
        if text is not None:
            cards[name] = text
    if repo_id is not None and default in sizes and default not in cards:
        raise ValueError(
            f"There is no model card for {default!r}: pass facts (.yaml) or a README (.md) as card (--card)."
        )
    destination = Path(destination)
    differences = build_repository(sizes, destination, default=default, cards=cards)
    return ExportedRepository(destination, differences, default in cards)


def push_repository(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str = "Tahoe-x1 for transformers",
) -> str:
    """Upload a folder that `export_repository` built, and return the address of the commit.

    Args:
        folder: The built folder.
        repo_id: Repository, `owner/name`, which is made if it does not exist.
        private: Whether to create it as a private one.
        revision: Branch to upload to; by default `main`.
        commit_message: Message of the commit.

    Raises:
        ConnectionError: If the upload stops; uploaded files are kept, and the next call resumes the upload.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    except HfHubHTTPError as error:
        raise ConnectionError(
            f"The upload to {repo_id} stopped: {error}\nUploaded files are kept, and the same command resumes the "
            "upload. If you are not logged in, log in first (hf auth login)."
        ) from error
    return str(commit.commit_url)


def size_names(folders: Sequence[str]) -> dict[str, Path]:
    """Return the converted folder of each size, by the name in `NAME=FOLDER`, or the folder's own without `-model`.

    Raises:
        ValueError: If two have the same name.
    """
    sizes: dict[str, Path] = {}
    for folder in folders:
        name, equals, path = folder.partition("=") if not Path(folder).exists() else ("", "", folder)
        source = Path(path if equals or not name else folder)
        name = name if equals else source.resolve().name.removesuffix("-model")
        if name in sizes:
            raise ValueError(f"{sizes[name]} and {source} are both named {name}: name one of them, as NAME={source}.")
        if not name or name.startswith(".") or "/" in name:
            raise ValueError(f"{name!r} cannot be the name of a sub-folder: pass NAME={source}.")
        sizes[name] = source
    return sizes


def check_converted(folder: Path) -> None:
    """Check that a folder is a complete converted checkpoint.

    Raises:
        FileNotFoundError: If a file is missing; the message names it.
        ValueError: If it is another kind of model, or its weights are not those that its configuration describes.
    """
    for name in (CONFIG, TOKENIZER_CONFIG, VOCAB):
        if not (folder / name).is_file():
            hint = "convert it first (tahoex1 convert)" if name == CONFIG else "convert it again"
            raise FileNotFoundError(f"{folder} has no {name}, so it is not a converted checkpoint: {hint}.")
    model_type = _read_json(folder / CONFIG).get("model_type")
    if model_type != "tahoe_x1":
        raise ValueError(f"{folder} holds a model of type {model_type!r}: pass a converted Tahoe-x1 checkpoint.")
    converted_weights(folder)
    weights = open_weights(weights_file(folder))
    check_tensors(weights.shapes, our_shapes(TahoeX1Config.from_pretrained(folder)), str(folder))


def converted_weights(folder: Path) -> list[Path]:
    """Return the files that hold a converted checkpoint's weights.

    Raises:
        FileNotFoundError: If one is missing.
    """
    files = weight_files(folder)
    if any(path.suffix != ".safetensors" for path in files):
        raise FileNotFoundError(f"{folder} lacks {SINGLE}: convert it again (weights are safetensors).")
    return files


def build_repository(
    sizes: Mapping[str, Path], destination: Path, *, default: str, cards: Mapping[str, str]
) -> dict[str, float]:
    """Build the folder of a Hub repository, and load it in a process that lacks the package.

    It is built beside `destination` and moved into place once it has loaded and its embeddings agree. An earlier
    export there is replaced; weights are hard links where the file system allows them.

    Args:
        sizes: The converted folder of each size, as `size_names` gives them.
        destination: Folder of the repository.
        default: Name of the size at the root; the others lie in sub-folders of their names.
        cards: Text of README.md, by size.

    Returns:
        The largest difference from the package's own embeddings, by size.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, RuntimeError: As for `export_repository`.
    """
    if default not in sizes:
        raise ValueError(f"default={default!r} is not one of the sizes: pass one of {', '.join(sizes)}.")
    for folder in sizes.values():
        check_converted(folder)
    destination = destination.absolute()
    if destination.exists() and not (destination / SIZES_FILE).is_file() and any(destination.iterdir()):
        raise FileExistsError(f"{destination} exists and is not an earlier export: choose another, or remove it.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as work:
        repository = Path(work) / "repository"
        repository.mkdir()
        places = {name: "" if name == default else name for name in sizes}
        for name, folder in sizes.items():
            _add_checkpoint(folder, repository / places[name])
        copy_code(repository)
        shutil.copyfile(LICENSE, repository / "LICENSE")
        for name, text in cards.items():
            (repository / places[name] / "README.md").write_text(text, encoding="utf-8")
        _write_json(places, repository / SIZES_FILE)
        differences = compare_isolated_load(repository, {places[name]: folder for name, folder in sizes.items()})
        if destination.exists():
            destination.rename(Path(work) / "replaced")
        repository.rename(destination)
    return {name: differences[places[name]] for name in sizes}


def _add_checkpoint(source: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    weights = converted_weights(source)
    for path in sorted(source.iterdir()):
        if path in weights:
            _link_or_copy(path.resolve(), folder / path.name)
        elif path.name in _FILES_OF_A_RUN or path.name in CODE_FILES:  # the code of this version is copied
            continue
        elif path.suffix == ".json" and path.is_file():
            shutil.copyfile(path, folder / path.name)
        elif path.name != "README.md" and not (source / RUN_STATUS).is_file():
            logger.warning("%s is left out: it is not part of a converted checkpoint.", path)
    if (manifest := folder / MANIFEST).is_file():  # published files must not name folders of this machine
        record = _read_json(manifest)
        if Path(str(record["source"])).is_absolute():
            _write_json(record | {"source": Path(record["source"]).name}, manifest)
    config = _read_json(folder / CONFIG)
    _write_json(config | {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}, folder / CONFIG)
    _write_json(_read_json(folder / TOKENIZER_CONFIG) | {"auto_map": TOKENIZER_AUTO_MAP}, folder / TOKENIZER_CONFIG)


def _link_or_copy(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, destination)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
