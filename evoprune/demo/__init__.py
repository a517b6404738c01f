"""The bundled demo model: a tiny Qwen2.5-VL trained from scratch on procedural clips, the clips, and questions about them.

It knows coloured shapes and digits on small textured frames, and nothing else. It exists so that a fresh install can
answer a question without a download, and so that pruning methods can be compared honestly on a small, known world.
"""
