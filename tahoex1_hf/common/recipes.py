# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Find and read recipes: YAML files with the settings of a command, the user's own or the package's."""

from pathlib import Path
from typing import Any, Literal

Command = Literal["pretrain", "finetune", "prepare"]

_PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS: dict[Command, Path] = {
    "pretrain": _PACKAGE / "training" / "recipes",
    "finetune": _PACKAGE / "finetuning" / "recipes",
    "prepare": _PACKAGE / "data" / "recipes",
}
_EXAMPLES = "examples/"


def packaged_recipes(command: Command) -> dict[str, Path]:
    """Return the recipes that come with the package for a command: name to file."""
    return {path.stem: path for path in sorted(FOLDERS[command].glob("*.yaml"))}


def find_recipe(recipe: str | Path, command: Command) -> Path:
    """Return the file of a recipe.

    Args:
        recipe: Path of a YAML file, or the name of a recipe that comes with the package.
        command: Command that the recipe is for.

    Raises:
        FileNotFoundError: If there is neither such a file nor such a name; the message lists the names.
    """
    path, known = Path(recipe), packaged_recipes(command)
    if path.is_file():
        return path
    if str(recipe) in known:
        return known[str(recipe)]
    raise FileNotFoundError(
        f"recipe {str(recipe)!r} is neither a file nor one of the recipes for {command}: {', '.join(known)}. "
        f"`tahoex1 recipes NAME > FILE` writes one to change."
    )


def read_recipe(recipe: str | Path, command: Command) -> dict[str, Any]:
    """Read the keys and values of a recipe.

    A recipe of the package may name files under `examples/`, with which it can be tried in a clone of the repository.
    Where these files do not exist, their keys are left out.

    Args:
        recipe: Path of a YAML file, or the name of a recipe that comes with the package.
        command: Command that the recipe is for.

    Raises:
        FileNotFoundError: If there is no such recipe.
        ValueError: If the file is not YAML, or holds something other than keys and values.
    """
    import yaml  # imported here, so that shell completion, which needs only names, does not wait for it

    path = find_recipe(recipe, command)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must hold keys and values, as the recipes that `tahoex1 recipes` prints do.")
    check_text(values, str(path))
    if path.resolve().parent == FOLDERS[command]:
        return {key: value for key, value in values.items() if not _is_missing_example(value)}
    return values


def check_text(value: Any, origin: str) -> None:
    """Check that all text can be written as UTF-8; escapes in YAML and bytes on a command line may not be.

    Args:
        value: A value of a recipe, or the keys and values of a whole one.
        origin: Where it comes from, for the message.

    Raises:
        ValueError: If there is other text; the message shows it.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{origin} holds {value!r}, which is no valid Unicode text: correct it.") from None
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            check_text(item, origin)
    elif isinstance(value, list):
        for item in value:
            check_text(item, origin)


def _is_missing_example(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_EXAMPLES) and not Path(value).exists()
