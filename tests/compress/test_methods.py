"""The list of methods: its contract, and that an entry and a function are all that a new one takes."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_model
from test_data_aware_factorization import HEAD, USE, WEIGHT, WIDTH, approximation, random_matrix, random_use

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress import pca
from factorized_gpt2.compress.compressor import Compressor
from factorized_gpt2.compress.methods import BY_RANK, CODED, DEFAULT, METHODS
from factorized_gpt2.compress.recipe import Recipe
from factorized_gpt2.models.loading import Baseline


@pytest.mark.parametrize("method", BY_RANK)
@pytest.mark.parametrize("head", [None, HEAD], ids=["tied", "untied"])
def test_what_methods_by_rank_return(method, head):
    fitted = METHODS[method].fit(WEIGHT, head, USE if METHODS[method].needs_text else None)
    factors = fitted.factors([3, WIDTH])
    assert list(factors) == [3, WIDTH]
    np.testing.assert_allclose(approximation(factors[WIDTH]), WEIGHT, atol=1e-4)
    assert (factors[3].lm_head is None) == (head is None)
    assert fitted.shares.shape == (WIDTH,)
    assert factors[3].explained_share == pytest.approx(fitted.shares[2], abs=1e-12)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in BY_RANK])
def test_what_methods_by_bytes_return(method):
    use = replace(random_use(2000, 32), head_use=np.linspace(0.1, 1, 2000))
    weight = random_matrix(2000, 32)
    fitted = METHODS[method].fit(weight, None, use)
    errors = []
    for bits in (3, 6):
        table = fitted.table(bits)
        assert table.bits_per_weight <= bits
        errors.append(np.square(table.dense() - weight).mean())
    assert errors[1] < 0.3 * errors[0] < 0.3 * weight.var()
    assert fitted.table(1, rank=8).codes.shape[1] <= 16  # a component takes a column or two
    with pytest.raises(ValueError, match="One matrix is coded"):
        METHODS[method].fit(weight, weight, use)


def test_names_that_are_meant_are_there():
    assert METHODS[DEFAULT].by == "rank"
    assert not METHODS[DEFAULT].needs_text
    assert METHODS[CODED].by == "bytes"
    assert all(name == method.name for name, method in METHODS.items())
    markers = [marker for method in METHODS.values() for marker in method.markers]
    assert len(set(markers)) == len(markers)


def test_an_entry_and_a_function_are_all_that_a_method_takes(monkeypatch, tmp_path):
    def halved(weight, lm_head, use):
        assert use is None
        return pca.PCAFit(weight / 2, lm_head)

    monkeypatch.setattr(pca, "halved", halved, raising=False)
    entry = replace(METHODS["pca"], name="halved", fitted_by="pca:halved", keeps_factors=False)
    monkeypatch.setitem(METHODS, "halved", entry)
    baseline = Baseline(tiny_model(n_embd_wte=None), "baseline", "0" * 64)
    made = {name: Compressor(baseline, Recipe(name), tmp_path, None).make(5)[0] for name in ("pca", "halved")}
    np.testing.assert_allclose(
        made["halved"].transformer.wte.weight.detach().abs(),
        made["pca"].transformer.wte.weight.detach().abs() / 2,
        atol=1e-5,
    )


def test_a_method_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="There is no method 'svd'; there are pca, weighted, joint, tokenwise, coded"):
        Recipe("svd")


def test_the_list_is_light():
    ask = (
        "import json, sys; sys.argv = ['/usr/bin/factorized-gpt2-compress']\n"
        "import factorized_gpt2.compress.methods\n"
        "print(json.dumps([name for name in ('torch', 'numpy', 'sklearn') if name in sys.modules]))"
    )
    asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert json.loads(asked.stdout) == []
