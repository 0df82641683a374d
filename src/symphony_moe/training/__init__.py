"""Stage 2: from a checkpoint to a trained one."""
