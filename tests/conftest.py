"""What every test stands on: no network, one thread, known seeds, and a model small enough for all of them."""

from __future__ import annotations

import os
import random
import runpy
import string
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch or transformers are imported, here or in a process that a test starts.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2Config

WITHOUT_CUDA = Path(__file__).parent / "without_cuda"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(WITHOUT_CUDA), os.environ.get("PYTHONPATH")]))
sys.path.append(str(WITHOUT_CUDA))  # which an engine's own process takes over
runpy.run_path(str(WITHOUT_CUDA / "sitecustomize.py"))
torch.set_num_threads(1)

# Begun first, so that at the end of `make test` no worker waits long for another's last file.
LONGEST = {"test_exact_resume.py", "test_launching.py", "test_resume_elsewhere.py", "test_sharding.py"}
LONGEST |= {"test_own_process.py", "test_split_invariance.py", "test_sequence_parallel.py", "test_fit.py"}
LONGEST |= {"test_learning.py", "test_offload_during_rollout.py", "test_watchdog.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, ``<pad>``, ``<eos>`` and ``<unk>``; nothing is added to a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<eos>", "<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def tiny_config(tiny_tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """A Qwen2 of 2 layers, hidden 64, 2 heads of 32 that share one key/value head: about 90 thousand weights."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        pad_token_id=tiny_tokenizer.pad_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        bos_token_id=None,
    )
