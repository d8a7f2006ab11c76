"""The services of the isolation benchmark beside the demo's own: PostgreSQL under pgbench, and nginx.

Neither tells its latency to the agent, so ours protects them by what it sees from outside: pressure and run delay. What
is called nginx's peak is what one load generator in Python gets out of it, so nginx is nearly idle in its cells.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from colocate.cgroup.tree import joined
from colocate.demo.load import Sample
from colocate.demo.process import Process
from colocate.demo.script import SERVICE_POD, Demo, Served
from colocate.errors import HostUnfit
from colocate.policy.schema import ServiceLevelObjective

CLIENTS = 8
SCALE = 2
NGINX = """
daemon off; worker_processes auto; worker_cpu_affinity auto; user {user};
pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000;
  client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u;
  scgi_temp_path {dir}/s;
  server {{ listen 127.0.0.1:{port}; root {dir}; error_page 405 =200 $uri; }}
}}
"""


def postgres_programs() -> Path | None:
    """Where Debian keeps PostgreSQL's programs."""
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


def lacks(service: str) -> str:
    """What a service lacks on this machine; empty if it can run."""
    if service == "postgres" and postgres_programs() is None:
        return "the Debian package postgresql (make system-packages)"
    if service == "nginx" and not (shutil.which("nginx") or Path("/usr/sbin/nginx").exists()):
        return "the Debian package nginx-light (make system-packages)"
    return ""


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _user() -> str:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    return "postgres" if any(u.pw_name == "postgres" for u in pwd.getpwall()) else "nobody"


def _as_user(command: list[str]) -> list[str]:
    if os.geteuid() != 0:
        return command
    return ["setpriv", f"--reuid={_user()}", "--regid=nogroup", "--clear-groups", *command]


async def _finish(command: list[str]) -> None:
    process = await asyncio.create_subprocess_exec(*command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = await process.communicate()
    if process.returncode:
        raise HostUnfit(f"{command[0]} failed: {output.decode(errors='replace').strip()}")


async def _listening(port: int, what: str) -> None:
    for _ in range(100):
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        await asyncio.sleep(0.1)
    raise HostUnfit(f"{what} did not start; its error is above")


class WithPostgres(Demo):
    """A database that answers point queries, in the place of the demo's service."""

    async def _serve(self, serving: list[Served]) -> None:
        programs = postgres_programs()
        assert programs is not None
        self._programs, self._port_number = programs, _free_port()
        os.chmod(self._directory, 0o711)
        data = Path(tempfile.mkdtemp(prefix="data-", dir=self._directory))
        if os.geteuid() == 0:
            shutil.chown(data, _user())
        initdb = _as_user([str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "bench", "--no-sync"])
        await _finish(initdb)
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self._port_number,
            "unix_socket_directories": "",
            "shared_buffers": "64MB",
            "fsync": "off",
            "autovacuum": "off",
            "log_min_messages": "panic",
            "dynamic_shared_memory_type": "mmap",  # in its own folder: what is killed leaves nothing in /dev/shm
        }
        command = _as_user([str(programs / "postgres"), "-D", str(data)])
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        group = joined(self._node.path, SERVICE_POD)
        serving.append(await Process.start(self._node, group, command, {}))
        await _listening(self._port_number, "PostgreSQL")
        await _finish([*self._pgbench("-i", "-q"), "-s", str(SCALE), "postgres"])

    def _pgbench(self, *options: str) -> list[str]:
        where = ["-h", "127.0.0.1", "-p", str(self._port_number), "-U", "bench"]
        return [str(self._programs / "pgbench"), *where, *options]

    async def _load(self, rate: float | None, seconds: float) -> list[Sample]:
        await asyncio.sleep(0.8)
        logs = self._directory / "pgbench"
        command = self._pgbench("-n", "-S", "-c", str(CLIENTS), "-T", str(max(round(seconds), 1)))
        command += ["-l", f"--log-prefix={logs}", "--random-seed", str(self._seed)]
        command += [] if rate is None else ["-R", f"{rate:.1f}"]
        group = joined(self._node.path, "client")
        load = await Process.start(self._node, group, [*command, "postgres"], {})
        try:
            assert load.process.stdout is not None
            await load.process.stdout.read()
            if await load.process.wait():
                raise HostUnfit("pgbench failed; its error is above")
        finally:
            await load.end()
        samples = []
        for file in self._directory.glob("pgbench.*"):
            # client, transaction, elapsed from its scheduled start (us), script, seconds, microseconds[, lag]
            rows = [line.split() for line in file.read_text().splitlines()]
            file.unlink()
            samples += [
                Sample(int(r[4]) + int(r[5]) / 1e6, int(r[2]) / 1e6, True)
                for r in rows
                if len(r) > 5 and r[2].isdigit()
            ]
        first = min((s.start for s in samples), default=0.0)
        return [Sample(max(s.start - first, 0.0), s.latency, s.ok) for s in samples]

    def _slo(self) -> ServiceLevelObjective | None:
        return None


class WithNginx(Demo):
    """A web server that serves a small file, in the place of the demo's service."""

    async def _serve(self, serving: list[Served]) -> None:
        port = _free_port()
        site = Path(tempfile.mkdtemp(prefix="site-", dir=self._directory))
        os.chmod(self._directory, 0o711)
        os.chmod(site, 0o711)
        (site / "infer").write_bytes(b"x" * 4096)
        user = "root" if os.geteuid() == 0 else _user()
        (site / "nginx.conf").write_text(NGINX.format(dir=site, port=port, user=user))
        program = shutil.which("nginx") or "/usr/sbin/nginx"
        group = joined(self._node.path, SERVICE_POD)
        # Its workers outlive it until the node is removed, and would hold our end of its stdout open.
        words = f"exec {program} -c {site}/nginx.conf -e {site}/error.log > /dev/null"
        command = ["/bin/sh", "-c", words]
        serving.append(await Process.start(self._node, group, command, {}))
        self._urls = [f"http://127.0.0.1:{port}"]
        await _listening(port, "nginx")

    def _slo(self) -> ServiceLevelObjective | None:
        return None
