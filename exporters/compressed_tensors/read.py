"""Read a compressed-tensors folder back with compressed-tensors' own config parser and decompressor."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.hf_folder import missing_judge, packed_modules, read_section
from exporters.judge import needs_newer_judge, read_elsewhere
from l4q.errors import VerificationError
from l4q.shards import ShardReader
from l4q.weight import F32

if TYPE_CHECKING:
    import torch

PACKED = ".weight_packed"


def read_back(folder: Path, only: Collection[str] | None = None) -> Iterator[tuple[str, F32]]:
    """Decode every packed module, or those of `only`: (module, float32 [out_features, in_features]).

    The scales are widened to float32 first: compressed-tensors multiplies in the scales' dtype, and fp16 would round.

    Raises:
        VerificationError: A module has no scheme, is ignored by the config, or its tensors contradict its scheme.
        UsageError: The config is not compressed-tensors, or no version of that package that knows its fields is
            installed.
    """
    section = read_section(folder, "compressed-tensors", "a compressed-tensors")
    try:
        from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationConfig
    except ImportError as error:
        raise missing_judge("a compressed-tensors", error) from error
    config = QuantizationConfig.model_validate(section)
    widths = {int(scheme.weights.num_bits) for scheme in config.config_groups.values()}
    if any(needs_newer_judge(bits) for bits in widths):
        yield from read_elsewhere("compressed-tensors", folder, only)
        return
    shards = ShardReader.open(folder)
    for module in packed_modules(shards.names, PACKED, only):
        scheme = _scheme(config, module)
        prefix = f"{module}."
        parts = {name.removeprefix(prefix) for name in shards.names if name.startswith(prefix)} - {"bias"}
        expected = set(PackedQuantizationCompressor.compression_param_names(scheme))
        if parts != expected:
            raise VerificationError(
                "the tensors of a module are not those of its scheme",
                where=module,
                got=sorted(parts),
                expected=sorted(expected),
            )
        state = {part: shards.tensor(prefix + part) for part in parts}
        _check_scales(module, state, scheme)
        state["weight_scale"] = state["weight_scale"].float()
        yield module, PackedQuantizationCompressor.decompress(state, scheme)["weight"].numpy()


def _scheme(config: Any, module: str) -> Any:
    """The scheme of the config group that targets a module, as compressed-tensors matches names."""
    from compressed_tensors.utils.match import match_name

    if any(match_name(module, pattern) for pattern in config.ignore):
        raise VerificationError("a quantized module stands in the config's ignore list", where=module)
    for scheme in config.config_groups.values():
        if any(target == "Linear" or match_name(module, target) for target in scheme.targets):
            return scheme
    raise VerificationError("no config group targets a quantized module", where=module)


def _check_scales(module: str, state: dict[str, torch.Tensor], scheme: Any) -> None:
    """The decompressor infers the group size from the scales' shape; runtimes take it from the config."""
    rows, columns = state["weight_shape"].tolist()
    group_size = scheme.weights.group_size or columns
    expected = (rows, columns // group_size)
    got = tuple(state["weight_scale"].shape)
    if got != expected:
        raise VerificationError(
            "the scales contradict the config's group size", where=module, got=got, expected=expected
        )
