"""Compare GGUF files from llama.cpp's own converter with their originals and with llama.cpp."""
