"""The SGLang server, which lives in a Python environment of its own."""
