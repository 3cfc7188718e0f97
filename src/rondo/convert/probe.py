"""Which layers of a model can be looped, and how: found without any training.

One pass of the parent keeps the hidden states at every layer boundary. A candidate core [a, b)
then starts from two of them, e = h[a] and s_1 = h[b], so each further loop costs only the core
and what follows it. Block influence is that of ShortGPT (arXiv:2403.03853), angular distance that
of arXiv:2403.17887; they describe the layers, the choice is made by the measured loss.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from rondo.config import ConvertConfig, ProbeConfig
from rondo.convert.families import skeleton
from rondo.convert.source import Source, open_source
from rondo.convert.split import Split
from rondo.data import encode, load_tokenizer, packed_rows, read_documents, separator_of
from rondo.errors import UserError
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.inputs_recurrent import LayerInputs, Selection
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.provenance import choose_dtype, claim_directory, read_json, record, staged, write_json

NUM_FINALISTS = 4


@dataclass(frozen=True)
class Text:
    """Calibration windows and the parent's hidden states over them.

    Attributes:
        name: Name of the text.
        ids: Token ids, (B, T).
        states: Hidden states before layer 0, 1, ... and after the last, each (B, T, D).
        inputs: Masks and rotary embeddings for the windows.
    """

    name: str
    ids: torch.Tensor
    states: list[torch.Tensor]
    inputs: LayerInputs

    def head(self, windows: int) -> "Text":
        """Return the first windows only."""
        rows = torch.arange(min(windows, len(self.ids)))
        return Text(
            self.name,
            self.ids[rows],
            [state[rows] for state in self.states],
            self.inputs.take(Selection(rows)),
        )


class Looper:
    """The parent, with any range of its layers repeated.

    Args:
        source: The parent.
        dtype: Type to compute in.
    """

    def __init__(self, source: Source, dtype: torch.dtype):
        parent = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype).eval()
        self.depth = parent.config.num_hidden_layers
        config = RecurrentConfig(
            base_config=parent.config.to_dict(),
            num_core_layers=self.depth - 2,
            source_layers=list(range(self.depth)),
        )
        with torch.device("meta"):
            self.model = RecurrentForCausalLM(config).eval()
        # Only the parts that `run` and `logits` use are taken, from the parent's own modules.
        body: Any = self.model.model
        for part in ("embed_tokens", "layers", "norm", "rotary_emb"):
            setattr(body, part, getattr(parent.base_model, part))
        head: Any = parent.get_output_embeddings()
        self.model.lm_head = head
        body.config.base_config = parent.config

    def run(self, start: int, stop: int, hidden: torch.Tensor, text: Text) -> torch.Tensor:
        """Run layers start .. stop - 1 over (B, T, D)."""
        return self.model.model.run(slice(start, stop), hidden, text.inputs, None)

    def loss(self, hidden: torch.Tensor, ids: torch.Tensor) -> float:
        """Return the mean next-token loss (nats) of the hidden states after the last layer."""
        total = 0.0
        for row, target in zip(self.model.model.norm(hidden), ids, strict=True):
            logits = self.model.logits(row[:-1]).float()
            total += float(torch.nn.functional.cross_entropy(logits, target[1:]))
        return total / len(ids)

    def read(self, name: str, ids: torch.Tensor) -> Text:
        """Run the parent once over windows (B, T) and keep every hidden state."""
        body = self.model.model
        embeds = body.embed(ids)
        inputs = LayerInputs.prepare(body, embeds, None, None, None, {})
        text = Text(name, ids, [embeds], inputs)
        for index in range(self.depth):
            text.states.append(self.run(index, index + 1, text.states[-1], text))
        return text

    def loop(
        self, start: int, stop: int, mixing: float, depths: Sequence[int], text: Text
    ) -> dict[int, float]:
        """Return the loss at each depth with layers start .. stop - 1 as the core."""
        e, s, losses = text.states[start], text.states[stop], {}
        for iteration in range(1, max(depths) + 1):
            if iteration > 1:
                s = self.run(start, stop, e + mixing * (s - e), text)
            if iteration in depths:
                losses[iteration] = self.loss(self.run(stop, self.depth, s, text), text.ids)
        return losses


def layer_scores(text: Text) -> list[dict[str, float]]:
    """Return block influence and angular distance of each layer, means over all tokens."""
    scores = []
    for index, (before, after) in enumerate(zip(text.states, text.states[1:], strict=False)):
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        angle = torch.arccos(cosine.clamp(-1, 1)) / math.pi
        scores.append(
            {
                "layer": index,
                "block_influence": 1 - float(cosine.mean()),
                "angular_distance": float(angle.mean()),
            }
        )
    return scores


def candidates(depth: int, sizes: Iterable[int]) -> list[tuple[int, int]]:
    """Return the cores to try, as half-open ranges: each size, at every second layer or wider."""
    step = max(1, depth // 15)
    return [
        (start, start + size)
        for size in sorted(set(sizes))
        if 1 <= size <= depth - 2
        for start in range(1, depth - size, step)
    ]


def default_sizes(depth: int) -> tuple[int, ...]:
    """Return the core lengths tried by default: a tenth and a fifth of the depth."""
    return tuple(sorted({max(1, depth // 10), max(1, depth // 5)}))


@torch.inference_mode()
def probe_source(config: ProbeConfig, source: Source) -> dict[str, Any]:
    """Probe a model and return what goes into probe.json.

    Raises:
        UserError: The family cannot be looped, or the text is too short.
    """
    skeleton(source.config)
    dtype = choose_dtype(config.dtype, torch.device("cpu"))
    looper = Looper(source, dtype)
    tokenizer = load_tokenizer(source.path)
    texts = [_windows(config, looper, tokenizer, name) for name in (config.data, config.other_data)]
    text, other = texts
    sizes = config.core_sizes or default_sizes(looper.depth)
    cores = candidates(looper.depth, sizes)
    if not cores:
        raise UserError(f"no core of {sizes} layers fits a model of {looper.depth}")
    # Half of the text ranks the cores at the first loop; the finalists get all of it.
    half = text.head(max(1, len(text.ids) // 2))
    half_parent = looper.loss(half.states[-1], half.ids)
    screened = []
    for start, stop in tqdm(cores, desc="probe: cores", unit="core", disable=None):
        found = looper.loop(start, stop, config.mixings[0], (2,), half)[2]
        screened.append(
            {
                "core": [start, stop],
                "mixing": config.mixings[0],
                "num_recurrences": 2,
                "loss": found,
                "difference": found - half_parent,
            }
        )
    screened.sort(key=lambda row: row["loss"])
    best, finalists = _finals(config, looper, text, screened[:NUM_FINALISTS])
    start, stop = best["core"]
    keep = Split(tuple(range(start)), tuple(range(start, stop)), tuple(range(stop, looper.depth)))
    return {
        "model": source.name,
        "num_layers": looper.depth,
        "text": text.name,
        "conditions": {
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": text.ids.numel(),
            "seq_len": config.seq_len,
        },
        "layers": layer_scores(text),
        "parent_loss": {one.name: looper.loss(one.states[-1], one.ids) for one in texts},
        "candidates": screened,
        "finalists": finalists,
        "choice": {
            "split": str(keep),
            "core": [start, stop],
            "mixing": best["mixing"],
            "loss": best["loss"],
            "other_text": looper.loop(start, stop, best["mixing"], config.recurrences, other),
        },
    }


def _windows(config: ProbeConfig, looper: Looper, tokenizer: Any, name: str) -> Text:
    documents = read_documents(name)
    token_lists, total = [], 0
    for document in documents.texts:
        token_lists.append(encode(tokenizer, document))
        total += len(token_lists[-1]) + 1
        if total >= config.tokens:
            break
    rows = packed_rows(token_lists, separator_of(tokenizer), config.seq_len)
    if not len(rows):
        raise UserError(f"{documents.path} is too short for one window of {config.seq_len} tokens")
    return looper.read(documents.name, rows[: max(1, config.tokens // config.seq_len)])


def _finals(
    config: ProbeConfig, looper: Looper, text: Text, leaders: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the leaders at every mixing and depth; the lowest mean over the depths wins."""
    rows = []
    pairs = [(row["core"], mixing) for row in leaders for mixing in config.mixings]
    for core, mixing in tqdm(pairs, desc="probe: finalists", unit="core", disable=None):
        losses = looper.loop(core[0], core[1], mixing, config.recurrences, text)
        rows.append(
            {
                "core": core,
                "mixing": mixing,
                "loss": losses,
                "mean_loss": sum(losses.values()) / len(losses),
            }
        )
    rows.sort(key=_mean_loss)
    return rows[0], rows


def _mean_loss(row: dict[str, Any]) -> float:
    return row["mean_loss"]


def choice_for(config: ConvertConfig, source: Source) -> dict[str, Any]:
    """Return the choice of an earlier probe, or probe now.

    Raises:
        UserError: The earlier probe was of another model.
    """
    if config.probe is None:
        print("split auto: probing first (rondo probe keeps what it finds)", file=sys.stderr)
        return probe_source(ProbeConfig(source=config.source), source)["choice"]
    found = read_json(Path(config.probe) / "probe.json")
    if not {"num_layers", "choice"} <= found.keys():
        raise UserError(f"{config.probe}/probe.json was not written by rondo probe: probe anew")
    if found["num_layers"] != source.config.num_hidden_layers:
        raise UserError(
            f"the probe in {config.probe} is of a model with {found['num_layers']} layers, "
            f"{source.name} has {source.config.num_hidden_layers}: probe it anew"
        )
    return found["choice"]


def describe(found: dict[str, Any]) -> str:
    """Return the findings as a Markdown page."""
    choice, parent, text_name = found["choice"], found["parent_loss"], found["text"]
    depths = list(found["finalists"][0]["loss"])
    lines = [
        f"# Which layers of {found['model']} can be looped",
        "",
        f"Loss in nats per token without any training, {found['conditions']['tokens']} tokens of "
        f"{text_name}, {found['conditions']['dtype']}; r = 1 is the parent: "
        f"{parent[text_name]:.4f}.",
        "",
        "| core | mixing | " + " | ".join(f"r = {r}" for r in depths) + " |",
        "|---|---|" + "---|" * len(depths),
    ]
    for row in found["finalists"]:
        cells = " | ".join(f"{row['loss'][r]:.4f}" for r in depths)
        lines.append(f"| {core_name(row['core'])} | {row['mixing']:g} | {cells} |")
    gain = min(choice["loss"].values()) - parent[text_name]
    verdict = "lowers" if gain < 0 else "raises"
    lines += [
        "",
        f"Chosen: `--split {choice['split']} --mixing {choice['mixing']:g}`. Looping it "
        f"{verdict} the loss on {text_name} by {abs(gain):.4f} at its best depth.",
    ]
    for name, loss in parent.items():
        if name != text_name:
            other = min(choice["other_text"].values()) - loss
            lines.append(f"On {name} text the same choice changes it by {other:+.4f}.")
    lines += ["", "![loss by core](cores.svg)", "", "![layer scores](layers.svg)", ""]
    return "\n".join(lines)


def run(config: ProbeConfig) -> None:
    """Run `rondo probe`.

    Raises:
        UserError: The model cannot be read or looped, or the output exists.
    """
    directory = claim_directory(config.output_dir, config.overwrite, spare=config.source)
    with open_source(config.source, config.revision) as source:
        found = probe_source(config, source)
    page = describe(found)
    with staged(directory) as partial:
        write_json(partial / "probe.json", found)
        write_json(partial / "run.json", record(config, kind="probe"))
        (partial / "probe.md").write_text(page, encoding="utf-8")
        draw(found, partial)
    print(page.split("\n![", 1)[0])
    print(f"wrote {config.output_dir}: probe.json, probe.md, cores.svg, layers.svg")


def draw(found: dict[str, Any], directory: Path) -> None:
    """Draw the cores and the layer scores."""
    from rondo import plots

    start, stop = found["choice"]["core"]
    layers = [
        {
            **row,
            "part": "prelude"
            if row["layer"] < start
            else "core"
            if row["layer"] < stop
            else "coda",
        }
        for row in found["layers"]
    ]
    parent = found["parent_loss"][found["text"]]
    finals = [
        {
            "core": core_name(row["core"]),
            "mixing": row["mixing"],
            "num_recurrences": depth,
            "difference": loss - parent,
            "chosen": row["core"] == [start, stop],
        }
        for row in found["finalists"]
        for depth, loss in row["loss"].items()
    ]
    final_cores = {row["core"] for row in finals}
    screened = [
        {**row, "core": core_name(row["core"]), "chosen": False}
        for row in found["candidates"]
        if core_name(row["core"]) not in final_cores
    ]
    charts = {"cores": plots.core_chart([*finals, *screened]), "layers": plots.layer_chart(layers)}
    for name, chart in charts.items():
        (directory / f"{name}.svg").write_text(plots.to_svg(chart), encoding="utf-8")


def core_name(core: Sequence[int]) -> str:
    """Return a core as a half-open range, as --split takes it."""
    return f"{core[0]}-{core[1]}"
