"""What is kept in fewer bits is wrong by no more than is said."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regraft.frontier.cache.precision import Precision, packed, packed_bytes, unpacked

BOUNDS = {"full": 0.0, "bf16": 2**-8, "fp16": 2**-11, "int8": 1 / 254 + 1e-6}  # of the largest value of a row


@pytest.mark.parametrize("precision", BOUNDS)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), rows=st.integers(1, 5))
def test_packed_and_unpacked_differ_by_less_than_the_bound(
    precision: Precision, seed: int, scale: float, rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(rows, 3, 4, generator=generator) * scale,
        torch.randint(9, (rows, 2), generator=generator),
        torch.zeros(rows, 5),
        torch.randn(rows, generator=generator) * scale,  # one number for each image
    ]
    kept = packed(tensors, precision)
    assert sum(x.nbytes for x in kept) == sum(packed_bytes(rows, x.shape[1:], x.dtype, precision) for x in tensors)
    again = unpacked(kept, [tensor.dtype for tensor in tensors], precision)
    assert torch.equal(again[1], tensors[1])
    assert torch.equal(again[2], tensors[2])
    assert again[0].dtype == torch.float32
    for kept_again, tensor in ((again[0], tensors[0].flatten(1)), (again[3][:, None], tensors[3][:, None])):
        bound = BOUNDS[precision] * tensor.abs().amax(1)
        if precision == "fp16":
            bound = bound.clamp(min=2**-25)  # half a step of its smallest numbers, below which none is nearer
        assert ((kept_again.flatten(1) - tensor).abs().amax(1) <= bound).all()
