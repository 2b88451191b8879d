"""TransformersEngine: the contract of every engine, and what is its own."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    Qwen2_5_VLConfig,
    T5Config,
)

from lightrft.engines import EngineError, TransformersEngine
from lightrft.ops.fingerprint import fingerprint
from lightrft.samples import Media, Prompt, Sampling

from .contract import EngineContract, ids_of, prompt, reference_log_probs, world

CPU = torch.device("cpu")


class TestTransformersEngine(EngineContract):
    make = staticmethod(TransformersEngine)


class TestTransformersEngineInSmallBatches(EngineContract):
    """Groups are cut over batches, so that a prompt is read in several."""

    make = staticmethod(lambda: TransformersEngine(dtype="float32", sequences_per_batch=3))

    # What only concerns weights holds without regard to batches.
    test_tokens_are_drawn_as_often_as_the_distribution_says = None
    test_very_hot_first_tokens_are_uniform_over_the_likeliest_and_the_later_ones_as_ever = None


@pytest.mark.gpu
class TestTransformersEngineOnCuda(EngineContract):
    make = staticmethod(TransformersEngine)
    device = torch.device("cuda:0")
    tolerance = 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_the_devices_memory_back(level):
    before = torch.cuda.memory_allocated()
    engine = TransformersEngine()
    engine.start(world().config, world().tokenizer, torch.device("cuda:0"))
    awake = torch.cuda.memory_allocated()
    engine.update_weights(world().weights(), 0)
    engine.sleep(level)
    assert torch.cuda.memory_allocated() - before < (awake - before) / 10
    engine.wake(("weights",))
    assert torch.cuda.memory_allocated() >= awake
    engine.close()
    assert torch.cuda.memory_allocated() <= before


def started(config=None, tokenizer=None, weights=None, **options) -> TransformersEngine:
    engine = TransformersEngine(**options)
    engine.start(config or world().config, tokenizer or world().tokenizer, CPU)
    engine.update_weights(weights or world().weights(), 0)
    return engine


def small(config_class, **options):
    return config_class(vocab_size=64, eos_token_id=1, bos_token_id=2, pad_token_id=0, **options)


ARCHITECTURES = {
    "gpt2": lambda: small(GPT2Config, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "sliding windows": lambda: small(
        Gemma2Config,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=6,
    ),
    "recurrent states": lambda: small(
        Lfm2Config,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
    ),
    "vision and text": lambda: Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prompts_read_once_for_their_samples_give_the_forwards_log_probs(name):
    config = ARCHITECTURES[name]()
    auto = AutoModelForMultimodalLM if name == "vision and text" else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = auto.from_config(copy.deepcopy(config)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    engine = started(config, weights=list(model.state_dict().items()))
    prompts = [prompt(length) for length in (1, 12, 5)]
    sampling = Sampling(max_new_tokens=6, temperature=1.2)
    groups = engine.generate(prompts, sampling, [[1, 2, 3], [4, 5], [6]])
    for asked, group in zip(prompts, groups):
        for response in group:
            expected = reference_log_probs(model, asked, response, sampling)
            assert torch.allclose(response.log_probs, expected, atol=1e-4)
    again = engine.generate(prompts[1:], sampling, [[4, 5], [6]])
    assert ids_of(again) == ids_of(groups)[1:]
    alone = [[engine.generate([p], sampling, [[r.seed]])[0][0] for r in g] for p, g in zip(prompts, groups)]
    assert ids_of(alone) == ids_of(groups)
    score = engine.score([prompts[1].token_ids])[0]
    with torch.no_grad():
        logits = model(prompts[1].token_ids[None]).logits[0, :-1].log_softmax(-1)
    assert torch.allclose(score, logits.gather(1, prompts[1].token_ids[1:, None])[:, 0], atol=1e-4)


def test_a_prompt_is_read_once_for_all_its_samples():
    engine = started()
    read = []
    engine._model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    engine.generate([prompt(20)], Sampling(max_new_tokens=2), [range(8)])
    assert read[0] == (1, 19)
    assert all(shape == (8, 1) for shape in read[1:])


def test_starting_leaves_the_config_and_the_random_state_alone():
    config = copy.deepcopy(world().config)
    before, state = copy.deepcopy(config.to_dict()), torch.get_rng_state()
    engine = TransformersEngine(dtype="bfloat16")
    engine.start(config, world().tokenizer, CPU)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_engines_dtype_is_the_one_asked_for_or_the_configs():
    assert TransformersEngine().dtype is None
    assert TransformersEngine("float16").dtype == torch.float16
    config = copy.deepcopy(world().config)
    config.dtype = torch.bfloat16
    engine = started(config)
    assert engine.dtype == torch.bfloat16
    name = "model.layers.0.mlp.up_proj.weight"
    assert engine.fingerprint([name])[name] == fingerprint(dict(world().weights())[name].bfloat16())


def test_rotary_frequencies_stay_float32_under_bfloat16():
    engine = started(dtype="bfloat16")
    buffers = dict(engine._model.named_buffers())
    assert torch.equal(buffers["model.rotary_emb.inv_freq"], world().model.model.rotary_emb.inv_freq)
    assert buffers["model.rotary_emb.inv_freq"].dtype == torch.float32
    log_probs = engine.generate([prompt(5)], Sampling(max_new_tokens=4), [[1]])[0][0].log_probs
    assert log_probs.dtype == torch.float32


@pytest.mark.parametrize("left_out", ["lm_head.weight", "model.embed_tokens.weight", None])
def test_tied_weights_count_once_under_either_name(left_out):
    model = world(tied=True).model
    weights = [(name, tensor.clone()) for name, tensor in model.state_dict().items() if name != left_out]
    engine = started(world(tied=True).config, weights=weights)
    response = engine.generate([prompt(5)], Sampling(max_new_tokens=4), [[1]])[0][0]
    assert torch.allclose(response.log_probs, reference_log_probs(model, prompt(5), response, Sampling()), atol=1e-5)
    engine.sleep(2)
    engine.wake()
    engine.update_weights(weights, 1)
    both = engine.fingerprint(["lm_head.weight", "model.embed_tokens.weight"])
    assert both["lm_head.weight"] == both["model.embed_tokens.weight"] == fingerprint(model.lm_head.weight)


def test_sleeping_at_level_2_frees_the_storage():
    engine = started()
    weights = list(engine._model.parameters())
    assert sum(weight.untyped_storage().nbytes() for weight in weights) > 0
    engine.sleep(2)
    assert sum(weight.untyped_storage().nbytes() for weight in weights) == 0


def test_the_engines_weights_are_its_own():
    weights = world().weights()
    engine = started(weights=weights)
    before = engine.fingerprint(["lm_head.weight"])
    dict(weights)["lm_head.weight"].zero_()
    assert engine.fingerprint(["lm_head.weight"]) == before


def test_settings_recommended_by_the_model_do_not_change_the_distribution():
    config = copy.deepcopy(world().config)
    config.repetition_penalty, config.top_k, config.num_beams = 5.0, 1, 3
    plain = started().generate([prompt(5)], Sampling(max_new_tokens=10), [[1, 2]])
    assert ids_of(started(config).generate([prompt(5)], Sampling(max_new_tokens=10), [[1, 2]])) == ids_of(plain)


def test_autocast_around_it_does_not_change_the_engine():
    engine = started()
    plain = engine.generate([prompt(5)], Sampling(max_new_tokens=6), [[1]])[0][0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = engine.generate([prompt(5)], Sampling(max_new_tokens=6), [[1]])[0][0]
    assert torch.equal(plain.log_probs, inside.log_probs)


def test_log_probs_may_take_part_in_a_training_graph():
    response = started().generate([prompt(5)], Sampling(max_new_tokens=4), [[1]])[0][0]
    assert not response.log_probs.requires_grad
    weight = torch.ones(4, requires_grad=True)
    (weight * response.log_probs).sum().backward()
    assert torch.equal(weight.grad, response.log_probs)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_logits_that_are_not_finite_are_an_error_that_names_the_prompt_and_the_version(temperature):
    engine = started()
    engine.update_weights([("model.norm.weight", torch.full((128,), torch.nan))], 41)
    with pytest.raises(EngineError, match=r"(?s)'p5-3'.*not finite.*41"):
        engine.generate([prompt(5)], Sampling(max_new_tokens=3, temperature=temperature), [[1, 2]])


def test_a_stop_string_that_is_a_special_token_stops_by_its_id():
    tool = world().tokenizer.convert_tokens_to_ids("<tool>")
    weights = dict(world().weights())
    weights["lm_head.weight"][tool] *= 3
    engine = started(weights=list(weights.items()))
    by_id, by_text = (
        engine.generate([prompt(4)], Sampling(max_new_tokens=20, **options), [range(20)])
        for options in ({"stop_token_ids": (tool,)}, {"stop": ("<tool>",)})
    )
    assert ids_of(by_id) == ids_of(by_text)
    assert any(response.token_ids[-1] == tool for response in by_id[0])


def test_ids_beyond_the_tokenizer_stay_in_the_distribution_and_decode_to_nothing():
    weights = dict(world().weights())
    weights["lm_head.weight"][len(world().tokenizer) :] *= 3
    engine = started(weights=list(weights.items()))
    group = engine.generate([prompt(4)], Sampling(max_new_tokens=10, stop=("zzz",)), [range(10)])[0]
    assert any(int(response.token_ids.max()) >= len(world().tokenizer) for response in group)
    for response in group:
        known = [i for i in response.token_ids.tolist() if i < len(world().tokenizer)]
        assert response.text == world().tokenizer.decode(known, skip_special_tokens=True)


def test_every_end_of_sequence_of_the_config_stops():
    config = copy.deepcopy(world().config)
    config.eos_token_id = [5, 6, 9, 12, 15]
    group = started(config).generate([prompt(4)], Sampling(max_new_tokens=20), [range(20)])[0]
    ends = {int(response.token_ids[-1]) for response in group if response.finish_reason == "stop"}
    assert len(ends & {5, 6, 9, 12, 15}) >= 2


def test_a_tokenizer_without_padding_or_end_serves():
    tokenizer = copy.deepcopy(world().tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    config = copy.deepcopy(world().config)
    config.eos_token_id = config.pad_token_id = None
    engine = started(config, tokenizer)
    groups = engine.generate([prompt(3), prompt(8)], Sampling(max_new_tokens=12, stop=("a", "e")), [range(9), [1]])
    assert {response.finish_reason for response in groups[0]} == {"stop", "length"}


def test_media_is_refused_rather_than_ignored():
    with_image = dataclasses.replace(prompt(4, "pictured"), media=Media(images=("cat.png",)))
    with pytest.raises(ValueError, match="pictured"):
        started().generate([with_image], Sampling(max_new_tokens=2), [[1]])


@pytest.mark.parametrize("bad", [-1, 64, 10**12])
def test_ids_outside_the_vocabulary_are_refused_by_name(bad):
    engine = started()
    with pytest.raises(ValueError, match="'foreign'"):
        engine.generate([Prompt("foreign", torch.tensor([3, bad]), "")], Sampling(max_new_tokens=2), [[1]])
    with pytest.raises(ValueError, match="sequence 1"):
        engine.score([torch.tensor([3]), torch.tensor([3, bad])])


def test_scores_do_not_depend_on_how_sequences_are_batched(monkeypatch):
    engine = started()
    sequences = [prompt(length).token_ids for length in (40, 3, 17, 17, 2)]
    together = engine.score(sequences)
    monkeypatch.setattr("lightrft.engines.transformers.engine._SCORED_LOGITS", 64 * 20)
    passes = []
    engine._model.register_forward_pre_hook(lambda _, args, given: passes.append(given["input_ids"]), with_kwargs=True)
    for one, other in zip(together, engine.score(sequences)):
        assert torch.allclose(one, other, atol=1e-5)
    assert len(passes) > 1
    assert all(ids.shape[0] == 1 or ids.numel() <= 20 for ids in passes)


def test_a_config_no_text_model_exists_for_is_an_engine_error():
    with pytest.raises(EngineError, match="T5Config"):
        TransformersEngine().start(T5Config(vocab_size=64), world().tokenizer, CPU)


def test_an_engine_starts_once():
    engine = started()
    with pytest.raises(EngineError, match="started"):
        engine.start(world().config, world().tokenizer, CPU)
    with pytest.raises(EngineError, match=r"start\(\)"):
        TransformersEngine().generate([prompt(3)], Sampling(), [[1]])


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"sequences_per_batch": 0}, {"tensor_parallel_size": 0}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TransformersEngine(**options)
