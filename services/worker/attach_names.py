"""Names and layouts of checkpoints as they are published → those of the model, without a copy where none is needed.

transformers knows for every architecture how the tensors of published checkpoints become parameters: some are renamed;
those of a mixture's experts are stacked into one, and gate and up projections joined. Tensors that lie in memory one
after another at equal distances *are* such a stack already: it is a view with strides, and only the experts' own
matrices need to be contiguous, which they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch


def renamed(model: Any, views: Mapping[str, torch.Tensor], names: Collection[str]) -> dict[str, torch.Tensor] | None:
    """The same memory under the names that the model has; None if that takes a copy. `names` are the model's.

    What the model does not know keeps its name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    if len(renamings) + len(converters) != len(mapping):
        return None
    known = dict.fromkeys(names, True)
    prefix = model.base_model_prefix
    found: dict[str, torch.Tensor] = {}
    groups: dict[str, dict[str, list[tuple[Any, torch.Tensor]]]] = {}
    experts: dict[tuple[str, str], tuple[str, str]] = {}  # what all experts of one layer have in common
    for name in views:
        before, number, after = _expert(name)
        target, pattern = experts.get((before, after), ("", None))
        if pattern is None:
            target, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if target not in known and name in known:
                target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=known)
            if pattern is not None and number >= 0:
                experts[before, after] = (target, pattern)
        if target not in known:
            found[name] = views[name]
        elif pattern is None:
            found[target] = views[name]
        else:
            place = (number,) if number >= 0 else dot_natural_key(name)
            groups.setdefault(target, {}).setdefault(pattern, []).append((place, views[name]))
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    for target, group in groups.items():
        converter = of_pattern[next(iter(group))]
        lists = [sorted(group.get(pattern, []), key=itemgetter(0)) for pattern in converter.source_patterns]
        joined = _joined(converter, [[view for _, view in one] for one in lists])
        if joined is None:
            return None
        found[target] = joined
    return found


def _expert(name: str) -> tuple[str, int, str]:
    """ "a.experts.7.b" → ("a", 7, "b"); the number is -1 in a name of no expert."""
    before, found, rest = name.rpartition(".experts.")
    number, _, after = rest.partition(".")
    return (before, int(number), after) if found and number.isdecimal() else (name, -1, "")


def _joined(converter: Any, lists: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor | None:
    from transformers.core_model_loading import Concatenate, MergeModulelist

    operations = converter.operations
    stacks = bool(operations) and type(operations[0]) is MergeModulelist and operations[0].dim == 0
    if not stacks or len(converter.target_patterns) != 1:
        return None
    if len(operations) == 1 and len(lists) == 1:
        return stacked(lists)
    if len(operations) == 2 and type(operations[1]) is Concatenate and operations[1].dim == 1:
        return stacked(lists)
    return None


def stacked(lists: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor | None:
    """`torch.cat([torch.stack(one) for one in lists], dim=1)` as a view; None if the tensors do not lie like that."""
    first = lists[0][0] if lists and lists[0] else None
    if first is None or first.dim() == 0 or any(len(one) != len(lists[0]) for one in lists):
        return None
    inner, rows = first.shape[1:], sum(one[0].shape[0] for one in lists)
    count = len(lists[0])
    item_bytes, start = first.itemsize, first.data_ptr()
    step_bytes = lists[0][1].data_ptr() - start if count > 1 else rows * inner.numel() * item_bytes
    at = start
    for one in lists:
        shape = one[0].shape
        if shape[1:] != inner:
            return None
        for number, tensor in enumerate(one):
            placed = tensor.data_ptr() == at + number * step_bytes and tensor.is_contiguous()
            if not placed or tensor.shape != shape or tensor.dtype != first.dtype:
                return None
        at += one[0].numel() * item_bytes
    if step_bytes < 0 or step_bytes % item_bytes:
        return None
    strides = (step_bytes // item_bytes, *first.stride())
    return first.as_strided((count, rows, *inner), strides, first.storage_offset())
