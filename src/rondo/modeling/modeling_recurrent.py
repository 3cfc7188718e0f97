"""A depth-recurrent language model over the decoder layers of any transformers family.

    e   = prelude(embed(ids))                  once
    s_0 = start(e)
    s_i = core(inject(s_{i-1}, e))             i = 1 .. r, the same weights each time
    logits = head(norm(coda(s_r)))

The method is that of arXiv:2511.07384. The layers are the parent family's own modules
(`body_recurrent`), so one model serves every family and travels inside each checkpoint.

Shapes: B batch, T tokens of this call, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast

from .body_recurrent import RecurrentModel, RecurrentPreTrainedModel
from .configuration_recurrent import RecurrentConfig
from .exits_recurrent import ExitChecks, ExitRule
from .generation_recurrent import Contrast, RecurrentGenerationMixin


def lm_logits(head: nn.Module, base_config: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Map normed hidden states (B, T, D) to logits (B, T, V), as a family's head does.

    A few families scale or cap their logits outside any module; each such operation is named by a
    field that only their configs have.
    """
    logits = head(hidden_BTD)
    if (divisor := getattr(base_config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (factor := getattr(base_config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (cap := getattr(base_config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


class RecurrentForCausalLM(RecurrentPreTrainedModel, RecurrentGenerationMixin):
    """The body with its language-model head; see `RecurrentGenerationMixin.generate`."""

    _tied_weights_keys: Any = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.model = RecurrentModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(config: RecurrentConfig, **kwargs: Any) -> Any:
        """Make the masks of a compiled decoding step by the parent's rules."""
        return create_masks_for_generate(config=config.base_config, **kwargs)

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map normed coda output (B, T, D) to logits (B, T, V), as the parent's head does."""
        return lm_logits(self.lm_head, self.config.base_config, hidden_BTD)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_recurrences: int | Sequence[int] | torch.Tensor | None = None,
        exit: ExitRule | None = None,
        contrast: Contrast | None = None,
        warm_start: bool = False,
        state_seed: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model; see `RecurrentModel.forward` for what is not said here.

        Args:
            input_ids: Token ids, (B, T).
            attention_mask: 1 for tokens, 0 for padding.
            position_ids: Positions, (B, T).
            past_key_values: A cache of transformers.
            inputs_embeds: Embeddings in place of ids.
            labels: Token ids to predict, (B, T), -100 where no loss is wanted.
            use_cache: Whether to return a cache.
            logits_to_keep: Number of last positions, or their indices, to compute logits for.
            num_recurrences: Depth r, one or one per row; with an exit, the cap.
            exit: When tokens leave the loop before the depth.
            contrast: Weigh the answer against a shallower one.
            warm_start: Whether a single token starts at the state of the one before it.
            state_seed: Seed of a `normal` initial state.
            **kwargs: Passed on to the layers and the loss.
        """
        gate = self.model.exit_gate
        checks = None if exit is None else ExitChecks(exit, self.logits, gate)
        if contrast is not None:
            contrast.check(self.config, num_recurrences, checks)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_recurrences=num_recurrences,
            branch_at=0 if contrast is None else contrast.recurrences,
            checks=checks,
            warm_start=warm_start,
            state_seed=state_seed,
            **kwargs,
        )
        logits = self._read_out(outputs, logits_to_keep, checks, contrast)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )

    def _read_out(
        self,
        outputs: Any,
        logits_to_keep: int | torch.Tensor,
        checks: ExitChecks | None,
        contrast: Contrast | None,
    ) -> torch.Tensor:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_BTD = outputs.last_hidden_state[:, kept, :]
        if checks is not None and checks.logits is not None and checks.logits.shape[1] == 1:
            return checks.logits[:, kept, :]  # a single token's last check is its answer
        if contrast is None:
            return self.logits(hidden_BTD)
        return contrast(self.logits(hidden_BTD), self.logits(outputs.branches[0][:, kept, :]))
