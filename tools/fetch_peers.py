"""Install other people's exporters that tools.bench_export compares with: python -m tools.fetch_peers.

Each goes into a folder of its own under build/peers, without its dependencies, which the environment has. No test needs
them; a benchmark without them leaves their column out and says so. GPTQModel is there already, as a judge of the tests
(tools.fetch_judges).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click

from l4q.errors import L4QError, UsageError
from tools.assets_store import exclusive

PEERS_ROOT = Path("build/peers")
# folder -> what is installed there
PEERS: Mapping[str, tuple[str, ...]] = {"auto-round": ("auto-round==0.16.1",)}


def install(name: str, root: Path) -> Path:
    """Install one peer, unless a folder of its name is there; it appears complete or not at all.

    Raises:
        UsageError: pip failed.
    """
    target = root / name
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root):
        if target.is_dir():
            return target
        stage = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        try:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(stage)]
            done = subprocess.run([*command, *PEERS[name]], capture_output=True, text=True, check=False)
            if done.returncode:
                raise UsageError(
                    "pip could not install a peer",
                    where=target,
                    got=done.stderr.strip()[-2000:],
                    expected=", ".join(PEERS[name]),
                    remedy="check the connection to the package index and run it again",
                )
            stage.rename(target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return target


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=PEERS_ROOT, show_default=True)
def main(out: Path) -> None:
    """Install the exporters that benchmarks compare with under OUT."""
    try:
        for name in PEERS:
            click.echo(install(name, out))
    except L4QError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
