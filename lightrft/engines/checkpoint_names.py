"""What weights may be called in a checkpoint: some models of several modalities have other names for them in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedModel


def checkpoint_names(model: PreTrainedModel, names: Iterable[str]) -> list[dict[str, str]]:
    """Names in a checkpoint by name in memory, in every form that one of the architecture may have.

    By the tables with which ``transformers`` loads it, read backwards. They say what a checkpoint may need, and of what
    one does not need nothing is known: whether an inner model has a prefix of its own, say. A weight that a table
    splits or joins, rather than renames, keeps the name that it has in memory.

    Returns:
        forms from the likeliest on: as in memory, by the table of the model itself, by the tables of the models inside
        it too, without and with the prefixes that they may take away.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    kinds = (type(model).__name__, model.config.model_type)
    own: list[Any] = next(filter(None, map(get_checkpoint_conversion_mapping, kinds)), [])
    every = get_model_conversion_mapping(model, add_legacy=False)
    tables = [[], own, [one for one in every if not isinstance(one, PrefixChange)], every]
    renamings = [_backwards(table) for table in tables]
    names = list(names)
    return [{name: renamed(name) for name in names} for renamed in renamings]


def _backwards(table: list[Any]) -> Callable[[str], str]:
    """From a name in memory to the one that ``table`` makes it from."""
    from transformers.core_model_loading import WeightConverter

    steps = [one.reverse_transform() for one in reversed(table)]
    changing = [one for one in steps if isinstance(one, WeightConverter)]
    renaming = [one for one in steps if not isinstance(one, WeightConverter)]

    def renamed(name: str) -> str:
        if any(one.rename_source_key(name)[1] is not None for one in changing):
            return name
        for one in renaming:
            name, _ = one.rename_source_key(name)
        return name

    return renamed
