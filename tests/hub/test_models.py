"""Functions that need a model take a folder, a Hub name or a loaded model."""

import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from cells import GENES, NUM_GENES, make_cells, write_vocab
from helpers import tiny_config, tiny_model
from hub_server import fill_cache

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Model, TahoeX1Tokenizer, embed_anndata, embed_files, perturb_genes
from tahoex1_hf.hub import loading
from tahoex1_hf.hub.models import model_and_tokenizer

KEY = "X_tahoe_x1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a converted model and its tokenizer, whose context is shorter than many cells."""
    place = tmp_path_factory.mktemp("model")
    vocab = write_vocab(tmp_path_factory.mktemp("vocab"), drug_token=False)
    tiny_model(tiny_config(vocab_size=NUM_GENES + 3), TahoeX1ForPreTraining).save_pretrained(place)
    TahoeX1Tokenizer(str(vocab), context_length=16).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, TahoeX1Tokenizer]:
    return TahoeX1Model.from_pretrained(folder), TahoeX1Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    return make_cells(30)


@pytest.fixture(scope="module")
def expected(cells: anndata.AnnData, loaded: tuple[Any, TahoeX1Tokenizer]) -> np.ndarray:
    copy = cells.copy()
    embed_anndata(copy, *loaded, progress=False)
    return copy.obsm[KEY]


@pytest.fixture(params=["folder", "text", "hub"])
def name(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the model as its folder, as the folder's path in text, and as its name on a Hub that has it."""
    if request.param == "hub":
        monkeypatch.setattr(loading, "download_snapshot", lambda *arguments: folder)
        return "someone/model"
    return folder if request.param == "folder" else str(folder)


def test_cells_in_memory(name: Any, cells: anndata.AnnData, expected: np.ndarray) -> None:
    copy = cells.copy()
    embed_anndata(copy, name, progress=False)
    np.testing.assert_array_equal(copy.obsm[KEY], expected)


def test_files(name: Any, cells: anndata.AnnData, expected: np.ndarray, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    embed_files(tmp_path / "cells.h5ad", tmp_path / "out.npy", name, progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


@pytest.mark.parametrize("expression", [False, True])
def test_perturbing(name: Any, folder: Path, cells: anndata.AnnData, expression: bool) -> None:
    options: dict[str, Any] = {"genes": GENES[:2], "null_genes": 0, "expression": expression, "progress": False}
    model = TahoeX1ForPreTraining.from_pretrained(folder)
    reference = perturb_genes(cells, model, TahoeX1Tokenizer.from_pretrained(folder), **options).table
    ours = perturb_genes(cells, name, **options).table
    assert ours.equals(reference)


def test_a_tokenizer_that_is_passed_is_used(folder: Path, cells: anndata.AnnData, expected: np.ndarray) -> None:
    longer = TahoeX1Tokenizer.from_pretrained(folder, context_length=64)
    assert model_and_tokenizer(folder, longer)[1] is longer
    copy = cells.copy()
    embed_anndata(copy, folder, longer, progress=False)
    assert not np.array_equal(copy.obsm[KEY], expected)


def test_a_loaded_model_needs_its_tokenizer(loaded: tuple[Any, TahoeX1Tokenizer], cells: anndata.AnnData) -> None:
    with pytest.raises(ValueError, match="tokenizer is missing: pass the tokenizer of the loaded model"):
        embed_anndata(cells.copy(), loaded[0])


def test_an_adapter_in_a_folder_and_on_the_hub(
    folder: Path, cells: anndata.AnnData, tmp_path: Path, expected: np.ndarray, hub_cache: Path
) -> None:
    peft = pytest.importorskip("peft")
    base = TahoeX1ForPreTraining.from_pretrained(folder)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = TahoeX1Tokenizer.from_pretrained(folder)
    copies = [cells.copy(), cells.copy()]
    embed_anndata(copies[0], adapted, tokenizer, progress=False)
    embed_anndata(copies[1], tmp_path / "adapter", progress=False)
    np.testing.assert_array_equal(copies[1].obsm[KEY], copies[0].obsm[KEY])
    assert not np.allclose(copies[1].obsm[KEY], expected, atol=1e-4)
    assert copies[1].uns["tahoe_x1"]["model"] == "adapter"
    # The same on the Hub, by name and revision; its base is one of several sizes there.
    several = tmp_path / "several"
    shutil.copytree(folder, several / "70m")
    settings.base_model_name_or_path = "someone/bases"
    adapted.save_pretrained(tmp_path / "published")
    fill_cache(hub_cache, "someone/bases", {"main": several})
    fill_cache(hub_cache, "someone/adapter", {"v1": tmp_path / "published"})
    found = embed_anndata(cells, "someone/adapter", size="70m", revision="v1", return_array=True, progress=False)
    np.testing.assert_array_equal(found, copies[0].obsm[KEY])
    with pytest.raises(FileNotFoundError, match="someone/bases has no model at its root; it has the sizes 70m"):
        embed_anndata(cells, "someone/adapter", revision="v1", return_array=True, progress=False)


def test_a_size_by_name(folder: Path, cells: anndata.AnnData, expected: np.ndarray, tmp_path: Path) -> None:
    several = tmp_path / "several"
    shutil.copytree(folder, several / "70m")
    found = embed_anndata(cells, several, size="70m", return_array=True, progress=False)
    np.testing.assert_array_equal(found, expected)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    embed_files(tmp_path / "cells.h5ad", tmp_path / "out.npy", several, size="70m", progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)
    with pytest.raises(FileNotFoundError, match=r"has no size '3b'; it has the sizes 70m"):
        perturb_genes(cells, several, size="3b", progress=False)
    model, tokenizer = model_and_tokenizer(several, size="70m")
    for given in ({"size": "70m"}, {"revision": "main"}):
        with pytest.raises(ValueError, match="chooses among models by name, and model is loaded already"):
            embed_anndata(cells, model, tokenizer, **given)
