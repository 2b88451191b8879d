"""``lightrft chat`` in a real process, on a real folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lightrft.cli.chat import main

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that greedily continues the alphabet, with a tokenizer of single letters."""
    path = tmp_path_factory.mktemp("alphabet")
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    size = len(vocabulary)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 32))
        # After "z" comes the end.
        following = torch.tensor([*range(1, size), 1]).where(torch.arange(size) != size - 1, torch.tensor(1))
        model.lm_head.weight.zero_()
        model.lm_head.weight[following, torch.arange(size)] = 1.0
    model.save_pretrained(path)
    return path


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightrft.cli.chat", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


@pytest.fixture
def chatting(folder, tmp_path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def test_one_prompt_is_continued_to_the_end_of_the_sequence(folder):
    done = run(str(folder), "--prompt", "mnop", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "qrstuvwxyz\n"


def test_lines_are_answered_until_exit_and_empty_ones_skipped(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open_lines("x\n\n   \nv\nexit\na\n", folder))
    main([str(folder), "--temperature=0", "--max_new_tokens=3"])
    assert capsys.readouterr().out == "yz\nwxy\n"


def test_end_of_file_ends(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open_lines("x", folder))
    main([str(folder), "--temperature=0", "--max_new_tokens=3"])
    assert capsys.readouterr().out == "yz\n"


def test_a_chat_template_keeps_the_whole_conversation(chatting, capsys, monkeypatch):
    seen: list[list[str]] = []
    applied = PreTrainedTokenizerFast.apply_chat_template
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "apply_chat_template",
        lambda self, messages, **options: (
            seen.append([m["content"] for m in messages]) or applied(self, messages, **options)
        ),
    )
    monkeypatch.setattr(sys, "stdin", open_lines("hey\nyou\n", chatting))
    main([str(chatting), "--system=be kind", "--temperature=0", "--max_new_tokens=2"])
    assert seen == [["be kind", "hey"], ["be kind", "hey", "bc", "you"]]
    assert capsys.readouterr().out == "bc\nbc\n"


def test_a_high_temperature_draws_differently(folder, capsys):
    torch.manual_seed(0)
    for _ in range(2):
        main([str(folder), "--prompt=a", "--temperature=50", "--max_new_tokens=20"])
    first, second = capsys.readouterr().out.splitlines()
    assert first != second


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/nowhere/at/all"], "'/nowhere/at/all' is no Hugging Face folder"),
        (["{folder}", "--temperature=-1"], "--temperature must be 0"),
        (["{folder}", "--max_new_tokens=0"], "--max_new_tokens at least 1"),
        (["{folder}", "--system=x", "--prompt=y"], "no chat template"),
        (["{folder}", "--prompt="], "no tokens"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(folder, arguments, says):
    with pytest.raises(SystemExit, match=says):
        main([argument.format(folder=folder) for argument in arguments])


def open_lines(text: str, where: Path):
    path = where / "typed.txt"
    path.write_text(text)
    return path.open()
