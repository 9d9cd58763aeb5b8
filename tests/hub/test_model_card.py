"""What the card of a published model says, by what the records say."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_config
from hub_server import card_errors

from factorized_gpt2.compress.methods import METHODS
from factorized_gpt2.hub.model_card import TRANSFORMERS, Figures, History, Measurement, adapter_card, model_card
from factorized_gpt2.runs.results import Results
from factorized_gpt2.text.loss import perplexity
from factorized_gpt2.text.source import TextSource

STOCK = "openai-community/gpt2"
SETTINGS = {
    "baseline": STOCK,
    "compressed": None,
    "lora_rank": 2,
    "dataset_name": "Salesforce/wikitext",
    "dataset_config_name": "wikitext-103-raw-v1",
    "train_file": None,
    "validation_file": None,
    "block_size": 48,
}
RESULTS = Results(
    run_name="pca-lora-k12-r2",
    family="pca-lora",
    n_embd_wte=12,
    eval_loss=4.5,
    perplexity=perplexity(4.5),
    parameters=31_337,
    vocabulary_parameters=1_000,
    bytes=125_348,
    vocabulary_bytes=4_000,
    settings=SETTINGS,
    versions={},
    best_step=120,
    best_tokens=5_760,
    trained_parameters=1_000,
)
RECIPE = {"baseline": "/data/models/gpt_baseline", "method": "pca"}


def results(**changes) -> Results:
    settings = SETTINGS | changes.pop("settings", {})
    return replace(RESULTS, settings=settings, **changes)


def card(history: History, **arguments):
    """Write a card of a tiny model that the Hub would take."""
    config = arguments.pop("config", tiny_config())
    written = model_card("me/tiny", config, (31_337, 125_348), history, **arguments)
    assert not card_errors(str(written))
    return written


def table(text: str) -> dict[str, list[str]]:
    """Read a card's table: cells by the first of their row."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_a_compressed_model_that_was_not_measured():
    written = card(History(RECIPE, None))
    data = written.data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["factorized_gpt2", "custom_code", "text-generation"],
    }
    assert table(written.text)["tiny"] == ["12", "31,337", "0.125"]
    assert f"Compressed from `gpt_baseline` by {METHODS['pca'].summary} (`pca`)" in written.text
    assert "/data" not in written.text
    assert "k = 12" in written.text
    for line in ('AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True)', "import FactorizedGPT2\n"):
        assert line in written.text


def test_a_compressed_model_that_was_measured():
    text = TextSource(files=("/data/my texts/held out.txt", "b.jsonl"))
    measured = Measurement(5.25, text, Figures("baseline", None, 30_000, 120_000, 5.125))
    calibration = {"text": "/data/train.txt, more/of.jsonl, wikitext raw train", "tokens": 16_384}
    recipe = RECIPE | {"method": "tokenwise", "refine_steps": 7, "calibration": calibration}
    written = card(History(recipe, None), measured=measured, base_model=STOCK, license="mit", plots=["a_b.png"])
    assert table(written.text)["tiny"] == ["12", "31,337", "0.125", "5.2500", f"{perplexity(5.25):.2f}"]
    assert table(written.text)["baseline"] == ["-", "30,000", "0.120", "5.1250", f"{perplexity(5.125):.2f}"]
    (result,) = written.data.to_dict()["model-index"][0]["results"]
    assert result["dataset"] == {"name": "held out.txt, b.jsonl", "type": "held-out.txt-b.jsonl"}
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == {"loss": 5.25, "perplexity": perplexity(5.25)}
    assert (written.data.base_model, written.data.license) == (STOCK, "mit")
    assert f"Compressed from [{STOCK}](/{STOCK}) by {METHODS['tokenwise'].summary} (`tokenwise`)" in written.text
    assert "refined for 7 steps" in written.text
    assert "16,384 tokens of train.txt, of.jsonl, wikitext raw train." in written.text
    assert "![a b](a_b.png)" in written.text
    assert "datasets" not in written.data.to_dict()


def test_a_healed_model():
    recipe = {"baseline": STOCK, "method": "pca"}
    written = card(History(recipe, RESULTS), base_model=STOCK)
    assert written.data.datasets == ["Salesforce/wikitext"]
    (result,) = written.data.to_dict()["model-index"][0]["results"]
    assert result["dataset"] == {
        "name": "Salesforce/wikitext wikitext-103-raw-v1 validation",
        "type": "Salesforce/wikitext",
        "config": "wikitext-103-raw-v1",
        "split": "validation",
    }
    sentence = "Trained with LoRA of rank 2 on Salesforce/wikitext wikitext-103-raw-v1 train: 120 steps, 5,760 tokens."
    assert sentence in written.text
    assert table(written.text)["tiny"] == ["12", "31,337", "0.125", "4.5000", f"{perplexity(4.5):.2f}"]


def test_local_training_text_is_no_dataset_of_the_hub():
    history = History(RECIPE, results(settings={"train_file": ["/data/mine.txt"]}))
    assert card(history).data.datasets is None
    assert "on mine.txt:" in card(history).text


@pytest.mark.parametrize("loss", [float("nan"), 800.0])
def test_a_run_that_diverged_claims_nothing(loss):
    assert "model-index" not in card(History(RECIPE, results(eval_loss=loss))).data.to_dict()


def test_a_model_from_scratch():
    scratch = results(family="baseline", n_embd_wte=None, settings={"baseline": None, "lora_rank": 0})
    text = card(History({"baseline": None, "method": None}, scratch), config=tiny_config(n_embd_wte=None)).text
    assert "A GPT-2: 2 layers" in text
    assert "Trained from a random start on" in text
    assert "ompressed" not in text
    assert table(text)["tiny"][0] == "-"


def test_an_untied_model():
    assert (
        "a k x V matrix of its own" in card(History(RECIPE, None), config=tiny_config(tie_word_embeddings=False)).text
    )
    assert "a k x V matrix of its own" not in card(History(RECIPE, None)).text


def test_a_branch_is_what_the_card_loads():
    text = card(History(RECIPE, None), revision="k12").text
    assert text.count('from_pretrained("me/tiny", revision="k12"') == 3


def test_an_adapter():
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["wte", "q_proj"]}
    written = adapter_card("me/tiny-lora", "me/tiny", lora, History(RECIPE, RESULTS), "mit")
    assert not card_errors(str(written))
    data = written.data.to_dict()
    assert (data["library_name"], data["base_model"], data["license"]) == ("peft", "me/tiny", "mit")
    assert data["model-index"][0]["name"] == "tiny-lora"
    assert "lora" in data["tags"]
    assert "rank 2, alpha 4, on `q_proj`, `wte` of [me/tiny](/me/tiny)" in written.text
    assert table(written.text)["with this adapter"][1] == "31,337"
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/tiny-lora", trust_remote_code=True)' in written.text
    alone = adapter_card("me/tiny-lora", "me/tiny", lora, History({}, None))
    assert not card_errors(str(alone))
    assert "Size" not in alone.text


@pytest.mark.parametrize(("block_size", "beside"), [(48, True), (24, False)])
def test_the_baseline_stands_beside_a_run_of_the_same_text(tmp_path, block_size, beside):
    baseline = tmp_path / "gpt_baseline"
    baseline.mkdir()
    results(family="baseline", n_embd_wte=None, eval_loss=4.25, settings={"block_size": block_size}).write(baseline)
    run = tmp_path / "run"
    run.mkdir()
    results(settings={"baseline": str(baseline)}).write(run)
    history = History.read(run)
    assert history.recipe == {"baseline": str(baseline), "method": "pca"}
    assert ("baseline" in table(card(history).text)) == beside
    if beside:
        assert table(card(history).text)["baseline"][-2:] == ["4.2500", f"{perplexity(4.25):.2f}"]


def test_a_run_knows_what_its_start_was_made_from(tmp_path):
    start, run = tmp_path / "start", tmp_path / "run"
    start.mkdir()
    run.mkdir()
    (start / "compression.json").write_text(json.dumps({"baseline": STOCK, "method": "joint"}))
    started = {"baseline": None, "compressed": str(start)}
    results(family="compressed-lora", settings=started).write(run)
    assert History.read(run).recipe == {"baseline": STOCK, "method": "joint"}
    results(family="compressed-lora", settings=started | {"compressed": "me/tiny"}).write(run)
    assert History.read(run).recipe == {"baseline": "me/tiny", "method": None}
    assert History.read(start).results is None
    assert "Made from [me/tiny](/me/tiny). Trained" in card(History.read(run), base_model="me/tiny").text


def test_the_version_of_transformers_that_a_card_asks_for_is_the_packages():
    [needed] = re.findall(r"transformers>=([\d.]+)", (Path(__file__).parents[2] / "setup.cfg").read_text())
    assert needed == TRANSFORMERS
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["wte"]}
    for text in (card(History(RECIPE, None)), adapter_card("me/a-lora", "me/a", lora, History(RECIPE, RESULTS))):
        assert f"`transformers` {needed} or later" in str(text)
