#!/usr/bin/env python
"""Train, fine-tune with LoRA or evaluate a GPT-2 or another decoder with a factorized vocabulary: see `--help`."""

from factorized_gpt2.cli.train import main

if __name__ == "__main__":
    main()
