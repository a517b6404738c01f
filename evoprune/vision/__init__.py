"""From frames to visual tokens: preprocessing, and the vision tower with pruning between its layers.

The encoder runs a method's plan on the weights of a Qwen2.5-VL or Qwen2-VL tower, this project's own or Hugging Face's.
"""
