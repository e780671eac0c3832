"""The linear layer whose bytes are shared out, whole in one process; what several do with it is in `training/test_sharded.py`."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: E402

from qlora_helpers.base.errors import ConfigError  # noqa: E402
from qlora_helpers.model.sharded_linear import ShardedLinear4bit  # noqa: E402
from qlora_helpers.model.sharding import PartKeeper  # noqa: E402
from qlora_helpers.model.shares import Sharing, sharing  # noqa: E402


class Mesh:
    """One of several processes that share a weight."""

    def __init__(self, rank: int, processes: int) -> None:
        self.rank, self.processes = rank, processes

    def size(self) -> int:
        return self.processes

    def get_local_rank(self) -> int:
        return self.rank


def linear(double: bool, bias: bool = True) -> Linear4bit:
    torch.manual_seed(0)
    made = Linear4bit(
        96, 64, bias=bias, compute_dtype=torch.float32, compress_statistics=double, quant_type="nf4", device="cpu"
    )
    made.weight = Params4bit(
        torch.randn(64, 96), requires_grad=False, quant_type="nf4", compress_statistics=double, module=made
    ).to("cpu")
    made.support_avx512bf16_for_cpu = False
    return made.requires_grad_(False)


def gathered(one: Linear4bit, processes: int) -> ShardedLinear4bit:
    """The layer as it is while it computes: the parts of all processes side by side."""
    parts = [PartKeeper(Mesh(rank, processes)).part_of(one.weight) for rank in range(processes)]
    sharded = ShardedLinear4bit(one, parts[0])
    sharded.row = torch.nn.Parameter(torch.cat([part.data for part in parts]), requires_grad=False)
    return sharded


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("double", [True, False], ids=["double quantisation", "single"])
def test_the_parts_together_compute_what_the_whole_layer_does(double, processes):
    whole = linear(double)
    sharded, x = gathered(whole, processes), torch.randn(2, 5, 96, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    expected, found = whole(x), sharded(same)
    assert found.equal(expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    assert same.grad.equal(x.grad)


def test_a_compiled_layer_reads_the_same_bytes_without_a_break_in_its_graph():
    sharded, x = gathered(linear(True), 2), torch.randn(5, 96, requires_grad=True)
    compiled = torch.compile(sharded.forward, backend="aot_eager", fullgraph=True)
    same = x.detach().clone().requires_grad_()
    assert compiled(same).equal(sharded(x))
    compiled(same).sum().backward()
    sharded(x).sum().backward()
    assert same.grad.equal(x.grad)


@pytest.mark.parametrize(
    ("share", "processes", "here", "found"),
    [
        ("auto", 1, 1, Sharing()),
        ("one", 1, 1, Sharing(one_gpu=True)),
        ("shards", 1, 1, Sharing()),
        ("auto", 4, 4, Sharing(4, 1)),
        ("copies", 4, 2, Sharing(4, 1)),
        ("shards", 4, 2, Sharing(1, 4)),
        ("copies of shards", 4, 2, Sharing(2, 2)),
        ("copies of shards", 4, 4, Sharing(1, 4)),
        ("one", 2, 2, "takes one process"),
        ("spread", 2, 2, "takes one process"),
        ("copies of shards", 3, 2, "as many processes each"),
    ],
)
def test_the_setting_and_the_processes_say_who_holds_what(share, processes, here, found, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    if isinstance(found, str):
        with pytest.raises(ConfigError, match=found):
            sharing(share)
    else:
        assert sharing(share) == found and found.processes == processes
