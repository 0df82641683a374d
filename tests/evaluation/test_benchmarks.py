"""Benchmarks are what one would work out by hand, of tasks that were found to work before a model
was loaded; every mistake is one line. All tasks here are local: none needs the hub."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checks import add_tokens
from conftest import make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.cli import main
from symphony_moe.errors import RecipeError, RunFolderError
from symphony_moe.evaluation import benchmarks
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.runs.metrics import TaskResult

harness = pytest.importorskip("lm_eval.tasks", reason="needs the extra lm-eval")

Built = Callable[[str], RunFolder]

CHOICES = ["gamma", "delta beta", "eta"]
NUM_DOCUMENTS = 24

CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

WORDS = """
include: choice.yaml
task: own_words
output_type: generate_until
doc_to_choice: null
doc_to_target: "{{written}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

MEAN = """
group: own_mean
task: [own_choice, own_twice]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


def documents(**more: list[Any]) -> list[dict[str, Any]]:
    found = []
    for number in range(NUM_DOCUMENTS):
        question = f"alpha beta {number} theta"
        document = {"question": question, "choices": CHOICES, "answer": number % 3}
        found.append(document | {key: values[number] for key, values in more.items()})
    return found


def write_tasks(folder: Path, rows: list[dict[str, Any]], **files: str) -> Path:
    """A folder with `own_choice`, and further YAML files by name; data and cache beside it."""
    folder.mkdir(parents=True)
    data, cache = folder.parent / "data.jsonl", folder.parent / "cache"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"choice": CHOICE.format(data=data, cache=cache)} | files
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Tasks that work."""
    more = {"words": WORDS, "mean": MEAN, "twice": "include: choice.yaml\ntask: own_twice\n"}
    more["loose"] = "group: own_loose\ntask: [own_choice, own_words]\n"
    return write_tasks(tmp_path / "own", documents(written=["eta"] * NUM_DOCUMENTS), **more)


def load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def metrics_of(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name not in TaskResult.model_fields}


# Scores


@torch.inference_mode()
def accuracy_by_hand(folder: Path) -> float:
    """How often the right choice is the likeliest continuation."""
    model, tokenizer = load(folder)
    right = 0
    for document in documents():
        nats = []
        question = tokenizer(document["question"])["input_ids"]
        for choice in CHOICES:
            ids = tokenizer(f"{document['question']} {choice}")["input_ids"]
            assert ids[: len(question)] == question
            log_likelihood = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            places = range(len(question), len(ids))
            nats.append(sum(float(log_likelihood[place - 1, ids[place]]) for place in places))
        right += nats.index(max(nats)) == document["answer"]
    return right / NUM_DOCUMENTS


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_accuracy_is_that_by_hand(variant: str, built: Built, own: Path, tmp_path: Path) -> None:
    """Of the built model, whatever its architecture, and of each source."""
    shutil.copytree(built(variant).root, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    found = pipeline.evaluate_tasks(run, ["own_choice"], include=own, models=["sources", "built"])
    sources = run.read_recipe().sources
    folders = {name: Path(spec.model) for name, spec in sources.items()}
    expected = {n: accuracy_by_hand(f) for n, f in (folders | {"built": run.checkpoint}).items()}
    assert {name: found[name]["own_choice"]["acc"] for name in found} == expected
    assert len(set(expected.values())) > 1
    for name, share in expected.items():
        error = (share * (1 - share) / (NUM_DOCUMENTS - 1)) ** 0.5
        assert found[name]["own_choice"]["acc_stderr"] == pytest.approx(error)


@torch.inference_mode()
def continuation(folder: Path, text: str, tokens: int) -> str:
    """What the model writes, the likeliest token each time."""
    model, tokenizer = load(folder)
    ids = tokenizer(text)["input_ids"]
    begin = len(ids)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[begin:], skip_special_tokens=True))


def test_what_a_model_writes_is_what_it_is_scored_on(run: RunFolder, tmp_path: Path) -> None:
    """Asked for what the built model writes, token by token, that model is always right, and
    another never."""
    written = [continuation(run.checkpoint, row["question"], 6) for row in documents()]
    assert len(set(written)) > 1
    own = write_tasks(tmp_path / "own", documents(written=written), words=WORDS)
    found = pipeline.evaluate_tasks(run, ["own_words"], include=own, models=["built", "b"])
    assert found["built"]["own_words"]["exact_match"] == 1
    assert found["b"]["own_words"]["exact_match"] == 0


def test_a_source_is_asked_in_its_own_vocabulary(tmp_path: Path) -> None:
    """Not in the union with the others', where `a` would read b's token as one, not by its
    letters, and b's would have another number."""
    recipe = make_recipe(tmp_path / "project", count=2)
    a, b = (tmp_path / "project" / "models" / name for name in "ab")
    for seed, folder in enumerate((a, b)):
        make_model(folder, "llama", seed, vocab_size=301)
        content = json.loads((folder / "tokenizer.json").read_text())
        add_tokens(content, [f"<|{folder.name}|>"])
        (folder / "tokenizer.json").write_text(json.dumps(content))
    run = pipeline.build(load_recipe(recipe), tmp_path / "run")
    rows = [row | {"question": f"<|b|> {row['question']}"} for row in documents()]
    for name, folder in (("a", a), ("b", b)):
        written = [continuation(folder, row["question"], 6) for row in rows]
        asked = [row | {"written": text} for row, text in zip(rows, written, strict=True)]
        own = write_tasks(tmp_path / name / "own", asked, words=WORDS)
        found = pipeline.evaluate_tasks(run, ["own_words"], include=own, models=[name])
        assert found[name]["own_words"]["exact_match"] == 1


def test_groups_are_one_result_where_they_have_a_mean(run: RunFolder, own: Path) -> None:
    """Else each of their tasks is one."""
    found = pipeline.evaluate_tasks(run, ["own_mean", "own_loose:0"], include=own, limit=5)
    assert list(found["built"]) == ["own_mean", "own_choice", "own_words"]
    mean, choice = found["built"]["own_mean"], found["built"]["own_choice"]
    assert mean["acc"] == choice["acc"]
    assert (mean["samples"], mean["documents"]) == (10, 2 * NUM_DOCUMENTS)
    assert (choice["samples"], choice["documents"]) == (5, NUM_DOCUMENTS)


# Prompts


class Prompts:
    """Keeps what every model is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[list[str]] = []
        evaluate = benchmarks._evaluate

        def spy(lm: Any, task: benchmarks.TaskSet, *arguments: Any, **options: Any) -> Any:
            found = evaluate(lm, task, *arguments, **options)
            instances = [i for part in task.parts.values() for i in part.instances]
            self.seen.append([instance.args[0] for instance in instances])
            return found

        monkeypatch.setattr(benchmarks, "_evaluate", spy)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> Prompts:
    return Prompts(monkeypatch)


@pytest.mark.parametrize(
    ("asked", "task", "shots"),
    [
        ("gsm8k", "gsm8k", 8),
        ("gsm8k:5", "gsm8k", 5),
        ("mmlu", "mmlu", 0),
        ("bbh", "bbh", 3),
        ("other", "other", 0),
        ("other:2", "other", 2),
    ],
)
def test_examples_are_the_papers_unless_said_otherwise(
    asked: str, task: str, shots: int, run: RunFolder, tmp_path: Path, prompts: Prompts
) -> None:
    """Where the paper says nothing, or the harness cannot do as it says, the task's own."""
    own_number = {"gsm8k": "num_fewshot: 1\n", "bbh": "num_fewshot: 3\n"}.get(task, "")
    text = f"include: choice.yaml\ntask: {task}\n{own_number}"
    own = write_tasks(tmp_path / "own", documents(), asked=text)
    found = pipeline.evaluate_tasks(run, [asked], include=own, limit=3)
    assert found["built"][task]["fewshot"] == shots
    assert all(prompt.count("alpha beta") == shots + 1 for prompt in prompts.seen[-1])


def test_every_model_is_asked_the_same(run: RunFolder, own: Path, prompts: Prompts) -> None:
    """Examples are drawn anew for each model, after the rehearsal has drawn its own."""
    models = ["sources", "built"]
    pipeline.evaluate_tasks(run, ["own_choice:2"], include=own, models=models, limit=6)
    rehearsed, *asked = prompts.seen
    assert len(asked) == 4 and all(prompts == asked[0] for prompts in asked)
    assert asked[0][: len(rehearsed)] == rehearsed
    # Of two documents, three choices each.
    assert len(rehearsed) == 6 and len(set(asked[0])) == 6


TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def test_the_chat_template_is_each_models_own(run: RunFolder, own: Path, prompts: Prompts) -> None:
    (run.checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    found = pipeline.evaluate_tasks(run, ["own_choice:1"], include=own, limit=2, chat_template=True)
    assert found["built"]["own_choice"]["chat_template"] is True
    first = prompts.seen[-1][0]
    assert first.startswith("[user] alpha beta") and first.count("[assistant]") == 1


def test_prompts_that_are_too_long_are_told_of(
    run: RunFolder, own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pico models take 256 tokens; the harness cuts in silence."""
    caplog.set_level(logging.WARNING, "symphony_moe")
    pipeline.evaluate_tasks(run, ["own_words:1"], include=own, limit=2)
    assert not [
        record for record in caplog.records if record.name == "symphony_moe.evaluation.benchmarks"
    ]
    pipeline.evaluate_tasks(run, ["own_words:20"], include=own, limit=2)
    (told,) = [
        record for record in caplog.records if record.name == "symphony_moe.evaluation.benchmarks"
    ]
    message = "own_words: 2 of 2 prompts are longer than the 250 tokens that built takes, "
    assert told.getMessage().startswith(message)


# metrics.json


def test_results_are_merged_and_forgotten_with_their_model(run: RunFolder, own: Path) -> None:
    """Other tasks and models stay; of a model that is trained again, nothing does."""
    before = run.read_json(run.metrics)
    pipeline.evaluate_tasks(run, ["own_choice"], include=own, limit=2)
    pipeline.train(run)
    pipeline.evaluate_tasks(run, ["own_words"], include=own, limit=2)
    metrics = run.read_json(run.metrics)
    assert {model: list(results) for model, results in metrics["tasks"].items()} == {
        "built": ["own_choice", "own_words"],
        "trained": ["own_words"],
    }
    assert set(metrics["tasks"]["trained"]["own_words"]) == {
        "exact_match",
        "exact_match_stderr",
        *TaskResult.model_fields,
    }
    assert metrics["alignment"] == before["alignment"]
    pipeline.evaluate(run)
    assert run.read_json(run.metrics)["tasks"] == metrics["tasks"]
    pipeline.train(run, overwrite=True)
    assert list(run.read_json(run.metrics)["tasks"]) == ["built"]
    pipeline.evaluate_tasks(run, ["own_words"], include=own, limit=2)
    assert list(run.read_json(run.metrics)["tasks"]) == ["built", "trained"]
    shutil.rmtree(run.trained)
    pipeline.evaluate_tasks(run, ["own_words"], include=own, limit=2)
    assert list(run.read_json(run.metrics)["tasks"]) == ["built"]


# Mistakes


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading one is a failure of the test."""

    def fail(*_: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(benchmarks, "load_stock", fail)
    monkeypatch.setattr(benchmarks, "load_source", fail)


@pytest.fixture
def refused(
    run: RunFolder, no_models: None, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The one line that a mistake is, on stderr, with exit code 2."""

    def get(*arguments: object) -> str:
        capsys.readouterr()
        code = main(["evaluate", str(run.root), *map(str, arguments)])
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        (line,) = err.splitlines()
        assert line.startswith("symphony: error: ")
        return line

    return get


def _breaking(name: str, text: str) -> Callable[[Path], None]:
    def spoil(own: Path) -> None:
        (own / f"{name}.yaml").write_text(text)

    return spoil


def _no_data(own: Path) -> None:
    (own.parent / "data.jsonl").unlink()


def _bad_data(own: Path) -> None:
    (own.parent / "data.jsonl").write_text("{not json\n")


def _no_folder(own: Path) -> None:
    shutil.rmtree(own)


def _no_yaml(own: Path) -> None:
    _no_folder(own)
    own.mkdir()


IN = "include: choice.yaml\ntask: own_bad\n"


@pytest.mark.parametrize(
    ("spoil", "asked", "named"),
    [
        (_no_folder, "own_choice", "no such folder"),
        (_no_yaml, "own_choice", "holds no .yaml file"),
        (_breaking("bad", "task: [own"), "own_choice", "bad.yaml: not readable as YAML: while"),
        (_breaking("bad", "- task\n"), "own_choice", "bad.yaml: expected a task's settings"),
        (_breaking("bad", "include: nil.yaml\n"), "own_choice", "includes nil.yaml, which is not"),
        (_breaking("bad", "group: own_bad\ntask: [own_bad]\n"), "own_bad", "RecursionError"),
        (_no_data, "own_choice", "own_choice: its data is not there: Unable to find"),
        (_bad_data, "own_choice", "own_choice: does not work in lm-evaluation-harness"),
        (_breaking("bad", IN + "doc_to_text: '{{nil.x}}'\n"), "own_bad", "'nil' is undefined"),
        (_breaking("bad", IN + "doc_to_text: !function nil.f\n"), "own_bad", "module 'nil'"),
        (_breaking("bad", IN + "output_type: writing\n"), "own_bad", "output_type 'writing'"),
        (_breaking("bad", IN + "test_split: nil\n"), "own_bad", "own_bad: does not work in"),
        (_breaking("bad", IN + "num_fewshot: 0\n"), "own_bad:2", "own_bad takes no examples"),
        (_breaking("bad", IN + "unsafe_code: true\n"), "own_bad", "--confirm-run-unsafe-code"),
        (
            _breaking("bad", "include: words.yaml\ntask: own_bad\ngeneration_kwargs: {}\n"),
            "own_bad",
            "answers may be 256 tokens long, but built takes 256 in all",
        ),
        (None, f"own_choice:{NUM_DOCUMENTS + 1}", f"own_choice:{NUM_DOCUMENTS + 1}: does not"),
        (None, "own_choice:many", "expected NAME or NAME:N"),
        (None, "own_choice:-1", "expected NAME or NAME:N"),
        (None, "own_choice,:2", "expected NAME or NAME:N"),
        (None, "own_choice,own_choice:1", "own_choice is named twice"),
    ],
)
def test_a_task_that_cannot_work_is_refused_before_a_model_is_loaded(
    spoil: Callable[[Path], None] | None,
    asked: str,
    named: str,
    own: Path,
    refused: Callable[..., str],
) -> None:
    if spoil is not None:
        spoil(own)
    assert named in refused("--tasks", asked, "--include", own)


def test_code_is_run_where_that_is_confirmed(
    run: RunFolder, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    (own / "code.yaml").write_text("include: choice.yaml\ntask: own_code\nunsafe_code: true\n")
    (own / "all.yaml").write_text("group: own_all\ntask: [{task: own_code, num_fewshot: 1}]\n")
    found = pipeline.evaluate_tasks(run, ["own_code"], include=own, limit=2, unsafe_code=True)
    assert found["built"]["own_code"]["samples"] == 2
    for name in ("own_code", "own_all"):
        with pytest.raises(RecipeError, match="own_code runs the code that the model writes"):
            pipeline.evaluate_tasks(run, [name], include=own)


@pytest.mark.slow
def test_the_harnesss_own_tasks(
    own: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelled one, one that runs code (alone and in a group of one's own), and one whose data
    is on the hub, which is not there. And why BBH is the one task that is not given the paper's
    number of examples: it comes with three."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (own / "both.yaml").write_text("group: own_both\ntask: [own_choice, humaneval]\n")
    # Found once: that takes the harness a quarter of a minute.
    manager = harness.TaskManager(include_path=str(own))
    monkeypatch.setattr(harness, "TaskManager", lambda **_: manager)
    assert "did you mean gsm8k?" in refused("--tasks", "gsm8kk")
    assert "did you mean own_choice?" in refused("--tasks", "own_choise", "--include", own)
    message = refused("--tasks", "gsm8k,humaneval")
    assert "--tasks humaneval: humaneval runs the code that the model writes" in message
    assert "own_both: humaneval runs the code" in refused("--tasks", "own_both", "--include", own)
    message = refused("--tasks", "gsm8k")
    assert "gsm8k:8: its data is not there: Couldn't reach 'openai/gsm8k' on the Hub" in message
    for config in benchmarks._configs(manager.task_index, "bbh"):
        assert len(config["fewshot_config"]["samples"]) == config["num_fewshot"] == 3
    assert all(name in manager.task_index for name in benchmarks.PAPER_SHOTS)


def test_the_extra_that_is_missing_is_named(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install 'lm_eval>=" in refused("--tasks", "gsm8k")


def test_models_that_are_not_there_are_named(refused: Callable[..., str], own: Path) -> None:
    more = ("--tasks", "own_choice", "--include", own)
    assert "did you mean built?" in refused(*more, "--models", "bilt")
    assert "no trained/ to evaluate" in refused(*more, "--models", "built,trained")
    assert "built has no chat template" in refused(*more, "--chat-template")


def test_models_have_one_order(run: RunFolder) -> None:
    recipe = run.read_recipe()
    assert benchmarks.choose_models(run, recipe, []) == ["built"]
    assert benchmarks.choose_models(run, recipe, ["built", "c", "a"]) == ["a", "c", "built"]
    run.trained.mkdir()
    assert benchmarks.choose_models(run, recipe, []) == ["built", "trained"]
    everything = ["a", "b", "c", "built", "trained"]
    assert benchmarks.choose_models(run, recipe, ["trained", "built", "sources"]) == everything


def test_options_of_tasks_need_tasks(refused: Callable[..., str]) -> None:
    for option in (
        ["--limit", 3],
        ["--include", "x"],
        ["--models", "built"],
        ["--chat-template"],
        ["--confirm-run-unsafe-code"],
    ):
        assert f"{option[0]}: has no effect without --tasks" in refused(*option)
    assert "has no effect" in refused("--tasks", "x", "--set", "evaluation.tokens=1")


def test_there_must_be_a_checkpoint(run: RunFolder, own: Path) -> None:
    shutil.rmtree(run.checkpoint)
    with pytest.raises(RunFolderError, match="no finished checkpoint"):
        pipeline.evaluate_tasks(run, ["own_choice"], include=own)


def test_people_and_programs_read_the_results(
    run: RunFolder, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """stdout holds a table, or JSON, and nothing that the harness or a task prints."""
    (own / "loud.py").write_text("def ask(doc):\n    print('loud')\n    return doc['question']\n")
    (own / "loud.yaml").write_text(
        "include: choice.yaml\ntask: own_loud\ndoc_to_text: !function loud.ask\n"
    )
    command = ["evaluate", str(run.root), "--tasks", "own_loud,own_words", "--include", str(own)]
    command += ["--models", "a,built", "--limit", "4"]
    assert main(command) == 0
    head, *rows, empty, then = capsys.readouterr().out.splitlines()
    assert not empty and then.startswith("next: symphony report ")
    assert head.split() == ["task", "metric", "examples", "documents", "a", "built"]
    assert [row.split()[:2] for row in rows] == [["own_loud", "acc"], ["own_words", "exact_match"]]
    assert "4 of 24" in rows[0]
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tasks"] == run.read_json(run.metrics)["tasks"]
    assert "loglikelihood" not in err and "generate_until" not in err
    pipeline.report(run)
    assert "own_words" in run.report.read_text()
