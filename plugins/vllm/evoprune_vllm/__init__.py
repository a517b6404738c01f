"""evoprune's encoder and video reader inside vLLM (https://github.com/vllm-project/vllm): docs/serving.md.

`register` is the entry point in the group `vllm.general_plugins`. It adds architectures and a decoder under their own names, so
installing this package changes nothing unless they are requested. Only `register` and the modules that it names import vLLM.
"""

import logging
import sys

TESTED = ("0.32", "0.33")  # minor versions of vLLM, in order; each release may change its model interfaces
PREFIX = "EvoPrune"  # prefix of the architectures' names
DECODER = "evoprune"  # name of the video decoder in vLLM
FAMILIES = ("Qwen2_5_VL", "Qwen2VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe")


def register() -> None:
    """Register the architectures and the decoder in vLLM.

    With a vLLM version that is not in `TESTED`, log one line and register nothing.
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
        if stock in MODELS_CONFIG_MAP:  # vLLM's settings for an architecture, such as the dtype of recurrent states
            MODELS_CONFIG_MAP[PREFIX + stock] = MODELS_CONFIG_MAP[stock]
    # vLLM has no function to add a decoder. It looks up the name in the options, then imports the module of this name.
    from vllm.multimodal import video_decoders

    from evoprune_vllm import decoder

    video_decoders._BACKEND_OPTION_DEFAULTS[DECODER] = decoder.OPTIONS
    sys.modules[f"{video_decoders.__name__}.{DECODER}"] = decoder
