"""OpenStack Swift with its S3 API: one account, container, object and proxy server on loopback.

It refuses wrong checksums, wrong secrets and expired signatures. Its If-None-Match is not atomic.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.s3.loopback import CACHE, CannotStart, Processes, S3Server, free_ports, run, wait_for

VERSION = "2.38.3"
KINDS = ("account", "container", "object")
SWIFT_CONF = """\
[swift-hash]
swift_hash_path_prefix = test
swift_hash_path_suffix = test
[storage-policy:0]
name = default
default = yes
"""
COMMON = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
workers = 0
user = {user}
log_address = {folder}/no-syslog
log_level = WARNING
"""
PATIENCE = "node_timeout = 60\nconn_timeout = 10\ncontainer_update_timeout = 60\n"
"""A busy machine is no failed disk; and what a listing misses at first nobody would ever put into it here."""
STORAGE = (
    "[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n" + PATIENCE
)
FILTERS = {
    "catch_errors": "",
    "cache": "use = egg:swift#memcache\nmemcache_servers = 127.0.0.1:1",
    "listing_formats": "",
    "bulk": "",
    "s3api": "s3_acl = false\nlocation = us-east-1\ncheck_bucket_owner = false\nmin_segment_size = 5242880",
    "tempauth": "user_test_tester = testing .admin\nuser_test_stranger = unknown",
    "slo": "",
    "dlo": "",
    "versioned_writes": "allow_versioned_writes = true\nallow_object_versioning = true",
    "symlink": "",
}
RINGS = """\
import sys
from swift.common.ring import RingBuilder
folder, *ports = sys.argv[1:]
for kind, port in zip(("account", "container", "object"), ports):
    builder = RingBuilder(4, 1, 0)
    place = {"ip": "127.0.0.1", "port": int(port)}
    replication = {f"replication_{name}": value for name, value in place.items()}
    builder.add_dev({"region": 1, "zone": 1, "device": "disk", "weight": 1, "meta": ""} | place | replication)
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{kind}.ring.gz")
"""


def installed() -> Path:
    """The folder of Swift's programs, in a virtual environment of its own. Raises CannotStart."""
    venv = CACHE / f"swift-{VERSION}"
    if not (venv / "installed").exists():
        run([sys.executable, "-m", "venv", str(venv)], timeout_s=120)
        run([str(venv / "bin/pip"), "install", "--quiet", f"swift=={VERSION}"], timeout_s=600)
        (venv / "installed").touch()
    return venv / "bin"


def proxy_config() -> str:
    names = list(FILTERS)
    sections = [f"[pipeline:main]\npipeline = {' '.join(names)} proxy-server"]
    sections += [f"[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n{PATIENCE}"]
    sections[-1] += "error_suppression_limit = 100000"
    for name, options in FILTERS.items():
        use = "" if options.startswith("use =") else f"use = egg:swift#{name}\n"
        sections.append(f"[filter:{name}]\n{use}{options}")
    return "\n".join(sections) + "\n"


def start() -> tuple[S3Server, Processes]:
    """A fresh, empty Swift. Raises CannotStart."""
    programs = installed()
    folder = Path(tempfile.mkdtemp(prefix="ffsplit-swift-"))
    processes = Processes(folder)
    try:
        *storage_ports, proxy_port = free_ports(4)
        (folder / "devices" / "disk").mkdir(parents=True)
        (folder / "swift.conf").write_text(SWIFT_CONF)
        processes.environment["SWIFT_DIR"] = str(folder)
        user = run(["id", "-un"], timeout_s=5).strip()
        processes.run([str(programs / "python"), "-c", RINGS, str(folder), *map(str, storage_ports)])
        for kind, port in zip((*KINDS, "proxy"), (*storage_ports, proxy_port), strict=True):
            config = COMMON.format(port=port, folder=folder, user=user)
            config += proxy_config() if kind == "proxy" else STORAGE.format(kind=kind)
            (folder / f"{kind}.conf").write_text(config)
            processes.start(kind, [str(programs / f"swift-{kind}-server"), str(folder / f"{kind}.conf")])
        for port in (*storage_ports, proxy_port):
            wait_for(port, within_s=30)
    except CannotStart:
        processes.stop()
        raise
    endpoint = f"http://127.0.0.1:{proxy_port}"
    stranger = ("test:stranger", "unknown")
    return S3Server("swift", endpoint, "test:tester", "testing", stranger, atomic_create=False), processes
