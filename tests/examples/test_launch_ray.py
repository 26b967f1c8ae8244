"""What starts a Ray cluster's job agrees with itself, with the command and with the schemas that can be had here."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import REPO_ROOT
from typer.core import TyperGroup
from typer.main import get_command

from tahoex1_hf.cli.app import app

LAUNCH = REPO_ROOT / "examples" / "launch"
PIN = re.search(r"^ray==(\S+)$", (REPO_ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
GROUP = get_command(app)
# The fields of KubeRay's definition of a RayJob (1.7) that ours may use, by their places. No registry of packages has
# that definition; the pods in it are held against Kubernetes' own schema.
FIELDS: dict[str, dict[str, type]] = {
    "spec": {"entrypoint": str, "backoffLimit": int, "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int,
             "rayClusterSpec": dict},
    "cluster": {"rayVersion": str, "enableInTreeAutoscaling": bool, "autoscalerOptions": dict, "headGroupSpec": dict,
                "workerGroupSpecs": list},
    "head": {"rayStartParams": dict, "template": dict},
    "workers": {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "rayStartParams": dict,
                "template": dict},
}  # fmt: skip


def options_of(words: list[str]) -> dict[str, Any]:
    """Parse a command line of tahoex1 as the command does; return its options."""
    assert words[0] == "tahoex1"
    assert isinstance(GROUP, TyperGroup)
    return GROUP.commands[words[1]].make_context(words[1], words[2:]).params


def stand_ins(folder: Path, **programs: str) -> dict[str, str]:
    """Write programs that stand for those of a cluster; return the environment in which they are found."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}


def calls(environment: dict[str, str]) -> list[list[str]]:
    """Return what the stand-ins were called with, a word a line, calls parted by an empty line."""
    return [call.splitlines() for call in Path(environment["CALLS"]).read_text().split("\n\n") if call]


NOTE = 'printf "%s\\n" "${0##*/}" "$@" "" >> "$CALLS"'


def has(value: dict[str, Any], fields: dict[str, type]) -> None:
    assert {name: type(each) for name, each in value.items()} == {name: fields[name] for name in value}


def test_a_rayjob_agrees_with_itself_and_with_kubernetes() -> None:
    job = yaml.safe_load((LAUNCH / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    for value, name in (
        (job["spec"], "spec"),
        (cluster, "cluster"),
        (cluster["headGroupSpec"], "head"),
        (workers, "workers"),
    ):
        has(value, FIELDS[name])
    given = options_of(job["spec"]["entrypoint"].split())
    gpus = workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert given["ray"] == "auto"
    assert (given["min_workers"], given["max_workers"]) == (workers["minReplicas"], workers["maxReplicas"] * gpus)
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    images = set()
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert all(str(path).startswith(mounts["data"]) for path in (given["output"], *given["sources"]))
        assert all(isinstance(each, str) for each in group["rayStartParams"].values())  # KubeRay takes texts alone
        kubernetes_validate = pytest.importorskip("kubernetes_validate")
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(whole, "1.30", strict=True)
    assert len(images) == 1


def test_all_machines_have_the_same_ray() -> None:
    assert PIN is not None
    job = yaml.safe_load((LAUNCH / "rayjob.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == PIN[1]
    assert f"'ray[data,default]=={PIN[1]}'" in (LAUNCH / "ray.Dockerfile").read_text()


def test_the_slurm_job_starts_one_cluster_and_one_command(tmp_path: Path) -> None:
    script = LAUNCH / "ray_slurm.sbatch"
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(script)], check=True)
    environment = stand_ins(tmp_path, scontrol='printf "node7\\nnode8\\n"', srun=NOTE)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "65432", "SLURM_JOB_NUM_NODES": "2"}
    arguments = ["embed", "my atlas/", "out.parquet", "--model", "DIR"]
    subprocess.run([str(script), *arguments], env={**environment, **slurm}, check=True)
    (srun,) = calls(environment)
    place = srun.index("--")
    assert srun[:place] == [
        *("srun", "--kill-on-bad-exit=1", "ray", "symmetric-run"),
        *("--address", "node7:25432", "--min-nodes", "2"),
    ]
    given = options_of(srun[place + 1 :])
    assert given["ray"] == "node7:25432"
    assert [str(each) for each in given["sources"]] == ["my atlas/"]
    pytest.importorskip("ray")
    from ray.scripts.symmetric_run import symmetric_run

    known = {name for parameter in symmetric_run.params for name in parameter.opts}
    assert {"--address", "--min-nodes"} <= known
    alone = subprocess.run([str(script)], env={**environment, **slurm}, check=False, capture_output=True, text=True)
    assert "name a command of tahoex1" in alone.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_machine_of_skypilot_joins_the_cluster(rank: str, tmp_path: Path) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    ray = NOTE + '\ntest -e "$CALLS.once" || { touch "$CALLS.once"; exit "$FIRST"; }'
    environment = stand_ins(tmp_path, ray=ray, tahoex1=NOTE)
    given = {**task["envs"], "BUCKET": "mine", "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NODE_RANK": rank}
    fails_once = "1" if rank == "1" else "0"  # the head is not there yet
    environment |= {**given, "FIRST": fails_once}
    subprocess.run(["bash", "-c", task["run"].replace("sleep 5", "sleep 0")], env=environment, check=True)
    found = calls(environment)
    if rank == "0":
        start, command = found
        assert start[:2] == ["ray", "start"]
        assert start[start.index("--port") + 1] == "6379"
        options = options_of(command)
        assert options["ray"] == "10.0.0.5:6379"
        assert options["output"] == "s3://mine/embeddings.parquet"
    else:
        assert found == [["ray", "start", "--address", "10.0.0.5:6379", "--disable-usage-stats"]] * 2
    assert "ray stop" not in task["run"]


def test_skypilot_takes_the_task() -> None:
    sky = pytest.importorskip("sky", reason="skypilot is not among our packages: pip install skypilot")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    assert task.num_nodes == 4
    assert all(resources.use_spot for resources in task.resources)
