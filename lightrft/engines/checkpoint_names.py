"""What weights are called in a checkpoint: some models of several modalities have other names for them in memory."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel


def checkpoint_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Name in the published checkpoint by name in memory.

    By the table with which ``transformers`` loads the architecture, read backwards. Tables of the models inside it are
    left out, as ``from_pretrained`` drops what a published checkpoint did not use. A weight that the table splits or
    joins, rather than renames, keeps the name that it has in memory.
    """
    from transformers.conversion_mapping import extract_weight_conversions_for_model
    from transformers.core_model_loading import PrefixChange, WeightConverter

    found = [one for one in extract_weight_conversions_for_model(model) or [] if not isinstance(one, PrefixChange)]
    backwards = [one.reverse_transform() for one in reversed(found)]
    changing = [one for one in backwards if isinstance(one, WeightConverter)]
    renaming = [one for one in backwards if not isinstance(one, WeightConverter)]

    def saved(name: str) -> str:
        if any(one.rename_source_key(name)[1] is not None for one in changing):
            return name
        for one in renaming:
            name, _ = one.rename_source_key(name)
        return name

    return {name: saved(name) for name in names}
