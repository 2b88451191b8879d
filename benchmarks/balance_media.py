"""Text and images over 8 ranks: the time of an update with rows where they were sampled and where they balance.

    python benchmarks/balance_media.py [--shape 2b] [--device cuda]    # 4 minutes on an H200
    python benchmarks/balance_media.py --keep          # write the page from the results there are
    python benchmarks/balance_media.py --sample        # draw the mix anew first: the same again, from a seed

Each rank's share is computed in turn on one GPU, forward and backward of every micro-batch timed by itself, and the
step is what the slowest takes: of the whole update where ranks wait for each other once (``ddp``), of every micro-step
where they shard the model (``fsdp2``). Reads ``benchmarks/results/media_mix.json``, prints a JSON line a plan; of the
whole mix on a GPU, writes ``benchmarks/results/balance_media.json`` and ``docs/balance_media.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from balance import Steps, measured, where_sampled
from rollout import make_tokenizer

from lightrft.lightning_modules import ActorModule
from lightrft.ops import micro_steps, pack
from lightrft.samples import MediaItem, Reading
from lightrft.sequence_cost import SequenceCost

MIX = Path(__file__).parent / "results" / "media_mix.json"
RESULTS = Path(__file__).parent / "results" / "balance_media.json"
PAGE = Path(__file__).parents[1] / "docs" / "balance_media.md"
TEXT = """# Text and images spread over ranks

<!-- written by benchmarks/balance_media.py; change that instead -->

Half of the samples bring images, and an image costs what its patches do in the tower, with attention among them,
besides its tokens in the decoder. A rank that happens to hold the large ones keeps all others waiting; rows are
spread by that whole cost ([text alone](balance.md)).

The mix ([`media_mix.json`](../benchmarks/results/media_mix.json)) is synthetic, drawn once by `sample()` in
[`benchmarks/balance_media.py`](../benchmarks/balance_media.py): 64 groups of 8 responses, every second group with one
to four images of 224 to 1008 pixels a side, questions of 32 to 512 tokens, log-normal responses of 16 to 4096;
{tokens} tokens in all. The model has the shape of Qwen2-VL-2B, in bfloat16 with gradient checkpointing; {budget}
tokens a micro-batch, {ranks} ranks.

Each rank's micro-batches were computed, forward and backward, one after the other on one {device}. A step takes as
long as its slowest rank where ranks wait for each other once an update (`ddp`), and as long as the slowest of each
micro-step together where they shard the model (`fsdp2`, `zero3`). *Counted* is the busiest over the mean by operations,
*timed* the same in seconds. *In the decoder alone* leaves out what the tower costs.

| rows | counted, update | timed | step | counted, micro-step | timed | step, sharded | micro-steps |
|---|---:|---:|---:|---:|---:|---:|---:|
{rows}

Balanced, a step is {ddp} shorter, and {fsdp2} where the model is sharded. There micro-batches of equal operations still
differ in seconds, and the plan by the decoder alone took no longer.
"""
RANKS, GROUPS, SAMPLES = 8, 64, 8
BUDGET = 12288  # tokens of a micro-batch
IMAGE_TOKEN, MERGED, PATCH = 151655, 2, 3 * 2 * 14 * 14  # patches of a side that are one token; numbers in a patch
# Of the decoder and of the tower, in Qwen2-VL's shapes.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"embed_dim": 64, "depth": 2, "num_heads": 2, "hidden_size": 128},
    ),
    "2b": (
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
        {"embed_dim": 1280, "depth": 32, "num_heads": 16, "hidden_size": 1536},
    ),
}


def sample() -> list[dict[str, Any]]:
    """Groups as reasoning over figures shows them: every second has images, of any size; responses are long-tailed."""
    generator, groups = random.Random(0), []
    for number in range(GROUPS):
        text = min(512, max(32, round(generator.lognormvariate(math.log(120), 0.5))))
        images = []
        if number % 2:
            for _ in range(generator.choices((1, 2, 3, 4), (6, 2, 1, 1))[0]):
                side = math.exp(generator.uniform(math.log(16), math.log(72)))  # patches: 224 to 1008 pixels
                shape = generator.uniform(0.7, 1.4)
                images.append([2 * max(4, round(side * factor / 2)) for factor in (shape, 1 / shape)])
        typical = generator.lognormvariate(math.log(500), 0.8)
        drawn = [typical * generator.lognormvariate(0.0, 0.5) for _ in range(SAMPLES)]
        groups.append({"text": text, "images": images, "responses": [min(4096, max(16, round(d))) for d in drawn]})
    generator.shuffle(groups)
    return groups


def make_actor(shape: str, device: str, folder: Path) -> ActorModule:
    text, vision = SHAPES[shape]
    sections = [16, 24, 24] if shape != "tiny" else [4, 6, 6]
    make_tokenizer().save_pretrained(folder)
    config = {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": True,
        "image_token_id": IMAGE_TOKEN,
        "dtype": "bfloat16",
        "text_config": {
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 16384,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            **text,
        },
        "vision_config": {"in_channels": 3, "patch_size": 14, "spatial_merge_size": MERGED, **vision},
    }
    actor = ActorModule(config=config, tokenizer=str(folder), gradient_checkpointing=True)
    torch.manual_seed(0)
    with torch.device(device):
        actor.configure_model()
    return actor.to(device, torch.bfloat16).train()


def read(group: dict[str, Any]) -> Reading:
    """Features without content: only their number counts."""
    items = []
    for height, width in group["images"]:
        tokens = height * width // MERGED**2
        features = {
            "pixel_values": torch.zeros(1, PATCH).expand(height * width, PATCH),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }
        types = {"mm_token_type_ids": torch.ones(tokens, dtype=torch.int64)}
        items.append(MediaItem("images", torch.full((tokens,), IMAGE_TOKEN), types, features))
    text = torch.full((group["text"],), 5)
    # Text before each image, as two side by side could not be told apart.
    pieces = [piece for item in items for piece in (text[:2], item.token_ids)]
    ids = torch.cat([*pieces, text])
    types = {"mm_token_type_ids": (ids == IMAGE_TOKEN).long()} if items else {}
    return Reading(ids, types, items)


def compute(actor: ActorModule, rows: list[tuple[Reading, int]], device: str) -> float:
    """Seconds of a micro-batch, forward and backward."""
    if not rows:
        return 0.0
    sequences = [torch.cat([reading.token_ids, torch.full((length,), 7)]) for reading, length in rows]
    prompts = torch.tensor([len(reading.token_ids) for reading, _ in rows])
    lengths = torch.tensor([length for _, length in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    packed = pack(sequences, prompts, mask, [reading for reading, _ in rows]).to(torch.device(device))
    start = _now(device)
    log_probs, _ = actor(*packed.inputs)
    log_probs.sum().backward()
    took = _now(device) - start
    actor.zero_grad(set_to_none=True)
    return took


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--sample", action="store_true", help="draw the mix anew")
    either.add_argument("--keep", action="store_true", help="compute nothing: write the page of the results")
    parser.add_argument("--shape", choices=SHAPES, default="2b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--groups", type=int, default=GROUPS, help="fewer, as a rehearsal")
    parser.add_argument("--plan-only", action="store_true", help="compute nothing: counted work alone")
    arguments = parser.parse_args()
    if not arguments.keep:
        results = compute_plans(arguments)
        if arguments.plan_only or arguments.groups < GROUPS or arguments.shape != "2b" or arguments.device == "cpu":
            return
        RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RESULTS.read_text())), encoding="utf-8")


def page(results: list[dict[str, Any]]) -> str:
    own, balanced = results[:2]
    shorter = {key: f"{1 - balanced[f'{key}_seconds'] / own[f'{key}_seconds']:.0%}" for key in ("ddp", "fsdp2")}
    rows = "\n".join(
        f"| {one['plan']} | {one['counted_rank']:.3f} | {one['rank']:.3f} | {one['ddp_seconds']:.2f} s | "
        f"{one['counted_micro_step']:.3f} | {one['micro_step']:.3f} | {one['fsdp2_seconds']:.2f} s "
        f"| {one['micro_steps']} |"
        for one in results
    )
    about = {"tokens": own["tokens"], "ranks": own["ranks"], "device": own["device"], "budget": BUDGET}
    return TEXT.format(rows=rows, **about, **shorter)


def compute_plans(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of each plan, printed as they are there."""
    if arguments.sample:
        lines = ",\n".join(json.dumps(group) for group in sample())
        MIX.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    groups = json.loads(MIX.read_text(encoding="utf-8"))[: arguments.groups]
    rows = [(reading, length) for group in groups for reading in [read(group)] for length in group["responses"]]
    tokens = [len(reading.token_ids) + length for reading, length in rows]
    with tempfile.TemporaryDirectory() as folder:
        actor = make_actor(arguments.shape, "meta" if arguments.plan_only else arguments.device, Path(folder))
    cost = SequenceCost.of(actor.transformer)
    costs = [cost(length, reading) for length, (reading, _) in zip(tokens, rows)]
    in_decoder = [cost.decoder(length) for length in tokens]
    plans = {
        "own rows": where_sampled(tokens, RANKS, BUDGET),
        "balanced": micro_steps(costs, tokens, RANKS, BUDGET),
        "balanced in the decoder alone": micro_steps(in_decoder, tokens, RANKS, BUDGET),
    }
    if not arguments.plan_only:
        for part in plans["balanced"][0]:  # compiles and sizes
            compute(actor, [rows[row] for row in part], arguments.device)
    results = []
    for name, plan in plans.items():
        results.append({"plan": name, **figures(plan, costs, tokens, rows, actor, arguments)})
        print(json.dumps(results[-1]), flush=True)
    return results


def figures(
    plan: Steps, costs: list[float], tokens: list[int], rows: list[Any], actor: ActorModule, arguments: Any
) -> dict[str, Any]:
    """Counted work and measured seconds: of the slowest rank, and of the slowest of every micro-step."""
    counted = measured(costs, plan)
    found = {
        "shape": arguments.shape, "ranks": RANKS, "rows": len(rows), "tokens": sum(tokens), "micro_steps": len(plan),
        "counted_rank": round(counted["rank"], 4),
        "counted_micro_step": round(counted["micro_step"], 4),
    }  # fmt: skip
    if arguments.plan_only:
        return found
    # Step by step: what the card does otherwise meets all ranks alike.
    seconds = [[compute(actor, [rows[row] for row in part], arguments.device) for part in step] for step in plan]
    ranks = [sum(of_rank) for of_rank in zip(*seconds)]
    mean = sum(ranks) / RANKS
    return found | {
        "device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu",
        "seconds_of_ranks": [round(one, 3) for one in ranks],
        "rank": round(max(ranks) / mean, 4),
        "micro_step": round(sum(map(max, seconds)) / mean, 4),
        "ddp_seconds": round(max(ranks), 3),
        "fsdp2_seconds": round(sum(map(max, seconds)), 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if arguments.device != "cpu" else None,
    }


if __name__ == "__main__":
    main()
