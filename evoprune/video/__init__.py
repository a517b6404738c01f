"""Reading videos: what a file holds (`probe`), which moments to look at (`sampling`), and their frames (`decode`)."""
