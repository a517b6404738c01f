"""The model apart from what it computes: its configuration, its weights, linear layers, quantisation and costs.

`vision` and `language` run on these weights.
"""
