"""All checks, in the order in which they run: the cheap ones and those on which others rest come first."""

from functools import partial

from evoprune.profiling.verify import pruned, speed, unpruned
from evoprune.profiling.verify.outcome import Check

CHECKS = (
    Check("kernels", "nothing: what computes attention and products here", speed.kernels),
    Check("patches", "pixels of resized frames, with transformers' processor", unpruned.patches),
    Check("positions", "positions of a prompt's tokens, with transformers'", unpruned.positions),
    Check("tower", "features with nothing pruned, with transformers' tower", unpruned.tower),
    Check("logits", "the language model on the same features, with transformers'", unpruned.logits),
    Check("answer", "a greedy answer about a video, token by token, with transformers'", unpruned.answer),
    Check("inputs", "the same about a picture and a video together", unpruned.inputs, slow=True),
    Check("counts", "rows of each layer and tokens, with the plan", pruned.counts),
    Check("chunks", "tokens from the smallest chunks, with those from the usual ones", pruned.chunks),
    Check("reuse", "a clip that stands still, with and without reuse", pruned.reuse),
    Check("model", "EvoPrune(...)(model) of transformers, with VideoQA, both pruned", pruned.transformers_model),
    Check("waits", "how often the program waits for the device, with the design", speed.waits),
    Check("memory", "the peak of a question, with the estimate", speed.memory),
    Check("packed", "products with packed weights, with those in fp64", unpruned.packed),
    Check("batch", "a batch of two in transformers' model, with each prompt by itself", unpruned.batch, slow=True),
    Check("threads", "tokens with another number of threads", pruned.threads, slow=True),
    Check(
        "int8",
        "an answer with weights in 8 bits, with the weights as they are",
        partial(pruned.bits, "int8"),
        slow=True,
    ),
    Check("int4", "the same in 4 bits", partial(pruned.bits, "int4"), slow=True),
    Check("speed", "time to the first token, with transformers' in turns", speed.first_token, slow=True),
    Check("methods", "every method on a short clip, with its plan and with itself", pruned.every_method, slow=True),
)
