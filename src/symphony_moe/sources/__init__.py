"""The checkpoints that go in: opened, read, compared."""
