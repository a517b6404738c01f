"""lmms-eval tasks on generated clips: questions with four options, without and with subtitles in the prompt."""

from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

LETTERS = "ABCD"


def doc_to_visual(doc):
    return [f"clips/{doc['video']}"]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]


def doc_to_text_subtitle(doc, lmms_eval_specific_kwargs=None):
    return f"This video's subtitles are listed below:\n{doc['subtitles']}\n{doc['prompt']}"


def process_results(doc, results):
    """Judge an answer that is an option's text, or contains an option's letter."""
    said = results[0].strip().removesuffix(".")
    letter = extract_mcq_answer(said, choices=[*LETTERS])
    if said in doc["options"]:
        letter = LETTERS[doc["options"].index(said)]
    return {"right": float(letter == doc["answer"])}
