"""`python -m factorized_gpt2`: which commands there are."""

from .settings.command_names import listing

if __name__ == "__main__":
    print(listing())  # noqa: T201
