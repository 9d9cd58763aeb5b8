"""Vocabulary matrices as entropy-coded integers. Arrays in and out: numpy, no model, no files."""
