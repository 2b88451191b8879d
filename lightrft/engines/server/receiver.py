"""What a vLLM server's worker does for :class:`~lightrft.engines.RemoteEngine`: takes weights, and tells of them.

``--worker-extension-cls lightrft.engines.server.receiver.WeightReceiver --weight-transfer-config.backend lightrft``
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from lightrft.engines.base import EngineError
from lightrft.engines.server.weight_channel import ChannelBroken, Place, WeightChannel
from lightrft.engines.vllm import weights as vllm_weights

TRANSFER = "lightrft"  # what vLLM calls the backend by which weights come here
# Of a model's config: what must be the actor's.
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


class WeightReceiver:
    """What vLLM adds to its worker: a backend of weight-transfer endpoints, and a method for ``/collective_rpc``."""

    def __new__(cls, *arguments: Any, **options: Any) -> WeightReceiver:
        worker = super().__new__(cls)
        _register(worker)  # before it loads the model, which is when vLLM looks for the backend
        return worker

    def lightrft(self, what: str, arguments: str = "[]") -> dict[str, Any]:
        """Do ``what`` with a JSON list of arguments."""
        return {"answer": _ABILITIES[what](self, *json.loads(arguments))}


def _register(worker: Any) -> None:
    """Let vLLM's endpoints have ``worker`` take weights. The class is in here, as vLLM tells a backend of no worker."""
    from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo

    @dataclass
    class Push(WeightTransferUpdateInfo):
        port: int

    class ChannelTransfer(WeightTransferEngine):
        init_info_cls, update_info_cls = Place, Push

        def init_transfer_engine(self, init_info: Place) -> None:
            leave(worker)
            worker.lightrft_channel = WeightChannel.join(init_info, worker.device)

        def receive_weights(self, update_info: Push, load_weights: Any = None) -> None:
            receive(worker, update_info.port)

        def start_weight_update(self) -> None:
            """Nothing: what the channel carries says itself where it ends."""

        finish_weight_update = start_weight_update
        trainer_send_weights = staticmethod(WeightChannel.send)  # vLLM 0.24 wants to know the other end

        def shutdown(self) -> None:
            leave(worker)

    WeightTransferEngineFactory.register_engine(TRANSFER, ChannelTransfer)


def describe(worker: Any) -> dict[str, Any]:
    """The server as it was started."""
    config = worker.vllm_config
    model, text = config.model_config, config.model_config.hf_text_config
    on_gpu = worker.device.type == "cuda"
    return {
        "architectures": list(model.hf_config.architectures or []),
        "sizes": {name: getattr(text, name, None) for name in SIZES},
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
        "max_logprobs": model.max_logprobs,
        "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
        "transfer": config.weight_transfer_config and config.weight_transfer_config.backend,
        "sleeps": bool(model.enable_sleep_mode) or not on_gpu,
        "workers": config.parallel_config.world_size_across_dp,
        "gpu": str(torch.cuda.get_device_properties(worker.device).uuid) if on_gpu else None,
    }


def leave(worker: Any) -> None:
    channel = worker.__dict__.pop("lightrft_channel", None)
    if channel is not None:
        channel.close()


def receive(worker: Any, port: int) -> None:
    """Load what the trainer sends that is at ``port``.

    Raises:
        EngineError: another one has joined since.
    """
    channel: WeightChannel | None = worker.__dict__.get("lightrft_channel")
    if channel is None or channel.place.port != port:
        raise EngineError("another run has pushed weights to it since; start a server for each")
    tensors = channel.receive(channel.alive)
    try:
        vllm_weights.load(worker, tensors)
    except ChannelBroken:
        leave(worker)
        raise
    except Exception:
        if not channel.told_all:  # the trainer goes on sending
            for _ in tensors:
                pass
        if not channel.told_all:
            leave(worker)
        raise


def fingerprints(worker: Any, names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    return {name: astuple(one) for name, one in vllm_weights.fingerprints(worker, names).items()}


def in_float8(worker: Any, names: Mapping[str, str]) -> list[str]:
    return sorted(vllm_weights.in_float8(worker, names))


def dropped(worker: Any, names: Mapping[str, str]) -> list[str]:
    return sorted(vllm_weights.dropped(worker, names))


_ABILITIES: dict[str, Callable[..., Any]] = {
    "describe": describe,
    "dropped": dropped,
    "fingerprints": fingerprints,
    "in_float8": in_float8,
    "kept_together": vllm_weights.kept_together,
    "known_names": vllm_weights.known_names,
    "leave": leave,
}
