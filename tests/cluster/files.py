"""The files of cluster/, read, and what checks them offline."""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"


def documents(path: Path) -> list[dict[str, Any]]:
    """Every YAML document of a file."""
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def kubernetes_objects() -> list[dict[str, Any]]:
    found = [each for path in sorted(KUBERNETES.glob("*.yaml")) for each in documents(path)]
    return [each for each in found if "kind" in each]  # zoo.yaml is none


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = (each for each in kubernetes_objects() if each["kind"] == kind)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]  # what aliases named is now apart


def constraint(package: str) -> str:
    """The version that cluster/constraints.txt pins a package to."""
    lines = (CLUSTER / "constraints.txt").read_text("utf-8").splitlines()
    (version,) = (line.split("==")[1] for line in lines if line.startswith(f"{package}=="))
    return version


@cache
def crd_validator(plural: str) -> Draft202012Validator:
    """What the API server checks of a KubeRay object, with unknown fields refused. Skips without the CRDs."""
    default = ROOT.parent / "shared" / "infra" / "kuberay"
    folder = Path(os.environ.get("FFSPLIT_KUBERAY_CRDS", default))
    path = folder / f"{plural}.yaml.gz"
    if not path.is_file():
        pytest.skip(f"no KubeRay CRDs in {folder}: set FFSPLIT_KUBERAY_CRDS")
    with gzip.open(path) as file:
        (crd,) = filter(None, yaml.load_all(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    (version,) = (each for each in crd["spec"]["versions"] if each["name"] == "v1" and each["served"])
    schema = version["schema"]["openAPIV3Schema"]
    # The API server itself knows metadata; a CRD says no more than that it is an object.
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return Draft202012Validator(_closed(schema))


def _closed(node: Any) -> Any:
    """A structural schema as JSON Schema in which an object has the fields it names and no others."""
    if isinstance(node, list):
        return [_closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _closed(value) for key, value in node.items() if not key.startswith("x-kubernetes-")}
    if node.get("x-kubernetes-int-or-string") is True:
        closed.pop("type", None)
        closed["type"] = ["integer", "string"]
        closed.pop("anyOf", None)
    is_schema = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    if is_schema and "additionalProperties" not in node:
        closed["additionalProperties"] = node.get("x-kubernetes-preserve-unknown-fields") is True
    return closed


def complaints(validator: Draft202012Validator, document: Any) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(document)]


def ray_up_schema() -> Draft202012Validator:
    import ray

    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    return Draft202012Validator(json.loads(path.read_text("utf-8")))
