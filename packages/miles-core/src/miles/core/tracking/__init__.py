"""Where a run's metrics go: ``metrics.jsonl``, the console, TensorBoard, W&B."""
