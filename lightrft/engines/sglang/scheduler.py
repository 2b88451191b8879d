"""What LightRFT adds to SGLang's scheduler processes, where the model is: drawing, stop strings, weights, sleep."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.engines.process.failures import Failure
from lightrft.engines.process.messages import loads
from lightrft.engines.sglang import request_draw
from lightrft.engines.sglang.float8_layers import stay_loadable
from lightrft.engines.sglang.live_weights import Held, LiveWeights
from lightrft.engines.sglang.media import hear_clips_alone
from lightrft.engines.stopping import Detokenizer, Tail
from lightrft.media import placeholder_ids
from lightrft.ops.collectives import everyone

BUSY = "busy"
TOKENIZER, STEPS = "tokenizer", "steps"  # in the model's folder


def run(server_args: Any, *arguments: Any) -> None:
    """A scheduler process of SGLang's, which calls this in place of its own function."""
    from sglang.srt.layers.sampler import register_sampler_backend
    from sglang.srt.managers import schedule_batch, scheduler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(server_args.model_path, local_files_only=True)
    register_sampler_backend(server_args.sampling_backend, _sampler_class(placeholder_ids(config)))
    SamplingBatchInfo.adjusted_from_schedule_batch = _add_seeds  # meant to be replaced
    schedule_batch.Req._check_str_based_finish = _ends_by_string
    if config.model_type == "qwen2_audio":
        hear_clips_alone()
    if server_args.quantization is not None:
        stay_loadable()
    scheduler.Scheduler = _scheduler_class(scheduler.Scheduler)
    scheduler.run_scheduler_process(server_args, *arguments)


def steps_file(folder: Path) -> memoryview:
    """A count of steps that processes share, by which they see each other's progress: one uint64."""
    with (folder / STEPS).open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")


# --- Drawing ---------------------------------------------------------------------------------------------------------


def _add_seeds(info: Any, batch: Any, vocab_size: int) -> None:
    """SGLang keeps seeds only for its own deterministic mode; the field travels with its requests all the same.

    int64 ``[B, 4]``: the seed, the position of the prompt's last token or -1 without FIRE, its top-k, and the bits of
    its temperature.
    """
    rows = []
    for request in batch.reqs:
        ours = request.sampling_params.custom_params or {}
        row = [ours.get("seed", 0), -1, 1, 0]
        if ours.get("fire"):
            temperature, top_k = ours["fire"]
            bits = int(torch.tensor(temperature, dtype=torch.float64).view(torch.int64))
            row[1:] = [len(request.origin_input_ids) - 1, top_k, bits]
            info.is_all_greedy, info.need_top_k_sampling = False, True
        rows.append(row)
    info.sampling_seed = torch.tensor(rows, dtype=torch.int64).view(-1, 4).to(info.device, non_blocking=True)


def _requests(info: Any, positions: Tensor) -> request_draw.Requests:
    """SGLang's parameters of a batch, as ours. Requests of the call before may still be among them, ended."""
    seed, first, top_k, temperature = info.sampling_seed.unbind(1)
    requests = request_draw.Requests(
        temperature=info.temperatures.view(-1),
        top_k=info.top_ks,
        top_p=info.top_ps,
        min_p=info.min_ps,
        seed=seed,
        position=positions.long(),
        truncated=info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling,
        greedy=info.is_all_greedy,
    )
    return request_draw.hot(requests, positions == first, temperature.contiguous().view(torch.float64), top_k)


def _sampler_class(never_drawn: Sequence[int]) -> Any:
    from sglang.srt.layers.sampler import Sampler

    class SeededSampler(Sampler):
        """Draws by each request's seed, and reports log-probs of the distribution that it drew from."""

        def __init__(self) -> None:
            super().__init__()
            self._never_drawn = torch.tensor(never_drawn, dtype=torch.int64)

        def forward(
            self,
            logits_output: Any,
            sampling_info: Any,
            return_logprob: bool,
            top_logprobs_nums: Any,  # of other tokens, which we never ask for
            token_ids_logprobs: Any,
            positions: Tensor,
        ) -> Tensor:
            requests, logits = _requests(sampling_info, positions), logits_output.next_token_logits
            if len(self._never_drawn):
                self._never_drawn = self._never_drawn.to(logits.device)
                logits = logits.index_fill(-1, self._never_drawn, -torch.inf)
            tokens, log_probs = request_draw.draw(logits, requests)
            if dist.get_world_size(self.tp_sync_group) > 1:
                # Logits of ranks may differ by rounding, and ranks with other tokens would wait for each other.
                dist.broadcast(tokens, group_src=0, group=self.tp_sync_group)
            if return_logprob:
                logits_output.next_token_logprobs = log_probs
            return tokens

    return SeededSampler


def _ends_by_string(request: Any, new_accepted_len: int = 1) -> bool:
    """In place of SGLang's search, which needs its tokenizer and misses strings spelled in unusual tokens."""
    from sglang.srt.managers.schedule_batch import FINISH_MATCHED_STR
    from sglang.srt.server_args import get_global_server_args

    stops = (request.sampling_params.custom_params or {}).get("stops")
    if not stops:
        return False
    if not hasattr(request, "tail"):
        request.tail = Tail(stops, _detokenizer(get_global_server_args().model_path))
    if any(request.tail.completed_by(token) for token in request.output_ids[-new_accepted_len:]):
        request.finished_reason = FINISH_MATCHED_STR(matched=stops[0])
        request.finished_len = len(request.output_ids)
        return True
    return False


@lru_cache(maxsize=1)
def _detokenizer(folder: str) -> Detokenizer:
    from transformers import AutoTokenizer

    return Detokenizer(AutoTokenizer.from_pretrained(Path(folder) / TOKENIZER, local_files_only=True))


# --- Weights and sleep: what the engine's own process calls by name --------------------------------------------------


def _scheduler_class(base: Any) -> Any:
    from sglang.srt.managers.io_struct import RpcReqOutput

    class LightRFTScheduler(base):
        """Counts its steps, and answers the calls of :data:`CALLS` with what they return or raise on each rank."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._steps = steps_file(Path(self.server_args.model_path))

        def run_batch(self, *arguments: Any, **named: Any) -> Any:
            result = super().run_batch(*arguments, **named)
            if self.ps.tp_rank == 0:
                self._steps[0] += 1
            return result

        def handle_rpc_request(self, recv_req: Any) -> Any:
            result, failure = None, None
            try:
                result = CALLS[recv_req.method](self, **(recv_req.parameters or {}))
            except Exception as error:
                failure = Failure.of(error)
            answers = everyone((result, failure), self.weight_updater.tp_cpu_group)
            return RpcReqOutput(success=True, message=answers)

    return LightRFTScheduler


def _live(scheduler: Any) -> LiveWeights:
    if not hasattr(scheduler, "live_weights"):
        scheduler.live_weights = LiveWeights(scheduler.tp_worker.model_runner.model)
    return scheduler.live_weights


def _find_float8(scheduler: Any, shapes: Mapping[str, tuple[Sequence[str], Sequence[int]]]) -> frozenset[str]:
    return _live(scheduler).find_float8(shapes)


def _load(scheduler: Any, tensors: bytes) -> None:
    """Tensors by reference on a CUDA device, on a CPU themselves."""
    device = torch.device(scheduler.tp_worker.model_runner.device)
    found = _referred(tensors) if device.type == "cuda" else loads(tensors)
    _live(scheduler).load([(names, tensor.to(device)) for names, tensor in found])
    if device.type == "cuda":
        torch.cuda.synchronize()  # before the sender frees them


def by_reference(tensors: list[tuple[Sequence[str], Tensor]]) -> bytes:
    """CUDA tensors for the scheduler processes; they must be kept until these have answered."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    monkey_patch_torch_reductions()
    serialized: bytes = MultiprocessingSerializer.serialize(tensors)
    return serialized


def _referred(tensors: bytes) -> list[tuple[Sequence[str], Tensor]]:
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    monkey_patch_torch_reductions()
    found: list[tuple[Sequence[str], Tensor]] = MultiprocessingSerializer.deserialize(tensors)
    return found


def _held(scheduler: Any, names: Sequence[str]) -> dict[str, list[Held]]:
    return _live(scheduler).held(names)


def _forget(scheduler: Any) -> str | None:
    """Drop what old weights computed: of prompts, of images and audio, which SGLang itself would keep."""
    if not scheduler.flush_cache():
        return BUSY
    _forget_media()
    return None


def _forget_media() -> None:
    from sglang.srt.managers import mm_utils

    if mm_utils.embedding_cache is not None:
        mm_utils.embedding_cache.clear()


def _unpushed(parameter: Tensor) -> bool:
    """Whether it is none of the actor's: a scale of the cache, which SGLang sets as it starts."""
    return getattr(parameter, "_skip_weight_check", False)


def _sleep(scheduler: Any, level: int) -> str | None:
    """Release everything that is not released yet."""
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES, GPU_MEMORY_TYPE_WEIGHTS
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

    updater = scheduler.weight_updater
    if not scheduler.is_fully_idle():
        return BUSY
    awake = [tag for tag in GPU_MEMORY_ALL_TYPES if tag not in updater.offload_tags]
    if GPU_MEMORY_TYPE_WEIGHTS in awake:
        parameters = scheduler.tp_worker.model_runner.model.parameters()
        scheduler.kept_weights = [(one, one.data.cpu()) for one in parameters if level == 1 or _unpushed(one)]
    elif level == 2:
        scheduler.kept_weights = [(one, values) for one, values in scheduler.kept_weights if _unpushed(one)]
    if awake:
        updater.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=awake))
    _forget_media()  # which lie in memory that is not released
    torch.cuda.empty_cache()
    return None


def _wake(scheduler: Any, part: str) -> None:
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES, GPU_MEMORY_TYPE_WEIGHTS
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

    weights = [GPU_MEMORY_TYPE_WEIGHTS]
    tags = weights if part == "weights" else [tag for tag in GPU_MEMORY_ALL_TYPES if tag not in weights]
    scheduler.weight_updater.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags))
    if part == "weights":
        with torch.no_grad():
            for parameter, values in scheduler.kept_weights:
                parameter.copy_(values)
        scheduler.kept_weights = []


CALLS: dict[str, Callable[..., Any]] = {
    "find_float8": _find_float8,
    "load": _load,
    "held": _held,
    "forget": _forget,
    "sleep": _sleep,
    "wake": _wake,
}
