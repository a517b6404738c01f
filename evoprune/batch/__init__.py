"""Many questions about many videos: rows of files, which `evoprune eval` reads too, the run, its output, and the same on Ray."""
