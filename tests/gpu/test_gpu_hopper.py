"""The two-bit product on a Hopper GPU: every tile equals the reference to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparse_bitnet.kernels.matmul import hopper, reference, tiles
from sparse_bitnet.kernels.matmul.hopper_plan import TILES, Plan
from sparse_bitnet.kernels.registry import BACKENDS, integer_linear, prepare

pytestmark = pytest.mark.gpu

SHAPES = [(640, 1024), (333, 400), (130, 80), (64, 2048)]


@pytest.fixture(autouse=True)
def on_hopper():
    if not torch.cuda.is_available() or not BACKENDS["hopper"].serves(torch.device("cuda", 0)):
        pytest.skip("needs a Hopper GPU with NVRTC")
    torch.manual_seed(0)
    # PyTorch then fills memory that it hands out with NaN (or the largest integer).
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(tokens, out, columns, sparse=False):
    ternary = torch.randint(-1, 2, (out, columns), dtype=torch.int8, device="cuda")
    if sparse:
        fours = ternary.view(out, -1, 4)
        fours.scatter_(-1, torch.rand(fours.shape, device="cuda").argsort(-1)[..., :2], 0)
    x = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8, device="cuda")
    return ternary, x, torch.rand(tokens, device="cuda") + 0.01, torch.rand(out, device="cuda")


def expected(x, x_scale, ternary, w_scale, bias, dtype, residual):
    y = reference.ternary_matmul(x, x_scale[:, None], ternary, w_scale, bias, dtype)
    return y if residual is None else residual + y


def plans():
    for tile in TILES:
        for how in (1, 2, 8) if tile.kind == "few" else (0, 1, 99):
            yield Plan(tile, how) if tile.kind == "few" else Plan(tile, cut_waves=how)


def name(plan):
    tile = plan.tile
    return f"{tile.kind}-{tile.rows}x{tile.tokens}-{plan.splits}-{plan.cut_waves}"


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("plan", list(plans()), ids=name)
def test_every_plan_is_exact(plan, sparse):
    for out, columns in SHAPES:
        if -(-columns // tiles.COLUMNS) < plan.splits * plan.tile.blocks:
            continue
        for tokens in (1, plan.tile.tokens - 1, plan.tile.tokens, 3 * plan.tile.tokens + 5):
            ternary, x, x_scale, w_scale = operands(tokens, out, columns, sparse)
            packed = tiles.pack(ternary, sparse)
            bias = torch.randn(out, device="cuda").bfloat16()
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for residual in (None, torch.randn(tokens, out, device="cuda").to(dtype)):
                    y = hopper.matmul(
                        x, x_scale, packed, w_scale, bias, dtype, residual, sparse, plan
                    )
                    want = expected(x, x_scale, ternary, w_scale, bias, dtype, residual)
                    assert torch.equal(y, want), (out, columns, tokens, dtype)
            sums = hopper.matmul(
                x, x_scale, packed, w_scale, None, torch.int32, sparse=sparse, how=plan
            )
            assert torch.equal(sums, reference.integer_matmul(x, ternary))


@pytest.mark.parametrize("tokens", [1, 5, 17, 64, 100, 256, 1000, 5000])
@pytest.mark.parametrize("shape", [(4608, 3584), (3584, 18944)])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_chosen_plan_is_exact(shape, tokens, sparse):
    ternary, x, x_scale, w_scale = operands(tokens, *shape, sparse)
    weight = prepare(ternary, w_scale)
    assert weight.layout == ("sparse tiles" if sparse else "tiles")
    assert torch.equal(weight.unpack(), ternary)
    y = integer_linear(x, x_scale[:, None], weight, None, torch.bfloat16)
    assert torch.equal(y, expected(x, x_scale, ternary, w_scale, None, torch.bfloat16, None))


@pytest.mark.parametrize("tile", [t for t in TILES if t.tokens >= 128], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_product_repeats(tile, sparse):
    """A register written too early spoils one product in hundreds, and only beside other work."""
    torch.use_deterministic_algorithms(False)
    plan = Plan(tile, 8) if tile.kind == "few" else Plan(tile)
    ternary, x, x_scale, w_scale = operands(389, 640, 2048, sparse)
    packed = tiles.pack(ternary, sparse)
    want = expected(x, x_scale, ternary, w_scale, None, torch.float32, None)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(100):
        results = []
        for stream in streams:
            with torch.cuda.stream(stream):
                results += [
                    hopper.matmul(
                        x, x_scale, packed, w_scale, None, torch.float32, sparse=sparse, how=plan
                    )
                    for _ in range(4)
                ]
        torch.cuda.synchronize()
        assert all(torch.equal(y, want) for y in results)


def test_rows_of_a_wider_tensor():
    ternary, x, x_scale, w_scale = operands(40, 200, 256)
    wide = F.pad(x, (16, 48))
    for view in (wide[:, 16:272], x.t().contiguous().t()):
        y = hopper.matmul(view, x_scale, tiles.pack(ternary), w_scale, None, torch.float32)
        assert torch.equal(y, expected(x, x_scale, ternary, w_scale, None, torch.float32, None))


def test_no_tokens_and_no_rows():
    ternary, x, x_scale, w_scale = operands(4, 64, 128)
    packed = tiles.pack(ternary)
    assert hopper.matmul(x[:0], x_scale[:0], packed, w_scale, None, torch.float32).shape == (0, 64)


def test_two_graphs_at_once_share_nothing():
    """Partial sums and flags of tiles that are cut belong to one launch."""
    torch.use_deterministic_algorithms(False)
    plan = Plan(next(t for t in TILES if t.kind == "many"), cut_waves=99)
    ternary, x, x_scale, w_scale = operands(500, 3000, 2048)
    packed = tiles.pack(ternary)
    want = expected(x, x_scale, ternary, w_scale, None, torch.float32, None)
    graphs, results, streams = [], [], [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in streams:
        hopper.matmul(x, x_scale, packed, w_scale, None, torch.float32, how=plan)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = hopper.matmul(x, x_scale, packed, w_scale, None, torch.float32, how=plan)
        graphs.append(graph)
        results.append(y)
    for _ in range(20):
        for y in results:
            y.zero_()
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(y, want) for y in results)
