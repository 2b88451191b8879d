"""Peak memory of each phase of a run on one rank, as sums of named terms: arithmetic alone, in bytes.

What a forward and a backward hold is counted elsewhere and comes in as numbers. A phase's terms are those of its
largest moment. Nothing here asks for a device, a process group or a tensor.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightrft.strategies.placement import Placement

GIB = 2**30
# Of matrix products on Hopper, from torch's allocator (CUDAContextLight: 32 MiB).
_LIBRARY_WORKSPACE = 32 * 2**20
# A fingerprint holds an int64 for each element, of 16 Mi elements at a time.
_FINGERPRINT_BYTES, _FINGERPRINT_ELEMENTS = 8, 2**24

Terms = dict[str, int]


@dataclass(frozen=True)
class Role:
    """One model: what it is, how it lies over ranks, and what its micro-batches hold.

    Attributes:
        name: ``actor``, ``critic`` or ``reference``.
        parameters, trained: how many, and with gradients.
        block, outside: parameters of the largest block, and of all that is in none.
        weight_bytes: of a weight at rest, before the placement casts it.
        state_bytes, step_bytes: for each trained parameter, of the optimizer's state and of a step's own tensors.
        placement: how it lies over ranks.
        evaluating: terms of a forward without gradients.
        probing: those of the one that a weight sync compares the engine with.
        training: terms of a forward and backward beyond gradients that are there already; where they include
            ``gradients``, there are none before.
    """

    name: str
    parameters: int
    trained: int
    block: int
    outside: int
    weight_bytes: int
    placement: Placement = field(default_factory=Placement)
    state_bytes: float = 0.0
    step_bytes: float = 0.0
    evaluating: Terms = field(default_factory=dict)
    probing: Terms = field(default_factory=dict)
    training: Terms = field(default_factory=dict)

    @property
    def _read_bytes(self) -> int:
        return self.placement.compute_bytes or self.weight_bytes

    @property
    def _rest_bytes(self) -> int:
        return self._read_bytes if self.placement.casts_at_rest else self.weight_bytes

    def resting(self) -> tuple[Terms, Terms]:
        """What is held through all phases: on the device, and in host memory."""
        placement = self.placement
        divided_optimizer = -(-self.trained // placement.optimizer_shards)
        parts = {"weights": ("weights", -(-self.parameters // placement.weight_shards) * self._rest_bytes)}
        parts["optimizer"] = ("optimizer", round(divided_optimizer * self.state_bytes))
        if placement.casts_at_rest:
            parts["master weights"] = ("optimizer", divided_optimizer * 4)
        device: Terms = {f"{self.name} reduction buckets": placement.gradient_copies * self.trained * self._rest_bytes}
        host: Terms = {}
        for what, (part, size) in parts.items():
            (host if part in placement.on_host else device)[f"{self.name} {what}"] = size
        return device, host

    def gradients(self) -> int:
        """Bytes on the device between two micro-batches."""
        if "gradients" in self.placement.on_host:
            return 0
        return -(-self.trained // self.placement.gradient_shards) * self._rest_bytes

    def evaluation(self) -> Terms:
        """Beyond what rests."""
        return self._named(self.evaluating) | self._gathered()

    def probe(self) -> Terms:
        """As :meth:`evaluation`, after a weight sync."""
        return self._named(self.probing) | (self._gathered() if self.probing else {})

    def update(self) -> Terms:
        """Beyond what rests, at the larger of two moments: in the last micro-batch, or in the optimizer's step."""
        batch = self._named(self.training) | self._gathered()
        if "gradients" not in self.training:
            batch[f"{self.name} gradients"] = self.gradients()
        batch[f"{self.name} gradients being reduced"] = self._reducing()
        step = {f"{self.name} gradients": self.gradients(), f"{self.name} optimizer's step": self._stepping()}
        return largest_of([batch, step])

    def _named(self, terms: Terms) -> Terms:
        return {f"{self.name} {name}": size for name, size in terms.items()}

    def _gathered(self) -> Terms:
        if not self.placement.gathers:
            return {}
        limit = self.placement.gathered_parameters
        # The outermost unit, the one that computes, the next one, and the buffer through which it comes.
        whole = min(self.outside + 3 * self.block, self.parameters + self.block) if limit is None else limit
        return {f"{self.name} gathered weights": min(whole, self.parameters + self.block) * self._read_bytes}

    def _reducing(self) -> int:
        if self.placement.buffer_bytes:
            return self.placement.buffer_bytes
        if not self.placement.gathers or not self.trained:
            return 0
        # A unit's gradient as it was computed, and in float32 to be reduced.
        return min(max(self.outside, self.block), self.trained) * (self._read_bytes + 4)

    def _stepping(self) -> int:
        if "optimizer" in self.placement.on_host:
            return 0
        # ZeRO steps float32 weights, with a float32 copy of its share of the gradient.
        copied = 4 if self.placement.casts_at_rest else 0
        return round(-(-self.trained // self.placement.optimizer_shards) * (self.step_bytes + copied))


@dataclass(frozen=True)
class Decoder:
    """Sizes of a language model that sampling depends on."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Sampler:
    """The engine beside the trainer.

    Attributes:
        weights: bytes of its copy; 0 where it is not known.
        asleep: whether it sleeps between rollouts: ``None`` stays awake, 1 moves its weights to the host, 2 drops them.
        pushing: bytes while the largest weight is on its way into the engine (:func:`pushing`).
        generating: alternative sets of terms while it samples (:func:`generating`).
    """

    weights: int = 0
    asleep: Literal[1, 2] | None = None
    pushing: int = 0
    generating: Sequence[Terms] = ()


def pushing(largest: int, element_bytes: int) -> int:
    """Bytes while ``largest`` elements, ``element_bytes`` each in all copies, are pushed and fingerprinted."""
    return largest * element_bytes + min(largest, _FINGERPRINT_ELEMENTS) * _FINGERPRINT_BYTES


def generating(
    decoder: Decoder, rows: int, prompts: int, prompt_tokens: int, new_tokens: int, element_bytes: int, tempered: bool
) -> list[Terms]:
    """What ``TransformersEngine`` holds while it reads prompts, attends and draws: alternatives, one at a time.

    Args:
        decoder: sizes of the model.
        rows: responses at once.
        prompts: different prompts among them.
        prompt_tokens: of the longest; the others are padded to it.
        new_tokens: of the longest response.
        element_bytes: of the engine's dtype.
        tempered: the temperature is not 1.
    """
    tokens, width = prompt_tokens + new_tokens, decoder.head_dim * element_bytes
    one = rows * decoder.kv_heads * width * tokens
    # Keys and values are repeated for every head where padding asks for a mask.
    repeated = 2 * rows * decoder.heads * width * tokens if decoder.heads != decoder.kv_heads else 0
    cache = {"KV cache": 2 * decoder.layers * one}
    read = prompts * prompt_tokens
    reading = {
        "KV cache": 2 * decoder.layers * read * decoder.kv_heads * width,
        "reading of prompts": read * (3 * decoder.intermediate + 6 * decoder.hidden) * element_bytes
        + 2 * read * decoder.heads * width,
    }
    # The last layer's logits, in float32, log-probs, and their exponentials and running sums in float64.
    bytes_a_token = element_bytes + 4 + 4 + 8 + 8 + (4 if tempered else 0)
    return [
        reading,
        cache | {"attention while sampling": max(one, repeated)},
        cache | {"logits while sampling": rows * decoder.vocabulary * bytes_a_token},
    ]


@dataclass(frozen=True)
class Phase:
    """Terms of one phase on one rank, in bytes."""

    device: Terms
    host: Terms

    @property
    def largest(self) -> str:
        """Name of the largest term on the device."""
        return max(self.device, key=lambda name: self.device[name])


def phases(
    roles: Sequence[Role], sampler: Sampler, checkpoints: bool, refills: bool, away: Container[str] = ()
) -> dict[str, Phase]:
    """Every phase at its largest moment, under the names that ``Throughput`` logs its peaks by.

    Args:
        roles: the models.
        sampler: the engine.
        checkpoints: the run copies its state to host memory, to write it while it goes on.
        refills: prompts are sampled in the phase ``score`` too.
        away: terms of what rests that lie in host memory while the engine samples, where their room is kept.
    """
    rest, host = _joined(role.resting()[0] for role in roles), _joined(role.resting()[1] for role in roles)
    rest["library workspaces"] = _LIBRARY_WORKSPACE
    awake = {"engine weights": sampler.weights}
    if sampler.asleep == 1:
        host |= awake
    host |= {name: size for name, size in rest.items() if name in away}
    others = rest if sampler.asleep else rest | awake
    syncing = [{"weights being pushed": sampler.pushing}, *(role.probe() for role in roles)]
    staying = {name: size for name, size in rest.items() if name not in away}
    rollout = staying | awake | largest_of([*syncing, *sampler.generating])
    trained = [role for role in roles if role.trained]
    staged = sum(size for role in trained for part in role.resting() for size in part.values())
    found = {
        "rollout": Phase(rollout, host),
        "score": Phase(rollout if refills else others, host),
        "advantages": Phase(others | largest_of(role.evaluation() for role in roles), host),
    }
    found |= {f"update {role.name}": Phase(others | role.update(), host) for role in trained}
    return found | {"iteration": Phase(others, host | ({"checkpoint": staged} if checkpoints else {}))}


def largest_of(alternatives: Iterable[Terms]) -> Terms:
    """The set of terms with the largest sum."""
    return max(alternatives, key=lambda terms: sum(terms.values()))


def _joined(parts: Iterable[Terms]) -> Terms:
    return {name: size for part in parts for name, size in part.items()}
