"""Stage 1: from sources to a checkpoint, without training."""
