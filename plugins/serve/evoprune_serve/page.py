"""The web page at `/`, a self-contained file, and the routes it uses in addition to OpenAI's API.

`/page/settings` returns the server's settings, and `/page/sample` a clip. Requests to `/page/units` and `/page/moments` have the
same body as a chat completion request about one video.
"""

import hashlib
import re
from base64 import b64encode
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from evoprune.bench import Fates
from evoprune.errors import UsageError
from evoprune.methods import Budget
from evoprune.moments import Search
from evoprune.report import DEMO_KNOWLEDGE, WARNINGS, Times, VideoFacts, warned, warning_text
from evoprune.session import PipelineOptions, Session, weights_of
from evoprune.video import Plan
from evoprune.video_qa import VideoQA
from evoprune.vision import TowerOutput, encode_rows
from evoprune_serve.errors import refused
from evoprune_serve.work import Job, Put, Task, Told, Work

PAGE = "/"
SETTINGS = "/page/settings"
UNITS = "/page/units"
MOMENTS = "/page/moments"
SAMPLE = "/page/sample"
PAGE_PATHS = (PAGE, SETTINGS, UNITS, MOMENTS, SAMPLE)
KNOWN = {
    "shapes": "colored shapes and digits",
    "scenes": "crowded scenes with signs",
}  # what each kind of demo model knows
REAL = "evoprune serve -m Qwen/Qwen2.5-VL-3B-Instruct"
SAMPLE_TEXTS = {"name": "sample.mp4", "question": "What vanishes?", "query": "a red diamond"}
SHARES = (0.05, 0.15, 0.6, 0.8)  # budgets offered on the page in addition to the presets
# Warning text for visitors of the page. It differs from the command line's text because visitors can't set options and may not know
# this project's documentation, and because the page doesn't have some of the times and numbers.
PAGE_TEXTS = {
    "damaged_video": "the video is damaged: each frame that cannot be decoded was replaced by the previous one",
    "cut_short": "the video breaks off before the end that its file states",
    "clock_gap": "the timestamps of the video jump ahead; times after the jump may be too early",
    "joined_files": "the video contains another file after the first one; everything after the first may be missing or misplaced",
    "pictures_whole": "images are not pruned; pruning counts cover only the videos",
    "cache_not_written": "the server could not store the encoded video",
    "weights_not_stored": "the server could not store the quantized weights of its model",
    "interlaced_video": "the video is interlaced, and was deinterlaced",
    "stretched_video": "the video states pixels that are more than ten times as wide as high, or as high as wide, so they are "
    "read as square",
    "other_tracks": "the video has several video tracks: the default one is read, or else the largest",
    "guessed_rate": "the video does not state its frame rate and is read at 25 frames per second; if that is wrong, "
    "so are all times",
    "sound_ignored": "the sound of the video is not read, so an answer about it comes only from the images",
    "limited": "the server read fewer or smaller frames than usual, because the video is long or large",
    "answer_cut": "the answer may be incomplete: it reached the server's token limit",
    "thoughts_cut": "the model was still thinking when it reached the server's token limit, so there is no answer",
    "always_thinks": "this model always thinks before it answers; its thoughts count toward the token limit",
    "demo_model": f"{DEMO_KNOWLEDGE}; answers about anything else are meaningless",
    "demo_untold": f"{DEMO_KNOWLEDGE}; the video's format does not show whether it is one of these. "
    "If it is not, do not trust any answer about it",
    "demo_question": "the question contains words that the demo model was not trained on; do not rely on the answer",
    "demo_schema": "the demo models were not trained to write JSON, so the answer is meaningless",
    "demo_history": "the demo models were trained on single questions and answer follow-up questions less accurately",
    "demo_overlay": f"{DEMO_KNOWLEDGE}; what it merges or drops in other videos means little",
}


Handler = Callable[[Request], Awaitable[Response]]


class Asking(Protocol):
    """The methods and attributes of `Server` used by the web page."""

    settings: Any
    work: Work

    async def task(self, request: Request, task: Task) -> Response: ...

    def counted(self, route: Handler, logged: bool = True) -> Handler: ...


class Page:
    """The web page's routes."""

    def __init__(self, server: Asking):
        self._server = server
        self._html = Fates.with_drawing(files("evoprune_serve").joinpath("page.html").read_text(encoding="utf-8"))
        self._sample = files("evoprune_serve").joinpath("sample.mp4").read_bytes()
        self._headers = {
            "Content-Security-Policy": policy(self._html, server.settings.urls),
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }

    async def page(self, request: Request) -> Response:
        return Response(self._html, media_type="text/html", headers=self._headers)

    async def settings(self, request: Request) -> Response:
        """Respond with the models, the available budgets, all warning text, and other facts for the page."""
        settings = self._server.settings
        models = self._server.work.models
        demos = {name: qa.loaded.demo.world for name, qa in models.items() if qa.loaded.demo}
        return JSONResponse(
            {
                "models": [model_record(name, qa) for name, qa in models.items()],
                "demos": {name: KNOWN[world] for name, world in demos.items()},
                "real": REAL,
                "sample": SAMPLE_TEXTS | {"models": [name for name in models if demos.get(name) != "scenes"]},
                "budgets": budgets(settings.usual),
                "budget": settings.usual.pruning.budget,
                "urls": settings.urls,
                "upload_bytes": settings.access.upload_bytes,
                "warnings": {name: sentence(name) for name in WARNINGS},
            }
        )

    async def sample(self, request: Request) -> Response:
        """Respond with a clip that visitors can try."""
        return Response(self._sample, media_type="video/mp4", headers={"X-Content-Type-Options": "nosniff"})

    async def units(self, request: Request) -> Response:
        """Respond with the effect of pruning on each unit of a video, plus the encoding and prefill times."""
        return await self._server.task(request, self._tell_units)

    async def moments(self, request: Request) -> Response:
        """Respond with the moments in a video that match the question."""
        return await self._server.task(request, self._tell_moments)

    def routes(self) -> list[Route]:
        return [
            Route(PAGE, self._server.counted(self.page, logged=False), methods=["GET"]),
            Route(SETTINGS, self._server.counted(self.settings, logged=False), methods=["GET"]),
            Route(SAMPLE, self._server.counted(self.sample, logged=False), methods=["GET"]),
            Route(UNITS, self.units, methods=["POST"]),
            Route(MOMENTS, self.moments, methods=["POST"]),
        ]

    # Tasks, which run in the model thread.

    def _tell_units(self, job: Job, put: Put) -> None:
        work = self._server.work
        question = job.assignment.question
        qa = work.session(question)
        Fates.check(qa.session.pruning)
        check_one_video(job)
        made: list[TowerOutput] = []

        def tower(*given: Any, **options: Any) -> TowerOutput:
            made[:] = [encode_rows(*given, **options)]
            return made[0]

        encoded = work.encode(job, tower)
        answer = encoded.ask(question.text, max_new_tokens=1)
        answer.text  # generate the answer to measure the prefill time  # noqa: B018
        (plan,) = encoded.plans
        warnings = [name for name, _ in warned(encoded.report) if name != "demo_model"]
        if not qa.loaded.knows(plan.info):
            warnings.append("demo_overlay")
        put(Told(units_record(plan, Fates.of(made[0]), answer.report.time_ms) | {"warnings": warnings}, last=True))

    def _tell_moments(self, job: Job, put: Put) -> None:
        check_one_video(job)
        question = job.assignment.question
        session = self._server.work.session(question).session

        def progress(stage: str, done: int, total: int) -> None:
            job.check()
            put(Told({"stage": stage, "done": done, "of": total}))

        source = job.assignment.files.inputs()[0]
        options = self._server.settings.usual.find
        with Search(session, source, [question.text], options, question.sampling) as search:
            search.run(progress)
            moments = [
                {"start_s": each.start_s, "end_s": each.end_s, "best_s": each.best_s, "score": each.score}
                for each in search.moments()
            ]
            score, best_s = search.best(question.text)
            more = search.more(question.text)
        best = {"score": score, "time_s": best_s}
        put(
            Told(
                {
                    "moments": moments,
                    "more": more,
                    "best": best,
                    "origin_s": search.info.start_s,
                    "warnings": list(search.warnings),
                },
                last=True,
            )
        )


def model_record(name: str, qa: VideoQA) -> dict[str, Any]:
    """Describe a model for the page. `overlay` is True if the page can show the units kept by the model's pruning method."""
    demo = qa.loaded.demo is not None
    return {"name": name, "files": file_names(qa), "demo": demo, "overlay": drawable(qa.session)}


def file_names(qa: VideoQA) -> list[str]:
    """Return the names of a model's GGUF files, without their folders, or an empty list for other models."""
    return [Path(file).name for file in weights_of(qa.loaded.description).facts()["files"]]


def drawable(session: Session) -> bool:
    """Return True if the page can draw an overlay of the units kept by the session's pruning method."""
    try:
        Fates.check(session.pruning)
    except UsageError:
        return False
    return True


def check_one_video(job: Job) -> None:
    """Raise ApiError unless a request's messages contain exactly one video."""
    count = len(job.assignment.files.names)
    if count != 1:
        raise refused(f"the messages have {count} videos; this request takes exactly one", "messages")


def units_record(plan: Plan, units: Fates, times: Times) -> dict[str, Any]:
    """Convert the unit fates and measured times of a video to JSON data. See `Fates.record`."""
    return {
        "origin_s": plan.info.start_s,
        "picture": plan.is_picture,
        "still": plan.grid[0] == 1,
        "start_s": plan.sampling.start_s,
        "end_s": plan.sampling.end_s,
        "frames": plan.sampling.frames,
        "size": [plan.width, plan.height],
        **units.record(),
        "time_ms": {"encode": times.encode, "prefill": times.prefill},
    }


def budgets(usual: PipelineOptions) -> list[dict[str, Any]]:
    """Return the available budgets in ascending order, with a `share` for videos and a `still` share for images.

    A content-dependent budget comes first and has no fixed shares.
    """
    own = usual.pruning.config().budget
    known = [*map(Budget.parse, SHARES), *Budget.PRESETS.values()]
    if own.name not in Budget.AUTOS:
        known = [budget for budget in known if budget.video != own.video] + [own]
    found = [
        {"budget": budget.recorded, "share": budget.video, "still": budget.still}
        for budget in sorted(known, key=lambda budget: budget.video)
    ]
    if own.name in Budget.AUTOS:
        found.insert(0, {"budget": own.name, "share": None, "still": None})
    return found


def sentence(warning: str) -> str:
    """Return the text shown to page visitors for a warning."""
    return PAGE_TEXTS.get(warning) or warning_text(warning, VideoFacts(), "the video")


def policy(html: str, urls: bool) -> str:
    """Return the page's Content-Security-Policy.

    The policy allows the page's own script and style, requests to this server, and files chosen by the visitor. If `urls` is True,
    the page may also play videos from the web.
    """
    chosen = "blob: https: http:" if urls else "blob:"
    parts = {
        "default-src": "'none'",
        "script-src": _hashed(html, "script"),
        "style-src": _hashed(html, "style"),
        "connect-src": "'self'",
        "img-src": f"data: {chosen}",
        "media-src": chosen,
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items())


def _hashed(html: str, tag: str) -> str:
    """Return the hash of a page's only element with the given tag, in Content-Security-Policy syntax."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digest = b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
