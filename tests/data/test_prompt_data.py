from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from lightrft.data import PromptData, PromptSource, Source

Write = Callable[..., str]
RECORDS = [{"input": f"q{i}", "reference": i, "label": "rule" if i % 2 else None} for i in range(5)]


def loaded(tokenizer: Any, seed: int = 0, rank: int = 0, world_size: int = 1, /, **keys: Any) -> PromptData:
    data = PromptData(**keys)
    data.attach(tokenizer, seed, rank, world_size)
    data.setup("fit")
    return data


def texts(tokenizer: Any, path: str, **keys: Any) -> list[str]:
    return [prompt.text for prompt in loaded(tokenizer, val=Source(path), **keys).val_dataloader()]


def test_a_prompt_carries_its_record_and_the_tokens_of_its_text(chat_tokenizer: Any, write: Write) -> None:
    path = write([{"input": "hi", "reference": 7, "label": "rule", "level": 3}], "set.jsonl")
    (prompt,) = loaded(chat_tokenizer, train=Source(path)).train_dataloader().take(1)
    assert prompt.text == "[user]hi<eos>\n[assistant]"
    assert chat_tokenizer.decode(prompt.token_ids) == prompt.text
    assert (prompt.token_ids.dtype, prompt.token_ids.dim()) == (torch.int64, 1)
    assert (prompt.uid, prompt.source, prompt.reference, prompt.label) == ("set/0@0", "set", "7", "rule")
    assert prompt.record == {"level": 3}


def test_val_prompts_are_every_world_size_th_of_all_sources_in_order(chat_tokenizer: Any, write: Write) -> None:
    val = [Source(write(RECORDS, "a.jsonl")), Source(write(RECORDS[:2], "b.jsonl"))]
    ranks = [[p.uid for p in loaded(chat_tokenizer, 0, r, 3, val=val).val_dataloader()] for r in range(3)]
    assert ranks == [["a/0@val", "a/3@val", "b/1@val"], ["a/1@val", "a/4@val"], ["a/2@val", "b/0@val"]]


def test_labels_are_those_of_the_usable_records_of_train_and_val(chat_tokenizer: Any, write: Write) -> None:
    train, val = write(RECORDS, "train.jsonl"), write([{"input": "q", "label": "other"}, {"label": "bad"}], "val.jsonl")
    with pytest.warns(UserWarning, match="Skipped 1"):
        data = loaded(chat_tokenizer, train=Source(train), val=Source(val), on_bad_record="skip")
    assert data.labels() == {None, "rule", "other"}


def test_gsm8k_records_train_as_they_are_on_disk(chat_tokenizer: Any, tmp_path: Path) -> None:
    record = {"question": "How many?", "answer": "It is 500 + 500 = <<500+500=1000>>1,000.\n#### 1,000"}
    datasets.Dataset.from_list([record]).to_parquet(tmp_path / "gsm8k.parquet")
    source = Source(str(tmp_path / "gsm8k.parquet"), format="gsm8k", label="gsm8k_rule")
    (prompt,) = loaded(chat_tokenizer, train=source).train_dataloader().take(1)
    assert (prompt.reference, prompt.label, prompt.record) == ("1000", "gsm8k_rule", {})
    assert prompt.text == "[user]How many?<eos>\n[assistant]"


# Templates and system prompts


def test_the_system_prompt_comes_first_and_the_records_own_follows_it(chat_tokenizer: Any, write: Write) -> None:
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "q"}]
    empty = [{"role": "system", "content": ""}, {"role": "user", "content": "q"}]
    path = write([{"input": "q"}, {"input": own}, {"input": empty}])
    assert texts(chat_tokenizer, path, system_prompt="Think.") == [
        "[system]Think.<eos>\n[user]q<eos>\n[assistant]",
        "[system]Think.\n\nOwn.<eos>\n[user]q<eos>\n[assistant]",
        "[system]Think.<eos>\n[user]q<eos>\n[assistant]",
    ]


@pytest.mark.parametrize("chat_template", [None, True, False])
def test_a_chat_template_is_applied_unless_it_is_switched_off(
    chat_template: bool | None, chat_tokenizer: Any, write: Write
) -> None:
    expected = "q " if chat_template is False else "[user]q <eos>\n[assistant]"
    assert texts(chat_tokenizer, write([{"input": "q "}]), chat_template=chat_template) == [expected]


def test_raw_text_is_used_where_the_tokenizer_has_no_template(tiny_tokenizer: Any, write: Write) -> None:
    assert texts(tiny_tokenizer, write([{"input": " Once upon"}])) == [" Once upon"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [({"chat_template": True}, "the tokenizer has none"), ({"system_prompt": "Think."}, "needs a chat template")],
)
def test_what_needs_a_template_is_refused_without_one(keys: dict[str, Any], says: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=says):
        PromptData(**keys).attach(tiny_tokenizer)


def test_messages_without_a_template_are_bad_records(tiny_tokenizer: Any, write: Write) -> None:
    path = write([{"input": [{"role": "user", "content": "q"}]}], "set.jsonl")
    with pytest.raises(ValueError, match="set/0: the input is a list of messages, which needs a chat template"):
        texts(tiny_tokenizer, path)


def test_what_a_template_refuses_is_a_bad_record(chat_tokenizer: Any, write: Write) -> None:
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ValueError, match=r"set/0: the chat template refuses it \(TemplateError: roles must alternate\)"
    ):
        texts(chat_tokenizer, write([{"input": "q"}], "set.jsonl"))


def test_the_opening_token_comes_once_with_a_template_and_the_closing_never(tiny_tokenizer: Any, write: Write) -> None:
    from tokenizers.processors import TemplateProcessing

    special = [("<pad>", 0), ("<eos>", 1)]
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<pad> $A <eos>", special_tokens=special)
    path = write([{"input": "hi"}])
    (raw,) = loaded(tiny_tokenizer, val=Source(path)).val_dataloader()
    assert tiny_tokenizer.decode(raw.token_ids) == "<pad>hi"
    tiny_tokenizer.chat_template = "<pad>{{ messages[0].content }}"
    (templated,) = loaded(tiny_tokenizer, val=Source(path)).val_dataloader()
    assert tiny_tokenizer.decode(templated.token_ids) == "<pad>hi"


# Bad records

BAD = [{"input": "fine"}, {"q": 1}, "{broken", {"input": ""}, '{"input": "\\ud800"}', ["list"], {"input": "x" * 99}]


def test_bad_records_stop_the_run_before_it_begins_with_the_first_three_reasons(
    chat_tokenizer: Any, write: Write
) -> None:
    with pytest.raises(ValueError, match=r"6 of 7 records of 'set' cannot be used; .*on_bad_record: skip") as error:
        texts(chat_tokenizer, write(BAD, "set.jsonl"), max_prompt_tokens=50)
    message = str(error.value)
    assert "set/1: there is no key 'input'; the record has 'q'; set/2: the line is not JSON" in message
    assert "set/3: 'input' is empty; …" in message and "set/4" not in message


def test_skipped_records_are_counted_and_the_rows_of_the_others_stay(chat_tokenizer: Any, write: Write) -> None:
    path = write([*BAD, {"input": "last"}], "set.jsonl")
    keys: dict[str, Any] = {"on_bad_record": "skip", "max_prompt_tokens": 50}
    with pytest.warns(UserWarning, match=r"Skipped 6 records of 'set'\. set/1: .*; set/2: .*; set/3: [^;]*; …$"):
        data = loaded(chat_tokenizer, train=Source(path), **keys)
    stream = data.train_dataloader()
    assert sorted(prompt.uid for prompt in stream.take(len(stream))) == ["set/0@0", "set/7@0"]
    assert [reason.split(":")[0] for reason in data.bad_records] == [f"set/{row}" for row in range(1, 7)]
    assert "not Unicode" in data.bad_records[3]
    assert "it is a list, not an object" in data.bad_records[4]
    assert "has 118 tokens, more than max_prompt_tokens 50" in data.bad_records[5]


def test_only_the_first_rank_warns_of_skipped_records(chat_tokenizer: Any, write: Write) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        data = loaded(chat_tokenizer, 0, 1, 2, train=Source(write(BAD)), on_bad_record="skip")
    assert len(data.bad_records) == 5


def test_a_source_without_a_usable_record_is_an_error_even_when_skipping(chat_tokenizer: Any, write: Write) -> None:
    with pytest.raises(ValueError, match=r"2 of 2 records of 'set' cannot be used\. set/0"):
        loaded(chat_tokenizer, train=Source(write([{"q": 1}] * 2, "set.jsonl")), on_bad_record="skip")


def test_prompts_as_long_as_the_limit_are_kept(chat_tokenizer: Any, write: Write) -> None:
    (text,) = texts(chat_tokenizer, write([{"input": "abc"}]))
    tokens = len(chat_tokenizer(text)["input_ids"])
    assert texts(chat_tokenizer, write([{"input": "abc"}]), max_prompt_tokens=tokens) == [text]
    with pytest.raises(ValueError, match=f"has {tokens} tokens, more than max_prompt_tokens {tokens - 1}"):
        texts(chat_tokenizer, write([{"input": "abc"}]), max_prompt_tokens=tokens - 1)


# Blending, seeds and order


def test_blended_sources_are_drawn_by_their_probability(chat_tokenizer: Any, write: Write) -> None:
    train = [Source(write(RECORDS, f"{name}.jsonl"), probability=p) for name, p in (("a", 3.0), ("b", 1.0))]
    prompts = loaded(chat_tokenizer, train=train).train_dataloader().take(1000)
    # Four standard deviations of a binomial share.
    assert sum(prompt.source == "a" for prompt in prompts) / 1000 == pytest.approx(0.75, abs=0.055)


def test_sources_without_probability_are_one_pool(chat_tokenizer: Any, write: Write) -> None:
    train = [Source(write(RECORDS, "a.jsonl")), Source(write(RECORDS[:2], "b.jsonl"))]
    stream = loaded(chat_tokenizer, train=train).train_dataloader()
    assert len({prompt.uid for prompt in stream.take(len(stream))}) == len(stream) == 7


def test_the_runs_seed_orders_the_prompts(chat_tokenizer: Any, write: Write) -> None:
    def order(run: int, shuffle: bool = True) -> list[str]:
        data = loaded(chat_tokenizer, run, train=Source(path), shuffle=shuffle)
        return [prompt.uid for prompt in data.train_dataloader().take(20)]

    path = write([{"input": f"q{i}"} for i in range(20)], "set.jsonl")
    assert order(1) == order(1) != order(2)
    assert order(1, shuffle=False) == [f"set/{i}@0" for i in range(20)]


def test_the_streams_of_the_ranks_share_a_draw(chat_tokenizer: Any, write: Write) -> None:
    path = write(RECORDS, "set.jsonl")
    shares = [loaded(chat_tokenizer, 3, r, 2, train=Source(path)).train_dataloader().take(4) for r in range(2)]
    whole = loaded(chat_tokenizer, 3, train=Source(path)).train_dataloader().take(4)
    assert [p.uid for share in shares for p in share] == [p.uid for p in whole]


# What is refused, and when


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"train": [Source("x/a.jsonl"), Source("y/a.jsonl")]}, "Two train sources are called 'a'; give each"),
        ({"val": [Source("a"), Source("b", name="a")]}, "Two val sources are called 'a'"),
        ({"train": [Source("a", probability=0.5), Source("b")]}, "Either all .* or none does; b gives none"),
        ({"train": Source("a", probability=0.5)}, "the only train source"),
        ({"val": [Source("a", probability=0.5)]}, "remove their probability"),
        ({"max_prompt_tokens": 0}, "at least 1"),
    ],
)
def test_sources_that_contradict_each_other_are_refused_at_once(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PromptData(**keys)


def test_train_and_val_may_share_a_name(chat_tokenizer: Any, write: Write) -> None:
    source = Source(write(RECORDS))
    assert len(loaded(chat_tokenizer, train=source, val=source).val_dataloader()) == 5


def test_the_constructor_reads_nothing_and_validation_reads_no_train_data(chat_tokenizer: Any, write: Write) -> None:
    data = PromptData(train=Source("gone.jsonl"), val=Source(write(RECORDS)))
    data.attach(chat_tokenizer)
    data.setup("validate")
    assert len(data.val_dataloader()) == 5
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        data.setup("fit")


def test_calls_out_of_order_say_what_is_missing(chat_tokenizer: Any, write: Write) -> None:
    data = PromptData(val=Source(write(RECORDS)))
    with pytest.raises(RuntimeError, match="attach"):
        data.setup("fit")
    data.attach(chat_tokenizer)
    with pytest.raises(RuntimeError, match=r"setup\(\) must come before"):
        data.val_dataloader()
    data.setup("fit")
    with pytest.raises(RuntimeError, match="nothing to train on"):
        data.train_dataloader()


def test_without_val_sources_there_are_no_val_prompts(chat_tokenizer: Any, write: Write) -> None:
    assert loaded(chat_tokenizer, train=Source(write(RECORDS))).val_dataloader() == []


# YAML


def parsed(yaml: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.instantiate_classes(parser.parse_string(yaml)).data


def test_yaml_builds_prompts_from_one_source_and_from_a_list() -> None:
    data = parsed(
        """
        data:
          class_path: lightrft.data.PromptData
          init_args:
            train:
              - {path: a.jsonl, probability: 0.75, label: rule}
              - {path: openai/gsm8k, subset: main, probability: 0.25, format: gsm8k}
            val: {path: v.parquet, media_keys: {images: null}}
            on_bad_record: skip
        """
    )
    assert data.train == [
        Source("a.jsonl", probability=0.75, label="rule"),
        Source("openai/gsm8k", subset="main", probability=0.25, format="gsm8k"),
    ]
    assert data.val == [PromptSource("v.parquet", media_keys={"images": None})]
    assert data.on_bad_record == "skip"


def test_an_unknown_key_of_a_source_in_yaml_is_refused_by_name() -> None:
    from jsonargparse import ArgumentError

    with pytest.raises(ArgumentError, match="inputkey"):
        parsed("data: {class_path: lightrft.data.PromptData, init_args: {train: {path: a, inputkey: q}}}")
