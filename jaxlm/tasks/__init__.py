"""Tasks: how rows become a batch, which loss weights they get, which metrics come out."""
