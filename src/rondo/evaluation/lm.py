"""Models as lm-evaluation-harness runs them: one depth for its command line, all at once for us.

Tokenisation, windows, stops and what is cut off texts are the harness's own. Ours are the passes
of the model: batches that the ledger keeps and shares.
"""

import copy
import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import StoppingCriteria, StoppingCriteriaList

from rondo.config import EvalConfig
from rondo.errors import UserError
from rondo.evaluation.ledger import Ledger
from rondo.evaluation.subject import Passage, Subject

Json = dict[str, Any]
Pair = tuple[tuple[int, ...], tuple[int, ...]]


@register_model("rondo")
class RondoLM(HFLM):
    """A recurrent checkpoint at one depth, for the harness's own command line.

    Args:
        pretrained: The checkpoint.
        num_recurrences: Depth r; the model's own unless given.
        state_seed: Seed of a `normal` initial state.
        **options: Those of the harness's `hf`.

    Raises:
        UserError: It is no recurrent model, or the depth is beyond its cap.
    """

    def __init__(
        self,
        pretrained: Any,
        num_recurrences: int | None = None,
        state_seed: int = 0,
        **options: Any,
    ):
        super().__init__(pretrained, **options)
        config: Any = self.config
        if config.model_type != "rondo":
            raise UserError(
                f"{pretrained} is a {config.model_type} model, not a recurrent one: use --model hf"
            )
        depth = config.num_recurrences if num_recurrences is None else num_recurrences
        if not 1 <= depth <= config.max_recurrences:
            raise UserError(
                f"num_recurrences={depth} is beyond the cap of {config.max_recurrences} of "
                f"{pretrained} (max_recurrences in its config.json)"
            )
        self.how = {"num_recurrences": depth, "state_seed": state_seed}

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> Any:
        cast: Any = self.mixed_precision_dtype
        place: Any = self.device
        with torch.no_grad(), torch.autocast(place.type, cast, enabled=cast is not None):
            return self.model(inps, **self.how).logits

    def _model_generate(self, context: Any, max_length: int, stop: Any, **options: Any) -> Any:
        return super()._model_generate(context, max_length, stop, **options, **self.how)

    def get_model_info(self) -> Json:
        """Return what the harness records of a model, with the depth."""
        return super().get_model_info() | self.how


class Row(NamedTuple):
    """A text to be continued at one depth.

    Attributes:
        context: The text.
        options: How, in the harness's words, as JSON.
        draw: Number of the answer, where several are sampled.
        depth: Index of the depth.
    """

    context: str
    options: str
    draw: int
    depth: int


class EachRow(StoppingCriteria):
    """Ends each row at its own stop; the harness's criteria wait for all rows to meet the same."""

    def __init__(self, criteria: Any):
        self.criteria = criteria

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        """Return which rows (B,) are done."""
        for one in self.criteria:
            one(input_ids, scores)
        done = [any(met) for met in zip(*(one.done_tracker for one in self.criteria), strict=True)]
        return torch.tensor(done, device=input_ids.device)


class Sweep(HFLM):
    """Answers the harness at one depth after the other out of one pass over all depths.

    What is asked for the first time is measured at every depth; then it is remembered.
    """

    def __init__(self, subject: Subject, ledger: Ledger, config: EvalConfig, seed: int):
        # The harness gives it a padding token.
        words: Any = copy.deepcopy(subject.tokenizer)
        super().__init__(
            pretrained=subject.model,
            tokenizer=words,
            max_length=subject.max_length,
            # Batches are ours.
            batch_size=sys.maxsize,
        )
        self.subject, self.ledger, self.seed = subject, ledger, seed
        self.words: Any = self.tokenizer
        self.rows_per_batch = config.batch_size
        self.begin("")

    def begin(self, title: str) -> None:
        """Forget what is remembered, to measure another task."""
        self.title, self.depth, self.seconds = title, 0, 0.0
        # Of each sequence its depth, where it has one of its own, tokens read, tokens generated.
        self.lengths: list[tuple[int | None, int, int]] = []
        # Sequences that lost their beginning.
        self.cut = 0
        self.pairs: dict[tuple[str, str], Any] = {}
        self.scores: dict[Pair, list[tuple[float, bool]]] = {}
        self.texts: dict[Row, str] = {}

    def _encode_pair(self, context: str, continuation: str) -> Any:
        key = context, continuation
        if key not in self.pairs:
            self.pairs[key] = super()._encode_pair(context, continuation)
        return self.pairs[key]

    def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> Any:
        asked: list[Pair] = [(tuple(context), tuple(rest)) for _, context, rest in requests]
        new = sorted(
            {pair for pair in asked if pair not in self.scores},
            key=lambda pair: (-len(pair[0] + pair[1]), pair[0] + pair[1], len(pair[0])),
        )
        if new:
            size = self.rows_per_batch
            batches = [new[start : start + size] for start in range(0, len(new), size)]
            found = self._run(batches, self._score)
            for pair, (length, *by_depth) in zip(new, found, strict=True):
                self.scores[pair] = [(logprob, greedy) for logprob, greedy in by_depth]
                self.lengths.append((None, length, 0))
                self.cut += len(pair[0] + pair[1]) - 1 > length
        return [self.scores[pair][self.depth] for pair in asked]

    @torch.inference_mode()
    def _score(self, batch: Sequence[Pair]) -> list[list[Any]]:
        passages = []
        for context, rest in batch:
            if len(rest) > self.max_length:
                raise UserError(
                    f"an answer of {self.title} has {len(rest)} tokens, and the model was made "
                    f"for {self.max_length}"
                )
            ids = [*context, *rest][-(self.max_length + 1) :]
            passages.append(Passage(ids, len(ids) - len(rest)))
        found = self.subject.predict(passages, self.seed)
        return [
            [len(passage.ids) - 1, *(list(one) for one in by_depth)]
            for passage, by_depth in zip(passages, found, strict=True)
        ]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each request at the depth that is set."""
        draws: dict[tuple[str, str], int] = {}
        asked = []
        for context, options in (request.args for request in requests):
            key = context, json.dumps(options, sort_keys=True)
            # Greedy answers are all the same.
            draw = draws.get(key, 0) if options.get("do_sample") else 0
            draws[key] = draw + 1
            asked.append(Row(*key, draw, self.depth))
        depths = range(len(self.subject.recurrences))
        wanted = {one._replace(depth=depth): None for one in asked for depth in depths}
        new = [row for row in wanted if row not in self.texts]
        if new:
            self._continue_all(new)
        return [self.texts[row] for row in asked]

    def _continue_all(self, rows: Sequence[Row]) -> None:
        """Continue texts, the deepest and longest first: what memory cannot hold shows at once."""
        lengths = {context: len(self.tok_encode(context)) for context, *_ in rows}
        groups: dict[str, list[Row]] = {}
        for row in sorted(rows, key=lambda row: (-row.depth, -lengths[row.context], row)):
            groups.setdefault(row.options, []).append(row)
        size = self.rows_per_batch
        batches = [
            group[start : start + size]
            for group in groups.values()
            for start in range(0, len(group), size)
        ]
        found = self._run(batches, self._continue)
        rows = [row for batch in batches for row in batch]
        for row, (text, read, new, cut) in zip(rows, found, strict=True):
            self.texts[row] = text
            self.lengths.append((self.subject.recurrences[row.depth], read, new))
            self.cut += cut

    @torch.inference_mode()
    def _continue(self, batch: Sequence[Row]) -> list[list[Any]]:
        """Continue a batch of rows of any depths.

        Returns:
            Of each the text, the tokens of prompt and text, and whether the prompt was cut.
        """
        options: Any = normalize_gen_kwargs(json.loads(batch[0].options), self.max_gen_toks)
        end = self.words.decode(self.eot_token_id)
        stops = handle_stop_sequences(options.pop("until", None), eos=end)
        room = self.max_length - (new_tokens := options.pop("max_gen_toks"))
        if room <= 0:
            raise UserError(
                f"{self.title} lets {new_tokens} tokens be generated, and the model was made for "
                f"{self.max_length} in all"
            )
        ids, mask = self.tok_batch_encode([row.context for row in batch], left_truncate_len=room)
        if not options["do_sample"]:
            options.pop("temperature", None)
        limit = options.pop("max_length", ids.shape[1] + new_tokens)
        if self.subject.recurrent:
            depths = [self.subject.recurrences[row.depth] for row in batch]
            options |= {"num_recurrences": depths, "state_seed": self.seed}
        criteria = stop_sequences_criteria(self.words, stops, ids.shape[1], len(batch))
        devices = [self.subject.device] if self.subject.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(_number([self.seed, *batch]))
            output = self.subject.model.generate(
                input_ids=ids.to(self.subject.device),
                attention_mask=mask.to(self.subject.device),
                max_length=limit,
                stopping_criteria=StoppingCriteriaList([EachRow(criteria)]),
                pad_token_id=self.words.pad_token_id,
                use_cache=True,
                **options,
            )
        answers = output[:, ids.shape[1] :].tolist()
        return [
            [
                postprocess_generated_text(
                    self.words.decode(answer, skip_special_tokens=True), stops, None
                ),
                prompt,
                _unpadded(answer, self.words.pad_token_id),
                len(self.tok_encode(row.context)) > room,
            ]
            for row, answer, prompt in zip(batch, answers, mask.sum(1).tolist(), strict=True)
        ]

    def _run(self, batches: Sequence[Any], work: Any) -> list[Any]:
        about = [str(self.subject.directory), self.subject.recurrences, self.seed]
        found, seconds = self.ledger.run(
            self.title, batches, lambda batch: [work.__name__, *about, batch], work
        )
        self.seconds += seconds
        return [one for batch in found for one in batch]


def _number(content: Any) -> int:
    """Return a seed that follows from content."""
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    return int.from_bytes(digest[:7])


def _unpadded(tokens: Sequence[int], pad: int) -> int:
    """Return how many tokens were generated: those up to the last that is no padding."""
    return next((stop for stop in range(len(tokens), 0, -1) if tokens[stop - 1] != pad), 0)
