"""RemoteEngine holds the contract of engines with a vLLM server that the docs' command started, on CPU and GPUs."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import yaml

from lightrft.engines import EngineError, RemoteEngine
from lightrft.engines.server.receiver import SIZES
from lightrft.engines.server.requests import VLLMServer
from lightrft.engines.vllm.requests import Answer
from lightrft.ops.fingerprint import fingerprint
from lightrft.samples import FIRE, Sampling

from .contract import EngineContract, ids_of, prompt, world
from .served import ON_CPU, Server, section, served

CPU = torch.device("cpu")
SAMPLING = Sampling(max_new_tokens=6)


def started(url: str, **options: Any) -> RemoteEngine:
    engine = RemoteEngine(url, **options)
    engine.start(world().config, world().tokenizer, CPU)
    return engine


class Served(EngineContract):
    """The contract with a server that lives as long as the class's tests."""

    one_stream = False
    options: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    server: Server

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def serving(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        pytest.importorskip("vllm")
        with served(world(), tmp_path_factory.mktemp("served"), *cls.options, **dict(cls.variables)) as cls.server:
            yield

    @classmethod
    def make(cls) -> RemoteEngine:  # type: ignore[override]
        return RemoteEngine(cls.server.url, timeout_seconds=60)


def on_one_of_two(url: str) -> dict[str, Any]:
    """Each rank samples a prompt of its own, more often than the other, and pushes what all have."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    engine = started(url, timeout_seconds=60)
    engine.update_weights(world().weights(), 0)
    groups = [engine.generate([prompt(4 + rank)], SAMPLING, [[1, 2]]) for _ in range(1 + rank)]
    engine.sleep(1)
    engine.wake()
    with pytest.raises(EngineError, match="nonsense"):
        engine.update_weights([("nonsense", torch.zeros(1))], 1)
    engine.update_weights([(name, tensor * 1.5) for name, tensor in world().weights()], 2)
    prints = engine.fingerprint(["lm_head.weight"])
    with pytest.raises(EngineError, match=r"holds no weight|no weight named"):
        engine.fingerprint(["nonsense"])
    engine.close()
    return {"tokens": ids_of(groups[-1]), "prints": prints, "version": engine.weight_version}


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM is built for the GPU")
class TestRemoteEngine(Served):
    tolerance = 3e-5
    options = (*ON_CPU, "--block-size", "32")  # so that prompts here fill blocks of the prefix cache

    def test_part_of_what_a_layer_holds_as_one_is_refused_and_named(self, engine):
        name = "model.layers.1.self_attn.q_proj.weight"
        with pytest.raises(EngineError, match=r"q_proj.*without.*k_proj"):
            engine.update_weights([(name, dict(world().weights())[name] * 2)], 1)
        assert engine.weight_version == -1
        engine.update_weights(world().weights(), 2)
        assert engine.fingerprint([name]) == {name: fingerprint(dict(world().weights())[name])}

    def test_what_is_too_hot_for_the_server_or_too_many_for_it_is_said_with_the_limit(self, engine):
        with pytest.raises(EngineError, match=r"temperature is 2\.5.*2 at most"):
            engine.generate([prompt(3)], Sampling(max_new_tokens=1, temperature=2.5), [[1]])
        with pytest.raises(EngineError, match=r"20 tokens at most.*--max-logprobs 30"):
            engine.generate([prompt(3)], Sampling(max_new_tokens=2, fire=FIRE(top_k=30)), [[1]])

    def test_one_failure_drops_the_other_requests_and_the_next_call_is_as_ever(self, engine, monkeypatch):
        before = engine.generate([prompt(4)], SAMPLING, [[1, 2]])
        with monkeypatch.context() as context, pytest.raises(KeyError, match="one of them"):
            context.setattr(Answer, "take", _fail)
            engine.generate([prompt(4)], Sampling(max_new_tokens=100), [range(60)])
        assert ids_of(engine.generate([prompt(4)], SAMPLING, [[1, 2]])) == ids_of(before)

    def test_a_run_that_takes_the_server_over_has_to_push_and_the_one_before_is_told(self, engine):
        before = engine.generate([prompt(4)], SAMPLING, [[1]])
        VLLMServer(self.server.url, None, 60).ask("/start_weight_update", {"is_checkpoint_format": False})
        other = started(self.server.url)  # the first one never took its leave, nor finished what it began
        with pytest.raises(EngineError, match="push"):
            other.generate([prompt(4)], SAMPLING, [[1]])
        other.update_weights(world().weights(), 0)
        assert ids_of(other.generate([prompt(4)], SAMPLING, [[1]])) == ids_of(before)
        with pytest.raises(EngineError, match="another run"):
            engine.update_weights(world().weights(), 1)
        other.close()
        engine.update_weights(world().weights(), 2)
        assert ids_of(engine.generate([prompt(4)], SAMPLING, [[1]])) == ids_of(before)

    def test_ranks_share_the_server_with_prompts_of_their_own(self, engine, started):
        expected = [engine.generate([prompt(4 + rank)], SAMPLING, [[1, 2]]) for rank in range(2)]
        found = ranks.on_ranks(2, on_one_of_two, self.server.url)
        assert [rank["tokens"] for rank in found] == [ids_of(groups) for groups in expected]
        pushed = fingerprint(dict(world().weights())["lm_head.weight"] * 1.5)
        assert [rank["prints"] for rank in found] == [{"lm_head.weight": pushed}] * 2
        started(bare=True)  # the ranks have taken the server over

    @pytest.mark.parametrize(
        ("changed", "says"),
        [
            ({"vocab_size": 96}, "its vocab_size is 64, the actor's 96"),
            ({"intermediate_size": 96}, "its intermediate_size is 192, the actor's 96"),
        ],
    )
    def test_a_server_of_another_model_is_refused_with_what_differs(self, changed, says):
        config = type(world().config)(**{**world().config.to_dict(), **changed})
        with pytest.raises(EngineError, match=f"another model: {says}"):
            RemoteEngine(self.server.url).start(config, world().tokenizer, CPU)

    def test_a_path_that_the_server_does_not_know_is_refused_with_how_to_start_it(self):
        with pytest.raises(EngineError, match=r"cannot take weights.*404.*VLLM_SERVER_DEV_MODE=1 vllm serve"):
            started(f"{self.server.url}/elsewhere")

    def test_a_server_that_dies_while_it_samples_ends_the_call_by_its_url(self, engine, monkeypatch):
        sampling, failures = threading.Event(), list[BaseException]()
        take = Answer.take

        def seen(*arguments: Any) -> bool:
            sampling.set()
            return take(*arguments)

        def generate() -> None:
            try:
                engine.generate([prompt(4)], Sampling(max_new_tokens=100), [range(200)])
            except EngineError as error:
                failures.append(error)

        monkeypatch.setattr(Answer, "take", seen)
        thread = threading.Thread(target=generate)
        thread.start()
        assert sampling.wait(60)
        self.server.kill()
        thread.join(60)
        assert self.server.url in str(failures[0])
        with pytest.raises(EngineError, match=self.server.url):
            engine.update_weights(world().weights(), 1)
        assert engine.weight_version == -1


@pytest.mark.gpu
class TestRemoteEngineOnTheSameGPU(Served):
    """Weights go through host memory."""

    tolerance = 5e-3  # vLLM's attention kernel rounds to 19 bits
    device = torch.device("cuda", 0)
    options = ("--gpu-memory-utilization", "0.3", "--enable-sleep-mode")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
class TestRemoteEngineOnAnotherGPU(Served):
    """Weights go by NCCL."""

    tolerance = 5e-3  # vLLM's attention kernel rounds to 19 bits
    device = torch.device("cuda", 0)
    options = ("--gpu-memory-utilization", "0.3", "--enable-sleep-mode")
    variables = (("CUDA_VISIBLE_DEVICES", "1"),)


def _fail(*arguments: Any) -> bool:
    raise KeyError("one of them")


# Servers that are not as they should be


class Answers(BaseHTTPRequestHandler):
    """Says what a server would that was started otherwise."""

    said: dict[str, tuple[int, Any]]
    ended: threading.Event

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path not in self.said:
            self.ended.wait()
            return
        status, body = self.said[self.path]
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream" if body is None else "application/json")
        self.end_headers()
        if body is None:
            self.wfile.write(b'data: {"choices": []}\n\n')
            self.ended.wait()
        else:
            self.wfile.write(json.dumps(body).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def answering(said: dict[str, tuple[int, Any]]) -> Iterator[str]:
    """URL of a server that says this, and nothing where it has nothing to say."""
    handler = type("Handler", (Answers,), {"said": said, "ended": threading.Event()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            handler.ended.set()  # type: ignore[attr-defined]
            server.shutdown()
            thread.join()


def described(**changed: Any) -> tuple[int, Any]:
    text = world().config
    served = {
        "architectures": ["Qwen2ForCausalLM"],
        "sizes": {name: getattr(text, name) for name in SIZES},
        "logprobs_mode": "processed_logprobs",
        "transfer": "lightrft",
        "workers": 1,
    }
    return 200, {"results": [{"answer": served | changed}]}


EMPTY = 400, {"error": {"message": "Field required"}}


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"/collective_rpc": (404, {"detail": "Not Found"})}, r"cannot take weights.*Not Found.*vllm serve"),
        (
            {"/collective_rpc": (500, {"error": {"message": "no attribute 'lightrft'"}})},
            r"cannot take weights.*no attribute 'lightrft'.*--worker-extension-cls",
        ),
        (
            {"/collective_rpc": described(transfer="nccl")},
            r"does not take weights.*backend is nccl\).*--weight-transfer-config.backend lightrft",
        ),
        (
            {
                "/collective_rpc": described(),
                "/inference/v1/generate": EMPTY,
                "/wake_up": (200, {}),
                "/finish_weight_update": (404, {"detail": "Not Found"}),
            },
            r"cannot take weights.*/finish_weight_update.*Not Found.*vllm serve",
        ),
        (
            {"/collective_rpc": described(), "/inference/v1/generate": (403, {"error": {"message": "disabled"}})},
            r"does not take prompts as token ids.*disabled.*--tokens-only",
        ),
        (
            {"/collective_rpc": described(logprobs_mode="raw_logprobs"), "/inference/v1/generate": EMPTY},
            r"log-probs of another distribution.*raw_logprobs.*--logprobs-mode processed_logprobs",
        ),
        (
            {"/collective_rpc": described(workers=4), "/inference/v1/generate": EMPTY},
            r"4 workers.*--tensor-parallel-size 1",
        ),
        (
            {"/collective_rpc": described(architectures=["LlamaForCausalLM"]), "/inference/v1/generate": EMPTY},
            r"architectures is \['LlamaForCausalLM'\]",
        ),
    ],
    ids=[
        "no development mode",
        "no extension",
        "backend",
        "no endpoints",
        "no token ids",
        "raw log-probs",
        "several workers",
        "architecture",
    ],
)
def test_a_server_started_otherwise_is_refused_with_what_it_lacks(said, says):
    with answering(said) as url, pytest.raises(EngineError, match=f"(?s){says}"):
        started(url, timeout_seconds=20)


def test_no_server_and_a_silent_one_are_named():
    free = f"http://127.0.0.1:{ranks.free_port()}"
    with pytest.raises(EngineError, match=f"{free} does not answer.*is it running"):
        started(free)
    with answering({}) as url, pytest.raises(EngineError, match=rf"{url} said nothing for 0\.3 seconds"):
        started(url, timeout_seconds=0.3)


def test_a_server_that_falls_silent_while_it_samples_is_named():
    with answering({"/inference/v1/generate": (200, None)}) as url:
        heard = threading.Event()

        def take(event: dict[str, Any]) -> bool:
            heard.set()
            return False

        with pytest.raises(EngineError, match=rf"{url} said nothing for 0\.5 seconds while it was to sample"):
            VLLMServer(url, None, 0.5).generate([{}] * 3, [take] * 3)
        assert heard.is_set()


def test_the_api_key_comes_from_the_variable_that_is_named(monkeypatch):
    engine = RemoteEngine("http://127.0.0.1:1", api_key_variable="MY_KEY")
    with pytest.raises(EngineError, match="MY_KEY is not set"):
        engine.start(world().config, world().tokenizer, CPU)
    monkeypatch.setenv("MY_KEY", "secret")
    seen: list[str] = []

    class Asked(Answers):
        def do_POST(self) -> None:
            seen.append(self.headers["Authorization"])
            super().do_POST()

    said = {"/collective_rpc": (401, {"error": "Unauthorized"})}
    handler = type("Handler", (Asked,), {"said": said, "ended": threading.Event()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.handle_request).start()
        with pytest.raises(EngineError, match="401: Unauthorized") as caught:
            started(f"http://127.0.0.1:{server.server_address[1]}", api_key_variable="MY_KEY")
    assert seen == ["Bearer secret"] and "secret" not in str(caught.value)


def test_something_else_that_listens_there_is_said():
    with answering({"/collective_rpc": (200, ["hello"])}) as url, pytest.raises(EngineError, match="not as vLLM does"):
        started(url)


def test_the_docs_configuration_is_one():
    (block,) = re.findall(r"```yaml\n(.*?)```", section(), flags=re.DOTALL)
    engine = yaml.safe_load(block)["trainer"]["callbacks"][0]["init_args"]["engine"]
    assert engine["class_path"] == "lightrft.engines.RemoteEngine"
    assert RemoteEngine(**engine["init_args"]).in_own_process


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:1/?key=1"])
def test_other_urls_are_refused(url):
    with pytest.raises(ValueError, match="url is"):
        RemoteEngine(url)


def test_a_password_in_the_url_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="api_key_variable") as caught:
        RemoteEngine("http://me:secret@host:8000")
    assert "secret" not in str(caught.value)
