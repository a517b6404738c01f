"""Mistakes that are often made in public code for pruning visual tokens, and what would find them here.

- Rotary applied twice where attention is derived again: tests/vision/test_gather.py::test_without_pruning_it_is_that_of_...
- Row 0 taken for a class token, which Qwen does not have: the same test, in which every unit asks and none is special.
- Scores of windows put back in the wrong order: the same test (grids of 5 x 7 units, windows of 4 x 4), and
  tests/vision/test_encoder.py::test_against_loops.
- Odd numbers of frames losing the last one: tests/video/test_plan.py::test_an_exact_count_rounds_up_to_even_..., and
  ::test_times_are_the_middles_of_equal_shares.
- A nominal ratio that is not the real one; nothing pruned because attention could not be had:
  tests/methods/test_plans.py::test_the_encoder_computes_what_was_planned, and test_rivals.py::test_counts_and_order.
- Positions numbered anew after pruning: tests/language/test_generate.py::test_positions_reach_the_model and
  ::test_embedding_a_pruned_prompt.
- Positions while decoding that follow the length of the shorter cache:
  tests/language/test_generate.py::test_decoding_on_a_pruned_cache_is_one_forward_pass_without_cache.
- Several videos in one prompt mixed up:
  tests/hf/test_context.py::test_several_videos_are_pruned_each_on_its_own; a prompt of our own holds one video and
  nothing else: tests/language/test_prompt.py::test_templates_without_one_video_....
- Matrices of all pairs over a whole video: tests/methods/test_rivals.py::test_no_matrix_of_all_pairs.
- Sets whose order depends on hashes: test_nothing_depends_on_hashes below.
- Noise that breaks ties: test_nothing_is_drawn and test_equal_tokens_go_by_index below, and the loops of test_peers.py and
  test_video_peers.py on equal tokens.
"""

import os
import subprocess
import sys

import pytest
import torch

from evoprune import methods
from tests.methods.tokens import AFTER, encoded, selected, tokens_of
from tests.vision.clips import changes, clip

GRID = (5, 4, 5)
QUESTION = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.few(8)
@pytest.mark.parametrize("name", AFTER)
def test_the_result_does_not_depend_on_the_chunk_size(name):
    args = methods.parse(name), clip(GRID, changes(GRID, 0.4)), GRID, 23
    whole, *others = (encoded(*args, question=QUESTION, chunk_units=size) for size in (10**6, 1, 40))
    for other in others:
        assert torch.equal(other.kept, whole.kept)
        torch.testing.assert_close(other.features, whole.features, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", AFTER)
def test_nothing_is_drawn(name):
    """Neither from the global generator nor by it."""
    tokens, made = tokens_of("duplicates", GRID), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        made.append(selected(name, tokens, 23))
        assert torch.equal(before, torch.get_rng_state())
    assert made[0] == made[1]


@pytest.mark.parametrize("name", [name for name in AFTER if name != "pool"])
@pytest.mark.parametrize("kind", ["random", "constant"])
def test_every_tensor_is_made_beside_the_tokens(name, kind):
    """What is made on the default device, which has no values here, cannot be mixed with them."""
    tokens, method = tokens_of(kind, GRID), methods.get(name)
    expected = selected(name, tokens, 23)
    with torch.device("meta"):
        made = method.select(tokens, 23)
        assert made.features(tokens.features).device.type == "cpu"
    assert made.kept.tolist() == expected


INDEXED = ["divprune", "evs-nofloor", "mmr", "scope", "dart"]
IN_EACH_PAIR = ["cdpruner", "vidcom2", "visionzip"]


@pytest.mark.parametrize("name", INDEXED + IN_EACH_PAIR)
@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_equal_tokens_go_by_index(name, kind):
    """The first of the video, or of each frame pair. The others' papers spread equal tokens out in ways of their own."""
    kept = selected(name, tokens_of(kind, (3, 4, 5)), 6)
    firsts = [0, 1, 2, 3, 4, 5] if name in INDEXED else [0, 1, 20, 21, 40, 41]
    assert kept == firsts


@pytest.mark.full
def test_nothing_depends_on_hashes():
    code = (
        "from tests.methods.tokens import AFTER, selected, tokens_of\n"
        "from tests.methods.test_traps import AFTER\n"
        "print([selected(name, tokens_of(kind, (5, 4, 5)), 23) for name in AFTER for kind in ('duplicates', 'drift')])"
    )
    env = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    here = [selected(name, tokens_of(kind, GRID), 23) for name in AFTER for kind in ("duplicates", "drift")]
    assert done.stdout.strip() == str(here)
