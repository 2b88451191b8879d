"""A vLLM server that the user started, perhaps on another machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.engines.base import EngineError, WakePart
from lightrft.engines.checked import CheckedEngine
from lightrft.engines.checkpoint_names import checkpoint_names
from lightrft.engines.group import EngineGroup
from lightrft.engines.hot_start import with_hot_start
from lightrft.engines.server.receiver import TRANSFER
from lightrft.engines.server.requests import Refused, VLLMServer
from lightrft.engines.server.weight_channel import Backend, ChannelBroken, WeightChannel, rendezvous
from lightrft.engines.skeleton import build
from lightrft.engines.transformers.draw import inverse_cdf, uniforms
from lightrft.engines.vllm import requests as requests
from lightrft.engines.vllm.manifest import VLLMManifest
from lightrft.engines.vllm.requests import Answer
from lightrft.ops.fingerprint import Fingerprint
from lightrft.samples import Prompt, Response, Sampling

Result = TypeVar("Result")
_START = (
    "start it as docs/engines.md says: VLLM_SERVER_DEV_MODE=1 vllm serve ... --tokens-only --logprobs-mode "
    "processed_logprobs --worker-extension-cls lightrft.engines.server.receiver.WeightReceiver "
    f"--weight-transfer-config.backend {TRANSFER}"
)
_HOTTEST = 2.0  # temperature that vLLM's servers take
_LEAVE_SECONDS = 10.0  # that closing waits for a server, which may be dead
_IMPOSSIBLE = -9999.0  # what they say instead of minus infinity, and some of them instead of NaN


class RemoteEngine(CheckedEngine):
    """A running vLLM server, spoken to over HTTP; weights go beside that, by NCCL from GPU to GPU, else by gloo.

    All ranks of a run share the server: each has its own prompts answered, the first one sends the weights. Log-probs
    are of the distribution a token was drawn from. ``docs/engines.md`` has the command that starts the server.

    Args:
        url: of the server, ``http://host:port``.
        api_key_variable: environment variable that holds the server's API key; ``None`` where it wants none.
        timeout_seconds: how long the server may say nothing before it counts as dead.

    Raises:
        ValueError: a URL of another kind, or with a password in it.
    """

    in_own_process = True

    def __init__(self, url: str, api_key_variable: str | None = None, timeout_seconds: float = 600.0) -> None:
        super().__init__()
        self._server = VLLMServer(url, api_key_variable, timeout_seconds)
        self._served: dict[str, Any] = {}
        self._channel: WeightChannel | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The server's, once it is started."""
        return getattr(torch, self._served["dtype"]) if self._served else None

    def _start(self, config: Any, tokenizer: Any) -> None:
        self._sharing = EngineGroup(dist.get_world_size() if dist.is_initialized() else 1)
        model = build(config, None, torch.device("meta"))
        self._manifest = VLLMManifest(model)
        self._embedded = int(model.get_input_embeddings().num_embeddings)
        self._served = self._by_first(lambda: self._meet(model))
        self._manifest.names, self._manifest.together = self._served["names"], self._served["kept_together"]
        self.dropped, self.in_float8 = frozenset(self._served["dropped"]), frozenset(self._served["in_float8"])
        self._context = min(self._context or self._served["max_model_len"], self._served["max_model_len"])

    def _meet(self, model: Any) -> dict[str, Any]:
        """What the server is, once that is what it must be.

        Raises:
            EngineError: it is not; says how to start it.
        """
        served = self._describe()
        self._refuse_other_model(model, served)
        self._server.ask("/wake_up")  # where an earlier run put it to sleep
        names = self._server.worker("known_names", checkpoint_names(model, self._manifest.named))
        served["names"] = names
        for what in ("kept_together", "dropped", "in_float8"):
            served[what] = self._server.worker(what, names)
        self._served = served
        self._channel = self._connected()
        return served

    def _describe(self) -> dict[str, Any]:
        url = self._server.url
        try:
            served: dict[str, Any] = self._server.worker("describe")
        except Refused as error:
            raise EngineError(f"The server cannot take weights ({error}); {_START}.") from error
        if served["transfer"] != TRANSFER:
            raise EngineError(
                f"vLLM at {url} does not take weights from here (its --weight-transfer-config.backend is "
                f"{served['transfer']}); {_START}."
            )
        try:
            self._server.ask("/inference/v1/generate")
        except Refused as error:  # as it must be, of an empty request
            if error.status not in (400, 422):
                raise EngineError(f"The server does not take prompts as token ids ({error}); {_START}.") from error
        if served["logprobs_mode"] != "processed_logprobs":
            raise EngineError(
                f"vLLM at {url} gives log-probs of another distribution than it draws from "
                f"(--logprobs-mode {served['logprobs_mode']}); {_START}."
            )
        if served["workers"] > 1:
            raise EngineError(
                f"vLLM at {url} runs on {served['workers']} workers, in which RemoteEngine cannot compare weights; "
                "start it with --tensor-parallel-size 1, --pipeline-parallel-size 1 and --data-parallel-size 1."
            )
        return served

    def _refuse_other_model(self, model: Any, served: dict[str, Any]) -> None:
        text = model.config.get_text_config()
        ours = {"architectures": [type(model).__name__]} | {name: getattr(text, name, None) for name in served["sizes"]}
        theirs = {"architectures": served["architectures"], **served["sizes"]}
        other = next((name for name in ours if ours[name] != theirs[name]), None)
        if other is not None:
            raise EngineError(
                f"vLLM at {self._server.url} serves another model: its {other} is {theirs[other]}, the actor's "
                f"{ours[other]}; start it on the actor's folder."
            )

    @property
    def _vocabulary(self) -> int:
        return self._embedded

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        if sampling.temperature > _HOTTEST:
            raise EngineError(
                f"sampling.temperature is {sampling.temperature:g}, and vLLM's server takes {_HOTTEST:g} at most; "
                "lower it, or choose an engine that runs on this machine."
            )
        stops, stop_ids = self._split_stops(sampling)

        def generate(prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> Any:
            draw = self._draw_hot if sampling.temperature > _HOTTEST else self._draw
            answers = draw(prompts, sampling, seeds, stops, stop_ids)
            return requests.responses(prompts, sampling, seeds, answers, stops, self._detokenizer, self.weight_version)

        return with_hot_start(generate, prompts, sampling, seeds, stops, self._detokenizer)

    def _draw(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        stops: Sequence[str],
        stop_ids: frozenset[int],
    ) -> list[Answer]:
        common = requests.drawing(sampling, stop_ids) | {"temperature": sampling.temperature}
        bodies = [
            _body(prompt.token_ids, common | {"seed": seed}, stream=True)
            for prompt, own in zip(prompts, seeds)
            for seed in own
        ]
        answers = [Answer(stops, self._detokenizer) for _ in bodies]
        self._server.generate(bodies, [partial(_take, answer) for answer in answers])
        if any(answer.finish_reason not in ("stop", "length") for answer in answers):
            raise EngineError(
                f"vLLM at {self._server.url} dropped a request; is it being shut down, or does another run use it?"
            )
        return answers

    def _draw_hot(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        stops: Sequence[str],
        stop_ids: frozenset[int],
    ) -> list[Answer]:
        """First tokens hotter than the server draws: it gives the log-probs of the likeliest, and they are drawn here.

        Raises:
            EngineError: it may not give that many.
        """
        most = self._served["max_logprobs"]
        if 0 <= most < sampling.top_k:
            raise EngineError(
                f"vLLM at {self._server.url} gives the log-probs of {most} tokens at most, and sampling.fire.top_k is "
                f"{sampling.top_k}; start it with --max-logprobs {sampling.top_k}, or lower top_k."
            )
        cool = dataclasses.replace(sampling, temperature=1.0)
        params = requests.drawing(cool, frozenset()) | {"temperature": 1.0, "logprobs": sampling.top_k}
        asked = [prompt for prompt, own in zip(prompts, seeds) if own]
        found: list[dict[int, float]] = [{} for _ in asked]
        self._server.generate(
            [_body(prompt.token_ids, params) for prompt in asked], [partial(_take_likeliest, one) for one in found]
        )
        answers = []
        for own, one in zip((own for own in seeds if own), found):
            tokens = sorted(one)
            log_probs = (torch.tensor([one[token] for token in tokens]) / sampling.temperature).log_softmax(-1)
            for index in inverse_cdf(log_probs.expand(len(own), -1), uniforms(own, 1)[:, 0]).tolist():
                answer = Answer(stops, self._detokenizer)
                reason = "stop" if tokens[index] in stop_ids else "length"
                answer.take([tokens[index]], [float(log_probs[index])], reason)
                answers.append(answer)
        return answers

    def _score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        scored = [index for index, sequence in enumerate(sequences) if len(sequence) > 1]
        for index in scored:
            self._check_ids(sequences[index], f"sequence {index}", 1)  # vLLM scores while it draws one more
        scores = [torch.zeros(max(0, len(sequence) - 1)) for sequence in sequences]
        self._server.generate(
            [_body(sequences[index], requests.SCORING) for index in scored],
            [partial(_take_scores, scores[index], sequences[index]) for index in scored],
        )
        return scores

    def _push(self, tensors: Iterable[tuple[str, Tensor]], complete: bool) -> None:
        whole, failure = self._manifest.whole_layers(self._manifest.checked(tensors, complete)), None
        self._sharing.everyone(None)  # no rank samples any more
        try:
            if self._sharing.rank == 0:
                self._send(whole)
            for _ in whole:  # all ranks gather them
                pass
        except EngineError as error:
            failure = error
            with suppress(EngineError):
                for _ in whole:
                    pass
        failures = [said for said in self._sharing.everyone(failure and str(failure)) if said]
        if failure or failures:
            raise failure or EngineError(failures[0])

    def _send(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        channel = self._channel = self._channel or self._connected()
        if "cache" not in self._asleep:
            # Requests wait from here on, and what old weights computed is dropped. If this fails, they wait for the
            # next push, as weights that are partly new must not answer.
            self._server.ask("/pause?mode=abort")
        try:
            # Layers are made anew where they must be, inside; vLLM 0.24 would make all of them anew unless told.
            self._server.ask("/start_weight_update", {"is_checkpoint_format": False})
            self._transfer(channel, tensors)
            self._server.ask("/finish_weight_update")
        except BaseException:
            self._break_off(channel)
            raise
        if "cache" not in self._asleep:
            self._server.ask("/resume")

    def _transfer(self, channel: WeightChannel, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Let the server take the tensors. Where it fails, the channel is lost unless both ends know that it did."""
        body = {"update_info": {"port": channel.place.port}}
        with self._server.answering("/update_weights", body) as (watch, finish):
            try:
                channel.send(tensors, watch)
            except ChannelBroken as error:
                finish()  # which knows more of it, mostly
                raise EngineError(f"vLLM at {self._server.url} was lost while it took weights: {error}") from error
            except BaseException:
                if not channel.lost:
                    channel.lost = not _refused(finish)
                raise
            channel.lost = True
            finish()
            channel.lost = False

    def _break_off(self, channel: WeightChannel) -> None:
        """Leave the way there as the next push needs it."""
        if channel.lost:
            self._disconnect()
        else:
            with suppress(EngineError):
                self._server.ask("/finish_weight_update")

    def _connected(self) -> WeightChannel:
        """The way to the server, where no update is under way any more.

        Raises:
            EngineError: it has no weight-transfer endpoints, or cannot come here.
        """
        try:
            self._server.ask("/finish_weight_update")
        except Refused as error:  # as it must be, if none was left unfinished
            if error.status == 404:
                raise EngineError(f"The server cannot take weights ({error}); {_START}.") from error
        store, place = rendezvous(self._server.host, self._backend(), self._server.timeout_seconds)
        body = {"init_info": dataclasses.asdict(place)}
        with self._server.answering("/init_weight_transfer_engine", body) as (watch, finish):
            channel = WeightChannel.open(store, place, self._device, watch)
            finish()
        return channel

    def _backend(self) -> Backend:
        """NCCL from one GPU to another; it cannot go from one to itself."""
        gpu = self._served["gpu"]
        if self._device.type != "cuda" or gpu is None or not dist.is_nccl_available():
            return "gloo"
        return "gloo" if str(torch.cuda.get_device_properties(self._device).uuid) == gpu else "nccl"

    def _disconnect(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _fingerprint(self, names: Sequence[str]) -> dict[str, Fingerprint]:
        held = self._manifest.held(names)
        found = self._by_first(lambda: self._server.worker("fingerprints", list(held.values())))
        return {name: Fingerprint(*found[one]) for name, one in held.items()}

    def _sleep(self, level: int) -> None:
        if not self._served["sleeps"]:
            raise EngineError(
                f"vLLM at {self._server.url} cannot sleep; start it with --enable-sleep-mode, or, where its GPU is not "
                "the trainer's, leave EngineSleepWake out of trainer.callbacks."
            )
        self._by_first(lambda: self._server.ask(f"/sleep?level={level}&mode=abort"))

    def _wake(self, part: WakePart) -> None:
        self._by_first(lambda: self._server.ask(f"/wake_up?tags={requests.TAGS[part]}"))

    def _close(self) -> None:
        if self._channel is not None:
            with suppress(EngineError):
                self._server.worker("leave", wait_seconds=_LEAVE_SECONDS)
        self._disconnect()
        self._served = {}

    def _by_first(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives or raises on the first rank, on all of them, once all of them ask for it."""
        if self._sharing.size == 1:
            return work()
        self._sharing.everyone(None)
        outcome: tuple[Any, str | None] = None, None
        if self._sharing.rank == 0:
            try:
                outcome = work(), None
            except EngineError as error:
                outcome = None, str(error)
        result, failure = self._sharing.everyone(outcome)[0]
        if failure is not None:
            raise EngineError(failure)
        return result


def _refused(finish: Callable[[], None]) -> bool:
    """Whether the server answers that it did not do what it was asked for."""
    try:
        finish()
    except EngineError as error:
        return isinstance(error, Refused)
    return False


def _body(token_ids: Tensor, params: dict[str, Any], stream: bool = False) -> dict[str, Any]:
    return {"token_ids": token_ids.tolist(), "sampling_params": params, "stream": stream}


def _take(answer: Answer, event: dict[str, Any]) -> bool:
    """Add what a part of a response brings; whether a stop string has ended it."""
    (choice,) = event["choices"]
    log_probs = [_log_prob(one) for one in choice["logprobs"]["content"]]
    return answer.take(choice["token_ids"], log_probs, choice["finish_reason"])


def _take_likeliest(found: dict[int, float], event: dict[str, Any]) -> bool:
    """Log-probs by token of those that a first token may be."""
    for one in event["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        # By number, or in older versions as the text "token_id:12".
        token = one["token_id"] if "token_id" in one else int(one["token"].rpartition(":")[2])
        if one["logprob"] > _IMPOSSIBLE:
            found[token] = one["logprob"]
    return True


def _take_scores(scores: Tensor, sequence: Tensor, event: dict[str, Any]) -> bool:
    rows = zip(event["prompt_logprobs"][1:], sequence[1:].tolist())
    scores.copy_(torch.tensor([_log_prob(row[str(token)]) for row, token in rows]))
    return True


def _log_prob(said: dict[str, Any]) -> float:
    value = said["logprob"]
    return float(value) if value is not None and value > _IMPOSSIBLE else float("nan")
