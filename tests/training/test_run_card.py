"""Test the card of a pretraining run, and its upload to the Hub."""

import re
from pathlib import Path

import forked
import pytest
from hub_server import Hub, serve
from training_runs import ROOT, command, environment

from tahoex1_hf.hub.cards.facts import load_facts

# tests/hub/test_export.py starts the process that loads an export without the package as a user's command does.
PUSHED = ROOT / "tests" / "support" / "pushed_run.py"


@pytest.mark.slow
def test_a_run_is_pushed_with_its_card(training_dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    hub, run = Hub(), tmp_path / "mine"
    arguments = command("single", run, training_dataset, PUSHED, baselines="true", max_steps=3)
    with serve(hub):
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
        done = forked.run(
            [*arguments, "--push-to-hub", "someone/mine"],
            {**environment("single"), **forked.stand_in(), **online, "HF_HOME": str(tmp_path / "hf_home")},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    uploaded = hub.repos["someone/mine"]
    assert {"README.md", "config.json", "model.safetensors", "vocab.json", "modeling_tahoe_x1.py"} <= uploaded.keys()
    # Files that belong to the run alone are not uploaded.
    assert not [name for name in uploaded if "checkpoint" in name or "status" in name or "trainer" in name]
    assert uploaded["model.safetensors"] == (run / "model.safetensors").read_bytes()
    text = uploaded["README.md"].decode()
    assert "It is not the released Tahoe-x1." in text
    numbers = re.search(r"(\d+) to train on, (\d+) held out", text)
    assert numbers is not None
    assert int(numbers[1]) + int(numbers[2]) == 100
    assert "3 steps; AdamW" in text
    assert "a constant per gene: its mean bin" in text
    assert "someone/mine" in text
    facts = load_facts(run / "card.yaml")
    assert facts.shape.hidden_size == 32
    assert facts.recipe[0].cells_per_step == 8
