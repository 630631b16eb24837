"""Runs inside SGLang's environment, where Miles is not installed: its server, started and fed by Miles."""
