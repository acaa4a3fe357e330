"""rayjob.yaml and raycronjob.yaml against KubeRay's CRDs, and against what those cannot say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.files import complaints, crd_validator, of_kind
from tests.cluster.rules import MAX_NAME_LENGTH, broken_rules

KINDS = {"RayJob": "rayjobs", "RayCronJob": "raycronjobs"}
Change = Callable[[dict[str, Any]], object]


def worker(spec: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    return group


def pod(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = worker(spec)["template"]["spec"]
    return found


def rules(spec: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = spec["deletionStrategy"]["deletionRules"]
    return found


def rule(spec: dict[str, Any]) -> dict[str, Any]:
    return rules(spec)[0]


def head(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_crd_accepts_it(kind: str) -> None:
    assert complaints(crd_validator(KINDS[kind]), of_kind(kind)) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda spec: spec.update(deletionPolicy="DeleteCluster"), "deletionPolicy"),
        (lambda spec: spec["deletionStrategy"].update(deletionRules=[]), "deletionRules"),
        (lambda spec: rule(spec).update(policy="DeleteAll"), "DeleteAll"),
        (lambda spec: rule(spec)["condition"].update(jobStatus="STOPPED"), "STOPPED"),
        (lambda spec: rule(spec)["condition"].update(ttlSeconds=-1), "ttlSeconds"),
        (lambda spec: spec.update(backoffLimit="2"), "backoffLimit"),
        (lambda spec: spec["rayClusterSpec"].update(authOptions={"mode": "on"}), "mode"),
        (lambda spec: spec["rayClusterSpec"].update(authOption={}), "authOption"),
        (lambda spec: worker(spec).update(maxReplica=3), "maxReplica"),
        (lambda spec: worker(spec).pop("maxReplicas"), "maxReplicas"),
        (lambda spec: pod(spec).update(toleration=[]), "toleration"),
        (lambda spec: pod(spec)["containers"][0].update(resource={}), "resource"),
    ],
)
def test_the_crd_refuses_a_slip(change: Change, field: str) -> None:
    """The API server would drop an unknown field and say nothing, or refuse a wrong type."""
    job = of_kind("RayJob")
    change(job["spec"])
    (found,) = complaints(crd_validator("rayjobs"), job)
    assert field in found


def test_no_rule_is_broken() -> None:
    assert broken_rules(of_kind("RayJob")["spec"]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda spec: spec.update(submissionMode="K8SJobMode"), "submissionMode"),
        (lambda spec: spec.pop("deletionStrategy"), "the cluster would stay"),
        (lambda spec: rules(spec).pop(), "after deployment Failed the cluster would stay"),
        (lambda spec: spec.update(shutdownAfterJobFinishes=True), "shutdownAfterJobFinishes"),
        (lambda spec: spec.update(ttlSecondsAfterFinished=600), "ttlSecondsAfterFinished"),
        (lambda spec: rule(spec)["condition"].update(ttlSeconds=86400), "ttlSeconds"),
        (lambda spec: rules(spec).append(rule(spec)), "two rules"),
        (
            lambda spec: rules(spec).append({"policy": "DeleteSelf", "condition": {"jobStatus": "STOPPED"}}),
            "policy DeleteSelf",
        ),
        (lambda spec: spec.update(backoffLimit=0), "backoffLimit"),
        (lambda spec: spec.update(backoffLimit=9), "backoffLimit"),
        (lambda spec: spec.pop("activeDeadlineSeconds"), "activeDeadlineSeconds"),
        (lambda spec: spec["rayClusterSpec"].pop("authOptions"), "authOptions"),
        (lambda spec: spec["rayClusterSpec"].update(rayVersion="2.51.0"), "rayVersion"),
        (
            lambda spec: head(spec)["containers"][0]["env"].append(
                {"name": "RAY_AUTH_MODE", "value": "disabled"}
            ),
            "RAY_AUTH_MODE",
        ),
        (lambda spec: spec.update(entrypoint=spec["entrypoint"] + " || true"), "shell syntax"),
        (lambda spec: spec.update(entrypoint=spec["entrypoint"] + " --kep 0.3"), "kep"),
        (lambda spec: spec.update(entrypoint="python /opt/ffsplit/jobs/nothing.py"), "no such job"),
        (lambda spec: spec.update(entrypoint="ffsplit compress"), "jobs/"),
        (
            lambda spec: spec.update(entrypoint="python /opt/ffsplit/jobs/compress.py m --out here"),
            "absolute",
        ),
        (lambda spec: pod(spec)["containers"][0]["resources"]["requests"].pop("cpu"), "requests no cpu"),
        (lambda spec: pod(spec)["containers"][0]["resources"]["limits"].pop("nvidia.com/gpu"), "GPUs"),
        (
            lambda spec: head(spec)["containers"][0]["resources"]["limits"].update({"nvidia.com/gpu": "1"}),
            "GPUs are for workers",
        ),
        (
            lambda spec: pod(spec)["containers"][0]["resources"]["limits"].update({"nvidia.com/gpu": "0.5"}),
            "0.5 GPUs",
        ),
        (lambda spec: worker(spec).update(replicas=9), "maxReplicas"),
        (lambda spec: worker(spec).update(minReplicas=0), "minReplicas"),
        (lambda spec: pod(spec).update(restartPolicy="Always"), "restartPolicy"),
        (lambda spec: pod(spec)["tolerations"].pop(0), "tolerate"),
        (lambda spec: pod(spec).pop("nodeSelector"), "spot nodes"),
        (lambda spec: head(spec).update(tolerations=[{"key": "spot"}]), "driver away"),
        (lambda spec: head(spec)["securityContext"].pop("runAsNonRoot"), "root"),
        (lambda spec: pod(spec).pop("automountServiceAccountToken"), "token"),
        (lambda spec: head(spec)["containers"][0].update(image="ffsplit:other"), "images differ"),
    ],
)
def test_every_rule_bites(change: Change, said: str) -> None:
    spec = of_kind("RayJob")["spec"]
    change(spec)
    found = broken_rules(spec)
    assert found, f"nothing was said about {said}"
    assert all(said in complaint for complaint in found), found


def test_both_schedules_run_the_same_job() -> None:
    job, cron, timer = of_kind("RayJob"), of_kind("RayCronJob"), of_kind("CronJob")
    assert cron["spec"]["jobTemplate"] == job["spec"]
    assert cron["spec"]["schedule"] == timer["spec"]["schedule"]
    assert cron["spec"]["timeZone"] == timer["spec"]["timeZone"]
    assert len(cron["metadata"]["name"]) + len("-0123456789") <= MAX_NAME_LENGTH
