"""Whether vLLM can split a checkpoint over N ranks (`--tensor-parallel N`), module by module.

vLLM gives each rank whole attention heads and a run of rows (q, k, v, gate, up, the output head) or of columns (o,
down) of every matrix. Key and value heads are copied when there are fewer of them than ranks. What a rank gets must be
whole quantization groups, whole 32-bit words, and a multiple of 32 in both directions, which is what its CPU kernel
takes (on GPUs Marlin pads other sizes; Machete is noted apart).

Sources, vllm 0.32: models/llama.py (heads), layers/linear.py (QKVParallelLinear, divide), distributed/utils.py
(verify_group_size_divides_partition), layers/vocab_parallel_embedding.py (padding to 64), auto_awq.py (groups of a row
part), kernels/linear/mixed_precision/{cpu,machete,marlin}.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from exporters.hf_plan import HEAD, HEAD_MULTIPLE, VLLM_MULTIPLE, fused_members, listing
from exporters.plan import ExportOptions, RuntimeSupport
from l4q.checkpoint import L4QCheckpoint, WeightInfo
from l4q.errors import UnsupportedError

WORD = 8
"""4-bit values in a 32-bit word, the only width that vLLM splits here."""
MACHETE = (64, 128)
"""Columns and rows of Machete's tile; where they do not divide a rank's part, vLLM takes Marlin."""
CANDIDATES = range(2, 65)
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
BY_ROWS = {"qkv_proj": QKV, "gate_up_proj": GATE_UP}
"""Fused layers by the last part of their name, with their members in order; each rank gets rows of each member."""
BY_COLUMNS = ("o_proj", "down_proj")


def split_notes(
    checkpoint: L4QCheckpoint, options: ExportOptions, vllm: RuntimeSupport, *, shares_row_scales: bool
) -> tuple[str, ...]:
    """What the plan says of `options.tensor_parallel` ranks; nothing for one.

    Args:
        checkpoint: The source.
        options: Of the export.
        vllm: Whether vLLM loads the export on one rank.
        shares_row_scales: Whether vLLM's loader of this format gives every rank the scales of one-group rows (GPTQ and
            compressed-tensors do, AWQ does not).

    Raises:
        UnsupportedError: A module does not survive the split; the message lists all of them and the N that work.
    """
    ranks = options.tensor_parallel
    if ranks == 1:
        return ()
    problems = [vllm.reason] if not vllm.loads else list(split_problems(checkpoint, ranks, shares_row_scales))
    if problems:
        fits = (
            [n for n in CANDIDATES if not any(split_problems(checkpoint, n, shares_row_scales))] if vllm.loads else []
        )
        raise UnsupportedError(
            f"vLLM cannot split this export over {ranks} ranks",
            where="--tensor-parallel",
            got=listing(problems),
            expected=f"--tensor-parallel {' or '.join(map(str, fits))}" if fits else "one rank",
            remedy="serve on that many ranks, or train with a smaller group size",
        )
    notes = [f"tensor parallel {ranks}: every rank of vLLM holds whole heads, groups, words and kernel tiles."]
    slow = [name for name, columns, rows in _parts(checkpoint, ranks) if columns % MACHETE[0] or rows % MACHETE[1]]
    if slow:
        notes.append(
            f"tensor parallel {ranks}: on Hopper, Marlin takes the place of Machete where a rank's columns and rows "
            f"are not in multiples of {MACHETE}: {listing(slow, 4)}."
        )
    return tuple(notes)


def split_problems(checkpoint: L4QCheckpoint, ranks: int, shares_row_scales: bool) -> Iterator[str]:
    """Everything that stands in the way of `ranks` ranks, one sentence each: sizes of the model, else its modules."""
    sizes = list(_odd_sizes(checkpoint.config, ranks))
    yield from sizes
    for layer, members in () if sizes else fused_members(checkpoint).items():
        check = _CHECKS.get(layer.rpartition(".")[2])
        infos = {member: checkpoint.info(member) for member in members}
        if check is None:
            yield f"{layer}: not one of {sorted(_CHECKS)}, so how vLLM splits it is not known"
        else:
            yield from (f"{layer}: {problem}" for problem in check(checkpoint.config, infos, ranks, shares_row_scales))


def _odd_sizes(config: Mapping[str, Any], ranks: int) -> Iterator[str]:
    heads, kv_heads = _heads(config)
    if heads % ranks:
        yield f"{heads} attention heads"
    if kv_heads % ranks and ranks % kv_heads:
        yield f"{kv_heads} key-value heads"
    for key in ("intermediate_size", "moe_intermediate_size"):
        if (config.get(key) or 0) % ranks:
            yield f"{key} {config[key]}"
    padded = _padded(int(config["vocab_size"]))
    if padded % ranks:
        yield f"vocabulary of {padded} rows with padding"


def _by_rows(config: Mapping[str, Any], infos: Mapping[str, WeightInfo], ranks: int, _: bool) -> Iterator[str]:
    sizes = _member_rows(config, infos)
    whole = [size for _, size in sizes]
    shares = [_share(config, leaf, size, ranks) for leaf, size in sizes]
    if any(share is None for share in shares):
        yield f"{whole} rows over {ranks} ranks"
        return
    rows = [share for share in shares if share is not None]
    if any(count % WORD for count in rows):
        yield f"{rows} rows a rank do not fill words of {WORD}"
    if sum(rows) % VLLM_MULTIPLE:
        yield f"{sum(rows)} rows a rank are no multiple of {VLLM_MULTIPLE}"


def _by_columns(
    config: Mapping[str, Any], infos: Mapping[str, WeightInfo], ranks: int, shares_row_scales: bool
) -> Iterator[str]:
    (info,) = infos.values()
    if info.in_features % ranks:
        yield f"{info.in_features} columns over {ranks} ranks"
        return
    columns = info.in_features // ranks
    if info.per_row and not shares_row_scales:
        yield "one group per row, and vLLM's AWQ loader does not give its scales to every rank"
    if not info.per_row and columns % info.group_size:
        yield f"{columns} columns a rank are not whole groups of {info.group_size}"
    if columns % VLLM_MULTIPLE:
        yield f"{columns} columns a rank are no multiple of {VLLM_MULTIPLE}"


def _head(config: Mapping[str, Any], infos: Mapping[str, WeightInfo], ranks: int, _: bool) -> Iterator[str]:
    rows = _padded(int(config["vocab_size"])) / ranks
    if rows % VLLM_MULTIPLE:
        yield f"{rows:g} rows a rank are no multiple of {VLLM_MULTIPLE}"


_CHECKS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, WeightInfo], int, bool], Iterator[str]]] = {
    **dict.fromkeys(BY_ROWS, _by_rows),
    **dict.fromkeys(BY_COLUMNS, _by_columns),
    HEAD: _head,
}


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    heads = int(config["num_attention_heads"])
    return heads, int(config.get("num_key_value_heads") or heads)


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // HEAD_MULTIPLE) * HEAD_MULTIPLE


def _member_rows(config: Mapping[str, Any], infos: Mapping[str, WeightInfo]) -> list[tuple[str, int]]:
    """Rows by member; a layer that the checkpoint itself keeps fused is cut where vLLM cuts it."""
    sizes = [(name.rpartition(".")[2], info.out_features) for name, info in infos.items()]
    leaf, rows = sizes[0]
    if leaf == "gate_up_proj":
        return [(member, rows // 2) for member in GATE_UP]
    if leaf == "qkv_proj":
        heads, kv_heads = _heads(config)
        size = rows // (heads + 2 * kv_heads)
        return [("q_proj", heads * size), ("k_proj", kv_heads * size), ("v_proj", kv_heads * size)]
    return sizes


def _share(config: Mapping[str, Any], leaf: str, rows: int, ranks: int) -> int | None:
    """Rows of a member on one rank; None if there is no whole number of them."""
    _, kv_heads = _heads(config)
    if leaf in QKV[1:] and ranks > kv_heads:
        return rows // kv_heads if ranks % kv_heads == 0 else None  # every rank has a copy of one head
    return None if rows % ranks else rows // ranks


def _parts(checkpoint: L4QCheckpoint, ranks: int) -> Iterator[tuple[str, int, int]]:
    """(layer, columns, rows) of what one rank holds, for a split without problems."""
    for layer, members in fused_members(checkpoint).items():
        infos = {member: checkpoint.info(member) for member in members}
        columns = infos[members[0]].in_features
        if layer.rpartition(".")[2] in BY_COLUMNS:
            yield layer, columns // ranks, infos[members[0]].out_features
        elif layer == HEAD:
            yield layer, columns, _padded(int(checkpoint.config["vocab_size"])) // ranks
        else:
            sizes = _member_rows(checkpoint.config, infos)
            yield layer, columns, sum(_share(checkpoint.config, leaf, size, ranks) or 0 for leaf, size in sizes)
