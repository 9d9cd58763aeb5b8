#!/usr/bin/env python
"""Train, fine-tune with LoRA or evaluate a GPT-2 with a factorized vocabulary: see `--help` and README.md."""

from factorized_gpt2.cli.train import main

if __name__ == "__main__":
    main()
