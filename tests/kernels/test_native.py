import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet import console
from sparse_bitnet.core import BackendError, ConfigError, Pattern, WeightError, quantize_int8
from sparse_bitnet.core.mask import nm_mask
from sparse_bitnet.formats import two_bit
from sparse_bitnet.kernels import native, ternary_matmul
from sparse_bitnet.kernels.matmul import cpu, reference
from sparse_bitnet.kernels.native import pages
from sparse_bitnet.kernels.registry import backend_of, prepare, ternary_linear

PATHS = native.available()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_library = pytest.mark.skipif(not PATHS, reason="the CPU kernel was not compiled")


def two_bit_panels(ternary):
    return cpu.pack_two_bit(two_bit.pack(ternary))


def layouts(ternary, path):
    packed = two_bit_panels(ternary)
    yield packed, "two-bit"
    yield ternary, "bytes"
    with native.forced(path):
        six_bit = cpu.pack_six_bit(packed) if native.reads_six_bit() else None
    if six_bit is not None:
        yield six_bit, "six-bit"


def random_ternary(out, columns, sparse):
    ternary = torch.randint(-1, 2, (out, columns), dtype=torch.int8)
    if sparse:
        padded = torch.rand(out, -(-columns // 4) * 4)
        ternary *= nm_mask(padded, Pattern(2, 4))[:, :columns]
    return ternary


def expected_of(x, ternary, scale, bias, dtype):
    x_q, x_scale = quantize_int8(x)
    return reference.ternary_matmul(x_q, x_scale, ternary, scale, bias, dtype)


@needs_library
@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=40)
@given(
    tokens=st.one_of(st.integers(1, 20), st.sampled_from([33, 70])),
    columns=st.one_of(st.integers(1, 300), st.sampled_from([512, 1536, 2052])),
    out=st.one_of(st.integers(1, 40), st.sampled_from([129, 300])),
    sparse=st.booleans(),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_equals_the_reference(path, tokens, columns, out, sparse, dtypes, bias, seed):
    torch.manual_seed(seed)
    ternary, scale = random_ternary(out, columns, sparse), torch.rand(out)
    x = torch.randn(tokens, columns).to(dtypes[0])
    added = torch.randn(out).to(dtypes[1]) if bias else None
    expected = expected_of(x, ternary, scale, added, dtypes[2])
    x_q, x_scale = quantize_int8(x)
    for weight, layout in layouts(ternary, path):
        with native.forced(path):
            y = cpu.linear(x, weight, layout, scale, added, dtypes[2])
            assert torch.equal(y, expected)
            y = cpu.linear(x_q, weight, layout, scale, added, dtypes[2], x_scale)
            assert torch.equal(y, expected)


@needs_library
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_extreme_integers(path, tokens):
    columns = 9000  # sums of 2·128·9000 in codes
    signs = torch.tensor([-128, 127, -127, 0], dtype=torch.int8)
    x_q = signs[torch.arange(tokens) % 4].unsqueeze(-1).expand(tokens, columns)
    ternary = torch.tensor([-1, 1, 0], dtype=torch.int8).unsqueeze(-1).expand(3, columns)
    ternary, ones = ternary.contiguous(), torch.ones(3)
    expected = (x_q.double() @ ternary.double().t()).float()
    for weight, layout in layouts(ternary, path):
        with native.forced(path):
            y = cpu.linear(x_q, weight, layout, ones, x_scale=torch.ones(tokens, 1))
        assert torch.equal(y, expected)


@needs_library
@pytest.mark.parametrize("path", PATHS)
def test_any_int8_weight(path):
    weight = torch.randint(-128, 128, (37, 333), dtype=torch.int8)
    x_q = torch.randint(-128, 128, (5, 333), dtype=torch.int8)
    x_q[0], weight[0], weight[1] = -128, -128, 127
    expected = (x_q.double() @ weight.double().t()).float()
    with native.forced(path):
        for tokens in (1, 5):
            y = cpu.linear(
                x_q[:tokens], weight, "bytes", torch.ones(37), x_scale=torch.ones(tokens, 1)
            )
            assert torch.equal(y, expected[:tokens])


@needs_library
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_that_are_hard_to_round(path, dtype):
    inf, nan = float("inf"), float("nan")
    halves = torch.arange(-127, 128) / 2  # ties once the largest is 127
    x = torch.zeros(10, 256)
    x[0, :255], x[0, 255] = halves, 127.0
    x[1] = 1e-7  # below the smallest magnitude
    x[2, 7], x[3, 100], x[4, 0] = nan, inf, -inf
    x[5] = torch.finfo(dtype).tiny
    x[6], x[7, ::2] = torch.finfo(dtype).max, -0.0
    x[8] = -x[0]
    x = x.to(dtype)
    ternary, scale = random_ternary(33, 256, False), torch.rand(33)
    expected = expected_of(x, ternary, scale, None, torch.float32)
    weight = two_bit_panels(ternary)
    with native.forced(path):
        for rows in (slice(None), *(slice(i, i + 1) for i in range(10))):
            y = cpu.linear(x[rows], weight, "two-bit", scale)
            assert torch.equal(y.nan_to_num(nan=1e30), expected[rows].nan_to_num(nan=1e30))


@needs_library
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_every_conversion(path, source, target):
    """A bias passes through unchanged when the product is zero: all 65,536 values of a half."""
    if source == torch.float32:
        bits = torch.randint(-(2**31), 2**31, (65536,)).to(torch.int32)
        bits[:4096] = torch.tensor(0.0).view(torch.int32) + 0x33000000 + torch.arange(4096) * 8192
    else:
        bits = torch.arange(65536).to(torch.int16)
    bias = bits.view(source)
    weight = two_bit_panels(torch.zeros(65536, 1, dtype=torch.int8))
    with native.forced(path):
        y = cpu.linear(torch.ones(1, 1), weight, "two-bit", torch.ones(65536), bias, target)
    expected = (torch.zeros(65536) + bias).to(target)
    same = (y[0] == expected) | (y[0].isnan() & expected.isnan())
    assert same.all()


@needs_library
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 8),
    columns=st.one_of(st.integers(1, 300), st.sampled_from([576, 1536])),
    out=st.one_of(st.integers(1, 40), st.sampled_from([129, 300])),
    bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_float_weights_equal_float64(path, dtype, tokens, columns, out, bias, seed):
    """Up to the rounding of float32 sums, and of the result to its dtype."""
    torch.manual_seed(seed)
    x, weight = torch.randn(tokens, columns).to(dtype), torch.randn(out, columns).to(dtype)
    added = torch.randn(out).to(dtype) if bias else None
    offset = 0 if added is None else added.double()
    expected = x.double() @ weight.double().t() + offset
    sizes = x.double().abs() @ weight.double().abs().t() + (abs(offset) if bias else 0)
    with native.forced(path), torch.no_grad():
        y = cpu.float_linear(x, weight, added)
    # A lane sums at most columns / 8 products and lanes are added in turn: (columns / 8 + 10) · ε.
    allowed = sizes * (columns / 4 + 10) * 2**-24 + expected.abs() * torch.finfo(dtype).eps / 2
    assert (
        (y.double() - expected).abs() <= allowed * 1.001 + 2**-25 * (dtype == torch.float16)
    ).all()
    assert y.dtype == dtype


@needs_library
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_half_as_a_weight(path, dtype):
    """Infinite and NaN too: a row of one weight times one."""
    weight = torch.arange(65536).to(torch.int16).view(dtype).view(-1, 1)
    with native.forced(path):
        y = cpu.float_linear(torch.ones(1, 1, dtype=dtype), weight)[0]
    expected = weight.squeeze(-1)
    assert ((y == expected) | (y.isnan() & expected.isnan())).all()


@needs_library
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_weights_touch_no_byte_beyond(path, dtype):
    for columns in (1, 31, 33, 250, 1000):
        x, weight = torch.randn(3, columns).to(dtype), torch.randn(9, columns).to(dtype)
        expected = torch.nn.functional.linear(x.double(), weight.double())
        with GuardedPages() as guarded, native.forced(path):
            y = guarded(torch.zeros(3, 9, dtype=dtype))
            layout = str(dtype).removeprefix("torch.")
            native.linear(guarded(x), None, guarded(weight), layout, None, None, y)
            error = (y.double() - expected).abs().max() / expected.abs().max()
        assert error < 2 * torch.finfo(dtype).eps + 1e-5


@needs_library
def test_float_products_that_pytorch_computes():
    """Many tokens, gradients, autocast, other dtypes and strides."""
    x, weight = torch.randn(3, 40), torch.randn(50, 40)
    plain = torch.nn.functional.linear
    many = torch.randn(cpu.MOST_FLOAT_TOKENS + 1, 40)
    assert torch.equal(cpu.float_linear(many, weight), plain(many, weight))
    assert torch.equal(
        cpu.float_linear(x.double(), weight.double()), plain(x.double(), weight.double())
    )
    strided = weight.t().contiguous().t()
    assert torch.equal(cpu.float_linear(x, strided), plain(x, strided))
    learning = weight.clone().requires_grad_()
    cpu.float_linear(x, learning).sum().backward()
    assert learning.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu.float_linear(x, weight).dtype == torch.bfloat16
    assert cpu.float_linear(x[:0], weight).shape == (0, 50)
    with pytest.raises(RuntimeError):
        cpu.float_linear(x, weight[:, :39].contiguous())
    torch.library.opcheck(torch.ops.sparse_bitnet.cpu_float_linear.default, (x, weight, None))


@needs_library
@pytest.mark.parametrize("path", PATHS)
def test_strides_and_leading_dimensions(path):
    weight, scale = prepare(random_ternary(12, 64, False), torch.rand(12)), torch.rand(12)
    wide = torch.randn(2, 3, 4, 80)
    for x in (
        wide[..., 3:67],
        wide.transpose(0, 2)[..., :64],
        wide[..., :64].flip(-1),
        torch.randn(64, 5).t(),
        torch.randn(1, 64).expand(9, 64),
        torch.randn(64),
        torch.randn(2, 0, 64),
        torch.randn(3, 64, dtype=torch.float64),
    ):
        expected = expected_of(x, weight.unpack(), scale, None, torch.float32)
        with native.forced(path):
            y = cpu.linear(x, two_bit_panels(weight.unpack()), "two-bit", scale)
        assert y.shape == (*x.shape[:-1], 12)
        assert torch.equal(y, expected)


@needs_library
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 7, 20])
@pytest.mark.parametrize("columns", [1, 5, 63, 250, 257, 1000])
def test_touches_no_byte_beyond_its_operands(path, tokens, columns):
    """Every operand ends where an unreadable page begins."""
    ternary, scale = random_ternary(9, columns, True), torch.rand(9)
    x, bias = torch.randn(tokens, columns, dtype=torch.bfloat16), torch.randn(9)
    with GuardedPages() as guarded:
        for weight, layout in layouts(ternary, path):
            operands = [guarded(t) for t in (x, weight, scale, bias)]
            y = guarded(torch.zeros(tokens, 9))
            with native.forced(path):
                native.linear(operands[0], None, operands[1], layout, *operands[2:], y)
            assert torch.equal(y, expected_of(x, ternary, scale, bias, torch.float32))


class GuardedPages:
    """Copies of tensors whose last byte is followed by a page without access."""

    def __init__(self):
        self._maps = []
        self._protect = ctypes.CDLL(None).mprotect
        self._protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def __enter__(self):
        return self._copy

    def _copy(self, tensor):
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // mmap.PAGESIZE) + 1
        memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
        everything = torch.frombuffer(memory, dtype=torch.uint8)
        end = (pages - 1) * mmap.PAGESIZE
        assert self._protect(everything.data_ptr() + end, mmap.PAGESIZE, 0) == 0
        copy = everything[end - size : end].view(tensor.dtype).view(tensor.shape)
        self._maps.append((memory, everything))
        return copy.copy_(tensor)

    def __exit__(self, *_):
        for memory, everything in self._maps:
            last = everything.data_ptr() + len(memory) - mmap.PAGESIZE
            self._protect(last, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)


@needs_library
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_any_number_of_threads(path, tokens):
    ternary, scale = random_ternary(1000, 1024, True), torch.rand(1000)
    x = torch.randn(tokens, 1024)
    expected = expected_of(x, ternary, scale, None, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for weight, layout in layouts(ternary, path):
                with native.forced(path):
                    assert torch.equal(cpu.linear(x, weight, layout, scale), expected)
    finally:
        torch.set_num_threads(before)


@needs_library
def test_calls_from_several_threads_at_once():
    weight = prepare(random_ternary(600, 768, True), torch.rand(600))
    inputs = [torch.randn(1 + 13 * (i % 2), 768) for i in range(24)]
    expected = [
        expected_of(x, weight.unpack(), weight.w_scale, None, torch.float32) for x in inputs
    ]
    with ThreadPoolExecutor(4) as pool:
        for y, right in zip(
            pool.map(lambda x: ternary_linear(x, weight), inputs), expected, strict=True
        ):
            assert torch.equal(y, right)


@needs_library
def test_threads_of_its_own_where_openmp_is_missing(only_torch):
    """A process that never shares PyTorch's workers starts threads for large products."""
    script = """
import torch
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.registry import backend_of, prepare, ternary_linear
native._share_threads = lambda library: None
torch.set_num_threads(3)
weight = prepare(torch.randint(-1, 2, (4096, 4096), dtype=torch.int8), torch.rand(4096))
plain = prepare(weight.unpack(), weight.w_scale, backend="reference")
for tokens in (1, 4, 30):
    x = torch.randn(tokens, 4096)
    y = ternary_linear(x, weight)
    assert torch.equal(y, ternary_linear(x, plain))
print("equal")
"""
    done = only_torch(script)
    assert done.stdout == "equal\n", done.stderr


@needs_library
def test_works_in_a_graph():
    ternary, scale = random_ternary(16, 256, True), torch.rand(16)
    weight = prepare(ternary, scale)
    x = torch.randn(3, 256)
    linear = torch.compile(
        lambda x: ternary_linear(x, weight) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(linear(x), ternary_linear(x, weight) + 1)
    arguments = (x, None, two_bit_panels(ternary), "two-bit", scale, None, torch.bfloat16)
    torch.library.opcheck(torch.ops.sparse_bitnet.cpu_linear.default, arguments)


@settings(deadline=None, max_examples=30)
@given(out=st.integers(0, 70), columns=st.integers(1, 600), seed=st.integers(0, 2**32))
def test_panels_of_rows(out, columns, seed):
    torch.manual_seed(seed)
    ternary = random_ternary(out, columns, False)
    packed = two_bit_panels(ternary)
    assert packed.shape == cpu.packed_shape("two-bit", out, columns)
    assert torch.equal(cpu.unpack(packed, "two-bit", out, columns), ternary)
    for row, column in ((0, 0), (out - 1, columns - 1)) if out else ():
        word = packed[row // 32, column // 16].view(32, 4)[row % 32]
        code = word[column % 16 // 4] >> column % 4 * 2 & 3
        assert code == ternary[row, column] + 1


def test_large_pages_change_nothing(monkeypatch):
    large = torch.randint(0, 255, (5 * pages.LARGE_PAGE // 2,), dtype=torch.uint8)
    small, empty = torch.arange(10), torch.empty(0)
    copy = large.clone()
    for tensor in (large, large[7:], small, empty, torch.empty(9, device="meta")):
        pages.use_large_pages(tensor)
    assert torch.equal(large, copy)
    monkeypatch.setattr(pages, "_advise", lambda: None)  # not Linux
    pages.use_large_pages(large)
    assert torch.equal(large, copy)


@settings(deadline=None, max_examples=30)
@given(out=st.integers(0, 70), columns=st.integers(1, 600), seed=st.integers(0, 2**32))
def test_six_bits_for_four_weights(out, columns, seed):
    torch.manual_seed(seed)
    ternary = random_ternary(out, columns, True)
    six_bit = cpu.pack_six_bit(two_bit_panels(ternary))
    assert six_bit.shape == cpu.packed_shape("six-bit", out, columns)
    assert torch.equal(cpu.unpack(six_bit, "six-bit", out, columns), ternary)


def test_six_bits_refuse_three_of_four():
    ternary = torch.zeros(70, 64, dtype=torch.int8)
    ternary[69, 60:63] = 1
    assert cpu.pack_six_bit(two_bit_panels(ternary)) is None


@needs_library
def test_refuses_what_does_not_fit():
    weight, scale = two_bit_panels(random_ternary(4, 64, False)), torch.ones(4)
    for x, bytes_, row_scale in (
        (torch.randn(2, 65), weight, scale),
        (torch.randn(2, 64), weight[:0], scale),
        (torch.randn(2, 64), weight, torch.ones(33)),
        (torch.randn(2, 0), weight[:, :0], scale),
    ):
        with pytest.raises(WeightError, match="two-bit weight"):
            cpu.linear(x, bytes_, "two-bit", row_scale)
    six_bit = cpu.pack_six_bit(two_bit_panels(random_ternary(4, 64, True)))
    assert six_bit is not None
    with (
        native.forced("portable"),
        pytest.raises(BackendError, match="'portable' does not read a weight laid out as 'six"),
    ):
        cpu.linear(torch.randn(2, 64), six_bit, "six-bit", scale)
    with native.forced("reference"), pytest.raises(BackendError, match="prepare the weight after"):
        cpu.linear(torch.randn(2, 64), weight, "two-bit", scale)


@needs_library
@pytest.mark.parametrize("tokens", [1, 30])
def test_dense_integers_on_cpu(tokens):
    largest = 128 if tokens == 1 else 1  # many tokens go to PyTorch, exact for ternary weights
    weight = torch.randint(-largest, largest, (50, 90), dtype=torch.int8)
    x_q, x_scale = quantize_int8(torch.randn(2, tokens, 90))
    scale = torch.rand(50)
    expected = (x_q.long() @ weight.long().t()).float().mul_(x_scale).mul_(scale).bfloat16()
    y = ternary_matmul(x_q, x_scale, weight, scale, None, torch.bfloat16)
    assert torch.equal(y, expected)
    if largest == 1:  # a strided weight goes to PyTorch too
        y = ternary_matmul(x_q, x_scale, weight.t().contiguous().t(), scale, None, torch.bfloat16)
        assert torch.equal(y, expected)


@pytest.fixture
def afresh():
    """Nothing remembered of the library or the environment, before and after."""
    cached = (native._load, native.available, native._default_path, native._reads_six_bit)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.usefixtures("afresh")
def test_without_a_compiler(monkeypatch, capsys):
    said = []
    monkeypatch.setattr(console, "say", said.append)
    monkeypatch.setattr(native, "_file", lambda: None)
    monkeypatch.delenv(native.VARIABLE, raising=False)
    ternary = random_ternary(6, 32, False)
    for _ in range(2):
        weight = prepare(ternary, torch.ones(6))
        x = torch.randn(3, 32)
        expected = expected_of(x, ternary, torch.ones(6), None, torch.float32)
        assert torch.equal(ternary_linear(x, weight), expected)
    assert len(said) == 1
    assert said[0].startswith("the CPU kernel was not compiled when the package was installed: ")
    assert weight.backend == "reference"
    assert backend_of(weight.device).reason(weight.device) == (
        "plain PyTorch integer arithmetic: the CPU kernel was not compiled when the package was "
        "installed"
    )
    with pytest.raises(BackendError, match="was not compiled"), native.forced("avx2"):
        pass


@pytest.mark.usefixtures("afresh")
def test_library_that_cannot_be_loaded(monkeypatch, tmp_path_factory):
    file = tmp_path_factory.mktemp("library") / "_native.so"
    file.write_bytes(b"not a library")
    monkeypatch.setattr(native, "_file", lambda: file)
    monkeypatch.setenv(native.VARIABLE, "reference")
    said = []
    monkeypatch.setattr(console, "say", said.append)
    assert native.available() == ()
    assert native.path() == "reference"
    assert "cannot be loaded" in native.explanation()
    assert said == []  # it was asked for


@pytest.mark.usefixtures("afresh")
def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv(native.VARIABLE, "sse9")
    with pytest.raises(ConfigError, match=r"SPARSE_BITNET_CPU=sse9: 'sse9' is no path; choose"):
        native.path()
    missing = next(name for name in native.PATHS if name not in PATHS)
    monkeypatch.setenv(native.VARIABLE, missing)
    with pytest.raises(BackendError, match=f"SPARSE_BITNET_CPU={missing}: "):
        native.path()
    for name in (*PATHS, "reference"):
        native._default_path.cache_clear()
        monkeypatch.setenv(native.VARIABLE, name)
        assert native.path() == name
        assert native.explanation() == f"{name}, as SPARSE_BITNET_CPU asks"


@needs_library
@pytest.mark.parametrize("path", PATHS)
def test_each_path_in_a_process_of_its_own(only_torch, path):
    script = """
import torch
from sparse_bitnet.kernels.registry import backend_of, prepare, ternary_linear
weight = prepare(torch.randint(-1, 2, (40, 300), dtype=torch.int8), torch.rand(40))
x = torch.randn(20, 300)
plain = prepare(weight.unpack(), weight.w_scale, backend="reference")
assert torch.equal(ternary_linear(x, weight), ternary_linear(x, plain))
print(backend_of(weight.device).reason(weight.device))
"""
    done = only_torch(script, **{native.VARIABLE: path})
    assert done.stdout == f"{path}, as SPARSE_BITNET_CPU asks\n", done.stderr
