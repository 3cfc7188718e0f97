"""Configuration of a depth-recurrent language model. It describes the model, never a run."""

from typing import Any, ClassVar, Literal

from transformers import AutoConfig, PreTrainedConfig

INJECTIONS = ("mix", "linear", "add")
STATE_INITS = ("input", "zeros", "normal")


class RecurrentConfig(PreTrainedConfig):
    """A pretrained decoder split into a prelude, a looped core and a coda.

    Attributes:
        base_config: The parent family's own config, cut to the layers that are kept. The layers
            are stored in the order prelude, core, coda.
        num_prelude_layers: Layers that run once, before the loop.
        num_core_layers: Layers of the loop.
        num_coda_layers: Layers that run once, after the loop.
        source_layers: The parent's index of each kept layer, in stored order.
        injection: How the prelude's output e enters each iteration: ``mix`` is
            ``e + a * (s - e)`` with one learned ``a`` per channel, ``linear`` the bias-free
            map of the concatenation ``[s; e]`` (arXiv:2511.07384), ``add`` is ``s + e``.
        state_init: The state before the first iteration: ``input`` (e itself), ``zeros`` or
            ``normal`` (truncated normal noise, a function of the seed and the position only).
        state_std: Standard deviation of ``normal`` before truncation at three of them.
        num_recurrences: Iterations of the core when a call names none.
        max_recurrences: Hard cap; a call that asks for more is refused.
        delta_rank: Rank of the core's per-iteration deltas (`deltas_recurrent`), 0 for none.
        num_delta_iterations: How many iterations have deltas of their own; later ones begin again.
        exit_gate: Whether the model has a learned gate among its exits (`exits_recurrent`).
        exit_rules: Calibrated exits: by criterion, then by the tolerated relative loss as it is
            written, the fields of an `ExitRule` beside what they were calibrated on.
        format_version: Version of this checkpoint format.

    Raises:
        ValueError: A field is out of its range, or the layer counts do not add up.
    """

    model_type = "rondo"
    has_no_defaults_at_init = True
    # pyrefly: ignore[bad-override]
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}

    # A config once the object exists; None would be no model, a dict is what JSON holds.
    base_config: Any = None
    num_prelude_layers: int = 1
    num_core_layers: int = 1
    num_coda_layers: int = 1
    source_layers: list[int] | None = None
    injection: Literal["mix", "linear", "add"] = "mix"
    state_init: Literal["input", "zeros", "normal"] = "input"
    # The paper's constant, inherited from a model of width 5280: sqrt(2 / (5 * 5280)).
    state_std: float = 0.008703882797784892
    num_recurrences: int = 4
    max_recurrences: int = 64
    delta_rank: int = 0
    num_delta_iterations: int = 0
    exit_gate: bool = False
    exit_rules: dict[str, dict[str, dict[str, Any]]] | None = None
    format_version: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.base_config is None:
            raise ValueError("RecurrentConfig needs base_config, the config of the parent model")
        if isinstance(self.base_config, dict):
            self.base_config = AutoConfig.for_model(**self.base_config)
        self.tie_word_embeddings = self.base_config.tie_word_embeddings
        # generate() looks for these at the top.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, getattr(self.base_config, name, None))
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        counts = (self.num_prelude_layers, self.num_core_layers, self.num_coda_layers)
        if min(counts) < 1:
            raise ValueError(f"prelude, core and coda need at least one layer each, got {counts}")
        if sum(counts) != self.base_config.num_hidden_layers:
            raise ValueError(
                f"prelude + core + coda = {sum(counts)} layers, but base_config has "
                f"{self.base_config.num_hidden_layers}"
            )
        if self.injection not in INJECTIONS:
            raise ValueError(f"injection must be one of {INJECTIONS}, got {self.injection!r}")
        if self.state_init not in STATE_INITS:
            raise ValueError(f"state_init must be one of {STATE_INITS}, got {self.state_init!r}")
        if min(self.delta_rank, self.num_delta_iterations) < 0 or (
            bool(self.delta_rank) != bool(self.num_delta_iterations)
        ):
            raise ValueError(
                "delta_rank and num_delta_iterations must both be positive or both 0, got "
                f"{self.delta_rank} and {self.num_delta_iterations}"
            )
        if not 1 <= self.num_recurrences <= self.max_recurrences:
            raise ValueError(
                f"num_recurrences = {self.num_recurrences} must lie between 1 and "
                f"max_recurrences = {self.max_recurrences}"
            )

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        """Return the parent's config.

        Library code sizes caches by it; the slots of later iterations are added by
        `cache_recurrent`, which knows the depth of the call.
        """
        return self.base_config

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return self.base_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.base_config.hidden_size

    @property
    def max_position_embeddings(self) -> int:
        """Tokens that the parent was made for."""
        return self.base_config.max_position_embeddings

    @property
    def num_hidden_layers(self) -> int:
        """Number of stored layers, each counted once."""
        return self.base_config.num_hidden_layers
