"""The form of every command: start values, names, options, exit status."""

import dataclasses
import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import life
import pytest
from conftest import ROOT

from ae_jax import cli, config
from ae_jax.config import REGISTRIES, Config, TrainConfig
from ae_jax.data import Digits, Folder
from ae_jax.errors import Diverged, UserError
from ae_jax.models.conv import ConvAutoencoder
from ae_jax.objectives import Denoising, Reconstruction

PRESETS = {
    "reference": Config(),
    "quick": Config(data=Digits(num_validation=30), train=TrainConfig(num_epochs=2)),
    "elsewhere": Config(run_dir=Path("some/where")),
}


def parse(*args):
    return cli.parse("tutorial", PRESETS, "What it does.", list(args))


def shown(capsys, *args, status=2) -> str:
    """What a command that ends while it is parsed says, as words."""
    with pytest.raises(SystemExit) as caught:
        parse(*args)
    assert caught.value.code == status
    out, err = capsys.readouterr()
    return " ".join((out + err).translate({ord(c): " " for c in "│╭╮╰╯─"}).split())


def test_a_run_is_named_after_experiment_and_preset_unless_it_has_a_folder(tmp_path):
    def run_dir(*args):
        return str(parse(*args).run_dir)

    assert run_dir() == "runs/tutorial"
    assert run_dir("--preset", "quick") == "runs/tutorial-quick"
    assert run_dir("--preset", "elsewhere") == "some/where"
    assert run_dir("--preset", "quick", "--run-dir", "x") == "x"
    path = tmp_path / "c.json"
    for plain, expected in [({}, "runs/tutorial"), ({"run_dir": "own"}, "own")]:
        path.write_text(json.dumps(plain))
        assert run_dir("--config", str(path)) == expected


def test_options_override_the_preset():
    made = parse("--preset", "quick", "--train.seed", "3", "--model.hidden", "8", "4")
    assert (made.train, made.model.hidden) == (
        TrainConfig(num_epochs=2, seed=3),
        (8, 4),
    )
    assert made.data == Digits(num_validation=30)


def test_a_file_replaces_the_preset_and_options_override_it(tmp_path):
    path = tmp_path / "c.json"
    saved = Config(objective=Denoising(sigma=0.4), train=TrainConfig(seed=5))
    path.write_text(json.dumps({"format": 2, "config": config.to_json(saved)}))
    made = parse("--config", str(path), "--train.num-epochs", "1")
    assert made.train == TrainConfig(num_epochs=1, seed=5)
    assert made.objective == Denoising(sigma=0.4)
    again = parse("--config", str(path), "--objective.name", "denoising")
    assert again.objective == Denoising(sigma=0.4)  # the same class keeps its values
    other = parse("--config", str(path), "--objective.name", "reconstruction")
    assert other.objective == Reconstruction()


@pytest.mark.parametrize(
    ("section", "name"),
    [(s, name) for s, known in REGISTRIES.items() for name in known],
)
def test_a_name_chooses_a_class_whose_fields_are_then_the_options(
    section, name, capsys
):
    def options_of(cls):
        names = (field.name for field in dataclasses.fields(cls))
        return {f"--{section}.{name}".replace("_", "-") for name in names}

    known = REGISTRIES[section]
    assert getattr(parse(f"--{section}.name={name}"), section) == known[name]()
    text = shown(capsys, f"--{section}.name", name, "--help", status=0)
    assert f"(now: {name})" in text
    everyones = set().union(*map(options_of, known.values()))
    assert everyones & set(text.replace(",", "").split()) == options_of(known[name])


def test_the_fields_of_a_chosen_class_are_set_and_those_of_another_refused(capsys):
    made = parse("--model.name=conv", "--model.hidden", "4", "--data.name", "folder")
    assert (made.model, made.data) == (ConvAutoencoder(hidden=(4,)), Folder())
    assert "sigma" in shown(capsys, "--objective.sigma", "0.1")
    args = ("--objective.name", "denoising", "--objective.sigma", "0.1")
    assert parse(*args).objective == Denoising(sigma=0.1)
    assert "--objective.loss" in shown(capsys, *args, "--objective.loss", "bce")


@dataclasses.dataclass(frozen=True)
class Mine:
    """Of one's own."""

    weight: float = 2.0
    """How much."""
    loss_name = "mine"

    def __call__(self, model, params, x, key):
        return x.mean(), {}


@dataclasses.dataclass(frozen=True)
class Incomplete(Mine):
    must: int = dataclasses.field(kw_only=True)


def test_a_class_of_ones_own_is_chosen_by_module_and_class(capsys):
    name = f"{__name__}:Mine"
    made = parse("--objective.name", name, "--objective.weight", "3")
    assert made.objective == Mine(weight=3.0)
    assert "How much." in shown(capsys, "--objective.name", name, "--help", status=0)
    with pytest.raises(UserError, match=r"Incomplete: .*must.*field.* a default$"):
        parse("--objective.name", f"{__name__}:Incomplete")
    with pytest.raises(UserError, match="must be an instance of a dataclass with make"):
        parse("--model.name", name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train.num-epoch", "3"], "--train.num-epochs"),  # the nearest is named
        (["--train.num-epochs", "ten"], "train.num-epochs"),
        (["--model.hidden", "8", "0"], "hidden.1: input should be greater than 0"),
        (["--model.latent-activation", "relo"], "'relo'"),
        (["--train.patience", "2"], "train.patience: needs a held-out part"),
        (["--preset", "quik"], "quick"),
        (["--pre", "quick"], "--pre"),  # nothing is abbreviated
        (["--preset", "quick", "--config", "c.json"], "give one of them"),
    ],
)
def test_a_wrong_option_ends_with_status_2_and_says_why(args, message, capsys):
    assert message in shown(capsys, *args)


def test_help_explains_presets_names_and_options(capsys):
    text = shown(capsys, "--preset", "quick", "--help", status=0)
    for part in (
        "What it does.",
        "--preset {reference,quick,elsewhere} chooses the values that the options",
        "(default: reference)",
        "--objective.name {reconstruction,denoising,",
        "Passes over the training split",
        "(default: 2)",
    ):
        assert part in text


# --- Exit status ----------------------------------------------------------------------


@pytest.fixture
def _handlers():
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, (0, "")),
        (UserError("why; do this"), (2, "error: why; do this\n")),
        (Diverged("nan"), (1, "error: nan\n")),
        (KeyboardInterrupt(), (130, "")),
        (SystemExit(143), (143, "")),
        (OSError(errno.ENOSPC, "full", "a/b"), (2, "error: a/b: full\n")),
        (OSError("plain"), (2, "error: plain\n")),
    ],
    ids=repr,
)
def test_the_exit_status_tells_how_it_ended_and_one_line_why(error, expected, capsys):

    def action():
        if error:
            raise error

    with pytest.raises(SystemExit) as caught:
        cli.exit_with(action)
    assert (caught.value.code, capsys.readouterr().err) == expected


@pytest.mark.usefixtures("_handlers")
def test_our_own_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.exit_with(lambda: 1 / 0)


AT_ONCE = "signal.raise_signal(number)"
IN_A_CALLBACK = """
import weakref
class Module: pass
module = Module()
callback = weakref.ref(module, lambda _: signal.raise_signal(number))
del module
"""
END = """
import signal, sys
from ae_jax import cli

def action():
    print("begun")
    exec(sys.argv[1], {"signal": signal, "number": int(sys.argv[2])})
    print("still here")

cli.exit_with(action, lambda: len(sys.argv) > 3)
"""


@pytest.mark.parametrize(
    ("signum", "moment"), [(signal.SIGINT, IN_A_CALLBACK), (signal.SIGTERM, AT_ONCE)]
)
def test_a_signal_ends_the_command_with_the_shells_status(signum, moment):
    outcome = life.run("-c", END, moment, int(signum))
    assert outcome == (128 + signum, "begun\n", "")


def test_a_process_with_peers_waits_for_nobody_after_our_own_bug():
    waits = "import atexit\natexit.register(print, 'waited')\n1 / 0"
    status, out, err = life.run("-c", END, waits, 0, "has peers")
    assert (status, out) == (1, "begun\n")
    assert "ZeroDivisionError" in err


def test_a_command_that_fails_waits_for_no_thread():
    """Orbax's may wait for a save that has failed, for minutes."""
    waits = "import threading, time\n"
    waits += "threading.Thread(target=time.sleep, args=(100,)).start()\n"
    waits += "raise OSError(28, 'full')"
    start = time.monotonic()
    assert life.run("-c", END, waits, 0) == (2, "begun\n", "error: full\n")
    assert time.monotonic() - start < 60


def test_output_that_nobody_reads_any_more_ends_the_command_quietly():
    lines = "for _ in range(10**6): print('line')"
    command = [sys.executable, "-c", END, lines, "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe) as process:
        assert process.stdout.readline() == b"begun\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE
