"""Adapters are saved and loaded exactly, in every way; merged, switched, refused; with and without the package."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from elsewhere import run_elsewhere
from finetuning_runs import KINDS, digest, labelled_cells, make_config, write_base
from helpers import largest_difference
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1ForSequenceClassification, TahoeX1Tokenizer
from tahoex1_hf.configuration_tahoe_x1 import AUTO_MAP, CODE_FILES
from tahoex1_hf.finetuning.adapters import save_adapter
from tahoex1_hf.finetuning.cards import adapter_card
from tahoex1_hf.finetuning.methods import adapt
from tahoex1_hf.finetuning.running import finetune
from tahoex1_hf.hub.adapters import add_adapter, load_adapter, read_record, use_adapter

METHODS = ["lora", "dora", "rslora", "head_only"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return write_base(folder / "base")


@pytest.fixture(scope="module")
def adapters(folder: Path, base: Path) -> dict[str, Path]:
    """Write adapters of every method, whose weights are far from their initial ones."""
    written = {}
    for number, method in enumerate(METHODS):
        config = make_config(base, folder / "none.h5ad", folder / method, method=method)
        labels = {"num_labels": 3, "id2label": dict(enumerate(KINDS)), "problem_type": "single_label_classification"}
        model = adapt(TahoeX1ForSequenceClassification.from_pretrained(base, **labels), config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        record = {"task": "classification", "label": "kind", "method": method, "classes": KINDS}
        record |= {"model": str(base), "model_options": labels, "trainable_parameters": 1234}
        save_adapter(model, TahoeX1Tokenizer.from_pretrained(base), folder / method, record)
        save_file({"logits": logits_of(model.eval(), base)}, folder / f"{method}.safetensors")
        written[method] = folder / method
    return written


def cells_of(base: Path) -> dict[str, torch.Tensor]:
    tokenizer = TahoeX1Tokenizer.from_pretrained(base)
    return dict(tokenizer(labelled_cells(12, seed=5), padding=True, return_tensors="pt"))


def logits_of(model: Any, base: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**cells_of(base)).logits
    return logits.contiguous()


def expected(adapter: Path) -> torch.Tensor:
    return load_file(adapter.with_name(f"{adapter.name}.safetensors"))["logits"]


def bare(base: Path) -> Any:
    return TahoeX1ForSequenceClassification.from_pretrained(base, num_labels=3).eval()


@pytest.mark.parametrize("method", METHODS)
def test_every_way_of_loading_gives_the_same(method: str, adapters: dict[str, Path], base: Path) -> None:
    adapter = adapters[method]
    ours, tokenizer = load_adapter(adapter)
    assert torch.equal(logits_of(ours, base), expected(adapter))
    assert ours.config.id2label == dict(enumerate(KINDS))
    assert tokenizer.get_vocab() == TahoeX1Tokenizer.from_pretrained(base).get_vocab()
    by_peft = PeftModel.from_pretrained(bare(base), adapter).eval()
    assert torch.equal(logits_of(by_peft, base), expected(adapter))
    by_transformers = bare(base)
    by_transformers.load_adapter(adapter)
    assert largest_difference(logits_of(by_transformers.eval(), base), expected(adapter)) < 1e-6
    from_auto = AutoModelForSequenceClassification.from_pretrained(adapter, num_labels=3).eval()
    assert largest_difference(logits_of(from_auto, base), expected(adapter)) < 1e-6
    from_auto_peft = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=3).eval()
    assert torch.equal(logits_of(from_auto_peft, base), expected(adapter))
    given = load_adapter(adapter, base=bare(base))[0]
    assert torch.equal(logits_of(given, base), expected(adapter))


@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_unmerged(method: str, adapters: dict[str, Path], base: Path, tmp_path: Path) -> None:
    model, _ = load_adapter(adapters[method])
    unmerged = logits_of(model, base)
    assert largest_difference(unmerged, logits_of(bare(base), base)) > 0.01  # there is something to merge
    model.merge_adapter()
    assert largest_difference(logits_of(model, base), unmerged) < 1e-5
    model.unmerge_adapter()
    assert largest_difference(logits_of(model, base), unmerged) < 1e-5
    merged = model.merge_and_unload()
    assert type(merged) is TahoeX1ForSequenceClassification
    merged.save_pretrained(tmp_path)
    alone = TahoeX1ForSequenceClassification.from_pretrained(tmp_path).eval()
    assert largest_difference(logits_of(alone, base), unmerged) < 1e-5
    assert alone.config.id2label == dict(enumerate(KINDS))


def test_an_adapter_is_small_and_complete(adapters: dict[str, Path], base: Path) -> None:
    names = {path.name for path in adapters["lora"].iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "finetuning.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    size = sum(path.stat().st_size for path in adapters["lora"].iterdir())
    assert size < (base / "model.safetensors").stat().st_size
    settings = json.loads((adapters["lora"] / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["classifier", "score"]
    assert settings["target_modules"] == sorted(settings["target_modules"])  # PEFT's order is random
    assert settings["base_model_name_or_path"] == str(base)


def test_the_base_is_untouched_in_memory(base: Path, tmp_path: Path) -> None:
    labelled_cells(60).write_h5ad(tmp_path / "cells.h5ad")
    before, in_file = load_file(base / "model.safetensors"), digest(base / "model.safetensors")
    finetune(make_config(base, tmp_path / "cells.h5ad", tmp_path / "run", learning_rate=0.1))
    model, _ = load_adapter(tmp_path / "run")
    kept = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
    compared = [name for name in before if name.startswith("tahoe.")]
    assert len(compared) > 30
    assert all(torch.equal(kept[name], before[name]) for name in compared)
    assert digest(base / "model.safetensors") == in_file
    with model.disable_adapter(), torch.no_grad():
        pooled = model.get_base_model().tahoe(**cells_of(base)).pooler_output
        plain = TahoeX1ForPreTraining.from_pretrained(base).eval().tahoe(**cells_of(base)).pooler_output
    assert torch.equal(pooled, plain)


def test_several_adapters_on_one_base(adapters: dict[str, Path], base: Path, tmp_path: Path) -> None:
    labelled_cells(60).write_h5ad(tmp_path / "cells.h5ad")
    finetune(make_config(base, tmp_path / "cells.h5ad", tmp_path / "pair", label="pair", method="dora"))
    alone, _ = load_adapter(tmp_path / "pair")
    two_classes = logits_of(alone, base)
    model, _ = load_adapter(adapters["lora"])
    add_adapter(model, tmp_path / "pair", "pair")
    add_adapter(model, adapters["head_only"], "head")
    assert torch.equal(logits_of(model, base), expected(adapters["lora"]))
    for _ in range(2):
        use_adapter(model, "pair", tmp_path / "pair")
        assert torch.equal(logits_of(model, base), two_classes)
        assert model.config.id2label == {0: "no", 1: "yes"}
        use_adapter(model, "head", adapters["head_only"])
        assert torch.equal(logits_of(model, base), expected(adapters["head_only"]))
        use_adapter(model, "default", adapters["lora"])
        assert torch.equal(logits_of(model, base), expected(adapters["lora"]))
        assert model.config.id2label == dict(enumerate(KINDS))
    with pytest.raises(ValueError, match="name='pair': the model has an adapter of this name"):
        add_adapter(model, tmp_path / "pair", "pair")


def test_adapters_for_another_base_are_refused(adapters: dict[str, Path], base: Path, tmp_path: Path) -> None:
    from cells import GENES

    wider = write_base(tmp_path / "wider", hidden_size=48)
    with pytest.raises(ValueError, match=r"adapter for another size .*hidden_size 48 instead of 32.*trained on"):
        load_adapter(adapters["lora"], base=wider)
    fewer = write_base(tmp_path / "fewer", GENES[:50])
    with pytest.raises(ValueError, match=r"another size or vocabulary: this base has vocab_size 53 instead of 63"):
        load_adapter(adapters["lora"], base=fewer)
    renamed = write_base(tmp_path / "renamed", [*GENES[1:], GENES[0]])  # the same number of other token ids
    with pytest.raises(
        ValueError, match=r"adapter for another vocabulary: the genes of this base have other token ids"
    ):
        load_adapter(adapters["lora"], base=renamed)
    with pytest.raises(ValueError, match="hidden_size 48"):
        load_adapter(adapters["lora"], base=bare(wider))
    other = bare(base)
    torch.nn.init.normal_(other.tahoe.layers[0].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "other")
    TahoeX1Tokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    for given in (other, tmp_path / "other"):
        with pytest.raises(ValueError, match=r"adapter for other weights: .* was trained on, .*base, but not its"):
            load_adapter(adapters["lora"], base=given)
    model, _ = load_adapter(bare_record(adapters["lora"], tmp_path / "no sample"), base=tmp_path / "other")
    with pytest.raises(ValueError, match="adapter for other weights"):
        add_adapter(model, adapters["dora"], "dora")
    bare(base).bfloat16().save_pretrained(tmp_path / "rounded")
    TahoeX1Tokenizer.from_pretrained(base).save_pretrained(tmp_path / "rounded")
    load_adapter(adapters["lora"], base=tmp_path / "rounded")
    (tmp_path / "moved").mkdir()
    for path in adapters["lora"].iterdir():
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "moved" / "finetuning.json").unlink()  # as if PEFT alone had written the adapter
    with pytest.raises(ValueError, match="does not fit this base, whose layers have other sizes"):
        load_adapter(tmp_path / "moved", base=wider)
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        load_adapter(tmp_path / "wider_vocab")


def bare_record(adapter: Path, folder: Path) -> Path:
    """Copy an adapter as earlier versions wrote it, without a sample of its base."""
    shutil.copytree(adapter, folder)
    record = read_record(folder)
    assert 1 < len(record.pop("base_sample")) <= 24
    (folder / "finetuning.json").write_text(json.dumps(record))
    return folder


def test_a_base_that_has_moved(adapters: dict[str, Path], base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for path in adapters["lora"].iterdir():
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes())
    record = read_record(tmp_path / "adapter") | {"model": str(tmp_path / "gone")}
    (tmp_path / "adapter" / "finetuning.json").write_text(json.dumps(record))
    with pytest.raises(FileNotFoundError) as caught:
        load_adapter(tmp_path / "adapter")
    assert "pass base= to say where that is now" in "".join(caught.value.__notes__)
    model, _ = load_adapter(tmp_path / "adapter", base=base)
    assert torch.equal(logits_of(model, base), expected(adapters["lora"]))


def test_the_card(adapters: dict[str, Path]) -> None:
    text = (adapters["dora"] / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "peft"
    assert "base_model" not in yaml.safe_load(header)  # a folder of this machine
    for said in (
        "# Tahoe-x1 classification: kind",
        "DoRA",
        "B cell, NK, T cell",
        "1,234",
        "load_adapter",
        "tahoex1 predict",
    ):
        assert said in body
    record = read_record(adapters["lora"]) | {"task": "masked_expression", "method": "full", "label": None}
    whole = adapter_card(record)
    assert "embed_anndata(adata, model, tokenizer)" in whole
    assert "merge" not in whole
    assert yaml.safe_load(whole.split("---\n", 2)[1])["library_name"] == "transformers"
    assert "embed_anndata(adata, merged, tokenizer)" in adapter_card(record | {"method": "lora"})
    on_hub = adapter_card(record | {"model": "tahoebio/Tahoe-x1", "size": "70m"})
    assert yaml.safe_load(on_hub.split("---\n", 2)[1])["base_model"] == "tahoebio/Tahoe-x1"
    assert "`tahoebio/Tahoe-x1 (70m)`" in on_hub


# With and without the package ---------------------------------------------------------------------


def hub_folder(base: Path, folder: Path) -> Path:
    """Write the base as it lies on the Hub: with the code."""
    import tahoex1_hf

    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    for name in CODE_FILES:
        (folder / name).write_bytes((Path(tahoex1_hf.__file__).parent / name).read_bytes())
    return folder


@pytest.mark.slow
def test_adapters_of_the_package_load_on_remote_code(adapters: dict[str, Path], base: Path, tmp_path: Path) -> None:
    hub_folder(base, tmp_path / "repo")
    save_file(cells_of(base), tmp_path / "cells.safetensors")
    run_elsewhere(
        """
        import json, sys, torch
        from peft import PeftModel
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForSequenceClassification
        torch.set_num_threads(1)
        results = {}
        for method, adapter in zip(sys.argv[1::2], sys.argv[2::2]):
            options = json.load(open(adapter + "/finetuning.json"))["model_options"]
            for way in ("peft", "transformers"):
                base = AutoModelForSequenceClassification.from_pretrained("repo", trust_remote_code=True, **options)
                assert type(base).__module__.startswith("transformers_modules."), type(base)
                if way == "peft":
                    model = PeftModel.from_pretrained(base, adapter)
                else:
                    model = base
                    model.load_adapter(adapter)
                with torch.no_grad():
                    logits = model.eval()(**load_file("cells.safetensors")).logits
                results[f"{method}.{way}"] = logits.contiguous()
        save_file(results, "results.safetensors")
        """,
        tmp_path,
        *(argument for method, adapter in adapters.items() for argument in (method, adapter)),
    )
    results = load_file(tmp_path / "results.safetensors")
    assert len(results) == 2 * len(METHODS)
    for name, logits in results.items():
        assert largest_difference(logits, expected(adapters[name.partition(".")[0]])) < 1e-6, name


@pytest.mark.slow
def test_adapters_of_remote_code_load_in_the_package(base: Path, tmp_path: Path) -> None:
    hub_folder(base, tmp_path / "repo")
    save_file(cells_of(base), tmp_path / "cells.safetensors")
    run_elsewhere(
        """
        import torch
        from peft import LoraConfig, get_peft_model
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForSequenceClassification
        torch.set_num_threads(1)
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained("repo", trust_remote_code=True, num_labels=4)
        settings = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(base, settings)
        batch = load_file("cells.safetensors")
        labels = torch.arange(len(batch["input_ids"])) % 4
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained("adapter")
        with torch.no_grad():
            save_file({"logits": model.eval()(**batch).logits.contiguous()}, "results.safetensors")
        """,
        tmp_path,
    )
    wanted = load_file(tmp_path / "results.safetensors")["logits"]
    model, _ = load_adapter(tmp_path / "adapter", base=tmp_path / "repo")
    assert type(model.get_base_model()) is TahoeX1ForSequenceClassification
    assert largest_difference(logits_of(model, base), wanted) < 1e-6
    plain = TahoeX1ForSequenceClassification.from_pretrained(base, num_labels=4)
    assert (
        largest_difference(logits_of(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval(), base), wanted)
        < 1e-6
    )


def test_masked_expression_adapters_name_a_class_that_can_be_imported(base: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModel

    config = make_config(base, tmp_path / "none.h5ad", tmp_path / "run", task="masked_expression", label=None)
    model = adapt(TahoeX1ForPreTraining.from_pretrained(base), config)
    record = {"task": "masked_expression", "label": None, "method": "lora", "model": str(base), "model_options": {}}
    save_adapter(model, TahoeX1Tokenizer.from_pretrained(base), tmp_path / "run", record)
    settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert settings["auto_mapping"]["parent_library"] == "tahoex1_hf.modeling_tahoe_x1"
    loaded = AutoPeftModel.from_pretrained(tmp_path / "run", import_allowlist=["tahoex1_hf"])
    assert type(loaded.get_base_model()) is TahoeX1ForPreTraining
    assert type(load_adapter(tmp_path / "run")[0].get_base_model()) is TahoeX1ForPreTraining
