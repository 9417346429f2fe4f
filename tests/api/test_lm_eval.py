"""lm-eval, as docs/clients.md has people start it, on a multiple-choice task of its own kind."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from clients_page import example
from cordee.serving.local_service import ServiceConfig
from serving import SECONDS, running

# What a model of 135 million parameters knows, and what it does not take for likely.
QUESTIONS = (
    ("The capital of France is", (" Paris", " banana", " seven"), 0),
    ("Water freezes when it gets very", (" purple", " cold", " French"), 1),
    ("One, two, three, four,", (" dog", " because", " five"), 2),
    ("Once upon a", (" time", " fork", " kilogram"), 0),
)
TASK = """
task: ropes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.mark.long
def test_a_multiple_choice_task_from_end_to_end(
    starter_path: Path, session_home: Path, tmp_path: Path
) -> None:
    folder = os.environ.get("CORDEE_TEST_LM_EVAL")  # where `lm_eval` is; it is no dependency of the tests
    program = shutil.which("lm_eval", path=folder)
    if program is None:
        pytest.skip("lm-eval is not installed: `pip install lm-eval[api]`, or CORDEE_TEST_LM_EVAL=FOLDER")
    lines = [
        json.dumps({"question": question, "choices": choices, "answer": answer})
        for question, choices, answer in QUESTIONS
    ]
    data, tasks, results = tmp_path / "ropes.jsonl", tmp_path / "tasks", tmp_path / "results"
    data.write_text("\n".join(lines))
    tasks.mkdir()
    (tasks / "ropes.yaml").write_text(TASK.format(data=data))
    with running(starter_path, tmp_path / "store", config=ServiceConfig(context=256)) as server:
        command = example("lm-eval", server.port).replace("lm_eval", program, 1)
        command = command.replace("arc_easy", f"ropes --include_path {tasks} --output_path {results}")
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run(
            command, shell=True, env=os.environ | offline, capture_output=True, text=True, timeout=6 * SECONDS
        )
    assert done.returncode == 0, done.stderr
    [written] = results.rglob("*.json")
    found = json.loads(written.read_text())["results"]["ropes"]
    assert found["acc,none"] == 1.0
