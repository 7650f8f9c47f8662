"""The command line: what it costs, what it accepts, what it says when something is wrong."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import saccade
from saccade import cli, recipe
from saccade.errors import SaccadeError
from saccade.settings import PretrainArguments, spelled


def spent(*words: str) -> tuple[float, set[str], str]:
    """CPU seconds of one command in a fresh process, the top-level packages it imported, and its stdout."""
    script = (
        "import sys, resource\n"
        "sys.argv[0] = 'saccade'\n"
        "from saccade.cli import main\n"
        "code = main()\n"
        "use = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print('\\n@', code, use.ru_utime + use.ru_stime, *{name.split('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    text, _, measured = done.stdout.rpartition("@")
    code, seconds, *packages = measured.split()
    assert code == "0", done.stderr
    return float(seconds), set(packages), text


def test_help_is_quick_and_imports_no_torch() -> None:
    """Floor: 0.6 CPU seconds. The best of three: other work on the machine is not the help's."""
    runs = [spent("--help") for _ in range(3)]
    assert min(seconds for seconds, _, _ in runs) < 0.6
    assert not {"torch", "numpy"} & runs[0][1]
    for verb in cli.VERBS:
        assert verb in runs[0][2]


def test_of_several_ranks_only_the_first_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["pretrian", "--json"]) == 2
        said.append(capsys.readouterr())
    assert said[0].err.count("\n") == 1 and "pretrain" in said[0].out
    assert said[1].err == said[1].out == ""


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_imports_no_torch(verb: str) -> None:
    seconds, packages, text = spent(verb, "--help")
    assert "torch" not in packages
    assert seconds < 1.2
    for name in cli.VERBS[verb].arguments.model_fields:
        assert spelled(cli.VERBS[verb].arguments, name) in text
    assert "=" not in text.splitlines()[0]


def test_importing_saccade_imports_no_torch() -> None:
    script = "import saccade, sys; saccade.__version__; saccade.SaccadeError; dir(saccade)"
    subprocess.run([sys.executable, "-c", script + "; assert 'torch' not in sys.modules"], check=True)


Record = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Record:
    """Run a command line in this process with the verb replaced by one that records what it is asked."""

    def record(*words: str, does: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {}) -> Any:
        asked: dict[str, Any] = {}

        def call(values: dict[str, Any]) -> dict[str, Any]:
            asked.update(values)
            print("chatter on stdout")
            return does(values)

        replaced = {name: dataclasses.replace(verb, call=call) for name, verb in cli.VERBS.items()}
        monkeypatch.setattr(cli, "VERBS", replaced)
        code = cli.main([*words, "--json"])
        out, err = capsys.readouterr()
        assert out.count("\n") == 1, "exactly one JSON object on stdout"
        result = json.loads(out)
        if code:
            assert result.keys() == {"ok", "error", "path", "hint"}
            assert result["ok"] is False
            assert len([line for line in err.splitlines() if line.startswith("saccade: ")]) == 1
        return code, {**asked, **result}

    return record


RUN = ("pretrain", "pictures", "--recipe", "mae:small_pictures", "--out", "run")


def test_settings_of_a_recipe_are_flags(run: Record) -> None:
    code, asked = run(*RUN, "--decoder-width", "96", "--min_scale=0.3", "--no-normalise-target", "--steps", "7")
    assert code == 0
    assert asked["data"] == ("pictures",)
    assert asked["recipe"] == "mae:small_pictures"
    assert asked["decoder_width"] == 96
    assert asked["min_scale"] == 0.3
    assert asked["normalise_target"] is False
    assert asked["steps"] == 7
    assert "decoder_depth" not in asked, "what was not said is left to the recipe"
    assert asked["max_unreadable"] == PretrainArguments.model_fields["max_unreadable"].default


def test_words_stand_before_and_behind_flags(run: Record) -> None:
    _, asked = run("pretrain", "a", "--recipe", "mae", "b", "--out", "run", "c")
    assert asked["data"] == ("a", "b", "c")
    _, asked = run("evaluate", "--tasks", "knn,linear", "run", "labelled")
    assert (asked["backbone"], asked["labelled"], asked["tasks"]) == (("run",), "labelled", ("knn", "linear"))
    _, asked = run("evaluate", "one", "two", "--tasks", "knn", "three", "labelled")
    assert (asked["backbone"], asked["labelled"]) == (("one", "two", "three"), "labelled")
    _, asked = run("search", "index", "--key", "a.png", "-k", "3")
    assert (asked["index"], asked["key"], asked["k"]) == ("index", "a.png", 3)


def test_flags_win_over_the_file_and_the_file_over_defaults(run: Record, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "recipe: mae\nepochs: 3\nimage-size: 64\ndecoder_depth: 2\ncompile: true\nworkers: 1\nweights: [3, 1]\n"
    )
    words = ("pretrain", "pictures", "--out", "run", "--config", str(file))
    code, asked = run(*words)
    assert code == 0
    assert (asked["recipe"], asked["epochs"], asked["image_size"], asked["workers"]) == ("mae", 3, 64, 1)
    assert asked["compile"] is True
    assert asked["weights"] == (3.0, 1.0)
    assert "config" not in asked
    _, asked = run(*words, "--image-size", "32", "--workers", "0", "--no-compile", "--steps", "5", "--weights", "1,2")
    assert (asked["image_size"], asked["decoder_depth"], asked["workers"], asked["steps"]) == (32, 2, 0, 5)
    assert asked["compile"] is False
    assert "epochs" not in asked, "a length that is said replaces the file's"
    assert asked["weights"] == (1.0, 2.0)


def test_none_unsets(run: Record) -> None:
    assert run(*RUN, "--clip", "none")[1]["clip"] is None


@pytest.mark.parametrize(
    ("words", "path", "says"),
    [
        (("evalute", "x"), "evalute", "evaluate"),
        ((), None, "tour"),
        (("adapt", "pictures", "--out", "run"), "--from", "needs --from"),
        (("pretrain", "pictures", "--out", "run"), "--recipe", "mae"),
        (("pretrain", "pictures", "--recipe", "maee", "--out", "run"), "--recipe", "'mae'"),
        (("pretrain", "pictures", "--recipe", "mae:small_picture", "--out", "run"), None, "small_pictures"),
        (("pretrain", "--recipe", "mae", "--out", "run"), "DATA", "needs DATA"),
        (("pretrain", "pictures", "--recipe", "mae"), "--out", "needs --out"),
        ((*RUN, "--decoder-widht", "96"), "--decoder-widht", "'--decoder-width'"),
        ((*RUN, "--wokers", "2"), "--wokers", "'--workers'"),
        ((*RUN, "--batch", "many"), "--batch", "many"),
        ((*RUN, "--batch", "0"), "--batch", "greater"),
        ((*RUN, "--batch"), None, "--batch"),
        ((*RUN, "--precision", "fp8"), "--precision", "'bf16'"),
        ((*RUN, "--steps", "4", "--epochs", "2"), "--steps", "exclude"),
        ((*RUN, "--save-every", "often"), "--save-every", "minutes"),
        ((*RUN, "--config", "nowhere.yaml"), "nowhere.yaml", "No such file"),
        (("evaluate", "run"), "LABELLED", "needs LABELLED"),
        (("search", "index", "third"), "third", "no place"),
        (("search", "index"), None, "exactly one"),
        (("search", "index", "--key", "a", "--image", "b"), None, "exactly one"),
    ],
)
def test_wrong_use_is_one_line_that_names_the_thing_and_the_way_out(
    run: Record, words: tuple[str, ...], path: str | None, says: str
) -> None:
    code, answer = run(*words)
    assert code == cli.WRONG_USE
    assert path is None or answer["path"] == path
    assert says in f"{answer['error']} {answer['hint']}"


def test_a_misspelt_setting_in_a_file_is_an_error(run: Record, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text, says in [
        ("decoder_widht: 3", "--decoder-width"),
        ("wokers: 3", "--workers"),
        ("- 3", "names and values"),
    ]:
        file.write_text(text)
        code, answer = run(*RUN, "--config", str(file))
        assert code == cli.WRONG_USE
        assert says in f"{answer['error']} {answer['hint']}"


def test_python_meets_the_same_errors() -> None:
    with pytest.raises(SaccadeError, match="decoder-width"):
        recipe.configure("mae", {"decoder_widht": 3})
    with pytest.raises(SaccadeError, match="--batch"):
        recipe.configure("mae", {"batch": 0})
    _, config = recipe.configure("mae", {"minutes": 2})
    assert (config.minutes, config.epochs) == (2, None)


def test_results_are_plain_json(run: Record) -> None:
    import numpy as np
    import torch

    result = {
        "loss": float("nan"),
        "path": Path("a"),
        "scores": np.float32([0.5, 2]),
        "steps": torch.tensor(3),
        5: (1, None),
    }
    code, answer = run("tour", does=lambda values: result)
    assert code == 0
    del answer["out"]
    assert answer == {"ok": True, "loss": None, "path": "a", "scores": [0.5, 2.0], "steps": 3, "5": [1, None]}


def test_exit_codes(run: Record) -> None:
    def fails(error: BaseException) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def call(values: dict[str, Any]) -> dict[str, Any]:
            raise error

        return call

    assert run("tour", does=fails(SaccadeError("full disk", code=1)))[0] == cli.FAILED
    assert run("tour", does=fails(ZeroDivisionError("bug")))[0] == cli.FAILED
    assert run("tour", does=fails(KeyboardInterrupt()))[0] == cli.STOPPED
    assert run("tour", does=fails(SaccadeError("stopped at step 3", code=75)))[0] == cli.STOPPED


def test_only_the_first_rank_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["evalute", "--json"]) == cli.WRONG_USE
    assert capsys.readouterr().out == ""


def test_the_result_without_json_is_for_eyes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"1": {"mean": 0.5, "std": None}}
    result = {
        "knn": {"pixels": 0.25, "pretrained": 0.5},
        "few": few,
        "results": [{"key": "a", "score": 0.75}],
        "at": "x",
    }
    monkeypatch.setitem(cli.VERBS, "tour", dataclasses.replace(cli.VERBS["tour"], call=lambda values: result))
    assert cli.main(["tour"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "knn  pixels 0.25  pretrained 0.5",
        "few",
        "  1  mean 0.5",
        "results",
        "  key a  score 0.75",
        "at  x",
    ]


def test_a_reader_that_goes_away_is_no_bug() -> None:
    command = f"{sys.executable} -m saccade pretrain --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ, check=True)
    assert "Traceback" not in done.stderr


def test_scores_are_a_table() -> None:
    few = {"5": {"mean": 50.0, "std": 2.0}, "100": {"mean": None, "std": None, "skipped": "too few"}}
    pixels = {"knn": 40.0, "few_label": {"5": {"mean": 30.0, "std": 1.0}}}
    better = {"mean": 20.0, "two_standard_errors": 4.0, "verdict": "better", "against": "pixels"}
    text = cli._scores(
        {
            "ok": True,
            "backbone": "runs/first",
            "knn": 60.04,
            "few_label": few,
            "pooled": {"chosen": "cls", "by": "knn on 5 samples held out of train"},
            "baselines": {"pixels": pixels, "majority": 10.0},
            "differences": {"knn": better, "few_label": {"5": better}},
        }
    )
    table = [line.split() for line in text.splitlines()]
    assert table[1] == ["this", "backbone", "60.0", "50.0", "±", "2.0", "-"]
    assert table[2] == ["raw", "pixels", "40.0", "30.0", "±", "1.0"]
    assert table[3][-2:] == ["better", "better"]
    assert "runs/first" in text and "majority 10" in text and "cls, chosen by knn" in text


def test_data_are_looked_at_before_a_backbone_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["embed", "--out", str(tmp_path / "index")], ["evaluate"]):
        assert cli.main([verb[0], "nobody/nothing", str(tmp_path / "missing"), *verb[1:]]) == 2
        said = capsys.readouterr().err
        assert "missing" in said and "nobody" not in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == saccade.__version__


def test_the_same_names_in_python_and_on_the_command_line() -> None:
    """Every argument of a verb is a flag or a word, and every flag an argument, with the same default."""
    for name in ("evaluate", "embed"):
        parameters = inspect.signature(getattr(saccade, name)).parameters
        fields = cli.VERBS[name].arguments.model_fields
        assert list(parameters) == list(fields)
        for argument, field in fields.items():
            default = inspect.Parameter.empty if field.is_required() else field.default
            assert parameters[argument].default == default, f"{name} {argument}"
