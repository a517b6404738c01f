"""evoprune as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), which only `manifest` and `model` import."""


def manifest():
    """Return what lmms-eval loads by the entry point of the group `lmms_eval.models`: names, and where the class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    name = "evoprune_qwen2_5_vl"
    return ModelManifest(name, simple_class_path="evoprune_lmms_eval.model.EvoPruneQwen25VL")
