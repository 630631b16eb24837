"""Model families.  Each module has the constants of its architecture and the rules of its weights."""
