"""Tiny models that see or hear, their processors made in code, and media for them; nothing is downloaded."""

from __future__ import annotations

import functools
import io
import math
import wave
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)

from lightrft.samples import Media, Prompt

CONTEXT = 256
VOCABULARY = 320  # large, so that a placeholder is hardly ever drawn
SPECIAL = ["<pad>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|audio_bos|>", "<|audio_eos|>"]
PLACEHOLDERS = ["<|image_pad|>", "<|video_pad|>", "<image>", "<|AUDIO|>"]
FIRST = len(SPECIAL) + len(PLACEHOLDERS)  # of the ids that are text
# Heads of 32: the smallest that every engine takes.
TEXT: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


@dataclass
class MediaWorld:
    """The trainer's side of a model with media.

    Attributes:
        kind: of its media, a field of :class:`~lightrft.samples.Media`.
        around: ids of a placeholder with what a chat template writes around it.
        reference: a reference to the ``n``-th image or audio; all differ, in size or length too.
        tower: begins the names of the weights that see or hear.
        projector: a weight between tower and decoder.
    """

    config: Any
    processor: Any
    model: Any
    kind: str
    around: list[int]
    reference: Callable[[int], Any]
    tower: str
    projector: str

    def weights(self) -> list[tuple[str, Tensor]]:
        return [(name, tensor.detach().clone()) for name, tensor in self.model.named_parameters()]

    def prompt(self, uid: str, which: list[int], length: int = 6) -> Prompt:
        """Text, and after each of its first tokens one of the media ``which``."""
        text = [FIRST + (len(uid) + 7 * i) % (VOCABULARY - FIRST) for i in range(length)]
        pieces = [[token, *(self.around if i < len(which) else [])] for i, token in enumerate(text)]
        ids = torch.tensor([token for piece in pieces for token in piece])
        return Prompt(uid, ids, "", media=Media(**{self.kind: tuple(map(self.reference, which))}))


def png(number: int) -> bytes:
    """Squares of two colours."""
    width, height = 56 + 28 * (number % 3), 56 + 28 * (number % 2)
    image = Image.new("RGB", (width, height), (40 * number % 256, 200, 90))
    image.paste((255, 30 * number % 256, 0), (4 * number % 40, 7, 30 + 5 * number % 20, 40))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def wav(number: int, seconds: float | None = None, rate: int = 16000, channels: int = 1) -> bytes:
    """A tone of 16-bit samples."""
    steps = torch.arange(int(rate * (0.3 + 0.1 * (number % 3) if seconds is None else seconds)), dtype=torch.float64)
    tone = (torch.sin(2 * math.pi * (300 + 211 * number) * steps / rate) * 12000).to(torch.int16)
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(2)
        opened.setframerate(rate)
        opened.writeframes(tone[:, None].expand(-1, channels).contiguous().numpy().tobytes())
    return file.getvalue()


def _tokenizer() -> PreTrainedTokenizerFast:
    pieces = [*SPECIAL, *PLACEHOLDERS, *[f"[{i}]" for i in range(VOCABULARY - FIRST)]]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\[\d+\]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    wrapped.add_special_tokens({"additional_special_tokens": [*SPECIAL[2:], *PLACEHOLDERS]})
    return wrapped


def _id(token: str) -> int:
    return [*SPECIAL, *PLACEHOLDERS].index(token)


def _model(model_class: Any, config: Any) -> Any:
    """With decided tastes, and media that matter to them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15 if "embed" in name else 1.2 / parameter[0].numel() ** 0.5)
            elif "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model


def _llava() -> MediaWorld:
    from transformers import CLIPImageProcessorPil

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=_id("<image>"),
        vision_feature_layer=-1,
        image_seq_length=16,
        dtype="float32",
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = LlavaProcessor(
        images,
        _tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return MediaWorld(
        config=config,
        processor=processor,
        model=_model(LlavaForConditionalGeneration, config),
        kind="images",
        around=[_id("<image>")],
        reference=png,
        tower="model.vision_tower.",
        projector="model.multi_modal_projector.linear_2.weight",
    )


def _qwen2_5_vl() -> MediaWorld:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    tokens = {"image_token_id": _id("<|image_pad|>"), "video_token_id": _id("<|video_pad|>")}
    tokens |= {"vision_start_token_id": _id("<|vision_start|>"), "vision_end_token_id": _id("<|vision_end|>")}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128,
            "window_size": 56, "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        dtype="float32",
        **tokens,
    )  # fmt: skip
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(size=size), _tokenizer(), Qwen2VLVideoProcessor(size=size))
    return MediaWorld(
        config=config,
        processor=processor,
        model=_model(Qwen2_5_VLForConditionalGeneration, config),
        kind="images",
        around=[_id("<|vision_start|>"), _id("<|image_pad|>"), _id("<|vision_end|>")],
        reference=png,
        tower="model.visual.",
        projector="model.visual.merger.mlp.2.weight",
    )


def _qwen2_audio() -> MediaWorld:
    config = Qwen2AudioConfig(
        # 30 seconds a clip, as vLLM insists.
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=48, d_model=32
        ).to_dict(),
        text_config=Qwen2Config(**TEXT).to_dict(),
        audio_token_index=_id("<|AUDIO|>"),
        dtype="float32",
    )
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=16), _tokenizer())
    return MediaWorld(
        config=config,
        processor=processor,
        model=_model(Qwen2AudioForConditionalGeneration, config),
        kind="audios",
        around=[_id("<|audio_bos|>"), _id("<|AUDIO|>"), _id("<|audio_eos|>")],
        reference=wav,
        tower="model.audio_tower.",
        projector="model.multi_modal_projector.linear.weight",
    )


_MAKERS = {"llava": _llava, "qwen2_5_vl": _qwen2_5_vl, "qwen2_audio": _qwen2_audio}


@functools.cache
def media_world(family: str) -> MediaWorld:
    return _MAKERS[family]()
