"""From frames to visual tokens: preprocessing, and the vision tower with pruning between its layers.

The encoder runs a method's plan on the weights of a tower of Qwen3-VL, Qwen2.5-VL or Qwen2-VL, this project's or Hugging Face's.
"""
