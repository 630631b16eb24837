"""Engines: HTTP servers that speak SGLang's protocol."""
