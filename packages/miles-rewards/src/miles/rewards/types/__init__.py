"""The reward types of this package, one per file.  A file imports what is heavy only when it grades."""
