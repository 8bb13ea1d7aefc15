"""Prompt search on a real model: each engine with the same fixed bank of parts, where the answer's form matters."""
