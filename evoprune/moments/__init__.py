"""Moments of a long video that show what a query says: asked of one segment after the other, and their borders found."""
