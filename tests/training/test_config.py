"""Some settings of pretraining must not change the result, and some ends of a run must do no harm."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import yaml
from fixed_steps import FixedSteps, fixed_trainer, tiny
from helpers import GOLDEN_VARIANTS, make_batch, packed, tiny_config, tiny_model
from safetensors.torch import load_file
from torch._dynamo.eval_frame import OptimizedModule
from training_runs import RECIPE, ROOT, command, curve, environment, finished, run, status

from tahoex1_hf import TahoeX1ForPreTraining
from tahoex1_hf.training.config import read_pretrain_config
from tahoex1_hf.training.pretraining import make_tokenizer, training_arguments
from tahoex1_hf.training.trainer import PretrainingTrainer, _plain

CONFIGS = ROOT / "examples" / "configs" / "accelerate"
NO_FP8 = "could not create a primitive descriptor for the matmul primitive"  # oneDNN's words on CPUs without AVX-512
WITHOUT_DROPOUT = {"model__expression_encoder_dropout": 0.0}


def launched(name: str, output: Path, dataset: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run two processes with accelerate's launcher, configured by one of the example files."""
    start = command("ddp", output, dataset, **changes)
    place = start.index("--multi_gpu")
    file = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", "2"]
    return forked.launch_as_a_user([*start[:place], *file, *start[place + 3 :]])


def test_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    config = tiny_config(expression_encoder_dropout=0.0)
    batch, ends, calls = packed(make_batch(config)), [], []
    for checkpointed in ("false", "true"):
        model, number = tiny_model(config), []
        trainer = fixed_trainer(model, batch, tmp_path, 3, 2, activation_checkpointing=checkpointed)
        model.tahoe.layers[0].mlp.register_forward_pre_hook(lambda *_, number=number: number.append(1))
        trainer.train()
        ends.append(model.state_dict())
        calls.append(len(number))
    assert calls[1] == 2 * calls[0]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_compiled_steps_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the compiler's first half is used, since making machine code takes minutes."""
    config = tiny_config(expression_encoder_dropout=0.0, attention_mask_style="observed_or_self")
    batch = make_batch(config, lengths=[12, 9, 12, 7])
    batch["labels"] = batch["labels"].masked_fill(~batch["target_mask"], -100.0)
    curves = {}
    torch._dynamo.reset()  # what other tests compiled makes the compiler try lengths of every size
    for compiled in ("false", "true"):
        monkeypatch.setenv(
            "ACCELERATE_DYNAMO_BACKEND", "NO"
        )  # Trainer sets it, and monkeypatch restores it at the end
        args = training_arguments(tiny(Path("unused"), tmp_path, compile=compiled, logging_steps=1, eval_cells=0), 3)
        if args.torch_compile:
            assert args.torch_compile_backend == "inductor"
            args.torch_compile_backend = "aot_eager"
        model = tiny_model(config)
        trainer = PretrainingTrainer(model, args, FixedSteps(batch, 3), microbatch_size=4)
        trainer.train()
        assert (type(trainer.model_wrapped) is OptimizedModule) == (compiled == "true")
        curves[compiled] = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
    np.testing.assert_allclose(curves["true"], curves["false"], rtol=1e-5)


def test_half_precision_and_the_examples_of_fsdp_and_fp8(
    finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    """The files run as they are on CPUs, where torch computes FP8 products too; this shows nothing about GPUs."""
    pytest.importorskip("torchao")
    short = {**WITHOUT_DROPOUT, "max_steps": 2, "eval_steps": 2, "logging_steps": 1}
    shutil.copytree(finished_run("single", **short), tmp_path / "single")
    finished("single", tmp_path / "bf16", training_dataset, precision="bf16", **short)
    for name in ("fsdp2", "fp8_fsdp2"):
        done = launched(name, tmp_path / name, training_dataset, precision="launcher", **short)
        if name == "fp8_fsdp2" and NO_FP8 in done.stderr:
            pytest.skip("torch computes no FP8 products on this CPU, or the one that is imitated")
        assert done.returncode == 0, done.stderr[-3000:]
    losses = {
        name: [line[key] for line in curve(tmp_path / name) for key in ("loss", "eval_loss") if key in line]
        for name in ("single", "bf16", "fsdp2", "fp8_fsdp2")
    }
    for name, limit in (("bf16", 0.02), ("fsdp2", 0.02), ("fp8_fsdp2", 0.1)):
        assert losses[name] == pytest.approx(losses["single"], rel=limit)
        assert losses[name] != losses["single"]
    assert losses["single"][-1] < 0.6 * losses["single"][0]  # two steps have changed the weights by much
    assert losses["fp8_fsdp2"] != pytest.approx(losses["fsdp2"], rel=1e-5)
    for name in losses:
        weights = load_file(tmp_path / name / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert len(list((tmp_path / "fsdp2" / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2


def test_weights_that_are_cast_to_fp8_are_saved_as_they_are() -> None:
    """One process with FSDP2 gathers torchao's wrappers, which have no memory of their own to be saved."""
    pytest.importorskip("torchao")
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    settings = Float8LinearConfig(enable_fsdp_float8_all_gather=True)
    weight = Float8Linear.from_float(torch.nn.Linear(16, 16), settings).weight
    assert isinstance(weight.data, WeightWithDynamicFloat8CastTensor)
    plain = _plain(weight.data)
    assert type(plain.data) is torch.Tensor
    assert plain.data_ptr()
    assert torch.equal(_plain(plain), plain)


def test_fp8_takes_the_layers_that_it_can() -> None:
    pytest.importorskip("torchao")
    from accelerate.utils.ao import convert_model_to_fp8_ao
    from torchao.float8 import Float8LinearConfig

    settings = yaml.safe_load((CONFIGS / "fp8_fsdp2.yaml").read_text())["fp8_config"]
    assert settings["backend"] == "AO"
    assert settings["pad_inner_dim"]  # a microbatch may have any number of tokens
    config = tiny_config(hidden_size=32, expression_encoder_dropout=0.0)
    batch, expected = packed(make_batch(config, lengths=[5, 9, 12, 11])), tiny_model(config)
    model = tiny_model(config)
    convert_model_to_fp8_ao(model, config=Float8LinearConfig(pad_inner_dim=settings["pad_inner_dim"]))
    converted = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    for layer in range(config.num_hidden_layers):
        assert {f"tahoe.layers.{layer}.self_attn.{part}_proj" for part in "qkvo"} <= converted
        assert {f"tahoe.layers.{layer}.mlp.{part}_proj" for part in ("up", "down")} <= converted
    # The layers that read and write values keep their digits.
    assert not converted & {"tahoe.embeddings.expression_encoder.linear1", "expression_decoder.output"}
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
    except RuntimeError as error:
        if NO_FP8 not in str(error):
            raise
        pytest.skip("torch computes no FP8 products on this CPU, or the one that is imitated")
    loss.backward()
    assert loss.item() == pytest.approx(expected(**batch).loss.item(), rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_training_starts_from_a_checkpoint_of_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    original = next(v.checkpoint for v in GOLDEN_VARIANTS if v.name.startswith("a_"))
    vocab = json.loads((original / "vocab.json").read_text())
    genes = [token for token in vocab if not token.startswith("<")]
    dataset = prepared(tmp_path, genes, original / "vocab.json")
    settings = command("single", tmp_path / "run", dataset, init_from=original, max_steps=2)
    settings = [each for each in settings if not each.startswith("model.")]
    settings += ["learning_rate=1e-6", "attention=sdpa"]
    settings[settings.index(str(RECIPE))] = str(RECIPE.with_name("3b-stage2.yaml"))
    done = forked.run(settings, environment("single"))
    assert done.returncode == 0, done.stderr[-3000:]
    ours = load_file(tmp_path / "run" / "model.safetensors")
    theirs = TahoeX1ForPreTraining.from_pretrained(original).state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():  # after two steps with a learning rate of 1e-6, in bfloat16
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-5)
    assert not all(torch.equal(ours[name], theirs[name]) for name in theirs)


def prepared(folder: Path, genes: list[str], vocab: Path) -> Path:
    """Prepare a dataset of 40 cells with these genes."""
    import anndata
    import numpy as np
    from scipy.sparse import csr_matrix

    from tahoex1_hf.data.config import parse_config
    from tahoex1_hf.data.preparation import prepare

    random = np.random.default_rng(0)
    counts = random.integers(1, 10, (40, len(genes))) * (random.random((40, len(genes))) < 0.1)
    adata = anndata.AnnData(csr_matrix(counts.astype(np.float32)))
    adata.var_names = genes
    adata.write_h5ad(folder / "cells.h5ad")
    source = {"kind": "anndata", "paths": [str(folder / "cells.h5ad")], "min_known_genes": 0}
    settings = {"sources": [source], "output": str(folder / "set"), "vocab": str(vocab)}
    prepare(parse_config({**settings, "validation": {"fraction": 0.2}}, "test"))
    return folder / "set"


def test_a_damaged_shard_ends_the_run_and_is_named(training_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(training_dataset, tmp_path / "set")
    shard = next(path for path in (tmp_path / "set").rglob("*.arrow") if "train" in str(path))
    with shard.open("rb+") as file:
        file.truncate(shard.stat().st_size // 2)
    done = run("single", tmp_path / "run", tmp_path / "set")
    assert done.returncode != 0
    assert shard.name in "".join(done.stderr.replace("│", "").split())
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert status(tmp_path / "run")["status"] == "running"


def test_a_dataset_that_is_not_there_is_called_that(tmp_path: Path) -> None:
    """The message names the key of the recipe, not the file that was looked for first."""
    config = read_pretrain_config(RECIPE, [f"dataset={tmp_path / 'nowhere'}"])
    with pytest.raises(FileNotFoundError, match=r"^dataset='.*nowhere' is no folder that tahoex1 prepare made"):
        make_tokenizer(config)


def test_trackers_get_the_log(training_dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finished("single", tmp_path, training_dataset, report_to="[tensorboard]")
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events))
    log.Reload()
    assert {"train/loss", "train/cells_per_second", "train/learning_rate", "eval/spearman"} <= set(
        log.Tags()["scalars"]
    )
    assert [event.step for event in log.Scalars("train/loss")] == [2, 4, 6, 8]


def test_the_script_names_the_wrong_key() -> None:
    done = forked.run([sys.executable, ROOT / "examples" / "pretrain.py", RECIPE, "learning_rat=1"])
    assert done.returncode == 2
    assert "learning_rat: unknown key" in done.stderr
    assert "Traceback" not in done.stderr
