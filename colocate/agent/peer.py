"""Who is at the other end of a unix socket: by pidfd where the kernel has it (6.5), else by pid and start time.

SO_PEERCRED alone may name a process that has ended and whose pid was given away; a pidfd cannot (unix(7)).
"""

from __future__ import annotations

import os
import socket
import struct

import msgspec

from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import start_time
from colocate.errors import BadInput

SO_PEERPIDFD = 77


class Peer(msgspec.Struct, frozen=True):
    """The process that connected."""

    pid: int
    uid: int
    start_time: int
    by_pidfd: bool


def identify(sock: socket.socket, port: FilePort) -> Peer:
    """The peer of a connected unix socket. Raises BadInput if it has ended."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    by_pidfd = False
    try:
        (pidfd,) = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, struct.calcsize("i")))
    except OSError:
        pidfd = -1
    if pidfd >= 0:
        try:
            fields = (port.proc(f"/proc/self/fdinfo/{pidfd}") or "").split()
            named = int(fields[fields.index("Pid:") + 1]) if "Pid:" in fields else -1
            if named > 0:
                pid, by_pidfd = named, True
        finally:
            os.close(pidfd)
    start = start_time(port, pid)
    if start is None:
        raise BadInput(f"the caller (pid {pid}) has ended or is in another pid namespace")
    return Peer(pid, uid, start, by_pidfd)


def check_child(port: FilePort, peer: Peer, pid: int) -> int:
    """The start time of a process that the peer may hand over: its own child, with its own uid. Raises BadInput."""
    status = port.proc(f"/proc/{pid}/status") or ""
    fields = {k: v.split() for k, _, v in (line.partition(":") for line in status.splitlines())}
    start = start_time(port, pid)
    if start is None or "PPid" not in fields:
        raise BadInput(f"process {pid} does not exist")
    if int(fields["PPid"][0]) != peer.pid:
        raise BadInput(f"process {pid} is not a child of the caller (pid {peer.pid})")
    if peer.uid not in (0, int(fields["Uid"][0])):
        raise BadInput(f"process {pid} belongs to another user")
    if start_time(port, peer.pid) != peer.start_time:
        raise BadInput("the caller has ended")
    return start
