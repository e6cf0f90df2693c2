"""GGUF files: transformers reads config, tokenizer and values; integers are read by `l4q.starts.gguf_blocks`.

Types without linear blocks that `gguf.quants.dequantize` knows (K types, IQ types, 16 and 32 bits) are dequantized and
have no grid.
Row orders and names are transformers' own: its tensor processor is applied to codes and block parameters alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from l4q.errors import UnsupportedError, UsageError
from l4q.finite import require_finite
from l4q.guards import foreign
from l4q.model_folder import check_size
from l4q.starts.gguf_blocks import LINEAR_TYPES, integer_points
from l4q.starts.gguf_header import check_gguf
from l4q.starts.grid import LinearGrid

log = logging.getLogger(__name__)

# types without blocks -> how they are kept in a checkpoint
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# attribute of a tokenizer -> the key of its token's id
SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


class GgufStart:
    """A GGUF file; see `PretrainedStart`. `grid` and `modules` know nothing before `load` or `attach`."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: dict[str, str] = {}
        self._processor: Any = None

    @classmethod
    def open(cls, path: Path) -> GgufStart:
        """Check that the file is there and can be parsed.

        Raises:
            UsageError: It is missing or damaged.
        """
        check_gguf(path)
        start = cls(path)
        with foreign("the GGUF file is truncated or damaged", where=path):
            _ = start._tensors
        return start

    def load(self, dtype: torch.dtype) -> tuple[Any, Any]:
        """The model with dequantized weights in `dtype`, and its tokenizer.

        Raises:
            UnsupportedError: transformers cannot read this architecture from GGUF.
            UsageError: Tensors are missing.
        """
        from transformers import AutoModelForCausalLM

        self._check_size()
        with self._readable():
            loaded = AutoModelForCausalLM.from_pretrained(**self._place, dtype=dtype, output_loading_info=True)
        model, info = loaded
        if info["missing_keys"]:
            raise UsageError(
                "the GGUF file lacks tensors",
                where=self.path,
                got=sorted(info["missing_keys"])[:5],
                remedy="copy it again",
            )
        _as_plain_model(model)
        model.config.name_or_path = self.path.stem
        self.attach(model)
        return model, self.tokenizer(context=getattr(model.config, "max_position_embeddings", None))

    def config(self) -> Any:
        """The transformers config, from the file's metadata.

        Raises:
            UnsupportedError: transformers cannot read this architecture from GGUF.
        """
        from transformers import AutoConfig

        with self._readable():
            config = AutoConfig.from_pretrained(**self._place)
        return _short_epsilon(config)

    def tokenizer(self, context: int | None) -> Any:
        """The tokenizer, from the file's metadata; `context` bounds its model_max_length.

        Raises:
            UnsupportedError: The file has none that transformers can rebuild.
        """
        from transformers import AutoTokenizer

        with self._readable():
            tokenizer = AutoTokenizer.from_pretrained(**self._place)
        self._complete(tokenizer, context)
        return repair_tokenizer(tokenizer, self._field("tokenizer.ggml.pre"))

    def modules(self) -> tuple[str, ...]:
        """Modules whose weight is a matrix in a block type, linear or not."""
        stems = {name.removesuffix(".weight"): self._tensors[target] for name, target in self._names.items()}
        return tuple(
            stem for stem, tensor in stems.items() if tensor.tensor_type.name not in PLAIN and len(tensor.shape) == 2
        )

    def obstacle(self, module: str) -> str:
        """Why `grid` has nothing for a module."""
        target = self._names.get(f"{module}.weight")
        return "the start keeps it on no linear grid" + (f" ({self._type(target)})" if target else "")

    def values(self, module: str) -> torch.Tensor:
        """The float32 weight [out, in] that gguf makes of a module."""
        return self._dequantized(f"{module}.weight")

    def names(self) -> frozenset[str]:
        """Hugging Face names of the tensors that belong to none of `modules`."""
        return frozenset(self._names) - {f"{module}.weight" for module in self.modules()}

    def tensor(self, name: str) -> torch.Tensor:
        """One of `names`, in the dtype of the file, or in float32 if that is none of torch."""
        return self._dequantized(name).to(PLAIN.get(self._type(self._names[name]), torch.float32))

    def homeless(self) -> tuple[str, ...]:
        """Tensors of the file that the attached model has no place for."""
        return tuple(sorted(set(self._tensors) - set(self._names.values())))

    def rope_scaling(self) -> str | None:
        """The RoPE scaling that the metadata names and transformers' reader does not look at."""
        kind = self._field(f"{self._field('general.architecture')}.rope.scaling.type")
        return None if kind in (None, "none") else str(kind)

    def grid(self, module: str) -> LinearGrid | None:
        """The integers of one linear layer; None if its type is not linear or the layer is not in the file."""
        target = self._names.get(f"{module}.weight")
        tensor = None if target is None else self._tensors[target]
        if tensor is None or tensor.tensor_type.name not in LINEAR_TYPES or len(tensor.shape) != 2:
            return None
        bits, read = LINEAR_TYPES[tensor.tensor_type.name]
        codes, scales, mins = (
            None if part is None else self._hf_rows(part, tensor.name) for part in read(np.asarray(tensor.data))
        )
        where = f"{self.path}: {tensor.name}"
        if mins is None:
            return LinearGrid.build(codes, scales, bits=bits, where=where)  # type: ignore[arg-type]
        zeros = integer_points(scales, mins, (1 << bits) - 1)  # type: ignore[arg-type]
        if zeros is not None:
            return LinearGrid.build(codes, scales, zeros, bits=bits, where=where)  # type: ignore[arg-type]
        return LinearGrid.build(codes, scales, None, mins, bits=bits, where=where)  # type: ignore[arg-type]

    @property
    def _place(self) -> dict[str, Any]:
        """Where transformers finds the file."""
        return {"pretrained_model_name_or_path": self.path.parent, "gguf_file": self.path.name}

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Make what transformers raises about the file an error of ours."""
        with foreign(
            "transformers cannot load this GGUF file",
            where=self.path,
            expected="a causal language model with its tokenizer",
            remedy="start from the Hugging Face folder it was made from",
            kind=UnsupportedError,
        ):
            yield

    def _check_size(self) -> None:
        """Refuse metadata that describes a model far larger than the file."""
        from transformers import AutoModelForCausalLM

        config = self.config()
        with self._readable(), torch.device("meta"):
            check_size(AutoModelForCausalLM.from_config(config), self.path)

    def _type(self, target: str) -> str:
        return str(self._tensors[target].tensor_type.name)

    def _dequantized(self, name: str) -> torch.Tensor:
        """The float32 values that gguf makes of a tensor, by its Hugging Face name."""
        from gguf.quants import dequantize

        tensor = self._tensors[self._names[name]]
        where = f"{self.path}: {tensor.name}"
        with foreign("a tensor cannot be dequantized", where=where):
            return require_finite(self._hf_rows(dequantize(tensor.data, tensor.tensor_type), tensor.name), where)

    @cached_property
    def _reader(self) -> Any:
        facts = self.path.stat()
        return _read(self.path, facts.st_mtime_ns, facts.st_size)

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def attach(self, model: Any) -> None:
        """Learn which tensor of the file holds which parameter of a loaded model, and how its rows are permuted."""
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        kind = TENSOR_PROCESSORS.get(self._field("general.architecture"), TensorProcessor)
        self._processor = kind(config=model.config.to_dict())
        found = get_gguf_hf_weights_map(model, self._processor)
        self._names = {hf_name: target for target, hf_name in found.items() if target in self._tensors}

    def _complete(self, tokenizer: Any, context: int | None) -> None:
        """Special tokens and chat template that transformers' reader leaves out."""
        for name, key in SPECIAL_TOKENS.items():
            number = self._field(key)
            if getattr(tokenizer, name) is None and number is not None:
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(number)))
        if tokenizer.chat_template is None:
            tokenizer.chat_template = self._field("tokenizer.chat_template")
        if context is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, context)

    def _hf_rows(self, part: npt.NDArray[Any], name: str) -> torch.Tensor:
        """Rows in Hugging Face's order: [rows, anything] of a GGUF tensor, permuted as transformers does."""
        moved = self._processor.process(weights=part, name=name, tensor_key_mapping={}, parsed_parameters={}).weights
        return torch.from_numpy(np.require(moved, requirements=("C", "W")))  # a view of the file is copied


@lru_cache(maxsize=1)
def _read(path: Path, changed: int, size: int) -> Any:
    """Parse a file once: with a large vocabulary that takes seconds. `changed` and `size` tell its versions apart."""
    from gguf import GGUFReader

    return GGUFReader(path)


def repair_tokenizer(tokenizer: Any, pre: object) -> Any:
    """Give a tokenizer that transformers rebuilt from a GGUF file the splitting its `tokenizer.ggml.pre` names.

    transformers only builds the GPT-2 split; "smollm" splits digits one by one before it, and without that two spaces
    before a number, for example, get other ids. Splittings unknown here are left alone, with a warning.
    """
    if pre in PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[str(pre)]()
    elif pre not in (None, *GPT2_SPLIT):
        log.warning("tokenizer.ggml.pre %s: transformers' tokenizer may split text otherwise than llama.cpp", pre)
    return tokenizer


def _smollm_split() -> Any:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


# tokenizer.ggml.pre -> the pre-tokenizer it means
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {"smollm": _smollm_split}
GPT2_SPLIT = ("default", "gpt-2", "gpt2")


def _as_plain_model(model: Any) -> None:
    """Undo what marks a model read from GGUF as quantized; its weights are plain floats by now."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    vars(model.config).pop("_model_name_or_path", None)  # the file's general.name, neither a path nor a model id
    _short_epsilon(model.config)


def _short_epsilon(config: Any) -> Any:
    """The file holds the float32 nearest to 1e-5, say; its short form is the same float32."""
    epsilon = getattr(config, "rms_norm_eps", None)
    if epsilon is not None:
        config.rms_norm_eps = float(str(np.float32(epsilon)))
    return config
