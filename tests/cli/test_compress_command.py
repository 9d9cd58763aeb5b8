"""`compress.py` beyond PCA: methods that read text, refinement, ranks chosen for the user, what is left behind."""

import json
import re

import pytest
import torch
from matplotlib import image

from factorized_gpt2 import FactorizedGPT2
from factorized_gpt2.cli import compressing
from factorized_gpt2.cli.compress import compress
from factorized_gpt2.cli.compress_settings import CalibrationArguments
from factorized_gpt2.cli.evaluate import evaluate
from factorized_gpt2.common.errors import UserError
from factorized_gpt2.runs.results import Results
from factorized_gpt2.runs.run import run_experiment
from factorized_gpt2.runs.settings import parse_run
from factorized_gpt2.settings.text_arguments import EvaluationArguments

WIDTH, BLOCK_SIZE = 32, 48


def train_words(corpus, output_dir, *rest) -> list[str]:
    text = ["--train_file", corpus / "train.jsonl", "--validation_file", corpus / "validation.jsonl"]
    quiet = ["--report_to", "none", "--save_strategy", "no", "--block_size", 16, "--disable_tqdm", True]
    return [str(word) for word in [*text, *quiet, "--output_dir", output_dir, *rest]]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, corpus):
    """Train a model, so that compression costs something."""
    folder = tmp_path_factory.mktemp("command") / "gpt_baseline"
    shape = ["--n_layer", 1, "--n_head", 2, "--n_embd", WIDTH, "--tokenizer", corpus / "tokenizer"]
    train = ["--do_train", True, "--max_steps", 60, "--learning_rate", "1e-2", "--block_size", BLOCK_SIZE]
    run_experiment(parse_run(train_words(corpus, folder, *shape, *train)))
    return folder


@pytest.fixture
def words(baseline, corpus, tmp_path):
    """Make the command's words: the baseline, where to write, and what else is asked."""
    calibration = ["--calibration_file", corpus / "train.jsonl", "--calibration_tokens", 480]
    evaluation = ["--eval_file", corpus / "validation.jsonl"]
    parts = {"calibration": calibration, "evaluation": evaluation}

    def make(*rest, texts=("calibration",)):
        text = [word for name in texts for word in parts[name]]
        return [str(word) for word in ["--baseline", baseline, "--output_dir", tmp_path, *text, *rest]]

    return make


def record(folder) -> dict:
    return json.loads((folder / "compression.json").read_text())


def weights(folder) -> dict[str, torch.Tensor]:
    return FactorizedGPT2.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("method", ["weighted", "joint", "tokenwise"])
def test_methods_that_read_text(words, tmp_path, corpus, method, drawn_pictures):
    compress(words("--ranks", 4, 9, "--method", method))
    folder = tmp_path / f"gpt_{method}_nofinetune_k4"
    written = record(folder)
    assert written["method"] == method
    assert written["n_embd_wte"] == 4
    assert written["seed"] == 0
    assert written["calibration"]["text"] == str(corpus / "train.jsonl")
    assert written["calibration"]["tokens"] == 480
    assert written["calibration"]["block_size"] == BLOCK_SIZE
    assert 0 < written["explained_share"] < record(tmp_path / f"gpt_{method}_nofinetune_k9")["explained_share"]
    assert "explained_variance_ratio" not in written
    model = FactorizedGPT2.from_pretrained(folder)
    assert model.config.n_embd_wte == 4
    assert model.config.tie_word_embeddings
    assert not list(tmp_path.glob("*_factorized"))
    assert image.imread(tmp_path / f"spectrum_{method}.png").std() > 0
    assert not (tmp_path / f"loss_against_bytes_{method}.png").exists()


def test_refinement_brings_the_model_nearer(words, tmp_path, capsys):
    for method in ("pca", "tokenwise"):
        losses = []
        for steps in (0, 30):
            texts = ("calibration", "evaluation") if steps or method != "pca" else ("evaluation",)
            compress(words("--ranks", 3, "--method", method, "--refine", steps, texts=texts))
            losses.append(float(capsys.readouterr().out.splitlines()[-1].split()[-4]))
        assert losses[1] < losses[0] - 0.01
        assert record(tmp_path / f"gpt_{method}_refined_k3")["refine_steps"] == 30
        plots = {path.name for path in tmp_path.glob(f"loss_against_bytes_{method}*.png")}
        assert plots == {f"loss_against_bytes_{method}.png", f"loss_against_bytes_{method}_refined.png"}


def test_an_untied_model_has_a_head_of_its_own(words, tmp_path):
    compress(words("--ranks", 5, "--method", "tokenwise", "--tie_word_embeddings", "false"))
    compress(words("--ranks", 5, "--tie_word_embeddings", "false", texts=()))
    for method in ("tokenwise", "pca"):
        model = FactorizedGPT2.from_pretrained(tmp_path / f"gpt_{method}_untied_nofinetune_k5")
        assert not model.config.tie_word_embeddings
        assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight) or method == "pca"


def test_what_was_made_in_the_same_way_is_reused(words, tmp_path):
    asked = words("--ranks", 4, "--method", "joint")
    compress(asked)
    path = tmp_path / "gpt_joint_nofinetune_k4/model.safetensors"
    written = path.stat().st_mtime_ns
    compress(asked)
    assert path.stat().st_mtime_ns == written
    for other in (["--seed", 1], ["--calibration_tokens", 96]):
        with pytest.raises(UserError, match=f"made with another {'seed' if '--seed' in other else 'calibration'}"):
            compress([*asked, *map(str, other)])
    for name in ("notes.txt", "mine/chapter.tex", "results.json"):
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_text("{}")
    compress([*asked, "--seed", "1", "--overwrite"])
    assert record(path.parent)["seed"] == 1
    assert (path.parent / "notes.txt").exists()
    assert (path.parent / "mine/chapter.tex").exists()
    assert not (path.parent / "results.json").exists()  # of a run that evaluated what was there before


def test_a_share_under_its_name_of_the_last_release_is_read_and_its_new_name_said(words, tmp_path, caplog, capsys):
    asked = words("--ranks", 4, "--method", "joint")
    compress(asked)
    table = capsys.readouterr().out
    path = tmp_path / "gpt_joint_nofinetune_k4/compression.json"
    old = json.loads(path.read_text())
    old["explained_variance_ratio"] = old.pop("explained_share")
    for name in ("weights_fingerprint", "baseline_content"):  # which it did not have
        del old[name]
    path.write_text(json.dumps(old))
    compress(asked)
    assert capsys.readouterr().out == table
    (said,) = [message for message in caplog.messages if "explained_variance_ratio" in message]
    assert "it is explained_share now" in said


def test_the_same_seed_gives_the_same_model(words, tmp_path):
    asked = words("--ranks", 4, "--method", "tokenwise", "--refine", 3)
    compress(asked)
    first = weights(tmp_path / "gpt_tokenwise_refined_k4")
    compress([*asked, "--output_dir", str(tmp_path / "again")])
    second = weights(tmp_path / "again/gpt_tokenwise_refined_k4")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_rank_for_a_loss(words, tmp_path, capsys, drawn_pictures):
    compress(words("--target_loss_increase", 0.3, texts=("evaluation",)))
    out = capsys.readouterr().out
    tried = {int(rank): float(increase) for rank, increase in re.findall(r"^k = (\d+): (\S+) nats", out, re.MULTILINE)}
    chosen = [path for path in tmp_path.iterdir() if path.name.startswith("gpt_")]
    assert len(chosen) == 1
    rank = record(chosen[0])["n_embd_wte"]
    assert tried[rank] <= 0.3
    assert tried[rank - 1] > 0.3
    assert len(tried) < 12
    assert image.imread(tmp_path / "loss_against_bytes_pca.png").std() > 0


def test_the_rank_for_a_share_of_the_variance(words, tmp_path):
    compress(words("--explained_variance", 0.7, texts=()))
    (folder,) = tmp_path.glob("gpt_*")
    written = record(folder)
    assert written["explained_variance_ratio"] >= 0.7
    compress(words("--ranks", written["n_embd_wte"] - 1, texts=()))
    below = record(tmp_path / folder.name.replace(f"k{written['n_embd_wte']}", f"k{written['n_embd_wte'] - 1}"))
    assert below["explained_variance_ratio"] < 0.7


def test_a_model_is_said_to_be_reused_only_if_it_was_there_before(words, caplog):
    asked = words("--target_loss_increase", 0.3, texts=("evaluation",))
    for expected in (0, 1):
        caplog.clear()
        with caplog.at_level("INFO"):
            compress(asked)
        chosen = [line for line in caplog.messages if "was made in this way before and is reused" in line]
        assert len(chosen) == expected


@pytest.mark.parametrize(("method", "title"), [("pca", "variance"), ("tokenwise", "share")])
def test_the_column_of_a_share_says_what_it_is_of(words, capsys, method, title):
    compress(words("--ranks", 4, "--method", method, texts=("calibration",) if method != "pca" else ()))
    assert capsys.readouterr().out.split()[:3] == ["k", title, "parameters"]


def test_the_spectrum_shows_every_rank_that_is_there(words, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        compressing, "plot_spectrum", lambda shares, ranks, method, path: drawn.append((ranks, path.name))
    )
    compress(words("--ranks", 4, texts=()))
    compress(words("--ranks", 9, 6, texts=()))
    compress(words("--ranks", 5, "--method", "joint"))
    compress(words("--ranks", 7, "--method", "joint", "--seed", 1))
    compress(words("--ranks", 5, "--method", "joint", "--seed", 1, "--overwrite"))
    joint = "spectrum_joint.png"
    assert drawn == [
        ([4], "spectrum_pca.png"),
        ([4, 6, 9], "spectrum_pca.png"),
        *(([5], joint), ([7], joint), ([5, 7], joint)),
    ]


def test_loss_against_bytes_shows_every_rank_that_was_measured_on_the_same_text(words, tmp_path, corpus, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        compressing,
        "plot_loss_against_bytes",
        lambda points, size, labelled, label, path: drawn.append((sorted(rank for *_, rank in points), labelled)),
    )
    evaluated = ("evaluation",)
    compress(words("--ranks", 4, texts=evaluated))
    compress(words("--ranks", 9, texts=evaluated))
    compress(words("--ranks", 6, texts=()))
    compress(words("--ranks", 5, "--block_size", 16, texts=evaluated))
    compress(words("--ranks", 7, "--eval_file", corpus / "train.jsonl", texts=()))
    compress(words("--ranks", 8, texts=evaluated))
    ranks = [
        ([4], [4]),
        ([4, 9], [4, 9]),
        ([5], [4, 5, 6, 9]),
        ([7], [4, 5, 6, 7, 9]),
        ([4, 8, 9], [4, 5, 6, 7, 8, 9]),
    ]
    assert drawn == [tuple([f"k = {rank}" for rank in shown] for shown in call) for call in ranks]
    measured = [set(record(path)["measurements"]) for path in sorted(tmp_path.glob("gpt_*_k[478]"))]
    assert measured[0] == measured[2] != measured[1]
    assert "measurements" not in record(tmp_path / "gpt_pca_nofinetune_k6")


@pytest.mark.parametrize(
    ("rest", "texts", "complaint"),
    [
        ([], (), "Set one of ranks, bits_per_weight, vocabulary_mb, target_loss_increase"),
        (["--ranks", 4, "--explained_variance", 0.5], (), "Set one of ranks"),
        (
            ["--explained_variance", 0.5, "--method", "tokenwise"],
            ("calibration",),
            "works with method pca only; with method tokenwise set target_loss_increase",
        ),
        (["--explained_variance", 1.5], (), r"must lie in \(0, 1\], got 1.5"),
        (["--explained_variance", 1.0], (), f"needs the full width of {WIDTH}"),
        (["--target_loss_increase", 0.1], (), "needs text to evaluate on"),
        (["--target_loss_increase", -0.1], ("evaluation",), "must be positive"),
        (["--target_loss_increase", 1e-9], ("evaluation",), f"Even rank {WIDTH - 1} costs"),
        (["--ranks", 4, "--method", "joint"], (), "method joint learns from text"),
        (["--ranks", 4, "--refine", 5], ("evaluation",), "refinement learns from text"),
        (["--ranks", 4, "--refine", -1], (), "refine must not be negative"),
        (["--ranks", 4], ("calibration",), "calibration_file has no effect"),
        (["--ranks", 4, "--method", "svd"], (), "method.*invalid choice: 'svd'"),
        (
            ["--ranks", 4, "--method", "joint", "--calibration_tokens", 0],
            ("calibration",),
            "must be at least 1, got 0",
        ),
    ],
)
def test_bad_requests(words, tmp_path, rest, texts, complaint):
    with pytest.raises(UserError, match=complaint):
        compress(words(*rest, texts=texts))
    assert not list(tmp_path.glob("gpt_*"))


@pytest.fixture
def compressed(words, tmp_path):
    compress(words("--ranks", 6, "--method", "tokenwise"))
    return tmp_path / "gpt_tokenwise_nofinetune_k6"


def test_a_run_is_named_after_the_refinement_of_its_start(words, tmp_path, corpus):
    compress(words("--ranks", 3, "--method", "tokenwise", "--refine", 2))
    start = ["--compressed", tmp_path / "gpt_tokenwise_refined_k3", "--do_train", False]
    results = run_experiment(parse_run(train_words(corpus, tmp_path / "run", *start)))
    assert (results.family, results.run_name) == ("tokenwise-refined-nofinetune", "tokenwise-refined-nofinetune-k3")
    assert results.bits_per_weight is None


def test_training_starts_from_a_compressed_model_and_learns_from_its_baseline(
    baseline, compressed, words, tmp_path, corpus, capsys
):
    start = ["--compressed", compressed, "--lora_rank", 2]
    train = ["--do_train", True, "--max_steps", 2, "--distillation_weight", 0.5, "--learning_rate", "1e-3"]
    results = run_experiment(parse_run(train_words(corpus, tmp_path / "run", *start, *train)))
    assert results.family == "tokenwise-lora"
    assert results.run_name == "tokenwise-lora-k6-r2"
    assert results.n_embd_wte == 6
    adapter = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(compressed)
    assert results.content["made_from"] == results.content["teacher"] == Results.read(baseline).content["model"]
    run_experiment(parse_run(train_words(corpus, compressed, "--compressed", compressed)))
    compress(words("--ranks", 6, "--method", "tokenwise"))  # evaluated where it is, it is still what was made
    unchanged = run_experiment(parse_run(train_words(corpus, tmp_path / "eval", "--compressed", compressed)))
    evaluate(["--models", str(compressed), "--eval_file", str(corpus / "validation.jsonl"), "--block_size", "16"])
    assert f"{unchanged.eval_loss:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        (["--n_embd_wte", 4], "n_embd_wte contradicts compressed"),
        (["--baseline", "b"], "baseline contradicts compressed"),
        (["--n_layer", 4], "n_layer contradicts"),
    ],
)
def test_contradictions_of_a_compressed_start(compressed, tmp_path, corpus, rest, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_run(train_words(corpus, tmp_path / "run", "--compressed", compressed, *rest))


def test_an_unfactorized_model_is_no_compressed_one(baseline, tmp_path, corpus):
    run = parse_run(train_words(corpus, tmp_path / "run", "--compressed", baseline))
    with pytest.raises(UserError, match="is not factorized"):
        run_experiment(run)


def test_a_compressed_model_without_a_record_needs_a_named_teacher(compressed, tmp_path, corpus):
    (compressed / "compression.json").unlink()
    train = ["--do_train", True, "--max_steps", 1, "--distillation_weight", 0.5]
    run = parse_run(train_words(corpus, tmp_path / "run", "--compressed", compressed, *train))
    with pytest.raises(UserError, match="does not say what it was compressed from"):
        run_experiment(run)


def test_the_result_for_programs_is_the_table_unrounded(words, tmp_path, corpus, capsys):
    path = tmp_path / "out/result.json"
    compress(words("--ranks", 4, 9, "--json", path, texts=("evaluation",)))
    result = json.loads(path.read_text())
    assert (result["command"], result["method"]) == ("compress", "pca")
    assert result["text"] == str(corpus / "validation.jsonl")
    assert {"python", "torch", "transformers"} <= result["versions"].keys()
    assert [row["rank"] for row in result["rows"]] == [None, 9, 4]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    for row, cells in zip(result["rows"], printed, strict=True):
        assert f"{row['loss']:.4f}" == cells[-4]
        assert f"{row['perplexity']:.2f}" == cells[-3]
        assert f"{row['loss_increase']:+.4f}" == cells[-2]
        assert row["folder"] == cells[-1]
        assert f"{row['parameters']:,}" in cells
        assert row["bytes"] == 4 * row["parameters"]
        assert row["vocabulary_bytes"] == 4 * row["vocabulary_parameters"]
    assert (
        result["rows"][1]["explained_share"] == record(tmp_path / "gpt_pca_nofinetune_k9")["explained_variance_ratio"]
    )
    compress(words("--ranks", 4, "--json", path, texts=()))
    assert [row["loss"] for row in json.loads(path.read_text())["rows"]] == [None, None]


@pytest.mark.parametrize("place", [".", "/dev/null"])
def test_a_result_is_written_to_a_file_alone(words, place):
    with pytest.raises(UserError, match=f"json={place} is not a regular file"):
        compress(words("--ranks", 4, "--json", place, texts=()))


def test_calibration_text_and_evaluation_text_have_columns_of_their_own(words, corpus, tmp_path):
    renamed = tmp_path / "train.jsonl"
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    renamed.write_text("".join(json.dumps({"content": row["text"]}) + "\n" for row in rows))
    asked = ["--ranks", 4, "--method", "weighted", "--calibration_tokens", 480]
    compress(
        words(*asked, "--calibration_file", renamed, "--calibration_text_column", "content", texts=("evaluation",))
    )
    compress(words(*asked, "--output_dir", tmp_path / "same"))
    first, second = (record(root / "gpt_weighted_nofinetune_k4") for root in (tmp_path, tmp_path / "same"))
    assert first["calibration"]["fingerprint"] == second["calibration"]["fingerprint"]


def test_where_calibration_text_comes_from():
    evaluation = EvaluationArguments(dataset_name="e", dataset_config_name="c", dataset_document_start="=")
    assert CalibrationArguments().source(EvaluationArguments()) is None
    shared = CalibrationArguments().source(evaluation)
    assert (shared.dataset_name, shared.dataset_config_name, shared.split) == ("e", "c", "train")
    assert shared.document_start == "="
    own = CalibrationArguments(calibration_dataset_name="d", calibration_text_column="content").source(evaluation)
    assert (own.dataset_name, own.dataset_config_name, own.text_column) == ("d", None, "content")
    assert own.document_start is None
    with pytest.raises(UserError, match=r"^calibration_document_start='\(' is not a regular expression"):
        CalibrationArguments(calibration_document_start="(")


def test_a_run_says_where_it_leaves_the_compressed_baseline(baseline, corpus, tmp_path, caplog):
    caplog.set_level("INFO", "factorized_gpt2")
    words = train_words(corpus, tmp_path / "run", "--baseline", baseline, "--n_embd_wte", 4)
    run_experiment(parse_run(words))
    said = f"beside the run's folder, for other runs to start from: {tmp_path / 'gpt_pca_nofinetune_k4'}"
    assert caplog.text.count(said) == 1
