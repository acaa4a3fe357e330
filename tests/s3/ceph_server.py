"""Ceph's radosgw on one monitor and one OSD in memory, on loopback, from Debian packages only unpacked.

It creates keys atomically, but not in a bucket with versions, and it ignores SHA256 checksums.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path

from tests.s3.loopback import CACHE, CannotStart, Processes, S3Server, free_ports, run, wait_for

PACKAGES = ("ceph-mon", "ceph-osd", "radosgw")
USERS = {"test": "testing", "stranger": "unknown"}
CONFIG = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {folder}/keyring
run dir = {folder}
crash dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
mon data = {folder}/mon
osd data = {folder}/osd
plugin dir = {libraries}/ceph
erasure code dir = {libraries}/ceph/erasure-code
osd class dir = {libraries}/rados-classes
osd objectstore = memstore
memstore device bytes = 8589934592
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd max object name len = 256
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
auth allow insecure global id reclaim = false
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 64
rgw run sync thread = false
rgw enable usage log = false
"""
KEYS = {
    "mon.": ("mon", "allow *"),
    "client.admin": ("mon", "allow *", "osd", "allow *", "mgr", "allow *"),
    "client.rgw": ("mon", "allow rw", "osd", "allow rwx"),
    "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
}


def installed() -> Path:
    """The folder that Ceph's packages are unpacked in; nothing of the system changes. Raises CannotStart."""
    root = CACHE / "ceph"
    if (root / "installed").exists():
        return root
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise CannotStart("Ceph comes as Debian packages, and this is no Debian")
    shutil.rmtree(root, ignore_errors=True)
    (root / "packages").mkdir(parents=True)
    planned = run(["apt-get", "install", "--simulate", "--no-install-recommends", *PACKAGES], timeout_s=120)
    names = [line.split()[1] for line in planned.splitlines() if line.startswith("Inst ")]
    download = f'cd "$1" && shift && exec {shutil.which("apt-get")} download --quiet "$@"'
    run(["sh", "-c", download, "sh", str(root / "packages"), *names], timeout_s=600)
    for package in sorted((root / "packages").glob("*.deb")):
        run(["dpkg", "-x", str(package), str(root)], timeout_s=120)
    shutil.rmtree(root / "packages")
    (root / "installed").touch()
    return root


def start() -> tuple[S3Server, Processes]:
    """A fresh, empty Ceph with two users. Raises CannotStart."""
    root = installed()
    (machine,) = (path.parent for path in root.glob("usr/lib/*/ceph"))
    folder = Path(tempfile.mkdtemp(prefix="ffsplit-ceph-"))
    processes = Processes(folder, environment=_environment(root, machine, folder))
    programs = root / "usr" / "bin"
    try:
        mon_v2, mon_v1, port = free_ports(3)
        fsid = str(uuid.uuid4())
        config = CONFIG.format(
            fsid=fsid, folder=folder, libraries=machine, mon_v2=mon_v2, mon_v1=mon_v1, port=port
        )
        (folder / "ceph.conf").write_text(config)
        for name in ("mon", "osd"):
            (folder / name).mkdir()
        _start_daemons(processes, programs, folder, fsid=fsid, addresses=(mon_v2, mon_v1))
        wait_for(port, within_s=60)
        for name, secret in USERS.items():
            user = ["--uid", name, "--display-name", name, "--access-key", name, "--secret", secret]
            processes.run([str(programs / "radosgw-admin"), "user", "create", *user])
    except CannotStart:
        processes.stop()
        raise
    endpoint = f"http://127.0.0.1:{port}"
    owner, stranger = USERS.items()
    return S3Server("ceph", endpoint, *owner, stranger, atomic_create=True), processes


def _environment(root: Path, machine: Path, folder: Path) -> dict[str, str]:
    libraries = (machine, root / "lib" / machine.name, machine / "ceph", root / "usr/lib")
    return {
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PYTHONPATH": str(root / "usr/lib/python3/dist-packages"),
        "CEPH_CONF": str(folder / "ceph.conf"),
    }


def _start_daemons(
    processes: Processes, programs: Path, folder: Path, *, fsid: str, addresses: tuple[int, int]
) -> None:
    keyring, monmap, osd = str(folder / "keyring"), str(folder / "monmap"), str(uuid.uuid4())

    def tool(name: str, *arguments: str) -> None:
        processes.run([str(programs / name), *arguments])

    for name, caps in KEYS.items():
        pairs = zip(caps[::2], caps[1::2], strict=True)
        given = [word for kind, rule in pairs for word in ("--cap", kind, rule)]
        create = [] if (folder / "keyring").exists() else ["--create-keyring"]
        tool("ceph-authtool", keyring, *create, "--gen-key", "-n", name, *given)
    address = f"[v2:127.0.0.1:{addresses[0]},v1:127.0.0.1:{addresses[1]}]"
    tool("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
    tool("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
    processes.start("mon", [str(programs / "ceph-mon"), "-i", "a", "-f"])
    processes.run(["/usr/bin/python3", str(programs / "ceph"), "osd", "new", osd])
    tool("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    processes.start("osd", [str(programs / "ceph-osd"), "-i", "0", "-f"])
    processes.start("radosgw", [str(programs / "radosgw"), "-n", "client.rgw", "-f"])
