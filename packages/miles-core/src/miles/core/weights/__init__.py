"""Trainer to engine: named tensors in buckets, moved by a transport, proved by checksums."""
