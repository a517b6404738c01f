"""Many questions about many videos: rows from JSONL and CSV files, the run, its output file, and the same on Ray.

`evoprune batch` runs this; `evoprune eval` reads its files of questions with `rows.py`.
"""
