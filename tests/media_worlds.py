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
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    WhisperFeatureExtractor,
)

from lightrft.media import MediaProcessor, metadata
from lightrft.samples import Media, Prompt

CONTEXT = 256
VOCABULARY = 320  # large, so that a placeholder is hardly ever drawn
SPECIAL = ["<pad>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|audio_bos|>", "<|audio_eos|>", "<img>", "</img>"]
PLACEHOLDERS = ["<|image_pad|>", "<|video_pad|>", "<image>", "<|AUDIO|>", "<IMG_CONTEXT>", "<video>"]
FIRST = len(SPECIAL) + len(PLACEHOLDERS)  # of the ids that are text
# Heads of 32: the smallest that every engine takes.
TEXT: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
VISION: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128}


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

    def moving(self, uid: str, which: list[int], films: list[int], length: int = 6) -> Prompt:
        """:meth:`prompt`, and after its images videos."""
        asked = self.prompt(uid, which, length)
        own = self.processor.tokenizer.convert_tokens_to_ids(self.processor.video_token)
        image = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        film = [own if token == image else token for token in self.around] + [FIRST + 1]
        media = Media(images=asked.media.images, videos=tuple(map(gif, films)))
        ids = torch.cat([asked.token_ids, torch.tensor(film * len(films)), asked.token_ids[:1]])
        return Prompt(uid, ids, "", media=media)

    def prompt(self, uid: str, which: list[int], length: int = 6) -> Prompt:
        """Text, and after each of its first tokens one of the media ``which``."""
        text = [FIRST + (len(uid) + 7 * i) % (VOCABULARY - FIRST) for i in range(length)]
        pieces = [[token, *(self.around if i < len(which) else [])] for i, token in enumerate(text)]
        ids = torch.tensor([token for piece in pieces for token in piece])
        return Prompt(uid, ids, "", media=Media(**{self.kind: tuple(map(self.reference, which))}))

    def by_the_processor(self, asked: Prompt) -> dict[str, Tensor]:
        """What the processor makes of a whole prompt at once, from its text."""
        text = "".join(self.processor.tokenizer.convert_ids_to_tokens(asked.token_ids.tolist()))
        decoded = MediaProcessor(self.processor).decoded(asked)
        given = {"images": decoded.get("image")} if decoded else {}
        if "video" in decoded:
            given["videos"] = [frames for frames, _ in decoded["video"]]
            given["video_metadata"] = [metadata(*film) for film in decoded["video"]]
        if self.kind == "audios":
            given = {"audio": [samples for samples, _ in decoded.get("audio", [])] or None}
        return dict(self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **given))


def png(number: int) -> bytes:
    """Squares of two colours."""
    width, height = 56 + 28 * (number % 3), 56 + 28 * (number % 2)
    image = Image.new("RGB", (width, height), (40 * number % 256, 200, 90))
    image.paste((255, 30 * number % 256, 0), (4 * number % 40, 7, 30 + 5 * number % 20, 40))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def plain(width: int, height: int) -> bytes:
    """All of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 60, 20)).save(file, "PNG")
    return file.getvalue()


def gif(number: int) -> bytes:
    """Four frames, or six where ``number`` is odd, each shown for a third of a second."""
    frames = [Image.open(io.BytesIO(png(number % 3 + 6 * at))) for at in range(4 + 2 * (number % 2))]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=333)
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


def _tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """With tokens that a processor asks for by these names."""
    pieces = [*SPECIAL, *PLACEHOLDERS, *[f"[{i}]" for i in range(VOCABULARY - FIRST)]]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\[\d+\]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=named
    )
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
            elif "norm" not in name and "lambda" not in name:
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


def _qwen_vl(
    family: type[Any],
    processor_class: type[Any],
    vision: dict[str, Any],
    text: dict[str, Any],
    patch: int = 14,
    projector: str = "mlp.2",
) -> MediaWorld:
    """A family of Qwen's, whose positions are three numbers a token."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokens = {"image_token_id": _id("<|image_pad|>"), "video_token_id": _id("<|video_pad|>")}
    tokens |= {"vision_start_token_id": _id("<|vision_start|>"), "vision_end_token_id": _id("<|vision_end|>")}
    config = family.config_class(
        text_config=TEXT | {"rope_parameters": ROPE} | text,
        vision_config={"depth": 2, "num_heads": 2} | vision,
        tie_word_embeddings=False,
        dtype="float32",
        **tokens,
    )
    side = 2 * patch  # of the square that becomes a token, in pixels
    size: dict[str, Any] = {"size": {"shortest_edge": side**2, "longest_edge": 16 * side**2}, "patch_size": patch}
    return MediaWorld(
        config=config,
        processor=processor_class(Qwen2VLImageProcessor(**size), _tokenizer(), Qwen2VLVideoProcessor(**size)),
        model=_model(family, config),
        kind="images",
        around=[_id("<|vision_start|>"), _id("<|image_pad|>"), _id("<|vision_end|>")],
        reference=png,
        tower="model.visual.",
        projector=f"model.visual.merger.{projector}.weight",
    )


def _qwen2_vl() -> MediaWorld:
    # Published checkpoints say how many channels there are by this name, which SGLang reads.
    vision = {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2, "in_chans": 3}
    return _qwen_vl(Qwen2VLForConditionalGeneration, Qwen2VLProcessor, vision, {})


def _qwen2_5_vl() -> MediaWorld:
    windows = {"window_size": 56, "fullatt_block_indexes": [1]}
    return _qwen_vl(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, VISION | windows, {})


def _qwen3_vl() -> MediaWorld:
    """Features of the tower enter the first layer of the decoder too."""
    vision = VISION | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = {"head_dim": 32, "rope_parameters": ROPE | {"mrope_interleaved": True}}
    return _qwen_vl(Qwen3VLForConditionalGeneration, Qwen3VLProcessor, vision, text, 16, "linear_fc2")


def _internvl() -> MediaWorld:
    """An image is as many tiles as its shape asks for, of four tokens each."""
    from transformers import GotOcr2ImageProcessor, InternVLVideoProcessor

    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
            layer_scale_init_value=1.0,
        ).to_dict(),
        text_config=Qwen2Config(**TEXT).to_dict(),
        image_token_id=_id("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
        dtype="float32",
    )
    size = {"size": {"height": 56, "width": 56}}
    tokenizer = _tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = GotOcr2ImageProcessor(**size, crop_to_patches=True, max_patches=4)
    return MediaWorld(
        config=config,
        processor=InternVLProcessor(images, tokenizer, InternVLVideoProcessor(**size), image_seq_length=4),
        model=_model(InternVLForConditionalGeneration, config),
        kind="images",
        around=[_id("<IMG_CONTEXT>")],
        reference=png,
        tower="model.vision_tower.",
        projector="model.multi_modal_projector.linear_2.weight",
    )


def _qwen2_audio(seconds: int = 2) -> MediaWorld:
    """Every clip is heard as so many seconds."""
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=16,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=48,
            d_model=32,
            max_source_positions=50 * seconds,
        ).to_dict(),
        text_config=Qwen2Config(**TEXT).to_dict(),
        audio_token_index=_id("<|AUDIO|>"),
        dtype="float32",
    )
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=seconds), _tokenizer())
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


_MAKERS = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "qwen2_audio": _qwen2_audio,
    "qwen2_audio_30s": functools.partial(_qwen2_audio, 30),  # as vLLM insists
}


@functools.cache
def media_world(family: str) -> MediaWorld:
    return _MAKERS[family]()
