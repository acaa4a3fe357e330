"""What makes a RayJob work, or safe, that its CRD cannot say. A rule returns what is wrong."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from ffsplit.cli.entry import build_parser
from ffsplit.errors import ConfigError
from tests.cluster.files import ROOT, constraint

SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
MAX_NAME_LENGTH = 47  # KubeRay puts more behind it
SHELL_SYNTAX = re.compile(r"[;&|<>`$(){}*?\[\]\\!#~\n]")


def pods(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod of a RayJob's spec, by what it is."""
    cluster = spec["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]
    yield "submitter", spec["submitterPodTemplate"]["spec"]


def containers(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, pod in pods(spec):
        yield from ((name, container) for container in pod["containers"])


def lifetime(spec: dict[str, Any]) -> Iterator[str]:
    """The cluster goes when the job is done, and no failure costs without end."""
    if spec.get("submissionMode") not in SUBMISSION_MODES:
        yield f"submissionMode {spec.get('submissionMode')}: KubeRay knows {', '.join(SUBMISSION_MODES)}"
    yield from deletion(spec)
    if spec.get("backoffLimit") not in (1, 2):
        yield "backoffLimit: a lost head must cost one more cluster, a user's mistake not many"
    if not spec.get("activeDeadlineSeconds"):
        yield "activeDeadlineSeconds: a batch that hangs would cost for ever"
    if spec.get("suspend"):
        yield "suspend: it would not run"


def deletion(spec: dict[str, Any]) -> Iterator[str]:
    """Whatever the job's end, the cluster goes soon, and the RayJob stays: the schedule's pod reads it.

    The operator refuses rules beside shutdownAfterJobFinishes, two rules of one policy and condition, and
    workers that go before an autoscaled cluster does. It does so when the RayJob exists already.
    """
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    for field in ("shutdownAfterJobFinishes", "ttlSecondsAfterFinished"):
        if rules and field in spec:
            yield f"{field}: deletionRules take its place"
    ends: dict[str, int] = {}
    for rule in rules:
        condition = rule["condition"]
        end = str(condition.get("jobStatus") or f"deployment {condition.get('jobDeploymentStatus')}")
        if rule["policy"] != "DeleteCluster":
            yield f"policy {rule['policy']}: the whole cluster goes, and nothing else"
        elif end in ends:
            yield f"{end}: two rules"
        ends[end] = condition.get("ttlSeconds", 0)
    for end in ("SUCCEEDED", "FAILED", "deployment Failed"):
        if end not in ends:
            yield f"deletionRules: after {end} the cluster would stay, and cost"
        elif not 0 < ends[end] <= 3600:
            yield f"ttlSeconds after {end}: some time to look, an hour at most"


def authentication(spec: dict[str, Any]) -> Iterator[str]:
    cluster = spec["rayClusterSpec"]
    options = cluster.get("authOptions", {})
    if options.get("mode") != "token":
        yield "authOptions.mode: token"
    if options.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not for RayJobs"
    if cluster.get("rayVersion") != constraint("ray"):
        yield f"rayVersion: {constraint('ray')}, by cluster/constraints.txt; authOptions need it"
    for name, container in containers(spec):
        for variable in container.get("env", []):
            if variable["name"].startswith("RAY_AUTH"):
                yield f"{name}: {variable['name']} is KubeRay's to set"


def entrypoint(spec: dict[str, Any]) -> Iterator[str]:
    """A job of the image, with flags that its own parser takes, and no shell in between.

    KubeRay pastes the entrypoint into a shell line: of `job.py || true` the submitter would run `true`,
    and the job's exit code would be what it is either way. Codes 2 and 3 fail the job like any other.
    """
    command = spec["entrypoint"]
    if SHELL_SYNTAX.search(command.strip()):
        yield f"{command}: shell syntax goes to the submitter's shell"
        return
    python, script, *arguments = shlex.split(command)
    prefix = "/opt/ffsplit/"
    if python != "python" or not script.startswith(f"{prefix}jobs/"):
        yield f"{command}: not `python {prefix}jobs/...`"
    else:
        yield from job_arguments(script.removeprefix(prefix), arguments)


def job_arguments(script: str, arguments: list[str]) -> Iterator[str]:
    """What jobs/*.py hands to the command line's parser is what that takes."""
    path = ROOT / script
    if not path.is_file():
        yield f"{script}: no such job"
        return
    found = re.search(r'main\(\["(\w+)"', path.read_text("utf-8"))
    assert found, f"{script} hands its arguments to no command"
    try:
        parsed = vars(build_parser().parse_args([found[1], *arguments]))
    except (ConfigError, SystemExit) as error:
        yield f"{script}: {error}"
        return
    out = parsed.get("out") or "/"
    if "://" not in out and not out.startswith("/"):
        yield f"{script}: --out {out} must be absolute"


def resources(spec: dict[str, Any]) -> Iterator[str]:
    """The scheduler knows what every container needs; GPUs are limits, whole, and on workers alone."""
    for name, container in containers(spec):
        wanted = container.get("resources", {})
        for resource in ("cpu", "memory"):
            if resource not in wanted.get("requests", {}):
                yield f"{name}: requests no {resource}"
        if "memory" not in wanted.get("limits", {}):
            yield f"{name}: memory has no limit"
        gpus = wanted.get("limits", {}).get("nvidia.com/gpu", "0")
        if not re.fullmatch(r"\d+", str(gpus)):
            yield f"{name}: {gpus} GPUs"
            continue
        if "nvidia.com/gpu" in wanted.get("requests", {}) and wanted["requests"]["nvidia.com/gpu"] != gpus:
            yield f"{name}: GPUs requested differ from their limit"
        is_worker = name not in ("head", "submitter")
        if (int(gpus) > 0) != is_worker:
            yield f"{name}: GPUs are for workers"
    if "resources" not in spec["rayClusterSpec"].get("autoscalerOptions", {}):
        yield "autoscaler: no resources"


def autoscaling(spec: dict[str, Any]) -> Iterator[str]:
    cluster = spec["rayClusterSpec"]
    if not cluster.get("enableInTreeAutoscaling"):
        yield "enableInTreeAutoscaling: workers would stay"
    if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield "head: num-cpus must be 0, or work crowds the driver out"
    for group in cluster["workerGroupSpecs"]:
        if not 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']}: 0 < minReplicas <= replicas <= maxReplicas"
        if any(not isinstance(value, str) for value in group.get("rayStartParams", {}).values()):
            yield f"{group['groupName']}: rayStartParams are strings"


def placement(spec: dict[str, Any]) -> Iterator[str]:
    """Workers on spot nodes, the head on no such node; nobody restarts in place."""
    for name, pod in pods(spec):
        if pod.get("restartPolicy") != "Never":
            yield f"{name}: restartPolicy must be Never with autoscaler v2, and for a submitter"
        is_worker = name not in ("head", "submitter")
        tolerated = {toleration.get("key") for toleration in pod.get("tolerations", [])}
        if is_worker and not {"spot", "nvidia.com/gpu"} <= tolerated:
            yield f"{name}: does not tolerate spot and GPU nodes"
        if is_worker and "spot" not in pod.get("nodeSelector", {}).values():
            yield f"{name}: not bound to spot nodes"
        if not is_worker and "spot" in tolerated:
            yield f"{name}: a spot node could take the driver away"
        if is_worker and not 30 <= pod.get("terminationGracePeriodSeconds", 30) <= 120:
            yield f"{name}: a spot node gives two minutes"


def privileges(spec: dict[str, Any]) -> Iterator[str]:
    for name, pod in pods(spec):
        if not pod.get("securityContext", {}).get("runAsNonRoot"):
            yield f"{name}: may run as root"
        if name != "head" and pod.get("automountServiceAccountToken") is not False:
            yield f"{name}: has a token for the Kubernetes API that it does not need"
        for container in pod["containers"]:
            context = container.get("securityContext", {})
            if context.get("allowPrivilegeEscalation") is not False:
                yield f"{name}: may gain privileges"
            if context.get("capabilities", {}).get("drop") != ["ALL"]:
                yield f"{name}: keeps capabilities"


def images(spec: dict[str, Any]) -> Iterator[str]:
    found = {container["image"] for _, container in containers(spec)}
    if len(found) != 1:
        yield f"images differ: {', '.join(sorted(found))}"
    for image in found:
        if not re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]+", image):
            yield f"{image}: not pinned"


RULES = (
    lifetime,
    authentication,
    entrypoint,
    resources,
    autoscaling,
    placement,
    privileges,
    images,
)


def broken_rules(spec: dict[str, Any]) -> list[str]:
    return [complaint for rule in RULES for complaint in rule(spec)]
