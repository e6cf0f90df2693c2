"""What usually causes a failed row, in plain sentences, looked up in tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# pattern in an engine's error -> what usually causes it; the first that matches counts
ERROR_CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"out of memory|cannot allocate|bad_alloc|MemoryError|killed by signal 9|SIGKILL",
        "The runtime ran out of memory: give it a smaller context or cache, close other programs, "
        "or use a bigger machine.",
    ),
    (
        r"no answer|timed out|within \d+(\.\d+)? s|timeout",
        "The runtime was slower than the time limit, usually because the machine is busy or it compiles kernels on its "
        "first run: run again with a larger --timeout.",
    ),
    (
        r"No module named|ModuleNotFoundError|ImportError|DLL load|cannot open shared object",
        "The runtime is not installed in this Python: install it, or name an interpreter that has it with "
        "--python ENGINE=PATH.",
    ),
    (
        r"asymmetric|unsupported quantization|only symmetric|zero.?point",
        "The runtime has no kernel for this kind of zero-point: export to a format the README's table names for it.",
    ),
    (
        r"truncat|corrupt|damaged|unexpected end|EOF|failed to load|failed to open|invalid|cannot be read|not a GGUF",
        "The exported file is damaged or cut off, usually by an interrupted copy: compare its size "
        "with the original, or "
        "export again.",
    ),
    (
        r"signal SIG|segmentation|SIGSEGV|SIGABRT|exit status",
        "The runtime crashed while it computed, usually because the windows are longer than the model's context "
        "(choose a shorter --window), or in a kernel that this processor lacks instructions for.",
    ),
    (
        r"architecture|not supported|unsupported",
        "This version of the runtime does not know the model's architecture or encoding: docs/architectures.md lists "
        "what runs where.",
    ),
    (
        r"wrong shape",
        "The export's vocabulary or window is not the checkpoint's: it was probably made from another checkpoint.",
    ),
    (
        r"NaN",
        "The runtime overflowed: usually float16 arithmetic on weights or activations that need bfloat16 or float32.",
    ),
)
UNKNOWN_ERROR = (
    "The runtime stopped with an error of its own; the last lines of its log, above, usually name the reason."
)

# a verifier's words about tensors that differ, which the row carries as its error
TENSOR_ERRORS = r"weights differ|missing from the export|not a quantized module|decoded .*, expected"
INEXACT = (
    "The exported tensors are not the checkpoint's: the folder belongs to another checkpoint, or "
    "was converted, merged or "
    "cut off after the export. Export again; the other figures of this run follow from it."
)
FOLLOWS = "The tensors themselves differ (see above), so the runtime computes with other weights."

# (format or "*", figure) -> what usually causes a broken bound although every tensor is exact
BOUND_CAUSES: dict[tuple[str, str], str] = {
    ("*", "delta_percent"): "The weights are exact, so the arithmetic differs: usually another kernel, dtype or thread "
    "count than the bound was measured with. The runtime's facts below name its kernels.",
    ("*", "kl"): "Whole distributions moved although the weights are exact: usually activations rounded more coarsely "
    "than the bound allows, or a short text on which noise weighs more.",
    ("*", "top1"): "The two disagree on the likeliest token more often than ties explain: usually a lower precision of "
    "activations or cache than the format's bound assumes.",
    (
        "*",
        "mean_abs_dlogprob",
    ): "Every token moved a little: usually the runtime computes in a lower precision than the "
    "bound assumes (float16 for float32, or a quantized cache).",
    (
        "gguf",
        "delta_percent",
    ): "llama.cpp rounds activations to int8: small models and short texts can exceed the bound. "
    "Use more windows; if it stays, export with --gguf-type F32 to tell weights from arithmetic.",
    ("gguf", "kl"): "llama.cpp rounds activations to int8: small models and short texts can exceed the bound. "
    "Use more windows; if it stays, export with --gguf-type F32 to tell weights from arithmetic.",
    ("onnx", "kl"): "Accuracy level 4 rounds activations to int8, in blocks as long as the export's: a finer "
    "--onnx-block-size brings it closer, level 0 removes it.",
    (
        "onnx",
        "delta_percent",
    ): "Level 0 computes in float32 and must agree; level 4 rounds activations to int8, where a "
    "finer --onnx-block-size or level 0 helps.",
}


def problems(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Everything wrong with a row of report.json: what, and the plain sentence on its usual cause."""
    found = []
    exact, total, error = row.get("bit_exact"), row.get("quantized_tensors", 0), str(row.get("error") or "")
    inexact = exact is not None and exact != total
    if inexact:
        count = f"{exact} of {total} tensors are bit-exact."
        of_tensors = bool(re.search(TENSOR_ERRORS, error))
        found.append({"what": f"{count} {error}" if of_tensors else count, "cause": INEXACT})
        error = "" if of_tensors else error
    if error:
        found.append({"what": error, "cause": error_cause(error)})
    for check in row.get("checks", ()):
        if not check["passed"]:
            what = f"{check['figure']} is {check['value']:.4g}, allowed {check['allowed']} ({check['reason']})."
            cause = FOLLOWS if inexact else bound_cause(row["format"], check["figure"])
            found.append({"what": what, "cause": cause})
    return found


def error_cause(message: str) -> str:
    """The usual cause of an engine's error message."""
    hits = (cause for pattern, cause in ERROR_CAUSES if re.search(pattern, message, re.IGNORECASE))
    return next(hits, UNKNOWN_ERROR)


def bound_cause(format_name: str, figure: str) -> str:
    """The usual cause of a broken bound of a format whose tensors are exact."""
    return BOUND_CAUSES.get((format_name, figure)) or BOUND_CAUSES[("*", figure)]
