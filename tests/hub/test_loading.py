"""Models load from the Hub: from its cache, over HTTP, without the package, and in the layout published today."""

import json
import sys
import textwrap
import time
from pathlib import Path

import forked
import pytest
import torch
import transformers
from elsewhere import run_elsewhere
from forked import Forked
from helpers import Variant
from hub_server import Hub, commit_of, fill_cache, read_files, serve
from mapped import names_in_memory
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForSequenceClassification, AutoTokenizer

from tahoex1_hf import (
    TahoeX1Config,
    TahoeX1ForPreTraining,
    TahoeX1ForSequenceClassification,
    TahoeX1Model,
    TahoeX1Tokenizer,
)
from tahoex1_hf.hub import export as hub_export
from tahoex1_hf.hub import translated as model_loading
from tahoex1_hf.hub.loading import find_model, load_model_and_tokenizer
from tahoex1_hf.original.convert import convert_original_folder

REPO_ID = "tahoebio/Tahoe-x1"
SMALL, LARGE = Variant("a_70m_like", "flash"), Variant("b_3b_like_chem", "flash")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("converted") / name for name in ("70m", "3b")}
    for variant, folder in zip((SMALL, LARGE), folders.values(), strict=True):
        convert_original_folder(variant.checkpoint, folder)
    return folders


@pytest.fixture(scope="module")
def exported(converted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export with 70m at the root and 3b in a sub-folder; these tests themselves prove that it loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_export, "compare_isolated_load", lambda repository, sources: dict.fromkeys(sources, 0.0))
        folder = tmp_path_factory.mktemp("exported") / "repository"
        hub_export.build_repository(converted, folder, default="70m", cards={"70m": "# card"})
    return folder


@pytest.fixture(scope="module")
def filled(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Return a cache with two revisions; in `old` the final norm's weights are doubled."""
    old = tmp_path_factory.mktemp("old") / "repository"
    for name, content in read_files(exported).items():
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_bytes(content)
    tensors = load_file(old / "model.safetensors")
    save_file(
        {**tensors, "tahoe.norm.weight": 2 * tensors["tahoe.norm.weight"]}, old / "model.safetensors", {"format": "pt"}
    )
    cache = tmp_path_factory.mktemp("hub")
    return cache, fill_cache(cache, REPO_ID, {"main": exported, "old": old})


@pytest.fixture
def hub_cache(filled: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(filled[0]))
    return filled[1]


@pytest.fixture
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home for translated checkpoints, whose Hub cache holds one of today's repositories."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf_home" / "hub"))
    today = todays_repository(tmp_path / "today")
    fill_cache(tmp_path / "hf_home" / "hub", REPO_ID, {"main": today})
    return tmp_path / "hf_home"


def todays_repository(folder: Path) -> Path:
    for name, variant in (("70m-model", SMALL), ("3b-model", LARGE)):
        (folder / name).mkdir(parents=True)
        for path in variant.checkpoint.iterdir():
            (folder / name / path.name).write_bytes(path.read_bytes())
    (folder / "README.md").write_text("# today")
    return folder


def embed(model: torch.nn.Module, variant: Variant) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**variant.batch("collate_bin")).pooler_output


def own(converted: Path, variant: Variant) -> torch.Tensor:
    return embed(TahoeX1Model.from_pretrained(converted), variant)


def translations(hf_home: Path) -> list[Path]:
    return sorted((hf_home / "tahoex1_hf" / "translated").rglob("model.safetensors"))


def copies(hf_home: Path) -> list[Path]:
    """Return the files of weights in the package's own cache."""
    return [path for path in translations(hf_home) if not path.is_symlink()]


def test_auto_classes_from_the_cache(hub_cache: dict[str, str], converted: dict[str, Path]) -> None:
    expected = own(converted["70m"], SMALL)
    model = AutoModel.from_pretrained(REPO_ID)
    assert type(model) is TahoeX1Model
    assert torch.equal(embed(model, SMALL), expected)
    assert torch.equal(embed(AutoModel.from_pretrained(REPO_ID, revision=hub_cache["main"]), SMALL), expected)
    old = embed(AutoModel.from_pretrained(REPO_ID, revision="old"), SMALL)
    assert (old - expected).abs().max() > 0.1
    assert torch.equal(old, embed(AutoModel.from_pretrained(REPO_ID, revision=hub_cache["old"]), SMALL))
    large = AutoModelForPreTraining.from_pretrained(REPO_ID, subfolder="3b")
    assert type(large) is TahoeX1ForPreTraining
    assert torch.equal(embed(large, LARGE), own(converted["3b"], LARGE))
    half = AutoModel.from_pretrained(REPO_ID, dtype=torch.bfloat16, device_map="auto")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in half.parameters()} <= {"cpu", "cuda"}
    classifier = AutoModelForSequenceClassification.from_pretrained(REPO_ID, num_labels=7)
    assert classifier.config.num_labels == 7
    assert torch.equal(embed(classifier.base_model, SMALL), expected)


def test_tokenizers_and_sizes_from_the_cache(hub_cache: dict[str, str], converted: dict[str, Path]) -> None:
    for subfolder, name in (("", "70m"), ("3b", "3b")):
        tokenizer = AutoTokenizer.from_pretrained(REPO_ID, subfolder=subfolder)
        own_tokenizer = TahoeX1Tokenizer.from_pretrained(converted[name])
        assert type(tokenizer) is TahoeX1Tokenizer
        assert tokenizer.get_vocab() == own_tokenizer.get_vocab()
        assert tokenizer.drug_to_id == own_tokenizer.drug_to_id
    assert find_model(REPO_ID, size="3b").name == "3b"
    assert find_model(REPO_ID, size="70m") == find_model(REPO_ID)  # the size at the root has a name too
    assert torch.equal(
        embed(TahoeX1Model.from_pretrained(REPO_ID, subfolder="70m"), SMALL), own(converted["70m"], SMALL)
    )
    with pytest.raises(FileNotFoundError, match="has no size '1b'; it has the sizes 3b, 70m"):
        TahoeX1Model.from_pretrained(REPO_ID, subfolder="1b")


@pytest.mark.slow
def test_without_the_package(tmp_path: Path, filled: tuple[Path, dict[str, str]], converted: dict[str, Path]) -> None:
    cache, _ = filled
    (tmp_path / "hf_home").mkdir()
    (tmp_path / "hf_home" / "hub").symlink_to(cache)
    for name, variant in (("small", SMALL), ("large", LARGE)):
        save_file(variant.batch("collate_bin"), tmp_path / f"{name}.safetensors")
    run_elsewhere(
        """
        import torch, transformers
        from safetensors.torch import load_file, save_file
        torch.set_num_threads(1)
        batches = {name: load_file(name + ".safetensors") for name in ("small", "large")}
        results = {}
        cases = {
            "root": ("AutoModel", "small", {}),
            "head": ("AutoModelForPreTraining", "small", {}),
            "old": ("AutoModel", "small", {"revision": "old"}),
            "subfolder": ("AutoModelForPreTraining", "large", {"subfolder": "3b"}),
            "classifier": ("AutoModelForSequenceClassification", "small", {}),
            "bfloat16": ("AutoModel", "small", {"dtype": "bfloat16", "device_map": "auto"}),
        }
        for case, (auto_class, batch, options) in cases.items():
            cls = getattr(transformers, auto_class)
            model = cls.from_pretrained("tahoebio/Tahoe-x1", trust_remote_code=True, **options).eval()
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            with torch.no_grad():
                results[case] = model.base_model(**batches[batch]).pooler_output.contiguous()
        for subfolder in ("", "3b"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                "tahoebio/Tahoe-x1", subfolder=subfolder, trust_remote_code=True)
            assert type(tokenizer).__module__.startswith("transformers_modules."), type(tokenizer)
            assert (tokenizer.drug_to_id is None) == (subfolder == "")
        save_file(results, "results.safetensors")
        """,
        tmp_path,
    )
    results, expected = load_file(tmp_path / "results.safetensors"), own(converted["70m"], SMALL)
    for case in ("root", "head", "classifier"):
        assert torch.equal(results[case], expected), case
    assert torch.equal(results["subfolder"], own(converted["3b"], LARGE))
    assert (results["old"] - expected).abs().max() > 0.1
    assert results["bfloat16"].dtype == torch.bfloat16


# Over HTTP ----------------------------------------------------------------------------------------

OVER_HTTP = """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session
    constants.DOWNLOAD_CHUNK_SIZE = 2**14  # a broken download keeps whole pieces of this size
    import torch, transformers
    from safetensors.torch import load_file, save_file
    torch.set_num_threads(1)

    def load():
        model = transformers.AutoModel.from_pretrained("tahoebio/Tahoe-x1", trust_remote_code=True).eval()
        transformers.AutoTokenizer.from_pretrained("tahoebio/Tahoe-x1", trust_remote_code=True)
        return model

    model = load()
    with torch.no_grad():
        result = model(**load_file("small.safetensors")).pooler_output
    save_file({"result": result.contiguous()}, "results.safetensors")
    for step in ("/again", "/new-commit"):
        get_session().get(constants.ENDPOINT + step)
        load()
"""


@pytest.mark.slow
def test_over_http_with_a_broken_connection(
    tmp_path: Path, exported: Path, converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = read_files(exported)
    hub = Hub({REPO_ID: files}, cut={"model.safetensors": 100_000})
    changed = files["config.json"] + b"\n"
    hub.on_request["/new-commit"] = lambda: files.update({"config.json": changed})
    save_file(SMALL.batch("collate_bin"), tmp_path / "small.safetensors")
    with serve(hub):
        online = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_ENDPOINT": hub.url}
        for name, value in online.items():
            monkeypatch.setenv(name, value)
        run_elsewhere(OVER_HTTP, tmp_path, HF_HUB_OFFLINE="0")
    assert torch.equal(load_file(tmp_path / "results.safetensors")["result"], own(converted["70m"], SMALL))
    paths = [request.path for request in hub.requests]
    again, new_commit = paths.index("/again"), paths.index("/new-commit")
    first, second, third = hub.requests[:again], hub.requests[again:new_commit], hub.requests[new_commit:]
    weights = [request for request in first if request.is_download and request.path.endswith("/model.safetensors")]
    size = len(files["model.safetensors"])
    assert [request.status for request in weights] == [200, 206]  # cut, then the rest and no more
    assert weights[0].sent == 100_000
    start = int(weights[1].range.removeprefix("bytes=").partition("-")[0])
    assert 0 < start <= 100_000
    assert weights[1].sent == size - start
    assert not [path for path in paths if "/3b/" in path]
    assert len(second) > 1  # the client asked whether anything is new
    assert sum(request.sent for request in second) == 0  # and fetched nothing
    # A new commit's files with a known ETag are not fetched either.
    assert [request.path for request in third if request.method == "HEAD" and "model.safetensors" in request.path]
    assert sum(request.sent for request in third) == len(changed)


ERRORS = """
    import json, sys, time
    from pathlib import Path
    from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Model, TahoeX1Tokenizer
    from tahoex1_hf.hub.loading import find_model

    def message(function, *arguments, **options):
        try:
            function(*arguments, **options)
        except OSError as error:
            return [type(error).__name__, str(error)]
        return ["", ""]

    load = TahoeX1Model.from_pretrained
    results = {
        "missing": message(load, "tahoebio/missing", subfolder="70m-model"),
        "gated": message(load, "tahoebio/gated", subfolder="70m-model"),
        "gated tokenizer": message(TahoeX1Tokenizer.from_pretrained, "tahoebio/gated"),
        "revision": message(load, "tahoebio/today", subfolder="70m-model", revision="v9"),
        "size": message(load, "tahoebio/today", subfolder="7b"),
        "no size": message(TahoeX1ForPreTraining.from_pretrained, "tahoebio/today"),
        "file": message(load, "tahoebio/broken", subfolder="70m-model"),
        "command": message(find_model, "tahoebio/gated", size="70m"),
        "good": message(load, "tahoebio/today", subfolder="70m-model"),
        "pickle": message(load, "tahoebio/pickled", subfolder="70m-model"),
    }
    Path("server-may-stop").touch()
    while not Path("server-stopped").exists():
        time.sleep(0.05)
    time.sleep = lambda seconds: None  # the client tries again five times, with up to eight seconds in between
    results["network"] = message(load, "tahoebio/new", subfolder="70m-model")
    results["cached"] = message(load, "tahoebio/today", subfolder="70m-model")
    Path("results.json").write_text(json.dumps(results))
"""


@pytest.mark.slow
def test_every_failure_has_its_own_message(tmp_path: Path) -> None:
    today = read_files(todays_repository(tmp_path / "today"))
    broken = {name: content for name, content in today.items() if name != "70m-model/collator_config.yml"}
    # Where there are safetensors, a pickle is not even fetched; otherwise it is used.
    pickled = {name: content for name, content in today.items() if not name.endswith(".safetensors")}
    torch.save({"state": {"model": load_file(SMALL.checkpoint / "model.safetensors")}}, tmp_path / "best-model.pt")
    pickled["70m-model/best-model.pt"] = (tmp_path / "best-model.pt").read_bytes()
    today["70m-model/best-model.pt"] = b"not asked for"
    hub = Hub(
        {"tahoebio/pickled": pickled, "tahoebio/today": today, "tahoebio/broken": broken, "tahoebio/gated": today},
        gated={"tahoebio/gated"},
    )
    online = {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    with serve(hub):
        environment = forked.environment(**online, HF_ENDPOINT=hub.url)
        process = Forked([sys.executable, "-c", textwrap.dedent(ERRORS)], environment, tmp_path)
        while process.poll() is None and not (tmp_path / "server-may-stop").exists():
            time.sleep(0.05)
    (tmp_path / "server-stopped").touch()
    done = process.completed()
    assert done.returncode == 0, done.stderr
    weights = [r for r in hub.requests if r.is_download and r.path.endswith("model.safetensors")]
    pickles = [request.path for request in hub.requests if request.is_download and request.path.endswith(".pt")]
    assert {path.split("/")[2] for path in pickles} == {"pickled"}
    assert not [request for request in weights if "3b-model" in request.path]  # no size but the one asked for
    results = json.loads((tmp_path / "results.json").read_text())
    expected = {
        "missing": ("FileNotFoundError", "no repository tahoebio/missing that you may see"),
        "gated": ("PermissionError", "is gated: ask for access at"),
        "gated tokenizer": ("PermissionError", "is gated"),
        "revision": ("FileNotFoundError", "has no revision 'v9'"),
        "size": ("FileNotFoundError", "has no size '7b'; it has the sizes 3b, 70m"),
        "no size": ("FileNotFoundError", "has no model at its root; it has the sizes 3b, 70m"),
        "file": ("FileNotFoundError", "collator_config.yml is missing"),
        "command": ("PermissionError", "is gated"),
        "network": ("ConnectionError", "could not be reached"),
        "good": ("", ""),
        "pickle": ("", ""),
        "cached": ("", ""),
    }
    for case, (kind, text) in expected.items():
        assert results[case][0] == kind, (case, results[case])
        assert text in results[case][1], (case, results[case])


# Today's layout -----------------------------------------------------------------------------------


def test_todays_layout(hf_home: Path, converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = TahoeX1Model.from_pretrained(REPO_ID, subfolder="70m-model")
    assert torch.equal(embed(model, SMALL), own(converted["70m"], SMALL))
    commit = commit_of(read_files(hf_home.parent / "today"))
    assert [path.parent.name for path in translations(hf_home)] == [commit]
    stamp = translations(hf_home)[0].lstat().st_mtime_ns
    monkeypatch.setattr(model_loading, "translate_folder", lambda *a: pytest.fail("translated again"))
    # The other ways of loading find the translation; the size may be spelt as in the new layout.
    for subfolder in ("70m", "70m-model"):
        head, report = TahoeX1ForPreTraining.from_pretrained(
            REPO_ID, subfolder=subfolder, revision="main", dtype=torch.float64, output_loading_info=True
        )
        assert not any(report.values())
        assert head.dtype == torch.float64
    tokenizer = TahoeX1Tokenizer.from_pretrained(REPO_ID, subfolder="70m")
    assert tokenizer.get_vocab() == TahoeX1Tokenizer.from_pretrained(converted["70m"]).get_vocab()
    config = TahoeX1Config.from_pretrained(converted["70m"])
    explicit = TahoeX1Model.from_pretrained(REPO_ID, subfolder="70m-model", config=config)
    assert torch.equal(embed(explicit, SMALL), embed(model, SMALL))
    load_model_and_tokenizer(REPO_ID, size="70m")
    assert [path.lstat().st_mtime_ns for path in translations(hf_home)] == [stamp]
    assert [path.name for path in translations(hf_home)[0].parents[1].glob(".*")] == []


def test_todays_layout_with_drugs_and_in_a_folder(hf_home: Path, converted: dict[str, Path]) -> None:
    tokenizer = TahoeX1Tokenizer.from_pretrained(REPO_ID, subfolder="3b-model")
    assert tokenizer.drug_to_id == TahoeX1Tokenizer.from_pretrained(converted["3b"]).drug_to_id
    assert torch.equal(
        embed(TahoeX1Model.from_pretrained(REPO_ID, subfolder="3b-model"), LARGE), own(converted["3b"], LARGE)
    )
    assert len(translations(hf_home)) == 1
    local = TahoeX1Model.from_pretrained(hf_home.parent / "today", subfolder="70m-model")
    direct = TahoeX1Model.from_pretrained(str(hf_home.parent / "today" / "70m-model"))
    assert torch.equal(embed(local, SMALL), embed(direct, SMALL))
    assert len(translations(hf_home)) == 2
    with pytest.raises(FileNotFoundError, match="has no model at its root; it has the sizes 3b, 70m"):
        TahoeX1Tokenizer.from_pretrained(hf_home.parent / "today")
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        TahoeX1Model.from_pretrained("tahoebio/elsewhere", subfolder="70m-model")


def test_other_models_are_left_to_transformers(tmp_path: Path, hf_home: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="it holds no Tahoe-x1 model"):
        TahoeX1Model.from_pretrained(tmp_path / "empty")
    with pytest.raises((OSError, ValueError)):
        TahoeX1Model.from_pretrained("no-such-folder")
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(REPO_ID, subfolder="70m-model")  # it looks for config.json
    assert not translations(hf_home)


def test_weights_are_loaded_where_they_are(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are views of the published file: nothing is copied on disk, and in memory only a transposed matrix."""
    folder = hf_home.parent / "today" / "70m-model"
    model = TahoeX1ForPreTraining.from_pretrained(folder)
    (link,) = translations(hf_home)
    assert link.resolve() == folder / "model.safetensors"
    assert not copies(hf_home)
    assert names_in_memory(model, folder / "model.safetensors") == {"cell_decoder.cell_proj.weight"}
    # After the weights have moved or changed, the translation is made anew and the present weights are loaded.
    before = embed(model, SMALL)
    moved = folder.rename(folder.with_name("moved"))
    assert torch.equal(embed(TahoeX1Model.from_pretrained(moved), SMALL), before)
    moved.rename(folder)
    tensors = load_file(folder / "model.safetensors")
    norm = "model.transformer_encoder.norm.weight"
    save_file({**tensors, norm: 2 * tensors[norm]}, folder / "model.safetensors", {"format": "pt"})
    assert (embed(TahoeX1Model.from_pretrained(folder), SMALL) - before).abs().max() > 0.1


def test_a_copy_of_an_earlier_version_is_not_read(hf_home: Path) -> None:
    """Until version 0.1.0 the cache held converted copies, in another folder."""
    before = embed(TahoeX1Model.from_pretrained(REPO_ID, subfolder="70m-model"), SMALL)
    (link,) = translations(hf_home)
    old = hf_home / "tahoex1_hf" / "converted" / link.parent.relative_to(hf_home / "tahoex1_hf" / "translated")
    old = Path(str(old).replace("--v2", "--v1"))
    old.mkdir(parents=True)
    (old / "config.json").write_text("{}")
    (old / "model.safetensors").write_bytes(b"of an earlier version")
    assert torch.equal(embed(TahoeX1Model.from_pretrained(REPO_ID, subfolder="70m-model"), SMALL), before)


def test_a_wrong_name_is_never_loaded_as_random_weights(hf_home: Path) -> None:
    path = hf_home.parent / "today" / "70m-model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.flag_enc.weight"] = tensors.pop("model.flag_encoder.weight")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"(?s)missing: model\.flag_encoder.*unexpected: model\.flag_enc\.weight"):
        TahoeX1Model.from_pretrained(path.parent)
    assert not translations(hf_home)


def test_a_pickle_is_converted_into_the_cache(hf_home: Path) -> None:
    folder = hf_home.parent / "today" / "70m-model"
    before = embed(TahoeX1Model.from_pretrained(folder), SMALL)
    torch.save({"state": {"model": load_file(folder / "model.safetensors")}}, folder / "best-model.pt")
    (folder / "model.safetensors").unlink()
    assert torch.equal(embed(TahoeX1Model.from_pretrained(folder), SMALL), before)
    assert len(copies(hf_home)) == 1


@pytest.mark.parametrize("model_class", [TahoeX1Model, TahoeX1ForPreTraining, TahoeX1ForSequenceClassification])
def test_weights_loaded_from_the_original_are_saved_under_our_names(
    model_class: type, hf_home: Path, tmp_path: Path
) -> None:
    model = model_class.from_pretrained(REPO_ID, subfolder="70m-model")
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    again, report = model_class.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(embed(again.base_model, SMALL), embed(model.base_model, SMALL))


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_adapters_on_weights_of_the_original(way: str, hf_home: Path, tmp_path: Path) -> None:
    """PEFT reads the registered rules too: neither its names nor those of a merged model may change."""
    peft = pytest.importorskip("peft")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(TahoeX1Model.from_pretrained(REPO_ID, subfolder="70m-model"), settings)
    expected = embed(adapted, SMALL)
    adapted.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert names == {
        f"base_model.model.layers.{layer}.{block}.{module}.lora_{side}.weight"
        for layer in range(adapted.config.num_hidden_layers)
        for module in modules
        for side in "AB"
        for block in ["mlp" if module in ("up_proj", "down_proj") else "self_attn"]
    }
    base = TahoeX1Model.from_pretrained(REPO_ID, subfolder="70m-model")
    if way == "peft":
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.equal(embed(model, SMALL), expected)
        model = model.merge_and_unload()
    else:
        model = base
        try:
            model.load_adapter(tmp_path / "adapter")
            assert torch.equal(embed(model, SMALL), expected)
            model.save_pretrained(tmp_path / "again")  # transformers saves only the adapter of such a model
        except ValueError as error:
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(f"transformers {transformers.__version__} and this PEFT do not go together: {error}")
        again = load_file(tmp_path / "again" / "adapter_model.safetensors")
        assert again.keys() == names
        return
    model.save_pretrained(tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == base.base_model.state_dict().keys() == TahoeX1Model(base.config).state_dict().keys()
    assert (embed(TahoeX1Model.from_pretrained(tmp_path / "merged"), SMALL) - expected).abs().max() < 1e-5


def test_a_failed_translation_leaves_nothing(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(model_loading, "translate_folder", fail)
        with pytest.raises(OSError, match="disk full"):
            TahoeX1Model.from_pretrained(REPO_ID, subfolder="70m-model")
    left = [path for path in (hf_home / "tahoex1_hf").rglob("*") if path.is_file()]
    assert all(path.suffix == ".lock" for path in left)
    TahoeX1Model.from_pretrained(REPO_ID, subfolder="70m-model")


PROCESS = """
    import os, signal, sys, time
    from pathlib import Path
    from huggingface_hub import constants
    from tahoex1_hf import TahoeX1Model
    from tahoex1_hf.hub import translated as model_loading

    translate, role, constants.HF_HOME = model_loading.translate_folder, *sys.argv[1:]
    constants.HF_HUB_CACHE = constants.HF_HOME + "/hub"

    def slowly(source, folder):
        with open("translations", "a") as file:
            file.write(role + "\\n")
        if role == "killed":
            (folder / "config.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        return translate(source, folder)

    model_loading.translate_folder = slowly
    Path("ready-" + role).touch()
    while role != "killed" and not (Path("ready-one").exists() and Path("ready-two").exists()):
        time.sleep(0.01)
    TahoeX1Model.from_pretrained("tahoebio/Tahoe-x1", subfolder="70m-model")
"""


@pytest.mark.slow
def test_two_processes_at_once_after_one_was_killed(tmp_path: Path, hf_home: Path) -> None:
    def start(role: str) -> Forked:
        return Forked([sys.executable, "-c", textwrap.dedent(PROCESS), role, hf_home], cwd=tmp_path)

    assert start("killed").wait() == -9
    assert not translations(hf_home)
    processes = [start(role) for role in ("one", "two")]
    for done in (process.completed() for process in processes):
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "translations").read_text().splitlines()[0] == "killed"
    assert len((tmp_path / "translations").read_text().splitlines()) == 2  # one of the two waited for the other
    assert len(translations(hf_home)) == 1
    assert not list((hf_home / "tahoex1_hf").rglob("*.partial"))
