"""Reading videos: where they come from (`source`), what they hold (`probe`, `scan`), which moments to look at (`sampling`),
and the frames shown then (`decode`; by `pyav` or `decord` from files, by `folder` from images)."""
