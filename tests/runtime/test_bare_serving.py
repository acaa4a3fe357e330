"""An environment with torch, transformers and little else loads and runs an int8 artifact."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import ffsplit
from tests.conftest import CheckpointFactory
from tests.small_jobs import SmallJob

NEEDED = ("torch", "transformers", "safetensors", "pydantic", "wrapt")
"""What docs/serving.md says. Their own dependencies come with them."""
NOT_NEEDED = ("ray", "boto3", "pyarrow", "datasets", "accelerate", "psutil", "scipy")
ROOT = Path(ffsplit.__file__).parents[1]
LOADS = """
import importlib.util, json, sys

artifact, pulled, answer, not_needed = *sys.argv[1:4], json.loads(sys.argv[4])
present = [name for name in not_needed if importlib.util.find_spec(name) is not None]
assert not present, present
import ffsplit, torch
from transformers import AutoModelForMaskedLM

with torch.no_grad():
    ids = torch.arange(5, 29).view(2, 12)
    models = {"ffsplit": ffsplit.load(artifact), "transformers": AutoModelForMaskedLM.from_pretrained(pulled)}
    answers = {name: model.eval()(input_ids=ids).logits for name, model in models.items()}
torch.save(answers | {"at": ffsplit.__file__}, answer)
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """The installed distributions that these need, without extras, as `pip install` would get them."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # such as CUDA's libraries, of another build of torch
        found.add(name)
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def environment(folder: Path, distributions: set[str]) -> Path:
    """The Python of a new virtual environment that has these distributions, as links, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    installed = Path(sysconfig.get_path("purelib"))
    for name in distributions:
        for file in importlib.metadata.distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists() and (installed / top).exists():
                (site / top).symlink_to(installed / top)
    return folder / "bin" / "python"


def wheel(folder: Path) -> Path:
    """The package's wheel, built from a copy of its source."""
    shutil.copytree(
        ROOT / "ffsplit", folder / "source" / "ffsplit", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / "source" / name)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, *build, "--wheel-dir", folder, folder / "source"], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
@pytest.mark.subprocess
def test_five_packages_load_and_run_an_int8_artifact(
    checkpoint_of: CheckpointFactory, tmp_path: Path
) -> None:
    job = SmallJob(tmp_path, checkpoint_of("bert", head="ForMaskedLM"))
    recipe = job.recipe(more="after_healing: {kind: quantize, num_bits: 8}\nlinears: int8")
    ffsplit.compress(job.config(tmp_path / "out", recipe=recipe))
    distributions = closure(NEEDED)
    assert set(NEEDED) <= distributions and not set(NOT_NEEDED) & distributions
    python = environment(tmp_path / "env", distributions)
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, *install, wheel(tmp_path)], check=True)
    (tmp_path / "loads.py").write_text(LOADS)
    pulled, answer_file = tmp_path / "pulled", tmp_path / "answer"
    for arguments in (
        ["-m", "ffsplit.cli", "pull", tmp_path / "out", pulled],
        [tmp_path / "loads.py", tmp_path / "out", pulled, answer_file, json.dumps(NOT_NEEDED)],
    ):
        done = subprocess.run([python, "-I", *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    missing = [python, "-I", "-m", "ffsplit.cli", "verify", "s3://bucket/prefix"]
    done = subprocess.run(missing, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and " is not installed: " in done.stderr
    answer = torch.load(answer_file)
    assert str(tmp_path / "env") in answer.pop("at")
    with torch.no_grad():
        expected = ffsplit.load(str(tmp_path / "out"))(input_ids=torch.arange(5, 29).view(2, 12)).logits
    assert all(torch.equal(found, expected) for found in answer.values()) and len(answer) == 2
