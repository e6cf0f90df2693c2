"""Which linears of a model are wrapped, and on which grid each of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from l4q.config import GROUP_MULTIPLE, QuantConfig
from l4q.errors import UnsupportedError, UsageError
from l4q.k_grids import FALLBACK_BITS, FALLBACK_GROUP, SUPERBLOCK
from l4q.rules import Override, grids_of, matches, require_used


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The choice."""

    linears: dict[str, nn.Linear]
    """All linear layers of the model by dotted name, in model order."""
    grids: dict[str, QuantConfig]
    """The grid of every layer to quantize, in model order."""
    fallback: tuple[str, ...] = ()
    """Those of them whose rows a K grid does not fill, so that they are on `QuantConfig.for_layer`'s."""

    def indivisible(self) -> list[str]:
        """Layers to quantize whose in_features their group size does not divide."""
        sizes = {name: self.linears[name].in_features for name in self.grids}
        return [name for name, size in sizes.items() if size % self.grids[name].resolve_group_size(size)]


def choose_targets(
    model: nn.Module,
    quant: QuantConfig,
    patterns: tuple[str, ...],
    *,
    overrides: Sequence[Override] = (),
    skip: Sequence[str] = (),
    head: bool = False,
) -> Targets:
    """Match names with patterns.

    Args:
        model: A causal language model.
        quant: The common grid.
        patterns: Of target modules; they do not reach the output head.
        overrides: Other grids for some of the targets.
        skip: Patterns of targets that stay dense.
        head: Whether the output head is a target.

    Raises:
        UsageError: A pattern matches nothing, or a K grid fits no layer.
        UnsupportedError: The head is a target, and it is the embedding matrix or no linear layer.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    output = _output_head(model)
    chosen = set(_match([name for name, module in linears.items() if module is not output], patterns))
    if head:
        chosen.add(head_name(model))
    names = [name for name in linears if name in chosen]
    require_used("skip", skip, names)
    names = [name for name in names if not any(matches(name, pattern) for pattern in skip)]
    asked = grids_of(names, quant, overrides)
    sizes = {name: linears[name].in_features for name in names}
    require_k_layers(asked, sizes)
    grids = {name: grid.for_layer(sizes[name]) for name, grid in asked.items()}
    fallback = tuple(name for name, grid in grids.items() if grid != asked[name])
    return Targets(linears=linears, grids=grids, fallback=fallback)


def require_k_layers(asked: Mapping[str, QuantConfig], in_features: Mapping[str, int]) -> None:
    """Refuse a K grid that none of the layers it is asked for can be on.

    Raises:
        UsageError: See above.
    """
    wanted = {name: grid for name, grid in asked.items() if grid.k_grid is not None}
    if wanted and all(grid.for_layer(in_features[name]) != grid for name, grid in wanted.items()):
        first = next(iter(wanted))
        raise UsageError(
            f"scale_grid {wanted[first].scale_grid} fits none of the layers",
            where=first,
            got=f"in_features {sorted({in_features[name] for name in wanted})}",
            expected=f"multiples of {SUPERBLOCK}",
            remedy=f"use --scale-grid fp16 --bits {FALLBACK_BITS} --group-size {FALLBACK_GROUP}",
        )


def head_name(model: nn.Module) -> str:
    """Name of the output head, as a linear layer with a matrix of its own.

    Raises:
        UnsupportedError: It is the embedding matrix, or no linear layer.
    """
    head, embedding = _output_head(model), _embedding(model)
    names: list[str] = [name for name, module in model.named_modules() if module is head]
    if type(head) is not nn.Linear:
        raise UnsupportedError(
            "the output head is no linear layer, so it cannot be quantized",
            got=type(head).__name__,
            expected="torch.nn.Linear",
            remedy="leave --quantize-head out",
        )
    if embedding is not None and embedding.weight is head.weight:
        raise UnsupportedError(
            "the output head is the embedding matrix (tie_word_embeddings), so it cannot be quantized alone",
            where=names[0],
            expected="a head with a matrix of its own",
            remedy="leave --quantize-head out; for GGUF, --gguf-embeddings q8_0 stores the shared matrix in 8 bits",
        )
    return names[0]


def _embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    embedding: nn.Module | None = getter() if getter else None
    return embedding


def indivisible(odd: list[str], chosen: Targets) -> UsageError:
    """The error that lists such layers and the sizes that fit."""
    sizes = sorted({chosen.linears[name].in_features for name in odd})
    fits = {size: [g for g in range(GROUP_MULTIPLE, size + 1, GROUP_MULTIPLE) if size % g == 0] for size in sizes}
    shown = ", ".join(odd[:6]) + (f", … ({len(odd)} in all)" if len(odd) > 6 else "")
    return UsageError(
        "the group size does not divide in_features of some layers",
        where=shown,
        got=f"group_size {', '.join(map(str, sorted({chosen.grids[n].group_size for n in odd})))}, in_features {sizes}",
        expected="; ".join(
            f"in_features {size}: {groups or 'only -1 (one group per row)'}" for size, groups in fits.items()
        ),
        remedy="choose a group size that fits all, use -1, or leave these layers dense (--leave-dense)",
    )


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = getter() if getter else None
    return head


def _match(candidates: list[str], patterns: tuple[str, ...]) -> list[str]:
    hits = {pattern: {n for n in candidates if matches(n, pattern)} for pattern in patterns}
    unused = [pattern for pattern, names in hits.items() if not names]
    if unused:
        raise UsageError(
            "a target pattern matches no linear layer",
            where="target_modules",
            got=unused,
            expected=f"patterns such as *.q_proj; the model has {sorted({n.rpartition('.')[2] for n in candidates})}",
        )
    chosen = set().union(*hits.values())
    return [name for name in candidates if name in chosen]
