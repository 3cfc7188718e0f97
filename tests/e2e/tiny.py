"""Tiny random parents on disk, and the command line called in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.utils.logging import disable_progress_bar

from rondo.cli import main

FAMILIES = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "olmo2": Olmo2Config,
    "gemma3_text": Gemma3TextConfig,
}
LAYERS, WIDTH, VOCAB, KV_HEADS, HEAD_DIM = 6, 32, 260, 2, 8
# What is on stderr is asserted to the line.
disable_progress_bar()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: 256 bytes and four special tokens."""
    pieces = ["<bos>", "<eos>", "<pad>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def family_config(family: str, **fields: Any) -> PreTrainedConfig:
    """The config of a tiny model, narrow, with what its family has of its own."""
    own: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": family == "gemma3_text",
    }
    if family == "gemma3_text":
        # A window shorter than the proof's 24 tokens, so that a wrong mask shows.
        own |= {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 12,
            "final_logit_softcapping": 5.0,
        }
    return FAMILIES[family](**own | fields)


def parent_model(family: str = "llama", **fields: Any) -> PreTrainedModel:
    """A model whose weights are random and large enough that each one tells, norms included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family_config(family, **fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif "embed_tokens" not in name:
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model.eval()


def save_parent(directory: Path, family: str = "llama", **fields: Any) -> Path:
    """Save a tiny parent with its tokenizer and return its directory."""
    parent_model(family, **fields).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def rondo(*words: object) -> int:
    """Call the command line in this process and return its exit code.

    The flag parser leaves by SystemExit, as it would leave a console script.
    """
    try:
        return main([str(word) for word in words])
    except SystemExit as leaving:
        return -1 if leaving.code is None else int(leaving.code)


def json_of(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a model directory, however sharded."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a directory with one weight file, in place."""
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def tree(directory: Path) -> dict[str, bytes | None]:
    """All that lies below a directory, hidden or not: content by path, None for a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refusal consists of."""
    text = capsys.readouterr().err.strip()
    assert text.startswith("rondo "), text
    assert "\n" not in text, text
    return text
