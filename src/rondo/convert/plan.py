"""What a conversion will do, settled and checked before anything is written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rondo.config import ConvertConfig
from rondo.convert import card, probe, raven, split
from rondo.convert.deltas import Deltas, check_rank, check_targets, choose_targets, fit
from rondo.convert.families import cut_config, skeleton
from rondo.convert.source import Source, read_shapes
from rondo.convert.split import Split
from rondo.errors import UserError
from rondo.flops import Costs, costs_of
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.injection_recurrent import DEFAULT_MIXING
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

DEPTHS = (1, 2, 4, 8, 16, 32)
DEFAULT_DEPTH = 4
DEFAULT_STRIDE = 2
DEFAULT_DELTA_ITERATIONS = 2


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do, settled before anything is written.

    Attributes:
        split: The parent's layers of each part.
        num_layers: Depth of the parent.
        model: Config of the recurrent model.
        mixing: Start of the injection, or None where it has none to choose.
        seed: Seed of a random injection.
        translate: Turns a parent tensor into new ones by name; into none where it is not used.
        dropped: Parent tensors of layers that no part uses.
        fitted: Parent tensors of layers that are there by the deltas only.
        tied: Parent tensors that merely repeat the embedding and are not stored again.
        costs: Parameters and costs by part.
        deltas: What sets the iterations apart, where they do not share all.
    """

    split: Split
    num_layers: int
    model: RecurrentConfig
    mixing: float | None
    seed: int
    translate: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
    dropped: tuple[str, ...]
    fitted: tuple[str, ...]
    tied: tuple[str, ...]
    costs: Costs
    deltas: Deltas | None = None

    def summary(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        costs = self.costs
        return {
            "split": str(self.split),
            "sizes": self.split.sizes,
            "dropped_layers": self.split.dropped(self.num_layers),
            "injection": self.model.injection,
            "state_init": self.model.state_init,
            "mixing": self.mixing,
            "tied_embedding": bool(self.model.tie_word_embeddings),
            "parameters": {
                "prelude": costs.prelude_parameters,
                "core": costs.core_parameters,
                "deltas": costs.delta_parameters,
                "coda": costs.coda_parameters,
                "injection": costs.injection_parameters,
                "norm": costs.norm_parameters,
                "embedding": costs.embedding_parameters,
                "head": costs.head_parameters,
                "total": costs.total_parameters,
            },
            "deltas": {
                "rank": self.model.delta_rank,
                "num_iterations": self.model.num_delta_iterations,
                "targets": self.deltas.targets,
                "fit_error": self.deltas.errors,
            }
            if self.deltas
            else None,
            "depths": [
                {
                    "num_recurrences": r,
                    "effective_depth": costs.effective_depth(r),
                    "forward_flops_per_token": costs.forward_flops(r, seq_len=1),
                    "layer_flops_per_token": costs.paper_forward_flops(r),
                    "kv_bytes_per_token": costs.kv_bytes(r, self.bytes_per_value),
                }
                for r in DEPTHS
                if r <= self.model.max_recurrences
            ],
        }

    @property
    def bytes_per_value(self) -> int:
        """Bytes of one stored weight, and of one cached key or value at that type."""
        dtype: Any = self.model.dtype or torch.float32
        return torch.empty(0, dtype=dtype).element_size()


def choose_split(config: ConvertConfig, source: Source) -> tuple[Split, float | None]:
    """Return the split and, where a probe chose one, the mixing.

    Raises:
        UserError: The settings contradict each other or the model.
    """
    depth = source.config.num_hidden_layers
    sizes = split.parse_sizes(config.sizes) if config.sizes is not None else None
    for name, kind in (("stride", "stride"), ("delta_target", "stride"), ("probe", "auto")):
        if getattr(config, name) and config.split != kind:
            raise UserError(f"--{name.replace('_', '-')} goes with --split {kind}: add it")
    for name in ("delta_target", "delta_iterations"):
        if getattr(config, name) and not config.delta_rank:
            raise UserError(f"--{name.replace('_', '-')} goes with --delta-rank: add it")
    if config.delta_iterations and config.split == "stride":
        raise UserError("--delta-iterations is the stride with --split stride: leave it out")
    if config.preset and config.preset != "paper":
        if config.split is not None or sizes:
            raise UserError(f"--preset {config.preset} fixes the split: leave --split and --sizes")
        return split.preset_split(config.preset, source.config.model_type, depth), None
    kind = config.split
    if kind is None:
        kind = "drop" if config.preset == "paper" else "keep"
    if sizes and kind not in ("keep", "drop", "stride"):
        raise UserError(f"--sizes goes with keep, drop or stride, not with --split {kind}")
    if config.preset == "paper" and config.split is None and not sizes:
        settings = source.config
        published = split.published_split(settings.model_type, depth, settings.hidden_size)
        if published is not None:
            return published, None
    if kind == "keep":
        return split.keep_split(depth, sizes), None
    if kind == "drop":
        return split.drop_split(depth, sizes), None
    if kind == "stride":
        return split.stride_split(depth, config.stride or DEFAULT_STRIDE, sizes), None
    if kind == "auto":
        choice = probe.choice_for(config, source)
        return split.parse_split(choice["split"], depth), choice["mixing"]
    return split.parse_split(kind, depth), None


def make_plan(config: ConvertConfig, source: Source) -> Plan:
    """Settle what the conversion does.

    Raises:
        UserError: The family cannot be done, or the settings do not fit it.
    """
    if source.raven is not None:
        return plan_import(config, source)
    parent = skeleton(source.config)
    chosen, probed_mixing = choose_split(config, source)
    paper = config.preset == "paper"
    injection = config.injection or ("linear" if paper else "mix")
    state_init = config.state_init or (
        "normal" if paper else "zeros" if injection == "add" else "input"
    )
    random = config.random_injection or paper
    if random and injection != "linear":
        raise UserError(f"--random-injection is for --injection linear, not for {injection}")
    if config.mixing is not None and (random or injection == "add"):
        raise UserError("--mixing has no meaning for an injection that is random or adds")
    mixing = config.mixing if config.mixing is not None else probed_mixing
    base_config = cut_config(source.config, list(chosen.layers))
    tied = source.config.tie_word_embeddings and not (config.untie or paper)
    base_config["tie_word_embeddings"] = tied
    prelude, core, coda = chosen.sizes
    model = RecurrentConfig(
        base_config=base_config,
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        source_layers=list(chosen.layers),
        injection=injection,
        state_init=state_init,
        num_recurrences=default_depth(config, DEFAULT_DEPTH),
        max_recurrences=config.max_recurrences,
        delta_rank=config.delta_rank,
        num_delta_iterations=num_delta_iterations(config),
        architectures=["RecurrentForCausalLM"],
        dtype=source.config.dtype,
    )
    names, dropped, repeated = map_tensors(source, parent, chosen, bool(tied))
    fitted = bool(config.delta_rank) and config.split == "stride"
    # With fitted deltas the iterations continue each other, as the layers they stand for did.
    usual = 1.0 if fitted else DEFAULT_MIXING
    start = None if random or injection == "add" else usual if mixing is None else mixing
    recurrent = on_meta(model)
    deltas = plan_deltas(config, source, chosen, recurrent) if config.delta_rank else None
    return Plan(
        chosen,
        source.config.num_hidden_layers,
        model,
        start,
        config.seed,
        lambda name, tensor: dict.fromkeys(names.get(name, ()), tensor),
        () if fitted else dropped,
        dropped if fitted else (),
        repeated,
        costs_of(recurrent),
        deltas,
    )


def plan_deltas(
    config: ConvertConfig, source: Source, chosen: Split, recurrent: RecurrentForCausalLM
) -> Deltas:
    """Fit the deltas, once it is clear that they can be had.

    Raises:
        UserError: They cannot, or the parent's weights cannot be read.
    """
    core, count = recurrent.model.core, recurrent.config.num_delta_iterations
    check_rank(config.delta_rank, core)
    if config.split == "stride":
        targets = choose_targets(chosen.core, count, config.delta_target == "in-order")
        check_targets(targets, chosen, source.config)
    else:
        targets = [list(chosen.core)] * count
    return fit(source, recurrent.config, core, targets, config.seed)


def num_delta_iterations(config: ConvertConfig) -> int:
    """Return how many sets of deltas there are."""
    if not config.delta_rank:
        return 0
    if config.split == "stride":
        return config.stride or DEFAULT_STRIDE
    return config.delta_iterations or DEFAULT_DELTA_ITERATIONS


def default_depth(config: ConvertConfig, usual: int) -> int:
    """Return the depth of a call that names none: as asked, or the usual one within the cap.

    Raises:
        UserError: What is asked is beyond the cap.
    """
    if config.num_recurrences is None:
        return min(usual, config.max_recurrences)
    if config.num_recurrences > config.max_recurrences:
        raise UserError(
            f"--num-recurrences {config.num_recurrences} is beyond the cap --max-recurrences "
            f"{config.max_recurrences}"
        )
    return config.num_recurrences


def on_meta(config: RecurrentConfig) -> RecurrentForCausalLM:
    """Return a model without memory for its weights."""
    with torch.device("meta"):
        return RecurrentForCausalLM(config)


def plan_import(config: ConvertConfig, source: Source) -> Plan:
    """Settle the import of a released checkpoint of the method, which is recurrent already.

    Raises:
        UserError: A setting would change what the checkpoint is.
    """
    fields: Any = source.raven
    changing = ("split", "sizes", "stride", "preset", "injection", "state_init", "mixing", "probe")
    given = [name for name in changing if getattr(config, name) is not None]
    given += ["delta_rank"] if config.delta_rank else []
    if given or config.random_injection or config.untie:
        raise UserError(
            f"{source.name} is recurrent already and is imported as it is: leave "
            f"{', '.join('--' + name.replace('_', '-') for name in given) or 'the start'} out"
        )
    prelude, core, coda = raven.sizes(fields)
    depth = prelude + core + coda
    model = RecurrentConfig(
        base_config=source.config.to_dict(),
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        source_layers=list(range(depth)),
        num_recurrences=default_depth(config, fields.get("mean_recurrence") or DEFAULT_DEPTH),
        max_recurrences=config.max_recurrences,
        architectures=["RecurrentForCausalLM"],
        dtype=source.config.dtype,
        **raven.recurrent_fields(fields),
    )
    unused = raven.check_names(fields, source.files)
    return Plan(
        split.keep_split(depth, (prelude, core, coda)),
        depth,
        model,
        None,
        config.seed,
        lambda name, tensor: raven.translate(fields, source.files, name, tensor),
        (),
        (),
        unused,
        costs_of(on_meta(model)),
    )


def map_tensors(
    source: Source, parent: Any, chosen: Split, tied: bool
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...], tuple[str, ...]]:
    """Decide the fate of each parent tensor: used under a new name, dropped, or a tied repeat.

    Raises:
        UserError: A tensor is missing, or one is there that the family does not have.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in parent.state_dict().items()}
    shapes = {
        (shard, name): shape
        for shard in source.shards()
        for name, shape in read_shapes(shard).items()
    }
    prefix = f"{parent.base_model_prefix}."
    # A body saved on its own has no prefix.
    lacks_prefix = not any(name.startswith(prefix) for name in source.files)
    position = {layer: place for place, layer in enumerate(chosen.layers)}
    names: dict[str, tuple[str, ...]] = {}
    dropped, repeated, seen = [], [], set()
    parent_tied = bool(parent.config.tie_word_embeddings)
    for stored in source.files:
        name = prefix + stored if lacks_prefix and not stored.startswith("lm_head.") else stored
        if name not in expected:
            if name.endswith("rotary_emb.inv_freq"):  # computed anew by every recent model
                repeated.append(stored)
                continue
            raise UserError(
                f"{source.name} holds a tensor {stored} that {type(parent).__name__} does not "
                "have: its config and its weights do not belong together"
            )
        shape = shapes.get((source.files[stored], stored))
        if shape != expected[name]:
            raise UserError(
                f"{source.name}: tensor {stored} has shape {shape}, its config asks for "
                f"{expected[name]}: its config and its weights do not belong together"
            )
        seen.add(name)
        if parent_tied and name == "lm_head.weight":
            repeated.append(stored)
        elif name.startswith(f"{prefix}layers."):
            index, rest = name.removeprefix(f"{prefix}layers.").split(".", 1)
            if int(index) in position:
                names[stored] = (f"model.layers.{position[int(index)]}.{rest}",)
            else:
                dropped.append(stored)
        elif name == f"{prefix}embed_tokens.weight" and parent_tied and not tied:
            names[stored] = ("model.embed_tokens.weight", "lm_head.weight")
        else:
            names[stored] = (
                ("model." + name.removeprefix(prefix),) if name.startswith(prefix) else (name,)
            )
    missing = sorted(expected.keys() - seen - ({"lm_head.weight"} if parent_tied else set()))
    if missing:
        raise UserError(
            f"{source.name} lacks {len(missing)} tensors of {type(parent).__name__}, the first "
            f"being {missing[0]}"
        )
    return names, tuple(dropped), tuple(repeated)


def describe(plan: Plan, source: Source) -> Iterator[str]:
    """Yield the plan as lines to read."""
    facts = plan.summary()
    dropped = split.format_indices(facts["dropped_layers"]) if facts["dropped_layers"] else "none"
    yield f"{source.name}: {source.config.model_type}, {plan.num_layers} layers"
    yield card.draw_split(plan.split, plan.num_layers)
    yield f"split {facts['split']} (prelude, core, coda; half-open), dropped layers: {dropped}"
    start = "random" if plan.mixing is None else f"start {plan.mixing:g}"
    if facts["injection"] == "add":
        start = "no weights"
    yield f"injection {facts['injection']} ({start}), initial state {facts['state_init']}"
    if facts["deltas"]:
        yield from card.fit_lines(facts["deltas"])
    yield ""
    for part, count in facts["parameters"].items():
        yield f"  {part:<10}{count:>16,} parameters"
    yield ""
    yield "  r  layers run   FLOPs/token (all)   FLOPs/token (layers)   KV bytes/token"
    for row in facts["depths"]:
        yield (
            f"{row['num_recurrences']:>3}  {row['effective_depth']:>10}"
            f"{row['forward_flops_per_token']:>20.4g}{row['layer_flops_per_token']:>23.4g}"
            f"{row['kv_bytes_per_token']:>17,}"
        )
