"""What attention costs beside the linear layers, timed on a CUDA device: forward and backward of rows of equal length.

    python benchmarks/attention_cost.py > benchmarks/results/attention_cost.json

Rows of each length fill 32768 tokens, so only attention changes. `benchmarks/balance.py` compares the times with
:class:`lightrft.ops.CostModel`. Needs torch alone.
"""

import json

import torch
from torch import Tensor, nn
from torch.nn import functional

TOKENS, LENGTHS = 32768, (1024, 2048, 4096, 8192, 16384)
# Hidden size, size of the MLP, heads, key and value heads, size of a head: Qwen2.5's.
SHAPES = {"0.5B": (896, 4864, 14, 2, 64), "7B": (3584, 18944, 28, 4, 128)}


class Block(nn.Module):
    """A decoder block with causal attention and a gated MLP; rotary positions left out, which cost next to nothing."""

    def __init__(self, hidden: int, mlp: int, heads: int, pairs: int, size: int) -> None:
        super().__init__()
        self.sizes, self.size = (heads * size, pairs * size, pairs * size), size
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
        self.qkv, self.out = nn.Linear(hidden, sum(self.sizes)), nn.Linear(heads * size, hidden)
        self.up, self.down = nn.Linear(hidden, 2 * mlp), nn.Linear(mlp, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one.unflatten(-1, (-1, self.size)).transpose(1, 2)
            for one in self.qkv(self.norms[0](x)).split(self.sizes, -1)
        )
        a = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


def milliseconds(shape: tuple[int, ...], length: int) -> float:
    """Median of nine forwards and backwards of two blocks."""
    model = nn.Sequential(Block(*shape), Block(*shape)).cuda().bfloat16()
    x = torch.randn(TOKENS // length, length, shape[0], device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        model(x).sum().backward()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return round(sorted(times[3:])[4], 3)


if __name__ == "__main__":
    found = {name: {n: milliseconds(shape, n) for n in LENGTHS} for name, shape in SHAPES.items()}
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps({**device, "tokens": TOKENS, "shapes": SHAPES, "milliseconds": found}, indent=1))
