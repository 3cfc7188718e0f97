"""Export: one depth of a recurrent model as an ordinary model of its parent's family.

The layers of each iteration are written one after the other, with its deltas folded in, so any
engine that knows the family can run the result. `unroll` says which injections permit that.
"""

import hashlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rondo.config.export import ExportConfig
from rondo.convert.verify import Check
from rondo.errors import ProofError
from rondo.export.proof import prove
from rondo.export.unroll import Plan, irregular_fields, make_plan, open_checkpoint, write_weights
from rondo.provenance import claim_directory, read_json, record, staged, write_json

# What travels as it is: the tokenizer, its chat template, and how to sample.
TRAVELS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "generation_config.json",
)


def write_plain(plan: Plan, directory: Path, limit: float) -> None:
    """Write the whole plain model: weights, config, tokenizer, how to sample."""
    write_weights(plan, directory, limit)
    plan.config.save_pretrained(directory)
    for pattern in TRAVELS:
        for path in plan.checkpoint.path.glob(pattern):
            shutil.copyfile(path, directory / path.name)


def describe(plan: Plan) -> Iterator[str]:
    """Yield what will be written, line by line."""
    config, sizes = plan.checkpoint.config, plan.sizes()
    written = sizes["layers"] - config.num_prelude_layers - config.num_coda_layers
    times = written // config.num_core_layers
    name = plan.config.architectures[0] if plan.config.architectures else plan.config.model_type
    yield (
        f"{name}, {sizes['layers']} layers: {config.num_prelude_layers} + "
        f"{times} x {config.num_core_layers} + {config.num_coda_layers}"
    )
    if times < plan.depth:
        yield "the injection passes no state on, so the last iteration alone is written"
    for what in ("parameters", "bytes"):
        share = sizes[what] / sizes[f"recurrent_{what}"]
        yield f"{what}: {sizes[what]:,}, {share:.2f} x the recurrent {sizes[f'recurrent_{what}']:,}"
    for field in irregular_fields(plan.config):
        yield (
            f"note: {field} in config.json says of each layer what it is; an engine that works it "
            "out from a period instead would run another model"
        )


def run(config: ExportConfig) -> None:
    """Run `rondo export`.

    Raises:
        UserError: Something the user can mend, or a depth that no plain model has; nothing was
            written.
        ProofError: The plain model does not do what the recurrent one does; nothing was kept.
    """
    claim_directory(config.output_dir, config.overwrite, spare=config.model)
    plan = make_plan(open_checkpoint(config.model), config.unrolled)
    told = list(describe(plan))
    print("\n".join(told))
    limit = config.max_shard_gb * 1e9
    with staged(config.output_dir) as partial:
        write_plain(plan, partial, limit)
        print("prove: comparing with the recurrent model", file=sys.stderr)
        checks = []
        for check in prove(plan, partial, limit, config.seed):
            print(f"  {'ok  ' if check.passed else 'FAIL'} {check.name}: {check.measured}")
            checks.append(check)
        failed = [f"{one.name}: {one.measured}" for one in checks if not one.passed]
        if failed:
            raise ProofError(
                f"the export is not faithful to {config.model}: {'; '.join(failed)}; nothing was "
                "kept"
            )
        facts = _facts(plan, checks)
        write_json(partial / "run.json", record(config, **facts))
        (partial / "README.md").write_text(_card(plan, told, checks), encoding="utf-8")
    print(f"wrote {config.output_dir}: {len(checks)} checks passed")


def _facts(plan: Plan, checks: Sequence[Check]) -> dict[str, Any]:
    source = plan.checkpoint.path / "run.json"
    before = read_json(source) if source.is_file() else {}
    digest = hashlib.sha256()
    for shard in sorted(set(plan.checkpoint.files.values())):
        with shard.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "kind": "export",
        "parent": before.get("parent"),
        "recurrent": {"path": str(plan.checkpoint.path.resolve()), "sha256": digest.hexdigest()},
        "sizes": plan.sizes(),
        "exact": plan.exact,
        "proof": [check.as_dict() for check in checks],
    }


def _card(plan: Plan, told: Sequence[str], checks: Sequence[Check]) -> str:
    rows = "\n".join(f"| {check.name} | {check.measured} |" for check in checks)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [rondo]\n---\n"
        f"# One depth (r = {plan.depth}) of a depth-recurrent model\n\n"
        f"Made from `{plan.checkpoint.name}` by `rondo export`. It is a plain {told[0]}. It loads "
        "with no code but the family's own, and has this one depth.\n\n"
        + "".join(f"    {line}\n" for line in told[1:])
        + f"\n| proof | measured |\n|---|---|\n{rows}\n\n"
        "Licence and limits are those of the parent. The command is in `run.json`.\n"
    )
