"""A kernel to test, simulate and demonstrate against: the file port with the kernel's rules and a machine behind it."""

from colocate.kernelmodel.port import ModelKernel

__all__ = ["ModelKernel"]
