"""Live video: sources that end when they want, windows of time, the memory of a stream."""
