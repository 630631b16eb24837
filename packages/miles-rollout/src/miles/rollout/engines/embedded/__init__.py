"""The embedded engine: SGLang's HTTP protocol on a CPU, with torch and nothing else.

``python -m miles.rollout.engines.embedded --model-path DIR --host HOST --port PORT`` serves a checkpoint.
"""
