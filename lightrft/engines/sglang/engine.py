"""SGLang, for a process of its own."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightrft.engines.base import EngineError, WakePart
from lightrft.engines.checked import CheckedEngine
from lightrft.engines.checkpoint_names import checkpoint_names
from lightrft.engines.manifest import Manifest
from lightrft.engines.process.messages import dumps
from lightrft.engines.sglang import media as with_media
from lightrft.engines.sglang import scheduler as inside
from lightrft.engines.sglang.live_weights import whole_fingerprint
from lightrft.engines.skeleton import build
from lightrft.engines.stopping import Tail, before_stop
from lightrft.media import MediaError
from lightrft.ops.fingerprint import Fingerprint
from lightrft.samples import Prompt, Response, Sampling
from lightrft.whereabouts import mark

_BUCKET_BYTES = 512 << 20
_MEDIA_BYTES = 4 << 30
# SGLang keeps a few positions of its context to itself; what the model's has room for must fit.
_SPARE_CONTEXT = 16
# Arguments of SGLang's that options may not set.
_OURS = {"model_path", "load_format", "skip_tokenizer_init", "dtype", "quantization", "device", "base_gpu_id"}
_OURS |= {"context_length", "sampling_backend", "attention_backend", "mem_fraction_static", "enable_memory_saver"}
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_CALM_DOWN = 30.0


class SGLangEngine(CheckedEngine):
    """SGLang (arXiv 2312.07104), version 0.5.14, with weights of its own on the trainer's device.

    Needs the extra ``sglang``, whose torch and transformers are not the trainer's: run it in
    :class:`~lightrft.engines.OwnProcess`. Were one of SGLang's processes to fail here, it would end this one, and
    closing ends all processes that this one has started.

    A token is drawn by its response's seed and its position alone, from logits that may differ in their last bits with
    the batch they are computed in; ``options={"enable_deterministic_inference": True}`` rules that out, for slower
    tokens. Log-probs are of the distribution a token was drawn from. Stop strings are found as tokens come. Top-k and
    top-p sort the vocabulary in every step.

    Of models that read media it serves Qwen2-VL and Qwen3-VL, videos included, Qwen2.5-VL and Qwen2-Audio.

    Weights are read where SGLang's own loaders put them, so a weight that they pass over is refused.

    Args:
        dtype: what the weights are kept and computed in; ``None`` takes the config's, which is the trainer's. SGLang's
            kernels for GPUs take no float32.
        quantization: ``fp8`` keeps the weights of linear layers as 8-bit floats, with a scale for each row that every
            push measures anew; the head and embeddings stay in ``dtype``. Needs a GPU that multiplies them (compute
            capability 8.9 and later), and a model of linear layers, without experts, that reads text alone.
        mem_fraction_static: share of the device's memory that weights and cache may take while awake.
        attention_backend: SGLang's kernels for attention; ``None`` is ``triton``, which needs no compiler for CUDA, and
            on a CPU, where SGLang serves to try things out, ``torch_native``.
        options: further arguments of SGLang's ``Engine``, by name. ``tp_size`` splits the model over as many devices of
            this process, the trainer's the first of them; in runs of one rank.

    Raises:
        ValueError: a value outside its range, or an option that the engine sets itself.
    """

    reads_media = True

    def __init__(
        self,
        dtype: Literal["bfloat16", "float16", "float32"] | None = None,
        quantization: Literal["fp8"] | None = None,
        mem_fraction_static: float = 0.8,
        attention_backend: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {dtype!r}; it must be float32, bfloat16, float16 or null.")
        if quantization not in (None, "fp8"):
            raise ValueError(f"quantization is {quantization!r}; it must be fp8 or null.")
        if not 0 < mem_fraction_static < 1:
            raise ValueError(f"mem_fraction_static is {mem_fraction_static}; it must be in (0, 1).")
        self._wanted_dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self._quantization = quantization
        self._mem_fraction_static, self._attention_backend = mem_fraction_static, attention_backend
        self._options = dict(options or {})
        taken = sorted(_OURS & self._options.keys())
        if taken:
            raise ValueError(f"options may not set {', '.join(taken)}: SGLangEngine does.")
        self._engine: Any = None

    @property
    def dtype(self) -> torch.dtype | None:
        """As asked for in the constructor; once started, what the model is really in."""
        return self._wanted_dtype if self._engine is None else self._model_dtype

    def _start(self, config: Any, tokenizer: Any) -> None:
        if self._device.type not in ("cuda", "cpu"):
            raise EngineError(
                f"SGLangEngine computes on CUDA devices, or for trials on a CPU, but not on {self._device}."
            )
        model = build(config, self._wanted_dtype, torch.device("meta"))
        if self._device.type == "cuda" and model.dtype == torch.float32:
            raise EngineError("SGLang's kernels for GPUs take no float32; set dtype to bfloat16 or float16.")
        if self._quantization:
            self._check_8_bits(model)
        if self._never_drawn and type(model).__name__ not in with_media.SERVED:
            raise EngineError(
                f"SGLang has no model of this form, so SGLangEngine does not serve {type(model).__name__}; choose "
                "VLLMEngine or TransformersEngine."
            )
        self._model, self._manifest = model, Manifest(model)
        self._names = _names(model, self._manifest)
        self._model_dtype = model.dtype
        self._embedded = int(model.get_input_embeddings().num_embeddings)
        self._folder = tempfile.TemporaryDirectory(prefix="lightrft-sglang-")
        _write_folder(Path(self._folder.name), model, tokenizer, self._processor)
        try:
            with _environment(self._device):
                self._engine = _engine_class()(**self._arguments(model))
            if self._media is not None:
                self._engine.tokenizer_manager.mm_processor = with_media.AsPrepared()
            self._steps = inside.steps_file(Path(self._folder.name))
            if self._quantization:
                shapes = {name: (names, tuple(self._manifest.find(name).shape)) for name, names in self._names.items()}
                self.in_float8 = self._call("find_float8", shapes=shapes)[0]
        except Exception as error:
            self._close()
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"SGLang cannot serve {type(model).__name__}: {error}") from error

    def _check_8_bits(self, model: Any) -> None:
        if self._device.type != "cuda" or torch.cuda.get_device_capability(self._device) < (8, 9):
            raise EngineError("SGLang multiplies 8-bit weights on GPUs from 8.9 on; set quantization to null.")
        cure = "set quantization to null, or choose VLLMEngine"
        if self._never_drawn:
            raise EngineError(f"SGLangEngine keeps 8-bit weights of models that read text alone; {cure}.")
        for name, weight in model.named_parameters():
            if weight.ndim > 2:
                raise EngineError(
                    f"SGLangEngine keeps 8-bit weights of linear layers alone, and {name!r} is of experts or of a "
                    f"convolution; {cure}."
                )

    def _arguments(self, model: Any) -> dict[str, Any]:
        on_cpu = self._device.type == "cpu"
        settings = {
            "model_path": self._folder.name,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": self._quantization,
            "device": self._device.type,
            "base_gpu_id": self._device.index or 0,
            "context_length": None if self._context is None else self._context + _SPARE_CONTEXT,
            "sampling_backend": "pytorch",  # the name that ours takes
            "attention_backend": self._attention_backend or ("torch_native" if on_cpu else "triton"),
            "mm_attention_backend": "sdpa" if on_cpu else "triton_attn",
            "mem_fraction_static": self._mem_fraction_static,
            "enable_memory_saver": not on_cpu,
            "random_seed": 0,
            "log_level": "error",
        }
        return settings | self._options

    @property
    def _vocabulary(self) -> int:
        return self._embedded

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        stops, stop_ids = self._split_stops(sampling)
        outputs: list[dict[str, Any]] = []
        for asked, own_seeds, media in self._batches(prompts, sampling, seeds):
            params = [_sampling_params(sampling, seed, stops, stop_ids) for seed in own_seeds]
            outputs += self._run(asked, params, **({"image_data": media} if any(media) else {}))
        texts = self._detokenizer.decode_all([output["output_ids"] for output in outputs])
        drawn = iter(zip(outputs, texts))
        return [
            [self._response(prompt, *next(drawn), sampling, seed, stops, stop_ids) for seed in own]
            for prompt, own in zip(prompts, seeds)
        ]

    def _batches(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[list[int]], list[int], list[Any]]]:
        """Token ids, seed and media of each response: of all at once, or of so many as SGLang can hold the media of.

        It keeps a copy for every response until that has ended.
        """
        asked: list[list[int]] = []
        flat: list[int] = []
        media: list[Any] = []
        held = 0
        for prompt, own in zip(prompts, seeds):
            token_ids, its_media = self._read(prompt, sampling)
            wanted = len(own) * with_media.feature_bytes(its_media)
            if asked and wanted and held + wanted > _MEDIA_BYTES:
                yield asked, flat, media
                asked, flat, media, held = [], [], [], 0
            asked += [token_ids] * len(own)
            flat += own
            media += [its_media] * len(own)
            held += wanted
        yield asked, flat, media

    def _read(self, prompt: Prompt, sampling: Sampling) -> tuple[list[int], Any]:
        """A prompt's tokens, its placeholders expanded, and its media as SGLang takes them, if it has some."""
        if self._media is None or not prompt.media:
            return prompt.token_ids.tolist(), None
        reading = self._media.read(prompt)
        if any(with_media.SECONDS in item.features for item in reading.items):
            # Qwen2.5-VL's; transformers 5.8, which SGLang pins, rounds them before it multiplies.
            raise MediaError(
                f"Prompt {prompt.uid!r} has videos whose frames are placed by seconds, which SGLang's transformers "
                "does otherwise than the trainer's; choose TransformersEngine."
            )
        self._check_length(len(reading.token_ids), f"Prompt {prompt.uid!r}", sampling.max_new_tokens)
        return reading.token_ids.tolist(), with_media.prepared(self._model, reading, torch.tensor(self._never_drawn))

    def _response(
        self,
        prompt: Prompt,
        output: dict[str, Any],
        text: str,
        sampling: Sampling,
        seed: int,
        stops: Sequence[str],
        stop_ids: frozenset[int],
    ) -> Response:
        tokens, meta = list(output["output_ids"]), output["meta_info"]
        log_probs = torch.tensor([value for value, *_ in meta["output_token_logprobs"][: len(tokens)]])
        ended = meta["finish_reason"]["type"] == "stop" or tokens[-1] in stop_ids
        if not ended and stops:  # at the longest length SGLang looks for no string
            tail = Tail(stops, self._detokenizer)
            ended = any(tail.completed_by(token) for token in tokens)
        if not ended and len(tokens) < sampling.max_new_tokens:
            raise EngineError(
                f"SGLang's cache has no room for prompt {prompt.uid!r} and {sampling.max_new_tokens} tokens more; "
                "raise SGLangEngine's mem_fraction_static, or shorten either."
            )
        if not bool(log_probs.isfinite().all()):
            raise EngineError(
                f"The model's logits for prompt {prompt.uid!r} are not finite under weights of version "
                f"{self.weight_version}; training has diverged, or {self.dtype} is too narrow."
            )
        return Response(
            token_ids=torch.tensor(tokens, dtype=torch.int64),
            log_probs=log_probs,
            text=before_stop(text, stops),
            finish_reason="stop" if ended else "length",
            weight_version=self.weight_version,
            seed=seed,
        )

    def _score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        scored = [index for index, sequence in enumerate(sequences) if len(sequence) > 1]
        asked = [sequences[index].tolist() for index in scored]
        params = [{"max_new_tokens": 0, "temperature": 1.0}] * len(asked)
        outputs = self._run(asked, params, logprob_start_len=0)
        found = {}
        for index, output in zip(scored, outputs):
            values = [value for value, *_ in output["meta_info"]["input_token_logprobs"][1:]]
            found[index] = torch.tensor(values, dtype=torch.float32)
        return [found.get(index, torch.zeros(0)) for index in range(len(sequences))]

    def _run(self, asked: list[list[int]], params: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        """Let SGLang answer requests, each prompt by token ids; answers in their order."""
        if not asked:
            return []
        work = self._engine.async_generate(input_ids=asked, sampling_params=params, return_logprob=True, **options)
        outputs: list[dict[str, Any]] = self._engine.loop.run_until_complete(self._watched(work))
        for output in outputs:
            reason = output["meta_info"]["finish_reason"]
            if reason["type"] == "abort":
                raise EngineError(f"SGLang broke a request off: {reason.get('message')}")
        return outputs

    async def _watched(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Mark progress for as long as SGLang makes steps."""
        task, seen = asyncio.ensure_future(work), self._steps[0]
        while not (await asyncio.wait({task}, timeout=_SECONDS_BETWEEN_LOOKS))[0]:
            if self._steps[0] != seen:
                seen = self._steps[0]
                mark()
        return task.result()

    def _push(self, tensors: Iterable[tuple[str, Tensor]], complete: bool) -> None:
        bucket: list[tuple[Sequence[str], Tensor]] = []
        for name, tensor in self._manifest.checked(tensors, complete):
            mark()
            weight = self._manifest.find(name)
            # Under one name, as tied weights are one in SGLang too.
            names = self._names[self._manifest.tied(name)[0]]
            bucket.append((names, tensor.detach().to(self._device, weight.dtype)))
            if sum(one.nbytes for _, one in bucket) >= _BUCKET_BYTES:
                self._load(bucket)
        self._load(bucket)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what the tensors lay in is the trainer's
        self._call("forget")

    def _load(self, bucket: list[tuple[Sequence[str], Tensor]]) -> None:
        """Hand tensors over, and empty the bucket."""
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self._device)
        self._call("load", tensors=inside.by_reference(bucket) if on_cuda else dumps(bucket))
        bucket.clear()
        if on_cuda:
            torch.cuda.ipc_collect()

    def _fingerprint(self, names: Sequence[str]) -> dict[str, Fingerprint]:
        stored = {name: self._stored_as(name) for name in names}
        ranks = self._call("held", names=sorted(set(stored.values())))
        return {name: whole_fingerprint([part for rank in ranks for part in rank[one]]) for name, one in stored.items()}

    def _stored_as(self, name: str) -> str:
        """What its processes call a weight or, with ``_scale`` behind it, the scales of one in 8 bits."""
        of_scales = name.endswith("_scale") and name.removesuffix("_scale") in self.in_float8
        return name if of_scales else self._manifest.tied(name)[0]

    def _sleep(self, level: int) -> None:
        self._call("sleep", level=level)

    def _wake(self, part: WakePart) -> None:
        self._call("wake", part=part)

    def _close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()
        self._folder.cleanup()

    def _call(self, method: str, **arguments: Any) -> list[Any]:
        """What a function of :data:`lightrft.engines.sglang.scheduler.CALLS` returns on each of SGLang's ranks."""
        from sglang.srt.managers.io_struct import RpcReqInput

        until = time.monotonic() + _SECONDS_TO_CALM_DOWN
        while True:
            self._engine.send_to_rpc.send_pyobj(RpcReqInput(method=method, parameters=arguments))
            answers = self._engine.send_to_rpc.recv_pyobj().message
            mark()
            for _, failure in answers:
                if failure is not None:
                    raise failure.error()
            results = [result for result, _ in answers]
            if inside.BUSY not in results:
                return results
            if time.monotonic() > until:  # a moment after the last response it still has something to tidy up
                raise EngineError(f"SGLang is still busy {_SECONDS_TO_CALM_DOWN:g} seconds after its last response.")
            time.sleep(0.005)


def _sampling_params(sampling: Sampling, seed: int, stops: Sequence[str], stop_ids: frozenset[int]) -> dict[str, Any]:
    """SGLang's parameters of one response, and with them what :mod:`lightrft.engines.sglang.scheduler` wants."""
    fire = sampling.fire
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "stop_token_ids": sorted(stop_ids),
        "custom_params": {
            "seed": seed,
            "stops": list(stops),
            "fire": [float(fire.temperature), fire.top_k] if fire else None,
        },
    }


def _engine_class() -> Any:
    try:
        from sglang.srt.entrypoints.engine import Engine
    except ImportError as error:
        raise EngineError(
            f"SGLangEngine needs SGLang ({error}): run it in lightrft.engines.OwnProcess, with python or site naming "
            "an environment that has the extra sglang of lightning-rft."
        ) from error

    class SeededEngine(Engine):
        """SGLang's engine, its scheduler processes run by ours."""

        run_scheduler_process_func = staticmethod(inside.run)

    return SeededEngine


def _names(model: Any, manifest: Manifest) -> dict[str, list[str]]:
    """By name in memory, that one and then what else a weight may be called in a checkpoint."""
    forms = checkpoint_names(model, manifest.named)
    return {name: list(dict.fromkeys(form[name] for form in forms)) for name in manifest.named}


def _write_folder(folder: Path, model: Any, tokenizer: Any, processor: Any) -> None:
    """What SGLang reads of a model, and our part of its scheduler processes."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if processor is not tokenizer:
        processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder / inside.TOKENIZER)
    (folder / inside.STEPS).write_bytes(bytes(8))


@contextmanager
def _environment(device: torch.device) -> Iterator[None]:
    """SGLang, imported and started in it, takes a context longer than the model's, and a CPU."""
    variables = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    if device.type == "cpu":
        variables["SGLANG_USE_CPU_ENGINE"] = "1"
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
