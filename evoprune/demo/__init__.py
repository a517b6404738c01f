"""The bundled demo models: tiny Qwen2.5-VLs trained from scratch on procedural clips, the clips, and questions about them.

One knows coloured shapes and digits on small textured frames, the other crowded scenes with signs. They exist so that a fresh
install can answer a question without a download, and so that pruning methods can be compared honestly on small, known worlds.
"""
