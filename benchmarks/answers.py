"""What causal models answer to plain questions, and how fast: the first is what the others are compared with.

`python benchmarks/answers.py --models SMOLLM2 model_weights/gpt_coded_nofinetune_b1.75`: greedy, in turns in one run.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from side_by_side import DEVICE, machine, measure_in_turns, now, print_table, ratios
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorized_gpt2.cli.shell import run_command
from factorized_gpt2.models.loading import load_causal_lm
from factorized_gpt2.settings.parsing import ManualParser
from factorized_gpt2.text.tokenizers import load_tokenizer

QUESTIONS = [
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write one sentence about a cat that is afraid of mice.",
]


@dataclass
class AnswersArguments:
    """Who is asked what."""

    models: list[str] = field(metadata={"help": "Folders; the first is compared with. Tokenizers are their own."})
    questions: list[str] = field(default_factory=lambda: QUESTIONS, metadata={"help": "Each is a conversation."})
    tokens: int = field(default=40, metadata={"help": "New tokens of an answer at most, and of a timed run."})
    rounds: int = field(default=7, metadata={"help": "Timed runs."})
    device: str = field(default=DEVICE, metadata={"help": "Where to run.", "choices": ["cpu", "cuda"]})


@torch.no_grad()
def main(argv: list[str]) -> None:
    """Print a table of speeds and sizes, then every answer."""
    arguments = ManualParser(AnswersArguments, prog="answers.py", description=__doc__).parse(argv)[0]
    print(f"{machine(device=arguments.device)}; {arguments.tokens} new tokens, batch 1\n", flush=True)
    models = {name: load_causal_lm(name).eval().to(arguments.device) for name in arguments.models}
    tokenizers = {name: load_tokenizer(name) for name in models}
    timed = {name: _timed(models[name], tokenizers[name], arguments) for name in models}
    seconds = measure_in_turns(timed, arguments.rounds)
    first = seconds[arguments.models[0]]
    rows = [
        {
            "tokens a second": f"{arguments.tokens / statistics.median(measured):.1f}",
            "this / the first": ratios(first, measured),
            "files, MB": f"{sum(path.stat().st_size for path in Path(name).glob('*.safetensors')) / 1e6:.1f}",
            "model": Path(name).name,
        }
        for name, measured in seconds.items()
    ]
    print_table(rows)
    for question in arguments.questions:
        print(f"\n**{question}**\n")
        for name in models:
            print(f"- {Path(name).name}: {_answer(models[name], tokenizers[name], question, arguments.tokens)}")


def _timed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: AnswersArguments
) -> Callable[[], float]:
    prompt = _prompt(tokenizer, arguments.questions[0]).to(model.device)

    def run() -> float:
        began = now()
        options = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        return now() - began

    return run


def _prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> torch.Tensor:
    """Write a question as the model's chat template has it, or plainly where there is none; (1, T) int64."""
    if not tokenizer.chat_template:
        return tokenizer(question, return_tensors="pt")["input_ids"]
    conversation = [{"role": "user", "content": question}]
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    return tokenizer.apply_chat_template(conversation, **options)["input_ids"]


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int) -> str:
    prompt = _prompt(tokenizer, question).to(model.device)
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    return " ".join(tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True).split())


if __name__ == "__main__":
    sys.exit(run_command(main))
