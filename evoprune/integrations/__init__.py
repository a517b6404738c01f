"""Where evoprune meets other programs. Each module needs that program to be installed, and nothing else imports it."""


def lmms_eval_models():
    """What lmms-eval loads by the entry point of the group `lmms_eval.models`: names, and where the class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    name = "evoprune_qwen2_5_vl"
    return ModelManifest(name, simple_class_path="evoprune.integrations.lmms_eval.EvoPruneQwen25VL")
