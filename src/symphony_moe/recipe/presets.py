"""What each `method` stands for: values for the sections of a recipe."""

_Sections = dict[str, dict[str, str | int | float]]

_PLAIN_MEAN: _Sections = {
    "backbone": {"attention": "linear", "embeddings": "selective-linear", "norms": "linear"},
    "align": {"residual": "none", "heads": "none", "neurons": "none"},
    "experts": {"init": "source"},
    "fit": {"method": "none"},
    "router": {"init": "random"},
}

PRESETS: dict[str, _Sections] = {
    "symphony": {
        "backbone": {"attention": "slerp", "embeddings": "selective-linear", "norms": "linear"},
        "align": {"residual": "none", "heads": "none", "neurons": "activations"},
        "experts": {"init": "source"},
        "fit": {"method": "none"},
        "router": {"init": "random"},
    },
    "harmonized": {
        "calibration": {"windows": "coverage"},
        "backbone": {"attention": "linear", "embeddings": "selective-linear", "norms": "linear"},
        "align": {"residual": "orthogonal", "heads": "all", "neurons": "auto"},
        "experts": {"init": "source"},
        "fit": {"method": "least-squares"},
        "router": {"init": "regression"},
    },
    "btx": _PLAIN_MEAN,
    "bam": _PLAIN_MEAN | {"experts": {"init": "source", "attention": "source"}},
    "drop-upcycling": _PLAIN_MEAN | {"experts": {"init": "drop"}},
    "sparse-upcycling": _PLAIN_MEAN
    | {
        "backbone": {
            "attention": "anchor",
            "embeddings": "anchor",
            "norms": "anchor",
            "ffn": "anchor",
        },
        "experts": {"init": "copy"},
    },
    "dume": _PLAIN_MEAN | {"router": {"init": "ridge", "top_k": 1, "temperature": 0.1}},
}
"""method -> section -> setting. The paper's method, the project's own, the paper's baselines
(appendix), and DUME (arXiv 2603.29765)."""
