"""vLLM in the trainer's process."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightrft.engines.base import EngineError, WakePart
from lightrft.engines.checked import CheckedEngine
from lightrft.engines.checkpoint_names import checkpoint_names
from lightrft.engines.hot_start import with_hot_start
from lightrft.engines.skeleton import build
from lightrft.engines.vllm import requests as requests
from lightrft.engines.vllm import weights as vllm_weights
from lightrft.engines.vllm.loading import load_format
from lightrft.engines.vllm.manifest import VLLMManifest
from lightrft.engines.vllm.memory import forget_pools
from lightrft.engines.vllm.requests import Answer
from lightrft.media import MediaError
from lightrft.ops.fingerprint import Fingerprint
from lightrft.random_state import random_state, set_random_state
from lightrft.samples import Prompt, Response, Sampling
from lightrft.whereabouts import mark

# One process holds the scheduler and the model: weights are a copy on the device, and no tensor is pickled.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
# Its kernel draws every request from a seed of its own; the older runner takes 1.4 to 1.8 times as long.
_NEWER_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
_ITS_OWN = frozenset(
    ("model", "tokenizer", "load_format", "dtype", "quantization", "logprobs_mode", "enable_sleep_mode", "seed")
)


class VLLMEngine(CheckedEngine):
    """vLLM (arXiv 2309.06180) in this process, with weights of its own on the trainer's device.

    Log-probs are of the distribution a token was drawn from. A process can hold one at a time, as vLLM's allocator is
    one a process. Needs the extra ``vllm``.

    Args:
        dtype: what the weights are computed in; ``None`` takes the config's, which is the trainer's.
        quantization: ``fp8`` keeps the weights of linear layers as 8-bit floats, with a scale for each row that every
            push measures anew; the head and embeddings stay in ``dtype``. Needs a GPU, and ``dtype`` of 16 bits.
        kv_cache_dtype: ``auto`` is ``dtype``; ``fp8`` holds twice as many tokens.
        gpu_memory_utilization: share of the device's memory that weights, activations and cache may take while awake.
        max_model_len: longest prompt and response together; ``None`` is the model's context.
        enforce_eager: no CUDA graphs: a quicker start, slower tokens.
        options: further arguments of vLLM's ``LLM``, by name.

    Raises:
        ValueError: a value outside its range, or an option that the engine sets itself.
    """

    reads_media = True

    def __init__(
        self,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        quantization: Literal["fp8"] | None = None,
        kv_cache_dtype: Literal["auto", "fp8"] = "auto",
        gpu_memory_utilization: float = 0.85,
        max_model_len: int | None = None,
        enforce_eager: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {dtype!r}; it must be float32, bfloat16, float16 or null.")
        if quantization not in (None, "fp8"):
            raise ValueError(f"quantization is {quantization!r}; it must be fp8 or null.")
        if kv_cache_dtype not in ("auto", "fp8"):
            raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}; it must be auto or fp8.")
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization is {gpu_memory_utilization}; it must be in (0, 1].")
        self._wanted_dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self._quantization = quantization
        self._settings: dict[str, Any] = {
            "kv_cache_dtype": kv_cache_dtype,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "enforce_eager": enforce_eager,
        }
        self._options = dict(options or {})
        taken = sorted(self._options.keys() & (_ITS_OWN | self._settings.keys()))
        if taken:
            raise ValueError(f"options may not set {', '.join(taken)}: VLLMEngine does.")
        self._llm: Any = None

    @property
    def dtype(self) -> torch.dtype | None:
        """As asked for in the constructor; once started, what the model is really in."""
        return self._wanted_dtype if self._llm is None else self._llm.model_config.dtype

    def _start(self, config: Any, tokenizer: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lightrft-vllm-")
        model = build(config, self._wanted_dtype, torch.device("meta"))
        self._manifest = VLLMManifest(model)
        self._embedded = int(model.get_input_embeddings().num_embeddings)
        _write_folder(Path(self._folder.name), model, self._processor)
        try:
            self._llm = self._make(self._arguments(model))
        except Exception as error:
            self._folder.cleanup()
            raise EngineError(f"vLLM cannot serve {type(model).__name__}: {error}") from error
        self._context = self._llm.model_config.max_model_len
        manifest = self._manifest
        manifest.names = self._in_worker(vllm_weights.known_names, checkpoint_names(model, manifest.named))
        manifest.together = self._in_worker(vllm_weights.kept_together, manifest.names)
        self.dropped = self._in_worker(vllm_weights.dropped, manifest.names)
        self.in_float8 = self._in_worker(vllm_weights.in_float8, manifest.names)

    def _make(self, arguments: dict[str, Any]) -> Any:
        """vLLM's ``LLM``, with the newer of its two model runners where that can serve the model."""
        llm = _llm_class()
        if self._device.type != "cpu":
            try:
                with _undisturbed(_NEWER_RUNNER):
                    return llm(**arguments)
            except ValueError as error:
                if "V2" not in str(error):
                    raise
        with _undisturbed():
            return llm(**arguments)

    def _arguments(self, model: Any) -> dict[str, Any]:
        own = {
            "model": self._folder.name,
            "load_format": load_format(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": "fp8_per_channel" if self._quantization else None,
            "enable_sleep_mode": self._device.type != "cpu",
            # On the CPU vLLM cannot take back the number that it draws from a request's seed for a part of its prompt.
            "enable_chunked_prefill": self._device.type != "cpu",
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # what the folder recommends would change the distribution behind our back
            "skip_tokenizer_init": model.config.get_text_config() is model.config,
            # A prompt is processed once for all of its responses; kept longer, its pixels would fill the host's memory.
            "mm_processor_cache_gb": 0,
            "disable_log_stats": True,
            "seed": 0,
            **self._settings,
        }
        return {**own, **self._options}

    @property
    def _vocabulary(self) -> int:
        return self._embedded

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        stops, stop_ids = self._split_stops(sampling)

        def generate(prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> Any:
            return self._draw(prompts, sampling, seeds, stops, stop_ids)

        return with_hot_start(generate, prompts, sampling, seeds, stops, self._detokenizer)

    def _draw(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        stops: Sequence[str],
        stop_ids: frozenset[int],
    ) -> list[list[Response]]:
        asked: list[Any] = []
        with _undisturbed():
            for prompt, own in zip(prompts, seeds):
                asked += [self._rendered(prompt, sampling)] * len(own)
        flat = [seed for own in seeds for seed in own]
        params = requests.sampling_params(sampling, flat, stop_ids, bool(stops), self._never_drawn)
        answers = self._run(asked, params, stops)
        return requests.responses(prompts, sampling, seeds, answers, stops, self._detokenizer, self.weight_version)

    def _score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        scored = [index for index, sequence in enumerate(sequences) if len(sequence) > 1]
        for index in scored:
            self._check_ids(sequences[index], f"sequence {index}", 1)  # vLLM scores while it draws one more
        with _undisturbed():
            asked = [self._render(requests.request(sequences[index])) for index in scored]
        answers = self._run(asked, [requests.scoring_params()] * len(asked), ())
        found = {index: answer.prompt_log_probs for index, answer in zip(scored, answers)}
        return [found.get(index, torch.zeros(0)) for index in range(len(sequences))]

    def _rendered(self, prompt: Prompt, sampling: Sampling) -> Any:
        """A prompt as vLLM computes it: its media decoded and processed, once for all of its responses.

        Raises:
            MediaError: media that cannot be read, or that vLLM refuses; names the prompt.
            ValueError: longer than the model's context, once placeholders are expanded; names it.
        """
        if self._media is None or not prompt.media:
            return self._render(requests.request(prompt.token_ids))
        if prompt.media.videos:
            # Seen with vLLM 0.32: frames of Qwen2.5-VL get other positions than in its own forward.
            raise MediaError(
                f"Prompt {prompt.uid!r} has videos, which vLLM does not place as every model's own forward does; "
                "choose TransformersEngine."
            )
        asked = requests.request(prompt.token_ids, self._media.decoded(prompt))
        try:
            rendered = self._render(asked)
        except Exception as error:  # processors raise what they like
            raise MediaError(f"Prompt {prompt.uid!r}: vLLM refuses its media: {error}") from error
        self._check_length(len(rendered["prompt_token_ids"]), f"Prompt {prompt.uid!r}", sampling.max_new_tokens)
        return rendered

    def _render(self, asked: dict[str, Any]) -> Any:
        return self._llm.llm_engine.renderer.render_cmpl([asked])[0]

    def _run(self, asked: Sequence[Any], params: Sequence[Any], stops: Sequence[str]) -> list[Answer]:
        """Let vLLM work until every rendered request has ended; answers in their order."""
        if not asked:
            return []
        engine = self._llm.llm_engine
        with _undisturbed():
            answers: dict[str, Answer] = {}
            try:
                for one, its_params in zip(asked, params):
                    name = engine.add_request(str(next(self._llm.request_counter)), one, its_params)
                    answers[_external(name)] = Answer(stops, self._detokenizer)
                while engine.has_unfinished_requests():
                    mark()
                    for step in engine.step():
                        if _take(answers[step.request_id], step):
                            engine.abort_request([step.request_id])
            except Exception as error:
                raise EngineError(
                    f"vLLM failed while it sampled; close the engine and start it anew: {error}"
                ) from error
            finally:
                if engine.has_unfinished_requests():  # after Ctrl-C, say: the next call's must be alone
                    engine.abort_request(list(answers))
        return list(answers.values())

    def _push(self, tensors: Iterable[tuple[str, Tensor]], complete: bool) -> None:
        self._in_worker(vllm_weights.load, self._whole_layers(self._manifest.checked(tensors, complete)))
        self._forget()

    def _whole_layers(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return self._manifest.whole_layers(tensors)

    def _forget(self) -> None:
        """Drop what old weights computed: of prompts, of images and audio."""
        engine = self._llm.llm_engine
        if not engine.reset_prefix_cache():
            raise EngineError("vLLM did not drop its prefix cache, which holds states of old weights.")
        engine.reset_encoder_cache()

    def _fingerprint(self, names: Sequence[str]) -> dict[str, Fingerprint]:
        held = self._manifest.held(names)
        found = self._in_worker(vllm_weights.fingerprints, list(held.values()))
        return {name: found[one] for name, one in held.items()}

    def _sleep(self, level: int) -> None:
        if self._device.type == "cpu":
            self._forget()
            return
        gc.collect()
        torch.cuda.empty_cache()
        self._llm.sleep(level=level)

    def _wake(self, part: WakePart) -> None:
        if self._device.type != "cpu":
            self._llm.wake_up(tags=[requests.TAGS[part]])

    def _close(self) -> None:
        if self._device.type != "cpu" and "weights" not in self._asleep:
            self._llm.sleep(level=2)
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        self._folder.cleanup()
        gc.collect()
        if self._device.type != "cpu":
            forget_pools()

    def _in_worker(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return self._llm.collective_rpc(work, args=arguments)[0]


def _take(answer: Answer, step: Any) -> bool:
    """Add what vLLM gives; whether a stop string has ended the response."""
    (output,) = step.outputs
    if step.prompt_logprobs is not None:
        answer.prompt_log_probs = requests.prompt_log_probs(step.prompt_logprobs)
    log_probs = requests.flat(output.logprobs) if output.logprobs is not None else []
    return answer.take(output.token_ids, log_probs, output.finish_reason)


def _external(name: str) -> str:
    """The id that answers carry; the one that a request is given has random characters behind it."""
    return name.rpartition("-")[0] or name


def _llm_class() -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        raise EngineError(f"VLLMEngine needs vLLM ({error}); pip install 'lightning-rft[vllm]'.") from error
    return LLM


def _write_folder(folder: Path, model: Any, tokenizer: Any) -> None:
    """What vLLM reads of a model: its config, and the tokenizer or processor."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _undisturbed(wanted: Mapping[str, str] | None = None) -> Iterator[None]:
    """vLLM seeds the process, reads variables, and makes ``torch.set_num_threads`` do nothing; all is put back.

    Args:
        wanted: variables that are set meanwhile where the user has not.
    """
    variables = {**_ENVIRONMENT, **(wanted or {})}
    before = {name: os.environ.get(name) for name in variables}
    random, set_num_threads = random_state(), torch.set_num_threads
    os.environ.update({name: before[name] or value for name, value in variables.items()})
    try:
        yield
    finally:
        set_random_state(random)
        torch.set_num_threads = set_num_threads
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
