"""Converting checkpoints of the original program loses nothing, guesses nothing, and leaves nothing half done."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import yaml
from helpers import GOLDEN, GOLDEN_VARIANTS, REPO_ROOT, Variant, without_labels
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoTokenizer
from typer.testing import CliRunner

from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining, TahoeX1Model, TahoeX1Tokenizer
from tahoex1_hf.cli.app import app
from tahoex1_hf.original.convert import convert_original_folder, open_original
from tahoex1_hf.original.files import is_original_folder

every_variant = pytest.mark.parametrize("variant", GOLDEN_VARIANTS, ids=lambda variant: variant.name)
PLAIN, WITH_DRUGS = GOLDEN / "a_70m_like" / "model", GOLDEN / "b_3b_like_chem" / "model"
EDITED = "model.transformer_encoder.norm.weight"


def equal_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a copy of a golden checkpoint that tests may spoil."""
    return Path(shutil.copytree(PLAIN, tmp_path / "source"))


def edit_yaml(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    settings = yaml.safe_load(path.read_text())
    edit(settings)
    path.write_text(yaml.safe_dump(settings))


def assert_refused(source: Path, error: type[Exception], match: str) -> None:
    """Assert that conversion fails with this message and leaves nothing behind."""
    destination = source.parent / "out" / "converted"
    with pytest.raises(error, match=match):
        convert_original_folder(source, destination)
    assert not destination.exists()
    assert list(destination.parent.glob("*")) == []


@every_variant
def test_auto_classes_load_what_is_written(variant: Variant, tmp_path: Path) -> None:
    config = convert_original_folder(variant.checkpoint, tmp_path / "converted")
    checkpoint = open_original(variant.checkpoint)
    assert is_original_folder(variant.checkpoint)
    assert not is_original_folder(tmp_path / "converted")
    loaded_config = AutoConfig.from_pretrained(tmp_path / "converted")
    for name in TahoeX1Config.__dataclass_fields__:
        if name not in ("architectures", "dtype", "transformers_version"):
            assert getattr(loaded_config, name) == getattr(config, name) == getattr(checkpoint.config, name), name

    model, report = AutoModelForPreTraining.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(report.values()), report
    assert type(model) is TahoeX1ForPreTraining
    assert equal_tensors(model.state_dict(), checkpoint.load_model().state_dict())

    base, report = AutoModel.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert type(base) is TahoeX1Model
    assert not any(report.values()), report  # the decoders are left out on purpose, so nothing is reported
    assert equal_tensors(base.state_dict(), model.tahoe.state_dict())
    batch = without_labels(variant.batch("batch_masked", targets=True))
    with torch.no_grad():
        assert torch.equal(base(**batch).pooler_output, model(**batch).pooler_output)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert type(tokenizer) is TahoeX1Tokenizer
    assert tokenizer.get_vocab() == json.loads((variant.checkpoint / "vocab.json").read_text())


def test_pickle_gives_the_same_folder_as_safetensors(source: Path, tmp_path: Path) -> None:
    convert_original_folder(source, tmp_path / "from_safetensors")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save({"state": {"model": tensors}}, source / "best-model.pt")
    convert_original_folder(source, tmp_path / "from_pickle")
    written = {path.name for path in (tmp_path / "from_pickle").iterdir()}
    assert written == {path.name for path in (tmp_path / "from_safetensors").iterdir()}
    for name in written - {"conversion.json"}:  # it names the files that were read
        from_pickle = (tmp_path / "from_pickle" / name).read_bytes()
        assert from_pickle == (tmp_path / "from_safetensors" / name).read_bytes(), name


class RunsACommand:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_pickle_runs_nothing(source: Path) -> None:
    marker = source.parent / "it_ran"
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save({"state": {"model": tensors, "extra": RunsACommand(marker)}}, source / "best-model.pt")
    assert_refused(source, ValueError, "tensors alone")
    assert not marker.exists()
    torch.load(source / "best-model.pt", weights_only=False)  # here the command does run
    assert marker.exists()


def test_pickle_of_something_else(source: Path) -> None:
    (source / "model.safetensors").unlink()
    torch.save({"model": {}}, source / "best-model.pt")
    assert_refused(source, ValueError, r"not a Composer checkpoint")


def test_every_tensor_that_does_not_fit_is_listed(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.surprise"] = torch.zeros(3)
    tensors.pop("model.flag_encoder.weight")
    tensors["model.mvc_decoder.W.weight"] = torch.zeros(64, 63)
    save_file(tensors, source / "model.safetensors")
    assert_refused(source, ValueError, r"(?s)missing: model\.flag_encoder\.weight \[2, 64\]")
    assert_refused(source, ValueError, r"(?s)unexpected: model\.surprise \[3\]")
    assert_refused(source, ValueError, r"(?s)wrong shape: model\.mvc_decoder\.W\.weight is \[64, 63\].*\[64, 64\]")


@pytest.mark.parametrize(
    ("file", "edit", "match"),
    [
        ("model_config.yml", lambda y: y.update(rope=True), r"model_config\.yml has keys.*rope"),
        ("model_config.yml", lambda y: y["attn_config"].update(alibi=True), r"attn_config has keys.*alibi"),
        ("model_config.yml", lambda y: y["expression_encoder"].update(x=1), r"expression_encoder has keys.*x"),
        ("model_config.yml", lambda y: y["norm_config"].update(norm_type="rmsnorm"), r"norm_type = 'rmsnorm'"),
        ("model_config.yml", lambda y: y.update(cell_emb_style="w-pool"), r"cell_emb_style = 'w-pool'"),
        ("model_config.yml", lambda y: y.pop("d_model"), r"model_config\.yml lacks the key 'd_model'"),
        ("model_config.yml", lambda y: y.pop("mvc"), r"model_config\.yml lacks the key 'mvc'"),
        ("model_config.yml", lambda y: y.update(vocab_size=600), r"vocab_size = 600, but vocab\.json has 603"),
        ("model_config.yml", lambda y: y.update(n_layers=2), r"unexpected: model\.transformer_encoder\.layers\.2"),
        ("model_config.yml", lambda y: y.update(n_layers=4), r"missing: model\.transformer_encoder\.layers\.3"),
        ("collator_config.yml", lambda y: y.update(colour=1), r"collator_config\.yml has keys.*colour"),
        ("collator_config.yml", lambda y: y.update(pad_token_id=3), r"pad_token_id = 3, but <pad> is 600"),
        ("collator_config.yml", lambda y: y.update(keep_first_n_tokens=2), r"keep_first_n_tokens = 2"),
        ("collator_config.yml", lambda y: y.update(use_chem_token=True), r"keep_first_n_tokens = 1"),
        ("collator_config.yml", lambda y: y.pop("max_length"), r"lacks the key 'max_length'"),
        ("collator_config.yml", lambda y: y.update(max_length=True), r"collator_config\.yml.*context_length=True"),
        ("collator_config.yml", lambda y: y.update(right_binning="x"), r"collator_config\.yml.*right_binning='x'"),
    ],
)
def test_settings_that_are_unknown_or_contradict(source: Path, file: str, edit: Callable, match: str) -> None:
    edit_yaml(source / file, edit)
    assert_refused(source, ValueError, match)


@pytest.mark.parametrize(
    ("use_attn_mask", "style"), [(None, "observed_or_self"), (True, "observed_or_self"), (False, "full")]
)
def test_attention_mask_of_the_original(source: Path, use_attn_mask: bool | None, style: str) -> None:
    # The published 70M and 1.3B settings lack this key, and the models were trained with the mask.
    def edit(settings: dict[str, Any]) -> None:
        del settings["attn_config"]["use_attn_mask"]
        settings["attn_config"]["attn_impl"] = "triton"
        if use_attn_mask is not None:
            settings["attn_config"]["use_attn_mask"] = use_attn_mask

    edit_yaml(source / "model_config.yml", edit)
    assert open_original(source).config.attention_mask_style == style


@pytest.mark.parametrize("file", ["model_config.yml", "collator_config.yml", "vocab.json", "model.safetensors"])
def test_missing_file(source: Path, file: str) -> None:
    (source / file).unlink()
    assert_refused(source, FileNotFoundError, file)


def test_vocabulary_with_a_hole(source: Path) -> None:
    vocab = json.loads((source / "vocab.json").read_text())
    last = max(vocab, key=vocab.get)
    vocab[last] += 1
    (source / "vocab.json").write_text(json.dumps(vocab))
    assert_refused(source, ValueError, "not the numbers 0 to 602")


def test_drug_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Path(shutil.copytree(WITH_DRUGS, tmp_path / "source"))
    drugs = json.loads((source / "drug_to_id_pad.json").read_text())
    convert_original_folder(source, tmp_path / "converted")
    assert AutoTokenizer.from_pretrained(tmp_path / "converted").drug_to_id == drugs

    (source / "drug_to_id_pad.json").write_text(json.dumps(drugs | {"one more": 20}))
    assert_refused(source, ValueError, "numbers drugs up to 20; the weights hold 20 rows")

    (source / "drug_to_id_pad.json").unlink()
    assert convert_original_folder(source, tmp_path / "nameless").num_drugs == 20
    assert "knows no drug by name" in caplog.text


def test_existing_destination(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "there"
    destination.mkdir()
    convert_original_folder(source, destination)  # an empty folder is as good as none
    before = {path.name: path.read_bytes() for path in destination.iterdir()}
    with pytest.raises(FileExistsError, match="exists already"):
        convert_original_folder(source, destination)
    assert {path.name: path.read_bytes() for path in destination.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        convert_original_folder(source, tmp_path / "file")


def test_a_failure_while_writing_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_after_writing(self: TahoeX1Tokenizer, folder: Path, **kwargs: Any) -> None:
        assert any(Path(folder).iterdir())
        raise OSError("disk full")

    monkeypatch.setattr(TahoeX1Tokenizer, "save_pretrained", fails_after_writing)
    assert_refused(source, OSError, "disk full")


def test_script(tmp_path: Path) -> None:
    script = REPO_ROOT / "conversion" / "convert_checkpoint.py"
    run = forked.run([sys.executable, script, PLAIN, tmp_path / "out"], cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "205,825 parameters" in run.stdout
    assert AutoModel.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3
    again = CliRunner().invoke(app, ["convert", str(PLAIN), str(tmp_path / "out")])  # as after a kill at the end
    assert again.exit_code == 0
    assert "205,825 parameters" in again.output
    for source, options in ((WITH_DRUGS, []), (PLAIN, ["--dtype", "bfloat16"])):
        other = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), *options])
        assert other.exit_code == 1
        assert "exists already" in other.output
    (tmp_path / "out" / "vocab.json").write_text("{}")
    damaged = CliRunner().invoke(app, ["convert", str(PLAIN), str(tmp_path / "out")])
    assert "exists already" in damaged.output


def test_fingerprints_of_another_shape(tmp_path: Path) -> None:
    source = Path(shutil.copytree(WITH_DRUGS, tmp_path / "source"))
    np.save(source / "drug_fps_pad.npy", np.zeros((19, 128)))
    with pytest.raises(ValueError, match=r"has shape \[19, 128\]; the drug table of the weights has \[20, 128\]"):
        convert_original_folder(source, tmp_path / "out")


def test_3b_without_drugs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights may lack the drug encoder, as the original loads them with use_chem_inf off."""
    source = Path(shutil.copytree(WITH_DRUGS, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "chem_encoder" not in k}, source / "model.safetensors")
    config = convert_original_folder(source, tmp_path / "out")
    assert config.num_drugs == 0
    assert "converted without drugs" in caplog.text
    assert AutoTokenizer.from_pretrained(tmp_path / "out").drug_to_id is None
