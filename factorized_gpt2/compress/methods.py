"""The ways to factorize a vocabulary, by name. Nothing is imported here, so that a command can list them at once."""

DATA_AWARE_METHODS = ("weighted", "joint", "tokenwise")
METHODS = ("pca", *DATA_AWARE_METHODS)  # at ranks
CODED = "coded"  # at budgets of bytes
