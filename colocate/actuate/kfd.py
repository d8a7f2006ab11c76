"""AMD: a process's queues are taken off its GPU from outside, in the middle of their kernels, and put back.

The kernel's debug interface suspends queues (AMDKFD_IOC_DBG_TRAP, Linux 6.5 and newer): running waves are saved and go
on from there when they are resumed, so that what a job has launched need not end first. The caller must trace the
process (PTRACE_SEIZE, which does not stop it), the GPUs be scheduled by hardware, and the runtime have enabled it (ROCr
does by default). When the caller dies the kernel resumes everything. It excludes rocgdb and strace.
Sources: include/uapi/linux/kfd_ioctl.h; drivers/gpu/drm/amd/amdkfd/kfd_debug.c; ptrace(2).
"""

from __future__ import annotations

import ctypes as c
import errno
import fcntl
import os
import signal
from collections.abc import Callable

ENABLE, DISABLE, SUSPEND, RESUME, SNAPSHOT = 0, 1, 6, 7, 13
"""enum kfd_dbg_trap_operations."""
QUEUE_NEW = 31
"""EC_QUEUE_NEW: a queue counts only once that has been cleared."""
QUEUE_ERROR, QUEUE_INVALID = 1 << 30, 1 << 31
MOST_QUEUES = 256
PTRACE_CONT, PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_LISTEN = 7, 17, 0x4206, 0x4207, 0x4208
EVENT_STOP = 128
"""PTRACE_EVENT_STOP."""


class EnableArgs(c.Structure):
    """kfd_ioctl_dbg_trap_enable_args."""

    _fields_ = (
        ("exception_mask", c.c_uint64),
        ("rinfo_ptr", c.c_uint64),
        ("rinfo_size", c.c_uint32),
        ("dbg_fd", c.c_uint32),
    )


class QueuesArgs(c.Structure):
    """kfd_ioctl_dbg_trap_suspend_queues_args."""

    _fields_ = (
        ("exception_mask", c.c_uint64),
        ("queue_array_ptr", c.c_uint64),
        ("num_queues", c.c_uint32),
        ("grace_period", c.c_uint32),
    )


class ResumeArgs(c.Structure):
    """kfd_ioctl_dbg_trap_resume_queues_args."""

    _fields_ = (("queue_array_ptr", c.c_uint64), ("num_queues", c.c_uint32), ("pad", c.c_uint32))


class SnapshotArgs(c.Structure):
    """kfd_ioctl_dbg_trap_queue_snapshot_args."""

    _fields_ = (
        ("exception_mask", c.c_uint64),
        ("snapshot_buf_ptr", c.c_uint64),
        ("num_queues", c.c_uint32),
        ("entry_size", c.c_uint32),
    )


class QueueEntry(c.Structure):
    """kfd_queue_snapshot_entry."""

    _fields_ = (
        ("exception_status", c.c_uint64),
        ("ring_base_address", c.c_uint64),
        ("write_pointer_address", c.c_uint64),
        ("read_pointer_address", c.c_uint64),
        ("ctx_save_restore_address", c.c_uint64),
        ("queue_id", c.c_uint32),
        ("gpu_id", c.c_uint32),
        ("ring_size", c.c_uint32),
        ("queue_type", c.c_uint32),
        ("ctx_save_restore_area_size", c.c_uint32),
        ("reserved", c.c_uint32),
    )


class RuntimeInfo(c.Structure):
    """kfd_runtime_info."""

    _fields_ = (("r_debug", c.c_uint64), ("runtime_state", c.c_uint32), ("ttmp_setup", c.c_uint32))


class _Union(c.Union):
    _fields_ = (
        ("enable", EnableArgs),
        ("suspend", QueuesArgs),
        ("resume", ResumeArgs),
        ("snapshot", SnapshotArgs),
        ("largest", c.c_uint64 * 3),
    )


class TrapArgs(c.Structure):
    """kfd_ioctl_dbg_trap_args."""

    _anonymous_ = ("of",)
    _fields_ = (("pid", c.c_uint32), ("op", c.c_uint32), ("of", _Union))


DBG_TRAP = (3 << 30) | (c.sizeof(TrapArgs) << 16) | (ord("K") << 8) | 0x26
"""_IOWR('K', 0x26, struct kfd_ioctl_dbg_trap_args)."""
Ioctl = Callable[[TrapArgs], int]
Ptrace = Callable[[int, int, int], None]


def kernel_ioctl(device: str = "/dev/kfd") -> Ioctl:
    """The kernel's. Raises OSError where there is no such device."""
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)

    def call(arguments: TrapArgs) -> int:
        return int(fcntl.ioctl(descriptor, DBG_TRAP, arguments))

    return call


def kernel_ptrace(request: int, pid: int, data: int) -> None:
    """ptrace(2). Raises OSError."""
    library = c.CDLL(None, use_errno=True)
    library.ptrace.argtypes = [c.c_long, c.c_long, c.c_void_p, c.c_void_p]
    library.ptrace.restype = c.c_long
    if library.ptrace(request, pid, None, data) < 0:
        code = c.get_errno()
        raise OSError(code, os.strerror(code))


class Session:
    """One process that is traced. All calls must come from the thread that made it (ptrace(2))."""

    def __init__(self, pid: int, ioctl: Ioctl, ptrace: Ptrace = kernel_ptrace) -> None:
        """Raises OSError: EPERM of one that is traced already, ENODEV or EINVAL of a GPU that cannot."""
        self.pid, self._ioctl, self._ptrace = pid, ioctl, ptrace
        self.suspended: list[int] = []
        """Queue ids."""
        self._event = os.eventfd(0, os.EFD_CLOEXEC)
        ptrace(PTRACE_SEIZE, pid, 0)
        try:
            info = RuntimeInfo()
            enable = EnableArgs(rinfo_ptr=c.addressof(info), rinfo_size=c.sizeof(info), dbg_fd=self._event)
            self._call(ENABLE, enable=enable)
        except OSError:
            self._detach()
            raise

    def _call(self, operation: int, **arguments: c.Structure) -> tuple[int, TrapArgs]:
        trap = TrapArgs(pid=self.pid, op=operation, **arguments)
        return self._ioctl(trap), trap

    def queues(self) -> list[int]:
        """Ids of those that the process has; new ones become known by this."""
        entries = (QueueEntry * MOST_QUEUES)()
        wanted = SnapshotArgs(
            exception_mask=1 << (QUEUE_NEW - 1),
            snapshot_buf_ptr=c.addressof(entries),
            num_queues=MOST_QUEUES,
            entry_size=c.sizeof(QueueEntry),
        )
        _, trap = self._call(SNAPSHOT, snapshot=wanted)
        return [entries[i].queue_id for i in range(min(trap.snapshot.num_queues, MOST_QUEUES))]

    def suspend(self) -> int:
        """Take all its queues off their GPUs at once; how many are off by now. Raises OSError."""
        new = [q for q in self.queues() if q not in self.suspended]
        if new:
            ids = (c.c_uint32 * len(new))(*new)
            self._call(SUSPEND, suspend=QueuesArgs(queue_array_ptr=c.addressof(ids), num_queues=len(new)))
            done = [q for q, answer in zip(new, ids, strict=True) if not answer & (QUEUE_ERROR | QUEUE_INVALID)]
            self.suspended += done
        return len(self.suspended)

    def resume(self) -> None:
        """Put them back. Raises OSError."""
        if self.suspended:
            ids = (c.c_uint32 * len(self.suspended))(*self.suspended)
            self._call(RESUME, resume=ResumeArgs(queue_array_ptr=c.addressof(ids), num_queues=len(self.suspended)))
            self.suspended = []

    def stopped(self, status: int) -> None:
        """The process stopped for its tracer, as waitpid(2) says: it goes on with what it stopped for."""
        number = os.WSTOPSIG(status)
        if status >> 16 == EVENT_STOP and number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            self._ptrace(PTRACE_LISTEN, self.pid, 0)  # somebody has stopped it: so it stays
        else:
            self._ptrace(PTRACE_CONT, self.pid, 0 if status >> 16 else number)

    def close(self) -> None:
        """Put its queues back and let go of it."""
        try:
            self.resume()
            self._call(DISABLE)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise
        finally:
            self._detach()

    def _detach(self) -> None:
        os.close(self._event)
        try:
            self._ptrace(PTRACE_INTERRUPT, self.pid, 0)
            _, status = os.waitpid(self.pid, WALL)
            if os.WIFSTOPPED(status):
                signalled = 0 if status >> 16 else os.WSTOPSIG(status)
                self._ptrace(PTRACE_DETACH, self.pid, signalled)
        except (OSError, ChildProcessError):
            return  # it has ended


WALL = 0x40000000
"""__WALL of waitpid(2)."""
