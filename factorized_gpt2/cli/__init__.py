"""Commands: what each does, in order. Nothing below imports them."""
