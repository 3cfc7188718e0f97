"""A checkpoint in the hands of somebody who does not have this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import rondo, save_parent
from transformers import AutoModelForCausalLM

IDS = [[17, 40, 99, 3, 200, 64], [5, 6, 7, 8, 9, 250]]
PROMPT = "12 + 30 ="
CASES = {
    "llama": ["--num-recurrences", "2"],
    "gemma3_text": ["--split", "0,2-4,5", "--injection", "linear", "--state-init", "normal"],
    "olmo2": ["--split", "stride", "--delta-rank", "4"],
}

# Rondo may be installed where this runs, so it is made impossible to import.
STRANGER = """
import json
import sys
from importlib.abc import MetaPathFinder


class NoRondo(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] == "rondo":
            raise ImportError("rondo is not installed here")


sys.meta_path.insert(0, NoRondo())

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

given = json.load(sys.stdin)
answers = {}
for name, directory in given["checkpoints"].items():
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32
    ).eval()
    body = AutoModel.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    ids = torch.tensor(given["ids"])
    prompt = tokenizer(given["prompt"], return_tensors="pt")
    with torch.inference_mode():
        tensors = {
            "default": model(ids).logits,
            "deep": model(ids, num_recurrences=3).logits,
            "from_body": model.lm_head(body(ids, num_recurrences=3).last_hidden_state),
            "tokens": model.generate(
                **prompt, num_recurrences=3, max_new_tokens=8, min_new_tokens=8, do_sample=False
            ),
        }
    save_file(tensors, f"{given['answers']}/{name}.safetensors")
    answers[name] = {"type": config.model_type, "module": type(model).__module__}
assert not any(name.partition(".")[0] == "rondo" for name in sys.modules)
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain checkpoint, one with all that can be chosen otherwise, and one with deltas."""
    base = tmp_path_factory.mktemp("checkpoints")
    for family, words in CASES.items():
        parent = save_parent(base / f"{family}-parent", family)
        assert rondo("convert", parent, base / family, *words) == 0
    return {family: base / family for family in CASES}


@pytest.fixture(scope="module")
def strangers(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """What a fresh interpreter without the package makes of them."""
    folder = tmp_path_factory.mktemp("stranger")
    given = {
        "checkpoints": {name: str(path) for name, path in checkpoints.items()},
        "ids": IDS,
        "prompt": PROMPT,
        "answers": str(folder),
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert answer.returncode == 0, answer.stderr
    return (
        json.loads(answer.stdout),
        {name: load_file(folder / f"{name}.safetensors") for name in checkpoints},
    )


@pytest.mark.parametrize("family", CASES)
def test_the_code_in_the_checkpoint_is_what_runs(strangers: tuple, family: str) -> None:
    answer = strangers[0][family]
    assert answer["type"] == "rondo"
    assert answer["module"].startswith("transformers_modules.")


@pytest.mark.parametrize("family", CASES)
def test_it_computes_what_the_package_computes(
    checkpoints: dict[str, Path], strangers: tuple, family: str
) -> None:
    theirs = strangers[1][family]
    model = AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32).eval()
    assert type(model).__module__ == "rondo.modeling.modeling_recurrent"
    with torch.inference_mode():
        default = model(torch.tensor(IDS)).logits
        deep = model(torch.tensor(IDS), num_recurrences=3).logits
    # Another process may split its sums over other threads.
    torch.testing.assert_close(theirs["default"], default, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["deep"], deep, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(deep, default, atol=1e-3)
    if family != "gemma3_text":  # which caps its logits behind the head.
        torch.testing.assert_close(theirs["from_body"], deep, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CASES)
def test_it_generates_what_the_package_generates(
    checkpoints: dict[str, Path], strangers: tuple, family: str
) -> None:
    theirs = strangers[1][family]["tokens"]
    model = AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32).eval()
    prompt = torch.tensor([list(theirs[0][: len(PROMPT)])])
    ours = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_recurrences=3,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
    )
    assert ours.shape == (1, len(PROMPT) + 8)
    assert torch.equal(ours, theirs)
