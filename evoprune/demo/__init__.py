"""The bundled demo models, tiny Qwen2.5-VLs trained from scratch on procedural clips; the clips, and questions about them.

They answer without a download, and make pruning methods comparable on small, known worlds.
"""
