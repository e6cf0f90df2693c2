"""What other processes see of the environment: an allow-list, so that no token or key of the shell reaches them."""

from __future__ import annotations

import os

INHERITED = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "SSL_CERT_FILE",
)
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",  # of the file that `hf auth login` leaves in HOME
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
"""No hub and no telemetry."""


def minimal_environment() -> dict[str, str]:
    """The variables of ours that are inherited, and those that keep a process off the network."""
    return {**{name: os.environ[name] for name in INHERITED if name in os.environ}, **OFFLINE}
