"""Run models from GGUF files, the file format of llama.cpp, LM Studio, and Ollama.

A model consists of a text file and a projector file with the vision tower, or of a single file in Ollama's layout. `files` finds
the files for a model name, and `reader` parses them without trusting them. `settings` converts their metadata to the small files of
a Hugging Face folder (config.json, tokenizer.json, and so on), which `folder` stores in the cache folder, so the rest of evoprune
handles them like any other folder. `tensors` provides the weights under their Hugging Face names, one tensor at a time, and
`blocks` dequantizes them.
"""
