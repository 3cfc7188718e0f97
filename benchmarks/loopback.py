"""A server of random weights on this machine, and what is told about it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

SPECIAL = ("<pad>", "<s>", "</s>")
CAP = 16
START_SECONDS, END_SECONDS = 120.0, 60.0


def tiny_checkpoint(
    directory: Path, seed: int = 0, sizes: tuple[int, int, int] = (1, 2, 2), width: int = 64
) -> None:
    """Write a recurrent model of random weights, whose tokens are the characters of ASCII."""
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters = [shown.pre_tokenize_str(chr(code))[0][0] for code in range(32, 127)]
    pieces = {piece: number for number, piece in enumerate((*SPECIAL, *characters))}
    plain = Tokenizer(models.BPE(pieces, []))
    plain.pre_tokenizer, plain.decoder = shown, decoders.ByteLevel()
    # Only what ends a text is no text: any token that is generated is seen.
    plain.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    base = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=sum(sizes),
        num_attention_heads=width // 16,
        num_key_value_heads=width // 32,
        vocab_size=len(pieces),
        max_position_embeddings=512,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config = RecurrentConfig(
        base_config=base,
        num_prelude_layers=sizes[0],
        num_core_layers=sizes[1],
        num_coda_layers=sizes[2],
        source_layers=list(range(sum(sizes))),
        max_recurrences=CAP,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RecurrentForCausalLM(config)
    with torch.no_grad():
        model.model.injection.mixing.fill_(0.3)  # the state settles, and exits take hold
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def free_port() -> int:
    """Return a port that nobody has at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def server(checkpoint: Path, log: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """Run `rondo serve`, and yield its address and process number.

    Raises:
        RuntimeError: It does not start, or does not end as it should.
    """
    port = free_port()
    command = [sys.executable, "-m", "rondo", "serve", str(checkpoint), "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32", *flags]
    # Should it die in foreign code, its log tells where.
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        died, code = False, None
        try:
            url = f"http://127.0.0.1:{port}"
            _until_ready(url, process, log)
            yield url, process.pid
        finally:
            died = process.poll() is not None
            process.terminate()
            try:
                code = process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if died:
                raise RuntimeError(f"the server died with {code}: {_tail(log)}")
    if code != 0:
        raise RuntimeError(f"the server did not end as it should ({code}): {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the server does not start: {_tail(log)}")


def resident(pid: int | None) -> int | None:
    """Return the bytes of memory that a process has, None where that is not told."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def gauges(url: str) -> dict[str, float]:
    """Return the metrics that have no labels."""
    text = httpx.get(f"{url}/metrics", trust_env=False).raise_for_status().text
    samples = (one for family in text_string_to_metric_families(text) for one in family.samples)
    return {one.name: one.value for one in samples if not one.labels}
