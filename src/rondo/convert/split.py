"""Which of the parent's layers become prelude, core and coda. Pure functions of layer counts."""

import itertools
import re
from dataclasses import dataclass

from rondo.errors import UserError


@dataclass(frozen=True)
class Split:
    """The parent's layer indices of each part, in the order they run.

    Raises:
        UserError: A part is empty, or the indices do not rise from part to part.
    """

    prelude: tuple[int, ...]
    core: tuple[int, ...]
    coda: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("prelude", "core", "coda"):
            if not getattr(self, name):
                raise UserError(f"the split {self} has no {name}: each part needs a layer")
        layers = self.layers
        if any(left >= right for left, right in itertools.pairwise(layers)):
            raise UserError(
                f"the split {self} overlaps or runs backwards: layer indices must rise from the "
                "prelude through the core to the coda"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """All kept layers, in order."""
        return self.prelude + self.core + self.coda

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Layers of prelude, core and coda."""
        return len(self.prelude), len(self.core), len(self.coda)

    def dropped(self, num_layers: int) -> tuple[int, ...]:
        """Return the parent's layers that no part uses."""
        return tuple(index for index in range(num_layers) if index not in set(self.layers))

    def __str__(self) -> str:
        return ",".join(format_indices(part) for part in (self.prelude, self.core, self.coda))


def format_indices(indices: tuple[int, ...]) -> str:
    """Write indices as half-open ranges: (0, 1, 2, 3) is 0-4, (4, 6, 8) is 4-9:2."""
    pieces, start = [], 0
    while start < len(indices):
        stop = start + 1
        step = indices[stop] - indices[start] if stop < len(indices) else 1
        while stop < len(indices) and indices[stop] - indices[stop - 1] == step:
            stop += 1
        run = indices[start:stop]
        if len(run) == 2 and step > 1:
            run, stop = run[:1], start + 1
        if len(run) == 1:
            pieces.append(str(run[0]))
        else:
            pieces.append(f"{run[0]}-{run[-1] + 1}" + (f":{step}" if step > 1 else ""))
        start = stop
    return "+".join(pieces)


def _parse(text: str, num_layers: int) -> tuple[int, ...]:
    indices: list[int] = []
    for piece in text.split("+"):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", piece.strip())
        if not match or match[3] == "0":
            raise UserError(
                f"cannot read {piece.strip()!r} in --split: write half-open ranges as 4-10, with "
                "a step as 4-16:2, lists as 4+6+8, and commas between prelude, core and coda"
            )
        start = int(match[1])
        stop = int(match[2]) if match[2] else start + 1
        if start >= stop or stop > num_layers:
            raise UserError(
                f"the range {piece.strip()} in --split is empty or leaves the model, whose "
                f"{num_layers} layers are 0-{num_layers}"
            )
        indices.extend(range(start, stop, int(match[3] or 1)))
    return tuple(indices)


def parse_split(text: str, num_layers: int) -> Split:
    """Read '0-4,6-12,12-16': half-open ranges or lists of prelude, core and coda.

    Raises:
        UserError: It cannot be read, leaves the model, overlaps or has an empty part.
    """
    parts = text.split(",")
    if len(parts) != 3:
        raise UserError(
            f"--split {text} names {len(parts)} parts: give keep, drop, stride, auto, or prelude, "
            "core and coda as '0-4,6-12,12-16'"
        )
    return Split(*(_parse(part, num_layers) for part in parts))


def parse_sizes(text: str) -> tuple[int, int, int]:
    """Read '4,8,4'.

    Raises:
        UserError: It is not three positive numbers.
    """
    words = text.split(",")
    if len(words) != 3 or not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--sizes {text} must be three positive numbers, as '4,8,4'")
    prelude, core, coda = (int(word) for word in words)
    return prelude, core, coda


def keep_split(num_layers: int, sizes: tuple[int, int, int] | None = None) -> Split:
    """Use every layer. Without sizes the core is the middle fifth, from 0.4 of the depth on.

    Raises:
        UserError: The sizes do not add up to the depth, or the model is too shallow.
    """
    if sizes is None:
        if num_layers < 3:
            raise UserError(f"a model of {num_layers} layers has no room for three parts")
        start = max(1, round(0.4 * num_layers))
        stop = min(num_layers - 1, max(start + 1, round(0.6 * num_layers)))
        sizes = (start, stop - start, num_layers - stop)
    if sum(sizes) != num_layers:
        raise UserError(
            f"--split keep uses all {num_layers} layers, but the sizes {sizes} add up to "
            f"{sum(sizes)}: mend them, or drop layers with --split drop"
        )
    stop = sizes[0] + sizes[1]
    return Split(
        tuple(range(sizes[0])), tuple(range(sizes[0], stop)), tuple(range(stop, num_layers))
    )


def drop_split(num_layers: int, sizes: tuple[int, int, int] | None = None) -> Split:
    """Keep the first P layers and the last R + C, as arXiv:2511.07384 does.

    Raises:
        UserError: The sizes ask for more layers than there are.
    """
    if sizes is None:
        outer = max(1, num_layers // 5)
        sizes = (outer, max(1, (num_layers - 2 * outer) * 2 // 3), outer)
    prelude, core, coda = sizes
    if sum(sizes) > num_layers:
        raise UserError(f"the sizes {sizes} need {sum(sizes)} layers, the model has {num_layers}")
    stop = num_layers - coda
    return Split(
        tuple(range(prelude)), tuple(range(stop - core, stop)), tuple(range(stop, num_layers))
    )


def stride_split(num_layers: int, stride: int, sizes: tuple[int, int, int] | None = None) -> Split:
    """Share parameters by stride: the core is every k-th layer of the middle.

    Each core layer stands for the k layers from it on, so k iterations run as many layers as
    the parent did ("stepwise" in arXiv:2410.20672).

    Args:
        num_layers: Depth of the parent.
        stride: k.
        sizes: Layers of prelude, of the range that is thinned, and of coda; fifths unless given.

    Raises:
        UserError: The sizes do not add up to the depth.
    """
    outer = max(1, num_layers // 5)
    keep = keep_split(num_layers, sizes or (outer, num_layers - 2 * outer, outer))
    return Split(keep.prelude, keep.core[::stride], keep.coda)


# Layer indices of arXiv:2511.07384: explicit in its code for TinyLlama and OLMo 2, by the same
# rule for Llama 3.2. Family and depth tell the parent, and a wrong one.
PRESETS = {
    "tinyllama-1.1b": ("llama", 22, "0-4,10-18,18-22"),
    "llama-3.2-1b": ("llama", 16, "0-4,6-12,12-16"),
    "olmo-2-1b": ("olmo2", 16, "0-4,6-12,12-16"),
}


def preset_split(name: str, family: str, num_layers: int) -> Split:
    """Return the published split of a model.

    Raises:
        UserError: The parent is of another family or depth than the model the preset is for.
    """
    wanted, depth, text = PRESETS[name]
    if (family, num_layers) != (wanted, depth):
        raise UserError(
            f"--preset {name} is for {depth} layers of {wanted}, this parent has {num_layers} of "
            f"{family}: use --split"
        )
    return parse_split(text, num_layers)


def published_split(family: str, num_layers: int, width: int) -> Split | None:
    """Return the paper's split for a parent of this shape, if it used one of this shape."""
    for wanted, depth, text in PRESETS.values():
        if (family, num_layers, width) == (wanted, depth, 2048):
            return parse_split(text, num_layers)
    return None
