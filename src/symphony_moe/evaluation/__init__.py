"""Losses, routing, likeness of experts, benchmarks."""
