"""Where a cluster has several kinds of GPU, timings are on one, and all work is where one is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffsplit.distributed import make_runner
from ffsplit.errors import ConfigError
from tests.faults.isolation import EVERYTHING, answer_of, can
from tests.small_jobs import SmallJob


@pytest.mark.subprocess
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not can(*EVERYTHING), reason="needs processes of its own")
def test_work_stays_on_one_kind_of_gpu(tmp_path: Path) -> None:
    found = answer_of("tests.distributed.labelled_nodes", folder=tmp_path, timeout_s=200)
    both = ["A10G", "H100"]
    assert found["any"] == {"tasks": both, "workers": both, "timed": ["H100"], "hosts": both}
    for kind in both:
        assert found[kind] == {what: [kind] for what in ("tasks", "workers", "timed", "hosts", "together")}
    assert found["unknown"] == (
        "--accelerator-type H200: no node of the cluster with room for a worker has the label "
        "ray.io/accelerator-type=H200 (its nodes have A10G, H100)"
    )
    assert found["one kind"] == ["H100", None, None], "there is nothing to choose where there is one kind"


def test_without_a_cluster_there_is_no_kind_to_choose(small_job: SmallJob, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="--accelerator-type H100 chooses nodes of a cluster, which --runner"
    ):
        make_runner(small_job.config(tmp_path, accelerator_type="H100"))
