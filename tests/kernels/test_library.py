import pytest
import torch

from sparse_bitnet.kernels.library import register


def one(x):
    return x.clone()


def two(x, y):
    return x.clone()


def test_refuses_a_kernel_or_a_fake_that_does_not_take_what_the_schema_says():
    for kernel, fake in ((one, two), (two, one)):
        with pytest.raises(TypeError, match="too many positional"):
            register("never_registered(Tensor x, Tensor? y) -> Tensor", kernel, fake)
    assert not hasattr(torch.ops.sparse_bitnet, "never_registered")
