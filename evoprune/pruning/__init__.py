"""The building blocks of pruning methods: budgets, plans, schedules, scores, selection, merging and reuse.

Plain functions and small frozen dataclasses over integers and tensors. They know no method and no model.
"""
