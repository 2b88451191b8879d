from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightrft.data import SupervisedBatch, SupervisedData, SupervisedSource

Write = Callable[..., str]

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": "a2"},
    {"role": "user", "content": "u3"},
]

# As templates of reasoning models do: the last turn shows its (here empty) reasoning, earlier ones do not.
REASONING = (
    "{% for message in messages %}[{{ message.role }}]"
    "{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}"
    "{{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Student(LightningModule):
    """Keeps the batches it is given."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[SupervisedBatch] = []
        self.validated: list[SupervisedBatch] = []

    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> Tensor:
        self.trained.append(batch)
        return self.weight * 1.0

    def validation_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(tokenizer: Any, epochs: int = 1, **keys: Any) -> Student:
    student = Student(tokenizer)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(student, datamodule=SupervisedData(**keys))
    return student


def sequences(tokenizer: Any, path: str, **keys: Any) -> list[tuple[str, list[str]]]:
    """Text of each sequence and its learned stretches, in order of the records."""
    student = fit(tokenizer, train=SupervisedSource(path), val=SupervisedSource(path), batch_size=2, **keys)
    found = []
    for batch in student.validated:
        for ids, mask in zip(batch.sequences, batch.loss_masks):
            assert (ids.dtype, mask.dtype, ids.shape) == (torch.int64, torch.bool, mask.shape)
            stretches = "".join(tokenizer.decode([i]) if m else "\0" for i, m in zip(ids, mask)).split("\0")
            found.append((tokenizer.decode(ids), [stretch for stretch in stretches if stretch]))
    return found


# What is learned


def test_every_assistant_turn_is_learned_with_the_token_that_ends_it(chat_tokenizer: Any, write: Write) -> None:
    assert sequences(chat_tokenizer, write([{"messages": MESSAGES}])) == [
        (
            "[system]S<eos>\n[user]u1<eos>\n[assistant]a1<eos>\n[user]u2<eos>\n[assistant]a2<eos>\n",
            ["a1<eos>", "a2<eos>"],
        )
    ]


def test_turns_in_a_row_and_tool_calls_are_learned(chat_tokenizer: Any, write: Write) -> None:
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "<eos>", "{% if message.tool_calls %}{{ message.tool_calls[0].function.name }}(){% endif %}<eos>"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    messages = [MESSAGES[1], call, {"role": "tool", "content": "9"}, MESSAGES[2], MESSAGES[4]]
    ((_, learned),) = sequences(chat_tokenizer, write([{"messages": messages}]))
    assert learned == ["look()<eos>", "a1<eos>", "a2<eos>"]


def test_a_template_that_rewrites_earlier_turns_gives_each_turn_as_it_is_generated(
    chat_tokenizer: Any, write: Write
) -> None:
    chat_tokenizer.chat_template = REASONING
    assert sequences(chat_tokenizer, write([{"messages": MESSAGES[1:5]}])) == [
        ("[user]u1<eos>\n[assistant]<think></think>a1<eos>\n", ["<think></think>a1<eos>"]),
        (
            "[user]u1<eos>\n[assistant]a1<eos>\n[user]u2<eos>\n[assistant]<think></think>a2<eos>\n",
            ["<think></think>a2<eos>"],
        ),
    ]


@pytest.mark.parametrize(
    ("content", "learned"),
    [
        ("<think>\nwhy</think>so", "why</think>so<eos>"),
        ("just so", "just so<eos>"),
        ("<table>", "<table><eos>"),
    ],
)
def test_what_the_opening_of_a_turn_already_says_is_not_learned(
    content: str, learned: str, chat_tokenizer: Any, write: Write
) -> None:
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}[assistant]", "{% if add_generation_prompt %}[assistant]<think>\n"
    )
    messages = [MESSAGES[1], {"role": "assistant", "content": content}]
    ((_, found),) = sequences(chat_tokenizer, write([{"messages": messages}]))
    assert found == [learned]


def test_a_template_whose_turns_end_without_a_special_token_is_learned_to_its_end(
    chat_tokenizer: Any, write: Write
) -> None:
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("<eos>", ".")
    ((_, learned),) = sequences(chat_tokenizer, write([{"messages": MESSAGES}]))
    assert learned == ["a1.\n", "a2.\n"]


@pytest.mark.parametrize(("end", "learned"), [("<eos>", "x<eos>y<eos>"), (".", "x<eos>y.\n")])
def test_special_tokens_inside_a_turn_do_not_end_it(end: str, learned: str, chat_tokenizer: Any, write: Write) -> None:
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("<eos>", end)
    messages = [MESSAGES[1], {"role": "assistant", "content": "x<eos>y"}]
    ((_, found),) = sequences(chat_tokenizer, write([{"messages": messages}]))
    assert found == [learned]


def test_a_turn_may_end_with_any_special_token_the_tokenizer_was_given(chat_tokenizer: Any, write: Write) -> None:
    from tokenizers import AddedToken

    chat_tokenizer.add_tokens(AddedToken("<end>", special=True, normalized=False))
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("<eos>", "<end>")
    ((_, learned),) = sequences(chat_tokenizer, write([{"messages": MESSAGES}]))
    assert learned == ["a1<end>", "a2<end>"]


def test_tokens_are_those_of_the_prompt_and_the_response_apart_as_at_inference(
    chat_tokenizer: Any, write: Write
) -> None:
    from tokenizers import AddedToken

    chat_tokenizer.add_tokens(AddedToken("]a", normalized=False))  # a token across where the turn opens
    student = fit(chat_tokenizer, train=SupervisedSource(write([{"messages": MESSAGES[1:3]}])))
    prompt = chat_tokenizer.apply_chat_template(MESSAGES[1:2], add_generation_prompt=True, tokenize=False)
    ids = student.trained[0].sequences[0].tolist()
    given = chat_tokenizer(prompt)["input_ids"]
    assert ids[: len(given)] == given
    assert ids[len(given) :] == chat_tokenizer("a1<eos>\n")["input_ids"]


def test_prompt_and_response_are_turns_with_a_template_and_raw_text_without(chat_tokenizer: Any, write: Write) -> None:
    path = write([{"prompt": "Q:", "response": " A"}, {"prompt": "Q:", "response": "done<eos>"}])
    assert sequences(chat_tokenizer, path)[0] == ("[user]Q:<eos>\n[assistant] A<eos>\n", [" A<eos>"])
    raw = [("Q: A<eos>", [" A<eos>"]), ("Q:done<eos>", ["done<eos>"])]
    assert sequences(chat_tokenizer, path, chat_template=False) == raw
    chat_tokenizer.chat_template = None
    assert sequences(chat_tokenizer, path) == raw


def test_a_prompt_may_be_messages_and_keys_may_be_renamed(chat_tokenizer: Any, write: Write) -> None:
    path = write([{"q": MESSAGES[:2], "a": "x"}, {"chat": MESSAGES[1:3]}])
    source = SupervisedSource(path, messages_key="chat", prompt_key="q", response_key="a")
    student = fit(chat_tokenizer, val=source, train=source)
    texts = [chat_tokenizer.decode(ids) for ids in student.validated[0].sequences]
    assert texts == [
        "[system]S<eos>\n[user]u1<eos>\n[assistant]x<eos>\n",
        "[user]u1<eos>\n[assistant]a1<eos>\n",
    ]


# Bad records


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "x"}, "neither 'messages' nor 'prompt'; the record has 'text'"),
        ({"prompt": "x"}, "there is no key 'response'"),
        ({"prompt": "x", "response": " "}, "'response' must be text that is not empty"),
        ({"prompt": 5, "response": "x"}, "'prompt' must be text"),
        ({"messages": []}, "non-empty list of messages"),
        ({"messages": MESSAGES[:2]}, "no assistant turn"),
        ({"messages": MESSAGES[2:]}, "begins with an assistant turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, MESSAGES[2]]}, "reads text alone"),
        ({"messages": MESSAGES, "images": ["x.png"]}, "it has images, audio or video, but the model reads text alone"),
        ({"messages": MESSAGES}, "has 61 tokens, more than max_tokens 60"),
        ("{broken", "not JSON"),
        (["x"], "it is a list"),
    ],
)
def test_bad_records_are_named_and_can_be_skipped(record: Any, says: str, chat_tokenizer: Any, write: Write) -> None:
    source = SupervisedSource(write([{"messages": MESSAGES[:3]}, record], "set.jsonl"))
    with pytest.raises(ValueError, match=f"1 of 2 records of 'set' cannot be used.*set/1: .*{says}"):
        fit(chat_tokenizer, train=source, max_tokens=60)
    with pytest.warns(UserWarning, match=r"Skipped 1 records of 'set'\. set/1"):
        student = fit(chat_tokenizer, train=source, max_tokens=60, on_bad_record="skip")
    assert [len(batch) for batch in student.trained] == [1]


def test_raw_records_need_an_end_of_sequence_and_no_messages(tiny_tokenizer: Any, write: Write) -> None:
    with pytest.raises(ValueError, match="messages need a chat template"):
        fit(tiny_tokenizer, train=SupervisedSource(write([{"messages": MESSAGES}])))
    tiny_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end of sequence token"):
        fit(
            tiny_tokenizer,
            val=SupervisedSource("gone.jsonl"),
            train=SupervisedSource(write([{"prompt": "q", "response": "a"}])),
        )


def test_a_template_that_moves_the_turn_before_its_prompt_is_refused(chat_tokenizer: Any, write: Write) -> None:
    chat_tokenizer.chat_template = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="does not append the assistant's turn"):
        fit(chat_tokenizer, train=SupervisedSource(write([{"messages": MESSAGES[1:3]}])))


# Batches and order

PAIRS = [{"prompt": "q", "response": str(i)} for i in range(10)]


def answers(tokenizer: Any, batches: list[SupervisedBatch]) -> list[str]:
    return [tokenizer.decode(ids[1:-1]) for batch in batches for ids in batch.sequences]


def test_training_visits_every_record_each_epoch_in_an_order_of_the_seed(tiny_tokenizer: Any, write: Write) -> None:
    def orders(seed: int | None) -> tuple[list[str], list[str]]:
        torch.rand(1)  # the order must not depend on what else draws
        student = fit(tiny_tokenizer, 2, train=source, batch_size=4, seed=seed)
        assert [len(batch) for batch in student.trained] == [4, 4, 2] * 2
        order = answers(tiny_tokenizer, student.trained)
        return order[:10], order[10:]

    source = SupervisedSource(write(PAIRS))
    first, second = orders(1)
    assert sorted(first) == sorted(second) == [str(i) for i in range(10)]
    assert first != second
    assert orders(1) == (first, second)
    assert orders(2) != (first, second)


def test_seed_everything_orders_the_records_unless_the_data_have_a_seed(
    tiny_tokenizer: Any, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def order(seed: int | None) -> list[str]:
        return answers(tiny_tokenizer, fit(tiny_tokenizer, train=source, seed=seed).trained)

    source = SupervisedSource(write(PAIRS))
    own = order(1)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert order(None) == own
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert order(None) != own == order(1)


def test_ranks_share_the_records_of_an_epoch(tiny_tokenizer: Any, write: Write) -> None:
    class Ranked:
        world_size, is_global_zero, lightning_module = 2, True, Student(tiny_tokenizer)

        def __init__(self, rank: int) -> None:
            self.global_rank = rank

    shares = []
    for rank in range(2):
        data = SupervisedData(train=SupervisedSource(write(PAIRS)), batch_size=3)
        data.trainer = Ranked(rank)  # type: ignore[assignment]
        data.setup("fit")
        loader = data.train_dataloader()
        assert isinstance(loader.sampler, DistributedSampler)  # Lightning leaves it and sets its epoch
        shares.append(answers(tiny_tokenizer, list(loader)))
    assert sorted(shares[0] + shares[1]) == [str(i) for i in range(10)]


def test_worker_processes_give_the_batches_of_the_training_process(tiny_tokenizer: Any, write: Write) -> None:
    keys: dict[str, Any] = {"train": SupervisedSource(write(PAIRS)), "batch_size": 2}
    alone, helped = fit(tiny_tokenizer, **keys), fit(tiny_tokenizer, num_workers=1, **keys)
    assert answers(tiny_tokenizer, helped.trained) == answers(tiny_tokenizer, alone.trained)


def test_several_sources_are_one_pool(tiny_tokenizer: Any, write: Write) -> None:
    train = [SupervisedSource(write(PAIRS[:4], "a.jsonl")), SupervisedSource(write(PAIRS[4:], "b.jsonl"))]
    student = fit(tiny_tokenizer, train=train)
    assert sorted(answers(tiny_tokenizer, student.trained)) == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="Two train sources are called 'a'"):
        SupervisedData(train=[train[0], train[0]])


def test_a_batch_moves_as_a_whole() -> None:
    batch = SupervisedBatch([torch.tensor([1, 2])], [torch.tensor([False, True])])
    moved = batch.to(torch.device("meta"))
    assert [t.device.type for t in moved.sequences + moved.loss_masks] == ["meta", "meta"]
    assert len(moved) == 1


# Where the tokenizer comes from, and what is refused


def test_a_tokenizer_of_its_own_comes_before_the_modules(chat_tokenizer: Any, write: Write, tmp_path: Any) -> None:
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = SupervisedData(train=SupervisedSource(write(PAIRS)), tokenizer=str(tmp_path / "tokenizer"))
    data.setup("fit")
    (first,) = {tuple(ids[:6].tolist()) for batch in data.train_dataloader() for ids in batch.sequences}
    assert chat_tokenizer.decode(first) == "[user]"


def test_what_is_missing_is_said(tiny_tokenizer: Any, write: Write) -> None:
    source = SupervisedSource(write(PAIRS))
    with pytest.raises(RuntimeError, match=r"There is no tokenizer: set data\.tokenizer"):
        SupervisedData(train=source).setup("fit")
    with pytest.raises(RuntimeError, match=r"setup\(\) must come before"):
        SupervisedData(train=source).train_dataloader()
    with pytest.raises(RuntimeError, match="nothing to train on"):
        fit(tiny_tokenizer, val=source)
    wrong: list[dict[str, Any]] = [{"batch_size": 0}, {"max_tokens": 0}, {"num_workers": -1}]
    for keys in wrong:
        with pytest.raises(ValueError, match="must be at least"):
            SupervisedData(**keys)


@pytest.mark.parametrize("train", ["{path: a.jsonl, prompt_key: q}", "[{path: a.jsonl, prompt_key: q}]"])
def test_yaml_builds_supervised_data_from_one_source_and_from_a_list(train: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    yaml = f"data: {{class_path: lightrft.data.SupervisedData, init_args: {{train: {train}, max_tokens: 512}}}}"
    data = parser.instantiate_classes(parser.parse_string(yaml)).data
    assert data.train == [SupervisedSource("a.jsonl", prompt_key="q")]
    assert data.max_tokens == 512
