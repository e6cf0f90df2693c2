"""Which kernels a layer uses: the fastest of its device that equals the oracle here, or the ones asked for."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import get_args

import torch

from l4q.config import KernelChoice
from l4q.errors import UnsupportedError, UsageError, VerificationError
from l4q.kernels.eager import EagerKernels
from l4q.kernels.fused import FusedKernels
from l4q.kernels.problem import Kernels
from l4q.kernels.verify import difference

log = logging.getLogger(__name__)

EAGER = EagerKernels()
BY_DEVICE: dict[str, KernelChoice] = {"cpu": "numba", "cuda": "triton"}
EXTRAS = {"numba": "fast", "triton": "cuda"}
"""The extra of this package that installs the kernels' compiler."""


@cache
def kernels_for(choice: KernelChoice, device: str, dtype: torch.dtype = torch.float32) -> Kernels:
    """The kernels for layers on a kind of device whose scales have `dtype`; checked once per process.

    Args:
        choice: "auto", or the name of the kernels to use.
        device: torch's device type, such as "cpu" or "cuda".
        dtype: What the layer computes its weights in; compiled kernels know float32 alone.

    Raises:
        UsageError: There are no such kernels, or their compiler is not installed.
        UnsupportedError: They do not run on this device or in this dtype.
        VerificationError: They do not reproduce the oracle here.
    """
    if choice == "eager":
        return EAGER
    if choice == "auto":
        return _fastest(device, dtype)
    require_kernels(choice)
    runs_on = {"numba": ("cpu",), "triton": ("cuda", "cpu") if interpreting() else ("cuda",)}[choice]
    if device not in runs_on or dtype != torch.float32:
        raise UnsupportedError(
            "the kernels do not run there",
            where="kernels",
            got=f"{choice} for {dtype} on {device}",
            expected=f"float32 on {' or '.join(runs_on)}",
            remedy="use --kernels auto",
        )
    found = load(choice)
    odd = difference(found, device)
    if odd is not None:
        raise VerificationError(
            "the kernels do not reproduce torch on this machine",
            where=choice,
            got=odd,
            expected="equal weights, and gradients but for rounding",
            remedy="use --kernels eager, and report the versions of torch and the compiler",
        )
    return found


def _fastest(device: str, dtype: torch.dtype) -> Kernels:
    name = BY_DEVICE.get(device, "eager")
    if name == "eager" or dtype != torch.float32 or not installed(name):
        return EAGER
    try:
        found = load(name)
        odd = difference(found, device)
    except Exception as error:  # no C compiler for Triton's launcher, a version without div_rn, a broken install, ...
        odd = f"they fail: {type(error).__name__}: {error}"
    else:
        if odd is None:
            return found
    log.warning("the %s kernels are not used, because on this machine %s", name, odd)
    return EAGER


def installed(name: str) -> bool:
    """Whether the compiler of these kernels can be imported."""
    return importlib.util.find_spec(name) is not None


def load(name: str) -> Kernels:
    """Import compiled kernels, unchecked."""
    if name == "numba":
        from l4q.kernels.numba_kernels import NumbaPasses

        return FusedKernels(NumbaPasses())
    from l4q.kernels.triton_kernels import TritonPasses

    return FusedKernels(TritonPasses())


@cache
def require_kernels(choice: KernelChoice) -> None:
    """Refuse kernels that do not exist or whose compiler is missing.

    Raises:
        UsageError: See above.
    """
    if choice not in get_args(KernelChoice):
        raise UsageError(
            "unknown kernels", where="kernels", got=repr(choice), expected=f"one of {get_args(KernelChoice)}"
        )
    if choice in EXTRAS and not installed(choice):
        raise UsageError(
            "the kernels need a package that is not installed",
            where="kernels",
            got=choice,
            expected=f"the package {choice}",
            remedy=f"pip install 'l4q[{EXTRAS[choice]}]', or use --kernels auto",
        )


def interpreting() -> bool:
    """Whether Triton's kernels are interpreted, which needs no GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
