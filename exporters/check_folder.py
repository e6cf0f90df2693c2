"""Whether a folder still is what was written: its files against its manifest, its weights against the checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from exporters.driver import EXPORTERS, get_exporter
from exporters.manifest import MANIFEST_NAME, read_manifest
from exporters.verify import VerifyMode, VerifyReport, sample_modules, verify
from l4q.checkpoint import L4QCheckpoint
from l4q.checkpoint_files import CHECKPOINT_MANIFEST, recorded_files, source_digest
from l4q.errors import UsageError
from l4q.file_table import FolderCheck, check_files, read_table


@dataclass(frozen=True, kw_only=True)
class CheckedFolder:
    """What was found."""

    folder: Path
    kind: Literal["export", "checkpoint"]
    files: int
    """Files the manifest lists."""
    check: FolderCheck
    same_source: bool | None = None
    """Whether the checkpoint given is the one that was exported; None if none was given."""
    weights: VerifyReport | None = None
    """What foreign decoders read, compared with that checkpoint; None if it was not done."""
    remark: str = ""
    """Why weights were not compared."""

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return self.check.passed and self.same_source is not False and (self.weights is None or self.weights.passed)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "folder": str(self.folder),
            "kind": self.kind,
            "passed": self.passed,
            "files": self.files,
            **{kind: list(names) for kind, names in vars(self.check).items()},
            "same_source": self.same_source,
            "weights": asdict(self.weights) if self.weights else None,
            "remark": self.remark,
        }

    def lines(self) -> list[str]:
        """For people: a line per finding, and a summary."""
        found = self.check.lines()
        if self.same_source is False:
            found.append("the checkpoint given is not the one that was exported")
        if self.weights is not None:
            found += [f"weights: {line}" for line in self.weights.differing]
            found.append(
                f"{self.weights.exact} of {self.weights.checked} modules decode bit for bit to the checkpoint's"
            )
        if self.remark:
            found.append(self.remark)
        summary = f"{self.kind}, {self.files} files: {'as written' if self.check.passed else 'NOT as written'}"
        return [*found, summary]


def check_folder(folder: Path, source: Path | None = None, mode: VerifyMode = "full") -> CheckedFolder:
    """Check an exported folder or an L4Q checkpoint.

    Args:
        folder: What to check.
        source: The checkpoint a folder was exported from; its weights are then compared.
        mode: How many modules to compare.

    Raises:
        UsageError: There is no manifest to check against, or the checkpoint cannot be read.
        VerificationError: A foreign decoder cannot read the folder.
    """
    if not folder.is_dir():
        raise UsageError("no such folder", where=folder, expected="a folder of l4q-export or l4q-train")
    if not (folder / MANIFEST_NAME).exists() and (folder / CHECKPOINT_MANIFEST).exists():
        return _check_checkpoint(folder, source)
    manifest = read_manifest(folder) or {}
    table = read_table(manifest.get("files"))
    if table is None or manifest.get("format") not in EXPORTERS:
        raise UsageError(
            "the folder has no manifest to check against",
            where=folder,
            got=f"{MANIFEST_NAME} is damaged or lists no files" if manifest else f"no {MANIFEST_NAME}",
            expected=f"{MANIFEST_NAME} or {CHECKPOINT_MANIFEST}, with hashes",
            remedy="it was written by another program or an older l4q: export again",
        )
    check = check_files(folder, table, skip=(MANIFEST_NAME,))
    if source is None:
        return CheckedFolder(folder=folder, kind="export", files=len(table), check=check)
    checkpoint = L4QCheckpoint.open(source)
    recorded = manifest.get("source")
    same = isinstance(recorded, dict) and recorded.get("sha256") == source_digest(source)
    report, remark = _compare(folder, checkpoint, manifest, check, mode)
    return CheckedFolder(
        folder=folder, kind="export", files=len(table), check=check, same_source=same, weights=report, remark=remark
    )


def _compare(
    folder: Path, checkpoint: L4QCheckpoint, manifest: dict[str, Any], check: FolderCheck, mode: VerifyMode
) -> tuple[VerifyReport | None, str]:
    if mode == "none":
        return None, ""
    if check.missing or check.truncated:
        return None, "weights were not compared: files are missing or truncated"
    if manifest.get("rounded_tensors"):
        return None, "weights were not compared: the export was allowed to round"
    sample = sample_modules(checkpoint) if mode == "sample" else None
    return verify(checkpoint, get_exporter(manifest["format"]), folder, sample=sample), ""


def _check_checkpoint(folder: Path, source: Path | None) -> CheckedFolder:
    if source is not None:
        raise UsageError("--source is for exports", where=folder, got="an L4Q checkpoint, which has no other source")
    table = recorded_files(folder) or {}
    check = check_files(folder, table, skip=(CHECKPOINT_MANIFEST,))
    if check.passed:
        checkpoint = L4QCheckpoint.open(folder)
        for module in checkpoint.modules:
            checkpoint.quantized(module)  # refuses values no checkpoint may have
    return CheckedFolder(folder=folder, kind="checkpoint", files=len(table), check=check)
