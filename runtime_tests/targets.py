"""Find out what a folder is and which engine runs it: `ParityTarget`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.manifest import MANIFEST_NAME, read_manifest
from l4q.errors import UsageError

# Weight files by suffix; everything else in a folder is configuration.
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".data")
# quant_method of config.json, which is the format's name -> engine
ENGINE_OF_METHOD = {"gptq": "vllm", "awq": "vllm", "compressed-tensors": "vllm", "l4q": "torch"}
# engine -> the runtime's name in plans and manifests
RUNTIME_OF_ENGINE = {"vllm": "vLLM"}
# engine -> (the option that sets its context, the context it has without, in tokens)
CONTEXTS = {"vllm": ("max_model_len", 1024), "llamacpp": ("n_ctx", 4096)}


@dataclass(frozen=True, kw_only=True)
class ParityTarget:
    """One folder in one engine with one set of options."""

    format: str
    """A name of exporters.driver.EXPORTERS, or "l4q"."""
    engine: str
    """A key of runtime_tests.engines.host.ENGINES."""
    variant: str
    """Selects the thresholds: the GGUF block type, the ONNX accuracy level, or ""."""
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the engine."""
    bits_per_weight: float | None = None
    refused: str = ""
    """Why the runtime is not started: the plan, recorded in the manifest, says that it does not load the folder."""

    def engine_options(self, tokens: int) -> dict[str, Any]:
        """The engine's keyword arguments for sequences of so many tokens: as given, and a longer context if needed."""
        name, default = CONTEXTS.get(self.engine, ("", tokens))
        return {**({name: tokens} if tokens > default else {}), **self.options}

    @property
    def nbytes(self) -> int:
        """Bytes of the folder's weight files."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)

    @property
    def label(self) -> str:
        """Short name for tables: format and variant."""
        return f"{self.format} {self.variant}".strip()


def detect(folder: str | Path) -> tuple[ParityTarget, ...]:
    """The engine runs a folder calls for: one, or two for ONNX (the shipped accuracy level and level 4).

    Raises:
        UsageError: The folder is missing or is none of the formats.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UsageError("no such folder", where=path, remedy="give folders written by l4q-export")
    manifest = read_manifest(path) or {}
    bits = manifest.get("bits_per_weight")
    if (path / "model.onnx").is_file():
        level = str(manifest.get("options", {}).get("onnx_accuracy_level", 0))
        return tuple(_onnx(path, chosen, bits) for chosen in dict.fromkeys((level, "4")))
    files = sorted(path.glob("*.gguf"))
    if files:
        variant = (manifest.get("encodings") or [files[0].stem.rpartition("-")[2]])[0]
        # float32 KV cache and no flash attention: what is left is the weights' and the kernels' own noise
        options = {"kv": "f32", "flash_attn": False}
        return (
            ParityTarget(
                format="gguf", engine="llamacpp", variant=variant, folder=path, options=options, bits_per_weight=bits
            ),
        )
    method = _quant_method(path)
    if method in ENGINE_OF_METHOD:
        engine = ENGINE_OF_METHOD[method]
        return (
            ParityTarget(
                format=method,
                engine=engine,
                variant="",
                folder=path,
                bits_per_weight=bits,
                refused=_refusal(manifest, engine),
            ),
        )
    raise UsageError(
        "the folder is none of the formats l4q-parity runs",
        where=path,
        got=f"quant_method {method}",
        expected="model.onnx, a .gguf file, or config.json with one of the quant_methods "
        f"{sorted(ENGINE_OF_METHOD)} ({MANIFEST_NAME} helps)",
    )


def _onnx(path: Path, level: str, bits: float | None) -> ParityTarget:
    return ParityTarget(
        format="onnx",
        engine="onnxruntime",
        variant=level,
        folder=path,
        options={"accuracy_level": int(level)},
        bits_per_weight=bits,
    )


def _refusal(manifest: dict[str, Any], engine: str) -> str:
    """Why the engine's runtime does not load the folder, or ""; older manifests and foreign folders do not say."""
    runtime = RUNTIME_OF_ENGINE.get(engine, "")
    planned = manifest.get("runtimes", {}).get(runtime, {})
    return "" if planned.get("loads", True) else f"{runtime} does not load it: {planned.get('reason')}"


def _quant_method(path: Path) -> str | None:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        method = config.get("quantization_config", {}).get("quant_method")
    except (OSError, ValueError, AttributeError):
        return None
    return str(method) if method else None
