"""The parts of `make bench`, each a module; `scripts/bench.py` runs them."""
