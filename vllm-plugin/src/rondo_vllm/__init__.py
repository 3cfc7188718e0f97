"""Rondo models in vLLM: found by its entry point, loaded in each of its processes."""


def register() -> None:
    """Make vLLM know the model. It calls this in every process, and may do so more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import rondo  # noqa: F401  transformers knows the model once this is imported
    from rondo_vllm.settings import RecurrentSettings

    ModelRegistry.register_model("RecurrentForCausalLM", "rondo_vllm.model:RecurrentForCausalLM")
    MODELS_CONFIG_MAP["RecurrentForCausalLM"] = RecurrentSettings
