import json
import logging
import sys

import pytest
import torch

from sparse_bitnet.core import ConfigError, DataError, MissingExtraError
from sparse_bitnet.evaluate import evaluate_tasks

QUESTIONS = [
    {"question": f"the quick {word} dog jumps over", "choices": ["lazy", "green"], "answer": k % 2}
    for k, word in enumerate(["brown", "seven", "birds", "watch", "them", "quietly"])
]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "local.yaml").write_text(
        "task: local_choice\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: '{data}'}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\n"
        "doc_to_choice: choices\n"
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    """Any attempt to connect fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection was attempted: {args[1:]}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(
        "datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache")
    )


@torch.no_grad()
def slow_accuracy(model, tokenizer):
    right = 0
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            before = tokenizer(question["question"])["input_ids"]
            whole = torch.tensor([tokenizer(f"{question['question']} {choice}")["input_ids"]])
            log_p = model(input_ids=whole).logits.log_softmax(-1)[0, :-1]
            chosen = log_p.gather(-1, whole[0, 1:, None])[len(before) - 1 :]
            scores.append(chosen.sum().item())
        right += scores.index(max(scores)) == question["answer"]
    return right / len(QUESTIONS)


@pytest.mark.parametrize("name", ["model", "ternary_model"])
def test_local_task_without_a_network(name, request, tokenizer, task_folder):
    model = request.getfixturevalue(name)
    model.train()
    try:
        found = evaluate_tasks(model, tokenizer, ["local_choice"], include_path=task_folder)
        assert model.training
    finally:
        model.eval()
    assert set(found) == {"local_choice"}
    metrics = found["local_choice"]
    assert metrics["acc"] == pytest.approx(slow_accuracy(model, tokenizer))
    assert set(metrics) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert logging.getLogger("lm_eval").level != logging.ERROR


def test_unknown_tasks_and_folders(model, tokenizer, task_folder):
    with pytest.raises(ConfigError, match=r"task nope does not exist .*; there are: local_choice"):
        evaluate_tasks(model, tokenizer, ["local_choice", "nope"], include_path=task_folder)
    with pytest.raises(DataError, match="no such directory of task YAML files"):
        evaluate_tasks(model, tokenizer, ["local_choice"], include_path=task_folder / "none")
    with pytest.raises(ConfigError, match="no tasks were given"):
        evaluate_tasks(model, tokenizer, [])


def test_without_lm_eval(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparse-bitnet\[eval\]'"):
        evaluate_tasks(model, tokenizer, ["local_choice"])
