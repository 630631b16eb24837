"""The loop, and where its parts run."""
