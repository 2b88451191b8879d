from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ``make quickstart`` leaves for later runs, with an untrained model."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "quickstart")
    monkeypatch.chdir(tmp_path)
    import arithmetic

    root = Path("runs/quickstart")
    train, held_out = arithmetic.split_pairs(0)
    arithmetic.write_tokenizer(root / "tokenizer")
    arithmetic.write_prompts(root / "train.jsonl", train)
    arithmetic.write_prompts(root / "held_out.jsonl", held_out[:20])
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("qwen2", vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "supervised" / "huggingface")
    tokenizer.save_pretrained(root / "supervised" / "huggingface")
    return tmp_path
