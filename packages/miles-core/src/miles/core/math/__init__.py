"""Loss mathematics: pure functions of tensors and numbers.

Everything is elementwise over packed response tokens; reduction is a separate call that is given its denominators.
Capital suffixes name dimensions: S = samples, T = response tokens of all samples, one sample after another,
V = vocabulary, D = hidden size.  Log-probabilities are natural logarithms.
"""
