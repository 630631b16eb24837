"""Tools that a model may call while it generates: definitions, execution, and the tokens of their answers."""
