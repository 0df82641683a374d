"""Several checkpoints of one model family -> one Mixture-of-Experts checkpoint.

`symphony_moe.pipeline` is the main path; `symphony_moe.cli` the command `symphony`.
"""

__version__ = "0.1.0"
