"""`conversion/export_to_hub.py` builds a repository, proves that it loads, and uploads nothing else."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
import typer
import yaml
from elsewhere import run_isolated_fork
from helpers import GOLDEN, REPO_ROOT
from hub_server import Hub, read_files, serve
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from tahoex1_hf import configuration_tahoe_x1
from tahoex1_hf.configuration_tahoe_x1 import AUTO_MAP, CODE_FILES, CUSTOM_PIPELINES
from tahoex1_hf.hub import export as hub_export
from tahoex1_hf.hub import isolated_load
from tahoex1_hf.hub.cards import rendering
from tahoex1_hf.hub.cards.facts import RELEASED_FACTS, load_facts
from tahoex1_hf.hub.export import build_repository, size_names
from tahoex1_hf.original.convert import convert_original_folder

LICENSE = REPO_ROOT / "LICENSE"
AUTO_CLASSES = {
    "AutoConfig",
    "AutoModel",
    "AutoModelForPreTraining",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
}


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    for name, variant in (("small", "a_70m_like"), ("large", "b_3b_like_chem")):
        convert_original_folder(GOLDEN / variant / "model", folder / f"{name}-model")
    return size_names([str(folder / "small-model"), str(folder / "large-model")])


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the proof, which takes a second process, for tests of the steps before it."""
    monkeypatch.setattr(hub_export, "compare_isolated_load", lambda repository, sources: dict.fromkeys(sources, 0.0))


def build(sizes: dict[str, Path], destination: Path, default: str = "small", card: str = "# card") -> dict[str, float]:
    return build_repository(sizes, destination, default=default, cards={default: card})


def export(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPO_ROOT / "conversion" / "export_to_hub.py", *arguments]
    return forked.run(command, forked.environment(**environment))


@pytest.mark.slow
def test_upload_through_the_real_client(tmp_path: Path, sizes: dict[str, Path]) -> None:
    (tmp_path / "card.md").write_text("---\nlicense: apache-2.0\n---\n# Two sizes\n")
    repository, hub = tmp_path / "repository", Hub()
    arguments = [sizes["small"], sizes["large"], repository, "--default", "large", "--card", tmp_path / "card.md"]
    with serve(hub):
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
        online["HF_HOME"] = str(tmp_path / "hf_home")
        run = export(*arguments, "--push", "tahoebio/new", "--commit-message", "First", **online)
    assert run.returncode == 0, run.stderr
    assert "large: loads without the package; largest difference from its outputs 0" in run.stdout
    assert hub.commits[0]["summary"] == "First"
    uploaded = hub.repos["tahoebio/new"]
    assert uploaded == read_files(repository)
    assert uploaded["README.md"] == (tmp_path / "card.md").read_bytes()
    assert {"config.json", "small/model.safetensors", "LICENSE", *CODE_FILES} <= uploaded.keys()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return the command, run in this process without the proof; the test fails if it contacts the Hub."""
    spec = importlib.util.spec_from_file_location("export_to_hub", REPO_ROOT / "conversion" / "export_to_hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(hub_export, "HfApi", lambda: pytest.fail("the Hub was called"))
    app = typer.Typer()
    app.command()(module.export)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("unproven")
def test_without_push_it_is_a_dry_run(tmp_path: Path, sizes: dict[str, Path], command: Callable[..., Result]) -> None:
    (sizes["small"] / "README.md").write_text("# small")
    run = command(sizes["large"], sizes["small"], tmp_path / "repository", "--default", "small")
    (sizes["small"] / "README.md").unlink()
    assert run.exit_code == 0, run.output
    for path, size in ((path, path.stat().st_size) for path in (tmp_path / "repository").rglob("*.*")):
        assert f"{size:,}  {path.relative_to(tmp_path / 'repository')}\n" in run.output
    assert "Nothing was uploaded" in run.output
    assert (tmp_path / "repository" / "README.md").read_text() == "# small"


NAMED = {"70m": "small", "3b": "large"}


def facts_of(model: Path, name: str, folder: Path) -> Path:
    """Write the facts of a released size as if it had the shape of a small model."""
    facts = yaml.safe_load(RELEASED_FACTS[name].read_text(encoding="utf-8"))
    config = json.loads((model / "config.json").read_text())
    facts["shape"] = {key: config[key] for key in vars(load_facts(RELEASED_FACTS[name]).shape)}
    facts["parameters"] = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(facts))
    return folder / f"{name}.yaml"


@pytest.mark.usefixtures("unproven")
def test_cards_are_of_the_models_that_they_describe(
    tmp_path: Path, sizes: dict[str, Path], command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jinja2")
    arguments = f"70m={sizes['small']}", f"3b={sizes['large']}", tmp_path / "repository"
    run = command(*arguments)
    assert run.exit_code == 1
    assert "70m.yaml" in run.output
    assert "hidden_size 64 instead of 512" in run.output
    assert "parameters 205,825 instead of 70,996,993" in run.output
    assert "--card" in run.output
    monkeypatch.setattr(
        rendering, "RELEASED_FACTS", {name: facts_of(sizes[size], name, tmp_path) for name, size in NAMED.items()}
    )
    run = command(*arguments)
    assert run.exit_code == 0, run.output
    for folder, subfolder in ((tmp_path / "repository", ""), (tmp_path / "repository" / "3b", 'subfolder="3b"')):
        text = (folder / "README.md").read_text()
        assert "license: apache-2.0" in text
        assert subfolder in text


def test_a_push_without_a_card_is_refused_before_anything_is_done(
    tmp_path: Path, sizes: dict[str, Path], command: Callable[..., Result]
) -> None:
    run = command(sizes["small"], tmp_path / "repository", "--push", "tahoebio/new")
    assert run.exit_code == 1
    assert "(--card)" in run.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("unproven")
def test_contents_of_a_repository(tmp_path: Path, sizes: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    for name, content in (("training_args.bin", b"a pickle"), (CODE_FILES[0], b"code of another version")):
        (sizes["small"] / name).write_bytes(content)
    build(sizes, tmp_path / "repository")
    for name in ("training_args.bin", CODE_FILES[0]):
        (sizes["small"] / name).unlink()
    assert "training_args.bin is left out" in caplog.text
    assert CODE_FILES[0] not in caplog.text
    files = {str(path.relative_to(tmp_path / "repository")) for path in (tmp_path / "repository").rglob("*.*")}
    files = {name for name in files if not name.endswith("conversion.json")}  # the converter's own record
    checkpoint = {"config.json", "tokenizer_config.json", "vocab.json", "model.safetensors"}
    assert files == checkpoint | {f"large/{name}" for name in checkpoint} | {*CODE_FILES, "README.md", "sizes.json"}
    assert (tmp_path / "repository" / "LICENSE").read_text() == LICENSE.read_text()
    for folder in (tmp_path / "repository", tmp_path / "repository" / "large"):
        config = json.loads((folder / "config.json").read_text())
        tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["auto_map"].keys() == AUTO_CLASSES
        assert tokenizer_config["auto_map"].keys() == {"AutoTokenizer"}
        named = {*config["auto_map"].values(), tokenizer_config["auto_map"]["AutoTokenizer"][0]}
        for module, _, class_name in (name.partition(".") for name in named):
            assert f"class {class_name}(" in (tmp_path / "repository" / f"{module}.py").read_text()
    for name in CODE_FILES:
        assert (tmp_path / "repository" / name).read_bytes() == (REPO_ROOT / "tahoex1_hf" / name).read_bytes()
    converted = json.loads((sizes["small"] / "config.json").read_text())
    assert "auto_map" not in converted  # the source stays as it is
    assert json.loads((tmp_path / "repository" / "config.json").read_text()) == converted | {
        "auto_map": AUTO_MAP,
        "custom_pipelines": CUSTOM_PIPELINES,
    }


def test_every_file_that_travels_is_listed() -> None:
    assert {path.name for path in (REPO_ROOT / "tahoex1_hf").glob("*_tahoe_x1.py")} == set(CODE_FILES)


def test_sharded_weights_travel_complete(tmp_path: Path, sizes: dict[str, Path], unproven: None) -> None:
    source = tmp_path / "sharded"
    shutil.copytree(sizes["small"], source)
    tensors = load_file(source / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {key: names[number % 2] for number, key in enumerate(tensors)}
    for name in names:
        part = {key: tensor for key, tensor in tensors.items() if places[key] == name}
        save_file(part, source / name, metadata={"format": "pt"})
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    build({"small": source}, tmp_path / "repository")
    assert {path.name for path in (tmp_path / "repository").glob("model*.safetensors*")} == {
        *names,
        "model.safetensors.index.json",
    }
    (source / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002.safetensors"):
        build({"small": source}, tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["code", "weights", "tokenizer"])
def test_a_wrong_export_is_never_put_in_place(
    tmp_path: Path, sizes: dict[str, Path], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    # test_upload_through_the_real_client starts the proof's own process.
    monkeypatch.setattr(isolated_load, "subprocess", SimpleNamespace(run=run_isolated_fork))
    add = hub_export._add_checkpoint

    def add_damaged(source: Path, folder: Path) -> None:
        add(source, folder)
        if damage == "weights":
            tensors = load_file(folder / "model.safetensors")
            tensors["tahoe.norm.weight" if "tahoe.norm.weight" in tensors else sorted(tensors)[-1]] *= 1.01
            (folder / "model.safetensors").unlink()  # it may be a link to the source
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if damage == "tokenizer":
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"num_bins": 50}))

    monkeypatch.setattr(hub_export, "_add_checkpoint", add_damaged)
    if damage == "code":
        left = CODE_FILES[:1] + CODE_FILES[2:]  # the tokenizer imports it
        monkeypatch.setattr(configuration_tahoe_x1, "CODE_FILES", left)
    message = "does not load without the package" if damage == "code" else "Without the package, .* gives another"
    with pytest.raises(RuntimeError, match=message):
        build({"small": sizes["small"]}, tmp_path / "repository")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_and_nothing_else(
    tmp_path: Path, sizes: dict[str, Path], unproven: None
) -> None:
    build(sizes, tmp_path / "repository")
    build({"large": sizes["large"]}, tmp_path / "repository", default="large", card="# other")
    assert not (tmp_path / "repository" / "large").exists()
    assert (tmp_path / "repository" / "README.md").read_text() == "# other"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an earlier export"):
        build(sizes, tmp_path / "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"repository", "mine"}


def test_folders_that_are_not_converted_checkpoints(tmp_path: Path, sizes: dict[str, Path], unproven: None) -> None:
    with pytest.raises(FileNotFoundError, match="convert it first"):
        build({"small": GOLDEN / "a_70m_like" / "model"}, tmp_path / "repository")
    shutil.copytree(sizes["small"], tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    content = weights.read_bytes()
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"(?s)do not fit its configuration.*unexpected: tahoe\.layers\.1\."):
        build({"small": tmp_path / "other"}, tmp_path / "repository")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is truncated"):
        build({"small": tmp_path / "other"}, tmp_path / "repository")
    weights.unlink()
    torch.save({}, tmp_path / "other" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="weights are safetensors"):
        build({"small": tmp_path / "other"}, tmp_path / "repository")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="type 'bert'"):
        build({"small": tmp_path / "other"}, tmp_path / "repository")
    with pytest.raises(ValueError, match="pass one of small, large"):
        build(sizes, tmp_path / "repository", default="7b")


def test_names_of_sizes(tmp_path: Path) -> None:
    for name in ("70m-model", "1b"):
        (tmp_path / name).mkdir()
    folders = [str(tmp_path / "70m-model"), f"1.3b={tmp_path / '1b'}"]
    assert size_names(folders) == {"70m": tmp_path / "70m-model", "1.3b": tmp_path / "1b"}
    with pytest.raises(ValueError, match="both named 70m"):
        size_names([folders[0], f"70m={tmp_path / '1b'}"])
    with pytest.raises(ValueError, match="cannot be the name of a sub-folder"):
        size_names([f"../up={tmp_path / '1b'}"])
