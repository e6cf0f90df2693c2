"""What a pre-quantized model offers to a checkpoint: its architecture, its integers, and everything else it holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn

from l4q.errors import UnsupportedError, UsageError
from l4q.files import find_side_files, portable_tokenizer_config
from l4q.guards import foreign
from l4q.model_folder import check_size, read_config, refuse_code
from l4q.starts import open_start
from l4q.starts.gguf import GgufStart
from l4q.starts.grid import LinearGrid
from l4q.starts.start import PretrainedStart

NAMES_SHOWN = 5


class Source:
    """A pre-quantized model, opened and held against its architecture; tensors are read one at a time.

    Args:
        start: The reader.
        settings: Folder with config.json and tokenizer in place of a GGUF file's own; None: the source's own.
    """

    def __init__(self, start: PretrainedStart, settings: Path | None = None) -> None:
        self._start, self._settings = start, settings
        self.path, self.format = start.path, start.format
        self.joins = isinstance(start, GgufStart)
        """Whether groups repeat what larger ones shared, because the format has one size of blocks."""
        self._model = _skeleton(start, settings)
        start.attach(self._model)
        linears = {name: module for name, module in self._model.named_modules() if type(module) is nn.Linear}
        head = self._model.get_output_embeddings()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        self.linears: frozenset[str] = frozenset(linears)
        """Every linear module of the architecture, the output head among them."""
        quantized = set(start.modules())
        self.modules: tuple[str, ...] = tuple(
            name for name, module in linears.items() if name in quantized and module is not head
        )
        """Quantized linears of the blocks, in model order."""
        self._dense = self._dense_names()
        rounded = [f"{name}.weight" for name in sorted(quantized - set(self.modules))]
        self.notes: tuple[str, ...] = tuple(
            f"{name}: dense float32, as embeddings and the output head are never quantized here"
            for name in rounded
            if name in self._dense
        )

    @classmethod
    def open(cls, path: str, settings: Path | None = None) -> Source:
        """Open a GPTQ, AWQ or compressed-tensors folder or hub id, or a GGUF file.

        Raises:
            UsageError: It is none of these, is damaged, or holds other tensors than its architecture has.
            UnsupportedError: No reader or no architecture is known for it.
        """
        start = open_start(path)
        if start is None:
            raise UsageError(
                "not a pre-quantized model",
                where=path,
                expected="a folder whose config.json has a quantization_config, or a .gguf file",
                remedy="an unquantized model is the MODEL of l4q-train",
            )
        if settings is not None and not (settings / "config.json").is_file():
            raise UsageError(
                "config.json not found", where=settings, remedy="give --model-config a Hugging Face folder"
            )
        if settings is None and isinstance(start, GgufStart) and start.rope_scaling():
            raise UnsupportedError(
                "the file's RoPE scaling cannot be read from GGUF",
                where=path,
                got=f"rope.scaling.type {start.rope_scaling()}",
                remedy="give the Hugging Face folder it was made from, or one with its config.json: "
                "--model-config FOLDER",
            )
        return cls(start, settings)

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, without quantization_config."""
        folder = self._settings or (self.path if self.path.is_dir() else None)
        if folder is None:
            content: dict[str, Any] = {**self._model.config.to_dict(), "_name_or_path": self.path.stem}
            content.pop("_model_name_or_path", None)  # the file's general.name, neither a path nor a model id
        else:
            content = read_config(folder)
        content["architectures"] = [type(self._model).__name__]
        return {key: value for key, value in content.items() if key != "quantization_config"}

    def grid(self, module: str) -> LinearGrid | None:
        """The integers of one of `modules`; None if they are on no linear grid.

        Raises:
            UsageError: They are damaged, or do not have the layer's shape.
        """
        grid = self._start.grid(module)
        if grid is not None:
            self._check_shape(f"{module}.weight", tuple(grid.codes.shape))
        return grid

    def obstacle(self, module: str) -> str:
        """Why `grid` has nothing for a module."""
        return self._start.obstacle(module)

    def values(self, module: str) -> torch.Tensor:
        """The dequantized float32 weight [out, in] of one of `modules`."""
        values = self._start.values(module)
        self._check_shape(f"{module}.weight", tuple(values.shape))
        return values

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every other tensor, tied ones once: in its stored dtype, or float32 if it was quantized."""
        held = self._start.names()
        for name in self._dense:
            tensor = self._start.tensor(name) if name in held else self._start.values(name.removesuffix(".weight"))
            self._check_shape(name, tuple(tensor.shape))
            yield name, tensor

    @contextmanager
    def side_files(self) -> Iterator[tuple[Path, ...]]:
        """Tokenizer, chat template, generation config and licence, for as long as the block runs."""
        folder = self._settings or (self.path if self.path.is_dir() else None)
        if folder is not None:
            yield find_side_files(folder)
            return
        with TemporaryDirectory() as scratch:
            context = getattr(self._model.config, "max_position_embeddings", None)
            cast(GgufStart, self._start).tokenizer(context).save_pretrained(scratch)
            portable_tokenizer_config(Path(scratch))
            _drop_tokens(Path(scratch), self._model.config.vocab_size)
            if self._model.generation_config is not None:
                self._model.generation_config.save_pretrained(scratch)
            yield find_side_files(Path(scratch))

    def _dense_names(self) -> tuple[str, ...]:
        """Names of the architecture's tensors outside of `modules`.

        Raises:
            UsageError: The source lacks some, or holds others.
        """
        named = {name for name, _ in self._model.named_parameters()}
        tied = {name for name, _ in self._model.named_parameters(remove_duplicate=False)} - named
        wanted = [name for name in self._shapes if name not in tied]
        weights = {f"{module}.weight" for module in self._start.modules()}
        held = self._start.names() | weights
        lacking = [name for name in wanted if name not in held]
        odd = [name for name in sorted(held - set(wanted) - tied) if not self._ignorable(name)]
        if isinstance(self._start, GgufStart):
            odd += [name for name in self._start.homeless() if not (self._settings and name.startswith("rope_"))]
        if lacking or odd:
            raise UsageError(
                "the source's tensors are not those of its architecture",
                where=self.path,
                got=f"missing {lacking[:NAMES_SHOWN]}, without a place {odd[:NAMES_SHOWN]}",
                expected=type(self._model).__name__,
                remedy="fused, stacked or renamed layers cannot be read; if a GGUF file's metadata says too little, "
                "give --model-config FOLDER",
            )
        inside = {f"{module}.weight" for module in self.modules}
        return tuple(name for name in wanted if name not in inside)

    def _ignorable(self, name: str) -> bool:
        """Whether a tensor has no place but means nothing: what transformers ignores, or a bias of zeros."""
        patterns = self._model._keys_to_ignore_on_load_unexpected or ()
        if name.endswith("rotary_emb.inv_freq") or any(re.search(pattern, name) for pattern in patterns):
            return True
        return name.endswith(".bias") and not bool(self._start.tensor(name).any())

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if shape != self._shapes[name]:
            raise UsageError(
                "a tensor has another shape than its architecture says",
                where=f"{self.path}: {name}",
                got=list(shape),
                expected=list(self._shapes[name]),
                remedy="the files are damaged, or config.json describes another model",
            )


def _drop_tokens(folder: Path, count: int) -> None:
    """Remove tokens beyond the vocabulary: transformers adds <|endoftext|> where a GGUF file has no unknown token."""
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    extra = {entry["content"] for entry in content["added_tokens"] if entry["id"] >= count}
    if not extra:
        return
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] not in extra]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    values = json.loads(settings.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if not (isinstance(value, str) and value in extra)}
    settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _skeleton(start: PretrainedStart, settings: Path | None) -> Any:
    """The architecture without weights.

    Raises:
        UnsupportedError: transformers knows no causal language model for the config.
    """
    import transformers

    with foreign(
        "transformers knows no causal language model for this config",
        where=settings or start.path,
        expected="an architecture of AutoModelForCausalLM",
        remedy=None,
        kind=UnsupportedError,
    ):
        config = start.config() if settings is None else _settings_config(settings)
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        check_size(model, start.path)
        return model


def _settings_config(folder: Path) -> Any:
    import transformers

    refuse_code(read_config(folder), folder / "config.json")
    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
