"""Surgery: a pretrained directory becomes a recurrent one, tensor by tensor, and is proved.

The plan is settled and checked first; then tensors stream from the parent's weight files to the
new ones, a file at a time; then the result is loaded and compared with the parent. Only a proved
checkpoint is put in its place.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from rondo.config import ConvertConfig
from rondo.convert import card, verify
from rondo.convert.plan import Plan, describe, make_plan
from rondo.convert.source import (
    Source,
    hash_of_digests,
    open_source,
    read_tensors,
    tensor_hash,
    write_tensors,
)
from rondo.errors import UserError
from rondo.loading import copy_code
from rondo.modeling.injection_recurrent import Injection
from rondo.provenance import claim_directory, read_json, record, staged, write_json

AUTO_MAP = {
    "AutoConfig": "configuration_recurrent.RecurrentConfig",
    "AutoModel": "modeling_recurrent.RecurrentModel",
    "AutoModelForCausalLM": "modeling_recurrent.RecurrentForCausalLM",
}


def new_tensors(plan: Plan) -> dict[str, torch.Tensor]:
    """Return the injection's start and the deltas, which are all that a plain parent lacks."""
    injection = Injection(plan.model)
    if plan.mixing is not None:
        injection.initialize(plan.mixing)
    elif plan.model.injection == "linear":
        # As a fresh nn.Linear starts, which is what the paper's conversion leaves in place.
        generator = torch.Generator().manual_seed(plan.seed)
        bound = (2 * plan.model.hidden_size) ** -0.5
        with torch.no_grad():
            injection.weight.uniform_(-bound, bound, generator=generator)
    dtype = plan.model.dtype or torch.float32
    return {
        f"model.injection.{name}": tensor.detach().to(dtype).contiguous()
        for name, tensor in injection.state_dict().items()
    } | (plan.deltas.tensors if plan.deltas else {})


def write_weights(plan: Plan, source: Source, directory: Path) -> dict[str, Any]:
    """Stream the weights, one parent file at a time.

    Returns:
        What happened to the tensors, with the hash of the parent's.

    Raises:
        UserError: A tensor holds NaN or infinity, or a file cannot be read or written.
    """
    shards = source.shards()
    digests: dict[str, str] = {}
    written: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    total = used = 0
    extra = new_tensors(plan) if source.raven is None else {}
    for number, shard in enumerate(tqdm(shards, desc="convert", unit="file", disable=None), 1):
        out: dict[str, torch.Tensor] = {}
        for name, tensor in read_tensors(shard):
            source.check_finite(name, tensor)
            digests[name] = tensor_hash(tensor)
            translated = plan.translate(name, tensor)
            used += bool(translated)
            out |= translated
            # Most tensors only change their name; what is hashed already is not hashed again.
            for new, value in translated.items():
                written[new] = digests[name] if value is tensor else tensor_hash(value)
        if number == len(shards):
            out |= extra
            written |= {name: tensor_hash(tensor) for name, tensor in extra.items()}
        if not out:
            continue
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(out, directory / file)
        weight_map |= dict.fromkeys(out, file)
        total += sum(tensor.nbytes for tensor in out.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "model.safetensors.index.json", index)
    return {
        "used": used,
        "hash": hash_of_digests(written),
        "in_parent": len(source.files),
        "dropped": list(plan.dropped),
        "fitted": list(plan.fitted),
        "tied_or_computed": list(plan.tied),
        "new": sorted(extra),
        "parent_hash": hash_of_digests(digests),
    }


def write_model(plan: Plan, source: Source, directory: Path) -> dict[str, Any]:
    """Write a whole checkpoint: weights, configs, tokenizer, and the modelling code."""
    tokenizer_files = source.tokenizer_files()
    tensors = write_weights(plan, source, directory)
    plan.model.save_pretrained(directory)
    config = read_json(directory / "config.json")
    write_json(directory / "config.json", config | {"auto_map": AUTO_MAP})
    for path in tokenizer_files:
        shutil.copyfile(path, directory / path.name)
    copy_code(directory)
    if source.raven is None and (source.path / "generation_config.json").is_file():
        shutil.copyfile(
            source.path / "generation_config.json", directory / "generation_config.json"
        )
    else:
        GenerationConfig.from_model_config(plan.model).save_pretrained(directory)
    return tensors


def run(config: ConvertConfig) -> None:
    """Run `rondo convert`.

    Raises:
        UserError: Something the user can mend; nothing was written.
        ProofError: The result does not match the parent; nothing was kept.
    """
    if not config.output_dir and not config.dry_run:
        raise UserError("name the directory to write after the source, or add --dry-run")
    if config.json_output and not config.dry_run:
        raise UserError("--json prints a plan: add --dry-run, or leave it out")
    if not config.dry_run:
        claim_directory(config.output_dir, config.overwrite, spare=config.source)
    with open_source(config.source, config.revision) as source:
        source.tokenizer_files()
        plan = make_plan(config, source)
        if config.dry_run and config.json_output:
            print(json.dumps(plan.summary(), indent=1))
            return
        print("\n".join(describe(plan, source)))
        if not config.dry_run:
            write_proved(config, plan, source)


def convert_model(source: str, output_dir: str, **settings: Any) -> Path:
    """Convert a model from Python; the settings are those of `rondo convert`.

    Returns:
        The directory of the recurrent checkpoint.

    Raises:
        UserError: Something the user can mend; nothing was written.
        ProofError: The result does not match the parent; nothing was kept.
    """
    run(ConvertConfig(source=source, output_dir=output_dir, **settings))
    return Path(output_dir)


def write_proved(config: ConvertConfig, plan: Plan, source: Source) -> None:
    """Write beside the place, prove, then put in place; on any failure leave nothing."""
    with staged(config.output_dir) as partial:
        tensors = write_model(plan, source, partial)
        facts: dict[str, Any] = {
            "kind": "convert",
            "parent": {
                "name": source.name,
                "path": parent_path(config.source),
                "revision": config.revision,
                "hash": tensors["parent_hash"],
                "num_layers": plan.num_layers,
            },
            "plan": plan.summary(),
            "tensors": tensors,
            "imported": source.raven is not None,
        }
        print("prove: comparing with the parent", file=sys.stderr)
        checks = verify.prove(partial, source, facts, config.seed)
        for check in checks:
            print(check.line())
        verify.raise_if_failed(checks, "; nothing was kept")
        facts["proof"] = [check.as_dict() for check in checks]
        write_json(partial / "run.json", record(config, **facts))
        (partial / "README.md").write_text(card.model_card(facts), encoding="utf-8")
    print(f"wrote {config.output_dir}: {len(checks)} checks passed")


def parent_path(source: str) -> str:
    """Return where the parent will be found again: an absolute path, or the name of a model."""
    return str(Path(source).resolve()) if Path(source).exists() else source
