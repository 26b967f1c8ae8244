"""Test the folder of a pretraining run, and the microbatch size that is found once and then kept."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixed_steps import tiny
from safetensors.torch import load_file

from tahoex1_hf.training import run_folder
from tahoex1_hf.training.config import read_pretrain_config
from tahoex1_hf.training.microbatches import PassMemory
from tahoex1_hf.training.pretraining import pretrain
from tahoex1_hf.training.run_folder import RunFolder, computed_in
from tahoex1_hf.training.trainer import PretrainingTrainer


def automatic(folder: Path, processes: int = 1, **changes: Any) -> RunFolder:
    return RunFolder(tiny(Path("data"), folder, **{"microbatch_size": "auto", **changes}), processes)


def test_a_size_that_was_found_is_kept(tmp_path: Path) -> None:
    first = automatic(tmp_path)
    assert first.microbatch_size is None
    first.write("running")
    first.note_microbatch(3)
    first.write("finished", step=8)
    status = json.loads((tmp_path / "run_status.json").read_text())
    assert status == {"status": "finished", "step": 8, "microbatch": {"size": 3, "processes": 1}}
    assert automatic(tmp_path).microbatch_size == 3
    assert automatic(tmp_path, max_steps=100).microbatch_size == 3
    assert automatic(tmp_path, microbatch_size=4).microbatch_size == 4


def test_the_settings_with_the_size_repeat_the_run_elsewhere(tmp_path: Path) -> None:
    automatic(tmp_path).note_microbatch(3)
    settings = read_pretrain_config(tmp_path / "config.resolved.yaml", [f"output_dir={tmp_path / 'other'}"])
    assert settings.microbatch_size == 3
    assert RunFolder(settings, 1).microbatch_size == 3


@pytest.mark.parametrize("changes", [{"processes": 2}, {"context_length": 64}, {"model__hidden_size": 64}])
def test_a_size_found_under_other_conditions_is_not_used(changes: dict[str, Any], tmp_path: Path) -> None:
    automatic(tmp_path).note_microbatch(3)
    assert automatic(tmp_path, **changes).microbatch_size is None


def test_a_given_size_is_not_mistaken_for_a_found_one(tmp_path: Path) -> None:
    automatic(tmp_path, microbatch_size=4).write("running")
    assert json.loads((tmp_path / "run_status.json").read_text()) == {"status": "running"}
    assert automatic(tmp_path).microbatch_size is None


def test_missing_files_and_those_of_earlier_versions_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "run_status.json").write_text('{"status": "running"}')
    (tmp_path / "config.resolved.yaml").write_text(yaml.safe_dump({"microbatch_size": "auto"}))
    assert automatic(tmp_path).microbatch_size is None
    assert automatic(tmp_path / "none").microbatch_size is None


def test_a_run_uses_the_same_size_whatever_memory_there_is_later(
    training_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that has found a size keeps it when it is repeated with more memory and resumed with less."""
    config = tiny(training_dataset, tmp_path / "auto", microbatch_size="auto", eval_cells=0)

    def memory_for(cells: int) -> None:
        monkeypatch.setattr(PassMemory, "__call__", lambda self, run: run() or next(needs))
        monkeypatch.setattr(PassMemory, "available", lambda self, *_: cells * 1000 / 0.85)
        needs = iter([1000.0, 2000.0, 1000.0 * cells])

    def end_at(step: int) -> None:
        clip = PretrainingTrainer._clip_grad_norm

        def end(self: PretrainingTrainer, model: Any) -> Any:
            if self.state.global_step + 1 == step:
                raise KeyboardInterrupt
            return clip(self, model)

        with monkeypatch.context() as patch:
            patch.setattr(PretrainingTrainer, "_clip_grad_norm", end)
            with pytest.raises(KeyboardInterrupt):
                pretrain(config)

    with caplog.at_level(logging.INFO):
        memory_for(3)
        end_at(2)
        assert "Pass microbatch_size=3 to repeat this run" in caplog.text
        memory_for(8)
        end_at(5)
        memory_for(2)
        assert pretrain(config) == 0
    assert pretrain(tiny(training_dataset, tmp_path / "given", microbatch_size=3, eval_cells=0)) == 0
    assert pretrain(tiny(training_dataset, tmp_path / "larger", microbatch_size=8, eval_cells=0)) == 0
    auto, given, larger = (load_file(tmp_path / n / "model.safetensors") for n in ("auto", "given", "larger"))
    assert all(torch.equal(auto[name], given[name]) for name in given)
    assert not all(torch.equal(auto[name], larger[name]) for name in larger)


def test_keys_of_earlier_versions_are_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every config.resolved.yaml of those versions holds them."""
    tiny(Path("data"), tmp_path).write(tmp_path / "config.yaml")
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("peak_tflops: null\nspike_factor: 3.0\n")
    assert read_pretrain_config(tmp_path / "config.yaml") == tiny(Path("data"), tmp_path)
    assert not caplog.records
    read_pretrain_config(tmp_path / "config.yaml", ["spike_factor=5"])
    assert "spike_factor=5 has no effect" in caplog.text


def attention(folder: Path) -> str:
    return yaml.safe_load((folder / "config.resolved.yaml").read_text())["attention"]


def test_automatic_attention_is_recorded_and_kept(tmp_path: Path) -> None:
    made = automatic(tmp_path, attention="auto")
    assert made.config.attention == "sdpa"
    made.write("running")
    assert attention(tmp_path) == "sdpa"
    # A run that an earlier version began with another one, or whose machine had another, goes on with it.
    automatic(tmp_path, attention="flex_attention").write("running")
    assert automatic(tmp_path, attention="auto").config.attention == "flex_attention"
    assert automatic(tmp_path, attention="sdpa").config.attention == "sdpa"
    (tmp_path / "config.resolved.yaml").write_text("[]")
    assert automatic(tmp_path, attention="auto").config.attention == "sdpa"


def test_compiled_rows_attend_without_a_mask_of_all_pairs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = {"compile": "true", "attention": "auto"}
    assert automatic(tmp_path, **compiled).config.attention == "flex_attention"
    assert automatic(tmp_path, **compiled, packed="false").config.attention == "sdpa"
    assert not caplog.records
    assert automatic(tmp_path, compile="true", attention="sdpa").config.attention == "sdpa"
    assert "attention=auto" in caplog.text
    # On a GPU in half precision there is a kernel for it.
    monkeypatch.setattr(run_folder, "flash_serves", lambda device, dtype, width: dtype == torch.bfloat16)
    for precision, expected in (("bf16", "sdpa"), ("no", "flex_attention")):
        assert automatic(tmp_path, **compiled, precision=precision).config.attention == expected
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert automatic(tmp_path, **compiled, precision="launcher").config.attention == "sdpa"


def test_layers_are_compiled_where_flash_attention_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"compile": "auto", "attention": "auto"}
    assert automatic(tmp_path, **both).config.compile is False  # on a CPU
    monkeypatch.setattr(run_folder, "flash_serves", lambda device, dtype, width: True)
    for changes, expected in (
        ({"precision": "bf16"}, "layers"),
        ({"precision": "no"}, False),
        ({"precision": "bf16", "packed": "false"}, False),
        ({"precision": "bf16", "attention": "eager"}, False),
    ):
        assert automatic(tmp_path, **both | changes).config.compile == expected
    made = automatic(tmp_path, precision="bf16", **both)
    assert made.config.attention == "sdpa"
    made.write("running")
    assert yaml.safe_load((tmp_path / "config.resolved.yaml").read_text())["compile"] == "layers"
    monkeypatch.setattr(run_folder, "flash_serves", lambda device, dtype, width: False)
    assert automatic(tmp_path, precision="bf16", **both).config.compile == "layers"  # as before
    monkeypatch.setattr(run_folder, "flash_serves", lambda device, dtype, width: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert automatic(tmp_path / "sharded", precision="bf16", **both).config.compile is False


def test_a_whole_model_is_compiled_on_a_gpu_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"precision": "bf16", "attention": "auto"}
    assert automatic(tmp_path, compile="true", **settings).config.compile is True
    assert not caplog.records
    monkeypatch.setattr(run_folder, "flash_serves", lambda device, dtype, width: True)
    assert automatic(tmp_path, compile="layers", **settings).config.compile == "layers"
    assert not caplog.records
    assert automatic(tmp_path, compile="true", **settings).config.compile is True
    assert "compile=layers is what was verified" in caplog.text


@pytest.mark.parametrize(
    ("precision", "launcher", "expected"),
    [
        ("bf16", "no", torch.bfloat16),
        ("launcher", "bf16", torch.bfloat16),
        ("launcher", "fp8", torch.bfloat16),
        ("launcher", "fp16", torch.float16),
        ("launcher", None, torch.float32),
        ("no", "bf16", torch.float32),
    ],
)
def test_the_type_in_which_a_run_computes(
    precision: str, launcher: str | None, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Utilisation is counted by it: under a launcher's fp8, an H100's was counted by the rate of float32."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert computed_in(tiny(Path("data"), Path("out"), precision=precision)) == expected
