"""The policies allow what the code calls, and nothing else."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.files import CLUSTER, ROOT, documents

AWS = CLUSTER / "aws"
POLICIES = sorted(AWS.glob("*.json"))
ACTIONS = {
    "get_object": {"s3:GetObject"},
    "head_object": {"s3:GetObject"},
    "download_file": {"s3:GetObject"},
    "put_object": {"s3:PutObject"},
    "upload_file": {"s3:PutObject", "s3:AbortMultipartUpload"},  # aborts what it cannot finish
    "create_multipart_upload": {"s3:PutObject"},
    "upload_part": {"s3:PutObject"},
    "complete_multipart_upload": {"s3:PutObject"},
    "abort_multipart_upload": {"s3:AbortMultipartUpload"},
    "delete_object": {"s3:DeleteObject"},
    "list_objects_v2": {"s3:ListBucket"},
    "list_multipart_uploads": {"s3:ListBucketMultipartUploads"},
    "generate_presigned_url": set(),  # asks nobody
}
"""What IAM calls the things that boto3 does."""
ON_BUCKETS = {"s3:ListBucket", "s3:ListBucketMultipartUploads"}


def statements(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((AWS / name).read_text("utf-8"))["Statement"]
    return found


def allowed(name: str) -> set[str]:
    found = (statement["Action"] for statement in statements(name))
    return {action for each in found for action in ([each] if isinstance(each, str) else each)}


def boto3_calls() -> set[str]:
    """Every method of an S3 client that the store calls, paginators by what they page through."""
    found = set()
    for path in (ROOT / "ffsplit" / "store").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if not re.fullmatch(r"(self\._)?client", ast.unparse(node.func.value)):
                continue
            paged = node.func.attr == "get_paginator"
            found.add(ast.literal_eval(node.args[0]) if paged else node.func.attr)
    return found


def test_the_writer_may_do_what_the_store_does_and_no_more() -> None:
    calls = boto3_calls()
    assert {"put_object", "get_object", "list_objects_v2"} <= calls
    unknown = calls - set(ACTIONS)
    assert not unknown, f"say in ACTIONS which permissions {unknown} need, and in cluster/aws who has them"
    assert allowed("bucket-writer.json") == set().union(*(ACTIONS[call] for call in calls))


def test_the_reader_may_only_read() -> None:
    assert allowed("bucket-reader.json") == {"s3:GetObject", "s3:ListBucket"}


@pytest.mark.parametrize("name", ["bucket-writer.json", "bucket-reader.json"])
def test_actions_stand_beside_the_resources_that_they_are_for(name: str) -> None:
    for statement in statements(name):
        actions = {statement["Action"]} if isinstance(statement["Action"], str) else set(statement["Action"])
        is_bucket = "/" not in statement["Resource"]
        assert actions <= ON_BUCKETS if is_bucket else not actions & ON_BUCKETS
        assert statement["Resource"].startswith("arn:aws:s3:::example-models")


def test_rays_head_may_start_and_end_workers() -> None:
    """By what Ray's own node provider calls."""
    import ray

    source = (Path(ray.__file__).parent / "autoscaler/_private/aws/node_provider.py").read_text("utf-8")
    calls = {"create_instances": "RunInstances", "create_tags": "CreateTags"}
    calls |= {"terminate_instances": "TerminateInstances", "describe_images": "DescribeImages"}
    calls |= {"describe_instance_types": "DescribeInstanceTypes", "instances.filter": "DescribeInstances"}
    assert all(call in source for call in calls)
    assert allowed("ray-up-head.json") == {f"ec2:{action}" for action in calls.values()} | {"iam:PassRole"}
    own = [each for each in statements("ray-up-head.json") if "ec2:TerminateInstances" in each["Action"]]
    cluster = documents(CLUSTER / "ray-up" / "aws-spot.yaml")[0]["cluster_name"]
    assert [each["Condition"]["StringEquals"] for each in own] == [
        {"aws:ResourceTag/ray-cluster-name": cluster}
    ]


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.name)
def test_no_policy_has_wild_actions(path: Path) -> None:
    document = json.loads(path.read_text("utf-8"))
    for statement in document.get("Statement", []):
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert statement["Effect"] == "Allow"
        assert not any("*" in action for action in actions)
        describes = all(action.startswith("ec2:Describe") for action in actions)  # these have no resources
        assert describes == (statement.get("Resource") == "*")


def test_the_role_is_for_the_pods_that_use_it() -> None:
    condition = statements("irsa-trust.json")[0]["Condition"]["StringEquals"]
    (subjects,) = (value for key, value in condition.items() if key.endswith(":sub"))
    accounts = yaml.safe_load_all((CLUSTER / "kubernetes" / "accounts.yaml").read_text("utf-8"))
    with_role = {each["metadata"]["name"] for each in accounts if each["metadata"].get("annotations", {})}
    assert set(subjects) == {f"system:serviceaccount:ffsplit:{name}" for name in with_role}
    assert any(key.endswith(":aud") for key in condition)


def test_the_lifecycle_rule_expires_nothing_current() -> None:
    rules = json.loads((AWS / "lifecycle.json").read_text("utf-8"))["Rules"]
    actions = {key for rule in rules for key in rule} - {"ID", "Status", "Filter"}
    assert actions == {"AbortIncompleteMultipartUpload", "NoncurrentVersionExpiration"}
    assert all(rule["Status"] == "Enabled" for rule in rules)
