"""The configuration: what it accepts, refuses, and keeps on disk."""

import json

import pytest
from conftest import RANK, WIDTH, tiny_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GPT2Config

from factorized_gpt2 import FactorizedGPT2Config


def test_defaults_are_those_of_gpt2_and_unfactorized():
    config, gpt2 = FactorizedGPT2Config(), GPT2Config()
    own = {"model_type": "factorized_gpt2", "n_embd_wte": None, "scale_up_bias": True}
    own |= {"vocabulary_dtype": None, "lm_head_bias": False}
    assert config.to_dict() == gpt2.to_dict() | own
    assert not config.is_factorized
    assert config.embedding_size == config.n_embd == 768


@pytest.mark.parametrize(
    ("n_embd_wte", "is_factorized", "embedding_size"),
    [(1, True, 1), (RANK, True, RANK), (WIDTH - 1, True, WIDTH - 1), (WIDTH, False, WIDTH), (None, False, WIDTH)],
)
def test_rank_decides_whether_and_how_narrow(n_embd_wte, is_factorized, embedding_size):
    config = tiny_config(n_embd_wte=n_embd_wte)
    assert config.is_factorized is is_factorized
    assert config.embedding_size == embedding_size


@pytest.mark.parametrize("n_embd_wte", [0, -1, WIDTH + 1, 1.5, "64", True, False, [RANK]])
def test_invalid_rank_is_refused_by_name(n_embd_wte):
    with pytest.raises(StrictDataclassError, match="n_embd_wte"):
        tiny_config(n_embd_wte=n_embd_wte)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_head": 5}, "n_head"),
        ({"n_head": 0}, "n_head"),
        ({"n_head": -4}, "n_head"),
        ({"scale_up_bias": "no"}, "scale_up_bias"),
        ({"n_layer": "2"}, "n_layer"),
    ],
)
def test_what_the_network_cannot_honour_is_refused_by_name(overrides, named):
    with pytest.raises(StrictDataclassError, match=named):
        tiny_config(**overrides)


def test_a_field_made_invalid_later_is_refused_when_saved(tmp_path):
    config = tiny_config()
    config.n_embd_wte = 0
    with pytest.raises(StrictDataclassError, match="n_embd_wte"):
        config.save_pretrained(tmp_path)


def test_an_invalid_file_is_refused_when_loaded(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_embd_wte": WIDTH + 1}))
    with pytest.raises(StrictDataclassError, match="n_embd_wte"):
        FactorizedGPT2Config.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_embd_wte": None},
        {"scale_up_bias": False, "tie_word_embeddings": False},
        {"n_inner": 17, "activation_function": "relu", "scale_attn_weights": False, "reorder_and_upcast_attn": True},
    ],
)
def test_json_round_trip_keeps_every_field(tmp_path, overrides):
    config = tiny_config(**overrides)
    config.save_pretrained(tmp_path)
    loaded = FactorizedGPT2Config.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    for name, value in overrides.items():
        assert getattr(loaded, name) == value


def test_auto_config_finds_the_class(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FactorizedGPT2Config
    assert loaded.n_embd_wte == RANK
    assert type(AutoConfig.for_model("factorized_gpt2", n_embd_wte=3)) is FactorizedGPT2Config


@pytest.mark.parametrize(
    ("common_name", "gpt2_name", "value"),
    [
        ("hidden_size", "n_embd", 40),
        ("max_position_embeddings", "n_positions", 24),
        ("num_attention_heads", "n_head", 2),
        ("num_hidden_layers", "n_layer", 3),
    ],
)
def test_common_names_are_aliases(common_name, gpt2_name, value):
    config = FactorizedGPT2Config(**{"n_head": 4, "n_embd": 32, common_name: value})
    assert getattr(config, gpt2_name) == getattr(config, common_name) == value
    setattr(config, common_name, 2 * value)
    assert getattr(config, gpt2_name) == 2 * value


def test_rank_can_be_overridden_while_loading(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert FactorizedGPT2Config.from_pretrained(tmp_path, n_embd_wte=5).embedding_size == 5
