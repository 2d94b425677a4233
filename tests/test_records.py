import json
import os
import subprocess
import sys

import pytest

from ae_jax import records
from ae_jax.config import Config, UserError


def test_a_file_is_whole_or_what_it_was(tmp_path):
    path = tmp_path / "file.json"
    records.write_json(path, {"a": 1})

    def fails(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        records.write_file(path, fails)
    assert records.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_damaged_json_names_its_file(tmp_path):
    (tmp_path / "summary.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"summary\.json: damaged, not JSON"):
        records.read_json(tmp_path / "summary.json")


def test_a_folder_that_stayed_empty_is_removed_and_a_used_one_kept(tmp_path):
    with records.lock(tmp_path / "a" / "run"):
        pass
    assert not (tmp_path / "a" / "run").exists()
    with records.lock(tmp_path / "run"):
        records.write_json(tmp_path / "run" / "config.json", {})
    assert (tmp_path / "run").exists()


def test_a_lock_ends_with_its_holder(tmp_path):
    config = tmp_path / "run" / "config.json"
    with records.lock(config.parent):
        records.write_json(config, {})
        with (
            pytest.raises(UserError, match="in use by another process"),
            records.lock(config.parent),
        ):
            pass
    with records.lock(config.parent):
        pass


@pytest.mark.parametrize("name", [".config.json.123", "figures/.samples.png.77"])
def test_what_a_killed_process_was_writing_is_cleared(tmp_path, name):
    run_dir, known = tmp_path / "run", name.startswith("figures")
    (run_dir / "figures").mkdir(parents=True)
    (run_dir / name).write_text("half")
    if known:
        records.write_json(run_dir / "config.json", {})
    else:
        (run_dir / "figures").rmdir()
    with records.lock(run_dir):
        assert not (run_dir / name).exists()


def describe(**device):
    return records.describe("tutorial", Config(), {"kind": "cpu", **device}, {})


def test_the_same_surroundings_are_not_worth_a_word():
    description = describe()
    assert records.note_surroundings(description, describe()) is None
    assert description["history"] == []


def test_each_change_of_surroundings_is_recorded_once():
    description = describe(count=1)
    note = records.note_surroundings(description, describe(count=2))
    assert "device.count 1 → 2" in note
    assert records.note_surroundings(description, describe(count=2)) is None
    assert "device.count 2 → 1" in records.note_surroundings(
        description, describe(count=1)
    )
    assert len(description["history"]) == 2


def test_bits_depend_on_the_cores_that_a_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert records.usable_cores() == 1
    assert describe()["device"]["cpu_cores"] == 1


def test_compiled_programs_are_kept_apart_by_jaxlib_and_processor(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    path = records.compilation_cache_dir()
    jaxlib = records.versions()["jaxlib"]
    assert path.as_posix().startswith(f"/cache/ae_jax/xla-{jaxlib}-")
    monkeypatch.setattr(records, "_cpuinfo", lambda field: "other flags")
    assert records.compilation_cache_dir() != path


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [{"epoch": 1, "train/mse": 0.1 + 0.2}, {"epoch": 2, "train/mse": 1 / 3}]
    assert records.read_rows(tmp_path) == []
    records.write_rows(tmp_path, rows)
    assert records.read_rows(tmp_path) == rows


def test_a_result_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "measure_gflops", lambda: 100.04)
    path = tmp_path / "results" / "x.json"
    records.write_result(path, "tutorial", "cpu", [0], {"healthy": 1}, [{"seed": 0}])
    result = json.loads(path.read_text())
    assert set(result["machine"]) == {
        "cores", "cpu", "accelerator", "memory_gib", "gflops",
    }  # fmt: skip
    assert result["machine"]["gflops"] == 100.0
    assert result["headline"] == {"healthy": 1}


def test_gflops_are_those_of_a_product():
    assert 0.1 < records.measure_gflops(size=256, rounds=2) < 1e5


@pytest.mark.parametrize("key", records.DESCRIPTION)
def test_a_config_json_without_a_part_names_it(tmp_path, key):
    about = records.describe(
        "tutorial", Config(), {"kind": "cpu"},
        {"fingerprint": "f00", "num_train": 1, "shape": [2, 2]},
    )  # fmt: skip
    records.write_json(tmp_path / "config.json", about)
    assert records.read_description(tmp_path) == about
    for damaged, what in (
        ({**about, key: 1}, f"{key} must be of type"),
        ({k: v for k, v in about.items() if k != key}, "config|is missing"),
    ):
        records.write_json(tmp_path / "config.json", damaged)
        with pytest.raises(UserError, match=rf"config\.json: .*({what})"):
            records.read_description(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"epochs": 3', '{"epochs": "3"}', "\0"])
def test_a_damaged_summary_is_told_with_the_way_out(tmp_path, text):
    assert records.read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json: damaged, .*; delete it"):
        records.read_summary(tmp_path)


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[]", b'{"epoch": "1"}'])
def test_a_damaged_row_names_its_line(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"epoch": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        records.read_rows(tmp_path, types={"epoch": int})


def test_tensorboard_is_written_without_loading_pytorch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ae_jax import records; "
        "records.Board(Path(sys.argv[1]), [{'step': 1, 'train/mse': 0.5}]).close(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr
    assert list((tmp_path / "tensorboard").iterdir())
