"""The other process of exporters/judge.py: run one format's `read_back` and hand over one array after another.

    python -m exporters.judge_child FORMAT FOLDER SCRATCH

SCRATCH/only.json, if it exists, lists the modules to read. Each module is a line {"module": name, "array": file in
SCRATCH} on stdout; the file is removed when a line comes back. The last line is {"end": true} or {"error":
class, "message": text}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from exporters.driver import get_exporter
from exporters.judge import ONLY
from l4q.errors import L4QError


def main() -> None:
    """Answer until the last module."""
    name, folder, scratch = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    listed = scratch / ONLY
    only = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else None
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # whatever the packages print belongs into the log

        def say(answer: dict[str, Any]) -> None:
            replies.write(json.dumps(answer) + "\n")
            replies.flush()

        try:
            for number, (module, array) in enumerate(get_exporter(name).read_back(folder, only)):
                target = scratch / f"{number}.npy"
                np.save(target, array)
                say({"module": module, "array": target.name})
                if not sys.stdin.readline():
                    return
                target.unlink()
            say({"end": True})
        except L4QError as error:
            say({"error": type(error).__name__, "message": str(error)})


if __name__ == "__main__":
    main()
