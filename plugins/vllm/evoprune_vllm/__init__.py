"""evoprune's encoder inside vLLM (https://github.com/vllm-project/vllm): docs/serving.md.

`register` is the entry point of the group `vllm.general_plugins`. It adds architectures of its own, so installing this package
changes nothing in models that do not ask for them. Only `register` and the modules that it names import vLLM.
"""

import logging

TESTED = "0.32"  # minor version of vLLM; its interfaces for models change from one to the next
PREFIX = "EvoPrune"  # of the architectures' names
FAMILIES = ("Qwen2_5_VL", "Qwen2VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe")


def register() -> None:
    """Registers the architectures in vLLM; in another version than the tested one it does nothing but log one line."""
    from vllm import ModelRegistry, __version__

    if __version__.split(".")[:2] != TESTED.split("."):
        logging.getLogger("vllm.evoprune").warning(
            "evoprune registers nothing: it was tested with vLLM %s, and this is %s", TESTED, __version__
        )
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for family in FAMILIES:
        stock = f"{family}ForConditionalGeneration"
        ModelRegistry.register_model(PREFIX + stock, f"{__name__}.model:{PREFIX}{stock}")
        if stock in MODELS_CONFIG_MAP:  # what vLLM settles for an architecture, such as the dtype of recurrent states
            MODELS_CONFIG_MAP[PREFIX + stock] = MODELS_CONFIG_MAP[stock]
