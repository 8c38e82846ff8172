import pytest
import torch

from sparse_bitnet.kernels.decode_attention import reference, triton


def plain(query, keys, values, seen, scale):
    """By hand, in float64."""
    group = query.shape[1] // keys.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (keys, values))
    scores = query.double() @ k.transpose(-1, -2) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "length", "width", "dtype", "masked"),
    [
        (1, 4, 2, 1, 16, torch.float32, "one"),
        (2, 7, 1, 65, 64, torch.float16, "each"),
        (1, 14, 2, 200, 32, torch.float32, "all"),
        (3, 2, 2, 130, 24, torch.float32, "one"),
        (3, 2, 2, 130, 24, torch.float32, "each"),
        (1, 20, 1, 64, 16, torch.float16, "all"),
    ],
)
def test_equals_attention_by_hand(batch, heads, key_heads, length, width, dtype, masked):
    torch.manual_seed(0)
    query = torch.randn(batch, heads, 1, width).to(dtype)
    keys, values = torch.randn(2, batch, key_heads, length, width).to(dtype)
    seen = None
    if masked != "all":
        rows = batch if masked == "each" else 1
        seen = torch.rand(rows, 1, 1, length) < 0.3
        seen[..., 0] = True
    expected = plain(query, keys, values, seen, 0.3)
    tolerance = (
        1e-5 if dtype == torch.float32 else 2e-3
    )  # one rounding of the result and of weights
    for attend in (reference.decode_attention, triton.attend):
        found = attend(query, keys, values, seen, 0.3)
        assert found.dtype == dtype and found.shape == query.shape
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_what_is_not_seen_does_not_matter():
    query, keys, values = torch.randn(1, 2, 1, 16), *torch.randn(2, 1, 2, 256, 16)
    seen = (torch.arange(256) <= 70).view(1, 1, 1, 256)
    before = triton.attend(query, keys, values, seen, 1.0)
    keys[:, :, 71:] = torch.nan
    values[:, :, 71:] = torch.nan
    assert torch.equal(triton.attend(query, keys, values, seen, 1.0), before)


def test_strides_and_no_sequence():
    query = torch.randn(2, 1, 4, 16).transpose(1, 2)
    keys, values = torch.randn(2, 2, 90, 2, 16).transpose(2, 3)
    expected = plain(query, keys, values, None, 0.25).float()
    torch.testing.assert_close(triton.attend(query, keys, values, None, 0.25), expected)
    empty = triton.attend(query[:0], keys[:0], values[:0], None, 0.25)
    assert empty.shape == (0, 4, 1, 16)


@pytest.mark.parametrize("first", [70, 1290])
def test_padding_on_the_left_of_many_shares(first):
    """The first shares, more than are joined at once, see nothing."""
    query, keys, values = torch.randn(1, 2, 1, 16), *torch.randn(2, 1, 1, 1300, 16)
    seen = (torch.arange(1300) >= first).view(1, 1, 1, 1300)
    expected = plain(query, keys, values, seen, 0.5)
    found = triton.attend(query, keys, values, seen, 0.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 4, 6])
def test_every_shape_of_the_kernel(monkeypatch, heads):
    """As where all blocks are under way, where a cache is cut, and where none is."""
    monkeypatch.setattr(triton, "ONE_WAVE", 2)
    monkeypatch.setattr(triton, "FILLED", 6)
    query, keys, values = torch.randn(heads, 2, 1, 16), *torch.randn(2, heads, 1, 150, 16)
    seen = (torch.arange(150) >= 3).view(1, 1, 1, 150)
    shapes = {1: 64, 4: 16, 6: 32}
    assert triton._shape(heads, 150)[0] == shapes[heads]
    found = triton.attend(query, keys, values, seen, 0.5)
    torch.testing.assert_close(
        found.double(), plain(query, keys, values, seen, 0.5), rtol=1e-5, atol=1e-5
    )
