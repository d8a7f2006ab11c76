"""A card in the kernel model: its processes are tasks of the model, so what is done to their cgroups is done to them.

A frozen cgroup stops its processes and leaves what they have launched to run; a killed task takes its context along;
the CPU that a process spends on launching and waiting is its cgroup's.
"""

from __future__ import annotations

from colocate.fakecard.card import SECOND, Card
from colocate.fakecard.process import Process, Program
from colocate.kernelmodel.machine import Task
from colocate.kernelmodel.port import ModelKernel


class ModelCard:
    """A card of a modelled machine. It moves with the machine, in its steps of a millisecond."""

    def __init__(self, kernel: ModelKernel, card: Card) -> None:
        self.card, self._kernel = card, kernel
        self._began = kernel.machine.now
        self._processes: dict[int, tuple[Task, Process, float]] = {}
        """By pid; and the CPU time that has been charged, seconds."""
        kernel.actors.append(self._step)

    def run(self, program: Program, path: str, *, kind: str = "", share: float = 1.0, spins: bool = True) -> Task:
        """A process in a cgroup that uses the card."""
        task = self._kernel.spawn("sleep", path, command=kind or "gpu")
        process = Process(self.card, task.pid, program, kind=kind, group=path, share=share, spins=spins)
        self._processes[task.pid] = task, process, 0.0
        return task

    def process(self, pid: int) -> Process:
        """What a task does on the card. Raises KeyError of one that does nothing there, or has ended."""
        return self._processes[pid][1]

    def _step(self, now: float) -> None:
        for pid, (task, process, _) in list(self._processes.items()):
            if pid not in self._kernel.machine.tasks:
                process.kill()
                del self._processes[pid]
            elif self._kernel.frozen(task):
                process.freeze()
            else:
                process.thaw()
        self.card.run_until(round((now - self._began) * SECOND))
        for pid, (task, process, charged) in list(self._processes.items()):
            used = process.cpu_ns / SECOND
            self._kernel.charge(task, used - charged)
            self._processes[pid] = task, process, used
            if process.ended:
                self._kernel.machine.kill(pid, 9)
                del self._processes[pid]
