"""The plugin for vLLM's Transformers backend. vLLM calls register in each of its processes."""


def register() -> None:
    """Register the converted families with vLLM: their configs, their attention and their architectures."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    import ssmax.hf  # noqa: F401  configs and attention

    known = ModelRegistry.get_supported_archs()
    for name in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())):
        if isinstance(name, str) and f"SSMax{name}" not in known:
            ModelRegistry.register_model(f"SSMax{name}", "ssmax.serving.vllm_model:SSMaxForCausalLM")
