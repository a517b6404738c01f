"""Makes evoprune available as a model in lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval)."""


def manifest():
    """Return the model's name and class for the `lmms_eval.models` entry point group."""
    from lmms_eval.models.registry_v2 import ModelManifest

    name = "evoprune_qwen2_5_vl"
    return ModelManifest(name, simple_class_path="evoprune_lmms_eval.model.EvoPruneQwen25VL")
