"""An lmms-eval task on the sample clips."""


def doc_to_visual(doc):
    return [f"samples/{doc['video']}"]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}
