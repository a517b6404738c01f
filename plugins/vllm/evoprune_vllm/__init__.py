"""A plugin that runs evoprune's encoder and video reader inside vLLM (https://github.com/vllm-project/vllm).

vLLM calls `register`, an entry point in the `vllm.general_plugins` group. It adds model architectures and a video decoder under new
names, so installing this package has no effect until a user requests one of them. Only `register` and the modules it references
import vLLM. See docs/serving.md.
"""

import logging
import sys

# Supported vLLM minor versions, in ascending order. Any vLLM release may change its model interfaces.
TESTED = ("0.32", "0.33")
PREFIX = "EvoPrune"  # prefix for architecture names
DECODER = "evoprune"  # the decoder's name in vLLM
FAMILIES = ("Qwen2_5_VL", "Qwen2VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe")


def register() -> None:
    """Register evoprune's model architectures and video decoder with vLLM.

    If the vLLM version isn't listed in `TESTED`, log a warning and register nothing.
    """
    from vllm import __version__

    if ".".join(__version__.split(".")[:2]) not in TESTED:
        logging.getLogger("vllm.evoprune").warning(
            "evoprune registered nothing: found vLLM %s, but evoprune works only with %s; "
            "install one of these versions of vLLM, or a newer evoprune-vllm",
            __version__,
            " and ".join(TESTED),
        )
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for family in FAMILIES:
        stock = f"{family}ForConditionalGeneration"
        ModelRegistry.register_model(PREFIX + stock, f"{__name__}.model:{PREFIX}{stock}")
        if stock in MODELS_CONFIG_MAP:  # vLLM adjusts settings by architecture, such as the dtype of recurrent states
            MODELS_CONFIG_MAP[PREFIX + stock] = MODELS_CONFIG_MAP[stock]
    # vLLM has no function for adding a decoder. It looks up the decoder name in its options and imports the module with that name.
    from vllm.multimodal import video_decoders

    from evoprune_vllm import decoder

    video_decoders._BACKEND_OPTION_DEFAULTS[DECODER] = decoder.OPTIONS
    sys.modules[f"{video_decoders.__name__}.{DECODER}"] = decoder
