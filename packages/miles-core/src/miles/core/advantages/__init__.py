"""From rewards to advantages: how much better each token did than expected.  Pure functions."""
