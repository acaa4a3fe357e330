"""Keys are canonical and change with each input; a wrong setting is one line that names its flag."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ffsplit.config import JobConfig
from ffsplit.errors import ConfigError, FFSplitError
from ffsplit.keys import ALGORITHM_VERSION, digest_of, stage_key

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
json_objects = st.dictionaries(st.text(max_size=5), json_values, max_size=5)


@given(value=json_objects)
def test_the_digest_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    assert digest_of(dict(reversed(value.items()))) == digest_of(value)
    assert digest_of(json.loads(json.dumps(value))) == digest_of(value)


@given(first=json_objects, second=json_objects)
def test_digests_are_equal_for_equal_json_alone(first: dict[str, object], second: dict[str, object]) -> None:
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (digest_of(first) == digest_of(second)) == same


def test_the_digest_is_sha256_of_canonical_json() -> None:
    expected = hashlib.sha256('{"a":[1,"é"],"b":null}'.encode()).hexdigest()
    assert digest_of({"b": None, "a": [1, "é"]}) == expected


@pytest.mark.subprocess
def test_the_digest_is_the_same_in_another_process() -> None:
    code = "from ffsplit.keys import stage_key; print(stage_key('s', {'x': [1, 2], 'a': {'c': 1, 'b': 2}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == stage_key("s", {"a": {"b": 2, "c": 1}, "x": [1, 2]})


def test_what_is_no_json_has_no_digest() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_of({"a": float("nan")})
    with pytest.raises(TypeError):
        digest_of({"a": object()})


def test_a_stage_key_changes_with_each_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"seed": 0, "keep": 0.5, "digests": {"model": "aa", "text": "bb"}}
    variants = [
        ("calibrate", inputs),
        ("run", inputs),
        ("calibrate", inputs | {"seed": 1}),
        ("calibrate", inputs | {"keep": 0.25}),
        ("calibrate", inputs | {"digests": {"model": "aa", "text": "cc"}}),
        ("calibrate", inputs | {"nonce": None}),
        ("calibrate", {}),
    ]
    keys = [stage_key(stage, each) for stage, each in variants]
    monkeypatch.setattr("ffsplit.keys.ALGORITHM_VERSION", ALGORITHM_VERSION + 1)
    keys.append(stage_key("calibrate", inputs))
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 16 and set(key) <= set("0123456789abcdef") for key in keys)


def test_the_defaults() -> None:
    job = JobConfig.of_flags(model="m", out="o")
    assert (job.recipe, job.keep, job.calibration, job.seed) == ("fast", None, ("builtin:text",), 0)
    assert job.eval == ()
    assert (job.runner, job.device, job.dtype, job.fresh) == ("ray", "auto", "auto", False)
    assert JobConfig.model_validate_json(job.model_dump_json()) == job


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"keep": 0}, "--keep should be greater than 0, not 0"),
        ({"keep": 1.5}, "--keep should be less than or equal to 1, not 1.5"),
        ({"keep": float("nan")}, "--keep should be a finite number, not nan"),
        ({"samples": 0}, "--samples should be greater than or equal to 1, not 0"),
        ({"max_length": -3}, "--max-length should be greater than or equal to 1, not -3"),
        ({"workers": 0}, "--workers should be greater than or equal to 1, not 0"),
        ({"gpus_per_worker": -1}, "--gpus-per-worker should be greater than or equal to 0, not -1"),
        ({"seed": -1}, "--seed should be greater than or equal to 0, not -1"),
        ({"device": "tpu"}, "--device should be 'auto', 'cpu' or 'cuda', not 'tpu'"),
        ({"runner": "dask"}, "--runner should be 'ray' or 'serial', not 'dask'"),
        ({"model": ""}, "--model"),
        ({"out": ""}, "--out"),
        ({"calibration": ()}, "--calibration"),
        ({"kep": 0.5}, "unknown field --kep, did you mean '--keep'?"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_its_flag(fields: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        JobConfig.of_flags(**({"model": "m", "out": "o"} | fields))
    message = str(caught.value)
    assert message.startswith(expected) and "\n" not in message
    assert isinstance(caught.value, FFSplitError) and caught.value.__cause__ is None


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^--out is missing$"):
        JobConfig.of_flags(model="m")


def test_a_config_is_frozen() -> None:
    job = JobConfig.of_flags(model="m", out="o")
    with pytest.raises(ValidationError):
        job.keep = 0.5  # type: ignore[misc]
