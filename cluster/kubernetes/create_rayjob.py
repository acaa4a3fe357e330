"""Create the RayJob of a file and wait until it is done: what the CronJob's pod runs.

It needs only the standard library and YAML. JOB_NAME and JOB_UID are those of the Kubernetes Job. The RayJob
gets the Job's name, so that a pod that replaces a lost one finds it. It gets the Job as its owner, so that it
is removed with the Job.

Exit codes: 0 the batch is done, 1 it failed or was deleted, 2 the API refused it, 3 the API has not answered
for GIVE_UP_S seconds: the Job's next pod then waits. Output that cannot be printed is dropped.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
POLL_S = float(os.environ.get("POLL_S", "15"))
GIVE_UP_S = float(os.environ.get("GIVE_UP_S", "3600"))
STDOUT, STDERR = 1, 2
DONE = {"Complete": 0, "Failed": 1, "ValidationFailed": 1}


class Away(Exception):
    """The API has not answered for too long."""


class Refused(Exception):
    """The API's answer to a request that it will not carry out."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def main(path: str) -> int:
    manifest = owned(yaml.safe_load(Path(path).read_text("utf-8")))
    name = manifest["metadata"]["name"]
    try:
        create(manifest)
        return wait(name)
    except Refused as refusal:
        say(f"rayjob {name}: {refusal}", to=STDERR)
        return 1 if refusal.status == 404 else 2
    except Away as away:
        say(f"rayjob {name}: {away}; the batch may still run", to=STDERR)
        return 3


def say(line: str, *, to: int = STDOUT) -> None:
    """Print a line. Written without a buffer: a full or closed stream then never ends the script."""
    with suppress(OSError):
        os.write(to, f"{line}\n".encode())


def owned(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest under the Job's name, in the pod's namespace, with the Job as its owner."""
    name, uid = os.environ["JOB_NAME"], os.environ["JOB_UID"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
    kept = {key: value for key, value in manifest["metadata"].items() if key != "generateName"}
    namespace = (ACCOUNT / "namespace").read_text("utf-8").strip()
    return manifest | {"metadata": kept | {"name": name, "namespace": namespace, "ownerReferences": [owner]}}


def create(manifest: dict[str, Any]) -> None:
    """Create the RayJob, unless a pod before this one has done so."""
    name = manifest["metadata"]["name"]
    try:
        # Strict validation refuses fields that this cluster's KubeRay does not know, such as authOptions.
        # By default they would be dropped silently.
        call("POST", "?fieldValidation=Strict", manifest)
        say(f"rayjob {name}: created")
    except Refused as refusal:
        if refusal.status != 409:
            raise
        say(f"rayjob {name}: exists, waiting for it")


def wait(name: str) -> int:
    """Follow the RayJob's status until it is final. Its activeDeadlineSeconds bounds the wait."""
    shown = None
    while True:
        status = call("GET", f"/{name}").get("status", {})
        state = status.get("jobDeploymentStatus", "")
        if state != shown:
            shown = state
            why = " ".join(
                filter(None, (status.get("jobStatus"), status.get("reason"), status.get("message")))
            )
            say(f"rayjob {name}: {state or 'New'} {why}".rstrip())
        if state in DONE:
            return DONE[state]
        time.sleep(POLL_S)


def call(method: str, rest: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request about RayJobs. Retries for GIVE_UP_S seconds if the API is unavailable or overloaded."""
    host = f"{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    namespace = (ACCOUNT / "namespace").read_text("utf-8").strip()
    request = urllib.request.Request(
        f"https://{host}/apis/ray.io/v1/namespaces/{namespace}/rayjobs{rest}",
        data=None if body is None else json.dumps(body).encode(),
        method=method,
    )
    request.add_header("Content-Type", "application/json")
    asked_since = time.monotonic()
    while True:
        token = (ACCOUNT / "token").read_text("utf-8").strip()  # read each time: it is renewed
        request.add_header("Authorization", f"Bearer {token}")
        trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
        try:
            with urllib.request.urlopen(request, timeout=30, context=trust) as reply:
                answer: dict[str, Any] = json.load(reply)
                return answer
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            if error.code < 500 and error.code != 429:
                raise Refused(error.code, _message(text) or error.reason) from None
            said = f"the API answered {error.code}"
        except OSError as error:
            said = f"the API cannot be reached ({error})"
        if time.monotonic() - asked_since > GIVE_UP_S:
            raise Away(f"{said}, for {GIVE_UP_S:g} s in total")
        say(f"{said}; retrying", to=STDERR)
        time.sleep(POLL_S)


def _message(text: str) -> str:
    try:
        return str(json.loads(text).get("message", ""))
    except ValueError:
        return text[:200]


if __name__ == "__main__":
    # The first process of a container has no default handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise SystemExit(main(*sys.argv[1:]))
