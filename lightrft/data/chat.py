"""From messages to the text and the tokens a model sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightrft.data.records import BadRecord, Message


@dataclass(frozen=True)
class Chat:
    """How prompts are spelled for one tokenizer.

    Args:
        tokenizer: ``PreTrainedTokenizerBase``.
        renderer: what has the chat template: the tokenizer, or the processor around it.
        templated: whether its chat template is applied; otherwise inputs are raw text.
        system_prompt: put before the messages; a system message of the record follows it, a blank line between.
    """

    tokenizer: Any
    renderer: Any
    templated: bool
    system_prompt: str | None = None

    @classmethod
    def of(cls, processor: Any, chat_template: bool | None, system_prompt: str | None = None) -> Chat:
        """The spelling for a tokenizer, or a processor; ``chat_template=None`` applies a template when it has one.

        Raises:
            ValueError: a template is required but there is none, or a system prompt has no template to stand in.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        renderer = processor if getattr(processor, "chat_template", None) else tokenizer
        has_template = bool(getattr(renderer, "chat_template", None))
        if chat_template and not has_template:
            raise ValueError(
                "chat_template is true but the tokenizer has none; give it one, or set chat_template: false."
            )
        templated = has_template if chat_template is None else chat_template
        if system_prompt is not None and not templated:
            raise ValueError("system_prompt needs a chat template; write it into the records, or use a chat tokenizer.")
        return cls(tokenizer, renderer, templated, system_prompt)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for no text, the ends of turns among them."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids) | {index for index, token in added if token.special}

    def prompt(self, text: str | list[Message]) -> str:
        """The prompt, up to where the response begins.

        Raises:
            BadRecord: messages without a template, or messages that the template refuses.
        """
        if self.templated:
            return self.render([{"role": "user", "content": text}] if isinstance(text, str) else text, respond=True)
        if not isinstance(text, str):
            raise BadRecord("the input is a list of messages, which needs a chat template")
        return text

    def render(self, messages: list[Message], respond: bool = False) -> str:
        """Messages under the template; ``respond`` adds the opening of the assistant's turn."""
        try:
            return self.renderer.apply_chat_template(
                self._with_system_prompt(messages), tokenize=False, add_generation_prompt=respond
            )
        except ImportError:
            raise
        except Exception as error:  # a template is a program of its own and raises what it likes
            raise BadRecord(f"the chat template refuses it ({type(error).__name__}: {error})") from error

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt; begins with the tokenizer's own opening unless the template has written it.

        Raises:
            BadRecord: no tokens.
        """
        ids = list(self.tokenizer(text, add_special_tokens=not self.templated)["input_ids"])
        if (
            not self.templated
            and ids[-1:] == [self.tokenizer.eos_token_id]
            and not text.endswith(self.tokenizer.eos_token)
        ):
            ids.pop()  # some tokenizers close every text, but a prompt is not over
        if not ids:
            raise BadRecord("the prompt has no tokens")
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of text inside a sequence: nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _with_system_prompt(self, messages: list[Message]) -> list[Message]:
        if self.system_prompt is None:
            return messages
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": self.system_prompt}, *messages]
        own = messages[0]["content"]
        if isinstance(own, str):
            joined: Any = f"{self.system_prompt}\n\n{own}" if own.strip() else self.system_prompt
        else:
            joined = [{"type": "text", "text": f"{self.system_prompt}\n\n"}, *own]
        return [{**messages[0], "content": joined}, *messages[1:]]
