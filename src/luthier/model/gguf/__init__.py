"""GGUF, the file format of llama.cpp and Ollama: what of a model stands where in it, both ways."""
