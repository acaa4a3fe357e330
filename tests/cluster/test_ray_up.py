"""aws-spot.yaml against Ray's own schema and preparation, and against what they cannot say."""

from __future__ import annotations

from typing import Any

import yaml

from tests.cluster.files import CLUSTER, complaints, of_kind, ray_up_schema
from tests.cluster.rules import MAX_NAME_LENGTH

PATH = CLUSTER / "ray-up" / "aws-spot.yaml"


def config() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(PATH.read_text("utf-8"))
    return found


def test_rays_schema_accepts_it() -> None:
    assert complaints(ray_up_schema(), config()) == []


def test_the_schema_refuses_a_slip() -> None:
    wrong = config()
    wrong["idle_timeout_minute"] = wrong.pop("idle_timeout_minutes")
    wrong["available_node_types"]["gpu-spot"]["max_worker"] = 8
    found = complaints(ray_up_schema(), wrong)
    assert len(found) == 2
    assert all("idle_timeout_minute" in each or "max_worker" in each for each in found)


def test_ray_prepares_and_validates_it() -> None:
    """The code that `ray up` itself runs, up to where it asks the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config())
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu-spot"]["max_workers"] == 8
    assert prepared["setup_commands"] == []  # nothing of Ray's defaults, which install another Ray


def test_workers_are_spot_and_scale() -> None:
    types = config()["available_node_types"]
    head = types.pop(config()["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}
    assert types
    for worker in types.values():
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert 0 < worker["min_workers"] < worker["max_workers"] <= config()["max_workers"]
        assert worker["resources"]["GPU"] == 1
    assert config()["provider"]["cache_stopped_nodes"] is False


def test_the_token_comes_from_a_file() -> None:
    options = config()["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (path,) = (each.split("=")[1] for each in options if each.startswith("--env RAY_AUTH_TOKEN_PATH="))
    assert config()["file_mounts"] == {path: "~/.ray/ffsplit_auth_token"}
    starts = config()["head_start_ray_commands"] + config()["worker_start_ray_commands"]
    assert not any("RAY_AUTH" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[1]  # reached through `ray dashboard`, over ssh


def test_roles_and_disks() -> None:
    for name, node in config()["available_node_types"].items():
        role = "ffsplit-head" if name == "head" else "ffsplit-worker"
        assert node["node_config"]["IamInstanceProfile"] == {"Name": role}
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(each["Ebs"]["Encrypted"] for each in node["node_config"]["BlockDeviceMappings"])


def test_the_image_is_that_of_kubernetes() -> None:
    head = of_kind("RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert config()["docker"]["image"] == head["containers"][0]["image"]
    assert len(config()["cluster_name"]) < MAX_NAME_LENGTH
