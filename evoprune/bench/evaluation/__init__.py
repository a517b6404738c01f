"""Accuracy against budget on questions with known answers: `run` asks in full and at each budget, `scores` compares."""
