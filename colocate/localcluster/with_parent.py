"""Runs a program that is killed when the process that started it ends (prctl(2), PR_SET_PDEATHSIG)."""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1
parent = os.getppid()
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
if os.getppid() != parent:
    sys.exit(1)
os.execv(sys.argv[1], sys.argv[1:])
