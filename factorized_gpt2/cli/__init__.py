"""Commands: what each does, in order. Nothing imports them but the scripts at the top."""
