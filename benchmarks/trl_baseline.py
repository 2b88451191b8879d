"""TRL's GRPOTrainer on the reference workload, to be timed beside ours in one run on one GPU.

Qwen2.5-shaped random weights, 64 prompts x 8 responses an optimizer step, prompt 128 tokens, each response token ends
the sequence with probability 1/256 (a random set of stop ids), cut at --max-new-tokens: lengths as RL sees them.
Prints one JSON line a step: seconds in all and by phase, peak memory, mean response length.

    python benchmarks/trl_baseline.py --model qwen-0.5b --steps 4
"""

import argparse
import json
import os
import random
import time
from typing import ClassVar

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    RANK="0",
    LOCAL_RANK="0",
    WORLD_SIZE="1",
    MASTER_ADDR="127.0.0.1",
    MASTER_PORT="29512",
)
import torch
from datasets import Dataset
from rollout import SHAPES
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

VOCAB = 151936


def make_model(path: str, shape: str) -> None:
    """Write a random model and a byte-level tokenizer, once."""
    if os.path.exists(path):
        return
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        max_position_embeddings=32768,
        rope_theta=1e6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **SHAPES[shape],
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(
        ["0 1 2 3 4 5 6 7 8 9"] * 10,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(path)


class StepReport(TrainerCallback):
    phases: ClassVar[dict[str, float]] = {}

    def on_step_begin(self, *args, **kwargs):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()
        self.phases.clear()

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        print(
            json.dumps(
                {
                    "step": state.global_step,
                    "seconds": round(time.perf_counter() - self.start, 3),
                    "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                    **{k: round(v, 3) for k, v in self.phases.items()},
                }
            ),
            flush=True,
        )


def timed(owner, name: str, label: str) -> None:
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = inner(*args, **kwargs)
        torch.cuda.synchronize()
        StepReport.phases[label] = StepReport.phases.get(label, 0) + time.perf_counter() - start
        return result

    setattr(owner, name, outer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-0.5b")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--beta", type=float, default=0.001)
    a = parser.parse_args()
    make_model(a.model, a.shape)
    random.seed(0)
    stop_ids = random.sample(range(1000, VOCAB), VOCAB // 256)
    prompts = [{"prompt": " ".join(str(random.randint(0, 9)) for _ in range(64))} for _ in range(64 * (a.steps + 1))]
    config = GRPOConfig(
        output_dir="trl-baseline",
        per_device_train_batch_size=a.micro_batch,
        max_steps=a.steps,
        bf16=True,
        gradient_accumulation_steps=512 // a.micro_batch,
        num_generations=8,
        max_completion_length=a.max_new_tokens,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.3,
        vllm_max_model_length=2048,
        gradient_checkpointing=True,
        beta=a.beta,
        learning_rate=1e-6,
        temperature=1.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        generation_kwargs={"stop_token_ids": stop_ids},
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=a.model,
        args=config,
        train_dataset=Dataset.from_list(prompts),
        reward_funcs=lambda completions, **_: [random.random() for _ in completions],
        processing_class=AutoTokenizer.from_pretrained(a.model),
        callbacks=[StepReport()],
    )
    timed(trainer.vllm_generation.llm, "generate", "generate")
    timed(trainer.vllm_generation, "sync_weights", "sync")
    timed(trainer, "_get_per_token_logps_and_entropies", "log_prob_passes")
    trainer.train()
    lengths = [h["completions/mean_length"] for h in trainer.state.log_history if "completions/mean_length" in h]
    print(json.dumps({"mean_length": lengths}))
