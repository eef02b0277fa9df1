"""Data: sources -> documents -> token files -> batches addressed by their step."""
