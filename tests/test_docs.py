"""What README.md and docs/ show is true: snippets run, commands and recipes' keys exist, links lead somewhere."""

import re
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import pytest
from helpers import GOLDEN, REPO_ROOT
from hub_server import fill_cache
from snippets import blocks, commands, every_command, run, write_cells, write_model

from tahoex1_hf import embed_anndata
from tahoex1_hf.common.recipes import read_recipe
from tahoex1_hf.data import prepare
from tahoex1_hf.data.config import parse_config
from tahoex1_hf.finetuning import finetune, parse_finetune_config, read_finetune_config
from tahoex1_hf.training.config import read_pretrain_config

DOCS = REPO_ROOT / "docs"
PAGES = [REPO_ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# These have tests of their own, or show a program that only the Hub's data can run.
TESTED_ELSEWHERE = {"from-transformers.md"}
WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and page.name not in TESTED_ELSEWHERE]
COMMANDS = [(page, words) for page in PAGES for words in commands(page)]
ALL = every_command()


def name_of(page: Path) -> str:
    return page.relative_to(REPO_ROOT).as_posix()


def name_in(words: list[str]) -> tuple[str, list[str]]:
    """Return the command's words, and the words after them."""
    number = 2 if " ".join(words[:2]) in ALL else 1
    name = " ".join(words[:number])
    return (name if name in ALL or name.startswith("-") else f"{name} build"), words[number:]  # may be left out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that pages name: a model, cells, a prepared dataset, a fine-tuned model."""
    place = tmp_path_factory.mktemp("world")
    (place / "path" / "to" / "model").mkdir(parents=True)
    model = write_model(place / "path" / "to" / "model")
    adata = ad.read_h5ad(write_cells(place / "cells.h5ad", model, 96))
    adata.write_h5ad(place / "reference.h5ad")
    embed_anndata(adata, model, progress=False)
    adata.write_h5ad(place / "embedded.h5ad")
    dataset = {
        "output": str(place / "prepared"),
        "vocab": str(model / "vocab.json"),
        "sources": [{"kind": "anndata", "paths": [str(place / "cells.h5ad")], "min_known_genes": 0}],
    }
    prepare(parse_config(dataset, "the page's dataset"))
    settings = {"task": "classification", "label": "cell_type", "method": "linear_probe", "report": False}
    paths = {"model": str(model), "data": str(place / "cells.h5ad"), "output_dir": str(place / "runs" / "types")}
    assert finetune(parse_finetune_config({**settings, **paths}, "the page's run")) == 0
    shutil.copytree(GOLDEN / "a_70m_like" / "model", place / "today" / "70m-model")
    return place


@pytest.fixture
def names(world: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Go into a copy of these files, and return what readers of a page have defined."""
    import scanpy as sc
    from transformers import AutoModelForPreTraining

    fill_cache(hub_cache, "tahoebio/Tahoe-x1", {"main": world / "today"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    shutil.copytree(world, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")

    def neighbours(adata: ad.AnnData, use_rep: str) -> None:
        assert len(adata.obsm[use_rep]) == adata.n_obs  # scanpy's own work costs seconds, and is not ours

    monkeypatch.setattr(sc.pp, "neighbors", neighbours)
    monkeypatch.setattr(sc.tl, "umap", lambda adata: None)
    monkeypatch.setattr(sc.pl, "umap", lambda adata, color, show: adata.obs[color])
    model = AutoModelForPreTraining.from_pretrained("path/to/model")
    return {"__name__": "page", "adata": ad.read_h5ad("cells.h5ad"), "model": model}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_runs(page: Path, names: dict[str, Any]) -> None:
    for number, code in enumerate(blocks(page, "python")):
        run(code, f"{name_of(page)}, snippet {number + 1}", names)


def test_there_are_snippets_and_commands() -> None:
    assert len(WITH_PYTHON) > 8
    shown = {name_in(words)[0] for _, words in COMMANDS}
    assert shown >= set(ALL) - {"recipes", "build-vocab", "drug-fingerprints"}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_commands_exist_with_their_options(page: Path, words: list[str]) -> None:
    """A command of a page has the options that are shown, values of options are ones that it takes, keys exist."""
    name, rest = name_in([word for word in words if not word.startswith("[")])
    if name.startswith("-"):
        assert name in {"--version", "--help"}
        return
    command = ALL[name]
    options = {option: parameter for parameter in command.params for option in parameter.opts}
    options["--help"] = options["--debug"]
    place, arguments = 0, []
    while place < len(rest):
        word = rest[place]
        place += 1
        if not word.startswith("-"):
            arguments.append(word)
            continue
        assert word in options, f"{name_of(page)}: tahoex1 {name} has no {word}"
        if not getattr(options[word], "is_flag", False) and word != "--help":
            assert place < len(rest), f"{name_of(page)}: {word} has no value"
            place += 1
    if name in ("finetune", "pretrain"):
        check_keys(name, arguments)


def check_keys(name: str, arguments: list[str]) -> None:
    """Read a recipe with the keys of a page, as the command does before its work."""
    recipe, *overrides = arguments
    if not re.fullmatch(r"[\w.-]+", recipe) or recipe.isupper():
        return  # a placeholder
    assert read_recipe(recipe, name)  # type: ignore[arg-type]
    given = [override for override in overrides if "=" in override]
    (read_finetune_config if name == "finetune" else read_pretrain_config)(recipe, given)


LINK = re.compile(r"\]\((?P<path>[^)#:\s]*)(?:#(?P<anchor>[^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and the site give to a page's titles."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    texts = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w -]", "", text).strip().replace(" ", "-") for text in texts}


@pytest.mark.parametrize("page", [*PAGES, REPO_ROOT / "CONTRIBUTING.md", REPO_ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    made = {DOCS / "reference" / "commands.md", DOCS / "reference" / "recipes.md"}  # by `make docs`
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for match in LINK.finditer(text):
        target = (page.parent / match["path"]).resolve() if match["path"] else page
        assert target.exists() or target in made, f"{match[0]}: there is no {target}"
        if match["anchor"] and target.suffix == ".md" and target not in made:
            assert match["anchor"] in anchors(target), f"{match[0]}: {target} has no such title"


def test_every_page_is_in_the_navigation() -> None:
    navigation = set(re.findall(r": ([\w/-]+\.md)$", (REPO_ROOT / "mkdocs.yml").read_text(), flags=re.M))
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES[1:]}
    assert navigation == pages | {"reference/commands.md", "reference/recipes.md"}


def test_the_readme_is_short() -> None:
    assert len((REPO_ROOT / "README.md").read_text().splitlines()) <= 150
