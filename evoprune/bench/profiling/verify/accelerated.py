"""What kernels and graphs compute on this GPU, compared with plain PyTorch, one after another."""

import torch

from evoprune.backend import operators
from evoprune.backend.devices import can_capture, plainly
from evoprune.bench.profiling.verify.outcome import DIFFERS, Outcome, gap, judged, skipped
from evoprune.bench.profiling.verify.subject import NEW_TOKENS, Subject
from evoprune.language import generate, static
from evoprune.methods.select import STEPS, grid_tables

GRID, ROWS, WIDTH = (6, 9, 13), 500, 128
SAME = 0.99  # share of units that two forms of a selection have alike: where sums round otherwise, near ties may turn


def accelerated(subject: Subject) -> Outcome:
    """Each against its plain form; says the first that differs."""
    if subject.device.type != "cuda":
        return skipped("kernels and graphs are for CUDA")
    figures: dict[str, tuple[float, float]] = {}
    for name, share in _selections(subject.device).items():
        figures[f"{name}_unlike"] = (1 - share, 1 - SAME)
    with plainly():
        expected = subject.encode(subject.asking(1.0), [subject.video]).encoded.every_feature
    made = subject.encode(subject.asking(1.0), [subject.video]).encoded.every_feature
    features = gap(made, expected)
    figures |= {f"tower_{name}": limit for name, limit in features.limits(subject.features_noise).items()}
    said = f"tower {features}"
    if can_capture(subject.device):
        logits = gap(*_decoded(subject), centred=True)
        figures |= {f"decoding_{name}": limit for name, limit in logits.limits(subject.logits_noise, 2).items()}
        said += f"; decoding {logits}"
    outcome = judged(said, figures)
    if outcome.state == DIFFERS:
        return Outcome(DIFFERS, f"{outcome.says}; EVOPRUNE_PLAIN=1 does without kernels and graphs", outcome.figures)
    return outcome


def _selections(device: torch.device) -> dict[str, float]:
    """The share of equal values of the operators of selection and reuse, by name."""
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu").to(device)

    place = drawn(ROWS, WIDTH) * (STEPS / WIDTH) ** 0.5
    salience, units = drawn(ROWS).abs().clamp(max=1), GRID[0] * GRID[1] * GRID[2]
    row = torch.randint(ROWS, (units,), generator=random, dtype=torch.int64, device="cpu").to(device)
    time, _, tubes = grid_tables(GRID, str(device))
    half, weight, first = place.square().sum(1) / 2, STEPS * salience**2, (salience * STEPS / 2).round()
    means = (drawn(GRID[0], 117, 96) * 20 + 128).clamp(0, 255)
    means[1::2, 30:] = means[:-1:2, 30:]

    def each() -> dict[str, torch.Tensor]:
        radii = operators.tube_radii(place, half, weight, first, row, time, tubes, units)
        kept = radii.topk(units // 4).indices.sort().values
        scanned = operators.reuse_scan(means, means[0], torch.zeros_like(row[:117]), False, 0, 8.0)[0]
        of = operators.nearest_selected(place, half, weight, row, time, selected)
        averages = operators.mean_rows(place, of, row, torch.ones_like(time), len(selected))
        mask = torch.zeros_like(row, dtype=torch.bool).index_fill_(0, kept, True)
        return {"selection": mask, "clusters": of, "reuse": scanned, "means": averages.round(decimals=2)}

    selected = torch.arange(0, units, 4, dtype=torch.int64, device=device)
    made = each()
    with plainly():
        expected = each()
    return {name: float((made[name] == expected[name]).float().mean()) for name in made}


@torch.inference_mode()
def _decoded(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits along an answer `[n, vocabulary]`: from steps in a graph, and from plain decoding."""
    model, encoded = subject.loaded.model, subject.encode(subject.asking(1.0), [subject.video])
    answer = encoded.ask("What happens?", max_new_tokens=NEW_TOKENS)
    answer.text  # which generates it  # noqa: B018
    embeds = generate.embed_ids(model, torch.arange(64, dtype=torch.int64, device="cpu"))
    positions = torch.arange(64, dtype=torch.int64, device="cpu").expand(3, -1)
    with plainly():
        state = generate.prefill(model, embeds, positions, 64)
        plain = generate.along(
            model, state, torch.tensor([*answer.ids, 0], dtype=torch.int64, device="cpu"), one_by_one=True
        )[1:]
    state = generate.prefill(model, embeds, positions, 64)
    steps, holder, made = static.Steps(model, static.COLUMNS), object(), []
    steps.begin(holder, state.cache, 64, static.COLUMNS)
    for token in answer.ids:
        steps.following(model, holder, token, lambda logits, best: made.append(logits.clone()) or 0)
    return torch.stack(made), plain
