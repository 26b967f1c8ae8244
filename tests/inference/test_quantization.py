"""Int8 weights are close to float32, take a quarter of the layers' memory, and leave the model itself as it is."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import NUM_GENES, make_cells, write_vocab
from flash_stand_in import FlashStandIn, flash_on_cpu  # noqa: F401 - a fixture
from helpers import tiny_config, tiny_model
from transformers import TorchAoConfig

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer, embed_anndata
from tahoex1_hf.inference import encoder, quantization
from tahoex1_hf.inference.encoder import CellEncoder

Int8WeightOnlyConfig = pytest.importorskip(
    "torchao.quantization", reason="torchao is not installed (extra int8)"
).Int8WeightOnlyConfig
KEY = "X_tahoe_x1"


@pytest.fixture
def parts(tmp_path: Path) -> tuple[TahoeX1Model, TahoeX1Tokenizer]:
    config = tiny_config(vocab_size=NUM_GENES + 3, hidden_size=64, num_hidden_layers=3)
    return tiny_model(config, TahoeX1Model), TahoeX1Tokenizer(str(write_vocab(tmp_path)))


def test_embeddings_are_close_and_the_model_is_left_alone(parts) -> None:
    model, tokenizer = parts
    before = copy.deepcopy(model.state_dict())
    results = []
    for dtype in ("float32", "int8", "float32"):
        cells = make_cells(60)
        embed_anndata(cells, model, tokenizer, dtype=dtype, device="cpu", gene_embeddings=True, progress=False)
        results.append(cells.obsm[KEY])
    np.testing.assert_array_equal(results[0], results[2])
    cosines = (results[0] * results[1]).sum(1)
    assert 0.999 < cosines.min() < 1 - 1e-7  # close, but not the same
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_they_attend_by_flash_in_half_precision(
    parts,
    flash_on_cpu: FlashStandIn,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where the rest is bfloat16: 8-bit layers give float32, which the kernel does not take."""
    model, tokenizer = parts
    kinds, real = [], flash_on_cpu.forward

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
        kinds.append({query.dtype, key.dtype, value.dtype})
        return real(query, key, value, *rest)

    monkeypatch.setattr(flash_on_cpu, "forward", forward)
    monkeypatch.setattr(encoder, "choose_dtype", lambda *_: torch.bfloat16)
    cells = tokenizer.encode_counts(make_cells(20).X, tokenizer.match_genes(make_cells(20).var_names))
    ours = CellEncoder(model, tokenizer, device="cpu", dtype="int8").embed(cells)
    assert kinds == [{torch.bfloat16}] * 3  # layers, the last of which has <cls> alone as a query
    monkeypatch.undo()
    exact = CellEncoder(model, tokenizer, device="cpu", dtype="float32").embed(cells)
    assert (exact * ours).sum(1).min() > 0.998


def test_layers_take_a_quarter_and_the_rest_is_shared(parts) -> None:
    model, tokenizer = parts
    encoder = CellEncoder(model, tokenizer, device="cpu", dtype="int8")
    ours, theirs = encoder.model, model
    assert ours.embeddings.gene_encoder.embedding.weight is theirs.embeddings.gene_encoder.embedding.weight
    projection = ours.layers[0].mlp.up_proj
    assert projection.bias is theirs.layers[0].mlp.up_proj.bias
    quantised, scale = projection.weight.qdata, projection.weight.scale
    assert quantised.dtype == torch.int8
    assert quantised.shape == theirs.layers[0].mlp.up_proj.weight.shape
    assert scale.numel() == quantised.shape[0]  # one per output
    assert encoder.dtype_name in ("int8 weights, float32", "int8 weights, bfloat16")  # whichever is faster here


def embedded(model: TahoeX1Model, tokenizer: TahoeX1Tokenizer, dtype: str) -> np.ndarray:
    cells = make_cells(40)
    embed_anndata(cells, model, tokenizer, dtype=dtype, device="cpu", progress=False)
    return cells.obsm[KEY]


def test_models_that_were_quantised_while_loading(parts, tmp_path: Path) -> None:
    model, tokenizer = parts
    model.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantised = {
            "torchao": TahoeX1Model.from_pretrained(
                tmp_path / "model", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
            ),
            "torch": torch.ao.quantization.quantize_dynamic(TahoeX1Model.from_pretrained(tmp_path / "model")),
        }
    expected = embedded(model, tokenizer, "float32")
    for library, loaded in quantised.items():
        assert quantization.quantised_by(loaded) == library
        for dtype in ("auto", "bfloat16", "float32"):
            assert (embedded(loaded, tokenizer, dtype) * expected).sum(1).min() > 0.98
        with pytest.raises(ValueError, match=f"{library} has quantised this model's layers already"):
            CellEncoder(loaded, tokenizer, device="cpu", dtype="int8")
    assert quantization.quantised_by(model) is None


def test_without_torchao(parts, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def missing(name: str, *arguments, **options):
        if name.startswith("torchao"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"needs torchao: pip install 'tahoex1_hf\[int8\]'"):
        quantization.with_int8_weights(parts[0])
