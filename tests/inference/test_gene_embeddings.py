"""Gene embeddings of three kinds against the original's own arithmetic on the original's own weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import largest_difference
from safetensors import safe_open
from torch.nn.functional import embedding, layer_norm

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer
from tahoex1_hf.inference import gene_embeddings
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.inference.gene_embeddings import embed_genes, gene_kinds
from tahoex1_hf.original.convert import convert_original_folder
from tahoex1_hf.original.reference import OriginalForward

CLOSE = 1e-5  # absolute, on float32 outputs of order one
VARIANTS = ["a_70m_like", "b_3b_like_chem"]


@pytest.fixture(scope="module")
def load(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CellEncoder]:
    """Make the encoder of a golden checkpoint."""

    def load(variant: str, attention: str = "sdpa") -> CellEncoder:
        folder = tmp_path_factory.mktemp("converted") / variant
        convert_original_folder(golden / variant / "model", folder)
        model = TahoeX1Model.from_pretrained(folder, attn_implementation=attention)
        return CellEncoder(model, TahoeX1Tokenizer.from_pretrained(folder), device="cpu", dtype="float32")

    return load


def original(golden: Path, variant: str) -> OriginalForward:
    """The original's forward pass, which takes every token for a gene, the padding token too."""
    folder = golden / variant / "model"
    weights = safe_open(folder / "model.safetensors", "pt")
    settings = yaml.safe_load((folder / "model_config.yml").read_text())
    return OriginalForward(settings, -1, weights.get_tensor, set(weights.keys()))


@pytest.mark.parametrize("row", [30_000, 250])
@pytest.mark.parametrize("variant", VARIANTS)
def test_te_is_the_originals(golden: Path, load, monkeypatch: pytest.MonkeyPatch, variant: str, row: int) -> None:
    monkeypatch.setattr(gene_embeddings, "_ROW_TOKENS", row)
    encoder, reference = load(variant), original(golden, variant)
    vocabulary = np.array(list(encoder.tokenizer.get_vocab().values()))
    places = np.array([5, 249, 250, 600])
    found = embed_genes(encoder, np.append(vocabulary[places], -1), ["TE"], None)
    assert np.isnan(found.kinds["TE"][-1]).all()
    assert found.not_expressed is None
    for place, ours in zip(places, found.kinds["TE"], strict=False):
        together = vocabulary[place // row * row :][:row]
        # The cell's embedding is that of the first token, and where a token stands changes nothing.
        tokens = torch.from_numpy(np.concatenate([[vocabulary[place]], together[together != vocabulary[place]]]))
        hidden = torch.ones(1, len(tokens), dtype=torch.bool)
        theirs = reference(tokens[None], torch.zeros(1, len(tokens)), hidden, None)["cell"][0]
        assert largest_difference(torch.from_numpy(ours), theirs) < CLOSE


def test_te_shows_its_progress_by_layer(load, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """For the released vocabulary it takes minutes on a CPU; rows without a gene that is wanted are left out."""
    monkeypatch.setattr(gene_embeddings, "_ROW_TOKENS", 250)
    encoder = load("a_70m_like")
    vocabulary = np.array(list(encoder.tokenizer.get_vocab().values()))
    embed_genes(encoder, vocabulary[[5, 249, 600]], ["GE", "TE"], None, progress=True)
    layers = 2 * encoder.config.num_hidden_layers
    said = capsys.readouterr().err
    assert "Genes without cells: 100%" in said
    assert f"{layers}/{layers}" in said
    embed_genes(encoder, vocabulary[[5]], ["TE"], None)
    assert not capsys.readouterr().err


def test_te_does_not_depend_on_the_attention_backend(load) -> None:
    genes = np.arange(3, 20)
    eager, sdpa = (embed_genes(load("a_70m_like", name), genes, ["TE"], None) for name in ("eager", "sdpa"))
    np.testing.assert_array_equal(eager.kinds["TE"], sdpa.kinds["TE"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_ge_is_the_input_table_behind_its_norm(golden: Path, load, variant: str) -> None:
    weights = safe_open(golden / variant / "model" / "model.safetensors", "pt")
    table, scale, shift = (
        weights.get_tensor(f"model.gene_encoder.{name}")
        for name in ("embedding.weight", "enc_norm.weight", "enc_norm.bias")
    )
    genes = np.array([7, 3, -1, 7])
    found = embed_genes(load(variant), genes, ["GE"], None).kinds["GE"]
    expected = layer_norm(embedding(torch.tensor([7, 3, 7]), table), scale.shape, scale, shift)
    assert largest_difference(torch.from_numpy(found[[0, 1, 3]]), expected) < CLOSE
    assert np.isnan(found[2]).all()


def test_ea_is_the_mean_and_te_where_no_cell_expresses_the_gene(load) -> None:
    encoder, genes = load("a_70m_like"), np.array([9, 4, -1, 9, 11])
    hidden = torch.randn(1, 3, encoder.width)
    means = gene_embeddings.GeneMeans(genes, encoder.config.vocab_size, encoder.width, encoder.device)
    means.add(torch.tensor([[9, 11, 9]]), hidden)
    for kinds in (["EA"], ["TE", "EA"]):
        found = embed_genes(encoder, genes, kinds, means)
        np.testing.assert_allclose(found.kinds["EA"][0], (hidden[0, 0] + hidden[0, 2]) / 2, rtol=1e-6)
        without = embed_genes(encoder, genes, ["TE"], None).kinds["TE"]
        np.testing.assert_array_equal(found.kinds["EA"][1], without[1])
        assert np.isnan(found.kinds["EA"][2]).all()
        assert found.not_expressed.tolist() == [False, True, False, False, False]
    facts = found.provenance([f"g{i}" for i in range(5)])
    assert facts["gene_embeddings"] == "TE,EA"
    assert facts["genes_not_expressed"].tolist() == ["g1"]


def test_kinds_are_named_in_many_ways() -> None:
    assert [gene_kinds(wanted) for wanted in (True, False)] == [("EA",), ()]
    assert gene_kinds("ge, EA") == gene_kinds(["EA", "GE", "GE"]) == ("GE", "EA")
    for wrong in ("", "GE,XY", []):
        with pytest.raises(ValueError, match=r"some of GE, TE, EA"):
            gene_kinds(wrong)
