"""The proof of a conversion: the recurrent model at r = 1 against its parent, and against itself.

The parent is run by its own code, unchanged: layers that the split drops are skipped by hooks,
so its masks, positions and per-layer settings stay those of the original indices.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from rondo.config import VerifyConfig
from rondo.convert import deltas, raven
from rondo.convert.source import Source, open_source, read_shapes, read_tensors, weights_hash
from rondo.errors import ProofError, UserError
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.provenance import read_json

# Where the order of additions may differ (batching, caching), fp32 logits may by this much,
# relative to their spread.
TOLERANCE = 2e-4
DEPTHS = (1, 2, 3)
# How far the fit of deltas may be from what was told, relative to what they stand for.
FIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Check:
    """One check: the largest error found and the largest allowed."""

    name: str
    error: float
    allowed: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN never is."""
        return self.error <= self.allowed

    def line(self) -> str:
        """Return the check as a line to read."""
        state = "ok  " if self.passed else "FAIL"
        return f"  {state} {self.name}: {self.measured}"

    @property
    def measured(self) -> str:
        """The error beside what is allowed, in words."""
        error = f"error {self.error:.3g}, allowed {self.allowed:.3g}"
        return f"{error} ({self.detail})" if self.detail else error

    def as_dict(self) -> dict[str, object]:
        """Return JSON values; a NaN becomes a string, which JSON has no number for."""
        values = asdict(self) | {"passed": self.passed, "measured": self.measured}
        if not math.isfinite(self.error):
            values["error"] = str(self.error)
        return values


def raise_if_failed(checks: list[Check], consequence: str = "") -> None:
    """Raise for failed checks, saying which and by how much.

    Raises:
        ProofError: A check failed.
    """
    failed = [f"{check.name}: {check.measured}" for check in checks if not check.passed]
    if failed:
        raise ProofError(
            f"the checkpoint is not faithful to its parent: {'; '.join(failed)}{consequence}"
        )


def proof_tokens(vocab_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (3, 24) and an attention mask whose rows 1 and 2 are left-padded."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, vocab_size, (3, 24), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :5] = 0
    attention_mask[2, :11] = 0
    return input_ids, attention_mask


class Loader:
    """Loads models in float32: into memory, or layer by layer from their files as they run.

    Args:
        resident: Whether they fit in memory.
        scratch: An empty directory, which loading from files asks for and leaves empty.
    """

    def __init__(self, resident: bool, scratch: Path):
        self.resident = resident
        self._options: dict[str, Any] = {"dtype": torch.float32}
        if not resident:
            self._options |= {"device_map": {"": "disk"}, "offload_folder": scratch}

    def load(self, model_class: Any, path: Path) -> tuple[Any, dict[str, Any]]:
        """Return a model for inference, and which tensors found no place."""
        model, info = model_class.from_pretrained(path, output_loading_info=True, **self._options)
        return model.eval(), info


@torch.no_grad()
def parent_logits(
    source: Source,
    model: RecurrentForCausalLM,
    own: dict[str, torch.Tensor],
    input_ids: torch.Tensor,
    loader: Loader,
) -> torch.Tensor:
    """Run the parent over the kept layers only, (B, T, V).

    Where the model's first iteration does not start from e itself, the same injection is put
    before the parent's first core layer.
    """
    parent, _ = loader.load(AutoModelForCausalLM, source.path)
    kept: Any = model.config.source_layers
    layers = parent.base_model.layers
    for index, layer in enumerate(layers):
        if index not in kept:
            layer.register_forward_hook(_skip, with_kwargs=True)
    core = layers[kept[model.config.num_prelude_layers]]
    if not _starts_from_inputs(model):
        core.register_forward_pre_hook(_Injections(model, own), with_kwargs=True)
    return parent(input_ids, use_cache=False).logits


def _skip(layer: nn.Module, args: tuple, kwargs: dict, output: object) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _starts_from_inputs(model: RecurrentForCausalLM) -> bool:
    """Whether inject(s_0, e) = e by construction, so that r = 1 is the parent itself."""
    kind, start = model.config.injection, model.config.state_init
    return (kind, start) in {("mix", "input"), ("add", "zeros")}


class _Injections:
    """inject(s, e) recomputed from the formula, as a hook before the first layer of iterations."""

    def __init__(self, model: RecurrentForCausalLM, own: dict[str, torch.Tensor]):
        self.body = model.model
        self.own = own
        self.e: torch.Tensor | None = None

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        s = args[0]
        if self.e is None:
            self.e = s
            s = self.body.initial_state(s, torch.arange(s.shape[1])[None], 0)
        if self.body.config.injection == "mix":
            mixing = self.own["model.injection.mixing"].float()
            mixed = (1 - mixing) * self.e + mixing * s
        elif self.body.config.injection == "add":
            mixed = self.e + s
        else:
            weight = self.own["model.injection.weight"].float()
            on_state, on_inputs = weight.split(s.shape[-1], dim=1)
            mixed = s @ on_state.T + self.e @ on_inputs.T
        return (mixed, *args[1:]), kwargs


def _own_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read what the parent lacks, the injection and the deltas, as it lies in the files."""
    return {
        name: tensor
        for shard in sorted(directory.glob("*.safetensors"))
        for name, tensor in read_tensors(shard)
        if name.startswith("model.injection.") or ".delta_" in name
    }


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


def _spread(logits: torch.Tensor) -> float:
    return float(logits.std().clamp(min=1e-6))


def fits_in_memory(source: Source) -> bool:
    """Whether the model in float32 fits twice in half of the memory: itself, and a saved copy."""
    values = sum(
        math.prod(shape) for shard in source.shards() for shape in read_shapes(shard).values()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2 * 4 * values < memory / 2


@torch.no_grad()
def prove(directory: Path, source: Source, facts: dict[str, Any], seed: int = 0) -> list[Check]:
    """Run every check of a converted checkpoint against its parent, in float32.

    Args:
        directory: The checkpoint.
        source: Its parent.
        facts: What run.json says of the conversion.
        seed: Seed of the tokens.

    Raises:
        UserError: The checkpoint is damaged.
    """
    tensors = facts["tensors"]
    # A checkpoint may lie where nothing can be written; a copy of it is large for /tmp.
    beside = directory.parent if os.access(directory.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=beside, prefix=".proof.") as scratch:
        loader = Loader(fits_in_memory(source), Path(scratch))
        try:
            model, loading = loader.load(RecurrentForCausalLM, directory)
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{directory} is damaged ({str(error).strip().splitlines()[0]}): convert again"
            ) from error
        input_ids, attention_mask = proof_tokens(model.config.vocab_size, seed)
        same_parent = _same_weights(
            "the parent's weights are those converted", source.shards(), tensors["parent_hash"]
        )
        own = _own_tensors(directory)
        faithful: list[Check] = []
        if not model.config.delta_rank:
            faithful = [_against_parent(model, source, own, input_ids, loader)]
        elif same_parent.passed:  # of another parent the fit is not
            faithful = [*_against_unrolled(model, source, own, input_ids, loader, Path(scratch))]
            faithful.append(_fit_as_told(model.config, source, own, facts["plan"]["deltas"]))
        return [
            *faithful,
            _accounted(loading, tensors),
            *_against_itself(model, input_ids, attention_mask),
            *_saved_and_loaded(model, directory, input_ids, loader, Path(scratch) / "saved"),
            same_parent,
            _same_weights(
                "the checkpoint's weights are those written",
                sorted(directory.glob("*.safetensors")),
                tensors["hash"],
            ),
        ]


def _against_parent(
    model: RecurrentForCausalLM,
    source: Source,
    own: dict[str, torch.Tensor],
    input_ids: torch.Tensor,
    loader: Loader,
) -> Check:
    ours = model(input_ids, num_recurrences=1).logits
    if source.raven is None:
        theirs = parent_logits(source, model, own, input_ids, loader)
    else:
        theirs = raven.reference_logits(source.raven, source.shards(), input_ids)
    exact = _starts_from_inputs(model) and source.raven is None
    kept: Any = model.config.source_layers
    without = len(kept) < source.config.num_hidden_layers
    return Check(
        f"r = 1 equals the parent{' without the dropped layers' if without else ''}",
        _distance(ours, theirs),
        0.0 if exact else TOLERANCE * _spread(theirs),
        "largest difference of logits, float32",
    )


def _against_unrolled(
    model: RecurrentForCausalLM,
    source: Source,
    own: dict[str, torch.Tensor],
    input_ids: torch.Tensor,
    loader: Loader,
    scratch: Path,
) -> Iterator[Check]:
    """Compare with plain models that have a layer, deltas merged in, for each that is run."""
    config = model.config
    for depth in {1, min(config.num_delta_iterations, config.max_recurrences)}:
        place = scratch / f"unrolled-{depth}"
        deltas.write_unrolled(source, config, own, depth, place)
        plain, _ = loader.load(AutoModelForCausalLM, place)
        injections = _Injections(model, own)
        for iteration in range(depth):
            first = config.num_prelude_layers + iteration * config.num_core_layers
            layer = plain.base_model.layers[first]
            layer.register_forward_pre_hook(injections, with_kwargs=True)
        theirs = plain(input_ids, use_cache=False).logits
        shutil.rmtree(place)
        yield Check(
            f"r = {depth} equals the parent's layers with the deltas merged in",
            _distance(model(input_ids, num_recurrences=depth).logits, theirs),
            TOLERANCE * _spread(theirs),
            "largest difference of logits, float32",
        )


def _fit_as_told(
    config: Any, source: Source, own: dict[str, torch.Tensor], told: dict[str, Any]
) -> Check:
    found = deltas.fit_errors(source, config, told["targets"], own)
    return Check(
        "the deltas are as near to the replaced layers as was told",
        _distance(torch.tensor(found), torch.tensor(told["fit_error"])),
        FIT_TOLERANCE,
        f"relative error of the fit at most {max(map(max, found)):.3g}",
    )


def _same_weights(name: str, shards: list[Path], known: str) -> Check:
    found = weights_hash(shards)
    return Check(name, float(found != known), 0.0, f"sha256 {found[:16]}")


def _accounted(loading: dict, tensors: dict[str, Any]) -> Check:
    unplaced = [*loading["missing_keys"], *loading["unexpected_keys"]]
    unused = ("dropped", "fitted", "tied_or_computed")
    told = tensors["used"] + sum(len(tensors.get(fate, ())) for fate in unused)
    return Check(
        "every tensor is used once or dropped on purpose",
        float(len(unplaced) + abs(tensors["in_parent"] - told)),
        0.0,
        f"unplaced: {', '.join(sorted(unplaced))}" if unplaced else "none left over",
    )


def _depths(model: RecurrentForCausalLM) -> list[int]:
    return [depth for depth in DEPTHS if depth <= model.config.max_recurrences]


def _against_itself(
    model: RecurrentForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> Iterator[Check]:
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    real = attention_mask[..., None]
    cached_error = padded_error = spread = 0.0
    tried = _depths(model)
    for depth in tried:
        whole = model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            num_recurrences=depth,
        ).logits
        spread = max(spread, _spread(whole))
        cached = _decode_with_cache(model, input_ids, attention_mask, position_ids, depth)
        cached_error = max(cached_error, _distance(whole * real, cached * real))
        for row in range(len(input_ids)):
            start = int((attention_mask[row] == 0).sum())
            alone = model(input_ids[row : row + 1, start:], num_recurrences=depth).logits
            padded_error = max(padded_error, _distance(whole[row : row + 1, start:], alone))
    depths = f"r = {', '.join(map(str, tried))}"
    yield Check("cached equals uncached", cached_error, TOLERANCE * spread, depths)
    yield Check("left-padded batch equals single rows", padded_error, TOLERANCE * spread, depths)


def _decode_with_cache(
    model: RecurrentForCausalLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    depth: int,
) -> torch.Tensor:
    pieces, cache, prompt = [], None, 2 * input_ids.shape[1] // 3
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, input_ids.shape[1]))]:
        output = model(
            input_ids[:, start:stop],
            attention_mask=attention_mask[:, :stop],
            position_ids=position_ids[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            num_recurrences=depth,
        )
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def _saved_and_loaded(
    model: RecurrentForCausalLM,
    directory: Path,
    input_ids: torch.Tensor,
    loader: Loader,
    place: Path,
) -> Iterator[Check]:
    """Save the model, load it again and compare; one too large for memory is loaded again only."""
    if loader.resident:
        model.save_pretrained(place)
    again, _ = loader.load(RecurrentForCausalLM, place if loader.resident else directory)
    depth = _depths(model)[-1]
    error = _distance(
        model(input_ids, num_recurrences=depth).logits,
        again(input_ids, num_recurrences=depth).logits,
    )
    yield Check("save and load give the same logits", error, 0.0, f"r = {depth}")
    if model.config.tie_word_embeddings:
        apart = [
            name
            for name, one in (("as converted", model), ("as saved again", again))
            if loader.resident and one.lm_head.weight is not one.model.embed_tokens.weight
        ]
        stored = [
            name
            for shard in directory.glob("*.safetensors")
            for name, _ in read_tensors(shard)
            if name == "lm_head.weight"
        ]
        detail = ", ".join([*apart, *stored]) or "in memory and on disk"
        yield Check("tied embeddings are one storage", float(len(apart + stored)), 0.0, detail)


def run(config: VerifyConfig) -> None:
    """Run `rondo verify`.

    Raises:
        UserError: It is no converted checkpoint, or its parent is not where it was.
        ProofError: A check failed.
    """
    directory = Path(config.model)
    facts = read_json(directory / "run.json")
    if facts.get("kind") != "convert":
        raise UserError(
            f"{config.model} is no output of rondo convert (it is a {facts.get('kind')}): verify "
            "the checkpoint it was trained from"
        )
    if (
        not {"parent", "plan", "tensors"} <= facts.keys()
        or not {"hash", "in_parent"} <= facts["tensors"].keys()
    ):
        raise UserError(
            f"{directory / 'run.json'} is incomplete or of an older form: convert again"
        )
    parent = config.parent or facts["parent"]["path"]
    if config.parent is None and Path(parent).is_absolute() and not Path(parent).exists():
        raise UserError(f"the parent is no longer at {parent}: say where it is with --parent")
    revision = None if config.parent else facts["parent"].get("revision")
    with open_source(parent, revision) as source:
        checks = prove(directory, source, facts)
    if config.json_output:
        print(json.dumps([check.as_dict() for check in checks], indent=1))
    else:
        print("\n".join(check.line() for check in checks))
    raise_if_failed(checks)
    if not config.json_output:
        print(f"{len(checks)} checks passed")
