"""The commands, one module each; `shell` is what they share. Nothing imports from here."""
