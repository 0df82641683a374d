"""docs/how-to/fine-tune.md: its code, run as it stands on trained models, leaves whole models."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import VARIANTS
from models import make_trained
from pages import ask, blocks, changed, follow

pytestmark = pytest.mark.client

PAGE = "fine-tune.md"
TO_ADAPT, TO_MERGE = "LoRA on attention and experts", "Merge the LoRA"
TO_TRAIN, TO_LEAVE_OUT = "Train all weights", "Without `lm_head.bias`"
OTHERS = "granitemoe and jetmoe"
THETA = 1e6
"""Not 1e4, which readers take where they find none."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mistral", {}),
    # Tied, its rotations scaled, in the dtype that a build has by default.
    "mixtral in bfloat16": ("llama-tied-rope3", {"output": {"dtype": "bfloat16"}}),
    "ernie4_5_moe": ("qwen2", {}),
    "qwen3_moe": ("qwen3", {}),
    "granitemoe": ("qwen2", {"output": {"architecture": "granitemoe"}}),
    "jetmoe": ("llama", {"method": "bam"}),
}
"""name -> variant of the sources, sections of the recipe."""
LACKED = ["o_proj.bias", "e_score_correction_bias", "lm_head.bias"]
"""Ends of the names of tensors that Qwen2 lacks."""
LEARNS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
LEARNS |= {"mlp.experts", "mlp.experts.base_layer"}
JETMOE_LEARNS = {"self_attention.kv_proj"} | {
    f"{part}.{linear}_linear"
    for part in ("self_attention.experts", "mlp")
    for linear in ("input", "output")
}
JETMOE_NAMES = {
    '"q_proj", "k_proj", "v_proj", "o_proj"': '"kv_proj"',
    '"experts.gate_up_proj", "experts.down_proj"': '"input_linear.weight", "output_linear.weight"',
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name of MODELS -> a folder with `run/trained` and `text.jsonl`, made once. Nobody changes
    what is in there."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            variant, sections = MODELS[name]
            made[name] = make(tmp_path_factory.mktemp("trained"), variant, sections)
        return made[name]

    return get


def make(root: Path, variant: str, sections: dict[str, Any]) -> Path:
    """A trained model that readers with a base of RoPE of their own misread."""
    rope = VARIANTS[variant].get("rope_parameters", {"rope_type": "default"})
    changes = {"rope_parameters": rope | {"rope_theta": THETA}}
    return make_trained(root, variant, changes, **sections)


@pytest.fixture(params=MODELS)
def root(request: pytest.FixtureRequest, trained: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder for each of MODELS, as the page's reader has it."""
    return copy(trained(request.param), tmp_path)


def copy(made: Path, to: Path) -> Path:
    shutil.copytree(made / "run" / "trained", to / "run" / "trained")
    shutil.copy(made / "text.jsonl", to / "text.jsonl")
    return to


def saving() -> str:
    """The page's function `save`, without its first use."""
    (block,) = blocks(PAGE, TO_MERGE)
    return block[: block.index("\nmodel = ")]


def for_class(block: str, model_type: str) -> str:
    """A training of the page with what it says of two classes."""
    changes = {}
    if model_type in ("granitemoe", "jetmoe"):
        (first,) = blocks(PAGE, OTHERS)
        changes["\ntrainer = "] = f"\n{first}trainer = "
    if model_type == "jetmoe":
        changes['"work", '] = '"work", gradient_checkpointing=False, '
    return changed(block, changes)


def ask_tuned(root: Path, after: str, **more: str) -> dict[str, Any]:
    """What a folder is beside `run/trained`."""
    paths = {"before": "run/trained", "after": after, "text": "text.jsonl", **more}
    request: dict[str, Any] = {name: str(root / path) for name, path in paths.items()}
    return ask("tune", "ask_tuned.py", root, request | {"zero": LACKED})


def tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """name -> dtype and shape of every tensor in a model folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a handle, not a dict)
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def places(learned: Iterable[str]) -> set[str]:
    """Where in a layer a LoRA is. Two parameters of one module are wrapped one in the other."""
    found = {re.sub(r"^.*?\.layers\.\d+\.|\.lora_B.*$", "", name) for name in learned}
    return {name.replace("block_sparse_moe.", "mlp.") for name in found}


def require_whole(folder: Path, of: Path) -> None:
    """The folder has what `of` has, and readers of every age find RoPE's base in it."""
    assert tensors(folder) == tensors(of)
    assert config(folder) == config(of)
    assert config(folder)["rope_theta"] == THETA
    assert {file.name for file in of.iterdir()} == {file.name for file in folder.iterdir()}


def require_better(said: dict[str, Any]) -> None:
    assert said["info"] == {}, "does not load cleanly"
    assert said["loss"]["after"] < said["loss"]["before"] - 0.05


def require_zeros(said: dict[str, Any], root: Path) -> None:
    """What Qwen2 lacks is there and has stayed zero."""
    of_qwen2 = config(root / "run" / "trained")["model_type"] in ("ernie4_5_moe", "granitemoe")
    assert (len(said["zero"]) > 0) == of_qwen2
    assert all(said["zero"].values())


def test_a_lora_of_attention_and_experts_merges_into_a_whole_model(root: Path) -> None:
    model = config(root / "run" / "trained")
    jetmoe = model["model_type"] == "jetmoe"
    (adapt,) = blocks(PAGE, TO_ADAPT)
    adapt = changed(for_class(adapt, model["model_type"]), JETMOE_NAMES if jetmoe else {})
    follow("tune", root, [adapt, *blocks(PAGE, TO_MERGE)])
    said = ask_tuned(root, "merged", adapter="lora")
    print(said)
    require_whole(root / "merged", root / "run" / "trained")
    require_better(said)
    require_zeros(said, root)
    assert places(said["learned"]) == (JETMOE_LEARNS if jetmoe else LEARNS)
    assert min(said["learned"].values()) > 0
    if model["dtype"] == "bfloat16":
        # Rounding sends a few tokens to another expert: their logits differ as experts do.
        assert said["difference"]["mean"] < 0.05 * said["moved"]["mean"]
    else:
        assert said["difference"]["largest"] < 1e-4 < 1e-3 * said["moved"]["largest"]


def test_all_weights_train_into_a_whole_model(root: Path) -> None:
    (train,) = blocks(PAGE, TO_TRAIN)
    train = for_class(train, config(root / "run" / "trained")["model_type"])
    history = follow("tune", root, [saving(), train])
    said = ask_tuned(root, "tuned")
    print(said)
    require_whole(root / "tuned", root / "run" / "trained")
    require_better(said)
    require_zeros(said, root)
    steps = [entry for entry in history if "loss" in entry]
    assert steps and all("aux_loss" in entry for entry in steps)


def test_the_balance_loss_can_be_off(trained: Callable[[str], Path], tmp_path: Path) -> None:
    root = copy(trained("ernie4_5_moe"), tmp_path)
    (train,) = blocks(PAGE, TO_TRAIN)
    train = changed(train, {"router_aux_loss_coef=0.01": "router_aux_loss_coef=0.0"})
    history = follow("tune", root, [saving(), train])
    require_whole(root / "tuned", root / "run" / "trained")
    require_better(ask_tuned(root, "tuned"))
    steps = [entry for entry in history if "loss" in entry]
    assert steps and not any("aux_loss" in entry for entry in steps)


def test_what_the_page_takes_care_of_is_still_needed(
    trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """Without it, RoPE's base is gone, and Ernie learns a bias that engines do not read."""
    root = copy(trained("ernie4_5_moe"), tmp_path)
    (train,) = blocks(PAGE, TO_TRAIN)
    train = changed(
        train,
        {
            "parameter.requires_grad_(False)": "pass",
            'save(model, "tuned")': 'model.save_pretrained("tuned")',
        },
    )
    follow("tune", root, [train])
    assert not config(root / "tuned").keys() & {"rope_theta", "rope_scaling"}
    assert config(root / "tuned")["rope_parameters"]["rope_theta"] == THETA
    zero = ask_tuned(root, "tuned")["zero"]
    assert zero and not any(same for name, same in zero.items() if name.endswith("o_proj.bias"))


def test_a_head_without_bias_stays_without(tmp_path: Path) -> None:
    made = make(tmp_path / "made", "qwen2", {"output": {"dtype": "float32", "head_bias": False}})
    root = copy(made, tmp_path / "root")
    (leave_out,) = blocks(PAGE, TO_LEAVE_OUT)
    load = (
        "from transformers import AutoModelForCausalLM\n"
        'model = AutoModelForCausalLM.from_pretrained("run/trained")\n'
        'model.save_pretrained("plain")'
    )
    follow("tune", root, [saving(), load, leave_out])
    assert tensors(root / "plain").keys() - tensors(root / "run/trained").keys() == {"lm_head.bias"}
    require_whole(root / "tuned", root / "run" / "trained")
    ours, theirs = (
        load_file(root / name / "model.safetensors") for name in ("tuned", "run/trained")
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_what_all_linear_reaches(trained: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT knows the experts of three classes by the names that they had in transformers 4."""
    folders = {name: str(trained(name) / "run" / "trained") for name in MODELS}
    said = ask("tune", "ask_all_linear.py", tmp_path, folders)
    attention = {name for name in LEARNS if name.startswith("self_attn.")}
    for name in ("mixtral", "ernie4_5_moe", "qwen3_moe"):
        assert places(said[name]) == LEARNS | {"mlp.gate"}
    assert places(said["granitemoe"]) == attention
    assert places(said["jetmoe"]) == {
        "self_attention.kv_proj",
        "self_attention.experts.router.layer",
        "mlp.router.layer",
    }
