"""Rules for sources under different RoPE theta, on the pair of `train_pairs.py` with equal tokens.

    python scripts/theta_rules.py --out pairs

Makes the llama pairs where they are not there, the code side under each rule, builds by three
methods, and prints held-out losses, chat and code, as Markdown. What is there already is kept.
"""

import argparse
import json
import shutil
from pathlib import Path

import lap
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from train_pairs import PAIRS, SHAPE, make_sources, symphony, write_recipe, write_text

FAMILY, CODE = "llama", "same tokens"
OWN, ANCHORS = PAIRS[FAMILY].codes[CODE].theta, PAIRS[FAMILY].chat.theta
HEAD_DIM = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
REACH = 64
"""Tokens over which two frequencies are compared."""
RULES = {
    "control: no difference": ("control", "chat"),
    "each source under its own theta, the anchor's written": ("same-tokens", "chat"),
    "each read under the anchor's theta": ("as-anchors", "chat"),
    "pairs moved to the nearest frequencies first": ("moved", "chat"),
    "each under its own, the code side's theta written": ("same-tokens", "code"),
}
"""Rule -> (folder of the code side, anchor)."""
METHODS = {
    "symphony": ("method=symphony",),
    "closed form": ("method=harmonized", "fit.epochs=0"),
    "4 epochs": ("method=harmonized", "fit.epochs=4"),
}


def frequencies(theta: float) -> Tensor:
    """Of a head's RoPE pairs, in radians per token."""
    half = HEAD_DIM // 2
    return torch.tensor([theta ** (-pair / half) for pair in range(half)])


def nearest_pairs(old: Tensor, new: Tensor) -> Tensor:
    """For each new frequency the pair whose old one is nearest, each pair once; beyond a turn of
    one radian over `REACH` tokens all are equally far. Several assignments are equally good where
    all old frequencies are lower: float32 decides, as it did for the lab log's row."""
    cost = ((old[:, None] - new[None, :]).abs() * REACH).clamp(max=1.0).double()
    _, _, chosen = lap.lapjv(cost.numpy())
    return torch.as_tensor(chosen).long()


def under_the_anchors(source: Path, folder: Path, order: Tensor | None) -> None:
    """A copy whose config says the anchor's theta; `order`: with the pairs of q and k moved."""
    if folder.is_dir():
        return
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    shutil.copytree(source, making)
    config = json.loads((making / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": ANCHORS}
    (making / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if order is not None:
        weights = load_file(making / "model.safetensors")
        for name, weight in weights.items():
            if "q_proj" in name or "k_proj" in name:
                pairs = weight.unflatten(0, (-1, 2, HEAD_DIM // 2))
                weights[name] = pairs[:, :, order].flatten(0, 2).contiguous()
        save_file(weights, making / "model.safetensors", {"format": "pt"})
    making.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("pairs"))
    parser.add_argument("--set", action="append", default=[], help="another setting")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    home = out / FAMILY
    write_text(out)
    make_sources(out, FAMILY)
    order = nearest_pairs(frequencies(OWN), frequencies(ANCHORS))
    under_the_anchors(home / "same-tokens", home / "as-anchors", None)
    under_the_anchors(home / "same-tokens", home / "moved", order)
    base = json.loads(write_recipe(out, FAMILY, CODE).read_text(encoding="utf-8"))

    alone, table = {}, []
    for rule, (folder, anchor) in RULES.items():
        recipe = base | {"anchor": anchor}
        recipe["sources"]["code"]["model"] = f"./{folder}"
        path = home / f"theta-{folder}-{anchor}.yaml"
        path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
        cells = []
        for method, settings in METHODS.items():
            run = home / "runs" / f"{path.stem}-{method.replace(' ', '-')}"
            sets = [word for setting in (*settings, *options.set) for word in ("--set", setting)]
            if not (run / "metrics.json").is_file():
                symphony("build", str(path), "--out", str(run), "--overwrite", *sets)
                symphony("evaluate", str(run))
            metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
            alone[folder] = metrics["sources"]["code"]["code"]
            cells.append(", ".join(f"{metrics['built'][name]:.3f}" for name in ("chat", "code")))
        table.append(f"| {rule} | {' | '.join(cells)} |")
    for folder, loss in alone.items():
        print(f"the code side itself, {folder}: {loss:.3f}")
    print(f"\n| rule | {' | '.join(METHODS)} |\n" + "|---" * (len(METHODS) + 1) + "|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
