"""What a plain stack of layers can stand for, and the tensors that it is made of.

A plain stack hands on one stream, and has no place for the prelude's output e beside the state s.
That permits two kinds of injection:

    x_1 = e                     for the first iteration: state_init input and mix, or zeros and add
    x_i = s_{i-1}, i >= 2       mix with 1 everywhere, linear with [I | 0]

and, for completeness, x_i = e (mix with 0, [0 | I]), where no iteration but the last matters.
Everything else is refused: an approximation would be another model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from rondo.convert.deltas import merged
from rondo.convert.families import cut_config
from rondo.errors import UserError
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.provenance import read_json, write_json

INJECTION = "model.injection."


# ---- what an injection permits


@dataclass(frozen=True)
class Passage:
    """What an injection amounts to, as far as layers alone can stand for it.

    Attributes:
        begins: Whether the first iteration is given e itself.
        state_alone: Whether every later one is given the state before it, and nothing else.
        inputs_alone: Whether every one is given e, and nothing else.
    """

    begins: bool
    state_alone: bool
    inputs_alone: bool


def passage(kind: str, state_init: str, tensors: Mapping[str, Tensor]) -> Passage:
    """Read off the stored injection what it does with s and e.

    Args:
        kind: `injection` of the config.
        state_init: `state_init` of the config.
        tensors: The injection's tensors by their names within it.
    """
    # inject(s, e) = on_state s + on_inputs e, each a matrix (D, D) or a diagonal (D,) or (1,).
    if kind == "linear":
        on_state, on_inputs = tensors["weight"].float().chunk(2, dim=1)
        one = torch.eye(len(on_state))
    elif kind == "mix":
        on_state = tensors["mixing"].float()
        on_inputs, one = 1 - on_state, torch.ones(1)
    else:
        on_state = on_inputs = one = torch.ones(1)
    inputs_alone = bool((on_state == 0).all() and (on_inputs == one).all())
    begins = {
        # mix is written around e, so s = e gives e to the last bit, whatever 1 - a rounds to.
        "input": kind == "mix" or bool((on_state + on_inputs == one).all()),
        "zeros": bool((on_inputs == one).all()),
        "normal": inputs_alone,
    }
    state_alone = bool((on_state == one).all() and (on_inputs == 0).all())
    return Passage(begins[state_init] or inputs_alone, state_alone, inputs_alone)


def iterations_needed(permitted: Passage, depth: int) -> tuple[int, ...] | None:
    """Return the iterations (1-based) that a plain stack must run for a depth; None: it cannot."""
    if permitted.inputs_alone:
        return (depth,)
    if permitted.begins and (depth == 1 or permitted.state_alone):
        return tuple(range(1, depth + 1))
    return None


def refusal(checkpoint: "Checkpoint", permitted: Passage, depth: int) -> UserError:
    """Return why a depth cannot be exported, and what can be done instead."""
    config = checkpoint.config
    place = "and a stack of plain layers has no place for it beside the state"
    if not permitted.begins:
        why = (
            f"its first iteration begins with something else than the prelude's output (injection "
            f"{config.injection}, state_init {config.state_init}), which no layer of the family "
            "computes"
        )
        instead = "no depth of it can be written"
    else:
        detail = "it adds it each time"
        if config.injection == "mix":
            low, high = (float(one) for one in checkpoint.injection()["mixing"].aminmax())
            detail = f"mixing lies in {low:.3g} .. {high:.3g}; only 1 everywhere would not"
        elif config.injection == "linear":
            detail = "only the weight [I | 0] would not"
        why = (
            f"its {config.injection} injection brings the prelude's output back in every iteration "
            f"({detail}), {place}"
        )
        instead = "R = 1 can be written (--unrolled 1)"
    return UserError(
        f"{checkpoint.name} cannot be unrolled to R = {depth}: {why}. {instead}; to have its depth "
        "serve the directory itself, with transformers (trust_remote_code=True) or rondo generate"
    )


# ---- the recurrent checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A recurrent checkpoint on disk.

    Attributes:
        name: What the user called it.
        path: The directory.
        config: Its config.
        files: Weight file of each tensor, by tensor name.
    """

    name: str
    path: Path
    config: RecurrentConfig
    files: dict[str, Path]

    def tensor(self, name: str) -> Tensor:
        """Read a tensor, mapped rather than copied.

        Raises:
            UserError: It is not there, or its file is damaged.
        """
        if name not in self.files:
            raise UserError(f"{self.name} lacks the tensor {name}: it is damaged, write it again")
        try:
            with safe_open(self.files[name], framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.files[name]} cannot be read as safetensors: {error}") from error

    def injection(self) -> dict[str, Tensor]:
        """Read the injection's tensors, by their names within it."""
        return {
            name.removeprefix(INJECTION): self.tensor(name)
            for name in self.files
            if name.startswith(INJECTION)
        }

    def merged(self, name: str, iteration: int) -> Tensor:
        """Read a parameter of the core as an iteration (1-based) has it, in float32."""
        owner = name.rpartition(".")[0]
        names = [one for one in self.files if one.startswith(f"{owner}.delta_")]
        deltas = {one: self.tensor(one) for one in names}
        place = (iteration - 1) % self.config.num_delta_iterations
        return merged(name, self.tensor(name), deltas, place + 1)


def open_checkpoint(name: str) -> Checkpoint:
    """Open a recurrent checkpoint, without reading its weights.

    Raises:
        UserError: The directory holds none, or it cannot be read.
    """
    path = Path(name)
    kind = read_json(path / "config.json").get("model_type")
    if kind != "rondo":
        raise UserError(f"{name} is a {kind} model, not a recurrent one: any engine loads it as is")
    try:
        config = RecurrentConfig.from_pretrained(path)
        files = {}
        for shard in sorted(path.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), shard)
    except (ValueError, TypeError, KeyError, SafetensorError, OSError) as error:
        raise UserError(f"{name} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if not files:
        raise UserError(f"{name} holds no weights (*.safetensors)")
    return Checkpoint(name, path, config, files)


# ---- the plan


@dataclass(frozen=True)
class Piece:
    """One tensor of the export.

    Attributes:
        name: Its name there.
        stored: Its name in the recurrent checkpoint.
        iteration: The iteration (1-based) whose deltas go into it, 0 for none.
    """

    name: str
    stored: str
    iteration: int = 0


@dataclass(frozen=True)
class Plan:
    """What will be written, settled before anything is.

    Attributes:
        checkpoint: Where from.
        depth: R.
        config: The plain model's config.
        pieces: Its tensors, in the order of the layers.
        exact: Whether both models do the same additions in the same order.
    """

    checkpoint: Checkpoint
    depth: int
    config: PreTrainedConfig
    pieces: tuple[Piece, ...]
    exact: bool

    def read(self, piece: Piece, rounded: bool = True) -> Tensor:
        """Read a piece; one with deltas in the type of the checkpoint, or not rounded to it."""
        shared = self.checkpoint.tensor(piece.stored)
        if not piece.iteration:
            return shared
        merged = self.checkpoint.merged(piece.stored, piece.iteration)
        return merged.to(shared.dtype) if rounded else merged

    def rounds(self) -> bool:
        """Whether folding the deltas in rounds weights to fewer bits than they were summed in."""
        stored = {piece.stored for piece in self.pieces if piece.iteration}
        return any(self.checkpoint.tensor(name).dtype != torch.float32 for name in stored)

    def sizes(self) -> dict[str, int]:
        """Count parameters and bytes, of the export and of the recurrent checkpoint."""
        stored = {name: self.checkpoint.tensor(name) for name in self.checkpoint.files}
        written = [stored[piece.stored] for piece in self.pieces]
        return {
            "layers": int(self.config.num_hidden_layers),
            "parameters": sum(tensor.numel() for tensor in written),
            "bytes": sum(tensor.nbytes for tensor in written),
            "recurrent_layers": self.checkpoint.config.num_hidden_layers,
            "recurrent_parameters": sum(tensor.numel() for tensor in stored.values()),
            "recurrent_bytes": sum(tensor.nbytes for tensor in stored.values()),
        }


def make_plan(checkpoint: Checkpoint, depth: int) -> Plan:
    """Settle what an export will write.

    Raises:
        UserError: The injection does not permit the depth, it is beyond the cap, or tensors are
            missing.
    """
    config = checkpoint.config
    if depth > config.max_recurrences:
        raise UserError(
            f"--unrolled {depth} is beyond the model's cap of {config.max_recurrences} "
            f"(max_recurrences in {checkpoint.name}/config.json)"
        )
    permitted = passage(config.injection, config.state_init, checkpoint.injection())
    if (iterations := iterations_needed(permitted, depth)) is None:
        raise refusal(checkpoint, permitted, depth)
    run = layers_run(config, iterations)
    plain = plain_config(config, [position for position, _ in run])
    pieces = tuple(_pieces(checkpoint, run, plain))
    same = len(iterations) == 1 and config.injection != "linear" and not config.delta_rank
    return Plan(checkpoint, depth, plain, pieces, exact=same)


def layers_run(config: RecurrentConfig, iterations: Sequence[int]) -> list[tuple[int, int]]:
    """Return each layer of the unrolled stack as (stored position, iteration or 0)."""
    core = config.num_prelude_layers
    coda = core + config.num_core_layers
    return [
        *((position, 0) for position in range(core)),
        *((position, iteration) for iteration in iterations for position in range(core, coda)),
        *((position, 0) for position in range(coda, config.num_hidden_layers)),
    ]


def plain_class(base: PreTrainedConfig) -> Any:
    """Return the family's own class of causal language models."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(base)]


def plain_config(config: RecurrentConfig, positions: Sequence[int]) -> PreTrainedConfig:
    """Return the parent's config for a stack of stored layers, per-layer lists stacked alike."""
    base = config.base_config
    fields = cut_config(base, list(positions)) | {
        "architectures": [plain_class(base).__name__],
        "dtype": config.dtype,
    }
    return AutoConfig.for_model(**fields)


def per_layer_fields(base: PreTrainedConfig) -> list[str]:
    """Return the fields that say something of each layer, such as its kind of attention."""
    return [
        name
        for name, value in base.to_dict().items()
        if isinstance(value, list) and len(value) == base.num_hidden_layers and "layer" in name
    ]


def irregular_fields(plain: PreTrainedConfig) -> list[str]:
    """Return the per-layer fields that are not what the family would work out for such a depth.

    An engine that reads a period instead of the list would run another model.
    """
    lists = per_layer_fields(plain)
    rest = {name: value for name, value in plain.to_dict().items() if name not in lists}
    usual = AutoConfig.for_model(**rest)
    return [name for name in lists if getattr(usual, name, None) != getattr(plain, name)]


def _pieces(
    checkpoint: Checkpoint, run: Sequence[tuple[int, int]], plain: PreTrainedConfig
) -> Iterator[Piece]:
    with torch.device("meta"):
        model = plain_class(plain)(plain)
    has_deltas = bool(checkpoint.config.delta_rank)
    prefix = model.base_model_prefix
    for name in model.state_dict():
        part, _, rest = name.removeprefix(f"{prefix}.layers.").partition(".")
        if name == "lm_head.weight" and plain.tie_word_embeddings:
            continue
        if not name.startswith(f"{prefix}.layers."):
            ours = name.removeprefix(f"{prefix}.")
            piece = Piece(name, name if ours == name else f"model.{ours}")
        else:
            position, iteration = run[int(part)]
            piece = Piece(name, f"model.layers.{position}.{rest}", has_deltas * iteration)
        checkpoint.tensor(piece.stored)  # says so before anything is written if it is missing
        yield piece


# ---- writing


def shards_of(plan: Plan, limit: float) -> list[list[Piece]]:
    """Part the pieces, in order, into files of at most a number of bytes, or of one tensor."""
    shards: list[list[Piece]] = []
    room = 0.0
    for piece in plan.pieces:
        size = plan.checkpoint.tensor(piece.stored).nbytes
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(piece)
        room -= size
    return shards


def write_weights(plan: Plan, directory: Path, limit: float, rounded: bool = True) -> None:
    """Stream the weights, one file at a time, and their index where there are several."""
    shards = shards_of(plan, limit)
    weight_map: dict[str, str] = {}
    total = 0
    for number, pieces in enumerate(tqdm(shards, desc="export", unit="file", disable=None), 1):
        # A clone, because iterations share what they do not change, which a file must not.
        tensors = {piece.name: plan.read(piece, rounded).clone() for piece in pieces}
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = directory / (name if len(shards) > 1 else "model.safetensors")
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)
        weight_map |= dict.fromkeys(tensors, file.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / "model.safetensors.index.json", index)
