"""The CronJob, its accounts and what kustomize makes of them, against Kubernetes' own schemas."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ffsplit.zoo.zoo_file import load_zoo
from tests.cluster.files import CLUSTER, KUBERNETES, documents, kubernetes_objects, of_kind

PLAIN = [each for each in kubernetes_objects() if not each["apiVersion"].startswith(("ray.io", "kustomize"))]
KUSTOMIZATION = documents(KUBERNETES / "kustomization.yaml")[0]


@pytest.mark.parametrize("version", ["1.31", "1.34"])
@pytest.mark.parametrize("found", PLAIN, ids=lambda each: f"{each['kind']}/{each['metadata']['name']}")
def test_kubernetes_accepts_it(found: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(found, version, strict=True)


def test_the_schemas_refuse_a_slip() -> None:
    cron = of_kind("CronJob")
    cron["spec"]["concurencyPolicy"] = cron["spec"].pop("concurrencyPolicy")
    with pytest.raises(kubernetes_validate.ValidationError, match="concurencyPolicy"):
        kubernetes_validate.validate(cron, "1.34", strict=True)


def pod() -> dict[str, Any]:
    found: dict[str, Any] = of_kind("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return found


def test_two_batches_never_meet() -> None:
    """Forbid looks at Jobs, so the Job has to last as long as its RayJob, whatever becomes of its pods."""
    cron, rayjob = of_kind("CronJob")["spec"], of_kind("RayJob")["spec"]
    job = cron["jobTemplate"]["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    attempts = rayjob["backoffLimit"] + 1
    assert job["activeDeadlineSeconds"] > attempts * rayjob["activeDeadlineSeconds"]
    actions = {rule["action"] for rule in job["podFailurePolicy"]["rules"]}
    assert actions == {"Ignore", "FailJob"}
    assert pod()["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    names = {
        variable["name"]: variable["valueFrom"]["fieldRef"] for variable in pod()["containers"][0]["env"]
    }
    assert names["JOB_NAME"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"
    assert names["JOB_UID"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/controller-uid']"
    assert (
        job["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] == pod()["containers"][0]["name"]
    )


def test_no_batch_is_lost() -> None:
    """One that is due while another runs starts when that one has ended, but before the next is due."""
    cron = of_kind("CronJob")["spec"]
    minute, hour, *rest = cron["schedule"].split()
    assert minute.isdecimal() and hour.isdecimal() and rest == ["*"] * 3, "every day at one time"
    longest = cron["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert longest < cron["startingDeadlineSeconds"] < 24 * 3600
    assert cron["timeZone"] == "Etc/UTC", "elsewhere a night may have the hour twice, or not at all"
    assert not cron.get("suspend")


def test_the_schedule_may_create_rayjobs_and_no_more() -> None:
    role, binding = of_kind("Role"), of_kind("RoleBinding")
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (subject,) = binding["subjects"]
    assert subject["name"] == pod()["serviceAccountName"]
    assert subject["namespace"] == KUSTOMIZATION["namespace"] == of_kind("RayJob")["metadata"]["namespace"]


def test_every_account_exists_and_the_schedules_has_no_role_in_the_cloud() -> None:
    accounts = {each["metadata"]["name"]: each for each in PLAIN if each["kind"] == "ServiceAccount"}
    cluster = of_kind("RayJob")["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    used = {each["template"]["spec"]["serviceAccountName"] for each in pods}
    assert {*used, pod()["serviceAccountName"]} == set(accounts)
    for name, account in accounts.items():
        annotations = account["metadata"].get("annotations", {})
        assert ("eks.amazonaws.com/role-arn" in annotations) == (name in used)


def test_what_is_mounted_is_what_kustomize_makes() -> None:
    made = {each["name"]: each["files"] for each in KUSTOMIZATION["configMapGenerator"]}
    assert KUSTOMIZATION["generatorOptions"]["disableNameSuffixHash"] is True
    head = of_kind("RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounted = [
        volume["configMap"]["name"]
        for each in (pod(), head)
        for volume in each["volumes"]
        if "configMap" in volume
    ]
    assert sorted(mounted) == sorted(made)
    command = pod()["containers"][0]["command"]
    (mount,) = pod()["containers"][0]["volumeMounts"]
    paths = {f"{mount['mountPath']}/{name}" for name in made[pod()["volumes"][0]["configMap"]["name"]]}
    assert set(command[1:]) == paths
    for name in [*KUSTOMIZATION["resources"], *(file for files in made.values() for file in files)]:
        assert (KUBERNETES / name).is_file()


def test_the_batch_reads_a_zoo_file_that_is_mounted_and_right() -> None:
    spec = of_kind("RayJob")["spec"]
    cluster = spec["rayClusterSpec"]
    path = spec["entrypoint"].split()[-1]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    mounts = {mount["mountPath"]: mount["name"] for mount in head["volumeMounts"]}
    folder, _, name = path.rpartition("/")
    assert mounts[folder] == "zoo"
    assert name in {file for made in KUSTOMIZATION["configMapGenerator"] for file in made["files"]}
    zoo = load_zoo(str(KUBERNETES / name))
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert all(0 < model.job.gpus_per_worker <= gpus for model in zoo.models)


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("zoo.yaml")), ids=lambda path: path.parent.name)
def test_a_zoo_stays_where_the_policy_lets_it(path: Path) -> None:
    zoo = load_zoo(str(path))
    assert zoo.destination == "s3://example-models/zoo"
    for model in zoo.models:
        read = [model.job.model, *model.job.calibration, *model.job.eval]
        assert all(uri.startswith("s3://example-models/originals/") for uri in read)


def test_one_image_for_everything() -> None:
    cluster = of_kind("RayJob")["spec"]["rayClusterSpec"]
    assert (
        pod()["containers"][0]["image"]
        == cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    )
    assert "ray.io" in of_kind("RayJob")["apiVersion"]


@pytest.mark.subprocess
def test_kubectl_renders_it() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here")
    done = subprocess.run(
        [kubectl, "kustomize", str(KUBERNETES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    assert {each["metadata"].get("namespace") for each in rendered} == {KUSTOMIZATION["namespace"]}
    (schedule,) = (
        each for each in rendered if each["metadata"]["name"] == "ffsplit-schedule" and "data" in each
    )
    assert yaml.safe_load(schedule["data"]["rayjob.yaml"])["spec"] == of_kind("RayJob")["spec"]
