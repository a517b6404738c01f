"""The worlds and the splits of the demo's clips, by name. No numpy, so that the command line's help can list them."""

# To report on, to tune on, and a family of shapes of its own that is never tuned on.
SPLITS = ("heldout", "validation", "portrait")
WORLDS = ("shapes", "scenes")
BOTH = "both"
