"""How vLLM makes a model whose weights are still to be pushed."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

_FORMAT = "lightrft_to_be_pushed"


@functools.cache
def load_format() -> str:
    """Name of a load format that fills weights with anything, and leaves what the model has computed for itself.

    vLLM's own, ``dummy``, fills persistent buffers too, such as the means by which pixels are normalised: no checkpoint
    has them, so no push would bring them back.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    class ToBePushed(DummyModelLoader):
        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            computed = {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
            super().load_weights(model, model_config)
            for name, buffer in model.named_buffers():
                if name in computed and not buffer.is_meta:
                    buffer.copy_(computed[name])

    register_model_loader(_FORMAT)(ToBePushed)
    return _FORMAT
