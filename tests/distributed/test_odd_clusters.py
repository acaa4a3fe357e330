"""Real clusters that cannot be used: one line each, with its fix, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffsplit import __version__
from tests.faults.isolation import EVERYTHING, answer_of, can

TOLD = {
    "nothing runs": "address auto: no Ray runs on this machine: start it with `ray start --head`, give the "
    "address of a cluster, or unset RAY_ADDRESS",
    "left over": "address auto: the Ray of this machine at 127.0.0.1:6379 cannot be reached (Connection "
    "refused): run `ray stop`, which removes what a Ray that was killed has left, then `ray start --head`",
    "no package": f" has no ffsplit: install ffsplit {__version__} on every node",
    "another version": f" has ffsplit 0.0.1, this run's driver {__version__}: install the same versions on "
    "every node",
    "no session directory": ": No such file or directory; if its session directory was cleaned "
    "away, run `ray stop` and `ray start` here again",
    "no node here": "Ray at 127.0.0.1:6379 has no node on this machine: run `ray start "
    "--address=127.0.0.1:6379` here, or use --address ray://127.0.0.1:10001, or `ffsplit submit`",
}


@pytest.mark.subprocess
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not can(*EVERYTHING), reason="needs processes of its own")
def test_each_is_told_in_one_line(tmp_path: Path) -> None:
    """Besides Ray's own: that there is no way to the internet, and which nodes have died."""
    found = answer_of("tests.distributed.odd_clusters", str(tmp_path), folder=tmp_path, timeout_s=400)
    code, said = found.pop("client")
    assert code == 0 and "Traceback" not in said, said
    assert found.keys() == TOLD.keys()
    for what, (code, said) in found.items():
        lines = [line for line in said.splitlines() if "8.8.8.8" not in line and line[:5] != "ray: "]
        assert (code, len(lines)) == (2, 1), f"{what}: {said}"
        assert lines[0].startswith("ffsplit: ") and TOLD[what] in lines[0]
