"""From frames to visual tokens: preprocessing, and the vision tower with pruning inside."""
