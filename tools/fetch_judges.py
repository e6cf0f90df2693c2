"""Install the foreign readers that cannot live in the environment: python -m tools.fetch_judges.

Each goes into a folder of its own under build/judges and is imported by a process of its own:

- compressed-tensors 0.20 reads dense 3-bit words; the 0.17 that vLLM pins reads ten 3-bit values a word;
- gptqmodel asks for a newer torch than vLLM's, changes transformers and safetensors when it is imported, and makes peft
  refuse plain LoRA. Its pure torch kernels run on the environment's torch all the same.

pypcre, one of gptqmodel's requirements, is a C extension; the loader's few patterns are as well served by Python's re,
so a module of that name forwards to it and no compiler is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click

from l4q.errors import L4QError, UsageError
from tools.assets_store import exclusive

JUDGES_ROOT = Path("build/judges")

# folder -> what is installed there, without dependencies: the rest comes from the environment
JUDGES: Mapping[str, tuple[str, ...]] = {
    "compressed-tensors": ("compressed-tensors==0.20.0",),
    "gptqmodel": (
        "gptqmodel==7.7.0",
        "optimum==2.3.0",
        "defuser==0.0.28",
        "device-smi==0.5.7",
        "logbar==0.4.15",
        "threadpoolctl==3.8.0",
        "tokenicer==0.0.14",
    ),
}
# folder -> files written beside the packages
EXTRA_FILES: Mapping[str, Mapping[str, str]] = {
    "gptqmodel": {
        "pcre.py": '"""pypcre\'s names that gptqmodel uses, served by re."""\n\n'
        "import re\nfrom re import *\n\n\n"
        "class Flag:\n    CASELESS = re.IGNORECASE\n    MULTILINE = re.MULTILINE\n",
    },
}
STAMP = "installed.txt"
# only gptqmodel's setup.py reads it: no CUDA extension is built
BUILD_ENV = {"BUILD_CUDA_EXT": "0"}


def contents(name: str) -> str:
    """What a finished folder's stamp says."""
    return "\n".join((*JUDGES[name], *EXTRA_FILES.get(name, {}).values())) + "\n"


def is_installed(name: str, root: Path) -> bool:
    """Whether the folder of a judge is complete and of these versions."""
    stamp = root / name / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == contents(name)


def install(name: str, root: Path) -> Path:
    """Install one judge, unless it is there; a folder appears complete or not at all.

    Raises:
        UsageError: pip failed.
    """
    target = root / name
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root):
        if is_installed(name, root):
            return target
        stage = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        try:
            _pip(JUDGES[name], stage)
            for file, text in EXTRA_FILES.get(name, {}).items():
                (stage / file).write_text(text, encoding="utf-8")
            (stage / STAMP).write_text(contents(name), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            stage.rename(target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return target


def _pip(requirements: tuple[str, ...], target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--target", str(target), *requirements],
        env={**os.environ, **BUILD_ENV},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UsageError(
            "pip could not install a judge",
            where=target,
            got=done.stderr.strip()[-2000:],
            expected=", ".join(requirements),
            remedy="check the connection to the package index and run it again",
        )


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=JUDGES_ROOT, show_default=True)
def main(out: Path) -> None:
    """Install the readers that need a folder of their own under OUT."""
    try:
        for name in JUDGES:
            click.echo(install(name, out))
    except L4QError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
