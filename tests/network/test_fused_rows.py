"""The Triton kernel of rows against float64, run by Triton's interpreter on a CPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import cross_entropy

from factorized_gpt2.network.fused_rows import fused_cross_entropy_rows, fused_rows_run


def test_where_the_kernel_runs():
    assert not fused_rows_run(logits_are_on_cuda=False)
    assert fused_rows_run(logits_are_on_cuda=True) == (find_spec("triton") is not None)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, whose interpreter runs the kernel on a CPU")
def test_the_kernel_of_rows():
    """In a process of its own: Triton reads when it is imported whether to interpret."""
    settings = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__], check=True, env=settings, timeout=300)


def check_the_kernel_of_rows() -> None:
    for vocabulary in (99, 4096, 5003):
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
            logits, labels = (torch.randn(7, vocabulary) * 3).to(dtype), torch.randint(vocabulary, (9,))
            labels[3] = -100
            exact_logits, own = logits.double().requires_grad_(), labels[2:9]
            expected = cross_entropy(exact_logits, own, reduction="none")
            gradient = torch.autograd.grad(expected.sum(), exact_logits)[0]
            losses, factor = fused_cross_entropy_rows(logits, slice(2, 9), labels)
            assert factor is None
            torch.testing.assert_close(losses[:, 0].double(), expected, rtol=1e-5, atol=1e-5)
            assert (logits.double() - gradient).norm() < tolerance * gradient.norm()
            assert not logits[1].any()


if __name__ == "__main__":
    check_the_kernel_of_rows()
