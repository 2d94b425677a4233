"""What runs elsewhere at every push is what a contributor runs."""

import os
import re

import yaml
from conftest import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"


def test_the_workflow_runs_scripts_that_exist_on_the_oldest_python():
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert {"scripts/test", "scripts/docs"} <= set(commands)
    for command in commands:
        assert os.access(ROOT / command.split()[0], os.X_OK), command
    project = (ROOT / "pyproject.toml").read_text()
    (oldest,) = re.findall(r'^requires-python = ">=(.*)"$', project, re.MULTILINE)
    assert job["strategy"]["matrix"]["python"][0] == oldest
