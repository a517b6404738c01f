"""Writes the optional output files of `evoprune find`: subtitles, chapters, a contact sheet, and clips."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evoprune.errors import UsageError
from evoprune.util import counted
from evoprune_cli.delivery import check_new_folder, check_writable, write_bytes
from evoprune_cli.terminal import progress, tell

if TYPE_CHECKING:
    from evoprune.moments import Search


@dataclass(frozen=True)
class MomentFiles:
    """The optional output files of `evoprune find`. The paths of files not requested by the user are None."""

    srt: str | None
    chapters: str | None
    contact_sheet: str | None
    clips: str | None  # a folder
    exact: bool  # whether clips start and end exactly at the moments' timestamps

    def check(self, videos: list[str], output: str | None) -> None:
        """Check the options and the output paths before any video is read.

        `output` is another file to be written by the command, so all paths must differ from it.

        Raises:
            UsageError: If a file can't be written, or an option can't be used with the given videos.
        """
        single = {"--srt": self.srt, "--chapters": self.chapters, "--contact-sheet": self.contact_sheet}
        files = [os.path.realpath(file) for file in (*single.values(), output) if file]
        if len(set(files)) < len(files):
            raise UsageError("two options name the same file", "give each its own file")
        for option, file in single.items():
            if file is not None and len(videos) > 1:
                hint = "run find once per video; --clips takes several"
                raise UsageError(f"{option} takes one video, but there are {len(videos):,}", hint)
            text = file in (self.srt, self.chapters)  # a user may have edited it
            if text and file and os.path.isfile(file) and os.path.getsize(file):
                raise UsageError(f"{file} already exists", "name another file, or remove this one")
            check_writable(file, inputs=videos)
        sheet = self.contact_sheet
        if sheet is not None and os.path.splitext(sheet)[1].lower() != ".png":
            raise UsageError(f"--contact-sheet {sheet} is not a PNG file", "use a name that ends in .png")
        if self.exact and self.clips is None:
            raise UsageError("--exact applies only to clips", "add --clips DIR")
        if self.clips is not None:
            self._check_folder(self.clips, videos)

    def _check_folder(self, clips: str, videos: list[str]) -> None:
        if not clips:
            raise UsageError("the name of an output is empty", "name a folder; is a shell variable unset?")
        if not os.path.exists(clips):
            check_new_folder(clips)
        elif not (os.path.isdir(clips) and os.access(clips, os.W_OK)):
            raise UsageError(f"cannot write to {clips}", "name a folder that you can write to")
        for video in videos:
            if os.path.isdir(video):
                raise UsageError(f"{video} is a folder of images, which cannot be cut into clips", "leave out --clips")

    def write(self, search: "Search", name: str, quiet: bool) -> list[str]:
        """Write the requested files for the moments found in a video. If there are no moments, nothing is written.

        Returns:
            The path of each moment's clip. Empty if no clips were requested.

        Raises:
            UsageError: If a file can't be written.
            VideoError: If the video can't be read.
        """
        moments = search.moments()
        if not moments:
            return []
        left_out = sum(map(search.more, search.queries))
        note = f"about {left_out:,} more left out by --top" if left_out else ""
        if self.srt is not None:
            from evoprune_cli.subtitles import srt

            write_bytes(self.srt, srt(moments).encode())
        if self.chapters is not None:
            from evoprune_cli.subtitles import chapters

            text = chapters(moments, search.duration_s)
            if note:
                text += f"; {note}\n"  # a comment
            write_bytes(self.chapters, text.encode())
        if self.contact_sheet is not None:
            from evoprune.bench import contact_sheet

            title = os.path.basename(name)
            if note:
                title += f" ({note})"
            write_bytes(self.contact_sheet, contact_sheet(search.info, moments, title))
        return [] if self.clips is None else self._cut(search, name, quiet)

    def _cut(self, search: "Search", name: str, quiet: bool) -> list[str]:
        from evoprune.video import cut_clip

        moments = search.moments()
        cut = []
        earlier_s = 0.0
        with progress(not quiet) as show:
            for number, moment in enumerate(moments):
                show("cutting, clip", number + 1, len(moments))
                clip = cut_clip(
                    search.info,
                    moment.start_s,
                    moment.end_s,
                    self.clips,
                    exact=self.exact,
                    title=moment.query,
                    named_after=name,
                )
                cut.append(clip.path)
                earlier_s = max(earlier_s, moment.start_s - clip.start_s)
        if not quiet:
            text = f"{name}: {counted(len(moments), 'clip')} in {self.clips}"
            if earlier_s >= 0.05:
                text += f", which start at keyframes, up to {earlier_s:.1f} s early (--exact)"
            tell(text)
        return cut
