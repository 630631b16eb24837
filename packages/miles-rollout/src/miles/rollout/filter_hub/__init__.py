"""Filters that come with Miles, reachable by name (``miles.filters``) and by dotted path."""
