"""llama.cpp as an engine: a GGUF file as it is, on llama-cpp-python's low-level interface."""
