"""evoprune as a model for lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), which only `manifest` and `model` import."""


def manifest():
    """Return the manifest for the entry point group `lmms_eval.models`: the model's name and the location of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    name = "evoprune_qwen2_5_vl"
    return ModelManifest(name, simple_class_path="evoprune_lmms_eval.model.EvoPruneQwen25VL")
