import errno
import signal
import subprocess
import sys

import pytest

from ae_jax import cli
from ae_jax.config import Config, TrainConfig, UserError

PRESETS = {
    "reference": Config(),
    "quick": Config(train=TrainConfig(num_epochs=2)),
}


def parse(*args):
    return cli.parse("tutorial", PRESETS, "What it does.", list(args))


def status(capsys, action) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.exit_with(action)
    return caught.value.code, capsys.readouterr().err


def test_a_run_is_named_after_experiment_and_preset():
    assert str(parse().run_dir) == "runs/tutorial"
    assert str(parse("--preset", "quick").run_dir) == "runs/tutorial-quick"
    assert str(parse("--preset", "quick", "--run-dir", "x").run_dir) == "x"


def test_options_override_the_preset():
    made = parse("--preset", "quick", "--train.seed", "3", "--model.hidden", "8", "4")
    assert made.train == TrainConfig(num_epochs=2, seed=3)
    assert made.model.hidden == (8, 4)


def test_options_override_the_file_and_the_file_replaces_the_preset(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"train": {"seed": 5, "num_epochs": 7}}')
    made = parse("--config", str(path), "--train.num-epochs", "1")
    assert made.train == TrainConfig(num_epochs=1, seed=5)
    assert str(made.run_dir) == "runs/tutorial"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train.num-epoch", "3"], "--train.num-epochs"),  # the nearest is named
        (["--train.num-epochs", "ten"], "train.num-epochs"),
        (["--train.num-epochs", "0"], "train.num_epochs: must be finite and above 0"),
        (["--train.learning-rate", "nan"], "train.learning_rate: must be finite"),
        (["--model.hidden", "8", "0"], "model.hidden: must be widths above 0"),
        (["--model.code-activation", "relo"], "'relo'"),
        (["--preset", "quik"], "quick"),
        (["--preset", "quick", "--config", "c.json"], "give one of them"),
    ],
)
def test_a_wrong_option_ends_with_status_2_and_says_why(args, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*args)
    assert caught.value.code == 2
    shown = capsys.readouterr()
    words = (shown.out + shown.err).replace("│", " ").split()
    assert message in " ".join(words)


def raising(error):
    def action():
        raise error

    return action


def test_status_is_0_when_done_and_2_when_the_user_can_mend_it(capsys):
    assert status(capsys, lambda: None) == (0, "")
    assert status(capsys, raising(UserError("why; do this"))) == (
        2,
        "error: why; do this\n",
    )


def test_status_is_1_when_the_run_diverged(capsys):
    assert status(capsys, raising(cli.Diverged("nan"))) == (1, "error: nan\n")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_what_the_disk_refuses_is_told_in_one_line(code, capsys):
    number, shown = status(capsys, raising(OSError(code, "refused", "a/b")))
    assert number == 2
    assert shown.startswith("error: a/b: refused; ")
    assert shown.count("\n") == 1


def test_our_own_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.exit_with(lambda: 1 / 0)


IN_A_CALLBACK = """
import weakref

class Module:
    pass

module = Module()
callback = weakref.ref(module, lambda _: signal.raise_signal(number))
del module
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["signal.raise_signal(number)", IN_A_CALLBACK])
def test_a_signal_ends_the_command_with_the_shells_status(signum, moment):
    code = (
        "import signal\n"
        "from ae_jax import cli\n"
        "def action():\n"
        "    print('begun')\n"
        f"    exec({moment!r}, {{'signal': signal, 'number': {int(signum)}}})\n"
        "    print('went on')\n"
        "cli.exit_with(action)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + signum, "begun\n", "")
