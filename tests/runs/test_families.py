"""Names of kinds of runs."""

import pytest

from factorized_gpt2.compress.methods import CODED, METHODS
from factorized_gpt2.runs.families import FAMILIES, family_of, run_name


@pytest.mark.parametrize("method", [None, *METHODS, CODED, "of a later version"])
@pytest.mark.parametrize("is_refined", [False, True])
def test_every_kind_of_run_has_a_name_for_pictures(method, is_refined):
    for trains, has_adapters in ((False, False), (True, True), (True, False)):
        assert family_of(method, trains, has_adapters, is_refined) in FAMILIES


def test_titles_are_of_one_family():
    assert len(set(FAMILIES.values())) == len(FAMILIES)
    assert FAMILIES["tokenwise-refined-nofinetune"] == "tokenwise refined"
    assert FAMILIES["coded-refined-lora"] == "coded refined + LoRA"
    assert FAMILIES["pca-nofinetune"] == "PCA, no training"


def test_methods_stand_together_in_tables_before_what_is_not_known():
    made = [family.rpartition("-")[0] for family in FAMILIES][5:]
    assert list(dict.fromkeys(made)) == [name for at, name in enumerate(made) if at % 3 == 0]
    assert made[-1] == "compressed"


def test_a_coded_vocabulary_is_named_by_its_bits():
    assert run_name("coded-lora", 768, 32, 1.5) == "coded-lora-b1.5-r32"
    assert run_name("coded-refined-nofinetune", 768, 0, 2.0) == "coded-refined-nofinetune-b2"
    assert run_name("tokenwise-refined-lora", 64, 8) == "tokenwise-refined-lora-k64-r8"
