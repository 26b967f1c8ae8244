"""Accelerate configurations and launchers work, as far as a machine without a cluster can show."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from forked import PATIENCE
from safetensors.torch import load_file
from training_runs import ROOT, command, environment, free_port

from tahoex1_hf import TahoeX1ForPreTraining

CONFIGS = sorted((ROOT / "examples" / "configs" / "accelerate").glob("*.yaml"))
LAUNCH = ROOT / "examples" / "launch"
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # which restarted processes need, see test_several_processes.py


def test_every_arrangement_has_its_file() -> None:
    names = {"cpu", "single_gpu", "ddp", "fsdp2", "fsdp2_multinode", "hsdp", "fp8_fsdp2"}
    assert {path.stem for path in CONFIGS} == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path: Path) -> None:
    config = load_config_from_file(str(path))  # raises on unknown keys of the first level
    options = {action.dest for action in launch_command_parser()._actions}
    inner = {**config.fsdp_config, **config.parallelism_config}
    fp8 = {f"fp8_{key}" for key in config.fp8_config}
    assert set(inner) | fp8 <= options
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in TahoeX1ForPreTraining._no_split_modules
    else:
        assert not config.fsdp_config
    if path.stem == "hsdp":
        sizes = config.parallelism_config
        assert sizes["parallelism_config_dp_shard_size"] * sizes["parallelism_config_dp_replicate_size"] == 64
    assert config.num_processes % config.num_machines == 0


@pytest.mark.parametrize("name", ["slurm.sbatch", "ssh_nodes.sh"])
def test_scripts(name: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    assert os.access(LAUNCH / name, os.X_OK)
    lines = (LAUNCH / name).read_text().splitlines()
    assert any(f"{OWN_STORE}=1" in line for line in lines if not line.startswith("#"))
    shellcheck = shutil.which("shellcheck")
    if shellcheck:
        subprocess.run([shellcheck, str(LAUNCH / name)], check=True)


def test_kubernetes_manifest_agrees_with_itself() -> None:
    manifest: dict[str, Any] = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    nodes = spec["parallelism"]
    assert spec["completions"] == nodes
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    words = container["args"][0].split()
    given = {word: words[place + 1] for place, word in enumerate(words) if word.startswith("--")}
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert given["--num_machines"] == str(nodes)
    assert given["--num_processes"] == str(nodes * gpus)
    name = manifest["metadata"]["name"]
    assert given["--main_process_ip"] == f"{name}-{job['name']}-0-0.{name}"  # the name that JobSet gives the first pod
    assert given["--main_process_port"] == str(container["ports"][0]["containerPort"])
    assert (ROOT / given["--config_file"]).is_file()
    # The launcher's own limit, after which it kills, must leave a checkpoint the time that the pod has.
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert 30 < int(variables.pop("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")) < pod["terminationGracePeriodSeconds"]
    assert variables == {OWN_STORE: "1"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # Kubernetes' own part is checked by its schema; no registry of packages has JobSet's.
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}
    kubernetes_validate.validate(whole, "1.30", strict=True)


def test_two_nodes_on_loopback(finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path) -> None:
    """ssh_nodes.sh starts two launchers that meet, with a stand-in for ssh that runs the command here."""
    without_dropout = {"model__expression_encoder_dropout": 0.0}
    single = finished_run("single", **without_dropout)
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/bash\nshift\nexec bash -c "$*"\n')
    ssh.chmod(0o755)
    settings = command("single", tmp_path / "nodes", training_dataset, **without_dropout)[2:]
    changes = {
        "HOSTS": "one two",
        "GPUS": "1",
        "SSH": str(ssh),
        "ACCELERATE": f"{forked.server().python} -m accelerate.commands.accelerate_cli",
        "MAIN_IP": "127.0.0.1",
        "PORT": str(free_port()),
        "LAUNCH_OPTIONS": "--multi_gpu",
    }
    done = subprocess.run(
        [str(LAUNCH / "ssh_nodes.sh"), *settings],
        cwd=ROOT,
        env={**environment("ddp"), **forked.stand_in(), **changes},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "nodes", single))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-4)
