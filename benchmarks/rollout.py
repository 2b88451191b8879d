"""Rollout on one GPU: what sleep frees, and what 8-bit weights change. One JSON line a figure.

    python benchmarks/rollout.py sleep bf16 fp8 [--shape 0.5b] [--cycles 50]

Random weights in a Qwen2.5 shape; nothing is downloaded. Each part runs in a process of its own, as a process holds one
vLLM. ``--device cpu --shape tiny`` is a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from lightrft.engines import VLLMEngine
from lightrft.engines.seeds import response_seed
from lightrft.ops.fingerprint import Fingerprints
from lightrft.samples import Prompt, Sampling

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
PARTS = ("sleep", "bf16", "fp8", "fp8_kv")
SHARE = 0.25  # of the device's memory, where answers are compared


def make_model(shape: str, device: str) -> Any:
    config = Qwen2Config(
        vocab_size=1024 if shape == "tiny" else 151936,
        max_position_embeddings=2048,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
        **SHAPES[shape],
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def make_tokenizer(vocabulary: int = 151936) -> PreTrainedTokenizerFast:
    """A word, its number, for every id that can be drawn, so that decoding is work as it is in real runs."""
    words = {"<unk>": 0, "<eos>": 1} | {str(number): number for number in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


class Bench:
    """One engine with the model's weights in it, and prompts to ask it."""

    def __init__(self, arguments: argparse.Namespace, **settings: Any) -> None:
        self.device = torch.device(arguments.device)
        self.small = arguments.shape == "tiny"
        self.model = make_model(arguments.shape, arguments.device)
        settings.setdefault("gpu_memory_utilization", 0.5)
        self.engine = VLLMEngine(dtype="bfloat16", enforce_eager=arguments.eager or self.small, **settings)
        start = time.perf_counter()
        self.engine.start(self.model.config, make_tokenizer(self.model.config.vocab_size), self.device)
        self.started = time.perf_counter() - start
        self.pushes: list[float] = []
        self.push(0)
        rng = random.Random(0)
        vocabulary = self.model.config.vocab_size
        self.prompts = [
            Prompt(f"p{i}", torch.tensor([rng.randrange(2, 400) for _ in range(128)]), "") for i in range(64)
        ]
        self.stop_ids = tuple(rng.sample(range(min(1000, vocabulary // 2), vocabulary), vocabulary // 256))

    def push(self, version: int) -> None:
        self.wait()
        start = time.perf_counter()
        self.engine.update_weights(list(self.model.named_parameters()), version)
        self.wait()
        self.pushes.append(time.perf_counter() - start)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seeds(self, iteration: int) -> list[list[int]]:
        return [[response_seed(0, iteration, prompt.uid, k) for k in range(8)] for prompt in self.prompts]


def used_gib() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def report(**figures: Any) -> None:
    rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in figures.items()}
    print(json.dumps(rounded), flush=True)


def sleep(arguments: argparse.Namespace) -> None:
    """Device memory awake and asleep, seconds of each step, and what many cycles leak."""
    bench = Bench(arguments, gpu_memory_utilization=0.6)
    engine = bench.engine
    engine.generate(bench.prompts[:2], Sampling(max_new_tokens=8), bench.seeds(0)[:2])
    weights = sum(p.numel() * p.element_size() for p in bench.model.parameters()) / 2**30

    def cycle(level: int) -> dict[str, float]:
        figures: dict[str, float] = {"awake_gib": used_gib()}
        marks = [("sleep", lambda: engine.sleep(level)), ("wake_weights", lambda: engine.wake(("weights",)))]
        if level == 2:
            marks.append(("push", lambda: bench.push(engine.weight_version + 1 if engine.weight_version >= 0 else 1)))
        marks.append(("wake_cache", lambda: engine.wake(("cache",))))
        for name, step in marks:
            start = time.perf_counter()
            step()
            bench.wait()
            figures[f"{name}_seconds"] = time.perf_counter() - start
            figures[f"{name}_gib"] = used_gib()
        return figures

    own = torch.cuda.memory_reserved() / 2**30
    for level in (1, 2):
        figures = cycle(level)
        held = figures["awake_gib"] - weights  # the model in the trainer's hands is as large
        report(part="sleep", level=level, freed=(figures["awake_gib"] - figures["sleep_gib"]) / held, **figures)
    first = None
    for turn in range(arguments.cycles):
        figures = cycle(2)
        engine.generate(bench.prompts[:2], Sampling(max_new_tokens=4), bench.seeds(turn)[:2])
        first = first or figures
    report(
        part="sleep",
        cycles=arguments.cycles,
        first_sleep_gib=first["sleep_gib"],
        last_sleep_gib=figures["sleep_gib"],
        first_awake_gib=first["awake_gib"],
        last_awake_gib=figures["awake_gib"],
        torch_reserved_gib=own,
    )


def sync(arguments: argparse.Namespace, label: str, **settings: Any) -> None:
    """Is one skipped update at lr 1e-6 seen? Do probe, push and outputs agree with an engine started from the same?"""
    bench = Bench(arguments, gpu_memory_utilization=SHARE, **settings)
    engine, weights = bench.engine, dict(bench.model.named_parameters())

    def unequal() -> tuple[int, float]:
        bench.wait()
        start = time.perf_counter()
        prints = Fingerprints()
        for name, weight in weights.items():
            for stored, tensor in engine.stored(name, weight).items():
                prints.add(stored, tensor)
        expected = prints.read()
        found = engine.fingerprint(list(expected))
        return sum(expected[name] != found[name] for name in expected), time.perf_counter() - start

    after_push, seconds = unequal()
    report(
        part=label, what="tensors that differ after a push", count=after_push, of=len(weights), probe_seconds=seconds
    )
    generator = torch.Generator(bench.device).manual_seed(1)
    full = {name: tensor.float() for name, tensor in weights.items()}
    for name, tensor in weights.items():  # one step of Adam: lr times about one, of float32 weights
        step = torch.randn(tensor.shape, device=bench.device, generator=generator).sign_()
        tensor.copy_(full[name] - 1e-6 * step)
    skipped, _ = unequal()
    report(part=label, what="tensors that differ when one update at 1e-6 is skipped", count=skipped, of=len(weights))
    bench.push(1)
    again, _ = unequal()
    report(part=label, what="tensors that differ once it is pushed", count=again, push_seconds=bench.pushes[-1])
    engine.sleep(2)
    engine.wake(("weights",))
    bench.push(2)
    engine.wake(("cache",))
    report(part=label, what="tensors that differ after sleep 2, wake, push", count=unequal()[0])
    sampling = Sampling(max_new_tokens=16 if bench.small else 64, temperature=0)
    greedy = [r[0].token_ids.tolist() for r in engine.generate(bench.prompts, sampling, [[0]] * len(bench.prompts))]
    mismatch(bench, label)
    with tempfile.TemporaryDirectory() as folder:
        bench.model.save_pretrained(folder)
        make_tokenizer(bench.model.config.vocab_size).save_pretrained(folder)
        asked = Path(folder, "asked.json")
        asked.write_text(json.dumps([prompt.token_ids.tolist() for prompt in bench.prompts]))
        engine.close()
        command = [sys.executable, __file__, "fresh", "--folder", folder, "--quantization", label, "--tokens"]
        command += [str(sampling.max_new_tokens), *(["--eager"] if arguments.eager else [])]
        command += ["--cache", str(settings.get("kv_cache_dtype", "auto")), "--device", arguments.device]
        subprocess.run(command, check=True)
        fresh = json.loads(Path(folder, "fresh.json").read_text())
    equal = sum(ours == theirs for ours, theirs in zip(greedy, fresh))
    report(part=label, what="greedy answers equal to a fresh engine's", count=equal, of=len(greedy))


def mismatch(bench: Bench, label: str) -> None:
    """Engine against the bf16 forward: mean difference of log-probs, KL, effective sample size of the weights."""
    sampling = Sampling(max_new_tokens=16 if bench.small else 256)
    groups = bench.engine.generate(bench.prompts, sampling, [seeds[:1] for seeds in bench.seeds(0)])
    ratios = []
    for prompt, (response,) in zip(bench.prompts, groups):
        ids = torch.cat([prompt.token_ids, response.token_ids]).to(bench.device)
        with torch.no_grad():
            logits = bench.model(ids[None]).logits[0, len(prompt.token_ids) - 1 : -1].float()
        ours = logits.log_softmax(-1).gather(1, ids[len(prompt.token_ids) :, None])[:, 0].cpu()
        ratios.append(ours - response.log_probs)
    log_ratio = torch.cat(ratios).double()
    weight = log_ratio.exp()
    report(
        part=label,
        what="mismatch with the bf16 forward",
        mean_abs_nats=float(log_ratio.abs().mean()),
        kl=float(-log_ratio.mean()),
        kl_k3=float((weight - 1 - log_ratio).mean()),
        effective_sample_size=float(weight.sum() ** 2 / (weight**2).sum() / len(weight)),
    )


def fresh(arguments: argparse.Namespace) -> None:
    """Greedy answers of vLLM started from a checkpoint's folder."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if arguments.device != "cpu":
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")  # as VLLMEngine's
    from vllm import LLM, SamplingParams

    folder = Path(arguments.folder)
    quantization = "fp8_per_channel" if arguments.quantization.startswith("fp8") else None
    llm = LLM(
        model=str(folder),
        dtype="bfloat16",
        quantization=quantization,
        gpu_memory_utilization=SHARE,
        kv_cache_dtype=arguments.cache,
        logprobs_mode="processed_logprobs",  # as VLLMEngine's; with others vLLM compiles another sampler first
        skip_tokenizer_init=True,
        generation_config="vllm",
        enforce_eager=arguments.eager or arguments.tokens == 16,
    )
    asked = [{"prompt_token_ids": ids} for ids in json.loads((folder / "asked.json").read_text())]
    params = SamplingParams(max_tokens=arguments.tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=0)
    outputs = llm.generate(asked, params, use_tqdm=False)
    (folder / "fresh.json").write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "fresh"])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: starts in a quarter of the time")
    parser.add_argument("--folder")
    parser.add_argument("--quantization")
    parser.add_argument("--cache", default="auto")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    if len(arguments.parts) > 1:
        options = sys.argv[1 + len(arguments.parts) :]
        for part in arguments.parts:
            subprocess.run([sys.executable, __file__, part, *options], check=False)
        return
    work = {
        "sleep": sleep,
        "bf16": lambda arguments: sync(arguments, "bf16"),
        "fp8": lambda arguments: sync(arguments, "fp8", quantization="fp8"),
        "fp8_kv": lambda arguments: sync(arguments, "fp8_kv", quantization="fp8", kv_cache_dtype="fp8"),
        "fresh": fresh,
    }
    work[arguments.parts[0]](arguments)


if __name__ == "__main__":
    main()
