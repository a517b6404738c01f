"""Searches a video for moments that match queries. Each segment is encoded once and then scored for every query.

A segment's score is computed from the first token of the answer. It is the probability of the answer that indicates a match
(usually yes), assuming that yes and no are the only possible answers. After all segments have been scored, the borders of the best
moments are located more precisely. Segments are independent of each other, and each segment is discarded before the next one is
encoded, so memory usage does not grow with the video length.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

from evoprune.errors import UsageError, VideoError
from evoprune.language import GenerationOptions, Tokenizer
from evoprune.moments.segments import (
    MARGIN,
    SEGMENT_S,
    Run,
    Segment,
    border,
    cut,
    least_odds,
    log_odds,
    probability,
    runs,
)
from evoprune.report import ABOUT_SOUND, VideoFacts, warned
from evoprune.session import (
    Cache,
    EncodedInputs,
    FindOptions,
    OpenInputs,
    Session,
    speech_of,
)
from evoprune.suggestions import Suggesting
from evoprune.util import check_question
from evoprune.video import GivenInput, Input, Plan, SamplingOptions, Subtitles, Video, probe, read_subtitles

# The questions that together determine whether a segment matches a query. Each question is paired with the answer (True for yes)
# that indicates a match.
Questions = tuple[tuple[str, bool], ...]
# A progress callback that receives the stage, the number of finished items, and the total number of items. The stages are
# "segment", then "piece" (a piece of one of the best segments), and then, for each query, "moment" (a moment whose borders have
# been found).
Progress = Callable[[str, int, int], None]

QUESTION = "Does the video show the following? {}\nAnswer yes or no."
ONE_TOKEN = GenerationOptions(max_new_tokens=1)
PIECE_FRAMES = 4  # number of frames per piece; scoring pieces of a segment locates the borders of a moment
PIECES = 4  # number of pieces per segment, or per piece that is sampled below the model's frame rate
# A piece shows a moment even if the moment covers only part of it. Therefore, a border that was located by the midpoints of pieces
# is moved inward by this fraction of a piece's length.
REACH = 0.2
CANDIDATES = 2  # initial number of segment runs to score by pieces, per requested moment
APART_S = SEGMENT_S  # a gap of at least this many seconds splits a moment into two


@dataclass(frozen=True)
class Moment(Suggesting):
    """A time span of a video that matches a query. Times are in seconds from the video's first frame.

    `score` is the probability (0 to 1) of the answer that indicates a match, rather than the opposite answer. It combines the score
    of the moment's best segment with the score of that segment's best piece. `best_s` is the midpoint of this piece.
    """

    query: str
    start_s: float
    end_s: float
    score: float
    best_s: float


class Search:
    """A search for moments in a video that match one or more queries. Use it in a `with` statement, or call `close` afterwards.

    Call `run` to perform the search. `moments` returns the moments found so far, even if `run` was interrupted.

    Args:
        session: The model and the pruning method.
        source: The video.
        queries: Descriptions of the moments to find.
        options: How to search: the segment length, the number of moments, and the minimum score.
        sampling: How to sample frames in each segment, and the part of the video to search.
        cache: Cache for encoded segments, or None. It is not used if the pruning method depends on the question.

    Attributes:
        segments: All segments to be scored.
        tokens: Total number of visual tokens in all segments before pruning.
        asked: Number of segments processed so far.
        unread: Number of these segments that were unreadable.
        warnings: A dict that maps warning names to facts about the affected video.

    Raises:
        UsageError: A query is empty, duplicated, or too long; or the words for yes and no begin with the same token.
        VideoError: The video is missing, unreadable, or empty, or the input is a still image.
        OutOfMemory: The model does not fit into memory.
    """

    def __init__(
        self,
        session: Session,
        source: Input,
        queries: Sequence[str],
        options: FindOptions,
        sampling: SamplingOptions,
        cache: Cache | None = None,
    ):
        session.check_process()
        self._session = session
        self._cache = cache
        self._cache_of_tokens = None if session.pruning.method.reads_question else cache
        self._options = options
        self._sampling = sampling
        self.queries = options.check_queries(queries)
        self._questions = {query: questions_for(session, options, query) for query in self.queries}
        self._yes, self._no = first_tokens(session.loaded.tokenizer, options.yes, options.no)
        given = GivenInput(source)
        self.name = given.name
        self.warnings: dict[str, VideoFacts] = {}
        self.unread = 0
        self._files = ExitStack()
        try:
            offline = session.loaded.description.options.offline
            file = self._files.enter_context(given.local(offline=offline))
            self._info = probe(file, folder_fps=sampling.frame_rate)
            options.check_video(self._info, self.name)
            self.duration_s = self._info.length_s
            self._fps = sampling.rate(session.loaded.video.fps)
            self.segments, self.tokens = self._cut()
        except BaseException:
            self._files.close()
            raise
        # The log odds of all segments, by query.
        self._scores: dict[str, list[float]] = {query: [] for query in self._questions}
        # Log odds of the pieces scored so far, by query and by the piece's midpoint and length, both in seconds.
        self._pieces: dict[tuple[str, float, float], float] = {}
        # Runs that have also been scored by pieces, including runs with scores that turned out to be too low for a moment.
        self._scored: dict[tuple[str, Run], Moment] = {}
        # Moments with known borders. A run contains multiple moments if it is split by a gap.
        self._bordered: dict[tuple[str, Run], list[Moment]] = {}
        # Maximum number of runs to score by pieces, by query.
        self._scored_runs = dict.fromkeys(self._questions, CANDIDATES * options.top)
        self._complete: set[str] = set()  # queries for which the borders of the best moments have been found
        self.asked = 0
        self._spoken = Subtitles()  # transcribed speech of all segments

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *problem) -> None:
        self.close()

    @property
    def info(self) -> Video:
        """Metadata of the video. If the video was downloaded, `path` is the path of the local copy."""
        return self._info

    def close(self) -> None:
        """Delete downloaded files, and evict cache entries until the cache is within its size limit."""
        self._files.close()
        if self._cache:
            self._cache.make_room()

    def run(self, progress: Progress | None = None) -> None:
        """Score every segment for every query, and then locate the borders of each query's best moments.

        Raises:
            VideoError: No segment can be read.
            OutOfMemory: The model runs out of memory.
            ModelError: The model computes NaN or infinite values.
        """
        problem = None
        self._spoken = self._heard(progress)
        seek = self._sampling.seek
        if seek == "auto":
            seek = "keyframes"
        with closing(self._opened(self.segments, seek)) as every:
            for number, opened in enumerate(every):
                with closing(opened):
                    try:
                        odds = self._ask(opened, self.queries)
                    except VideoError as unreadable:
                        problem = unreadable
                        self.unread += 1
                        odds = dict.fromkeys(self._questions, -math.inf)
                for query, value in odds.items():
                    self._scores[query].append(value)
                self.asked = number + 1
                if progress:
                    progress("segment", self.asked, len(self.segments))
        if problem and self.unread == len(self.segments):
            raise problem
        self._score_candidates(self.queries, progress)
        for query in self.queries:
            while not self._find_borders(query, progress) and self._scored_runs[query] < len(self._runs(query)):
                self._scored_runs[query] *= 2
                self._score_candidates([query], progress)
            self._complete.add(query)

    def moments(self) -> list[Moment]:
        """Return the moments found so far, in query order, with the best moments of each query first.

        Moments that have not been scored by pieces yet have the borders and scores of their segments.
        """
        return [moment for query in self.queries for moment in self._shown(query)]

    def more(self, query: str) -> int:
        """Return the approximate number of moments found for a query in addition to the `top` moments returned by `moments`.

        The number is approximate, because a candidate without known borders may turn out not to be a moment at all, or to contain
        more than one.
        """
        every = self._moments(query, self._runs(query))
        return max(0, len(every) - len(self._shown(query)))

    def _shown(self, query: str) -> list[Moment]:
        """Return up to `top` moments for a query, best first."""
        candidates = self._candidates(query)
        if query in self._complete:
            candidates = [run for run in candidates if (query, run) in self._bordered]
        return sorted(self._moments(query, candidates), key=lambda moment: -moment.score)[: self._options.top]

    def _moments(self, query: str, among: Sequence[Run]) -> list[Moment]:
        """Return the moments in the given segment runs, with the most precise borders and scores known so far."""
        found: list[Moment] = []
        for run in among:
            found += self._bordered.get((query, run)) or [self._scored.get((query, run)) or self._coarse(query, run)]
        least = probability(self._least(query))
        return joined([moment for moment in found if moment.score >= least])

    def best(self, query: str) -> tuple[float, float]:
        """Return a query's best score so far and the corresponding time in seconds. At least one segment must have been scored."""
        scored = [moment for (asked, _), moment in self._scored.items() if asked == query]
        if scored:
            best = max(scored, key=lambda moment: moment.score)
            return best.score, best.best_s
        scores = self._scores[query]
        place = scores.index(max(scores))
        return probability(scores[place]), self.segments[place].middle_s

    def _least(self, query: str) -> float:
        if self._options.min_score is not None:
            return log_odds(self._options.min_score)
        return least_odds(self._scores[query])

    def _candidates(self, query: str) -> list[Run]:
        """Return the segment runs that should be scored by pieces, best first."""
        return self._runs(query)[: self._scored_runs[query]]

    def _runs(self, query: str) -> list[Run]:
        return runs(self._scores[query], self._least(query) - MARGIN)

    def _coarse(self, query: str, run: Run) -> Moment:
        best = self.segments[run.best]
        score = probability(self._scores[query][run.best])
        return Moment(query, self.segments[run.first].start_s, self.segments[run.last].end_s, score, best.middle_s)

    @property
    def _segment_s(self) -> float:
        return self.segments[0].end_s - self.segments[0].start_s

    @property
    def _shortest_s(self) -> float:
        """Minimum piece length in seconds, which is the length of a piece sampled at the model's frame rate."""
        return PIECE_FRAMES / self._fps

    @property
    def _piece_s(self) -> float:
        """Length in seconds of the pieces of a segment."""
        return max(self._shortest_s, self._segment_s / PIECES)

    def _middles(self, place: int) -> list[float]:
        """Return the midpoints in seconds of the pieces of the segment with index `place`."""
        segment = self.segments[place]
        count = max(1, round(self._segment_s / self._piece_s))
        step_s = self._segment_s / count
        return [segment.start_s + (n + 0.5) * step_s for n in range(count)]

    def _score_candidates(self, queries: Sequence[str], progress: Progress | None) -> None:
        """Rescore candidates by pieces, which are short, densely sampled parts of a segment.

        A candidate's new log odds are the mean of its best segment's log odds and the log odds of that segment's best piece.
        """
        wanted = [(query, run) for query in queries for run in self._candidates(query)]
        wanted = [each for each in wanted if each not in self._scored]
        pieces = [(query, middle_s) for query, run in wanted for middle_s in self._middles(run.best)]
        parts = [self._piece(middle_s, self._piece_s) for _, middle_s in pieces]
        with closing(self._opened(parts, self._sampling.seek)) as every:
            for number, ((query, middle_s), opened) in enumerate(zip(pieces, every, strict=True)):
                self._pieces[query, middle_s, self._piece_s] = self._odds(query, opened)
                if progress:
                    progress("piece", number + 1, len(pieces))
        for query, run in wanted:
            moment = self._coarse(query, run)
            best_s = max(self._middles(run.best), key=lambda middle_s: self._piece_odds(query, middle_s, self._piece_s))
            of_piece = self._piece_odds(query, best_s, self._piece_s)
            if of_piece > -math.inf:  # -inf if the piece cannot be read
                odds = (self._scores[query][run.best] + of_piece) / 2
                moment = replace(moment, score=probability(odds), best_s=best_s)
            self._scored[query, run] = moment

    def _find_borders(self, query: str, progress: Progress | None) -> bool:
        """Locate the borders of a query's best moments. Returns False if fewer than `top` moments were found."""
        least = probability(self._least(query))
        scored = [(run, self._scored[query, run]) for run in self._candidates(query)]
        scored = [(run, moment) for run, moment in scored if moment.score >= least]
        scored.sort(key=lambda each: -each[1].score)
        found: list[Moment] = []
        for run, moment in scored:
            if len(joined(found)) >= self._options.top:
                break
            if (query, run) not in self._bordered:
                self._bordered[query, run] = self._with_borders(query, run, moment)
            found += self._bordered[query, run]
            if progress:
                progress("moment", len(found), max(len(found), min(len(scored), self._options.top)))
        return len(joined(found)) >= self._options.top

    def _with_borders(self, query: str, run: Run, moment: Moment) -> list[Moment]:
        """Locate the borders of a moment by scoring pieces.

        If no piece shows the moment, it keeps the borders of its segments. If there is a gap of at least `APART_S` seconds in which
        no piece shows the moment, it is split at the gap, and multiple moments are returned. Because long segments have long
        pieces, their borders are then refined using shorter pieces.
        """
        shown_from = self._least(query) - MARGIN
        begin_s = self.segments[0].start_s
        stop_s = self.segments[-1].end_s
        length_s = self._piece_s

        def shown(middle_s: float) -> bool:
            return self._piece_odds(query, middle_s, length_s) >= shown_from

        def between(outside_s: float, inside_s: float) -> float:
            return border(shown, outside_s, inside_s, precision_s=length_s / 8, reach_s=REACH * length_s)

        def edge(inside_s: float, step_s: float, end_s: float) -> float:
            """Find a border by moving in steps of `step_s` seconds from a piece that shows the moment toward `end_s`."""
            outside_s = inside_s + step_s
            while (end_s - outside_s) * step_s > 0 and shown(outside_s):
                inside_s = outside_s
                outside_s += step_s
            if (end_s - outside_s) * step_s <= 0:
                outside_s = end_s
            return between(outside_s, inside_s)

        def closer(border_s: float, outwards_s: float) -> float:
            """Refine a border using shorter pieces. It is left unchanged if the first piece inside it does not show the moment."""
            outside_s = min(max(border_s + outwards_s, begin_s), stop_s)
            inside_s = min(max(border_s - outwards_s, begin_s), stop_s)
            return between(outside_s, inside_s) if shown(inside_s) else border_s

        places = range(run.first, run.last + 1)
        first = next((each for place in places for each in self._middles(place) if shown(each)), None)
        if first is None:
            return [moment]
        last = next(each for place in reversed(places) for each in reversed(self._middles(place)) if shown(each))
        borders = [edge(first, -length_s, max(begin_s, moment.start_s - self._segment_s))]
        for end_s, start_s in self._gaps(first, last, length_s, shown, between):
            borders += [end_s, start_s]
        borders.append(edge(last, length_s, min(stop_s, moment.end_s + self._segment_s)))
        moments = [replace(moment, start_s=borders[0], end_s=borders[1])]
        if len(borders) > 2:
            moments = [self._part(query, *span) for span in zip(borders[::2], borders[1::2], strict=True)]
        while length_s > self._shortest_s:
            reach_s = length_s / 2
            length_s = max(self._shortest_s, length_s / PIECES)
            moments = [
                replace(each, start_s=closer(each.start_s, -reach_s), end_s=closer(each.end_s, reach_s))
                for each in moments
            ]
        return [self._lasting(each) for each in moments]

    def _gaps(
        self,
        first_s: float,
        last_s: float,
        length_s: float,
        shown: Callable[[float], bool],
        between: Callable[[float, float], float],
    ) -> Iterator[tuple[float, float]]:
        """Yield the start and end of each gap of at least `APART_S` seconds between two pieces that show the moment.

        Args:
            first_s, last_s: Midpoints of the two pieces, in seconds.
            length_s: Length of the pieces in seconds.
            shown: Returns True if the piece around a time shows the moment.
            between: Finds the border between a time at which the moment is not shown (first argument) and a time at which it is
                shown (second argument).
        """
        if last_s - first_s < APART_S:
            return
        steps = math.ceil((last_s - first_s) / max(length_s, APART_S / 2))
        before_s = first_s  # midpoint of the latest piece that shows the moment
        away: list[float] = []  # midpoints of later pieces that do not show the moment
        for number in range(1, steps + 1):
            time_s = first_s + (last_s - first_s) * number / steps
            if number < steps and not shown(time_s):
                away.append(time_s)
                continue
            if away:
                end_s, start_s = between(away[0], before_s), between(away[-1], time_s)
                if start_s - end_s >= APART_S:
                    yield end_s, start_s
            before_s = time_s
            away = []

    def _part(self, query: str, start_s: float, end_s: float) -> Moment:
        """Create a moment from `start_s` to `end_s`, with a score based on its best segment and best piece."""
        reach_s = REACH * self._piece_s
        pieces = {
            middle_s: odds
            for (asked, middle_s, length_s), odds in self._pieces.items()
            if asked == query and length_s == self._piece_s and start_s - reach_s <= middle_s <= end_s + reach_s
        }
        best_s = max(pieces, key=lambda middle_s: pieces[middle_s])
        asked = zip(self.segments, self._scores[query], strict=True)
        of_segment = max(odds for each, odds in asked if each.start_s < end_s and each.end_s > start_s)
        score = probability((of_segment + pieces[best_s]) / 2)
        return Moment(query, start_s, end_s, score, best_s)

    def _lasting(self, moment: Moment) -> Moment:
        """Extend a zero-length moment to the length of one frame, and make sure that its best time lies within it."""
        start_s, end_s = moment.start_s, moment.end_s
        if start_s >= end_s:  # the moment is shorter than the frame interval
            middle_s = (start_s + end_s) / 2
            start_s = max(self.segments[0].start_s, middle_s - 0.5 / self._fps)
            end_s = min(self.segments[-1].end_s, middle_s + 0.5 / self._fps)
        return replace(moment, start_s=start_s, end_s=end_s, best_s=min(max(moment.best_s, start_s), end_s))

    def _piece(self, middle_s: float, length_s: float) -> Segment:
        start_s = max(self.segments[0].start_s, middle_s - length_s / 2)
        end_s = min(self.segments[-1].end_s, middle_s + length_s / 2)
        return Segment(start_s, end_s, PIECE_FRAMES)

    def _piece_odds(self, query: str, middle_s: float, length_s: float) -> float:
        if (query, middle_s, length_s) not in self._pieces:
            opened = self._open(self._piece(middle_s, length_s), self._sampling.seek)
            self._pieces[query, middle_s, length_s] = self._odds(query, opened)
        return self._pieces[query, middle_s, length_s]

    def _odds(self, query: str, opened: OpenInputs) -> float:
        """Return the log odds that a piece matches a query, or -inf if the piece is unreadable. Closes the input."""
        with closing(opened):
            try:
                return self._ask(opened, [query])[query]
            except VideoError:  # a piece may be unreadable even if its segment was readable
                return -math.inf

    def _cut(self) -> tuple[list[Segment], int]:
        """Cut the video into segments. Returns the segments and their total number of visual tokens before pruning.

        Raises UsageError if a query is too long.
        """
        sampling = self._sampling
        start_s, end_s = sampling.span(self._info.length_s)
        first_s = min(end_s, start_s + (self._options.segment_s or SEGMENT_S))
        plan = self._plan(Segment(start_s, first_s, 2))
        _, height, width = plan.full.grid
        total_tokens = self._options.total_tokens
        if sampling.sets_frames:
            total_tokens = None
        segments = cut(start_s, end_s, self._fps, height * width, total_tokens, self._options.segment_s)
        plan = self._plan(segments[0])
        texts = [text for questions in self._questions.values() for text, _ in questions]
        self._session.longest_prompt([plan], texts, ONE_TOKEN)
        return segments, len(segments) * plan.units

    def _plan(self, segment: Segment, seek: str = "auto") -> Plan:
        session = self._session
        part = self._sampling.part(segment.start_s, segment.end_s)
        wanted = part.with_overrides(frames=segment.frames, seek=seek)
        return session.loaded.description.plan(self._info, wanted, session.pruning, self.name)

    def _open(self, segment: Segment, seek: str) -> OpenInputs:
        plan = self._plan(segment, seek)
        if self._spoken.source is not None:
            count = self._session.loaded.tokenizer.encode
            said = [line for line in self._spoken.lines if line[0] < segment.end_s and line[1] > segment.start_s]
            spoken = replace(self._spoken, lines=said)
            plan = replace(
                plan, subtitles=spoken.fitted(self._sampling.max_subtitle_tokens, lambda text: len(count(text)))
            )
        return OpenInputs(self._session, [plan], cache=self._cache_of_tokens)

    def _heard(self, progress: Progress | None) -> Subtitles:
        """Return the subtitles or transcribed speech of all segments, or no lines if the `speech` option is "none"."""
        sampling = self._sampling
        if sampling.speech == "none":
            return Subtitles()
        span = self.segments[0].start_s, self.segments[-1].end_s
        found = read_subtitles(self._info, sampling.subtitles_wanted, start_s=span[0], end_s=span[1])
        if found.source is None:
            options = self._session.loaded.description.options
            found = speech_of(self._info, sampling, span, options, cache=self._cache, progress=progress)
        self.warnings |= dict.fromkeys(found.warnings, VideoFacts(path=self.name))
        return found

    def _opened(self, segments: Sequence[Segment], seek: str) -> Iterator[OpenInputs]:
        """Yield an open input for each segment, reading the next segment in the background. The caller must close the inputs."""
        following: OpenInputs | None = None
        try:
            for number, segment in enumerate(segments):
                opened = following or self._open(segment, seek)
                following = None
                if number + 1 < len(segments):
                    following = self._open(segments[number + 1], seek)
                    following.begin()
                yield opened
        finally:
            if following:
                following.close()

    def _ask(self, opened: OpenInputs, queries: Sequence[str]) -> dict[str, float]:
        """Return the log odds that a segment matches each query. If a query has multiple questions, the lowest result is used."""
        encoded = opened.encode()
        self._warn(encoded, queries)
        odds = {}
        for query in queries:
            each = []
            for text, means_it in self._questions[query]:
                logits, _ = encoded.read_along(text, self._yes[:1])
                value = float(logits[0, self._yes].logsumexp(0) - logits[0, self._no].logsumexp(0))
                each.append(value if means_it else -value)
            odds[query] = min(each)
        return odds

    def _warn(self, encoded: EncodedInputs, queries: Sequence[str]) -> None:
        """Collect a segment's warnings, except "limited", because users do not choose the number of frames per segment."""
        loaded = self._session.loaded
        for name, facts in warned(encoded.report):
            if name != "limited":
                self.warnings.setdefault(name, facts)
        texts = [text for query in queries for text, _ in self._questions[query]]
        if "demo_model" not in self.warnings and not all(map(loaded.knows_words, texts)):
            self.warnings.setdefault("demo_question", encoded.report.video)
        if encoded.ignores_sound and any(map(ABOUT_SOUND.search, texts)):
            self.warnings.setdefault("sound_ignored", encoded.report.video)
        if loaded.tokenizer.always_thinks:
            self.warnings.setdefault("always_thinks", encoded.report.video)


def joined(moments: Sequence[Moment]) -> list[Moment]:
    """Merge a query's overlapping moments. A merged moment has the score and best time of its best moment."""
    made: list[Moment] = []
    for moment in sorted(moments, key=lambda each: each.start_s):
        if made and moment.start_s <= made[-1].end_s:
            before = made.pop()
            best = max(before, moment, key=lambda each: each.score)
            moment = replace(best, start_s=before.start_s, end_s=max(before.end_s, moment.end_s))
        made.append(moment)
    return made


def questions_for(session: Session, options: FindOptions, query: str) -> Questions:
    """Return the questions to ask about a segment to determine whether it matches a query.

    A query that ends with a question mark is asked unchanged. For any other query, the prompt from the options is used if set.
    Otherwise, demo models are asked questions that they know, and all other models are asked `QUESTION`.
    """
    demo = session.loaded.demo
    questions: Questions
    if query.rstrip().endswith("?"):
        questions = ((query, True),)
    elif options.prompt is not None:
        questions = ((options.prompt.replace("{}", query), True),)
    elif demo:
        questions = demo.questions_of(query)
    else:
        questions = ((QUESTION.format(query), True),)
    for text, _ in questions:
        check_question(text)
    return questions


def first_tokens(tokenizer: Tokenizer, yes: str, no: str) -> tuple[list[int], list[int]]:
    """Return the possible first token IDs of the words for yes and no, in lower case, upper case, or capitalized.

    Tokens that can begin both words are left out.

    Raises:
        UsageError: No token is left for one of the two words.
    """
    begins = []
    for word in (yes.strip(), no.strip()):
        spellings = (word, word.lower(), word.capitalize(), word.upper())
        texts = [before + spelt for before in ("", " ") for spelt in spellings]
        begins.append({tokenizer.encode(text)[0] for text in texts})
    both = begins[0] & begins[1]
    if not begins[0] - both or not begins[1] - both:
        raise UsageError(f"{yes!r} and {no!r} begin with the same token", "choose words that start differently")
    return sorted(begins[0] - both), sorted(begins[1] - both)
