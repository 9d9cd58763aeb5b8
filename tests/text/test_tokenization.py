"""Tokenizers as people have them: exact ids, with and without an end of text, of Rust and of Python."""

import json
from itertools import chain

import pytest
from conftest import DOCUMENTS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import BertTokenizer, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from factorized_gpt2.cli.compress import compress
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.models.loading import check_tokenizer
from factorized_gpt2.text.blocks import load_blocks, stream_blocks
from factorized_gpt2.text.source import TextSource
from factorized_gpt2.text.tokenizers import end_of_text, has_tokenizer, load_tokenizer, vocabulary_size

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,\n"


def of_characters(*more: str) -> Tokenizer:
    """Make a tokenizer with a token a letter, and some before them."""
    made = Tokenizer(models.WordLevel({token: index for index, token in enumerate([*more, *LETTERS])}, unk_token="?"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return made


def write(folder, tokenizer: Tokenizer, config: dict | None = None, **settings):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2TokenizerFast"} | settings))
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | config))
    return str(folder)


def lower_case(tokenizer) -> Tokenizer:
    changed = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    changed.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return changed


def digits_apart(tokenizer) -> Tokenizer:
    changed = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    changed.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), changed.pre_tokenizer]
    )
    return changed


@pytest.mark.parametrize("change", [lower_case, digits_apart, lambda tokenizer: of_characters("?")])
@pytest.mark.parametrize("tokenizer_class", ["GPT2TokenizerFast", "GPT2Tokenizer", "PreTrainedTokenizerFast", "Lost"])
def test_the_ids_are_those_of_tokenizer_json(tmp_path, tokenizer, change, tokenizer_class):
    exact = change(tokenizer)
    loaded = load_tokenizer(write(tmp_path / "a", exact, {}, tokenizer_class=tokenizer_class))
    text = "The DOG of 1984, ﬁne\n\n  and  more."
    assert loaded.encode(text) == exact.encode(text).ids
    loaded.save_pretrained(tmp_path / "b")
    assert Tokenizer.from_file(str(tmp_path / "b/tokenizer.json")).encode(text).ids == exact.encode(text).ids
    assert load_tokenizer(str(tmp_path / "b")).encode(text) == exact.encode(text).ids


def test_no_token_is_invented(tmp_path):
    loaded = load_tokenizer(write(tmp_path / "a", of_characters("?"), {}))
    assert vocabulary_size(loaded) == len(LETTERS) + 1
    assert loaded.eos_token is None
    with pytest.raises(UserError, match=r"a' has no eos_token, which marks .* tokenizer_config\.json"):
        end_of_text(loaded)


@pytest.mark.parametrize(
    ("config", "settings", "end"),
    [
        ({"eos_token_id": 1}, {}, "</s>"),
        ({"eos_token_id": [1, 2]}, {}, "</s>"),
        ({"eos_token_id": 1}, {"eos_token": "a"}, "a"),
        ({"eos_token_id": 50256}, {}, None),
        ({}, {}, None),
        (None, {}, None),
    ],
)
def test_the_end_of_text_may_stand_in_the_model_config(tmp_path, config, settings, end):
    loaded = load_tokenizer(write(tmp_path / "a", of_characters("?", "</s>"), config, **settings))
    assert loaded.eos_token == end
    assert vocabulary_size(loaded) == len(LETTERS) + 2
    if end == "</s>":
        assert end_of_text(loaded) == 1


def test_the_end_of_text_of_gpt2_needs_no_name(tmp_path, tokenizer):
    loaded = load_tokenizer(write(tmp_path / "a", tokenizer.backend_tokenizer, {"eos_token_id": 50256}))
    assert loaded.eos_token == loaded.bos_token == "<|endoftext|>"


def test_another_end_of_text_in_the_config_is_said(caplog, tokenizer):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 8, "vocab_size": len(tokenizer)}
    for named, is_said in ((17, True), (tokenizer.eos_token_id, False), ([5, tokenizer.eos_token_id], False)):
        caplog.clear()
        check_tokenizer(GPT2LMHeadModel(GPT2Config(eos_token_id=named, **sizes)), tokenizer)
        assert ("eos_token_id 17" in caplog.text) == is_said


@pytest.mark.parametrize(
    "rows", [["a.", "b."], ["a.<|endoftext|>", "b."], ["a.", "", "b.<|endoftext|>"], ["", "a.", "b."]]
)
def test_documents_end_once(tmp_path, tokenizer, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    (block,) = load_blocks(TextSource(files=(str(path),) * 2), tokenizer, 10**4, keep_tail=True)["input_ids"]
    assert tokenizer.decode(block) == "a.<|endoftext|>b.<|endoftext|>" * 2


def test_a_tokenizer_in_python(tmp_path):
    tokenizer = load_tokenizer(str(ByT5Tokenizer().save_pretrained(tmp_path / "bytes") and tmp_path / "bytes"))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS[:3]))
    source = TextSource(files=(str(path),))
    expected = [[byte + 3 for byte in text.encode()] + [tokenizer.eos_token_id] for text in DOCUMENTS[:3]]
    blocks = load_blocks(source, tokenizer, 16, keep_tail=True)["input_ids"]
    assert list(chain(*blocks)) == list(chain(*expected))
    streamed = [list(row["input_ids"]) for row in stream_blocks(source, tokenizer, 16, shuffle_buffer=1, seed=0)]
    assert streamed == [list(block) for block in blocks if len(block) == 16]


def bert(folder):
    folder.mkdir(exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text(
        "\n".join(special + [*LETTERS.strip()] + [f"##{letter}" for letter in LETTERS[:26]])
    )
    return BertTokenizer.from_pretrained(folder)


def baseline(folder, vocab_size: int) -> str:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16, "vocab_size": vocab_size}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    return str(folder)


def words(folder, output, *more) -> list[str]:
    return ["--baseline", folder, "--ranks", "4", "--output_dir", str(output), *more]


@pytest.mark.parametrize("kind", ["bert", "characters", "none"])
def test_pca_needs_no_end_of_text(tmp_path, caplog, kind):
    size = len(bert(tmp_path / "a")) if kind == "bert" else len(LETTERS) + 1
    folder = baseline(tmp_path / "a", size)
    if kind != "bert":
        (tmp_path / "a/vocab.txt").unlink(missing_ok=True)
    else:
        config = json.loads((tmp_path / "a/config.json").read_text())
        (tmp_path / "a/config.json").write_text(json.dumps(config | {"tokenizer_class": "BertTokenizer"}))
    if kind == "characters":
        write(tmp_path / "a", of_characters("?"))
    compress(words(folder, tmp_path / "out"))
    made = tmp_path / "out/gpt_pca_nofinetune_k4"
    assert has_tokenizer(str(made)) == (kind != "none")
    assert ("has no tokenizer" in caplog.text) == (kind == "none")
    if kind == "characters":
        assert load_tokenizer(str(made)).encode("dog") == load_tokenizer(folder).encode("dog")


def test_text_needs_an_end_of_text(tmp_path):
    folder = baseline(tmp_path / "a", len(LETTERS) + 1)
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(UserError, match="No tokenizer can be loaded"):
        compress(words(folder, tmp_path / "out", "--eval_file", str(tmp_path / "text.txt")))
    write(tmp_path / "a", of_characters("?"))
    with pytest.raises(UserError, match="has no eos_token"):
        compress(words(folder, tmp_path / "out", "--eval_file", str(tmp_path / "text.txt")))
    assert not (tmp_path / "out/gpt_pca_nofinetune_k4").exists()


def test_a_tokenizer_gives_what_gpt2_takes(tmp_path, tokenizer):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    assert set(load_tokenizer(str(tmp_path))("a b")) == {"input_ids", "attention_mask"}
