"""Saved tokenizers: the same tokens, the model's positions, and names that other versions of transformers know."""

import json

import pytest
from texts import chapters
from transformers import AutoTokenizer, GPT2Tokenizer

from factorized_gpt2 import FactorizedGPT2, FactorizedGPT2Config
from factorized_gpt2.hub.repository import _model_files
from factorized_gpt2.text.tokenizer_files import portable_config, save_tokenizer

TEXTS = [*chapters(2), "  two  spaces, ümläute, 漢字\n\n\ttabs<|endoftext|>more"]


def saved(folder) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_the_tokens_are_the_same(tokenizer, tmp_path):
    before = tokenizer.model_max_length
    save_tokenizer(tokenizer, tmp_path, 48)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert tokenizer.model_max_length == before


def test_it_truncates_to_the_positions_of_the_model(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, 20)
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0], truncation=True)["input_ids"]
    assert len(ids) == 20


def test_without_a_model_it_keeps_its_own_limit(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    assert saved(tmp_path)["model_max_length"] == tokenizer.model_max_length


def test_its_class_is_one_that_transformers_4_knows(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    assert saved(tmp_path)["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_class_of_a_model_stays(tokenizer, tmp_path):
    save_tokenizer(GPT2Tokenizer(vocab=tokenizer.get_vocab(), merges=[]), tmp_path)
    assert saved(tmp_path)["tokenizer_class"] == "GPT2Tokenizer"


def test_further_special_tokens_are_listed_as_transformers_4_lists_them(tokenizer, corpus, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer", extra_special_tokens=["<|user|>"])
    save_tokenizer(tokenizer, tmp_path)
    assert "extra_special_tokens" not in saved(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.extra_special_tokens == ["<|user|>"]
    assert again("a<|user|>b")["input_ids"] == tokenizer("a<|user|>b")["input_ids"]


@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "BertTokenizer", "extra_special_tokens": {"a": "b"}}])
def test_what_is_portable_stays(config):
    assert portable_config(config) == config


def test_what_an_older_folder_holds_is_published_in_the_same_way(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    model = FactorizedGPT2(FactorizedGPT2Config(vocab_size=19, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    stored = json.loads(_model_files(tmp_path, tmp_path, model)["tokenizer_config.json"])
    assert stored["tokenizer_class"] == "PreTrainedTokenizerFast"
