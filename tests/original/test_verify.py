"""Verifying a conversion finds faults, and the manifest says what was done."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GOLDEN, GOLDEN_VARIANTS

from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining
from tahoex1_hf.original.convert import OriginalCheckpoint, convert_original_folder, open_original
from tahoex1_hf.original.tensor_names import our_shapes
from tahoex1_hf.original.verify import count_parameters, verify_conversion

PLAIN, WITH_DRUGS = GOLDEN / "a_70m_like" / "model", GOLDEN / "b_3b_like_chem" / "model"
every_variant = pytest.mark.parametrize("variant", GOLDEN_VARIANTS, ids=lambda variant: variant.name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PLAIN, tmp_path / "source"))


def test_manifest(tmp_path: Path) -> None:
    convert_original_folder(WITH_DRUGS, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert manifest["source"] == WITH_DRUGS.name
    assert set(manifest["files_read"]) == {path.name for path in WITH_DRUGS.iterdir()}
    assert set(manifest["files_written"]) == {path.name for path in (tmp_path / "out").iterdir()} - {"conversion.json"}
    for folder, part in ((WITH_DRUGS, "files_read"), (tmp_path / "out", "files_written")):
        for name, entry in manifest[part].items():
            content = (folder / name).read_bytes()
            assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["versions"]["torch"] == str(torch.__version__)
    assert manifest["dtype"] == "float32"
    assert manifest["verification"]["num_tensors"] == 62


SPOIL: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "one bit": ("tahoe.layers.1.mlp.up_proj.weight", lambda t: t.view(torch.int32).bitwise_xor(1).view(torch.float32)),
    "transposed": ("tahoe.layers.0.self_attn.q_proj.weight", lambda t: t.T),
    "zeroed": ("cell_decoder.cell_proj.weight", lambda t: t * 0),
}


@pytest.mark.parametrize("kind", SPOIL)
def test_a_wrong_tensor_is_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, spoil = SPOIL[kind]
    real = OriginalCheckpoint.load_model

    def load_spoilt(self: OriginalCheckpoint, dtype: torch.dtype | None = None) -> TahoeX1ForPreTraining:
        model = real(self, dtype)
        parameter = model.get_parameter(name)
        parameter.data = spoil(parameter.data).contiguous()
        return model

    monkeypatch.setattr(OriginalCheckpoint, "load_model", load_spoilt)
    with pytest.raises(ValueError, match="was not written as it was read"):
        convert_original_folder(PLAIN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("a_70m_like", {"hidden_act": "gelu"}),
        ("a_70m_like", {"cell_decoder_scaled": False}),
        ("a_70m_like", {"layer_norm_eps": 1e-3}),
        ("b_3b_like_chem", {"drug_encoder_act": "relu"}),
        ("c_glu_post_gqa_avgpool", {"cell_pooling": "cls"}),
        ("c_glu_post_gqa_avgpool", {"expression_max_value": 10}),
        ("d_attn_mask", {"attention_mask_style": "full"}),
    ],
    ids=str,
)
def test_a_wrongly_translated_setting_is_found(variant: str, change: dict[str, Any], tmp_path: Path) -> None:
    """The reference computation reads the original's own settings, so it notices what the translation got wrong."""
    checkpoint = GOLDEN / variant / "model"
    convert_original_folder(checkpoint, tmp_path / "out")
    opened = open_original(checkpoint)
    config = TahoeX1Config(**{**opened.config.to_diff_dict(), **change})
    with pytest.raises(ValueError, match="does not compute what the original does"):
        verify_conversion(opened.model_settings, opened.collator_settings, opened.weights, config, tmp_path / "out")


class Shapes:
    """The shapes of a released size's weights, without their numbers."""

    def __init__(self, config: TahoeX1Config) -> None:
        self.shapes = our_shapes(config)


def test_parameter_count_of_released_sizes() -> None:
    config = TahoeX1Config()
    weights: Any = Shapes(config)
    assert count_parameters(weights, config) == (70_996_993, "70M")
    weights.shapes.popitem()
    with pytest.raises(ValueError, match="the released 70M has 70,996,993"):
        count_parameters(weights, config)
    drugs = {"num_drugs": 378, "drug_token_id": 3}
    for shape, expected in (
        ({"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16}, (1_353_854_977, "1.3B")),
        ({"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 20, **drugs}, (2_717_041_665, "3B")),
    ):
        config = TahoeX1Config(**shape)
        assert count_parameters(Shapes(config), config) == expected  # type: ignore[arg-type]
