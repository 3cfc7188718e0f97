"""Prelude, one iteration, coda: each over the packed tokens of whatever is in flight.

Shapes: N packed tokens, n tokens of a flight, D width, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch

from rondo.modeling.deltas_recurrent import delta_index
from rondo.modeling.inputs_recurrent import LayerInputs
from rondo_serve.engine.arena import Arena
from rondo_serve.engine.packing import Attention, Batch, Group
from rondo_serve.engine.rows import Flight

# Rows of up to 2 ** this many tokens are not told apart by length.
SHORT_BITS = 7
# A flight, the places in its row of the tokens that take part, and the table to write and read.
Part = tuple[Flight, Sequence[int], int]


class Passes:
    """The model, run by parts.

    Args:
        model: A `RecurrentForCausalLM`; its layers attend packed from now on.
        arena: Where keys and values lie.
    """

    def __init__(self, model: Any, arena: Arena):
        self.model, self._body, self._arena = model, model.model, arena
        config = model.config
        self._attention = Attention(config.base_config)
        self._attention.take_over(config.base_config)
        first = config.num_prelude_layers
        self._prelude = slice(0, first)
        self._core = slice(first, first + config.num_core_layers)
        self._coda = slice(first + config.num_core_layers, config.num_hidden_layers)
        self.core_tokens = 0

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self._arena.device

    def enter(self, flights: Sequence[Flight]) -> None:
        """Run the prelude of new flights, and start their states."""
        parts = _ordered((one, one.places, one.row.tables[0]) for one in flights)
        ids = [token for one, _, _ in parts for token in one.row.tokens[one.start : one.stop]]
        embeds = self._body.embed(torch.tensor([ids], device=self.device))
        batch, inputs = self._packed(parts, embeds)
        e_1ND = self._body.run(self._prelude, embeds, inputs, batch)
        seeded = self.model.config.state_init == "normal"
        position = 0
        for one, places, _ in parts:
            part = slice(position, position + len(places))
            position = part.stop
            one.inputs = e_1ND[0, part]
            seed = one.row.ask.sampling.seed if seeded else 0
            where = inputs.position_ids[:, part]
            one.state = self._body.initial_state(e_1ND[:, part], where, seed)[0]

    def iterate(self, flights: Sequence[Flight]) -> None:
        """Run one iteration of the core for all tokens that loop, whatever their iteration."""
        for alike in self._by_delta(flights):
            parts = _ordered(
                (one, one.places_looping, one.row.tables[one.iteration + 1]) for one in alike
            )
            e_1ND = torch.cat([one.of_looping(one.inputs) for one, _, _ in parts])[None]
            s_1ND = torch.cat([one.of_looping(one.state) for one, _, _ in parts])[None]
            batch, inputs = self._packed(parts, e_1ND)
            if self.model.config.delta_rank:
                index = delta_index(self.model.config, alike[0].iteration + 1, self.device)
                inputs = inputs.also(delta_index=index)
            moved = self._body.run(self._core, self._body.injection(s_1ND, e_1ND), inputs, batch)
            self.core_tokens += moved.shape[1]
            sizes = [len(places) for _, places, _ in parts]
            for (one, _, _), state in zip(parts, moved[0].split(sizes), strict=True):
                one.moved(state)

    def finish(self, flights: Sequence[tuple[Flight, bool]]) -> list[torch.Tensor]:
        """Run coda and norm, and return normed hidden states (n, D) of each flight.

        Args:
            flights: Each with whether only the tokens that still loop take part.
        """
        chosen = [
            (one, one.places_looping if looping else one.places, one.row.tables[0])
            for one, looping in flights
        ]
        states = {
            id(one): one.of_looping(one.state) if looping else one.state for one, looping in flights
        }
        parts = _ordered(chosen)
        s_1ND = torch.cat([states[id(one)] for one, _, _ in parts])[None]
        batch, inputs = self._packed(parts, s_1ND)
        hidden = self._body.norm(self._body.run(self._coda, s_1ND, inputs, batch))
        sizes = [len(places) for _, places, _ in parts]
        found = {
            id(one): part for (one, _, _), part in zip(parts, hidden[0].split(sizes), strict=True)
        }
        return [found[id(one)] for one, _ in flights]

    def logits(self, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Map normed hidden states, each (n, D), to logits, each (n, V)."""
        sizes = [len(one) for one in hidden]
        return list(self.model.logits(torch.cat(list(hidden))[None])[0].split(sizes))

    def _by_delta(self, flights: Sequence[Flight]) -> list[list[Flight]]:
        """Part flights whose iterations have other weights."""
        if not self.model.config.delta_rank:
            return [list(flights)]
        alike: dict[int, list[Flight]] = {}
        for one in flights:
            number = one.iteration % self.model.config.num_delta_iterations
            alike.setdefault(number, []).append(one)
        return list(alike.values())

    def _packed(self, parts: Sequence[Part], x_1ND: torch.Tensor) -> tuple[Batch, LayerInputs]:
        """Return what the layers are given of these tokens."""
        tables = self._arena.tables
        places = torch.tensor([place for _, some, _ in parts for place in some], device=self.device)
        owners = torch.tensor([table for _, some, table in parts for _ in some], device=self.device)
        groups, start = [], 0
        for (several, _), alike in groupby(parts, key=_kind):
            for some in [[one] for one in alike] if several else [list(alike)]:
                stop = start + sum(len(taking) for _, taking, _ in some)
                stops = torch.tensor([one.stop for one, _, _ in some], device=self.device)
                read = tables[[table for _, _, table in some], : int(stops.max())]
                if len(some) > 1:
                    # Beyond its own end a row reads nobody's entry: a mask hides what another's
                    # holds, unless that is NaN.
                    beyond = torch.arange(read.shape[1], device=self.device) >= stops[:, None]
                    read = read.masked_fill(beyond, 0)
                groups.append(Group(start, places[start:stop].view(len(some), -1), read))
                start = stop
        write = tables[owners, places].long()
        batch = Batch(self._arena, write, groups, self._attention)
        positions = places[None]
        rotary = self._body.rotary(x_1ND, positions)
        return batch, LayerInputs(self._attention.masks(batch), rotary, positions, {})


def _ordered(parts: Iterable[Part]) -> list[Part]:
    """Put those side by side that are attended in one batch."""
    return sorted(parts, key=_kind)


def _kind(part: Part) -> tuple[bool, int]:
    """Return what parts must have in common to be attended in one batch: a single token each.

    And about the same length, or each would read as many keys as the longest has.
    """
    flight, places, _ = part
    return len(places) != 1, max(0, (flight.stop - 1).bit_length() - SHORT_BITS)
