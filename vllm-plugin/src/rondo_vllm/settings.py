"""What an engine is set to for a model that loops."""

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from rondo_vllm.limits import Depths, refuse
from rondo_vllm.processor import DepthOfRows

logger = init_logger(__name__)


class RecurrentSettings(VerifyAndUpdateConfig):
    """vLLM applies these once for each engine, in the process that takes its requests."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Set what the model needs.

        Raises:
            ValueError: The engine is asked for what cannot be, or its depths contradict.
        """
        refuse(vllm_config)
        model = vllm_config.model_config
        allowed = Depths(model.hf_config.num_recurrences, model.hf_config.max_recurrences)
        DepthOfRows.allowed = allowed
        channel = f"{DepthOfRows.__module__}:{DepthOfRows.__name__}"
        model.logits_processors = [*(model.logits_processors or ()), channel]
        # How often the loop runs is read from the batch, and no captured graph can do that.
        model.enforce_eager = True
        # Blocks are found by their tokens alone, and at another depth they hold other values.
        vllm_config.cache_config.enable_prefix_caching = False
        logger.info(
            "Rondo: depth %d by default and up to %d, for which keys and values have room; eager, "
            "and without prefix caching.",
            allowed.default,
            allowed.cap,
        )
